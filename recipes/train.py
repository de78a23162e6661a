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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attnzoo
from recipes.lab.console import DONE, UserError, parse_options, run_script, whole
from recipes.lab.data.datasets import DATASETS
from recipes.lab.data.latents import canonical_settings, is_latent_folder
from recipes.lab.imports import add_import_flag, import_all
from recipes.lab.training.build import build_model
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.session import train
from recipes.lab.training.settings import PRESETS, Settings, resumed_settings
from recipes.lab.training.status import describe
from recipes.lab.training.trainer import Trainer

__all__ = ["PRESETS", "Settings", "Trainer", "build_model", "default_folder", "main", "train"]


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    given = vars(_parser().parse_args(arguments))
    if "status" in given:
        print(describe(Run.open(given["status"])))
        return DONE
    out, resume, overwrite = given.pop("out"), given.pop("resume"), given.pop("overwrite")
    allowed, pixels = given.pop("allow_change"), given.pop("pixels")
    options = {name: given.pop(name) for name in ("trackers", "imports", "ignore_memory")}
    import_all(options["imports"])
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
        saved, where = run.config()["settings"], str(run.config_file)
        settings, _ = resumed_settings(saved, given, allowed, where)
        return train(settings, run, resume=True, allowed=allowed, **options)
    settings = Settings(**(PRESETS[given.get("preset", "tiny")] | given))
    if not pixels:
        _refuse_pixels(settings)
    return train(settings, run, overwrite=overwrite, **options)


def _refuse_pixels(settings: Settings) -> None:
    data = Path(settings.data).expanduser()
    is_images = settings.data not in DATASETS and data.is_dir() and not is_latent_folder(str(data))
    if settings.preset == "dit" and is_images and settings.vae is None:
        raise UserError(
            f"--preset dit is the recipe for latents, and {settings.data!r} holds images: give "
            f"their encoder with --vae FOLDER_OR_ID, encode them once with recipes/encode.py, or "
            f"train on pixels all the same with --pixels"
        )


def default_folder(given: Mapping[str, Any]) -> Path:
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
    add_import_flag(parser)
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
    flag("--steps", type=whole(1), help="optimizer steps")
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
    flag(
        "--sharded",
        action="store_true",
        help="FSDP2 instead of DDP; tested with two CPU processes, never run on GPUs",
    )
    flag("--checkpoint-every", type=whole(1), help="steps between checkpoints")
    flag("--keep-every", type=whole(1), help="never delete checkpoints at multiples of this")
    flag("--sample-every", type=whole(1), help="steps between sample grids")
    flag("--diagnose-every", type=whole(1), help="steps between looks into the mechanisms")
    flag("--skip-limit", type=whole(1), help="non-finite steps in a row before the run stops")
    flag("--pixels", action="store_true", default=False, help="let --preset dit train on pixels")
    flag(
        "--ignore-memory",
        action="store_true",
        default=False,
        help="go on where a step seems too large for the memory",
    )
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
        help="a setting that a continued run may change, or data for what it holds; repeat",
    )
    flag(
        "--tracker",
        dest="trackers",
        action="append",
        default=[],
        choices=["tensorboard", "wandb", "trackio"],
        help="log there too, besides log.jsonl; repeat",
    )
    flag("--status", metavar="RUN", help="say where a run stands, and do nothing else")
    return parser


if __name__ == "__main__":
    run_script(main)
