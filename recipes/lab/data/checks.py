"""What the data sets refuse: the error, and checks that they share."""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Iterable

from recipes.lab.console import UserError


class DataError(UserError):
    """Data that the user can put right: one line naming the value or path and the remedy."""


def check_choice(value: str, valid: Iterable[str], what: str) -> str:
    """Return ``value`` where it is one of ``valid``.

    Raises:
        DataError: naming the value, the nearest valid one and all valid ones.
    """
    names = tuple(valid)
    if value in names:
        return value
    near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise DataError(f"unknown {what} {value!r}: {hint}valid are {', '.join(names)}")


def check_seed(seed: int) -> int:
    """Return ``seed`` as an int.

    Raises:
        DataError: if it is not an integer in [0, 2**64).
    """
    if not is_integer(seed) or not 0 <= seed < 2**64:
        raise DataError(f"seed {seed!r} is out of range: give an integer from 0 to 2**64 - 1")
    return int(seed)


def is_integer(value: object) -> bool:
    """Whether a value is an integer of any library; booleans are not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
