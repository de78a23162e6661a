"""The report of a run: one HTML file with pictures and tables inside."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan, nan
from pathlib import Path
from typing import Any

import pandas as pd

from bench.results import common_of, device_of, families, frame, subset
from bench.tables import amount, memory
from bench.thresholds import HEADING, figures_of
from recipes.lab.files import write_text
from recipes.lab.pages import html_image, html_page, html_table, html_text

Table = tuple[Sequence[str], Sequence[Sequence[Any]]]


def write_report(
    report: dict[str, Any], drawn: Sequence[tuple[str, str, Path]], out: Path, source: str
) -> Path:
    """Writes report.html into ``out`` and returns its path."""
    cases = frame(report)
    absent, measured = report["cells_not_measured"], len(report["benchmarks"])
    parts = ["<h1>attnzoo benchmark</h1>", html_table(["", ""], _machine(report, source))]
    parts.append(f"<p>{measured + len(absent)} cases requested, {measured} measured.</p>")
    if absent:
        rows = [[case["name"], case["state"], case["reason"]] for case in absent]
        parts.append(f"<div class=bad>{html_table(['case', 'state', 'reason'], rows)}</div>")
    sections: list[tuple[str, Table]] = [
        ("Goals", (HEADING, [figure.row for figure in figures_of(report)]))
    ]
    for kind, title in (("layer", "One attention layer"), ("backbone", "The whole backbone")):
        for family in families(cases, kind):
            title_of = f"{title}: {family['mode']}, d = {family['width']}, {family['dtype']}"
            sections.append((title_of, _grid(subset(cases, kind, **family))))
    sections += [("Peers", _peers(cases)), ("Arithmetic of one layer", _counts(cases))]
    for title, (heading, rows) in sections:
        if rows:
            parts.append(f"<h2>{html_text(title)}</h2>{html_table(heading, rows)}")
    parts.append("<h2>Pictures</h2>")
    parts += [
        f"<figure>{html_image(path.read_bytes(), name)}"
        f"<figcaption>{html_text(caption)}</figcaption></figure>"
        for name, caption, path in drawn
    ]
    write_text(out / "report.html", html_page("attnzoo benchmark", "".join(parts)))
    return out / "report.html"


def _machine(report: dict[str, Any], source: str) -> list[tuple[str, Any]]:
    info, common = report["machine_info"]["attnzoo"], common_of(report)
    peaks = [f"{name} {value:.0f} {'GB/s' if name == 'copy' else 'GFLOP/s'}"
             for name, value in info["peaks"].items()]  # fmt: skip
    return [
        ("file", source),
        ("made", report["datetime"][:16]),
        ("commit", common.get("commit", "unknown")),
        ("device", f"{info.get('device', '')}, {device_of(report)}"),
        ("threads", info.get("threads", "")),
        ("peaks in this run", ", ".join(peaks)),
        ("allocator", common.get("allocator", "default")),
        ("versions", ", ".join(f"{k} {v}" for k, v in info["versions"].items())),
    ]


def _grid(cases: pd.DataFrame) -> Table:
    columns = ("q1 to q3", "over softmax", "peak memory", "of matmul peak")
    found = {(str(row["label"]), row["resolution"]): row for row in cases.to_dict("records")}
    sizes = sorted({px for _, px in found})
    rows = [
        [label, *(text for px in sizes for text in _measured(found.get((label, px))))]
        for label in sorted({label for label, _ in found})
    ]
    return ["mechanism", *(name for px in sizes for name in (f"{px} px", *columns))], rows


def _measured(row: dict[Any, Any] | None) -> list[str]:
    if row is None:
        return [""] * 5
    ratio, share = (float(row.get(key, nan)) for key in ("ratio_to_softmax", "share_of_peak"))
    return [
        f"{row['seconds'] * 1e3:.3g} ms",
        f"{row['seconds_q1'] * 1e3:.3g} to {row['seconds_q3'] * 1e3:.3g}",
        "" if isnan(ratio) else f"{ratio:.2f}",
        memory(row["peak_memory"]),
        "" if isnan(share) else f"{share:.0%}",
    ]


def _peers(cases: pd.DataFrame) -> Table:
    rows = []
    for case in subset(cases, "peers").to_dict("records"):
        name_of = " ".join(f"{case[key]}" for key in ("label", "mode"))
        name_of += f" {case['resolution']} px d{case['width']} {case['dtype']}"
        for name, ratio in sorted(case["ratios"].items(), key=lambda item: -item[1]["median"]):
            best = "best peer" if name == case.get("best_peer") else ""
            spread = f"{ratio['q1']:.2f} to {ratio['q3']:.2f}"
            rows.append([name_of, name, f"{ratio['median']:.2f}", spread, best])
        for name, reason in case["peers_missing"].items():
            rows.append([case["label"], name, "", reason, "does not run here"])
    return ("attnzoo", "peer", "our time over theirs", "quartiles", ""), rows


def _counts(cases: pd.DataFrame) -> Table:
    chosen = subset(cases, "count")
    if not chosen.empty:
        chosen = chosen.sort_values(["width", "resolution", "label"])
    keys = ("macs", "macs_paper", "macs_training", "parameters", "active_parameters")
    rows = [
        [case["label"], f"{case['resolution']} px", f"d{case['width']}",
         *("" if pd.isna(case[key]) else amount(case[key]) for key in keys)]
        for case in chosen.to_dict("records")
    ]  # fmt: skip
    return ("mechanism", "", "", "MACs", "MACs as the paper counts", "training step", "parameters",
            "active per token"), rows  # fmt: skip
