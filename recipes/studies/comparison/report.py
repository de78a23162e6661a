"""The report of a comparison: one HTML file that needs no other, and its numbers as CSV."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from recipes.lab.console import UserError, one_line
from recipes.lab.drawing.canvas import Figure, new_figure, plain, png, sns
from recipes.lab.drawing.palette import color_of, marker_of
from recipes.lab.drawing.pictures import image_grid
from recipes.lab.evaluation.scores import metric_of
from recipes.lab.evaluation.shards import Plan, read_shards, shard_folder
from recipes.lab.files import write_text
from recipes.lab.training.checkpoint import Run
from recipes.studies.comparison.cells import OK, Cell, read_result
from recipes.studies.comparison.grid import Variant, paper_rows
from recipes.studies.comparison.tables import as_html, write_table
from recipes.studies.comparison.verdicts import (
    at_chance,
    is_lower_better,
    summary_sentence,
    winner_digits,
)

# What the summary and the pictures show; everything else is in the tables.
HEADLINES = ("FID", "KID", "class_accuracy", "coverage", "iou_of_ceiling", "agreement")
PLACE = ["data", "level", "resolution", "protocol"]
COSTS = ["macs", "training_macs", "parameters", "depth", "forward_seconds", "training_seconds"]
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1180px;margin:2em auto;padding:0 1em}
table{border-collapse:collapse;font-size:13px;display:block;overflow-x:auto}
td,th{padding:3px 8px;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}
th{background:#f4f4f4}img{max-width:100%}.bad{color:#a50026}code{background:#f4f4f4}"""
# Should a name ever escape its quotes, nothing of it runs or is fetched.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def collect(out: Path, cells: Sequence[Cell]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What all cells have come to.

    Returns:
        One row per cell and guidance scale (one with its state alone where there is no number),
        and one row per point of a learning curve.
    """
    rows, curves = [], []
    for cell in cells:
        result = read_result(out / "cells" / cell.name) or {"state": "not run", "error": None}
        settings = cell.settings
        measured = result.get("metrics") or {}
        curve = result.get("curve") or []
        base = {
            "data": settings.data,
            "level": settings.level if settings.data == "shapes" else "",
            "resolution": measured.get("resolution", settings.resolution or 0),
            "protocol": settings.protocol,
            "variant": cell.label,
            "attn": settings.attn,
            "options": json.dumps(dict(settings.attn_options)),
            "steps": settings.steps,
            "batch_size": settings.batch_size,
            "samples": cell.samples,
            "seed": settings.seed,
            "cell": cell.name,
            "state": result["state"],
            "error": result.get("error"),
            "wall_seconds": result.get("wall_seconds"),
            "device": measured.get("device"),
            "torch": measured.get("versions", {}).get("torch"),
            "evaluator": _evaluator(measured),
            **{name: result.get("cost", {}).get(name) for name in COSTS},
            "classes": _classes(out, cell) if measured else None,
            **_ends(curve),
        }
        found = measured.get("results") or {"": {}}
        for cfg, numbers in found.items():
            numbers = {k: v for k, v in numbers.items() if k != "not_finite_images"}
            rows.append({**base, "cfg": float(cfg) if cfg else np.nan, **numbers})
        if measured:
            floor = {f"floor {k}": v for k, v in measured["real_floor"].items()}
            for row in rows[-len(found) :]:
                row.update({k: v for k, v in floor.items() if isinstance(v, float)})
        for step, loss in curve:
            curves.append({**{k: base[k] for k in (*PLACE, "variant", "seed")},
                           "step": step, "loss": loss})  # fmt: skip
    columns = [*PLACE, "variant", "seed", "step", "loss"]
    return pd.DataFrame(rows), pd.DataFrame(curves, columns=columns)


def _classes(out: Path, cell: Cell) -> int | None:
    """How many classes a run's data has, or None where its configuration does not say."""
    try:
        return len(Run(out / "cells" / cell.name / "run").config()["data"]["class_names"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _ends(curve: Sequence[tuple[int, float]]) -> dict[str, float | None]:
    """The loss at the start, and the mean of the last tenth of the curve."""
    losses = [loss for _, loss in curve]
    if len(losses) < 2:
        return {"first_loss": None, "last_loss": None}
    last = losses[-max(1, len(losses) // 10) :]
    return {"first_loss": losses[0], "last_loss": math.fsum(last) / len(last)}


def _evaluator(measured: Mapping[str, Any]) -> str | None:
    """ "smallcnn 520aacd8", or None where only the exact judge has looked."""
    found = measured.get("evaluator")
    return f"{found['name']} {found['sha256'][:8]}" if found else None


def write_report(
    out: Path, cells: Sequence[Cell], variants: Sequence[Variant], title: str
) -> dict[str, str]:
    """Writes report.html, cells.csv, summary.csv and curves.csv into ``out``.

    Args:
        out: Folder of the comparison.
        cells: All its cells, done or not.
        variants: For the paper's numbers beside ours.
        title: The command, as the reader can repeat it.

    Returns:
        The state of every cell.
    """
    command = f"python recipes/{one_line(title)}"
    write_text(out / "command.txt", f"{command}\n")
    frame, curves = collect(out, cells)
    write_table(out / "cells.csv", frame)
    write_table(out / "curves.csv", curves)
    done = frame[frame.state == OK]
    summary = summarise(done)
    write_table(out / "summary.csv", summary)
    parts = [
        f"<h1>Comparison</h1><p><code>{as_html(command)}</code></p>",
        _states(frame),
    ]
    if len(done):
        parts += ["<h2>In plain words</h2>", _plain_words(done), "<h2>Numbers</h2>"]
        parts += [_numbers(done, summary)]
        parts += [_picture(name, figure) for name, figure in figures(done, curves)]
        parts += ["<h2>Samples</h2>", *_sample_grids(out, cells, done)]
    paper = paper_rows(variants)
    if len(paper):
        parts.append(
            "<h2>The paper's numbers</h2><p>ImageNet subsets at 256 px, models of size S, "
            "guidance 4.0, Inception features: <b>another experiment</b>, to compare orders with, "
            "never values.</p>" + paper.to_html(index=False, na_rep="", float_format="%.4g")
        )
    body = "\n".join(parts)
    write_text(
        out / "report.html",
        f"<!doctype html><html lang=en><meta charset=utf-8><meta http-equiv="
        f'"Content-Security-Policy" content="{POLICY}"><title>attnzoo comparison</title>'
        f"<style>{STYLE}</style><body>{body}</body></html>\n",
    )
    return dict(zip(frame.cell, frame.state, strict=True))


def metric_columns(frame: pd.DataFrame) -> list[str]:
    """The reported metrics of a table of cells."""
    found = [c for c in frame.columns if "[" in c and not c.startswith("floor ")]
    return [c for c in found if frame[c].notna().any()]


def headlines(frame: pd.DataFrame) -> list[str]:
    """The metrics that the summary speaks of, most telling first."""
    columns = metric_columns(frame)
    return [c for wanted in HEADLINES for c in columns if metric_of(c) == wanted]


def summarise(done: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over seeds, one row per place, scale, variant and metric."""
    if not len(done):
        return pd.DataFrame(columns=[*PLACE, "cfg", "variant", "metric", "mean", "std", "seeds"])
    keys = [*PLACE, "cfg", "variant"]
    long = done.melt(keys, metric_columns(done), "metric", "value").dropna(subset="value")
    grouped = long.groupby([*keys, "metric"], sort=False, dropna=False)["value"]
    return grouped.agg(mean="mean", std="std", seeds="count").reset_index()


def _states(frame: pd.DataFrame) -> str:
    cells = frame.drop_duplicates("cell")
    bad = cells[cells.state != OK]
    text = f"<p>{len(cells) - len(bad)} of {len(cells)} cells are done.</p>"
    if not len(bad):
        return text
    lines = "".join(
        f"<li class=bad>{as_html(row.cell)}: <b>{as_html(row.state)}</b>"
        f"{': ' + as_html(row.error) if isinstance(row.error, str) else ''}</li>"
        for row in bad.itertuples()
    )
    return f"{text}<p>Without a number:</p><ul>{lines}</ul>"


def place_name(place: Sequence[Any]) -> str:
    """("shapes", "easy", 16, "matched") -> "shapes easy 16 px, matched"."""
    data, level, resolution, protocol = place
    name = f"{data_name(data, level)} {resolution} px"
    return name if protocol == "controlled" else f"{name}, {protocol}"


def data_name(data: str, level: str) -> str:
    """("a/shapes", "") -> "shapes"; ("shapes", "easy") -> "shapes easy"."""
    return f"{Path(str(data)).name}{' ' + level if level else ''}"


def _groups(done: pd.DataFrame, keys: list[str]) -> Iterator[tuple[Any, pd.DataFrame]]:
    yield from done.groupby(keys, sort=False, dropna=False)


def _plain_words(done: pd.DataFrame) -> str:
    lines = []
    for (*place, cfg), group in _groups(done, [*PLACE, "cfg"]):
        lines.append(f"<h3>{as_html(place_name(place))}, guidance {cfg:g}</h3><ul>")
        lines += [
            f"<li>{as_html(summary_sentence(group, metric))}</li>" for metric in headlines(group)
        ]
        lines += [f"<li class=bad>{as_html(line)}</li>" for line in chance_lines(group)]
        lines.append("</ul>")
    seeds = done.seed.nunique()
    return (
        f"<p>{seeds} seed(s). Variants are compared within each seed (same images, noise and "
        f"times); a difference counts if its 95 % interval (Student's t) leaves out 0. No "
        f"correction for the number of comparisons: of twenty true ties one will look like a "
        f"difference.</p>" + "\n".join(lines)
    )


def chance_lines(group: pd.DataFrame) -> list[str]:
    """A line for each variant whose runs are no better than guessing, or than their start."""
    return [
        f"{name} is at chance ({why}): its numbers say nothing of the mechanism."
        for (name,), runs in _groups(group, ["variant"])
        if (why := at_chance(runs))
    ]


def _numbers(done: pd.DataFrame, summary: pd.DataFrame) -> str:
    parts = []
    for (*place, cfg), group in _groups(summary, [*PLACE, "cfg"]):
        digits = winner_digits(group, 4)
        group = group.assign(
            shown=[
                f"{mean:.{digits[metric]}g}" + (f" ± {std:.2g}" if std == std else "")
                for metric, mean, std in zip(
                    group.metric, group["mean"], group["std"], strict=True
                )
            ]
        )
        wide = group.pivot(index="variant", columns="metric", values="shown")
        # Spreads over subsets and second estimates are in the CSV.
        order = [c for c in metric_columns(done) if c in wide and not _is_detail(c)]
        wide = wide.loc[group.variant.unique(), order]
        mask = (done[PLACE].values == np.array(place, dtype=object)).all(1) & (done.cfg == cfg)
        here = done[mask]
        means = here.groupby("variant", sort=False)[COSTS].mean(numeric_only=True)
        wide.insert(0, "MMACs", (means.macs / 1e6).map("{:.3g}".format))
        wide.insert(1, "ms per image", (means.forward_seconds * 1e3).map("{:.3g}".format))
        floor = here.filter(like="floor ").mean()
        wide.loc["real images"] = [
            "" if f"floor {c}" not in floor else f"{floor[f'floor {c}']:.4g}" for c in wide.columns
        ]
        wide.columns.name = wide.index.name = None
        wide.index = wide.index.map(one_line)
        title = f"{as_html(place_name(place))}, guidance {cfg:g}"
        parts.append(f"<h3>{title}</h3>{wide.to_html(na_rep='')}")
    note = (
        "<p>Mean ± standard deviation over seeds; lower is better for FID, sFID, KID, sKID, "
        "higher for the rest. [judge] is the exact judge of the procedural shapes. The last row "
        "is what as many real images score.</p>"
    )
    return note + "\n".join(parts)


def _is_detail(metric: str) -> bool:
    return metric_of(metric).endswith(("_std", "_full"))


def figures(done: pd.DataFrame, curves: pd.DataFrame) -> Iterator[tuple[str, Figure]]:
    """The pictures of a report, with their headings."""
    metrics = headlines(done)
    if done.resolution.nunique() > 1:
        yield "Quality against resolution", _against_resolution(done, metrics)
    for column, scale, label in (
        ("macs", 1e6, "million MACs per forward"),
        ("forward_seconds", 1e-3, "measured ms per image and forward"),
    ):
        name = "cost" if column == "macs" else "measured time"
        yield f"Quality against {name}", _pareto(done, metrics, column, scale, label)
    if len(curves):
        yield "Learning curves", _learning_curves(curves)


def _style(labels: Sequence[str]) -> dict[str, Any]:
    return {
        "palette": {plain(label): color_of(label) for label in labels},
        "markers": {plain(label): marker_of(label) for label in labels},
    }


def _axes(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    with sns.axes_style("whitegrid"):
        figure = new_figure(4.2 * columns + 1.8, 3.4 * rows)
        return figure, figure.subplots(rows, columns, squeeze=False)


def _panels(
    groups: Sequence[tuple[Any, pd.DataFrame]], metrics: Sequence[str]
) -> tuple[Figure, np.ndarray, list[tuple[Any, Any, pd.DataFrame, str]]]:
    """One panel per group and metric that it has, three in a row; groups share no row."""
    wanted: list[list[tuple[Any, pd.DataFrame, str]]] = []
    for place, group in groups:
        first = group[group.cfg == group.cfg.min()]
        shown = [(place, first, metric) for metric in metrics if first[metric].notna().any()]
        wanted += [shown[start : start + 3] for start in range(0, len(shown), 3)]
    figure, axes = _axes(max(1, len(wanted)), 3)
    panels = []
    for row, shown in zip(axes, wanted, strict=False):
        panels += [(axis, *panel) for axis, panel in zip(row, shown, strict=False)]
    used = {id(panel[0]) for panel in panels}
    for axis in axes.flat:
        axis.set_visible(id(axis) in used)
    return figure, axes, panels


def _legend_outside(figure: Figure, axes: np.ndarray) -> None:
    found: dict[str, Any] = {}
    for axis in axes.flat:
        found |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        if axis.get_legend():
            axis.get_legend().remove()
    figure.legend(found.values(), found.keys(), loc="outside right upper", frameon=False)


def _against_resolution(done: pd.DataFrame, metrics: Sequence[str]) -> Figure:
    groups = [
        (place, group)
        for place, group in _groups(done, ["data", "level", "protocol"])
        if group.resolution.nunique() > 1
    ]
    figure, axes, panels = _panels(groups, metrics)
    for axis, (data, level, protocol), group, metric in panels:
        sns.lineplot(
            _shown(group), x="resolution", y=metric, hue="variant", style="variant", errorbar="sd",
            err_style="bars", dashes=False, ax=axis, **_style(group.variant.unique()),
        )  # fmt: skip
        axis.set_xscale("log", base=2)
        ticks = sorted(group.resolution.unique())
        axis.set_xticks(ticks, [f"{t}" for t in ticks])
        axis.minorticks_off()
        axis.set(
            title=f"{plain(data_name(data, level))}, {protocol}, guidance {group.cfg.min():g}",
            xlabel="pixels",
        )
        axis.set_ylabel(_labelled(metric))
    _legend_outside(figure, axes)
    return figure


def _shown(group: pd.DataFrame) -> pd.DataFrame:
    return group.assign(variant=group.variant.map(plain))


def _labelled(metric: str) -> str:
    return f"{metric}\n{'lower' if is_lower_better(metric) else 'higher'} is better"


def _pareto(
    done: pd.DataFrame, metrics: Sequence[str], column: str, scale: float, label: str
) -> Figure:
    figure, axes, panels = _panels(list(_groups(done, PLACE)), metrics)
    for axis, place, group, metric in panels:
        means = group.groupby("variant", sort=False)[[column, metric]].mean().dropna()
        spread = group.groupby("variant", sort=False)[metric].std().fillna(0)
        for name, point in means.iterrows():
            axis.errorbar(
                point[column] / scale, point[metric], yerr=spread[name],
                label=plain(str(name)), color=color_of(str(name)), marker=marker_of(str(name)),
                ls="none", capsize=2,
            )  # fmt: skip
        front = _front(means[column] / scale, means[metric], is_lower_better(metric))
        axis.plot(*zip(*front, strict=True), color="0.6", lw=1, zorder=0)
        axis.set(title=plain(place_name(place)), xlabel=label, ylabel=_labelled(metric))
    _legend_outside(figure, axes)
    return figure


def _front(
    costs: pd.Series, values: pd.Series, lower_is_better: bool
) -> list[tuple[float, float]]:
    """The points that no cheaper one equals."""
    found: list[tuple[float, float]] = []
    for cost, value in sorted(zip(costs, values, strict=True)):
        if not found or (value < found[-1][1] if lower_is_better else value > found[-1][1]):
            found.append((cost, value))
    return found


def _learning_curves(curves: pd.DataFrame) -> Figure:
    places = list(_groups(curves, PLACE))
    figure, axes = _axes(1, len(places))
    for axis, (place, group) in zip(axes.flat, places, strict=True):
        sns.lineplot(
            _shown(group), x="step", y="loss", hue="variant", errorbar=None, lw=1.2, ax=axis,
            palette=_style(group.variant.unique())["palette"],
        )  # fmt: skip
        axis.set(
            title=plain(place_name(place)), yscale="log", ylabel="training loss, mean over seeds"
        )
    _legend_outside(figure, axes)
    return figure


def _picture(name: str, figure: Figure) -> str:
    return f"<h2>{as_html(name)}</h2>{_image(png(figure, dpi=90), name)}"


def _image(content: bytes, alternative: str) -> str:
    text = base64.b64encode(content).decode()
    return f'<img alt="{as_html(alternative)}" src="data:image/png;base64,{text}">'


def _sample_grids(out: Path, cells: Sequence[Cell], done: pd.DataFrame) -> Iterator[str]:
    """For every place and scale one image of each class per variant, from the same noise."""
    by_name = {cell.name: cell for cell in cells}
    for (*place, cfg), group in _groups(done, [*PLACE, "cfg"]):
        yield f"<h3>{as_html(place_name(place))}, guidance {cfg:g}</h3><table>"
        for row in group[group.seed == group.seed.min()].itertuples():
            cell = by_name[row.cell]
            run = Run(out / "cells" / cell.name / "run")
            plan = Plan(samples=cell.samples, steps=cell.sampling_steps, cfg=cfg)
            try:
                images = read_shards(shard_folder(run, plan), plan, numbers=[0])
            except (OSError, UserError):
                continue
            classes = images.labels.unique()[:10].tolist()
            chosen = torch.tensor([int((images.labels == c).nonzero()[0]) for c in classes])
            pixels = images.pixels[chosen].permute(0, 3, 1, 2).float() / 127.5 - 1
            buffer = io.BytesIO()
            image_grid(pixels, columns=len(classes)).save(buffer, format="png")
            picture = _image(buffer.getvalue(), f"samples of {row.variant}")
            yield f"<tr><td>{as_html(row.variant)}</td><td>{picture}</td></tr>"
        yield "</table>"
