"""A run in short, for the terminal and for report.html: a table per size, the fastest first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from attnzoo.command.units import amount, memory
from bench.cases import PIXELS_PER_TOKEN
from bench.results import subset

_WORDS = {"layer": "one attention layer", "backbone": "the whole backbone"}
_MODES = {"forward": "time", "train": "training step"}
_SIZE = ["kind", "width", "dtype", "resolution"]


def sizes(cases: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """A title and the timed cases of each kind, width, dtype and resolution."""
    timed: Any = cases[cases["kind"].isin(_WORDS)]
    timed = timed.drop_duplicates([*_SIZE, "mode", "label"], keep="last")
    timed = timed.sort_values([*_SIZE, "mode", "time"], ascending=[False] + 5 * [True])
    for key, rows in timed.groupby(_SIZE, sort=False):
        kind, width, dtype, px = tuple(key)
        tokens = (px // PIXELS_PER_TOKEN) ** 2
        yield f"{_WORDS[kind]}, {px} px (n = {tokens:,}), d = {width}, {dtype}", rows


def winners(rows: pd.DataFrame) -> Iterator[list[str]]:
    """Of one size the step, the fastest, the smallest, and how many are faster than softmax."""
    for mode, of_mode in rows.groupby("mode", sort=False):
        fastest, smallest = (of_mode.loc[of_mode[key].idxmin()] for key in ("time", "peak_memory"))
        others = of_mode.loc[of_mode["label"] != "softmax", "over_softmax"].dropna()
        over = "" if fastest["label"] == "softmax" else _over(fastest)
        over = f", {over} x softmax" if over else ""
        yield [
            str(mode), f"{fastest['label']} ({amount(fastest['time'], 's')}{over})",
            f"{smallest['label']} ({memory(smallest['peak_memory'])})",
            f"{(others < 1).sum()} of {len(others)}" if len(others) else "",
        ]  # fmt: skip


def table(rows: pd.DataFrame, is_detailed: bool = False) -> pd.DataFrame:
    """What each mechanism takes at one size; ``is_detailed`` adds quartiles and shares."""
    order = rows["label"].drop_duplicates()
    quartiles = "q1 to q3, launched" if "device_time" in rows else "q1 to q3"
    columns = [order.rename("mechanism").reset_index(drop=True)]
    for mode, heading in _MODES.items():
        found = rows[rows["mode"] == mode].set_index("label")
        if found.empty:
            continue
        found = found.reindex(order)
        shown = {
            heading: column(found, "time", lambda value: amount(value, "s")),
            quartiles: column(found, "seconds_q1", "{:.3g} to ".format, 1e3)
            + column(found, "seconds_q3", "{:.3g} ms".format, 1e3),
            "x softmax": found.apply(_over, axis=1),
            "memory": column(found, "peak_memory", memory),
            "MACs": column(found, "macs", amount),
            "of peak": column(found, "share_of_peak", "{:.0%}".format),
        }
        if not is_detailed:
            del shown[quartiles], shown["of peak"]
        if mode == "train":
            del shown["MACs"]
        columns += [values.rename(name).reset_index(drop=True) for name, values in shown.items()]
    return pd.concat(columns, axis=1)


def aligned(rows: pd.DataFrame) -> str:
    """A table as lines for a terminal, its first column to the left."""
    first = [rows.columns[0], *rows.iloc[:, 0]]
    width = max(map(len, first))
    rows = rows.assign(**{first[0]: [text.ljust(width) for text in first[1:]]})
    heading = [f" {text}" for text in (first[0].ljust(width), *rows.columns[1:])]
    return (" " + rows).set_axis(heading, axis=1).to_string(index=False)


def _over(row: Any) -> str:
    value = row["over_softmax"]
    return "" if pd.isna(value) else f"{'' if row['is_raced'] else '~'}{value:.2f}"


def column(rows: pd.DataFrame, name: str, form: Any, scale: float = 1.0) -> pd.Series:
    """A column as text, empty where there is no value."""
    values = rows[name] if name in rows else pd.Series(None, rows.index, dtype=float)
    return values.map(lambda value: "" if pd.isna(value) else form(value * scale))


def counts(cases: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """A title and the multiply-accumulates of a layer at every size, the fewest first."""
    for width, rows in subset(cases, "count").groupby("width"):
        rows = rows.sort_values(["resolution", "macs"], ascending=[False, True])
        order = rows["label"].drop_duplicates()
        columns = {"mechanism": order.set_axis(order)}
        for key, end in (("macs", ""), ("macs_paper", ", as the paper counts")):
            for px in sorted(set(rows["resolution"])):
                of_px = rows[rows["resolution"] == px].set_index("label").reindex(order)
                columns[f"{px} px{end}"] = column(of_px, key, amount)
        alike = rows.drop_duplicates("label").set_index("label")
        for key in ("parameters", "active_parameters"):
            columns[key.replace("_", " ")] = column(alike, key, amount)
        yield f"multiply-accumulates of one layer, d = {width}", pd.DataFrame(columns)
