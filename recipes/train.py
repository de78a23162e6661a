"""Trains the shared backbone with one attention of the zoo.

    python recipes/train.py --attn sana
    python recipes/train.py --attn 'sana*3+softmax' --set sana.qk_norm=true
    python recipes/train.py --config run.yaml --learning-rate 1e-3
    torchrun --standalone --nproc_per_node 8 recipes/train.py --preset dit --data latents
    accelerate launch --num_processes 8 recipes/train.py --preset dit --data latents

With no other flag it trains on handwritten digits on a CPU for a few minutes. Every random draw
depends on (seed, step) alone, so every mechanism sees the same images, times, noise and label
drops on any number of processes, and a resumed run equals one that was never interrupted. An
existing run is resumed exactly; docs/reliability.md says what is promised and was tried,
docs/training.md lists the settings.
"""

from __future__ import annotations

import argparse

from recipes.lab.console import DONE, Parser, UserError, add_import_flag, run_script
from recipes.lab.training.flags import add_setting_flags, given_settings


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    given = vars(_parser().parse_args(arguments))
    # --help does not wait for torch.
    from recipes.lab.imports import import_all
    from recipes.lab.training.banner import refuse_pixels
    from recipes.lab.training.checkpoint import Run
    from recipes.lab.training.session import default_folder, train
    from recipes.lab.training.settings import PRESETS, Settings, resumed_settings
    from recipes.lab.training.status import describe

    if "status" in given:
        print(describe(Run.open(given["status"])))
        return DONE
    out, resume, overwrite = given.pop("out"), given.pop("resume"), given.pop("overwrite")
    allowed, pixels = given.pop("allow_change"), given.pop("pixels")
    options = {name: given.pop(name) for name in ("trackers", "imports", "ignore_memory")}
    import_all(options["imports"])
    given = given_settings(given)
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
    settings = Settings(**(PRESETS.get(given.get("preset", "tiny"), {}) | given))
    if not pixels:
        refuse_pixels(settings)
    return train(settings, run, overwrite=overwrite, **options)


def _parser() -> Parser:
    # A flag that is not given must not appear, so that a resumed run can tell what was asked for.
    # No flag may be the beginning of several of a launcher's, which then stops: --log, --run,
    # --max, --node.
    parser = Parser("train", __doc__, argument_default=argparse.SUPPRESS)
    add_setting_flags(parser)
    group = parser.add_argument_group("folder and output")
    flag = group.add_argument
    flag("--out", default=None, help="folder of the run (default: runs/DATA-ATTN)")
    flag("--resume", nargs="?", const="always", default="auto",
         choices=["auto", "always", "never"],
         help="auto continues the run in --out if there is one; always (the bare flag) wants one, "
         "never refuses it")  # fmt: skip
    flag("--overwrite", action="store_true", default=False, help="replace the run in --out")
    flag("--allow-change", action="append", default=[], metavar="NAME",
         help="a setting that a continued run may change, or data for what it holds; "
         "repeat")  # fmt: skip
    flag("--pixels", action="store_true", default=False, help="let --preset dit train on pixels")
    flag("--ignore-memory", action="store_true", default=False,
         help="go on where a step seems too large for the memory")  # fmt: skip
    flag("--tracker", dest="trackers", action="append", default=[],
         choices=["tensorboard", "wandb", "trackio"],
         help="log there too, besides log.jsonl; repeat")  # fmt: skip
    flag("--status", metavar="RUN", help="report where a run stands, and do nothing else")
    add_import_flag(group)
    return parser


if __name__ == "__main__":
    run_script(main)
