"""What a few seeds can say about two variants, and what they cannot."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import pandas as pd
from scipy import stats

from recipes.lab.evaluation.scores import is_lower_better, metric_of

CONFIDENCE = 0.95
NO_DIFFERENCE = "no difference beyond the spread"
# What sums of rounded shares differ by, relative to their size, though they are equal.
ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A paired comparison: both variants have seen the same data and noise in each seed.

    Attributes:
        gain: Mean over the seeds of how much better the first one is, in the metric's unit.
        margin: Half the width of the 95 % interval of that mean (Student's t); infinite where
            there are fewer than two seeds in common.
        seeds: Number of seeds in common.
    """

    gain: float
    margin: float
    seeds: int

    @property
    def kind(self) -> Literal["better", "worse", "same", "unknown"]:
        """ "same" means only that the spread hides any difference there may be."""
        if self.seeds < 2 or not math.isfinite(self.gain):
            return "unknown"
        # Gains that agree to the last digit are a coincidence of rounded shares, not certainty.
        if self.margin == 0 and self.gain != 0:
            return "unknown"
        if abs(self.gain) <= self.margin:
            return "same"
        return "better" if self.gain > 0 else "worse"

    @property
    def words(self) -> str:
        """The verdict in words."""
        if self.kind == "unknown":
            return f"no spread to judge by ({self.seeds} seeds), so nothing can be said"
        plain = {"better": "better", "worse": "worse", "same": NO_DIFFERENCE}[self.kind]
        return f"{plain} ({self.gain_and_margin(3, 2)}, {self.seeds} seeds)"

    def gain_and_margin(self, digits: int, margin_digits: int) -> str:
        """ "+0.12 ± 0.08", with more digits where the two would look equal and are not."""
        for more in range(15):
            gain = float(f"{self.gain:.{digits + more}g}")
            margin = float(f"{self.margin:.{margin_digits + more}g}")
            if abs(self.gain) == self.margin or (
                (abs(gain) > margin) == (abs(self.gain) > self.margin) and abs(gain) != margin
            ):
                break
        return f"{gain:+.15g} ± {margin:.15g}"


def compare_variants(runs: pd.DataFrame, first: str, second: str, metric: str) -> Verdict:
    """Compares two variants by their differences within each seed.

    Args:
        runs: Rows of one data set, resolution and guidance scale: variant, seed, metrics.
        first: Label of the variant in question.
        second: Label of the one it is compared with.
        metric: Reported name.

    Returns:
        The verdict, whose gain is positive where the first is better.
    """
    wide = runs.pivot_table(index="seed", columns="variant", values=metric)
    if first not in wide or second not in wide:
        return Verdict(math.nan, math.inf, 0)
    gains = (wide[first] - wide[second]).dropna()
    if is_lower_better(metric):
        gains = -gains
    both = wide.loc[gains.index, [first, second]].to_numpy()
    gain, margin = float(gains.mean()) if len(gains) else math.nan, math.inf
    if len(gains) > 1:
        quantile = stats.t.ppf((1 + CONFIDENCE) / 2, len(gains) - 1)
        margin = float(quantile * gains.sem())
        noise = ROUNDING * float(np.abs(both).max())
        gain, margin = (0.0 if abs(value) <= noise else value for value in (gain, margin))
    return Verdict(gain, margin, len(gains))


def digits_apart(values: Iterable[float], digits: int = 4) -> int:
    """How many significant digits tell apart the values that differ, at least ``digits``."""
    ordered = sorted(value for value in values if math.isfinite(value))
    for low, high in itertools.pairwise(ordered):
        while digits < 17 and f"{low:.{digits}g}" == f"{high:.{digits}g}":
            if _are_equal(low, high):
                break
            digits += 1
    return digits


def winner_digits(summary: pd.DataFrame, digits: int) -> dict[str, int]:
    """By metric, the digits with which the best mean does not look like the second best."""
    found = {}
    for metric, means in summary.groupby("metric")["mean"]:
        best, *rest = sorted(means.tolist(), reverse=not is_lower_better(str(metric)))
        distinct = [mean for mean in rest if not _are_equal(mean, best)]
        found[str(metric)] = digits_apart([best, *distinct[:1]], digits)
    return found


def _are_equal(one: float, other: float) -> bool:
    return abs(one - other) <= ROUNDING * max(abs(one), abs(other))


def at_chance(runs: pd.DataFrame) -> str | None:
    """How the runs of one variant show that it has learned nothing, or None if they do not.

    Args:
        runs: Rows of one variant, data set, resolution and guidance scale. Beside the metrics
            "classes" and "count" (measured images) are used, and "first_loss" and "last_loss";
            what is missing says nothing.
    """
    found = []
    classes = runs["classes"].iloc[0] if "classes" in runs else None
    for metric in [c for c in runs.columns if metric_of(str(c)) == "class_accuracy"]:
        share = runs[metric].mean()
        count = runs["count"].sum() if "count" in runs else math.nan
        if classes is None or not (classes > 1 and count > 0) or share != share:
            continue
        chance = 1 / float(classes)
        # What guessing stays below in 39 of 40 trials.
        if share * count <= stats.binom.ppf((1 + CONFIDENCE) / 2, int(count), chance):
            found.append(f"{metric} {share:.3g}, where guessing gives {chance:.3g}")
    if {"first_loss", "last_loss"} <= set(runs.columns):
        first, last = runs.first_loss.mean(), runs.last_loss.mean()
        if last >= first:
            digits = digits_apart([last, first], 3)
            found.append(f"training loss {last:.{digits}g} after {first:.{digits}g} at its start")
    return "; ".join(found) or None


def summary_sentence(runs: pd.DataFrame, metric: str) -> str:
    """One sentence on which variant leads in a metric, and over which ones that is certain."""
    grouped = runs.dropna(subset=[metric]).groupby("variant", sort=False)
    means = {str(name): statistics.fmean(rows[metric]) for name, rows in grouped}
    if len(means) < 2:
        return f"{metric}: fewer than two variants have a number."
    ordered = sorted(means, key=lambda name: means[name] * (1 if is_lower_better(metric) else -1))
    best = means[ordered[0]]
    first = [name for name in ordered if _are_equal(means[name], best)]
    rest = [name for name in ordered if name not in first]
    if not rest:
        return f"{metric}: all variants tie ({best:.4g})."
    second = means[rest[0]]
    digits = digits_apart([best, second])
    shown = f"{best:.{digits}g}" + (f", then {second:.{digits}g}" if digits > 4 else "")
    by_kind: dict[str, list[str]] = {}
    for other in rest:
        # Of those that share the best mean, the one that is least sure speaks.
        kinds = {compare_variants(runs, one, other, metric).kind for one in first}
        kind = next(kind for kind in ("unknown", "same", "worse", "better") if kind in kinds)
        by_kind.setdefault(kind, []).append(other)
    lead = f"{_listed(first)} tie for" if len(first) > 1 else f"{first[0]} has"
    words = {
        "better": "better than {} beyond the spread over seeds",
        "same": f"{NO_DIFFERENCE} from {{}}",
        # The seeds of the two are not the same.
        "worse": "worse than {} in the seeds that both have",
        "unknown": "too few seeds, or no spread between them, to judge {}",
    }
    parts = [f"{metric}: {lead} the best mean ({shown})"]
    parts += [words[kind].format(", ".join(by_kind[kind])) for kind in words if kind in by_kind]
    return "; ".join(parts) + "."


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
