"""What the curves say: exponents, crossovers, values between the sizes that were measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

Points = Sequence[tuple[float, float]]


def exponent(points: Points, least: float = 0.0) -> float | None:
    """Least-squares slope of log y over log x of the points from ``least`` on; None below two."""
    chosen = [(x, y) for x, y in points if x >= least and y > 0]
    if len({x for x, _ in chosen}) < 2:
        return None
    xs, ys = [math.log(x) for x, _ in chosen], [math.log(y) for _, y in chosen]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    covariance = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True))
    return covariance / sum((a - x) ** 2 for a in xs)


def crossover(curve: Points, reference: Points) -> tuple[float, float] | None:
    """Where ``curve`` comes to lie below ``reference``: (x, y), between two common sizes.

    None if it lies below from the first common size on, or never does.
    """
    theirs = dict(reference)
    shared = [(x, y, theirs[x]) for x, y in sorted(curve) if min(y, theirs.get(x, 0)) > 0]
    for (x0, y0, r0), (x1, y1, r1) in itertools.pairwise(shared):
        before, after = math.log(y0 / r0), math.log(y1 / r1)
        if before > 0 >= after:
            share = before / (before - after)
            x = math.exp(math.log(x0) + share * (math.log(x1) - math.log(x0)))
            return x, math.exp(math.log(y0) + share * (math.log(y1) - math.log(y0)))
    return None


def value_at(points: Points, x: float) -> tuple[float, bool] | None:
    """The value at ``x``, and whether it was measured rather than put on a line.

    Between sizes, and beyond them, it lies on the line through the two nearest sizes in log-log.
    None if there is one size only and it is another.
    """
    ordered = sorted(points)
    for known, value in ordered:
        if known == x:
            return value, True
    if len(ordered) < 2:
        return None
    (x0, y0), (x1, y1) = sorted(ordered, key=lambda p: abs(math.log(p[0] / x)))[:2]
    if min(y0, y1) <= 0:  # a mechanism without memory of its own has no logarithm
        return max(y0, y1), False
    slope = math.log(y1 / y0) / math.log(x1 / x0)
    return y0 * (x / x0) ** slope, False


def pareto(points: dict[str, tuple[float, ...]]) -> list[str]:
    """Names that no other beats: none is as good in everything and better in something."""

    def beats(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
        return all(x <= y for x, y in zip(a, b, strict=True)) and a != b

    return [n for n, p in points.items() if not any(beats(q, p) for q in points.values())]
