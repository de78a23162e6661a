"""``python -m bench.zoo``: the whole zoo against softmax, in the tables of ``docs/zoo.md``.

The tables are made of ``docs/zoo.csv`` and printed, or put between ``<!-- zoo DATA -->`` and
``<!-- /zoo DATA -->`` of the page of ``--into``. Folders of ``recipes/compare.py``, if given, make
the CSV anew. Differences are of the held-out loss, paired by seed.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from bench.tables import parts_around, put_into
from recipes.lab.console import DONE, UserError, printable, run_script
from recipes.lab.files import require_writable
from recipes.lab.pages import markdown_table
from recipes.studies.comparison.planned import OK
from recipes.studies.comparison.statistics import LEVEL, Difference, holm, paired_difference
from recipes.studies.comparison.tables import read_table, write_table
from recipes.studies.quality.plans import PATCH

DOCS = Path(__file__).parents[1] / "docs"
TABLE = DOCS / "zoo.csv"
TEXTS = ("data", "variant", "state")
COLUMNS = [*TEXTS, "px", "tokens", "seed", "loss", "accepted", "parameters", "macs"]
_LOSS, _ACCURACY = "held_out_loss[ema]", "class_accuracy[smallcnn]"


def collect(folders: Sequence[Path]) -> pd.DataFrame:
    """One row a run, done or not, of folders of ``recipes/compare.py``; without guidance.

    Raises:
        UserError: A folder has no such table, or a run is there twice.
    """
    runs = pd.concat([read_table(folder / "runs.csv") for folder in folders], ignore_index=True)
    if missing := [name for name in ("cfg", _LOSS, _ACCURACY) if name not in runs]:
        raise UserError(f"the runs have no column {missing[0]!r}")
    runs = runs.loc[(runs["cfg"] == 1) | (runs["state"] != OK)]
    found = runs.assign(
        px=runs["resolution"],
        tokens=(runs["resolution"] // PATCH) ** 2,
        loss=runs[_LOSS].map(lambda loss: float(f"{loss:.6g}")),
        accepted=(runs[_ACCURACY] * runs["count"]).round().astype("Int64"),
        parameters=runs["parameters"].astype("Int64"),
        macs=runs["macs"].astype("Int64"),
    )
    return _each_once(found[COLUMNS])


def read(path: Path = TABLE) -> pd.DataFrame:
    """Reads what ``collect`` gave.

    Raises:
        UserError: It is none, or damaged.
    """
    runs = read_table(path, TEXTS)
    if missing := [name for name in COLUMNS if name not in runs]:
        raise UserError(f"{path} is no table of python -m bench.zoo: it has no {missing[0]!r}")
    return _each_once(runs)


def _each_once(runs: pd.DataFrame) -> pd.DataFrame:
    again = runs.loc[runs.duplicated(["data", "variant", "seed"])]
    for row in again.head(1).to_dict("records"):
        raise UserError(
            f"{row['data']} has two runs of {row['variant']} with seed {row['seed']}, which one "
            f"table cannot hold: name every folder once, and of a data set one resolution"
        )
    return runs


def differences(runs: pd.DataFrame, against: str = "softmax") -> dict[str, Difference]:
    """Each variant's held-out loss minus that of one of them, seed by seed.

    Args:
        runs: Of one data set.
        against: The one.

    Raises:
        UserError: There is no such variant.
    """
    losses = runs.pivot(index="seed", columns="variant", values="loss")
    if against not in losses:
        raise UserError(f"the table has no {against!r}; it has {', '.join(map(str, losses))}")
    second = losses[against].tolist()
    return {
        str(name): paired_difference(losses[name].tolist(), second)
        for name in losses if name != against
    }  # fmt: skip


def table(runs: pd.DataFrame, against: str = "softmax") -> str:
    """What one data set decides, its table, the least loss first, and which runs it lacks."""
    found = differences(runs, against)
    corrected = dict(zip(found, holm(d.p for d in found.values()), strict=True))
    rows = []
    for name, own in sorted(
        runs.groupby("variant"), key=lambda pair: (math.isnan(z := pair[1]["loss"].mean()), z)
    ):
        done = own.loc[own["state"] == OK].sort_values("seed")
        difference = found.get(str(name))
        rows.append([
            name, ", ".join(f"{seed}" for seed in done["seed"]) or "none", _mean(done["loss"]),
            ", ".join(f"{count:.0f}" for count in done["accepted"]),
            *(f"{done[column].max() / 1e6:.{digits}f}" if len(done) else ""
              for column, digits in (("parameters", 2), ("macs", 1))),
            *_compared(difference, corrected.get(str(name), math.nan)),
        ])  # fmt: skip
    headings = [
        "mechanism", "seeds", "held-out loss", "accepted", "M parameters", "MMACs",
        f"against {against}, %", "bound, %", "p (Holm)",
    ]  # fmt: skip
    if all(math.isnan(p) for p in corrected.values()):
        headings, rows = headings[:-2], [row[:-2] for row in rows]
    parts = _decided(found, corrected, against), markdown_table(headings, rows), _missing(runs)
    return "\n\n".join(parts)


def _mean(losses: pd.Series) -> str:
    if losses.empty:
        return ""
    return f"{losses.mean():.4f}" + (f" ± {losses.std():.4f}" if len(losses) > 1 else "")


def _compared(difference: Difference | None, p: float) -> list[str]:
    if difference is None or not difference.pairs:
        return ["", "", ""]
    shown = f"{difference.percent:+.2f}"
    if difference.pairs < 2:
        return [shown, "", ""]
    return [f"{shown} ± {_margin(difference):.2f}", f"{difference.bound_percent:.2f}", f"{p:.2g}"]


def _margin(difference: Difference) -> float:
    return 100 * difference.margin / difference.scale


def _decided(found: dict[str, Difference], corrected: dict[str, float], against: str) -> str:
    paired = {name: d for name, d in found.items() if d.pairs > 1}
    if not paired:
        return f"No mechanism has two seeds in common with {against}: nothing is decided."
    holds = [name for name in paired if corrected[name] < LEVEL]
    alone = [name for name, d in paired.items() if d.p < LEVEL and name not in holds]
    return (
        f"Of {len(found)} comparisons with {against}, {len(paired)} have two seeds or more. After "
        f"Holm's correction over these {_names(holds)} {'holds' if len(holds) < 2 else 'hold'}. "
        f"Undecided, though the interval alone leaves out 0: {_names(alone)}."
    )


def _missing(runs: pd.DataFrame) -> str:
    left = runs.loc[runs["state"] != OK]
    everything = runs["variant"].nunique()
    parts = [
        f"seed {seed} of {'all' if len(own) == everything else _names(own['variant'].tolist())}"
        for seed, own in left.groupby("seed")
    ]
    return f"Missing: {'; '.join(parts) or 'none'}."


def _names(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"


def main(arguments: list[str]) -> int:
    """Prints the tables, or puts them into the page."""
    parser = argparse.ArgumentParser(prog="python -m bench.zoo", description=__doc__)
    flag = parser.add_argument
    flag("folders", type=Path, nargs="*", metavar="FOLDER", help="--out of recipes/compare.py")
    flag("--table", type=Path, default=TABLE, help="CSV to read, or to write (default: docs')")
    flag("--against", default="softmax", metavar="NAME", help="(default: softmax)")
    flag("--into", type=Path, metavar="PAGE", help="such as docs/zoo.md")
    options = parser.parse_args(arguments)
    if options.folders:
        write_table(require_writable(options.table), collect(options.folders))
    of_data = dict(list(read(options.table).groupby("data", sort=False)))
    if options.into:
        for data in of_data:
            parts_around(options.into, f"zoo {data}")
    for data, runs in of_data.items():
        text = table(runs, options.against)
        if options.into:
            put_into(options.into, f"zoo {data}", text)
        else:
            print(printable(f"{data}\n\n{text}\n"))
    return DONE


if __name__ == "__main__":
    run_script(main)
