"""Numbers as text, and the parts of pages that tables are put into."""

from __future__ import annotations

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
