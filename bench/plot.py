"""Draws the pictures of a run and its report.

    python bench/plot.py out.json --out plots/

Pictures come as PNG and SVG; report.html holds them and the tables and needs no other file.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# A notebook's, whose module may be missing here; matplotlib would look for it when imported.
os.environ.pop("MPLBACKEND", None)
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from bench import whole_figures
from bench.cases import PIXELS_PER_TOKEN
from bench.fits import crossover, exponent, value_at
from bench.results import common_of, device_of, families, frame, read_cases, subset
from bench.tables import amount, memory, parts_around, put_into
from bench.thresholds import HEADING, figures_of
from recipes.lab.console import DONE, UserError, printable, run_script
from recipes.lab.drawing.palette import color_of, marker_of
from recipes.lab.files import require_writable, whole_file, write_text
from recipes.lab.pages import html_image, html_page, html_table, html_text, markdown_table

DPI = {"png": 130, "svg": "figure"}
# Below this many tokens projections hide how the core grows.
ASYMPTOTIC = 1024
# Column, name, axis and scale of what is drawn against resolution.
_QUANTITIES = (
    ("seconds", "time", "time of one call (ms)", 1e3),
    ("device_time", "device-time", "device time of one call (ms)", 1e3),
    ("peak_memory", "memory", "peak memory above inputs and weights (MiB)", 2**-20),
)
_RATIOS = (("ratio_to_softmax", "ratios"), ("device_ratio_to_softmax", "device-ratios"))
_CAPTIONS = {
    "time": "Median of the rounds. The exponent is fitted from 1024 tokens on; a ring marks the "
    "size from which a mechanism is faster than softmax, interpolated.",
    "device-time": "Replays of a CUDA graph, which cost the host nothing. A mechanism is absent "
    "where its step waits for the host and cannot be recorded.",
    "memory": "Largest sum of live tensors during one call. A ring marks the size from which a "
    "mechanism takes less than softmax.",
    "macs": "Every multiply-accumulate counted. A ring marks the size from which a mechanism "
    "computes less than softmax.",
    "ratios": "Time over that of softmax attention (SDPA), both timed in turn in one process: "
    "blue is faster than softmax.",
    "device-ratios": "The same of replayed CUDA graphs, where both could be recorded.",
    "arithmetic": "The line is the machine's matmul peak. What a point lies above it is what the "
    "mechanism pays beyond its multiply-accumulates; the number is that factor.",
    "roofline": "Arithmetic per byte, the bytes estimated as two times all tensors the call made "
    "plus weights and input. The roof is the matmul peak and the copy bandwidth, both measured in "
    "the same run.",
}


def figures(report: dict[str, Any]) -> Iterator[tuple[str, str, Figure]]:
    """Every picture that the report's cases allow: a key of ``_CAPTIONS``, of what, and it."""
    cases, info = frame(report), report["machine_info"]["attnzoo"]
    place = device_of(report)
    # Pictures of a CPU and of a GPU may lie in one folder.
    end = "-cuda" if info.get("device") == "cuda" else ""
    for kind, what in (("layer", "one attention layer"), ("backbone", "whole backbone")):
        for family in families(cases, kind):
            chosen, (mode, width, dtype) = subset(cases, kind, **family), family.values()
            suffix, size = f"{kind}-{mode}-d{width}-{dtype}{end}", f"d = {width}, {dtype}"
            title = f"{what}, {mode}, {size}\n{place}"
            for column, name, axis, scale in _QUANTITIES:
                known = chosen.dropna(subset=column) if column in chosen else chosen.iloc[:0]
                if known["resolution"].nunique() > 1:
                    yield name, suffix, curves(known, column, axis, scale, title)
            if kind == "backbone":
                continue
            for column, name in _RATIOS:
                if column in chosen and chosen[column].notna().any():
                    yield name, suffix, heat_map(chosen, column, title)
            peak, copy = (info["peaks"].get(name) for name in (dtype, "copy"))
            counted: Any = chosen[chosen["gflops"] > 0] if "gflops" in chosen else chosen.iloc[:0]
            if peak and copy and not counted.empty:
                title = f"{mode}, {size}, {place}"
                yield "arithmetic", suffix, arithmetic(counted, peak, title)
                yield "roofline", suffix, roofline(counted, peak, copy, title)
    for width, chosen in subset(cases, "count").groupby("width"):
        if chosen["resolution"].nunique() > 1:
            title = f"one attention layer, forward, d = {width}"
            figure = curves(chosen, "macs", "multiply-accumulates (G)", 1e-9, title)
            yield "macs", f"d{width}", figure


def curves(cases: pd.DataFrame, column: str, axis: str, scale: float, title: str) -> Figure:
    """One log-log curve per mechanism against resolution."""
    figure, ax = _canvas(9.2, 5.2, title, "resolution (px) and tokens n", axis)
    cases = cases.assign(x=cases["tokens"].astype(float), y=cases[column] * scale)
    points: dict[str, list[tuple[float, float]]] = {
        str(label): sorted(zip(rows["x"], rows["y"], strict=True))
        for label, rows in cases.groupby("label", sort=False)
    }
    for label, curve in sorted(points.items(), key=lambda p: -p[1][-1][1] / p[1][-1][0]):
        slope = exponent(curve, ASYMPTOTIC) if len(curve) > 2 else exponent(curve)
        text = literal(label) + ("" if slope is None else f"  $n^{{{slope:.2f}}}$")
        cross = crossover(curve, points.get("softmax", [])) if label != "softmax" else None
        if cross:
            text += f", from {math.sqrt(cross[0]) * PIXELS_PER_TOKEN:.0f} px"
            ax.plot(*cross, "o", ms=13, mfc="none", mec=_style(label)["color"], mew=1.3)
        ax.plot(*zip(*curve, strict=True), label=text, **_style(label))
    tokens = sorted({int(n) for n in cases["tokens"]})
    ax.set_xticks(tokens, [f"{math.isqrt(n) * PIXELS_PER_TOKEN}\n{n:,}" for n in tokens])
    _legend(ax, "ring: from here on below softmax")
    return figure


def whole_curves(report: dict[str, Any], size: str) -> Figure:
    """Time of whole models against resolution, a panel for the forward and one for training."""
    with sns.axes_style("whitegrid", {"grid.linewidth": 0.5}):
        figure = Figure(figsize=(15.0, 5.6), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, 2)
    figure.suptitle(literal(
        f"whole model, size {size}, bfloat16, recorded or compiled and recorded, whichever is "
        f"faster\n{report['device_name']}"
    ), fontsize=10)  # fmt: skip
    for ax, (mode, title) in zip(
        panels, (("forward", "forward"), ("train", "training step")), strict=True
    ):
        rows = [r for r in report["cases"] if r["size"] == size and r["mode"] == mode]
        since = whole_figures.crossovers(report, size, mode)
        curves: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            if found := whole_figures.fastest(row):
                point = row["resolution"], found[0] / row["batch"] * 1e3
                curves.setdefault(row["mechanism"], []).append(point)
        for name, curve in sorted(curves.items(), key=lambda item: -max(item[1])[1]):
            label, px = literal(name), since.get(name, math.inf)
            if px < math.inf and (value := value_at(sorted(curve), px)):
                label += f", from {px:.0f} px"
                ax.plot(px, value[0], "o", ms=13, mfc="none", mec=_style(name)["color"], mew=1.3)
            ax.plot(*zip(*sorted(curve), strict=True), label=label, **_style(name))
        ax.set(title=title, xlabel="resolution (px)", ylabel="time of one image (ms)",
               xscale="log", yscale="log")  # fmt: skip
        sizes = sorted({row["resolution"] for row in rows})
        ax.set_xticks(sizes, [str(px) for px in sizes])
        ax.xaxis.set_minor_locator(NullLocator())
        _legend(ax, "ring: from here on\nbelow softmax")
    return figure


def heat_map(cases: pd.DataFrame, column: str, title: str) -> Figure:
    """Ratios to softmax, mechanism by resolution."""
    table = cases.pivot_table(index="label", columns="resolution", values=column)
    table = table.sort_values(table.columns[-1])
    table = table.set_axis([f"{px} px" for px in table.columns], axis=1)
    table = table.set_axis([literal(str(label)) for label in table.index], axis=0)
    figure, ax = _canvas(2.6 + 1.0 * table.shape[1], 1.3 + 0.36 * len(table))
    limit = max(1.0, float(np.nanmax(np.abs(np.log2(table.to_numpy())))))
    sns.heatmap(
        np.log2(table), annot=table, fmt=".2f", cmap="RdBu_r", center=0, vmin=-limit, vmax=limit,
        ax=ax, cbar=False, linewidths=0.5,
    )  # fmt: skip
    ax.set_title(f"time over softmax\n{literal(title)}", fontsize=10)
    return figure


def arithmetic(cases: pd.DataFrame, peak: float, title: str) -> Figure:
    """Time against multiply-accumulates, at the largest size that most mechanisms share."""
    resolution = fullest_resolution(cases)
    chosen = cases[cases["resolution"] == resolution]
    figure, ax = _canvas(8.0, 5.2, f"{resolution} px\n{title}", "multiply-accumulates (G)",
                         "time of one call (ms)")  # fmt: skip
    macs = chosen["gflops"] * chosen["seconds"] / 2
    chosen = chosen.assign(macs=macs, factor=chosen["seconds"] * peak / (2 * macs))
    for row in chosen.sort_values("factor").to_dict("records"):
        style = _style(row["label"]) | {"linestyle": "none", "markersize": 9}
        label = f"{literal(row['label'])}  {row['factor']:.2f} x"
        ax.plot(row["macs"], row["seconds"] * 1e3, label=label, **style)
    ends = np.array([macs.min() * 0.8, macs.max() * 1.25])
    ax.plot(ends, 2 * ends / peak * 1e3, color="0.35", lw=1, label=f"peak, {peak:.0f} GFLOP/s")
    _legend(ax, "time over peak time")
    return figure


def fullest_resolution(cases: pd.DataFrame) -> int:
    """The largest resolution of those that most mechanisms share."""
    return int(cases["resolution"].mode().max())


def roofline(cases: pd.DataFrame, peak: float, copy: float, title: str) -> Figure:
    """Achieved GFLOP/s against arithmetic intensity, under the measured roof."""
    figure, ax = _canvas(8.0, 5.2, f"{title}\neach line runs through the resolutions",
                         "FLOP per byte (estimated)", "GFLOP/s")  # fmt: skip
    bytes_moved = 2 * cases["allocated"] + cases["parameter_memory"]
    intensity = cases["gflops"] * cases["seconds"] * 1e9 / bytes_moved
    for label, rows in cases.assign(intensity=intensity).groupby("label", sort=False):
        style = _style(str(label)) | {"linestyle": ":", "linewidth": 0.8}
        rows = rows.sort_values("tokens")
        ax.plot(rows["intensity"], rows["gflops"], label=literal(str(label)), **style)
    low = min(intensity.min() / 1.5, peak / copy / 2)
    xs = np.geomspace(low, intensity.max() * 1.5, 400)
    ax.plot(xs, np.minimum(peak, xs * copy), color="0.35", lw=1.2,
            label=f"roof: {peak:.0f} GFLOP/s, {copy:.0f} GB/s")  # fmt: skip
    _legend(ax)
    return figure


def _canvas(
    width: float, height: float, title: str = "", xlabel: str = "", ylabel: str = ""
) -> tuple[Figure, Axes]:
    """A figure that no window and no notebook knows of; log-log if its axes have names."""
    with sns.axes_style("whitegrid", {"grid.linewidth": 0.5}):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        ax = figure.subplots()
    ax.set(title=literal(title), xlabel=xlabel, ylabel=ylabel)
    if xlabel:
        ax.set(xscale="log", yscale="log")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
            axis.set_minor_locator(NullLocator())
    return figure, ax


def _legend(ax: Axes, title: str | None = None) -> None:
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9,
              title=title, title_fontsize=9)  # fmt: skip


def literal(text: str) -> str:
    """The text as matplotlib draws it as it is: no formulas, and shown in a legend."""
    text = printable(text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _style(label: str) -> dict[str, Any]:
    """How a mechanism is drawn; dashed with options of its own."""
    name = label.removesuffix("+compile").partition("[")[0]
    return {
        "color": color_of(name), "marker": marker_of(name), "markersize": 6,
        "linestyle": "-" if name == label else "--",
        "linewidth": 2.2 if name == "softmax" else 1.4,
    }  # fmt: skip


def where(report: dict[str, Any]) -> str:
    """A table of what each mechanism pays beyond its multiply-accumulates, a part per family."""
    cases, parts = frame(report), []
    for family in families(cases, "layer"):
        chosen = subset(cases, "layer", **family)
        if "share_of_peak" not in chosen or not chosen["share_of_peak"].notna().any():
            continue
        resolution = fullest_resolution(chosen)
        chosen = chosen[chosen["resolution"] == resolution]
        chosen = chosen.assign(share=chosen["share_of_peak"] * chosen["seconds"] / chosen["time"])
        rows = [
            [row["label"], amount(row["time"], "s"),
             f"{row['gflops'] * row['seconds'] / row['time']:,.0f}", f"{1 / row['share']:.2f}",
             memory(row["peak_memory"]), f"{row['allocated'] / max(row['peak_memory'], 1):.1f}"]
            for row in chosen.sort_values(by="share", ascending=False).to_dict("records")
        ]  # fmt: skip
        heading = ["mechanism", "time", "GFLOP/s", "time over peak time", "peak memory",
                   "allocated over peak"]  # fmt: skip
        title = f"{family['mode']}, {resolution} px, d = {family['width']}, {family['dtype']}"
        table = markdown_table(heading, rows, padded=True)
        parts.append(f"**{title}, {device_of(report)}**\n\n{table}")
    return "\n\n".join(parts)


def draw(report: dict[str, Any], out: Path) -> list[tuple[str, str, Path]]:
    """Writes every picture; returns name, caption and the PNG's path."""
    drawn = []
    for kind, suffix, figure in figures(report):
        name = f"{kind}-{suffix}"
        plain = re.sub(r"[^\w.-]|^\.", "_", name)
        for ending in ("png", "svg"):
            with whole_file(out / f"{plain}.{ending}") as path:
                figure.savefig(path, format=ending, bbox_inches="tight", dpi=DPI[ending])
        drawn.append((name, _CAPTIONS[kind], out / f"{plain}.png"))
    return drawn


def write_report(
    report: dict[str, Any], drawn: Sequence[tuple[str, str, Path]], out: Path, source: str
) -> Path:
    """Writes report.html into ``out`` and returns its path."""
    cases, absent = frame(report), report["cells_not_measured"]
    measured = len(report["benchmarks"])
    parts = ["<h1>attnzoo benchmark</h1>", html_table(["", ""], _machine(report, source))]
    parts.append(f"<p>{measured + len(absent)} cases requested, {measured} measured.</p>")
    if absent:
        rows = [[case["name"], case["state"], case["reason"]] for case in absent]
        parts.append(f"<div class=bad>{html_table(['case', 'state', 'reason'], rows)}</div>")
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


def _draw_whole(options: argparse.Namespace) -> int:
    report = whole_figures.read_whole(options.report)
    require_writable(options.out / "whole-models.png")
    if options.into:
        parts_around(options.into, "whole")
    sizes = [row["size"] for row in report["cases"]]
    if not sizes:
        raise UserError(f"{options.report} has no whole models")
    figure = whole_curves(report, sizes[0])
    for ending in ("png", "svg"):
        with whole_file(options.out / f"whole-models.{ending}") as path:
            figure.savefig(path, format=ending, bbox_inches="tight", dpi=DPI[ending])
    if options.into:
        picture = os.path.relpath(options.out / "whole-models.png", options.into.parent)
        words = "Time of one image of the whole model against resolution"
        page = f"![{words}]({Path(picture).as_posix()})\n\n{whole_figures.page(report)}"
        put_into(options.into, "whole", page)
    print(printable(f"whole-models (PNG and SVG) in {options.out}"))
    return DONE


def main(arguments: list[str]) -> int:
    """Draws everything."""
    parser = argparse.ArgumentParser(prog="python bench/plot.py", description=__doc__)
    parser.add_argument("report", type=Path, help="JSON of pytest bench/, or of whole models")
    parser.add_argument("--out", type=Path, default=Path("plots"), help="folder to write to")
    parser.add_argument(
        "--into", type=Path,
        help="file whose <!-- where --> part, or of whole models <!-- whole -->, is replaced",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if whole_figures.is_whole(options.report):
        return _draw_whole(options)
    report = read_cases(options.report)
    require_writable(options.out / "report.html")
    if options.into:
        parts_around(options.into, "where")
    drawn = draw(report, options.out)
    path = write_report(report, drawn, options.out, options.report.name)
    if options.into:
        put_into(options.into, "where", where(report))
    print(printable(f"{len(drawn)} pictures (PNG and SVG) and {path}"))
    return DONE


if __name__ == "__main__":
    run_script(main)
