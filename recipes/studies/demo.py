"""Two or more mechanisms trained on digits, sampled and drawn side by side."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from backbones.pattern import file_name, parse_pattern
from recipes.lab.console import DONE, UserError, argument, log, printable, warn
from recipes.lab.drawing.canvas import new_figure, save_figure
from recipes.lab.drawing.palette import color_of
from recipes.lab.drawing.pictures import image_grid
from recipes.lab.evaluation.evaluate import classify
from recipes.lab.files import require_writable
from recipes.lab.sampling import RunSampler
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.session import train
from recipes.lab.training.settings import Settings
from recipes.studies.comparison.execution import losses_of

SMOOTHED_STEPS = 25


def demo(attn: str, steps: int, out: Path, overwrite: bool) -> int:
    """Trains what is not trained yet, and draws demo.png.

    Args:
        attn: Mechanisms or patterns, between commas.
        steps: Of each.
        out: Folder of the runs and the picture.
        overwrite: Whether to replace runs of other settings there.

    Returns:
        The exit status.

    Raises:
        UserError: There are fewer than two, or other runs in the folder.
        attnzoo.UsageError: There is no such mechanism.
    """
    mechanisms = list(dict.fromkeys(name.strip() for name in attn.split(",")))
    for name in mechanisms:
        parse_pattern(name).check()
    if len(mechanisms) < 2:
        raise UserError(f"--attn takes two mechanisms or more, got {attn!r}")
    runs = {name: Run(out / file_name(name)) for name in mechanisms}
    wanted = {name: Settings(attn=name, steps=steps) for name in mechanisms}
    is_other = {name: _is_other(settings, runs[name]) for name, settings in wanted.items()}
    if any(is_other.values()) and not overwrite:
        raise UserError(
            f"{printable(str(out))} holds runs of other settings, which are not replaced unasked: "
            f"choose another --out, or replace them with --overwrite"
        )
    picture = require_writable(out / "demo.png")
    for name, settings in wanted.items():
        status = _train_once(settings, runs[name], is_other[name], overwrite)
        if status != DONE:
            return status
    _draw(runs, picture)
    first = argument(runs[mechanisms[0]].folder)
    print(
        f"\n{printable(str(picture))} shows them.\nWhat next:\n"
        f"  python recipes/sample.py {first} --classes 3,7 --cfg 4.0\n"
        f"  python recipes/train.py --attn sana --data shapes\n"
        f"with the environment that make has made: source .venv/bin/activate"
    )
    return DONE


def _is_other(settings: Settings, run: Run) -> bool:
    """Whether the folder holds a run that was not trained with these settings."""
    if not run.config_file.exists():
        return False
    found = run.config().get("settings", {})
    defaults = dataclasses.asdict(Settings())
    return defaults | found != dataclasses.asdict(settings)


def _train_once(settings: Settings, run: Run, is_other: bool, overwrite: bool) -> int:
    exists = run.config_file.exists() and not is_other
    found = run.newest_checkpoint(warn=warn) if exists else None
    if found and found[0] == settings.steps:
        log.info(f"{printable(str(run.folder))} is already trained; remove it to train again")
        return DONE
    # One whose checkpoints are all broken cannot go on.
    is_replaced = is_other or (exists and overwrite and found is None)
    return train(settings, run, resume=exists and not is_replaced, overwrite=is_replaced)


def _draw(runs: Mapping[str, Run], picture: Path) -> None:
    figure = new_figure(15, 3.2 * len(runs))
    axes = figure.subplot_mosaic([[attn, "loss"] for attn in runs], width_ratios=[1.6, 1])
    for attn, run in runs.items():
        axis = axes[attn]
        verdict = classify(run)
        images = RunSampler(run)(torch.arange(10).repeat(3), cfg=2.0)
        axis.imshow(image_grid(images, columns=10))
        axis.set_axis_off()
        axis.set_title(
            f"{attn}: digits 0 to 9 by column, guidance 2.0; "
            f"a classifier accepts {verdict['accepted']} of {verdict['samples']} (no guidance)"
        )
        steps, smooth, window = smoothed(run.read_log())
        axes["loss"].plot(steps, smooth, label=attn, color=color_of(attn))
    axes["loss"].set(
        xlabel="step", ylabel=f"loss, mean of {window} steps", yscale="log", title="training"
    )
    axes["loss"].legend()
    axes["loss"].grid(alpha=0.3, which="both")
    save_figure(figure, picture, dpi=110)


def smoothed(log: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[float], int]:
    """Steps, the mean loss of the steps before each, and how many these are.

    A step that was skipped has no loss and is left out.
    """
    found = losses_of(log)
    totals = [0.0, *itertools.accumulate(loss for _, loss in found)]
    window = max(1, min(SMOOTHED_STEPS, len(found)))
    ends = range(window, len(totals))
    means = [(totals[end] - totals[end - window]) / window for end in ends]
    return [found[end - 1][0] for end in ends], means, window
