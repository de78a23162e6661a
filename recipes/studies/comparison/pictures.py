"""The pictures of a comparison: quality against resolution, cost and time; learning; samples."""

from __future__ import annotations

import io
import itertools
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from recipes.lab.console import UserError
from recipes.lab.drawing.canvas import Figure, new_figure, plain, sns
from recipes.lab.drawing.palette import color_of, marker_of
from recipes.lab.drawing.pictures import image_grid
from recipes.lab.evaluation.shards import Plan, read_shards, shard_folder
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.held_out import NAMES
from recipes.studies.comparison.planned import PlannedRun
from recipes.studies.comparison.summary import (
    SETTING,
    data_name,
    grouped_by,
    headlines,
    setting_name,
)
from recipes.studies.comparison.verdicts import is_lower_better


def figures(done: pd.DataFrame, curves: pd.DataFrame) -> Iterator[tuple[str, Figure]]:
    """The pictures of a report, with their headings."""
    metrics = headlines(done)
    resolutions = [
        (f"{data_name(data, level)}, {protocol}", group)
        for (data, level, protocol), group in grouped_by(done, ["data", "level", "protocol"])
        if group["resolution"].nunique() > 1
    ]
    if resolutions:
        figure = _panels(resolutions, metrics, "resolution", "pixels")
        for axis in figure.axes:
            ticks = sorted(
                {int(x) for line in axis.get_lines() for x in np.ravel(line.get_xdata())}
            )
            axis.set_xscale("log", base=2)
            axis.set_xticks(ticks, [str(tick) for tick in ticks])
            axis.minorticks_off()
        yield "Quality against resolution", figure
    yield from _curves(
        curves, "Held-out loss while training", NAMES[0], "held-out loss of the average", band="sd"
    )
    for heading, column, label in (
        ("Quality against cost", "macs", "million MACs per forward"),
        ("Quality against measured time", "forward_seconds", "measured ms per image and forward"),
    ):
        cost = done[column] * (1e-6 if column == "macs" else 1e3)
        mean = cost.groupby([done[key] for key in (*SETTING, "variant")], dropna=False)
        settings = grouped_by(done.assign(cost=mean.transform("mean")), SETTING)
        named = [(setting_name(setting), group) for setting, group in settings]
        figure = _panels(named, metrics, "cost", label, is_front=True)
        yield heading, figure
    yield from _curves(curves, "Learning curves", "loss", "training loss, mean over seeds")


def _curves(
    curves: pd.DataFrame, heading: str, column: str, label: str, band: str | None = None
) -> Iterator[tuple[str, Figure]]:
    points = curves.dropna(subset=[column]).rename(columns={column: label})
    if len(points):
        named = [(setting_name(key), group) for key, group in grouped_by(points, SETTING)]
        yield heading, _panels(named, [label], "step", "step", errorbar=band, is_curve=True)


def samples_of(one: PlannedRun, out: Path, cfg: float) -> bytes | None:
    """One image of each of ten classes as a PNG, or None where they are not there any more."""
    run = Run(one.folder(out) / "run")
    plan = Plan(samples=one.samples, steps=one.sampling_steps, cfg=cfg)
    try:
        images = read_shards(shard_folder(run, plan), plan, numbers=[0])
    except (OSError, UserError):
        return None
    classes = images.labels.unique()[:10].tolist()
    chosen = torch.tensor([int((images.labels == c).nonzero()[0]) for c in classes])
    pixels = images.pixels[chosen].permute(0, 3, 1, 2).float() / 127.5 - 1
    buffer = io.BytesIO()
    image_grid(pixels, columns=len(classes)).save(buffer, format="png")
    return buffer.getvalue()


def _panels(
    groups: Sequence[tuple[str, pd.DataFrame]],
    metrics: Sequence[str],
    x: str,
    xlabel: str,
    *,
    errorbar: str | None = "sd",
    is_curve: bool = False,
    is_front: bool = False,
) -> Figure:
    """A panel per group and metric that it has, three in a row, with one legend beside all.

    Args:
        groups: (name, rows); groups of several metrics share no row.
        metrics: Columns to draw.
        x: Column to draw them against.
        xlabel: What it is.
        errorbar: Of seaborn.
        is_curve: Whether these are curves: no markers, a band for the errors, a log scale.
        is_front: Whether to connect the points that no cheaper one equals.
    """
    panels: list[tuple[str, pd.DataFrame, str] | None] = []
    for name, group in groups:
        if "cfg" in group:
            group = group.loc[group["cfg"] == group["cfg"].min()]
            name += f", guidance {group['cfg'].min():g}"
        panels += [(name, group, m) for m in metrics if group[m].notna().any()]
        if len(metrics) > 1:
            panels += [None] * (-len(panels) % 3)
    rows, columns = max(1, -(-len(panels) // 3)), min(3, max(1, len(panels)))
    with sns.axes_style("whitegrid"):
        figure = new_figure(4.2 * columns + 1.8, 3.4 * rows)
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
    legend: dict[str, Any] = {}
    for axis, panel in itertools.zip_longest(axes, panels):
        if panel is None:
            axis.remove()
            continue
        name, group, metric = panel
        labels = group["variant"].unique()
        sns.lineplot(
            group.assign(variant=group["variant"].map(plain)), x=x, y=metric, ax=axis, lw=1.2,
            hue="variant", palette={plain(label): color_of(label) for label in labels},
            style=None if is_curve else "variant", dashes=False,
            err_style="band" if is_curve else "bars",
            markers=None if is_curve else {plain(label): marker_of(label) for label in labels},
            errorbar=errorbar,
        )  # fmt: skip
        if is_front:
            # Every point lies at its variant's mean cost.
            known = group.dropna(subset=[x, metric]).groupby("variant")
            points = [(float(rows[x].mean()), float(rows[metric].mean())) for _, rows in known]
            front = _front(points, is_lower_better(metric))
            axis.plot(*zip(*front, strict=True), color="0.6", lw=1, zorder=0)
        better = "lower" if is_lower_better(metric) else "higher"
        axis.set(
            title="\n".join(textwrap.wrap(plain(name), 44)), xlabel=xlabel,
            yscale="log" if is_curve else "linear",
            ylabel=f"{metric}\n{better} is better" if "[" in metric else metric,
        )  # fmt: skip
        if is_curve:
            # Within a decade the ticks between powers of ten are all there is.
            low, high = axis.get_ylim()
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}" if high < 10 * low else "")
        legend |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        axis.get_legend().remove()
    labels = [textwrap.fill(label, 28) for label in legend]
    figure.legend(legend.values(), labels, loc="outside right upper", frameon=False)
    return figure


def _front(
    points: Sequence[tuple[float, float]], lower_is_better: bool
) -> list[tuple[float, float]]:
    """The points (cost, value) that no cheaper one equals."""
    found: list[tuple[float, float]] = []
    for point in sorted(points):
        sign = 1 if lower_is_better else -1
        if not found or sign * point[1] < sign * found[-1][1]:
            found.append(point)
    return found
