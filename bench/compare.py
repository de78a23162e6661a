"""``python -m bench.compare before.json after.json``: what got slower, faster or larger.

A change counts when the quartiles of the two runs do not overlap and the medians differ by more
than --tolerance: two runs are two processes at two times, between which the same code moves by a
few percent. Both should come from one machine.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import pandas as pd

from bench.results import frame, read_cases
from bench.tables import memory
from recipes.lab.console import DONE, run_script
from recipes.lab.pages import markdown_table


def compare(before: pd.DataFrame, after: pd.DataFrame, tolerance: float) -> list[list[str]]:
    """Rows of what changed, the largest change first: case, what, before, after, factor."""
    shared = before.merge(after, on="id", suffixes=("_before", "_after"))
    found: list[tuple[float, list[str]]] = []
    for row in shared.to_dict("records"):
        if row["kind_before"] in ("count", "goal", "quality"):
            continue
        factor = row["seconds_after"] / row["seconds_before"]
        is_apart = (
            row["seconds_q1_after"] > row["seconds_q3_before"]
            or row["seconds_q3_after"] < row["seconds_q1_before"]
        )
        if is_apart and abs(factor - 1) > tolerance:
            what = "slower" if factor > 1 else "faster"
            times = [f"{row[f'seconds_{side}'] * 1e3:.3g} ms" for side in ("before", "after")]
            found.append((factor, [row["id"], what, *times, f"{factor:.2f}"]))
        bytes_: list[Any] = [row.get(f"peak_memory_{side}") for side in ("before", "after")]
        if all(bytes_):
            factor = bytes_[1] / bytes_[0]
            if abs(factor - 1) > 0.01:  # memory has no spread
                what = "more memory" if factor > 1 else "less memory"
                sizes = [memory(value) for value in bytes_]
                found.append((factor, [row["id"], what, *sizes, f"{factor:.2f}"]))
    return [line for _, line in sorted(found, key=lambda item: -item[0])]


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number from 0 on, got {text!r}")
    return value


def main(arguments: list[str]) -> int:
    """Prints what changed."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument(
        "--tolerance", type=_share, default=0.1, help="smallest change of time (default: 0.1)"
    )
    options = parser.parse_args(arguments)
    before, after = (frame(read_cases(path)) for path in (options.before, options.after))
    only = [set(a["id"]) - set(b["id"]) for a, b in ((before, after), (after, before))]
    rows = compare(before, after, options.tolerance)
    shared = len(set(before["id"]) & set(after["id"]))
    if rows:
        print(
            markdown_table(["case", "what", "before", "after", "factor"], rows, padded=True) + "\n"
        )
    print(
        f"{shared} cases in both files, {len(rows)} changes beyond the spread and "
        f"{options.tolerance:.0%}; {len(only[0])} cases only before, {len(only[1])} only after"
    )
    return DONE


if __name__ == "__main__":
    run_script(main)
