"""Trains DyDiLA and softmax attention on handwritten digits and draws both side by side.

make demo
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from recipes.evaluate import judge
from recipes.lab.console import DONE, run_script, whole
from recipes.lab.drawing.palette import color_of
from recipes.lab.drawing.pictures import image_grid
from recipes.lab.training.checkpoint import Run
from recipes.sample import sample_run
from recipes.train import Settings, train

MECHANISMS = ("dydila", "softmax")
SMOOTHED_STEPS = 25


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python recipes/demo.py", description="Train, sample and draw two mechanisms."
    )
    parser.add_argument("--steps", type=whole(1), default=1500, help="optimiser steps of each")
    parser.add_argument("--out", default="runs/demo", help="folder of both runs and the picture")
    given = parser.parse_args(arguments)
    out = Path(given.out)
    for attn in MECHANISMS:
        status = _train_once(Settings(attn=attn, steps=given.steps), Run(out / attn))
        if status != DONE:
            return status
    picture = out / "demo.png"
    _draw(out, picture)
    print(
        f"\n{picture} shows both.\nWhat next:\n"
        f"  python recipes/sample.py {out / MECHANISMS[0]} --classes 3,7 --cfg 4.0\n"
        f"  python recipes/train.py --attn sana --data shapes\n"
        f"with the environment that make has made: source .venv/bin/activate"
    )
    return DONE


def _train_once(settings: Settings, run: Run) -> int:
    if run.config_file.exists() and run.config()["settings"]["steps"] == settings.steps:
        found = run.newest_checkpoint(warn=print)
        if found and found[0] == settings.steps:
            print(f"{run.folder} is already trained; remove it to train again")
            return DONE
        return train(settings, run, resume=found is not None, overwrite=found is None)
    return train(settings, run, overwrite=True)


def _draw(out: Path, picture: Path) -> None:
    figure, axes = plt.subplot_mosaic(
        [[MECHANISMS[0], "loss"], [MECHANISMS[1], "loss"]],
        figsize=(15, 6.4),
        width_ratios=[1.6, 1],
        layout="constrained",
    )
    for attn in MECHANISMS:
        run, axis = Run(out / attn), axes[attn]
        verdict = judge(run)
        images = sample_run(run, labels=torch.arange(10).repeat(3), cfg=2.0)
        axis.imshow(image_grid(images, columns=10))
        axis.set_axis_off()
        axis.set_title(
            f"{attn}: digits 0 to 9 by column, guidance 2.0; "
            f"a classifier accepts {verdict['accepted']} of {verdict['samples']} (no guidance)"
        )
        losses = [entry["loss"] for entry in run.read_log()]
        totals = [0.0, *itertools.accumulate(losses)]
        window = min(SMOOTHED_STEPS, len(losses))
        smooth = [
            (totals[end] - totals[end - window]) / window for end in range(window, len(totals))
        ]
        axes["loss"].plot(range(window, len(totals)), smooth, label=attn, color=color_of(attn))
    axes["loss"].set(
        xlabel="step", ylabel=f"loss, mean of {window} steps", yscale="log", title="training"
    )
    axes["loss"].legend()
    axes["loss"].grid(alpha=0.3, which="both")
    figure.savefig(picture, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    run_script(main)
