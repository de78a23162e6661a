"""What a few seeds can say about two variants, and what they cannot."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import pandas as pd

from recipes.lab.evaluation.scores import is_lower_better, metric_of
from recipes.lab.training.held_out import NAMES as HELD_OUT_NAMES
from recipes.studies.comparison.statistics import (
    LEVEL,
    ROUNDING,
    Difference,
    holm,
    is_at_chance,
    paired_difference,
)

MOVED = "several"  # instead of the machine of a run that went over from one to another
NO_DIFFERENCE = "no difference beyond the spread"
Pair = tuple[str, str]  # of variants
Key = TypeVar("Key", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which runs are compared with which.

    Attributes:
        against: Label of the variant that the others are compared with; None takes every pair.
        mixed_machines: Whether runs of different machines make a pair too.
    """

    against: str | None = None
    mixed_machines: bool = False


ALL_PAIRS = Choice()


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A paired comparison: both variants have seen the same data and noise in each seed.

    Attributes:
        gain: Mean over the seeds of how much better the first one is, in the metric's unit.
        margin: Half the width of the 95 % interval of that mean (Student's t); infinite where
            there are fewer than two seeds in common.
        seeds: Number of seeds in common.
        difference: The same, first minus second, with its p-value; None knows only the interval.
        corrected: The p-value corrected for a family of comparisons, which then decides; None
            lets the interval decide, which is p < 0.05 of this comparison alone.
    """

    gain: float
    margin: float
    seeds: int
    difference: Difference | None = None
    corrected: float | None = None

    @property
    def kind(self) -> Literal["better", "worse", "same", "unknown"]:
        """ "same" means only that the spread hides any difference there may be."""
        if self.seeds < 2 or not math.isfinite(self.gain):
            return "unknown"
        # Gains that agree to the last digit are a coincidence of rounded shares, not certainty.
        if self.margin == 0 and self.gain != 0:
            return "unknown"
        is_seen = abs(self.gain) > self.margin
        if self.corrected is not None:
            is_seen = self.corrected < LEVEL
        if not is_seen:
            return "same"
        return "better" if self.gain > 0 else "worse"

    @property
    def words(self) -> str:
        """The verdict in words."""
        if self.kind == "unknown":
            return f"no spread to judge by ({self.seeds} seeds), so nothing can be said"
        if self.kind == "same":
            plain = f"{NO_DIFFERENCE}, {self.bound_words}"
        else:
            plain = f"{self.kind} by {self.effect_words}"
        return f"{plain} ({self.gain_and_margin(3, 2)}, {self.seeds} seeds)"

    @property
    def effect_words(self) -> str:
        """ "2.3 %" of the second one's mean, or in the metric's unit where that says nothing."""
        if self.difference is not None and abs(self.difference.percent) <= 1000:
            return f"{abs(self.difference.percent):.2g} %"
        return f"{abs(self.gain):.3g}"

    @property
    def bound_words(self) -> str:
        """ "differs by less than 0.8 %", with 95 % confidence; a bound is only rounded up."""
        bound, unit = abs(self.gain) + self.margin, ""
        if bound == 0:
            return "equal in every seed"
        if self.difference is not None and self.difference.bound_percent <= 100:
            bound, unit = self.difference.bound_percent, " %"
        return f"differs by less than {rounded_up(bound)}{unit}"

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


def compare_variants(
    runs: pd.DataFrame, first: str, second: str, metric: str, mixed_machines: bool = False
) -> Verdict:
    """Compares two variants by their differences within each seed.

    Args:
        runs: Rows of one data set, resolution and guidance scale: variant, seed, metrics. With a
            column "machine", only runs of one machine make a pair, and a run of ``MOVED`` none;
            with a column "held_out_images", only losses of the same images do.
        first: Label of the variant in question.
        second: Label of the one it is compared with.
        metric: Reported name.
        mixed_machines: Whether runs of different machines make a pair all the same.

    Returns:
        The verdict, whose gain is positive where the first is better.
    """
    keys = ["seed"]
    if "held_out_images" in runs and is_of_model(metric):
        keys.append("held_out_images")
        runs = runs.fillna({"held_out_images": ""})  # of an earlier version's table
    if "machine" in runs and not mixed_machines:
        keys.append("machine")
        runs = runs.loc[runs["machine"] != MOVED].assign(machine=runs["machine"].fillna(""))
    wide = runs.pivot_table(index=keys, columns="variant", values=metric)
    if first not in wide or second not in wide:
        return Verdict(math.nan, math.inf, 0)
    found = paired_difference(wide[first].tolist(), wide[second].tolist())
    gain = -found.mean if is_lower_better(metric) else found.mean
    return Verdict(gain + 0.0, found.margin, found.pairs, found)


def all_pairs(runs: pd.DataFrame, metric: str, choice: Choice = ALL_PAIRS) -> dict[Pair, Verdict]:
    """Every two variants of a setting that have a number, each pair once; or all against one.

    Args:
        runs: See ``compare_variants``.
        metric: Reported name.
        choice: Which ones.
    """
    names = [str(name) for name in runs.dropna(subset=[metric])["variant"].unique()]
    pairs: Iterable[Pair] = itertools.combinations(names, 2)
    if (other := choice.against) is not None:
        pairs = [(name, other) for name in names if name != other and other in names]
    return {pair: compare_variants(runs, *pair, metric, choice.mixed_machines) for pair in pairs}


def family(
    runs: pd.DataFrame, metric: str, keys: Sequence[str], choice: Choice = ALL_PAIRS
) -> dict[tuple[Any, ...], dict[Pair, Verdict]]:
    """The verdicts of one metric in all settings of a comparison, corrected together.

    Args:
        runs: Rows of all settings and guidance scales.
        metric: Reported name.
        keys: Columns whose values make a setting, the guidance scale "cfg" last.
        choice: Which pairs.

    Returns:
        By the values of the keys, the verdicts by pair. A loss of the model itself has the same
        value at every scale: it is compared at the first one only.
    """
    groups: list[tuple[Any, pd.DataFrame]] = list(
        runs.groupby(list(keys), sort=False, dropna=False)
    )
    if is_of_model(metric):
        groups = list({key[:-1]: (key, rows) for key, rows in reversed(groups)}.values())[::-1]
    found = {
        (key, pair): verdict
        for key, rows in groups
        for pair, verdict in all_pairs(rows, metric, choice).items()
    }
    together: dict[tuple[Any, ...], dict[Pair, Verdict]] = {key: {} for key, _ in groups}
    for (key, pair), verdict in corrected_together(found).items():
        together[key][pair] = verdict
    return together


def is_of_model(label: str) -> bool:
    """Whether a metric is a loss of the model, which no guidance changes."""
    return metric_of(label) in HELD_OUT_NAMES


def corrected_together(verdicts: Mapping[Key, Verdict]) -> dict[Key, Verdict]:
    """The verdicts of a family, each with its p-value corrected for all of them by Holm."""
    p_values = [v.difference.p if v.difference else math.nan for v in verdicts.values()]
    return {
        key: dataclasses.replace(verdict, corrected=p if math.isfinite(p) else None)
        for (key, verdict), p in zip(verdicts.items(), holm(p_values), strict=True)
    }


def verdict_of(verdicts: Mapping[Pair, Verdict], first: str, second: str) -> Verdict | None:
    """The verdict on the first one, whichever way round the pair was compared, or None."""
    if (first, second) in verdicts:
        return verdicts[first, second]
    found = verdicts.get((second, first))
    if found is None:
        return None
    turned = found.difference
    if turned is not None:
        turned = dataclasses.replace(
            turned,
            mean=-turned.mean,
            scale=turned.scale + turned.mean if turned.pairs else math.nan,
        )
    return dataclasses.replace(found, gain=-found.gain, difference=turned)


def rounded_up(value: float, digits: int = 2) -> str:
    """A bound with few digits that is no less than it."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    unit = 10.0 ** (math.floor(math.log10(abs(value))) - digits + 1)
    steps = math.ceil(value / unit * (1 - ROUNDING))
    return f"{steps * unit:.{digits}g}"


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
        if is_at_chance(share, int(count), int(classes)):
            found.append(f"{metric} {share:.3g}, where guessing gives {1 / float(classes):.3g}")
    if {"first_loss", "last_loss"} <= set(runs.columns):
        first, last = runs.first_loss.mean(), runs.last_loss.mean()
        if last >= first:
            digits = digits_apart([last, first], 3)
            found.append(f"training loss {last:.{digits}g} after {first:.{digits}g} at its start")
    return "; ".join(found) or None


def ordered_variants(runs: pd.DataFrame, metric: str) -> dict[str, float]:
    """Mean over the seeds by variant, best first; only those that have a number."""
    grouped = runs.dropna(subset=[metric]).groupby("variant", sort=False)
    means = {str(name): statistics.fmean(rows[metric]) for name, rows in grouped}
    sign = 1 if is_lower_better(metric) else -1
    return dict(sorted(means.items(), key=lambda item: sign * item[1]))


def summary_sentence(
    runs: pd.DataFrame,
    metric: str,
    verdicts: Mapping[Pair, Verdict] | None = None,
    choice: Choice = ALL_PAIRS,
) -> str:
    """One sentence on which variant leads in a metric, and over which ones that is certain.

    Args:
        runs: Rows of one data set, resolution and guidance scale.
        metric: Reported name.
        verdicts: Of all pairs, corrected for the family they belong to; None takes the pairs of
            these runs for the family.
        choice: Which pairs these are.
    """
    means = ordered_variants(runs, metric)
    if len(means) < 2:
        return f"{metric}: fewer than two variants have a number."
    if verdicts is None:
        verdicts = corrected_together(all_pairs(runs, metric, choice))
    if choice.against in means:
        return _against_sentence(means, metric, verdicts, choice.against)
    best = next(iter(means.values()))
    first = [name for name in means if _are_equal(means[name], best)]
    rest = [name for name in means if name not in first]
    if not rest:
        return f"{metric}: all variants tie ({best:.4g})."
    second = means[rest[0]]
    digits = digits_apart([best, second])
    shown = f"{best:.{digits}g}" + (f", then {second:.{digits}g}" if digits > 4 else "")
    by_kind: dict[str, list[str]] = {}
    for other in rest:
        # Of those that share the best mean, the one that is least sure speaks.
        found = [verdict_of(verdicts, one, other) for one in first]
        by_one = {"unknown" if v is None else v.kind: v for v in found}
        kind = next(kind for kind in ("unknown", "same", "worse", "better") if kind in by_one)
        by_kind.setdefault(kind, []).append(f"{other}{_effect(by_one[kind])}")
    lead = f"{_listed(first)} tie for" if len(first) > 1 else f"{first[0]} has"
    words = {
        "better": "beyond the spread over seeds better than {}",
        "same": f"{NO_DIFFERENCE} from {{}}",
        # The seeds of the two are not the same.
        "worse": "worse than {} in the seeds that both have",
        "unknown": "too few seeds, or no spread between them, to judge {}",
    }
    parts = [f"{metric}: {lead} the best mean ({shown})"]
    parts += [words[kind].format(", ".join(by_kind[kind])) for kind in words if kind in by_kind]
    return "; ".join(parts) + "."


def _against_sentence(
    means: Mapping[str, float], metric: str, verdicts: Mapping[Pair, Verdict], other: str
) -> str:
    by_kind: dict[str, list[str]] = {}
    for name in means:
        if name != other:
            found = verdict_of(verdicts, name, other)
            kind = "unknown" if found is None else found.kind
            by_kind.setdefault(kind, []).append(f"{name}{_effect(found)}")
    words = {"better": "better:", "worse": "worse:", "same": f"{NO_DIFFERENCE}:",
             "unknown": "too few seeds, or no spread between them, to judge"}  # fmt: skip
    parts = [f"{words[kind]} {', '.join(by_kind[kind])}" for kind in words if kind in by_kind]
    return f"{metric}, against {other} ({means[other]:.4g}): {'; '.join(parts)}."


def _effect(verdict: Verdict | None) -> str:
    if verdict is None or verdict.kind == "unknown":
        return ""
    return f" ({verdict.bound_words if verdict.kind == 'same' else verdict.effect_words})"


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
