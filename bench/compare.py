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

from attnzoo.command.units import memory
from bench.options import from_zero
from bench.results import frame, machines_differ, read_cases
from recipes.lab.console import DONE, printable, run_script
from recipes.lab.pages import markdown_table

HEADING = ["case", "what", "before", "after", "factor"]


def compare(before: pd.DataFrame, after: pd.DataFrame, tolerance: float) -> pd.DataFrame:
    """What changed, the largest change first, under ``HEADING``."""
    both: Any = before.merge(after, on="id", suffixes=("_before", "_after"))
    both = both[~both["kind_before"].isin(["count", "goal", "quality"])]
    slower = both["seconds_q1_after"] > both["seconds_q3_before"]
    faster = both["seconds_q3_after"] < both["seconds_q1_before"]
    found = []
    # Memory has no spread.
    for column, is_apart, least, words, shown in (
        ("seconds", slower | faster, tolerance, ("slower", "faster"), _milliseconds),
        ("peak_memory", True, 0.01, ("more memory", "less memory"), memory),
    ):
        if f"{column}_before" not in both:
            continue
        factor = both[f"{column}_after"] / both[f"{column}_before"]
        for i in both.index[is_apart & ((factor - 1).abs() > least) & (factor < math.inf)]:
            old, new = (both[f"{column}_{side}"][i] for side in ("before", "after"))
            found.append([both["id"][i], words[int(factor[i] < 1)], shown(old), shown(new),
                          factor[i]])  # fmt: skip
    return pd.DataFrame(found, columns=HEADING).sort_values("factor", ascending=False)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def main(arguments: list[str]) -> int:
    """Prints what changed."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument(
        "--tolerance", type=from_zero, default=0.1, help="smallest change of time (default: 0.1)"
    )
    options = parser.parse_args(arguments)
    reports = [read_cases(path) for path in (options.before, options.after)]
    before, after = map(frame, reports)
    rows = compare(before, after, options.tolerance)
    shared = len(set(before["id"]) & set(after["id"]))
    if len(rows):
        shown = rows.assign(factor=rows["factor"].map("{:.2f}".format))
        print(markdown_table(HEADING, shown.to_numpy().tolist(), padded=True) + "\n")
    if differs := machines_differ(*reports):
        print(printable(f"no fair comparison, the machines differ: {differs}"))
    only = [len(set(a["id"]) - set(b["id"])) for a, b in ((before, after), (after, before))]
    print(
        f"{shared} cases in both files, {len(rows)} changes beyond the spread and "
        f"{options.tolerance:.0%}; {only[0]} cases only before, {only[1]} only after"
    )
    return DONE


if __name__ == "__main__":
    run_script(main)
