"""What a table of runs decides: each claim in each setting, corrected together by study.

Differences are of the held-out loss, paired by seed; Holm's correction takes the claims of one
study as one family, in which the same runs count once, whichever protocols they serve. A pair
counts only where both runs are of one device, one torch, and the same held-out images. Where runs
were measured in several such ways, that of most seeds counts, and others for seeds that it lacks;
of equally many seeds the way whose images are noted, which have no near copies.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import pandas as pd

from recipes.studies.comparison.planned import OK
from recipes.studies.comparison.statistics import LEVEL, Difference, holm, paired_difference
from recipes.studies.comparison.statistics import seeds_needed as needed_of
from recipes.studies.comparison.statistics import steps_saved as saved_of
from recipes.studies.quality.plans import STUDIES, Claim
from recipes.studies.quality.table import MEASURE, SETTING, curve_of

LOSS = "loss"
Row = dict[Hashable, Any]
FAR = 1.5  # times the median loss of a setting, above which a run has not trained


class Decision(NamedTuple):
    """A claim in one setting.

    Attributes:
        claim: What is said.
        study: Whose it is.
        protocol: What is equal.
        data: Of the runs.
        px: Side of the images.
        difference: Of the first and the second, below 0 where the claim holds.
        p: Corrected; NaN where nothing is known.
        saved: Share of the second's steps that the first needs less to reach its final loss;
            below 0 is of the other; NaN where curves do not cross or steps differ.
        foreign: Pairs that were left out, as they were not measured alike.
        needed: Seeds that would decide, from these; NaN below two.
        runs: Names of the pairs' runs.
        failed: Those of the two of which a run has not trained: its loss is above ``FAR`` times
            the median of the setting's runs.
    """

    claim: Claim
    study: str
    protocol: str
    data: str
    px: int
    difference: Difference
    p: float
    saved: float
    foreign: int
    needed: float
    runs: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()

    @property
    def kind(self) -> Literal["holds", "opposite", "undecided", "not trained", "not measured"]:
        """What is decided at 5 % for the whole family."""
        if self.failed:
            return "not trained"
        if self.difference.pairs < 2 or math.isnan(self.difference.p):
            return "not measured" if not self.difference.pairs else "undecided"
        if not self.p < LEVEL:
            return "undecided"
        return "holds" if self.difference.mean < 0 else "opposite"


def far_loss(losses: pd.Series) -> float:
    """Above which a run of a setting has not trained."""
    return FAR * losses.loc[losses < math.inf].median()


def decide(table: pd.DataFrame, mixed: bool = False) -> list[Decision]:
    """Every claim of the studies in every setting of the table, and those without a run.

    Args:
        table: See ``table.read``.
        mixed: Whether pairs that were not measured alike count too.
    """
    found: list[Decision] = []
    for name, study in STUDIES.items():
        rows = table.loc[(table["study"] == name) & (table["state"] == OK) & table[LOSS].notna()]
        by_run: dict[str, list[Row]] = {}  # also of another protocol, which is the same run
        for row in rows.to_dict("records"):
            by_run.setdefault(row["run"], []).append(row)
        places: dict[Any, pd.DataFrame] = dict(list(rows.groupby(SETTING, sort=False)))
        of_study = [
            _decision(claim, setting, here, by_run, mixed)
            for claim in study.claims
            for setting, here in places.items()
        ]
        none = paired_difference([], [])
        for claim in study.claims if not places else ():
            of_study += [
                Decision(claim, name, protocol, "", px, none, math.nan, math.nan, 0, math.nan)
                for protocol in study.protocols
                for px in study.resolutions
            ]
        family = {one.runs: one.difference.p for one in of_study if not one.failed}
        corrected = dict(zip(family, holm(family.values()), strict=True))
        found += [one._replace(p=corrected.get(one.runs, math.nan)) for one in of_study]
    return found


def _decision(
    claim: Claim,
    setting: Sequence[Any],
    here: pd.DataFrame,
    by_run: Mapping[str, Sequence[Row]],
    mixed: bool,
) -> Decision:
    first, second = (
        [
            measured
            for row in here.loc[here["variant"] == label].to_dict("records")
            for measured in (row, *by_run[row["run"]])
        ]
        for label in (claim.first, claim.second)
    )
    ways: dict[tuple[Any, ...], dict[int, tuple[Row, Row]]] = {}
    for one, other in itertools.product(first, second):
        is_alike = _are_measured_alike(one, other)
        if one["seed"] == other["seed"] and (mixed or is_alike):
            way = is_alike, *(row[name] for row in (one, other) for name in MEASURE)
            ways.setdefault(way, {}).setdefault(one["seed"], (one, other))
    pairs: dict[int, tuple[Row, Row]] = {}

    def rank(way: tuple[tuple[Any, ...], dict[int, tuple[Row, Row]]]) -> tuple[bool, int, bool]:
        return not way[0][0], -len(way[1]), not way[0][-1]

    for _, of_seeds in sorted(ways.items(), key=rank):
        pairs = of_seeds | pairs
    both = {row["seed"] for row in first} & {row["seed"] for row in second}
    one, other = (
        pd.DataFrame([pairs[seed][k] for seed in sorted(pairs)], columns=here.columns)
        for k in (0, 1)
    )
    difference = paired_difference(one[LOSS].tolist(), other[LOSS].tolist())
    needed = math.nan
    if difference.pairs >= 2 and difference.std > 0:
        needed = needed_of((one[LOSS] - other[LOSS]).tolist())
    study, protocol, data, px = setting
    far = far_loss(here[LOSS])
    failed = [
        label
        for label, frame in ((claim.first, one), (claim.second, other))
        if not (frame[LOSS] <= far).all()
    ]
    return Decision(
        claim, study, protocol, data, px, difference, math.nan, _saved(one, other),
        len(both) - len(pairs), needed, (*one["run"], *other["run"]), tuple(failed),
    )  # fmt: skip


def _are_measured_alike(first: Row, second: Row) -> bool:
    alike = all(first[name] == second[name] for name in MEASURE)
    return alike and not (first.get("elsewhere") or second.get("elsewhere"))


def _saved(one: pd.DataFrame, other: pd.DataFrame) -> float:
    """Mean over the seeds of the steps that the better one saves, as a share of them."""
    shares = []
    for first, second in zip(one.to_dict("records"), other.to_dict("records"), strict=True):
        if first["steps"] != second["steps"]:
            continue
        sign = 1 if first[LOSS] <= second[LOSS] else -1
        better, worse = (first, second) if sign > 0 else (second, first)
        steps = saved_of(curve_of(better["curve"]), curve_of(worse["curve"]))
        if steps is not None:
            shares.append(sign * steps / first["steps"])
    return statistics.fmean(shares) if shares else math.nan
