"""Measures the images of a run: FID, sFID, KID, sKID, IS, precision, recall and more.

    python recipes/evaluate.py runs/digits-sana --cfg 1.0,4.0 --samples 1000

The numbers go into the run's metrics.json with all that is needed to trust and repeat them. The
images are cached in shards: an interrupted evaluation goes on with the missing ones. On several
processes, ``torchrun --standalone --nproc_per_node 2 recipes/evaluate.py ...`` gives the same
numbers to the last digit.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

from recipes.lab.console import (
    DONE,
    Parser,
    UserError,
    add_sampling_flags,
    numbers,
    printable,
    run_script,
    spelled_out,
    whole,
)


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    given = vars(_parser().parse_args(spelled_out(arguments)))
    import torch  # --help does not wait for it

    from recipes.lab.evaluation.evaluate import (
        check_comparable,
        compared_by_image,
        evaluate,
        table,
        verdict,
    )
    from recipes.lab.evaluation.shards import Plan
    from recipes.lab.imports import import_all
    from recipes.lab.training.checkpoint import Run

    run = Run.open(given.pop("run"))
    import_all(given["imports"])
    fields = [field.name for field in dataclasses.fields(Plan) if field.name in given]
    cfgs = given.pop("cfgs")
    against = given.pop("against")
    other = None if against is None else Run.open(against)
    if other is not None:
        if not given["held_out"]:
            raise UserError("--against compares held-out losses, which --held-out 0 leaves out")
        check_comparable(other)
    plan = Plan(**{name: given.pop(name) for name in fields})
    result = evaluate(run, cfgs=cfgs, plan=plan, progress=True, **given)
    if result:  # empty on every process but the first
        print(table(result))
        if other is not None:
            print(printable(compared_by_image(result, other)))
        for line in result["warnings"]:
            print(printable(f"warning: {line}"), file=sys.stderr)
        verdict(run, result)
        print(printable(f"all of it: {run.metrics_file}"))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        time.sleep(0.2)  # gloo's threads may abort the process if it exits at once
    return DONE


def _held_out(text: str) -> int:
    count = whole(0)(text)
    if 0 < count < 10:
        raise argparse.ArgumentTypeError(f"must be 0 or at least 10, got {count}")
    return count


def _parser() -> Parser:
    parser = Parser("evaluate", __doc__)
    parser.add_argument("run", metavar="RUN", help="folder of the run")
    flag = parser.add_argument_group("images").add_argument
    flag("--cfg", dest="cfgs", type=numbers(float), default=[1.0],
         help="guidance scales, such as 1.0,4.0")  # fmt: skip
    flag("--samples", type=whole(10), default=1000, help="images per guidance scale")
    flag("--labels", choices=["balanced", "random"], default="balanced", help="classes to ask for")
    flag("--shard-size", type=whole(1), default=250, help="images per resumable shard")
    flag("--images", type=Path, help="measure the images of this .npz instead of generating")
    flag("--npz", type=Path, help="folder for the images as ADM-style .npz, one per scale")
    flag = parser.add_argument_group("what looks at them, and with what").add_argument
    flag("--extractor", choices=["smallcnn", "efficientnet-lite0", "inception"],
         default="smallcnn", help="gives the features that are compared")  # fmt: skip
    flag("--extractor-weights", "--inception-weights", dest="weights_file", type=Path,
         help="local file; nothing is ever downloaded")  # fmt: skip
    flag("--held-out", type=_held_out, default=1024,
         help="images for the held-out loss; 0 leaves it out")  # fmt: skip
    flag("--against", metavar="RUN", help="evaluated run to compare the held-out loss with")
    flag("--real", type=Path, help="folder of real images by class (default: what was trained on)")
    flag("--reference", type=Path, help="ADM-style .npz instead of the test images")
    flag("--cache", type=Path, help="trained evaluators (default: .evaluators beside the run)")
    add_sampling_flags(parser)
    return parser


if __name__ == "__main__":
    run_script(main)
