"""Writes the pages of results, with their pictures, from tables of runs.

    python recipes/results.py docs/results.csv
    python recipes/results.py runs/results-16 runs/results-32 --out page.md

A table of recipes/study.py gives docs/results.md: which claims hold, and quality against
resolution. Several tables are put together first. Folders of recipes/compare.py give a page on
which of the paper's orderings hold in them. Nothing in the pages is written by hand but their
words, which stand in page.md and results_page.md beside what makes them.
"""

from __future__ import annotations

from pathlib import Path

from recipes.lab.console import DONE, Parser, UserError, printable, run_script


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    parser = Parser("results", __doc__)
    flag = parser.add_argument
    flag("sources", metavar="TABLE|FOLDER", nargs="*", default=["docs/results.csv"],
         help="of study.py, or --out of compare.py (default: docs/results.csv)")  # fmt: skip
    flag("--out", default="docs/results.md", help="page to write")
    flag("--table", type=Path, help="where to write several tables as one, for the page to name")
    flag("--mixed-machines", action="store_true",
         help="compare runs of two devices or versions of torch too")  # fmt: skip
    given = parser.parse_args(arguments)
    # --help does not wait for torch.
    from recipes.lab.drawing.canvas import save_figure
    from recipes.lab.files import require_writable, write_text
    from recipes.studies.dydila.results import results_page as orderings_page
    from recipes.studies.quality import page, table

    sources = [Path(source) for source in given.sources]
    if missing := [source for source in sources if not source.exists()]:
        raise UserError(
            f"there is no {str(missing[0])!r}; make a table with python recipes/study.py, or a "
            f"folder with python recipes/compare.py"
        )
    out = Path(given.out)
    if out.suffix == ".csv":
        raise UserError(
            f"--out {given.out!r} would be a table's place: name a page, such as page.md"
        )
    require_writable(out)
    kinds = {source.suffix == ".csv" for source in sources}
    if len(kinds) > 1:
        raise UserError("tables (.csv) and folders make two pages: call it once for each")
    if kinds == {False}:
        write_text(out, orderings_page(sources))
        print(printable(given.out))
        return DONE
    if len(sources) > 1 and given.table is None:
        raise UserError("several tables are one page's: name where to write them with --table")
    rows = table.merged([table.read(source) for source in sources])
    shown, picture = given.table or sources[0], out.parent / "plots" / f"{out.stem}.png"
    text = page.results_page(
        rows,
        picture=picture.relative_to(out.parent).as_posix(),
        name=shown.name,
        mixed=given.mixed_machines,
    )
    if given.table is not None:
        table.write(require_writable(given.table), rows)
    save_figure(page.picture(rows), require_writable(picture), dpi=80)
    write_text(out, text)
    print(printable(f"{given.out}   {picture}"))
    return DONE


if __name__ == "__main__":
    run_script(main)
