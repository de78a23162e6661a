"""What curves of a few measured sizes say: values in between, crossovers, fronts."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence

Points = Sequence[tuple[float, float]]


def value_at(points: Points, x: float) -> tuple[float, bool] | None:
    """The value at ``x``, and whether it was measured rather than put on a line.

    Between sizes it lies on the line through its two neighbors in log-log, beyond them on that
    through the last two. None if there is one size only and it is another.
    """
    known = dict(points)
    if x in known:
        return known[x], True
    if len(known) < 2:
        return None
    sizes = sorted(known)
    place = min(max(bisect.bisect(sizes, x), 1), len(sizes) - 1)
    (x0, y0), (x1, y1) = ((size, known[size]) for size in sizes[place - 1 : place + 1])
    if min(y0, y1) <= 0:  # a mechanism without memory of its own has no logarithm
        return max(y0, y1), False
    slope = math.log(y1 / y0) / math.log(x1 / x0)
    return y0 * (x / x0) ** slope, False


def crossover(curve: Points, reference: Points) -> tuple[float, float] | None:
    """From where on ``curve`` lies below ``reference``: (x, y), between two common sizes.

    Both are taken as lines in log-log. None if the curve lies below from the first common size
    on, or does not at the last.
    """
    theirs = dict(reference)
    shared = [(x, y, theirs[x]) for x, y in sorted(curve) if min(y, theirs.get(x, 0)) > 0]
    logs = [tuple(map(math.log, point)) for point in shared]
    gaps = [y - r for _, y, r in logs]
    last = max((place for place, gap in enumerate(gaps) if gap > 0), default=len(gaps))
    if last + 1 >= len(gaps):
        return None
    share = gaps[last] / (gaps[last] - gaps[last + 1])
    x, y = (
        math.exp(a + share * (b - a))
        for a, b in zip(logs[last][:2], logs[last + 1][:2], strict=True)
    )
    return x, y


def first_faster(points: Iterable[tuple[float, float]]) -> float:
    """The resolution from which on a time over softmax's lies below 1; infinite if none."""
    points = sorted(points)
    if all(over <= 1 for _, over in points):
        return points[0][0]
    found = crossover(points, [(x, 1.0) for x, _ in points])
    return float("inf") if found is None else found[0]


def pareto(points: dict[str, tuple[float, ...]]) -> list[str]:
    """Names that no other beats: none is as good in everything and better in something."""

    def beats(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
        return all(x <= y for x, y in zip(a, b, strict=True)) and a != b

    return [n for n, p in points.items() if not any(beats(q, p) for q in points.values())]
