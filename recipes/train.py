"""Trains the shared backbone with one attention of the zoo.

    python recipes/train.py --attn sana
    torchrun --standalone --nproc_per_node 8 recipes/train.py --preset dit --data latents
    accelerate launch --num_processes 8 recipes/train.py --preset dit --data latents

With no other flag it trains on handwritten digits on a CPU for a few minutes. Every random draw
depends on (seed, step) alone, so every mechanism sees the same images, times, noise and label
drops on any number of processes, and a resumed run equals one that was never interrupted. A run
that is there is continued; docs/reliability.md says what is promised and was tried.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from tqdm.auto import tqdm

import attnzoo
from recipes.lab.console import (
    DONE,
    UserError,
    parse_options,
    run_script,
    user_errors,
    whole,
)
from recipes.lab.data.datasets import DATASETS
from recipes.lab.data.latents import LatentDataset, canonical_settings
from recipes.lab.training.build import build_model
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.distributed import on_main
from recipes.lab.training.loop import Loop
from recipes.lab.training.settings import PRESETS, Settings, resumed_settings
from recipes.lab.training.status import claimed, describe, is_claimed
from recipes.lab.training.trainer import Trainer

__all__ = ["PRESETS", "Settings", "Trainer", "build_model", "default_folder", "main", "train"]


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    given = vars(_parser().parse_args(arguments))
    if "status" in given:
        print(describe(Run.open(given["status"])))
        return DONE
    out, resume, overwrite = given.pop("out"), given.pop("resume"), given.pop("overwrite")
    allowed, trackers = given.pop("allow_change"), given.pop("tracker")
    if "set" in given:
        given["attn_options"] = parse_options(given.pop("set"))
    given = canonical_settings(given)
    run = Run(out or default_folder(given))
    if resume == "always":
        Run.open(run.folder)
    exists = run.config_file.is_file()
    if exists and resume == "never" and not overwrite:
        raise UserError(f"{run.folder} already holds a run; drop --resume never to continue it")
    if exists and not overwrite:
        settings, _ = resumed_settings(run.config()["settings"], given, allowed)
        return train(settings, run, resume=True, trackers=trackers)
    settings = Settings(**({**PRESETS[given.get("preset", "tiny")]} | given))
    return train(settings, run, overwrite=overwrite, trackers=trackers)


def default_folder(given: dict[str, Any]) -> Path:
    """Where a run goes if the caller does not say."""
    data = Path(given.get("data", Settings.data)).name
    return Path("runs") / f"{data}-{given.get('attn', Settings.attn).replace('/', '-')}"


def _parser() -> argparse.ArgumentParser:
    # A flag that is not given must not appear, so that a resumed run can tell what was asked for.
    # No flag may be a prefix of one of torchrun's, which would take it for its own: --log, --run,
    # --max, --node.
    parser = argparse.ArgumentParser(
        prog="python recipes/train.py",
        description="Train the shared backbone with one attention of the zoo.",
        argument_default=argparse.SUPPRESS,
    )
    flag = parser.add_argument
    flag("--attn", help=f"one of {', '.join(attnzoo.list_attention())}, or a model of the paper")
    flag(
        "--set", action="append", metavar="OPTION=VALUE", help="an option of the mechanism; repeat"
    )
    flag("--size", help="tiny, S, B or L")
    flag("--protocol", help="controlled (same depth and feed-forward for all) or paper")
    flag(
        "--data",
        help=f"{', '.join(DATASETS)}, a folder with one sub-folder per class, or latents from "
        "recipes/encode.py",
    )
    flag("--level", help="of shapes: easy, medium, hard or long-range")
    flag("--class-count", type=whole(1), help="draw that many classes of a folder")
    flag("--class-seed", type=whole(0), help="of that draw")
    flag("--vae", help="folder or hub id of an AutoencoderKL: train on latents, encoded each time")
    flag("--resolution", type=whole(1), help="side of the images in pixels")
    flag("--patch-size", type=whole(1), help="side of a patch in pixels, or in latent pixels")
    flag("--preset", choices=list(PRESETS), help="training recipe")
    flag("--steps", type=whole(1), help="optimiser steps")
    flag("--batch-size", type=whole(1), help="images per step, of all processes together")
    flag("--accumulate", type=whole(1), help="micro-steps that share a step's images")
    flag("--seed", type=whole(0), help="of everything that is random")
    flag("--learning-rate", type=float, help="at the start")
    flag(
        "--precision",
        choices=["fp32", "bf16"],
        help="of the matrix products; the paper trains DiG in fp32",
    )
    flag("--gradient-checkpointing", action="store_true", help="less memory, more time")
    flag("--compile", action="store_true", help="compile the model")
    flag("--sharded", action="store_true", help="FSDP2 instead of DDP; not tried on GPUs yet")
    flag("--checkpoint-every", type=whole(1), help="steps between checkpoints")
    flag("--keep-every", type=whole(1), help="never delete checkpoints at multiples of this")
    flag("--sample-every", type=whole(1), help="steps between sample grids")
    flag("--diagnose-every", type=whole(1), help="steps between looks into the mechanisms")
    flag("--skip-limit", type=whole(1), help="non-finite steps in a row before the run stops")
    flag("--strict", action="store_true", help="stop at the first unreadable image")
    flag("--out", default=None, help="folder of the run (default: runs/DATA-ATTN)")
    flag(
        "--resume",
        nargs="?",
        const="always",
        default="auto",
        choices=["auto", "always", "never"],
        help="auto, the default, continues the run in --out if there is one; always (the bare "
        "flag) wants one, never refuses it",
    )
    flag("--overwrite", action="store_true", default=False, help="replace the run in --out")
    flag(
        "--allow-change",
        action="append",
        default=[],
        metavar="NAME",
        help="a setting that a continued run may change; repeat",
    )
    flag(
        "--tracker",
        action="append",
        default=[],
        choices=["tensorboard", "wandb", "trackio"],
        help="log there too, besides log.jsonl; repeat",
    )
    flag("--status", metavar="RUN", help="say where a run stands, and do nothing else")
    return parser


def train(
    settings: Settings,
    run: Run,
    *,
    resume: bool = False,
    overwrite: bool = False,
    should_stop: Callable[[int], bool] = lambda step: False,
    trackers: Sequence[str] = (),
) -> int:
    """Trains until ``settings.steps`` and leaves everything in the run's folder.

    Args:
        settings: What to compute.
        run: Where it goes.
        resume: Whether to continue from the newest checkpoint.
        overwrite: Whether to replace a run that is there.
        should_stop: Asked after every step, in every process; True saves and stops, as Ctrl-C
            does.
        trackers: Names of Accelerate's trackers to log to, besides the run's log.

    Returns:
        0 when done, 75 when interrupted and saved, 3 after too many non-finite steps in a row.

    Raises:
        UserError: The settings or the folder cannot be used.
    """
    _check_trackers(trackers)
    with user_errors():
        trainer = Trainer(settings, trackers, run.folder)
    accelerator = trainer.accelerator
    if settings.sharded and not trainer.is_sharded:
        tqdm.write("--sharded: one process has nothing to shard, so this run is trained whole")
    with contextlib.ExitStack() as stack:

        def begin() -> tuple[int, str] | None:
            found = run.newest_checkpoint(warn=tqdm.write) if resume else None
            if found is not None and found[0] >= settings.steps:
                if not is_claimed(run):
                    run.sweep()
                return found[0], str(found[1])
            if resume and found is None and run.has_checkpoints():
                raise UserError(
                    f"{run.folder} holds no whole checkpoint; start again with --overwrite"
                )
            stack.enter_context(claimed(run))
            run.sweep()
            if resume:
                _note_changes(run, settings, found[0] if found else 0)
                run.cut_log(found[0] if found else 0)
            else:
                run.create(_describe(trainer), overwrite)
            return (found[0], str(found[1])) if found else None

        found = on_main(accelerator, begin)
        if found is not None and found[0] >= settings.steps:
            if accelerator.is_main_process:
                tqdm.write(_already_done(run, found[0]))
            return DONE
        if found is not None:
            trainer.load(found[0], Path(found[1]))
        return Loop(trainer, run, should_stop, resume).run_to_end()


def _already_done(run: Run, step: int) -> str:
    return (
        f"{run.folder} is done, {step} steps: sample it with\n"
        f"  python recipes/sample.py {run.folder} --classes 0,1,2 --cfg 2.0\n"
        f"train it longer with --steps N --allow-change steps, or anew with --overwrite"
    )


def _note_changes(run: Run, settings: Settings, step: int) -> None:
    config = run.config()
    now = dataclasses.asdict(settings)
    _, lines = resumed_settings(config["settings"], now, list(now))
    if lines:
        config["settings"] = now
        config.setdefault("changes", []).append({"step": step, "changes": lines})
        run.write_config(config)
        tqdm.write(f"changed: {'; '.join(lines)}")


def _check_trackers(trackers: Sequence[str]) -> None:
    # Accelerate drops a tracker that is not installed without a word.
    for name in trackers:
        kind = LOGGER_TYPE_TO_CLASS.get(name)
        if kind is None:
            raise UserError(
                f"tracker {name!r} is unknown; Accelerate has {sorted(LOGGER_TYPE_TO_CLASS)}"
            )
        try:
            __import__("tensorboard" if name == "tensorboard" else name)
        except ImportError:
            raise UserError(f"tracker {name!r} is not installed: pip install {name}") from None


def _describe(trainer: Trainer) -> dict[str, Any]:
    dataset = trainer.dataset
    return {
        "settings": dataclasses.asdict(trainer.settings),
        "data": {
            "resolution": dataset.resolution,
            "channels": dataset.channels,
            "class_names": list(dataset.class_names),
            # None, or the VAE whose latents the model sees.
            "latent": dataset.facts if isinstance(dataset, LatentDataset) else None,
        },
        "versions": {
            "attnzoo": attnzoo.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


if __name__ == "__main__":
    run_script(main)
