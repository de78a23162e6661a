"""Optional packages, which may be missing, broken, or made for other versions."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from attnzoo.errors import Unavailable

# What a package may raise while it is imported or called; a keyboard's interrupt is not its own.
ANYTHING = (Exception, SystemExit)


def load(module: str, attribute: str | None = None) -> Any:
    """A module of an optional package, or what it holds under a name.

    Raises:
        ImportError: It cannot be imported, whatever that raised, or does not hold the name.
    """
    try:
        found = importlib.import_module(module)
        return found if attribute is None else getattr(found, attribute)
    except ANYTHING as error:
        raise ImportError(reason(error)) from error


def reason(error: BaseException) -> str:
    """The first line that an error says, with its kind where that tells more."""
    try:
        said = str(error)
    except Exception:  # a broken package may have broken errors
        said = ""
    line = next((line.strip() for line in said.splitlines() if line.strip()), "")
    if line and isinstance(error, ImportError | NotImplementedError):
        return line
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def failure(call: Callable[[], Any]) -> str | None:
    """None if a call succeeds, or else why it does not."""
    try:
        call()
    except Unavailable as error:
        return str(error)
    except ANYTHING as error:
        return reason(error)
    return None
