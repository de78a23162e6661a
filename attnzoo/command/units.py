"""Amounts as people write them."""

from __future__ import annotations

import itertools
import math
import re

from attnzoo.errors import InvalidValue

_METRIC = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0, "m": 1e-3, "µ": 1e-6, "n": 1e-9}
_BINARY = {"GiB": 2.0**30, "MiB": 2.0**20, "KiB": 2.0**10, "B": 1.0}
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def amount(value: float, unit: str = "") -> str:
    """A number with a metric prefix: 1234567 -> "1.23 M"."""
    return _scaled(value, {prefix + unit: factor for prefix, factor in _METRIC.items()})


def memory(value: float) -> str:
    """Bytes in binary units: 1572864 -> "1.5 MiB"."""
    return _scaled(value, _BINARY)


def _scaled(value: float, units: dict[str, float]) -> str:
    for (unit, factor), (_, smaller) in itertools.pairwise(units.items()):
        if abs(value) >= 999.5 * smaller:  # three digits of which would be 1e+03
            return f"{value / factor:.3g} {unit}".strip()
    unit = list(units)[-1] if value else next(name for name, f in units.items() if f == 1)
    return f"{value / units[unit]:.3g} {unit}".strip()


def parse_bytes(text: str) -> int:
    """ "8GiB", "8 GB", "0.5g" or "1024" -> bytes; "g" is short for "GiB".

    Raises:
        InvalidValue: It is no amount of memory.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b?)\s*", text.lower())
    size = math.nan
    if match and (match[2] or not match[3].startswith("i")):
        size = float(match[1]) * (1000 if match[3] == "b" else 1024) ** _POWERS[match[2]]
    if not 1 <= size < 2**60:
        raise InvalidValue(f"{text!r} is no amount of memory; write it like 8GiB or 300MiB")
    return int(size)
