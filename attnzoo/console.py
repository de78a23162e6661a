"""How ``python -m`` prints: into a closed pipe, and where an encoding lacks a character."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

Result = TypeVar("Result")


def printing(main: Callable[[], Result]) -> Result:
    """Runs ``main``; a reader that stops reading ends it without a traceback, with status 141."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        result = main()
        sys.stdout.flush()
        return result
    except BrokenPipeError:
        # The interpreter flushes what is left once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows as columns to read: the first ``left`` begin alike, the others end alike."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
