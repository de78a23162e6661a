"""What the runs of a comparison have come to, as tables of numbers."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from recipes.lab.evaluation.scores import METRICS, metric_of
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.held_out import MODEL_NAME, NAMES, TIMES, images_needed
from recipes.studies.comparison.planned import PlannedRun, read_result
from recipes.studies.comparison.verdicts import MOVED, Choice, at_chance, winner_digits

# Where pyarrow is installed it would hold texts, and refuse a folder's name that is not UTF-8.
pd.options.mode.string_storage = "python"
# What the sentences and the pictures show; everything else is in the tables.
HEADLINES = (
    "held_out_loss", "FID", "KID", "class_accuracy", "coverage", "iou_of_ceiling", "agreement",
)  # fmt: skip
SETTING = ["data", "level", "resolution", "protocol"]
COSTS = ["macs", "training_macs", "parameters", "depth", "forward_seconds", "training_seconds"]


class Collected(NamedTuple):
    """What all runs have come to.

    Attributes:
        runs: One row per run and guidance scale; one with its state alone where there is no
            number.
        curves: One row per point of a learning curve: the training loss, or the held-out losses
            of the average (with their quarters) and of the model.
        by_image: Held-out loss (n,) of each image, by run.
    """

    runs: pd.DataFrame
    curves: pd.DataFrame
    by_image: dict[str, Tensor]


def collect(out: Path, planned: Sequence[PlannedRun]) -> Collected:
    """Reads the results of all runs."""
    rows, curves, by_image = [], [], {}
    for one in planned:
        folder, settings = one.folder(out), one.settings
        result = read_result(folder) or {"state": "not run", "error": None}
        measured, curve = result.get("metrics") or {}, result.get("curve") or []
        evaluator = measured.get("evaluator")  # none where only the exact classifier has looked
        config = _configuration(folder) if measured else {}
        held_out = measured.get("held_out") or {}
        if held_out.get("by_image"):
            by_image[one.name] = torch.tensor(held_out["by_image"], dtype=torch.float64)
        base = {
            "data": settings.data,
            "level": settings.level if settings.data == "shapes" else "",
            "resolution": measured.get("resolution", settings.resolution or 0),
            "protocol": settings.protocol,
            "variant": one.label,
            "attn": settings.attn,
            "options": json.dumps(dict(settings.attn_options)),
            "steps": settings.steps,
            "batch_size": settings.batch_size,
            "samples": one.samples,
            "seed": settings.seed,
            "run": one.name,
            "state": result["state"],
            "error": result.get("error"),
            "wall_seconds": result.get("wall_seconds"),
            "device": measured.get("device"),
            "torch": measured.get("versions", {}).get("torch"),
            "machine": _machine(config, measured),
            "held_out_images": f"{held_out.get('images', '')} {held_out.get('sha256', '')[:8]}",
            "evaluator": f"{evaluator['name']} {evaluator['sha256'][:8]}" if evaluator else None,
            **{name: result.get("cost", {}).get(name) for name in COSTS},
            "classes": _classes(config),
            **_ends([loss for _, loss in curve]),
        }
        floor = measured.get("real_floor", {}).items()
        base_floor = {f"floor {k}": v for k, v in floor if isinstance(v, float)}
        for cfg, numbers in (measured.get("results") or {"nan": {}}).items():
            numbers = {k: v for k, v in numbers.items() if k != "not_finite_images"}
            rows.append({**base, "cfg": float(cfg), **numbers, **base_floor})
        key = {name: base[name] for name in (*SETTING, "variant", "seed")}
        curves += [{**key, "step": step, "loss": loss} for step, loss in curve]
        curves += [{**key, **point} for point in result.get("held_out_curve", ())]
    columns = [*SETTING, "variant", "seed", "step", "loss", *NAMES, MODEL_NAME]
    runs = pd.DataFrame(rows)
    for name in ("wall_seconds", "classes", "first_loss", "last_loss", *COSTS):
        runs[name] = pd.to_numeric(runs[name])  # a column of None alone is one of objects
    return Collected(runs, pd.DataFrame(curves, columns=columns), by_image)


def _configuration(folder: Path) -> dict[str, Any]:
    """A run's, or an empty one where it is gone or damaged."""
    try:
        return Run(folder / "run").config()
    except (OSError, ValueError):
        return {}


def _classes(config: Mapping[str, Any]) -> int | None:
    """How many classes a run's data has, or None where its configuration does not say."""
    try:
        return len(config["data"]["class_names"])
    except (KeyError, TypeError):
        return None


def _machine(config: Mapping[str, Any], measured: Mapping[str, Any]) -> str | None:
    """Device and torch that a run was trained with, or ``MOVED``.

    What measured it stands for what trained it where the configuration does not say.
    """
    changes = [line for change in config.get("changes") or () for line in change["changes"]]
    if any(line.startswith(("environment: device ", "environment: torch ")) for line in changes):
        return MOVED
    was = config.get("environment") or {}
    device = was.get("device") or measured.get("device")
    version = was.get("torch") or measured.get("versions", {}).get("torch")
    return f"{device}, torch {version}" if device and version else None


def machine_line(runs: pd.DataFrame, choice: Choice) -> str | None:
    """One line on runs that were made on several machines, or None where all are of one.

    Args:
        runs: Rows of what is done, with "machine".
        choice: Whether they are paired all the same.
    """
    first = runs.drop_duplicates("run")
    counts = first["machine"].fillna("an unknown machine").value_counts().to_dict()
    if len(counts) < 2 and MOVED not in counts:
        return None
    moved = first.loc[first["machine"] == MOVED, "run"].tolist()
    shown = [f"{number} on {machine}" for machine, number in counts.items() if machine != MOVED]
    if moved:
        more = f" and {len(moved) - 3} more" if len(moved) > 3 else ""
        shown.append(f"{len(moved)} begun on one, ended on another: {', '.join(moved[:3])}{more}")
    rule = (
        "they are paired all the same, as --mixed-machines asks, and a seed's differences hold "
        "some of the rounding"
        if choice.mixed_machines
        else "only runs of one seed and one machine are paired (--mixed-machines pairs all)"
    )
    return f"The runs are of several machines ({'; '.join(shown)}): {rule}."


def image_line(runs: pd.DataFrame, by_image: Mapping[str, Tensor]) -> str | None:
    """How exact the held-out losses of one setting are, and how many images would do.

    Args:
        runs: Rows of what is done in one setting.
        by_image: See ``Collected``.
    """
    first = runs.drop_duplicates("run")
    losses = {name: by_image[name] for name in first["run"] if name in by_image}
    shares = [(x.std() / len(x) ** 0.5 / x.mean()).item() for x in losses.values()]
    needed = [
        images_needed(losses[a][:, None], losses[b][:, None])
        for _, rows in first.groupby(["seed", "held_out_images"])
        for a, b in itertools.combinations([name for name in rows["run"] if name in losses], 2)
        if len(losses[a]) == len(losses[b])
    ]
    if not shares:
        return None
    counts = " or ".join(map(str, sorted({*map(len, losses.values())})))
    sets = first.loc[first["run"].isin(list(losses))].groupby("seed")["held_out_images"].nunique()
    other = "" if sets.max() == 1 else " (not all the same: only losses of the same are compared)"
    line = (
        f"The held-out loss is of {counts} images{other} at {TIMES} times; a "
        f"model's own error over them is {100 * statistics.median(shares):.2g} % of its loss."
    )
    if not needed:
        return line
    typical = statistics.median(needed)
    enough = f"{math.ceil(typical)} of them" if math.isfinite(typical) else "no number of them"
    return (
        f"{line} Models are compared on the same images: {enough} would make the error of the "
        f"median difference ({len(needed)} pairs of runs) a tenth of it."
    )


def learning_curve(
    curves: pd.DataFrame, setting: Sequence[Any], variant: str, seeds: Collection[int]
) -> list[tuple[float, float]]:
    """(step, held-out loss of the average), the mean over these seeds; empty if one lacks it."""
    rows = curves.dropna(subset=[NAMES[0]])
    rows = rows.loc[(rows["variant"] == variant) & rows["seed"].isin(list(seeds))]
    for key, value in zip(SETTING, setting, strict=True):
        rows = rows.loc[rows[key] == value]
    grouped = rows.groupby("step")[NAMES[0]].agg(["mean", "count"])
    grouped = grouped.loc[grouped["count"] == len(seeds)]
    return list(zip(grouped.index.tolist(), grouped["mean"].tolist(), strict=True))


def by_time_table(curves: pd.DataFrame, setting: Sequence[Any]) -> pd.DataFrame:
    """The last held-out losses of the log by variant: both weights, and quarters of the time."""
    rows = curves.dropna(subset=[NAMES[0]])
    for key, value in zip(SETTING, setting, strict=True):
        rows = rows.loc[rows[key] == value]
    last = rows.loc[rows["step"] == rows.groupby(["variant", "seed"])["step"].transform("max")]
    titles = {
        NAMES[0]: "average's weights",
        MODEL_NAME: "model's own weights",
        **{name: f"average, quarter {number}" for number, name in enumerate(NAMES[1:], 1)},
    }
    means = last.groupby("variant", sort=False)[list(titles)].mean()
    return means.rename(columns=titles).sort_values(titles[NAMES[0]])


def _ends(losses: Sequence[float]) -> dict[str, float | None]:
    """The loss at the start, and the mean of the last tenth of the curve."""
    if len(losses) < 2:
        return {"first_loss": None, "last_loss": None}
    last = losses[-max(1, len(losses) // 10) :]
    return {"first_loss": losses[0], "last_loss": math.fsum(last) / len(last)}


def metric_columns(runs: pd.DataFrame) -> list[str]:
    """The reported metrics of a table of runs."""
    bare = {name for metric in METRICS.values() for name in metric.names}  # Inception's
    found = [
        str(c) for c in runs.columns if not c.startswith("floor ") and ("[" in c or c in bare)
    ]
    return [c for c in found if runs[c].notna().any()]


def headlines(runs: pd.DataFrame) -> list[str]:
    """The metrics that the sentences speak of, most telling first."""
    columns = metric_columns(runs)
    return [c for wanted in HEADLINES for c in columns if metric_of(c) == wanted]


def grouped_by(runs: pd.DataFrame, keys: Sequence[str]) -> Iterator[tuple[Any, pd.DataFrame]]:
    """(values of the keys, their rows) in the order of the table."""
    yield from runs.groupby(list(keys), sort=False, dropna=False)


def summarize(done: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over seeds: a row per setting, scale, variant and metric."""
    keys = [*SETTING, "cfg", "variant"]
    if not len(done):
        return pd.DataFrame(columns=[*keys, "metric", "mean", "std", "seeds"])
    long = done.melt(keys, metric_columns(done), "metric", "value").dropna(subset="value")
    grouped = long.groupby([*keys, "metric"], sort=False, dropna=False)["value"]
    return grouped.agg(mean="mean", std="std", seeds="count").reset_index()


def means_table(runs: pd.DataFrame, metrics: Sequence[str], digits: int) -> pd.DataFrame:
    """ "mean ± standard deviation" by variant and metric.

    Args:
        runs: Of one setting and guidance scale.
        metrics: In the order of the columns; those that the runs do not have are left out.
        digits: Significant ones of a mean; more where the best would look like the second.
    """
    summary = summarize(runs)
    summary = summary.loc[summary["metric"].isin(metrics)]
    enough = winner_digits(summary, digits)
    table: dict[str, dict[str, str]] = {m: {} for m in metrics if m in enough}
    for row in summary.to_dict("records"):
        spread = f" ± {row['std']:.2g}" if row["std"] == row["std"] else ""
        mean = f"{row['mean']:.{enough[row['metric']]}g}"
        table[row["metric"]][row["variant"]] = mean + spread
    return pd.DataFrame(table, index=list(dict.fromkeys(summary["variant"])))


def scaled_mean(runs: pd.DataFrame, column: str, factor: float) -> pd.Series:
    """The mean of a column by variant, as text; empty where it was not measured."""
    means = {n: factor * of[column].mean() for (n,), of in grouped_by(runs, ["variant"])}
    return pd.Series({n: "" if mean != mean else f"{mean:.3g}" for n, mean in means.items()})


def chance_lines(runs: pd.DataFrame) -> list[str]:
    """A line for each variant whose runs are no better than guessing, or than their start."""
    return [
        f"{name} is at chance ({why}): its numbers say nothing of the mechanism."
        for (name,), of_variant in grouped_by(runs, ["variant"])
        if (why := at_chance(of_variant))
    ]


def setting_name(setting: Sequence[Any]) -> str:
    """("shapes", "easy", 16, "matched") -> "shapes easy 16 px, matched"."""
    data, level, resolution, protocol = setting
    name = f"{data_name(data, level)} {resolution} px"
    return name if protocol == "controlled" else f"{name}, {protocol}"


def data_name(data: str, level: str) -> str:
    """("a/shapes", "") -> "shapes"; ("shapes", "easy") -> "shapes easy"."""
    return f"{Path(str(data)).name}{' ' + level if level else ''}"
