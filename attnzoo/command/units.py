"""Amounts as people write them."""

from __future__ import annotations

import math
import re

from attnzoo.errors import InvalidValue

_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def amount(value: float, unit: str = "") -> str:
    """A number with a metric prefix: 1234567 -> "1.23 M"."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""),
                           (1e-3, "m"), (1e-6, "µ"), (1e-9, "n")):  # fmt: skip
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}".strip()
    return f"{value:.3g} {unit}".strip()


def memory(value: float) -> str:
    """Bytes in binary units: 1572864 -> "1.5 MiB"."""
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.0f} B"


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
