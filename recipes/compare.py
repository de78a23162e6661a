"""Trains, samples and measures a grid of mechanisms, data, resolutions and seeds; one report.

    python recipes/compare.py --attn softmax,sana,focused,dydila --data shapes \\
        --resolutions 16,32,64 --seeds 3 --protocol controlled

Every run is an ordinary one in its own process: one that fails stops no other, and the same
command goes on where it was stopped. Runs of one seed see the same images, noise and times. The
folder then holds report.html, which needs no other file, and its numbers as CSV.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from backbones.presets import PROTOCOLS
from recipes.lab.console import DONE, UserError, numbers, run_script, whole
from recipes.lab.evaluation.scores import FEWEST
from recipes.lab.imports import add_import_flag, import_all
from recipes.lab.training.settings import Settings
from recipes.studies.comparison import plan, study
from recipes.studies.comparison.costs import dry_run
from recipes.studies.comparison.planned import PlannedRun, is_file
from recipes.studies.comparison.power import power_table
from recipes.studies.comparison.verdicts import Choice
from recipes.studies.dydila.paper import PRESETS, chosen_variants, paper_rows

# Held-out losses on the way, of the average and of the model: what 107 steps of 64 images cost.
CURVE_POINTS, CURVE_IMAGES = 10, 128


def main(arguments: list[str]) -> int:
    """Runs the command line; 0 when every run is done, 1 when some failed or wait."""
    given = _parser().parse_args(arguments)
    cluster = given.cluster if given.engine == "submitit" else None
    limits = study.Limits(jobs=given.jobs, run_minutes=given.run_minutes,
                          time_budget=given.time_budget, cluster=cluster)  # fmt: skip
    import_all(given.imports)
    weights = given.extractor_weights
    variants, protocols = chosen_variants(given.attn, given.preset, given.protocol)
    settings = plan.settings_of(given.data, given.resolutions, given.vae, warn=study.say)
    every = given.held_out_every
    if every is None:
        every = max(1, given.steps // CURVE_POINTS)
    like = PlannedRun(
        label="",
        settings=Settings(size=given.size, patch_size=given.patch_size, steps=given.steps,
                          batch_size=given.batch_size, hold_out=given.hold_out,
                          held_out_every=every or None, held_out_images=CURVE_IMAGES),
        cfgs=tuple(given.cfg),
        samples=given.samples,
        sampling_steps=given.sampling_steps,
        imports=tuple(str(Path(s).expanduser().resolve()) if is_file(s) else s
                      for s in given.imports),
        vae=given.vae,
        real=given.real,
        extractors=tuple(given.extractor),
        extractor_weights=weights and str(weights.expanduser().resolve()),
    )  # fmt: skip
    planned = plan.plan_runs(variants, settings, seeds=given.seeds, protocols=protocols, like=like)
    choice = Choice(given.against, given.mixed_machines)
    if given.against is not None and given.against not in {v.label for v in variants}:
        raise UserError(f"--against {given.against!r} is none of the variants that --attn names")
    if given.power:
        print(power_table(Path(given.out), planned, choice))
        return DONE
    if not given.report_only:
        plan.check_plan(planned, warn=study.say)
    if given.dry_run:
        print(dry_run(planned, given.jobs))
        return DONE
    if given.prepare:
        study.prepare_evaluators(planned, Path(given.out))
        return DONE
    is_done = study.compare(
        planned,
        Path(given.out),
        None if given.report_only else limits,
        title=shlex.join(["compare.py", *(a for a in arguments if a != "--report-only")]),
        paper=paper_rows(variants),
        choice=choice,
    )
    return DONE if is_done else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python recipes/compare.py",
        description="Compare mechanisms: train, sample and measure a grid of runs, and report.",
    )
    flag = parser.add_argument
    flag("--attn", help="mechanisms, such as softmax,dydila:lambda_init=0.1:conv=none")
    flag("--preset", choices=list(PRESETS), help="the rows of one of the paper's tables")
    flag("--data", default="shapes",
         help="such as shapes,shapes/long-range,fashion-mnist@28, folders of images, or latents "
         "from recipes/encode.py")  # fmt: skip
    flag("--vae", help="folder or hub id of an AutoencoderKL: encodes images, decodes latents")
    flag("--real", help="folder of real images by class to measure with (default: the data's own)")
    flag("--resolutions", type=numbers(int), default=[], help="in pixels; default: the data's")
    flag("--seeds", type=whole(1), default=5,
         help="number of seeds (default: 5)")  # fmt: skip
    flag(
        "--protocol", help=f"some of {','.join(PROTOCOLS)} (default: controlled, or the preset's)"
    )
    flag("--size", default="tiny", help="tiny, S, B or L")
    flag("--patch-size", type=whole(1),
         help="at every resolution; default: 4 pixels, or 2 of latents")  # fmt: skip
    flag("--steps", type=whole(1), default=1000, help="of training, for every run")
    flag("--batch-size", type=whole(1), default=64, help="images per step")
    flag("--cfg", type=numbers(float), default=[1.0, 4.0], help="guidance scales to measure")
    flag("--samples", type=whole(FEWEST), default=500, help="images per scale")
    flag("--sampling-steps", type=whole(1), default=20, help="model evaluations per image")
    flag(
        "--extractor",
        type=numbers(str.strip),
        default=["smallcnn"],
        help="some of smallcnn,efficientnet-lite0,inception, to look at one set of images",
    )
    flag("--extractor-weights", type=Path, help="local file of the one that needs it")
    flag(
        "--held-out-every",
        type=whole(0),
        help=f"steps between held-out losses of {CURVE_IMAGES} images, 0 for none "
        f"(default: {CURVE_POINTS} times)",
    )
    flag(
        "--hold-out",
        type=float,
        default=0.0,
        help="share of a folder's images to leave out of training, for the held-out loss",
    )
    flag("--against", metavar="VARIANT", help="compare all with this one (default: every pair)")
    flag("--mixed-machines", action="store_true",
         help="pair runs of different GPUs or versions of torch too")  # fmt: skip
    flag("--jobs", type=whole(1), default=1, help="runs at the same time")
    flag("--time-budget", type=float, help="minutes after which no new run starts")
    flag("--engine", choices=["process", "submitit"], default="process")
    flag("--cluster", default="local", help="of submitit: local or slurm")
    flag("--run-minutes", "--cell-minutes", type=float, default=120.0,
         help="limit of one run; it is saved, and goes on when compared again")  # fmt: skip
    add_import_flag(parser)
    flag("--dry-run", action="store_true", help="print the plan and what it would cost")
    flag("--prepare", action="store_true",
         help="only make what measures the images, OUT/.evaluators, to be carried")  # fmt: skip
    flag(
        "--power",
        action="store_true",
        help="say from the runs there are, a pilot, how many seeds would decide each comparison",
    )
    flag("--report-only", action="store_true", help="write the report of what there is")
    flag("--out", default="runs/compare", help="folder of the runs and the report")
    return parser


if __name__ == "__main__":
    run_script(main)
