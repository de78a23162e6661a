"""What a few seeds can decide: differences, their correction, their bounds, and their price.

Numbers in, numbers out: nothing here knows tables, metrics or variants.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
LEVEL = 1 - CONFIDENCE
POWER = 0.8
# What sums of rounded shares differ by, relative to their size, though they are equal.
ROUNDING = 1e-9
_MOST_SEEDS = 10**6


@dataclasses.dataclass(frozen=True)
class Difference:
    """A paired difference over seeds, first minus second.

    Attributes:
        mean: Mean of the differences; NaN where there is none.
        margin: Half the width of its 95 % interval (Student's t); infinite below two pairs.
        p: Two-sided p-value of a true mean of 0 (Student's t). 1 where all differences are 0, and
            NaN where nothing can be said: fewer than two pairs, or differences that agree to the
            last digit, which is a coincidence of rounded numbers and no certainty.
        pairs: Number of pairs.
        std: Standard deviation of the differences; NaN below two pairs.
        scale: Mean of the second ones, what the difference is a share of.
    """

    mean: float
    margin: float
    p: float
    pairs: int
    std: float
    scale: float

    @property
    def percent(self) -> float:
        """The mean difference in percent of the second; NaN where that is 0."""
        return relative_percent(self.mean, self.scale)

    @property
    def bound(self) -> float:
        """What the true difference is below, in size, with 95 % confidence; see ``tie_bound``."""
        return tie_bound(self.mean, self.margin)

    @property
    def bound_percent(self) -> float:
        """``bound`` in percent of the second, at least 0."""
        return abs(relative_percent(self.bound, self.scale))


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """The difference of two variants that have met the same problems, seed by seed.

    Args:
        first: One number per seed.
        second: The other variant's, in the same order. Pairs with a NaN are left out.

    Raises:
        ValueError: The two are of different lengths.
    """
    both = np.array([list(first), list(second)], dtype=float)
    both = both[:, np.isfinite(both).all(axis=0)]
    differences = both[0] - both[1]
    pairs = len(differences)
    if not pairs:
        return Difference(math.nan, math.inf, math.nan, 0, math.nan, math.nan)
    mean, scale = float(differences.mean()), float(both[1].mean())
    if pairs == 1:
        return Difference(mean, math.inf, math.nan, 1, math.nan, scale)
    noise = ROUNDING * float(np.abs(both).max())
    std = float(differences.std(ddof=1))
    mean, std = (0.0 if abs(value) <= noise else value for value in (mean, std))
    error = std / math.sqrt(pairs)
    margin = float(stats.t.ppf((1 + CONFIDENCE) / 2, pairs - 1)) * error
    if error:
        p = 2 * float(stats.t.sf(abs(mean) / error, pairs - 1))
    else:
        p = 1.0 if mean == 0 else math.nan
    return Difference(mean, margin, p, pairs, std, scale)


def holm(p_values: Iterable[float]) -> list[float]:
    """Holm's correction: p-values that hold for all claims of a family together.

    A claim whose corrected value is below 0.05 is decided, and the chance that any of the decided
    ones is wrong is below 5 %, however the claims depend on one another.

    Args:
        p_values: Of the family. A NaN is no claim: it stays NaN and does not count.

    Source: Holm 1979, A simple sequentially rejective multiple test procedure.
    """
    values = np.array(list(p_values), dtype=float)
    known = np.flatnonzero(np.isfinite(values))
    order = known[np.argsort(values[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    corrected = np.full(len(values), math.nan)
    corrected[order] = np.minimum(1, np.maximum.accumulate(factors * values[order]))
    return corrected.tolist()


def tie_bound(mean: float, margin: float) -> float:
    """The size that a true difference stays below: the far end of its 95 % interval.

    Infinite below two pairs: one seed bounds nothing.
    """
    return math.inf if math.isnan(mean) else abs(mean) + margin


def relative_percent(difference: float, scale: float) -> float:
    """A difference in percent of what it is a difference to; NaN where that is 0."""
    return 100 * difference / abs(scale) if scale else math.nan


def power_of(size: float, std: float, seeds: int, level: float = LEVEL) -> float:
    """How likely a paired t-test of this many seeds finds a true difference.

    Args:
        size: Of the true mean difference.
        std: Standard deviation of the differences over seeds, above 0.
        seeds: At least 2.
        level: Two-sided; divide by the number of claims of a family for Holm's first step.
    """
    shift, free = abs(size) / std * math.sqrt(seeds), seeds - 1
    limit = stats.t.isf(level / 2, free)
    missed = stats.nct.cdf(limit, free, shift) - stats.nct.cdf(-limit, free, shift)
    # Far out the distribution has no number, and no doubt.
    return 1.0 if math.isnan(missed) else 1 - float(missed)


def seeds_needed(
    differences: Sequence[float],
    size: float | None = None,
    power: float = POWER,
    level: float = LEVEL,
) -> float:
    """How many seeds would decide, from the differences of a pilot.

    The spread of a pilot of few seeds is itself uncertain: with three, its true value may be
    twice as large, and the seeds four times as many.

    Args:
        differences: Of the pilot, one per seed; at least two that are finite.
        size: Of the true difference to be found, in the same unit; None takes the pilot's mean.
        power: How likely it is to be found, above 0 and below 1.
        level: See ``power_of``.

    Returns:
        See ``seeds_to_find``.

    Raises:
        ValueError: Fewer than two differences are finite.
    """
    known = np.array([value for value in differences if math.isfinite(value)])
    if len(known) < 2:
        raise ValueError(f"a spread needs 2 differences, got {len(known)}")
    size = float(known.mean()) if size is None else size
    return seeds_to_find(size, float(known.std(ddof=1)), power, level)


def seeds_to_find(size: float, std: float, power: float = POWER, level: float = LEVEL) -> float:
    """How many seeds find a true difference of a size; see ``power_of``.

    Returns:
        A whole number, at least 2; infinite where the size is 0 or a million are not enough.
    """
    if size == 0:
        return math.inf
    if std <= ROUNDING * abs(size):
        return 2
    low, high = 1, 2  # too few, and perhaps enough
    while power_of(size, std, high, level) < power:
        low, high = high, 2 * high
        if low >= _MOST_SEEDS:
            return math.inf
    while high - low > 1:
        middle = (low + high) // 2
        if power_of(size, std, middle, level) >= power:
            high = middle
        else:
            low = middle
    return high


def steps_to_reach(curve: Sequence[tuple[float, float]], loss: float) -> float | None:
    """The step at which a learning curve first comes down to a loss, interpolated linearly.

    Args:
        curve: (step, loss), by rising step.
        loss: To be reached.

    Returns:
        A step, the curve's first where it begins no higher; None where it never comes so low.
    """
    before: tuple[float, float] | None = None
    for step, value in curve:
        if value <= loss:
            if before is None or before[1] == value:
                return float(step)
            share = (before[1] - loss) / (before[1] - value)
            return float(before[0] + share * (step - before[0]))
        before = step, value
    return None


def steps_saved(
    better: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]]
) -> float | None:
    """How many steps earlier the better one has the loss at which the other one ends.

    Args:
        better: Its learning curve, (step, loss) by rising step.
        other: The other's.

    Returns:
        Steps, at least 0 where the better one ends no higher and no later; None where it never
        gets there, or a curve is empty.
    """
    if not better or not other:
        return None
    last, final = other[-1]
    reached = steps_to_reach(better, final)
    return None if reached is None else float(last) - reached


def is_at_chance(share: float, count: int, classes: int) -> bool:
    """Whether a share of right classes is what guessing reaches too.

    Args:
        share: Of the images that show the class asked for.
        count: Images.
        classes: Equally likely ones, at least 2.

    Returns:
        True where guessing stays below the share in fewer than 39 of 40 trials.
    """
    return share * count <= float(stats.binom.ppf((1 + CONFIDENCE) / 2, count, 1 / classes))
