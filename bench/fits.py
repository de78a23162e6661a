"""What the curves say: exponents, crossovers, values between the sizes that were measured."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

Points = Sequence[tuple[float, float]]


def exponent(points: Points, least: float = 0.0) -> float | None:
    """Least-squares slope of log y over log x of the points from ``least`` on; None below two."""
    chosen = [(x, y) for x, y in points if x >= least and y > 0]
    if len({x for x, _ in chosen}) < 2:
        return None
    x, y = np.log(chosen).T
    return float(np.polyfit(x, y, 1)[0])


def crossover(curve: Points, reference: Points) -> tuple[float, float] | None:
    """Where ``curve`` comes to lie below ``reference``: (x, y), between two common sizes.

    Both are taken as lines in log-log. None if the curve lies below from the first common size
    on, or never does.
    """
    theirs = dict(reference)
    shared = [(x, y, theirs[x]) for x, y in sorted(curve) if min(y, theirs.get(x, 0)) > 0]
    for before, after in itertools.pairwise(np.log(shared)):
        above, below = (y - r for _, y, r in (before, after))
        if above > 0 >= below:
            share = above / (above - below)
            x, y = np.exp(before + share * (after - before))[:2]
            return float(x), float(y)
    return None


def value_at(points: Points, x: float) -> tuple[float, bool] | None:
    """The value at ``x``, and whether it was measured rather than put on a line.

    Between sizes, and beyond them, it lies on the line through the two nearest sizes in log-log.
    None if there is one size only and it is another.
    """
    known = dict(points)
    if x in known:
        return known[x], True
    if len(points) < 2:
        return None
    (x0, y0), (x1, y1) = sorted(sorted(points), key=lambda p: abs(np.log(p[0] / x)))[:2]
    if min(y0, y1) <= 0:  # a mechanism without memory of its own has no logarithm
        return max(y0, y1), False
    slope = np.log(y1 / y0) / np.log(x1 / x0)
    return float(y0 * (x / x0) ** slope), False


def pareto(points: dict[str, tuple[float, ...]]) -> list[str]:
    """Names that no other beats: none is as good in everything and better in something."""

    def beats(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
        return all(x <= y for x, y in zip(a, b, strict=True)) and a != b

    return [n for n, p in points.items() if not any(beats(q, p) for q in points.values())]
