"""Draws images from a trained run.

    python recipes/sample.py runs/digits-sana --classes 0,1,2 --cfg 4.0 --steps 50

Image i of seed s starts from noise that depends on (s, i) alone, so it is the same whatever the
batch size. A run of latents is decoded by the VAE it was trained with.
"""

from __future__ import annotations

import sys
from pathlib import Path

from recipes.lab.console import (
    DONE,
    NON_FINITE,
    Parser,
    add_sampling_flags,
    numbers,
    printable,
    run_script,
    spelled_out,
    warn,
    whole,
)


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    given = vars(_parser().parse_args(spelled_out(arguments)))
    # --help does not wait for torch.
    from recipes.lab.imports import import_all
    from recipes.lab.sampling import NotFinite, RunSampler, sample_grid
    from recipes.lab.training.checkpoint import Run

    run = Run.open(given.pop("run"))
    import_all(given["imports"])
    names = ("weights", "device", "vae", "imports", "cuda_graph", "compile")
    draw = RunSampler(run, **{name: given.pop(name) for name in names}, say=warn)
    try:
        count, out = sample_grid(draw, progress=True, **given)
    except NotFinite as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return NON_FINITE
    print(f"{count} images, one class per column: {printable(str(out))}")
    return DONE


def _parser() -> Parser:
    parser = Parser("sample", __doc__)
    parser.add_argument("run", metavar="RUN", help="folder of the run")
    flag = parser.add_argument_group("images").add_argument
    flag(
        "--classes",
        type=numbers(int),
        help="such as 0,1,2 (default: the first ten)",
    )
    flag("--per-class", type=whole(1), default=4, help="images of each class")
    flag("--cfg", type=float, default=1.0, help="guidance scale; 1 is without")
    flag("--out", type=Path, help="picture to write (default: in the run's samples)")
    add_sampling_flags(parser)
    return parser


if __name__ == "__main__":
    run_script(main)
