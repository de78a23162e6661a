"""The report of a run: one HTML file with pictures and tables inside."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bench.goals import rows_of
from bench.results import device_of, families, frame, subset
from bench.tables import amount, memory
from recipes.lab.console import printable
from recipes.lab.files import write_text

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1180px;margin:2em auto;padding:0 1em}
table{border-collapse:collapse;font-size:13px;display:block;overflow-x:auto;margin:.6em 0}
td,th{padding:3px 8px;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}
td:first-child,th:first-child{text-align:left}th{background:#f4f4f4}img{max-width:100%}
.bad{color:#a50026}figure{margin:1.5em 0}figcaption{color:#555}code{background:#f4f4f4}"""


def write_report(
    report: dict[str, Any], drawn: Sequence[tuple[str, str, Path]], out: Path, source: str
) -> Path:
    """Writes report.html into ``out`` and returns its path."""
    cells = frame(report)
    parts = [f"<h1>attnzoo benchmark</h1>{_machine(report, source)}", _accounts(report)]
    goals = rows_of(report)
    if goals:
        rows = [
            [g.goal, g.what, g.shown,
             "" if g.q1 is None else f"{g.q1:.3g} to {g.q3:.3g}",
             "" if g.owed is None else f"{'≥' if g.better == 'higher' else '≤'} {g.owed:g}",
             "" if g.aim is None else f"{g.aim:g}", g.verdict, g.note]
            for g in goals
        ]  # fmt: skip
        heading = ["goal", "what", "value", "quartiles", "owed", "aim", "", "note"]
        parts.append(f"<h2>Goals</h2>{_table(heading, rows)}")
    for kind, title in (("layer", "One attention layer"), ("backbone", "The whole backbone")):
        for family in families(cells, kind):
            chosen = subset(cells, kind, **family)
            heading = f"{title}: {family['mode']}, d = {family['width']}, {family['dtype']}"
            parts.append(f"<h2>{_text(heading)}</h2>{_table(*_grid(chosen))}")
    parts.append(_peers(cells))
    parts.append(_counts(cells))
    parts.append("<h2>Pictures</h2>")
    for name, caption, path in drawn:
        data = base64.b64encode(path.read_bytes()).decode()
        parts.append(
            f'<figure><img alt="{_text(name)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{_text(caption)}</figcaption></figure>"
        )
    target = out / "report.html"
    write_text(
        target,
        "<!doctype html><html lang=en><meta charset=utf-8><title>attnzoo benchmark</title>"
        f"<style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n",
    )
    return target


def _machine(report: dict[str, Any], source: str) -> str:
    info = report["machine_info"].get("attnzoo", {})
    first = report.get("common", {})
    if not first and report["benchmarks"]:
        first = report["benchmarks"][0]["extra_info"]
    peaks = ", ".join(
        f"{name} {value:.0f} {'GB/s' if name == 'copy' else 'GFLOP/s'}"
        for name, value in info.get("peaks", {}).items()
    )
    facts = {
        "file": source,
        "made": report.get("datetime", "")[:16],
        "commit": first.get("commit", "unknown"),
        "device": f"{info.get('device', '')}, {device_of(report)}",
        "threads": info.get("threads", ""),
        "peaks in this run": peaks,
        "allocator": first.get("allocator", "default"),
        "versions": ", ".join(f"{k} {v}" for k, v in info.get("versions", {}).items()),
    }
    return _table(["", ""], [[name, str(value)] for name, value in facts.items()])


def _accounts(report: dict[str, Any]) -> str:
    absent, measured = report.get("cells_not_measured", []), len(report["benchmarks"])
    text = f"<p>{measured + len(absent)} cells requested, {measured} measured.</p>"
    if absent:
        rows = [[cell["name"], cell["state"], cell["reason"]] for cell in absent]
        text += f"<div class=bad>{_table(['cell', 'state', 'reason'], rows)}</div>"
    return text


def _grid(cells: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    resolutions = sorted(cells["resolution"].unique())
    heading = ["mechanism"]
    for px in resolutions:
        heading += [f"{px} px", "q1 to q3", "over softmax", "peak memory", "of matmul peak"]
    rows = []
    found = {(str(row["label"]), row["resolution"]): row for row in cells.to_dict("records")}
    for label in sorted({label for label, _ in found}):
        row = [label]
        for px in resolutions:
            cell = found.get((label, px))
            row += _cell(cell) if cell else ["", "", "", "", ""]
        rows.append(row)
    return heading, rows


def _cell(row: dict[Any, Any]) -> list[str]:
    spread = f"{row['seconds_q1'] * 1e3:.3g} to {row['seconds_q3'] * 1e3:.3g}"
    ratio, share = row.get("ratio_to_softmax"), row.get("share_of_peak")
    return [
        f"{row['seconds'] * 1e3:.3g} ms",
        spread,
        "" if ratio is None or pd.isna(ratio) else f"{ratio:.2f}",
        memory(row["peak_memory"]),
        "" if share is None or pd.isna(share) else f"{share:.0%}",
    ]


def _peers(cells: pd.DataFrame) -> str:
    chosen = subset(cells, "peers")
    if chosen.empty:
        return ""
    rows = []
    for cell in chosen.to_dict("records"):
        for name, ratio in sorted(cell["ratios"].items(), key=lambda item: -item[1]["median"]):
            rows.append([
                f"{cell['label']} {cell['mode']} {cell['resolution']} px d{cell['width']} "
                f"{cell['dtype']}", name, f"{ratio['median']:.2f}",
                f"{ratio['q1']:.2f} to {ratio['q3']:.2f}",
                "best peer" if name == cell.get("best_peer") else "",
            ])  # fmt: skip
        for name, reason in cell["peers_missing"].items():
            rows.append([str(cell["label"]), name, "", reason, "does not run here"])
    heading = ["attnzoo", "peer", "our time over theirs", "quartiles", ""]
    return f"<h2>Peers</h2>{_table(heading, rows)}"


def _counts(cells: pd.DataFrame) -> str:
    chosen = subset(cells, "count")
    if chosen.empty:
        return ""
    rows = []
    for cell in chosen.sort_values(["width", "resolution", "label"]).to_dict("records"):
        paper = cell["macs_paper"]
        rows.append([
            cell["label"], f"{cell['resolution']} px", f"d{cell['width']}", amount(cell["macs"]),
            "" if paper is None or pd.isna(paper) else amount(paper),
            amount(cell["macs_training"]), amount(cell["parameters"]),
            amount(cell["active_parameters"]),
        ])  # fmt: skip
    heading = ["mechanism", "", "", "MACs", "MACs as the paper counts", "training step",
               "parameters", "active per token"]  # fmt: skip
    return f"<h2>Arithmetic of one layer</h2>{_table(heading, rows)}"


def _text(value: object) -> str:
    return html.escape(printable(str(value)))


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in heading)
    body = "".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"
