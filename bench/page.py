"""The report of a run: one HTML file with pictures and tables inside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bench.results import common_of, device_of, families, frame, subset
from bench.tables import amount, memory
from bench.thresholds import HEADING, figures_of
from recipes.lab.files import write_text
from recipes.lab.pages import html_image, html_page, html_table, html_text


def write_report(
    report: dict[str, Any], drawn: Sequence[tuple[str, str, Path]], out: Path, source: str
) -> Path:
    """Writes report.html into ``out`` and returns its path."""
    cases, absent = frame(report), pd.DataFrame(report["cells_not_measured"])
    measured = len(report["benchmarks"])
    parts = ["<h1>attnzoo benchmark</h1>", html_table(["", ""], _machine(report, source))]
    parts.append(f"<p>{measured + len(absent)} cases requested, {measured} measured.</p>")
    if not absent.empty:
        absent = absent[["name", "state", "reason"]].rename(columns={"name": "case"})
        parts.append(f"<div class=bad>{_html(absent)}</div>")
    goals = pd.DataFrame([figure.row for figure in figures_of(report)], columns=list(HEADING))
    sections = {"Goals": goals}
    for kind, title in (("layer", "One attention layer"), ("backbone", "The whole backbone")):
        for family in families(cases, kind):
            of = f"{title}: {family['mode']}, d = {family['width']}, {family['dtype']}"
            sections[of] = _grid(subset(cases, kind, **family))
    sections |= {"Peers": _peers(cases), "Arithmetic of one layer": _counts(cases)}
    for title, table in sections.items():
        if not table.empty:
            parts.append(f"<h2>{html_text(title)}</h2>{_html(table)}")
    parts.append("<h2>Pictures</h2>")
    parts += [
        f"<figure>{html_image(path.read_bytes(), name)}"
        f"<figcaption>{html_text(caption)}</figcaption></figure>"
        for name, caption, path in drawn
    ]
    write_text(out / "report.html", html_page("attnzoo benchmark", "".join(parts)))
    return out / "report.html"


def _html(table: pd.DataFrame) -> str:
    return html_table(table.columns, table.itertuples(index=False))


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


def _shown(cases: pd.DataFrame, column: str, form: Any) -> pd.Series:
    """A column as text, empty where there is no value."""
    values = cases[column] if column in cases else pd.Series(None, cases.index, dtype=float)
    return values.map(lambda value: "" if pd.isna(value) else form(value))


def _grid(cases: pd.DataFrame) -> pd.DataFrame:
    """A row per mechanism, and five columns per resolution."""
    cases = cases.drop_duplicates(["label", "resolution"], keep="last")
    low, middle, high = (
        _shown(cases, f"seconds{which}", lambda value: f"{value * 1e3:.3g}")
        for which in ("_q1", "", "_q3")
    )
    columns = {
        "time": middle + " ms",
        "q1 to q3": low + " to " + high,
        "over softmax": _shown(cases, "ratio_to_softmax", "{:.2f}".format),
        "peak memory": _shown(cases, "peak_memory", memory),
        "of matmul peak": _shown(cases, "share_of_peak", "{:.0%}".format),
    }
    keys = pd.MultiIndex.from_frame(cases[["label", "resolution"]].astype({"label": str}))
    wide = pd.DataFrame(columns).set_axis(keys, axis=0).unstack().fillna("").sort_index()
    order = [(name, px) for px in sorted(set(cases["resolution"])) for name in columns]
    names = [f"{px} px" if name == "time" else name for name, px in order]
    return wide[order].set_axis(names, axis=1).reset_index(names="mechanism")


def _peers(cases: pd.DataFrame) -> pd.DataFrame:
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
    return pd.DataFrame(rows, columns=["attnzoo", "peer", "our time over theirs", "quartiles", ""])


def _counts(cases: pd.DataFrame) -> pd.DataFrame:
    chosen = subset(cases, "count").sort_values(["width", "resolution", "label"])
    names = {"macs": "MACs", "macs_paper": "MACs as the paper counts",
             "macs_training": "training step", "parameters": "parameters",
             "active_parameters": "active per token"}  # fmt: skip
    size = chosen["resolution"].map("{} px".format), chosen["width"].map("d{}".format)
    columns = {"mechanism": chosen["label"], "resolution": size[0], "width": size[1]}
    return pd.DataFrame(columns | {n: _shown(chosen, k, amount) for k, n in names.items()})
