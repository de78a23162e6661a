"""Draws the pictures of a run and its report.

    python bench/plot.py out.json --out plots/

Pictures come as PNG and SVG; report.html holds them and the tables and needs no other file.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# A notebook's, whose module may be missing here; matplotlib would look for it when imported.
os.environ.pop("MPLBACKEND", None)
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from PIL import Image

from attnzoo.command.fits import Points, crossover, value_at
from attnzoo.command.units import amount, memory
from bench import summary
from bench.cases import PIXELS_PER_TOKEN
from bench.fits import exponent
from bench.results import (
    common_of,
    device_of,
    families,
    frame,
    read_cases,
    source_of,
    subset,
)
from bench.tables import parts_around, put_into
from bench.thresholds import HEADING, figures_of
from bench.whole_models import figures as whole_figures
from recipes.lab.console import DONE, UserError, printable, run_script
from recipes.lab.drawing.palette import color_of, marker_of
from recipes.lab.files import require_writable, whole_file, write_text
from recipes.lab.pages import html_image, html_page, html_table, html_text, markdown_table

DPI = {"png": 130, "svg": "figure"}
# Below this many tokens projections hide how the core grows.
ASYMPTOTIC = 1024
# As many curves can be told apart in one panel; more get one each, so many side by side.
MOST, COLUMNS = 15, 6
_PIXELS = "resolution (px)"
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
    "arithmetic": "The bar is where the multiply-accumulates alone would be at the machine's "
    "matmul peak. What a point lies beyond it is what the mechanism pays beside them; the number "
    "is that factor.",
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
    points: dict[str, Points] = {
        str(label): sorted(zip(rows["resolution"], rows[column] * scale, strict=True))
        for label, rows in cases.groupby("label", sort=False)
    }
    notes = {}
    for label, curve in points.items():
        by_tokens = [((px / PIXELS_PER_TOKEN) ** 2, value) for px, value in curve]
        slope = exponent(by_tokens, ASYMPTOTIC if len(curve) > 2 else 0)
        notes[label] = "" if slope is None else f"  $n^{{{slope:.2f}}}$"
    rings = {label: crossover(curve, points.get("softmax", [])) for label, curve in points.items()}
    figure = _figure(9.2, 5.2, len(points))
    _draw(figure, points, title, _PIXELS, axis, notes, rings)
    return figure


def whole_curves(report: dict[str, Any], size: str) -> Figure:
    """Time of whole models against resolution, one part for the forward and one for training."""
    cases = [row for row in report["cases"] if row["size"] == size]
    figure = _figure(15.0, 5.6, len({row["mechanism"] for row in cases}), parts=2)
    figure.suptitle(literal(
        f"whole model, size {size}, bfloat16, recorded or compiled and recorded, whichever is "
        f"faster\n{report['device_name']}"
    ), fontsize=10)  # fmt: skip
    parts: Any = figure.subfigures(1, 2)
    for part, mode in zip(parts, whole_figures.MODES, strict=True):
        points: dict[str, list[tuple[float, float]]] = {}
        for row in sorted(cases, key=lambda row: row["resolution"]):
            if row["mode"] == mode and (found := whole_figures.milliseconds(row, report)):
                points.setdefault(row["mechanism"], []).append((row["resolution"], found))
        rings = {}
        for name, px in whole_figures.crossovers(report, size, mode).items():
            value = value_at(points[name], px) if px < math.inf else None
            rings[name] = (px, value[0]) if value else None
        title = {"forward": "forward", "train": "training step"}[mode]
        if points:
            _draw(part, points, title, _PIXELS, "time of one image (ms)", {}, rings)
    return figure


def _figure(width: float, height: float, count: int = 1, parts: int = 1) -> Figure:
    """A figure that no window and no notebook knows of, for ``_draw`` of that many curves."""
    if count > MOST:
        width, height = 9.6 * parts, 1.2 + 1.5 * math.ceil(count / COLUMNS)
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _axes(figure: Any, rows: int = 1, columns: int = 1) -> list[Axes]:
    with sns.axes_style("whitegrid", {"grid.linewidth": 0.5}):
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    return list(panels.flat)


def _draw(
    figure: Any, points: Mapping[str, Points], title: str, xlabel: str, ylabel: str,
    notes: Mapping[str, str], rings: Mapping[str, tuple[float, float] | None],
    roof: tuple[Any, Any] | None = None,
) -> None:  # fmt: skip
    """Log-log curves with a legend; more than ``MOST`` in panels of their own, the lowest first.

    Args:
        figure: Or a part of one.
        points: Of the curves by label; softmax's stands in every panel.
        title: Of the whole.
        xlabel: Of the axis.
        ylabel: Of the axis.
        notes: What stands beside the labels.
        rings: Where curves come to lie below softmax's, with a resolution as x.
        roof: x and y of a line over all.
    """
    is_many = len(points) > MOST
    ends = {label: curve[-1][1] / curve[-1][0] for label, curve in points.items()}
    order = sorted(points, key=lambda label: ends[label] if is_many else -ends[label])
    shape = (math.ceil(len(order) / COLUMNS), COLUMNS) if is_many else (1, 1)
    panels = _axes(figure, *shape)
    figure.suptitle(literal(title), fontsize=10)
    figure.supxlabel(xlabel, fontsize=10)
    figure.supylabel(ylabel, fontsize=10)
    for label, ax in zip(order, panels if is_many else panels * len(order), strict=False):
        ring, style = rings.get(label), _style(label)
        note = notes.get(label, "") + (f", from {ring[0]:.0f} px" if ring else "")
        if is_many:
            ax.add_collection(LineCollection(list(points.values()), colors="0.85", linewidths=0.6))
            if "softmax" in points:
                ax.plot(*zip(*points["softmax"], strict=True), color="black", lw=1)
            ax.set_title(literal(label), fontsize=8, loc="left", pad=3)
            ax.text(0.04, 0.96, note.strip(" ,"), fontsize=7, va="top", transform=ax.transAxes)
            style |= {"markersize": 4}
        if ring:
            ax.plot(*ring, "o", ms=13, mfc="none", mec=style["color"], mew=1.3)
        ax.plot(*zip(*points[label], strict=True), label=literal(label) + note, **style)
    if roof:
        for ax in panels[: len(order)]:
            ax.plot(*roof, color="0.35", lw=1.2)
    _scale(panels[0], points, is_many, xlabel == _PIXELS)
    for place, ax in enumerate(panels):
        ax.tick_params(labelsize=7 if is_many else 10)
        if is_many and place >= len(order):  # the one above has the labels then
            ax.set_axis_off()
            panels[place - COLUMNS].tick_params(labelbottom=True)
    if not is_many:
        _legend(panels[0], "ring: from here on\nbelow softmax" if any(rings.values()) else None)


def _scale(ax: Axes, points: Mapping[str, Points], is_small: bool, has_sizes: bool) -> None:
    """Log-log, with as many ticks as there is room for."""
    ax.set(xscale="log", yscale="log")
    everything = [point for curve in points.values() for point in curve]
    for axis, values in zip((ax.xaxis, ax.yaxis), zip(*everything, strict=True), strict=True):
        low, high = min((v for v in values if v > 0), default=1.0), max(values)
        is_wide = high / low > (100 if is_small else 1000)
        axis.set_major_locator(LogLocator(subs=(1.0,) if is_wide else (1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.9g}"))
        axis.set_minor_locator(NullLocator())
    if has_sizes:
        ticks = sorted({x for x, _ in everything})
        ticks = ticks[:: -(-len(ticks) // 3)] if is_small else ticks
        ax.set_xticks(ticks, [f"{px:.0f}" for px in ticks])


def heat_map(cases: pd.DataFrame, column: str, title: str) -> Figure:
    """Ratios to softmax, mechanism by resolution."""
    table = cases.pivot_table(index="label", columns="resolution", values=column)
    table = table.sort_values(table.columns[-1])
    table = table.set_axis([f"{px} px" for px in table.columns], axis=1)
    table = table.set_axis([literal(str(label)) for label in table.index], axis=0)
    figure = _figure(2.6 + 1.0 * table.shape[1], 1.3 + 0.36 * len(table))
    (ax,) = _axes(figure)
    limit = max(1.0, float(np.nanmax(np.abs(np.log2(table.to_numpy())))))
    sns.heatmap(
        np.log2(table), annot=table, fmt=".2f", cmap="RdBu_r", center=0, vmin=-limit, vmax=limit,
        ax=ax, cbar=False, linewidths=0.5,
    )  # fmt: skip
    ax.grid(visible=False)  # lines would show where nothing was measured
    ax.set_title(f"time over softmax\n{literal(title)}", fontsize=10)
    return figure


def arithmetic(cases: pd.DataFrame, peak: float, title: str) -> Figure:
    """Times over those of the multiply-accumulates at peak, at the largest size most share."""
    resolution = fullest_resolution(cases)
    chosen: Any = cases[cases["resolution"] == resolution]
    chosen = chosen.sort_values("time", ascending=False)
    figure = _figure(8.0, 1.5 + 0.25 * len(chosen))
    (ax,) = _axes(figure)
    for y, row in enumerate(chosen.to_dict("records")):
        spent, share = row["time"] * 1e3, row["gflops"] / peak
        style = _style(row["label"])
        ax.plot([share * spent, spent], [y, y], color=style["color"], lw=style["linewidth"])
        ax.plot(share * spent, y, "|", color="0.35", ms=9)
        ax.plot(spent, y, **style)
        ax.annotate(f"{1 / share:.1f} x", (spent, y), (8, 0), textcoords="offset points",
                    va="center", fontsize=8)  # fmt: skip
    what = "device time" if "device_time" in chosen else "time"
    ax.set(xscale="log", xlabel=f"{what} of one call (ms); |: of its multiply-accumulates at "
           f"the peak of {peak:,.0f} GFLOP/s")  # fmt: skip
    ax.set_title(literal(f"{resolution} px\n{title}"), fontsize=10)
    ax.set_yticks(range(len(chosen)), [literal(str(label)) for label in chosen["label"]])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.9g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.margins(x=0.12)
    return figure


def fullest_resolution(cases: pd.DataFrame) -> int:
    """The largest resolution of those that most mechanisms share."""
    return int(cases["resolution"].mode().max())


def roofline(cases: pd.DataFrame, peak: float, copy: float, title: str) -> Figure:
    """Achieved GFLOP/s against arithmetic intensity, under the measured roof."""
    bytes_moved = 2 * cases["allocated"] + cases["parameter_memory"]
    intensity = cases["gflops"] * cases["time"] * 1e9 / bytes_moved
    cases = cases.assign(intensity=intensity).sort_values("tokens")
    points: dict[str, Points] = {
        str(label): list(zip(rows["intensity"], rows["gflops"], strict=True))
        for label, rows in cases.groupby("label", sort=False)
    }
    low = min(intensity.min() / 1.5, peak / copy / 2)
    xs = np.geomspace(low, intensity.max() * 1.5, 400)
    figure = _figure(8.0, 5.2, len(points))
    title += f"\nunder {peak:,.0f} GFLOP/s and {copy:,.0f} GB/s; lines run through the resolutions"
    _draw(figure, points, title, "FLOP per byte (estimated)", "GFLOP/s", {}, {},
          (xs, np.minimum(peak, xs * copy)))  # fmt: skip
    return figure


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
        largest: Any = chosen[chosen["resolution"] == resolution]
        rows = [
            [row["label"], amount(row["time"], "s"),
             f"{row['gflops']:,.0f}", f"{1 / row['share_of_peak']:.2f}",
             memory(row["peak_memory"]), f"{row['allocated'] / max(row['peak_memory'], 1):.1f}"]
            for row in largest.sort_values("share_of_peak", ascending=False).to_dict("records")
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
        drawn.append((name, _CAPTIONS[kind], _saved(figure, out, name)))
    return drawn


def _saved(figure: Figure, out: Path, name: str) -> Path:
    """Writes a picture twice; returns the PNG's path."""
    plain = re.sub(r"[^\w.-]|^\.", "_", name)
    for ending in ("svg", "png"):
        with whole_file(out / f"{plain}.{ending}") as path:
            figure.savefig(path, format=ending, bbox_inches="tight", dpi=DPI[ending])
            if ending == "png":  # a third of the bytes, which a repository keeps for good
                with Image.open(path) as picture:
                    # Pillow's default makes teal of sana's thin blue lines.
                    few = picture.convert("RGB").quantize(
                        method=Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE
                    )
                few.save(path, "png", optimize=True)
    return out / f"{plain}.png"


def write_report(
    report: dict[str, Any], drawn: Sequence[tuple[str, str, Path]], out: Path, source: str
) -> Path:
    """Writes report.html into ``out`` and returns its path."""
    cases, absent = frame(report), report["cells_not_measured"]
    sizes = list(summary.sizes(cases))
    heading = ["size", "step", "fastest", "least memory", "faster than softmax"]
    verdict = [[title, *row] for title, rows in sizes for row in summary.winners(rows)]
    sections = {"Verdict": pd.DataFrame(verdict, columns=heading)}
    goals = pd.DataFrame([figure.row for figure in figures_of(report)], columns=list(HEADING))
    sections |= {"Goals": goals}
    sections |= {_title(title): summary.table(rows, is_detailed=True) for title, rows in sizes}
    sections |= {"Peers": _peers(cases)}
    sections |= {_title(title): rows for title, rows in summary.counts(cases)}
    of, told = device_of(report), _html(pd.DataFrame(_machine(report, source), columns=["", ""]))
    parts = [f"<style>{_STYLE}</style><h1>attnzoo benchmark, {html_text(of)}</h1>"]
    counts = f"{len(report['benchmarks']) + len(absent)} cases requested, "
    counts += f"{len(report['benchmarks'])} measured."
    for title, table in sections.items():
        if not table.empty:
            parts.append(f"<h2>{html_text(title)}</h2>{_html(table)}")
        if title == "Verdict":
            parts.append(f"<p>{counts} Times are medians; ~ marks a ratio of two processes, all "
                         f"others are of calls timed in turn.</p>")  # fmt: skip
            if absent:
                rows = [[case["name"], case["state"], case["reason"]] for case in absent]
                shown = html_table(["case", "state", "reason"], rows)
                parts.append(f"<details open class=bad><summary>Not measured: {len(absent)}"
                             f"</summary>{shown}</details>")  # fmt: skip
    parts.append("<h2>Pictures</h2>")
    parts += [
        f"<figure>{html_image(path.read_bytes(), name)}"
        f"<figcaption>{html_text(caption)}</figcaption></figure>"
        for name, caption, path in drawn
    ]
    parts.append(f"<h2>How it was measured</h2>{told}")
    write_text(out / "report.html", html_page("attnzoo benchmark", "".join(parts)))
    return out / "report.html"


_STYLE = "td:nth-child(n+2){white-space:nowrap}.bad td,td:last-child{white-space:normal}"


def _title(text: str) -> str:
    return text[0].upper() + text[1:]


def _html(table: pd.DataFrame) -> str:
    return html_table(table.columns, table.itertuples(index=False))


def _machine(report: dict[str, Any], source: str) -> list[tuple[str, Any]]:
    info, common = report["machine_info"]["attnzoo"], common_of(report)
    peaks = [f"{name} {value:,.0f} {'GB/s' if name == 'copy' else 'GFLOP/s'}"
             for name, value in info["peaks"].items()]  # fmt: skip
    return [
        ("file", source),
        ("run", source_of(report)),
        ("threads, allocator", f"{info.get('threads', '')}, {common.get('allocator', 'default')}"),
        ("peaks in this run", ", ".join(peaks)),
        ("versions", ", ".join(f"{k} {v}" for k, v in info["versions"].items())),
    ]


def _peers(cases: pd.DataFrame) -> pd.DataFrame:
    rows, missing = [], {}
    for case in subset(cases, "peers").to_dict("records"):
        name_of = " ".join(f"{case[key]}" for key in ("label", "mode"))
        name_of += f" {case['resolution']} px d{case['width']} {case['dtype']}"
        found = case.get("device_ratios")
        on_device = found if isinstance(found, dict) else {}  # NaN where another row has them
        best = case.get("best_peer_on_device") if on_device else case.get("best_peer")
        ratios = case["ratios"] | on_device
        for name, ratio in sorted(ratios.items(), key=lambda item: -item[1]["median"]):
            notes = ["best peer"] * (name == best)
            notes += ["launched"] * ("device_time" in cases and name not in on_device)
            spread = f"{ratio['q1']:.2f} to {ratio['q3']:.2f}"
            rows.append([name_of, name, f"{ratio['median']:.2f}", spread, ", ".join(notes)])
        missing |= {(case["label"], name): why for name, why in case["peers_missing"].items()}
    rows += [[*pair, "", "does not run here", reason] for pair, reason in missing.items()]
    return pd.DataFrame(rows, columns=["attnzoo", "peer", "our time over theirs", "quartiles", ""])


def _draw_whole(options: argparse.Namespace) -> int:
    reports = [whole_figures.read_whole(path) for path in options.report]
    report = whole_figures.joined(reports)
    parts = {page: _parts_in(page) for page in options.into}
    sizes = list(dict.fromkeys(row["size"] for row in report["cases"] if row["seconds"]))
    if not sizes:
        raise UserError(f"{options.report[0]} has no whole models that were timed")
    names = ["whole-models", *(f"whole-models-{size}" for size in sizes[1:])]
    for name in names:
        require_writable(options.out / f"{name}.png")
    for name, size in zip(names, sizes, strict=True):
        _saved(whole_curves(report, size), options.out, name)
    for page, found in parts.items():
        folder = os.path.relpath(options.out, page.parent)
        pictures = "\n\n".join(
            f"![Time of one image of the whole model, size {size}, against resolution]"
            f"({Path(folder, name).as_posix()}.png)"
            for name, size in zip(names, sizes, strict=True)
        )
        for part in found:
            put_into(page, part, f"{pictures}\n\n{_PARTS[part](reports)}")
    print(printable(f"{', '.join(names)} (PNG and SVG) in {options.out}"))
    return DONE


_PARTS = {"whole": whole_figures.page, "faster from": whole_figures.faster_from}


def _parts_in(page: Path) -> list[str]:
    """Those of ``_PARTS`` that a page has."""
    text = ""
    with contextlib.suppress(OSError, ValueError):  # the first part's check says what is wrong
        text = page.read_text("utf-8")
    found = [name for name in _PARTS if f"<!-- {name} -->" in text] or [*_PARTS][:1]
    for name in found:
        parts_around(page, name)
    return found


def main(arguments: list[str]) -> int:
    """Draws everything."""
    parser = argparse.ArgumentParser(prog="python bench/plot.py", description=__doc__)
    parser.add_argument(
        "report", type=Path, nargs="+", help="JSON of pytest bench/, or files of whole models"
    )
    parser.add_argument("--out", type=Path, default=Path("plots"), help="folder to write to")
    parser.add_argument(
        "--into", type=Path, action="append", default=[], metavar="PAGE",
        help="file whose part <!-- where -->, or of whole models <!-- whole --> or "
             "<!-- faster from -->, is replaced; repeat",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    path, *others = options.report
    if whole_figures.is_whole(path):
        return _draw_whole(options)
    if others:
        raise UserError("several files can only be of whole models; join others by bench.results")
    report = read_cases(path)
    require_writable(options.out / "report.html")
    for page in options.into:
        parts_around(page, "where")
    drawn = draw(report, options.out)
    written = write_report(report, drawn, options.out, path.name)
    for page in options.into:
        put_into(page, "where", where(report))
    print(printable(f"{len(drawn)} pictures (PNG and SVG) and {written}"))
    return DONE


if __name__ == "__main__":
    run_script(main)
