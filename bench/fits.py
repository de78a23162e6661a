"""How fast a curve grows; ``attnzoo.command.fits`` has crossovers and values between sizes."""

from __future__ import annotations

import numpy as np

from attnzoo.command.fits import Points


def exponent(points: Points, least: float = 0.0) -> float | None:
    """Least-squares slope of log y over log x of the points from ``least`` on; None below two."""
    chosen = [(x, y) for x, y in points if x >= least and y > 0]
    if len({x for x, _ in chosen}) < 2:
        return None
    x, y = np.log(chosen).T
    return float(np.polyfit(x, y, 1)[0])
