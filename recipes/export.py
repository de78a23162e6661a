"""Writes a run as a pipeline folder of diffusers, with a model card.

    python recipes/export.py runs/digits-sana --out exported/digits-sana
    python recipes/export.py runs/digits-sana --out exported/digits-sana --push me/digits-sana

It samples with three lines of diffusers; see docs/ecosystem.md.
"""

from __future__ import annotations

from pathlib import Path

from recipes.lab.console import DONE, Parser, add_import_flag, printable, run_script


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    given = _parser().parse_args(arguments)
    # --help does not wait for torch.
    from recipes.lab.export import check_repository, export, push
    from recipes.lab.imports import import_all
    from recipes.lab.training.checkpoint import Run

    repository = None if given.push is None else check_repository(given.push)
    run = Run.open(given.run)
    import_all(given.imports)
    folder = export(
        run, given.out, weights=given.weights, vae=given.vae, imports=given.imports,
        overwrite=given.overwrite, repository=repository,
    )  # fmt: skip
    print(f"a pipeline of diffusers: {printable(str(folder))}")
    if repository is not None:
        print(f"pushed: {push(folder, repository)}")
    return DONE


def _parser() -> Parser:
    parser = Parser("export", __doc__)
    flag = parser.add_argument
    flag("run", metavar="RUN", help="folder of the run")
    flag("--out", type=Path, required=True, metavar="FOLDER", help="folder to make")
    flag("--weights", choices=["average", "model"], default="average",
         help="the moving average of the weights, or the weights themselves")  # fmt: skip
    flag("--vae", help="folder or hub id of the run's VAE (default: where it was in training)")
    flag("--push", metavar="ME/NAME", help="upload the folder to this repository of the hub")
    flag("--overwrite", action="store_true", help="replace an earlier export")
    add_import_flag(parser)
    return parser


if __name__ == "__main__":
    run_script(main)
