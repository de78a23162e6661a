"""Trains DyDiLA and softmax attention, or others, on digits and draws them: make demo.

    python recipes/demo.py --attn dydila,softmax,sana --steps 600

What is trained already is not trained again.
"""

from __future__ import annotations

from pathlib import Path

from recipes.lab.console import Parser, run_script, whole


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    parser = Parser("demo", __doc__)
    flag = parser.add_argument
    flag("--attn", default="dydila,softmax", help="two or more mechanisms or patterns")
    flag("--steps", type=whole(1), default=1500, help="optimizer steps of each")
    flag("--out", type=Path, default=Path("runs/demo"), help="folder of the runs and the picture")
    flag("--overwrite", action="store_true", help="replace other runs in --out")
    given = parser.parse_args(arguments)
    from recipes.studies.demo import demo  # --help does not wait for torch

    return demo(**vars(given))


if __name__ == "__main__":
    run_script(main)
