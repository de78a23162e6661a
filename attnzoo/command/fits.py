"""What curves of a few measured sizes say: values in between, crossovers, fronts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

Points = Sequence[tuple[float, float]]


def value_at(points: Points, x: float) -> tuple[float, bool] | None:
    """The value at ``x``, and whether it was measured rather than put on a line.

    Between sizes, and beyond them, it lies on the line through the two nearest sizes in log-log.
    None if there is one size only and it is another.
    """
    known = dict(points)
    if x in known:
        return known[x], True
    if len(known) < 2:
        return None
    (x0, y0), (x1, y1) = sorted(sorted(known.items()), key=lambda p: abs(math.log(p[0] / x)))[:2]
    if min(y0, y1) <= 0:  # a mechanism without memory of its own has no logarithm
        return max(y0, y1), False
    slope = math.log(y1 / y0) / math.log(x1 / x0)
    return y0 * (x / x0) ** slope, False


def crossover(curve: Points, reference: Points) -> tuple[float, float] | None:
    """Where ``curve`` comes to lie below ``reference``: (x, y), between two common sizes.

    Both are taken as lines in log-log. None if the curve lies below from the first common size
    on, or never does.
    """
    theirs = dict(reference)
    shared = [(x, y, theirs[x]) for x, y in sorted(curve) if min(y, theirs.get(x, 0)) > 0]
    logs = [tuple(map(math.log, point)) for point in shared]
    for before, after in itertools.pairwise(logs):
        above, below = (y - r for _, y, r in (before, after))
        if above > 0 >= below:
            share = above / (above - below)
            x, y = (
                math.exp(a + share * (b - a)) for a, b in zip(before[:2], after[:2], strict=True)
            )
            return x, y
    return None


def first_faster(points: Iterable[tuple[float, float]]) -> float:
    """The resolution from which a time over softmax's lies below 1; infinite if none does."""
    points = sorted(points)
    if points[0][1] <= 1:
        return points[0][0]
    found = crossover(points, [(x, 1.0) for x, _ in points])
    return float("inf") if found is None else found[0]


def pareto(points: dict[str, tuple[float, ...]]) -> list[str]:
    """Names that no other beats: none is as good in everything and better in something."""

    def beats(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
        return all(x <= y for x, y in zip(a, b, strict=True)) and a != b

    return [n for n, p in points.items() if not any(beats(q, p) for q in points.values())]
