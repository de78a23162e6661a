"""Quality: read from a comparison of ``recipes/compare.py``, or the loss of a short training."""

from __future__ import annotations

import contextlib
import io
import statistics
import tempfile
import time
from multiprocessing import util
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from backbones.pattern import nested
from bench import machine
from bench.cases import Case, Conditions
from bench.isolate import Unsupported
from bench.worker import prepare
from recipes.lab.console import UserError

# Long enough for the loss to fall from its start, far too short to rank mechanisms.
STEPS = 30
SHORT = f"training loss after {STEPS} steps on rendered shapes; it ranks nothing"


def read_quality(folder: str | Path) -> pd.DataFrame:
    """The summary of a comparison: a row per data, resolution, guidance, variant and metric.

    Raises:
        UserError: There is none.
    """
    path = Path(folder)
    path = path / "summary.csv" if path.is_dir() else path
    try:
        found = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is no summary of a comparison ({type(error).__name__}); make one with "
            f"python recipes/compare.py and name its folder"
        ) from error
    if not {"variant", "metric", "mean", "resolution"} <= set(found.columns):
        raise UserError(f"{path} is no summary.csv of recipes/compare.py")
    found = found.dropna(subset=["variant", "metric"]).astype({"variant": str, "metric": str})
    for column in ("mean", "resolution"):
        found[column] = pd.to_numeric(found[column], errors="coerce")
    found = found[np.isfinite(found["mean"]) & np.isfinite(found["resolution"])]
    if found.empty:
        raise UserError(f"{path} has no result that is a number")
    return found


def best_metric(summary: pd.DataFrame) -> tuple[str, bool]:
    """The most telling metric of a summary, and whether smaller is better."""
    from recipes.studies.comparison.summary import HEADLINES
    from recipes.studies.comparison.verdicts import is_lower_better

    names = list(summary["metric"].unique())
    ranked = [name for wanted in HEADLINES for name in names if name.startswith(wanted)]
    chosen = (ranked or names)[0]
    return chosen, is_lower_better(chosen)


def measure_quality(case: Case, conditions: Conditions) -> dict[str, Any]:
    """What a comparison found for the case's mechanism, or a short training of it.

    Raises:
        Unsupported: The comparison has nothing on this mechanism at this resolution.
    """
    prepare(conditions)
    if conditions.quality is None:
        return _short_training(case) | machine.describe(case.device, conditions.threads)
    found = read_quality(conditions.quality)
    found = found[(found["variant"] == case.label) & (found["resolution"] == case.resolution)]
    if found.empty:
        raise Unsupported(
            f"{conditions.quality} has no result for {case.label} at {case.resolution} px"
        )
    rows = found.astype(object).where(found.notna(), None).to_dict("records")
    return {"quality": rows, "quality_source": str(conditions.quality), "rounds": [0.0]}


def _short_training(case: Case) -> dict[str, Any]:
    from recipes.lab.training.checkpoint import Run
    from recipes.lab.training.session import train
    from recipes.lab.training.settings import Settings

    # In the run's folder: this process may be killed before it can remove anything.
    scratch = tempfile.TemporaryDirectory(dir=util.get_temp_dir())
    with scratch as folder, contextlib.redirect_stdout(io.StringIO()):
        run, start = Run(Path(folder) / "run"), time.perf_counter()
        options = nested(dict(case.options))
        settings = Settings(attn=case.mechanism, attn_options=options, data="shapes",
                            resolution=case.resolution, steps=STEPS)  # fmt: skip
        status = train(settings, run)
        seconds = time.perf_counter() - start
        if status != 0:
            raise RuntimeError(f"training ended with status {status}")
        losses = [row["loss"] for row in Run.open(run.folder).read_log() if "loss" in row]
    last = losses[-max(1, len(losses) // 3) :]
    row = {"data": "shapes", "resolution": case.resolution, "variant": case.label,
           "metric": "training loss", "mean": statistics.fmean(last), "seeds": 1}  # fmt: skip
    return {"quality": [row], "quality_source": SHORT, "rounds": [seconds]}
