"""Numbers as text, and the parts of pages that tables are put into."""

from __future__ import annotations

import itertools
from pathlib import Path

from recipes.lab.console import UserError
from recipes.lab.files import require_writable, write_text


def put_into(path: Path, name: str, text: str) -> None:
    """Replaces what stands between ``<!-- name -->`` and ``<!-- /name -->`` in a file.

    Raises:
        UserError: The file has no such part, or cannot be written.
    """
    before, after = parts_around(path, name)
    write_text(path, f"{before}\n{text}\n{after}")


def parts_around(path: Path, name: str) -> tuple[str, str]:
    """What stands in a file before and after the part that ``put_into`` replaces, marks included.

    Raises:
        UserError: The file has no such part, or cannot be written.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    try:
        old = path.read_text("utf-8") if path.exists() else ""
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if old.count(start) != 1 or old.count(end) != 1 or old.index(end) < old.index(start):
        raise UserError(f"{path} needs one line {start} and one line {end} to write between")
    require_writable(path)
    before, rest = old.split(start)
    return before + start, end + rest.split(end)[1]


_METRIC = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0, "m": 1e-3, "µ": 1e-6, "n": 1e-9}
_BINARY = {"GiB": 2.0**30, "MiB": 2.0**20, "KiB": 2.0**10, "B": 1.0}


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
