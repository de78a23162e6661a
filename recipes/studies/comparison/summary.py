"""What the runs of a comparison have come to, as tables of numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from recipes.lab.evaluation.scores import metric_of
from recipes.lab.training.checkpoint import Run
from recipes.studies.comparison.planned import PlannedRun, read_result
from recipes.studies.comparison.verdicts import at_chance, winner_digits

# What the sentences and the pictures show; everything else is in the tables.
HEADLINES = (
    "held_out_loss", "FID", "KID", "class_accuracy", "coverage", "iou_of_ceiling", "agreement",
)  # fmt: skip
SETTING = ["data", "level", "resolution", "protocol"]
COSTS = ["macs", "training_macs", "parameters", "depth", "forward_seconds", "training_seconds"]


def collect(out: Path, planned: Sequence[PlannedRun]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What all runs have come to.

    Returns:
        One row per run and guidance scale (one with its state alone where there is no number),
        and one row per point of a learning curve.
    """
    rows, curves = [], []
    for one in planned:
        folder, settings = one.folder(out), one.settings
        result = read_result(folder) or {"state": "not run", "error": None}
        measured, curve = result.get("metrics") or {}, result.get("curve") or []
        evaluator = measured.get("evaluator")  # none where only the exact classifier has looked
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
            "evaluator": f"{evaluator['name']} {evaluator['sha256'][:8]}" if evaluator else None,
            **{name: result.get("cost", {}).get(name) for name in COSTS},
            "classes": _classes(folder) if measured else None,
            **_ends([loss for _, loss in curve]),
        }
        floor = measured.get("real_floor", {}).items()
        base_floor = {f"floor {k}": v for k, v in floor if isinstance(v, float)}
        for cfg, numbers in (measured.get("results") or {"nan": {}}).items():
            numbers = {k: v for k, v in numbers.items() if k != "not_finite_images"}
            rows.append({**base, "cfg": float(cfg), **numbers, **base_floor})
        key = {name: base[name] for name in (*SETTING, "variant", "seed")}
        curves += [{**key, "step": step, "loss": loss} for step, loss in curve]
    columns = [*SETTING, "variant", "seed", "step", "loss"]
    runs = pd.DataFrame(rows)
    for name in ("wall_seconds", "classes", "first_loss", "last_loss", *COSTS):
        runs[name] = pd.to_numeric(runs[name])  # a column of None alone is one of objects
    return runs, pd.DataFrame(curves, columns=columns)


def _classes(folder: Path) -> int | None:
    """How many classes a run's data has, or None where its configuration does not say."""
    try:
        return len(Run(folder / "run").config()["data"]["class_names"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _ends(losses: Sequence[float]) -> dict[str, float | None]:
    """The loss at the start, and the mean of the last tenth of the curve."""
    if len(losses) < 2:
        return {"first_loss": None, "last_loss": None}
    last = losses[-max(1, len(losses) // 10) :]
    return {"first_loss": losses[0], "last_loss": math.fsum(last) / len(last)}


def metric_columns(runs: pd.DataFrame) -> list[str]:
    """The reported metrics of a table of runs."""
    found = [str(c) for c in runs.columns if "[" in c and not c.startswith("floor ")]
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
    """The mean of a column by variant, as text."""
    return pd.Series(
        {n: f"{factor * of[column].mean():.3g}" for (n,), of in grouped_by(runs, ["variant"])}
    )


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
