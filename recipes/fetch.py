"""Fetches a data set that has to be asked for.

    python recipes/fetch.py emoji
    python recipes/train.py --data emoji --resolution 32

It takes three packages of npm with the npm client, or their tarballs with ``--tarballs``, checks
their hashes, and writes a folder of images by class with its licenses.
"""

from __future__ import annotations

from pathlib import Path

from recipes.lab.console import DONE, Parser, printable, run_script


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    parser = Parser("fetch", __doc__)
    flag = parser.add_argument
    flag("data", choices=["emoji"], help="emoji: 11,000 drawn emoji of nine categories, 64-256 px")
    flag("--out", type=Path, help="folder to write (default: data/emoji)")
    flag("--tarballs", type=Path, nargs="+", default=[], help="instead of asking npm")
    given = parser.parse_args(arguments)
    from recipes.lab.data.emoji import DEFAULT_PLACE, fetch  # --help does not wait for torch

    out = given.out or DEFAULT_PLACE
    count = fetch(out, given.tarballs)
    data = "emoji" if out == DEFAULT_PLACE else f"emoji:{out}"
    print(printable(f"{count} images in {out}; train with --data {data}"))
    return DONE


if __name__ == "__main__":
    run_script(main)
