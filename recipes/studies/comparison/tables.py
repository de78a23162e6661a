"""Tables of a comparison as CSV, HTML and Markdown: what users name is text in all of them."""

from __future__ import annotations

import csv
import html
import io
import re
from pathlib import Path
from typing import Any

import pandas as pd

from recipes.lab.console import UserError, one_line
from recipes.lab.files import write_text

TEXTS = (
    "data", "level", "protocol", "variant", "attn", "options", "cell", "state", "error", "device",
    "torch", "evaluator", "metric",
)  # fmt: skip
WHOLE = ("resolution", "steps", "batch_size", "samples", "seed", "seeds", "classes", "count")
# A spreadsheet takes a cell that begins so for a formula; an apostrophe before it makes it text.
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


def read_table(path: Path) -> pd.DataFrame:
    """Reads what ``write_table`` wrote, or an earlier version.

    Returns:
        Texts as str ("" where there is none), all other columns as numbers.

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
    frame = pd.DataFrame([row for row in rows[1:] if row], columns=titles, dtype=object)
    for name in frame.columns:
        if name in TEXTS:
            frame[name] = frame[name].map(_without_quote)
            continue
        try:
            frame[name] = [float(value) if value else float("nan") for value in frame[name]]
        except ValueError as error:
            raise UserError(f"table {str(path)!r} is damaged: column {name!r}: {error}") from error
        if name in WHOLE and (frame[name] % 1 == 0).all():
            frame[name] = frame[name].astype(int)
    return frame


def _without_quote(text: str) -> str:
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def as_html(text: Any) -> str:
    """Text that HTML shows as it is, also inside an attribute."""
    return html.escape(one_line(str(text)))


def as_markdown(text: Any) -> str:
    """Text that a page of Markdown shows as it is, also inside a table; keeps line breaks."""
    lines = [html.escape(one_line(line), quote=False) for line in str(text).split("\n")]
    return "<br>".join(re.sub(r"([|`\\*])|(?<=\])(\()", r"\\\g<0>", line) for line in lines)
