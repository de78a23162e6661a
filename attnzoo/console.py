"""How ``python -m`` prints: into a closed pipe, and where an encoding lacks a character."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable


def printing(main: Callable[[], None]) -> None:
    """Runs ``main``; a reader that stops reading ends it without a traceback, with status 141."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes what is left once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
