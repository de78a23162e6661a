"""Writes docs/results.md from the tables of comparisons: which of the paper's orderings hold.

    python recipes/results.py runs/results-16 runs/results-32 --out docs/results.md

Nothing in that page is written by hand but its words, which stand in
recipes/studies/dydila/results_page.md.
"""

from __future__ import annotations

from pathlib import Path

from recipes.lab.console import DONE, Parser, printable, run_script


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    parser = Parser("results", __doc__)
    parser.add_argument("folders", metavar="FOLDER", nargs="+", help="--out of compare.py")
    parser.add_argument("--out", default="docs/results.md", help="page to write")
    given = parser.parse_args(arguments)
    # --help does not wait for torch.
    from recipes.lab.files import require_writable, write_text
    from recipes.studies.dydila.results import results_page

    out = require_writable(Path(given.out))
    write_text(out, results_page([Path(folder) for folder in given.folders]))
    print(printable(given.out))
    return DONE


if __name__ == "__main__":
    run_script(main)
