"""The paper's figures from runs of one's own: cost, projectors, maps, factors, tsne.

    python recipes/figures.py runs/digits-dydila runs/digits-sana --out figures/

A figure that the runs have nothing for is left out, with a line that says why.
"""

from __future__ import annotations

import math
from pathlib import Path

from recipes.lab.console import (
    DONE,
    Parser,
    UserError,
    add_import_flag,
    printable,
    run_script,
    whole,
)


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    parser = Parser("figures", __doc__)
    flag = parser.add_argument
    flag("runs", metavar="RUN", nargs="*", help="folders of runs")
    flag("--out", default="figures", help="folder for the pictures")
    flag("--only", help="some of cost,projectors,maps,factors,tsne (default: all)")
    flag("--per-class", type=whole(1), default=40, help="images, for t-SNE")
    flag("--cfg", type=float, default=2.0, help="guidance scale of images")
    flag("--vae", help="of latents, if not where the run was trained with it")
    flag("--real", help="folder of real images by class, if not the run's own")
    add_import_flag(parser)
    given = parser.parse_args(arguments)
    # --help does not wait for torch.
    from recipes.lab.drawing.canvas import save_figure
    from recipes.lab.drawing.drawn import Drawn, NotWithoutRun
    from recipes.lab.files import require_writable
    from recipes.lab.imports import import_all
    from recipes.lab.training.checkpoint import Run
    from recipes.studies.dydila.figures import FIGURES

    out = Path(given.out)
    names = list(dict.fromkeys(given.only.split(",") if given.only else FIGURES))
    for name in names:
        if name not in FIGURES:
            raise UserError(f"unknown figure {name!r}; there are {', '.join(FIGURES)}")
    if not math.isfinite(given.cfg):
        raise UserError(f"--cfg must be a finite number, got {given.cfg}")
    for name in names:
        require_writable(out / f"{name}.png")
    import_all(given.imports)
    options = {"vae": given.vae, "real": given.real, "imports": given.imports}
    runs = [Drawn(Run.open(f), given.cfg, given.per_class, **options) for f in given.runs]
    for name in names:
        try:
            figure = FIGURES[name](runs)
        except NotWithoutRun as missing:
            print(f"{name}: left out, {missing}")
            continue
        save_figure(figure, out / f"{name}.png", dpi=160)
        print(printable(str(out / f"{name}.png")))
    return DONE


if __name__ == "__main__":
    run_script(main)
