"""The parts of pages that tables are put into."""

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
