"""Tables of a comparison as CSV: what users name is text in them, and reads back as it was."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pandas as pd

from recipes.lab.console import UserError, one_line
from recipes.lab.evaluation.scores import spelled_today
from recipes.lab.files import write_text
from recipes.studies.comparison.planned import OLD_NAMES

TEXTS = (
    "data", "level", "protocol", "variant", "attn", "options", "run", "state", "error", "device",
    "machine", "torch", "evaluator", "held_out_images", "metric",
)  # fmt: skip
WHOLE = ("resolution", "steps", "batch_size", "samples", "seed", "seeds", "classes", "count")
# A spreadsheet takes what begins so for a formula; an apostrophe before it makes it text.
_FORMULA = re.compile(r"'*[=+\-@\t\r\n]")


def write_table(path: Path, frame: pd.DataFrame) -> None:
    """Writes a table as CSV; numbers in full, and no text that a spreadsheet would compute.

    Raises:
        CannotWrite: The system refuses.
    """
    texts = {
        name: frame[name].map(_as_text)
        for name in frame.columns
        if not pd.api.types.is_numeric_dtype(frame[name])
    }
    titles = {name: _as_text(name) for name in frame.columns}
    write_text(path, frame.assign(**texts).rename(columns=titles).to_csv(index=False))


def _as_text(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = one_line(value)
    return f"'{text}" if _FORMULA.match(value) or _FORMULA.match(text) else text


def read_table(path: Path, texts: Collection[str] = TEXTS) -> pd.DataFrame:
    """Reads what ``write_table`` wrote, or an earlier version.

    Args:
        path: Of the table.
        texts: Its columns that hold no numbers.

    Returns:
        Texts as str ("" where there is none), all other columns as numbers; columns have their
        present names.

    Raises:
        UserError: It is missing or damaged; the message names it.
    """
    try:
        text = path.read_bytes().decode("utf-8")
        # pandas would read a class "NA" as missing, and round the last digit of numbers.
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except OSError as error:
        raise UserError(f"table {str(path)!r} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"table {str(path)!r} is damaged: {error}") from error
    titles = [_without_quote(name) for name in rows[0]] if rows else []
    if bad := [n for n, row in enumerate(rows, 1) if row and len(row) != len(titles)]:
        raise UserError(f"table {str(path)!r} is damaged in row {bad[0]}")
    if len(set(titles)) != len(titles):
        raise UserError(f"table {str(path)!r} is damaged: it names a column twice")
    named = ["run" if title == OLD_NAMES["run"] else spelled_today(title) for title in titles]
    columns: dict[str, Any] = {
        name: [row[n] for row in rows[1:] if row] for n, name in enumerate(named)
    }
    for name, values in columns.items():
        if name in texts:
            columns[name] = pd.Series([_without_quote(value) for value in values], dtype=object)
            continue
        try:
            numbers = pd.Series([float(v or "nan") for v in values], dtype=float)
        except ValueError as error:
            raise UserError(f"table {str(path)!r} is damaged: column {name!r}: {error}") from error
        is_whole = name in WHOLE and bool((numbers % 1 == 0).all())
        columns[name] = numbers.astype(int) if is_whole else numbers
    return pd.DataFrame(columns)


def _without_quote(text: str) -> str:
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text
