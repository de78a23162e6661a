"""Runs a study of the repository: many small runs, several at a time under each GPU.

    python recipes/study.py resolution --out runs/resolution --measure
    python recipes/study.py resolution --out runs/resolution --gpus all --per-gpu 6 --minutes 9.5
    python recipes/results.py runs/resolution/table.csv

The same command goes on where it was stopped, most important runs first; what is cut off by time
has saved its state. OUT/table.csv holds every run, done or not, with what its training has
measured. With ``--table FILE`` runs that another machine has done are not repeated, and their
rows are taken over.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from recipes.lab.console import DONE, Parser, numbers, printable, run_script, whole

PLANS = ("controls", "resolution")


def main(arguments: list[str]) -> int:
    """Runs the command line; 0 when every run is done, 1 when some failed or wait."""
    started = time.monotonic()
    given = _parser().parse_args(arguments)
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # of imports too: a GPU that was asked
    # cannot be used after a fork. --help does not wait for torch.
    from recipes.studies.comparison.plan import check_extractors
    from recipes.studies.quality import launch, seconds, table
    from recipes.studies.quality.plans import STUDIES, Scale, study_runs
    from recipes.studies.quality.run import Missing, check_runs, dry_run, share_data

    gpus = launch.gpus_to_use(given.gpus)
    slots = [gpu for _ in range(given.per_gpu) for gpu in gpus] or [None] * given.per_gpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, (cores or 1) // len(slots)))
    study, out = STUDIES[given.plan], Path(given.out)
    weights = given.extractor_weights
    scale = Scale(
        model=given.model, data=given.data, steps=given.steps, batch_size=given.batch_size,
        accumulate=given.accumulate, learning_rate=given.learning_rate, seeds=given.seeds,
        samples=given.samples, points=given.points,
        held_out_images=given.held_out_images, hold_out=given.hold_out,
        extractor_weights=weights and str(weights.expanduser().resolve()),
        extractors=tuple(given.extractors),
        precision=given.precision or ("bf16" if gpus else "fp32"), compile=given.compile,
    )  # fmt: skip
    if scale.samples and not (given.report_only or given.measure):  # which looks at no samples
        check_extractors(scale.extractors, scale.extractor_weights)
    chosen = {"resolutions": given.resolutions, "only": given.only}
    protocols = given.protocols or list(study.protocols)
    earlier = table.read(given.table) if given.table else None
    own = out / "table.csv"
    before = [table.of_scale(table.read(own), scale)] if own.is_file() else []
    if not given.report_only and not given.dry_run:
        share_data(study, scale, given.resolutions)
    file = Path(given.seconds or out / seconds.FILE)
    if given.measure:
        runs = study_runs(study, scale, {}, protocols=["depth"], **chosen)
        os.environ["CUDA_VISIBLE_DEVICES"] = slots[0] or ""
        seconds.measure(runs, scale, file, threads)
        return DONE
    known = seconds.read_seconds(file, scale)
    if "time" in protocols and not known and not given.protocols:
        print(f"equal time is left out: --measure writes {file}", file=sys.stderr)
        protocols.remove("time")
    runs = study_runs(study, scale, known, protocols=protocols, **chosen)
    if given.dry_run:
        print(dry_run(runs, known))
        return DONE
    missing = Missing(out, runs, table.done_in(earlier))
    if not given.report_only:
        check_runs(runs)
        missing.run(slots, threads, given.minutes - (time.monotonic() - started) / 60)
    rows = [table.collect(out, runs, known)] + ([] if earlier is None else [earlier])
    found = table.merged([*rows, *before])
    table.write(own, found)
    left = missing.left(found)
    for line in left:
        print(printable(line))
    print(printable(f"{len(runs) - len(left)} of {len(runs)} rows are done: {own}"))
    size = own.stat().st_size
    if size > table.LIMIT:
        print(f"it has {size} bytes, more than {table.LIMIT} to be committed", file=sys.stderr)
    return 1 if left else DONE


def _parser() -> Parser:
    parser = Parser("study", __doc__)
    flag = parser.add_argument
    flag("plan", metavar="PLAN", choices=PLANS, help="controls or resolution")
    flag("--out", required=True, help="folder of the runs and of table.csv")
    flag("--gpus", default="all", help="all, none, or numbers such as 0,1")
    flag("--per-gpu", type=whole(1), default=1,
         help="runs that share a GPU, or without one the CPU")  # fmt: skip
    flag("--minutes", type=_minutes, default=9.5, help="after which all is saved")
    flag("--steps", type=whole(1), default=3000, help="of training")
    flag("--batch-size", type=whole(1), default=64, help="images per step")
    flag("--accumulate", type=whole(1), default=1,
         help="micro-steps of a step, where all of its images take too much memory")  # fmt: skip
    flag("--learning-rate", type=float, default=3e-3, metavar="X", help="at the first step")
    flag("--seeds", type=whole(1), default=5, help="number of seeds")
    flag("--samples", type=_samples, default=500,
         help="images per run for FID and KID; 0 measures the held-out loss alone")  # fmt: skip
    flag("--points", type=whole(1), default=10, help="held-out losses along a run")
    flag("--model", default="192x6", choices=["192x6", "96x4", "384x12"],
         help="width and blocks; 384x12 is size S")  # fmt: skip
    flag("--data", default="emoji", help="of train.py's --data")
    flag("--precision", choices=["fp32", "bf16"], help="default: bf16 on a GPU, else fp32")
    flag("--compile", choices=["on", "off"], default="off", help="compile blocks")
    flag("--extractor", dest="extractors", type=numbers(str), default=["efficientnet-lite0"],
         help="some of smallcnn,efficientnet-lite0,inception")  # fmt: skip
    flag("--extractor-weights", type=Path, help="local file of the one that needs it")
    flag("--held-out-images", type=whole(10), default=1024, help="of each held-out loss")
    flag("--hold-out", type=float, default=0.0,
         help="share of a folder's images to leave out of training for it")  # fmt: skip
    flag("--resolutions", type=numbers(int), default=[], help="some of the plan's, or others")
    flag("--protocols", type=numbers(str), default=[], help="some of depth,MACs,time")
    flag("--only", type=lambda text: text.split(";"), default=[],
         help="labels of variants, separated by ;")  # fmt: skip
    flag("--measure", action="store_true", help="measure the seconds of a step, and run nothing")
    flag("--seconds", help="file of measured seconds (default: OUT/step-seconds.json)")
    flag("--table", type=Path, help="table.csv of another machine, whose runs are not repeated")
    flag("--dry-run", action="store_true", help="print the plan and what it would cost")
    flag("--report-only", action="store_true", help="write the table of what there is")
    return parser


def _samples(text: str) -> int:
    count = whole(0)(text)
    if 0 < count < 10:
        raise argparse.ArgumentTypeError(f"must be 0 or at least 10, got {count}")
    return count


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of minutes") from None
    if not 1 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"must be at least 1 and below 1e6, got {text}")
    return value


if __name__ == "__main__":
    run_script(main)
