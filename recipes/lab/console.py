"""What the scripts say to a person: one-line errors, option values, exit codes."""

from __future__ import annotations

import argparse
import ast
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

DONE, USER_ERROR, NON_FINITE, DATA_BUDGET, INTERRUPTED = 0, 2, 3, 4, 75
STOPPED_BY_HAND, PIPE_CLOSED = 130, 141  # as a shell reports SIGINT and SIGPIPE


class UserError(ValueError):
    """Something the caller can put right; the message is one line that says how.

    Attributes:
        is_shared: Whether every process raises it, so that one has to say it.
    """

    is_shared = False


def run_script(main: Callable[[list[str]], int]) -> NoReturn:
    """Runs ``main`` on the command line and ends the process.

    A mistake of the caller (``UserError``, or a ``UsageError`` of attnzoo) becomes one line and
    exit status 2, Ctrl-C one line and 130; a reader that closes the pipe (``| head``) ends the
    script quietly. Everything else is a bug and shows its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # the C locale cannot print "µ" and a user's names
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it can", file=sys.stderr)
        status = STOPPED_BY_HAND
    except BrokenPipeError:
        # The interpreter would fail again when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = PIPE_CLOSED
    except Exception as error:
        if not is_users_mistake(error):
            raise
        rank = os.environ.get("RANK", "0")
        if rank == "0" or not getattr(error, "is_shared", False):
            where = "" if rank == "0" else f" in process {rank}"
            print(f"error{where}: {printable(str(error))}", file=sys.stderr)
        status = USER_ERROR
    if "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized():
        # gloo's threads can abort the interpreter while it shuts down, after all work is done.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def is_users_mistake(error: BaseException) -> bool:
    """Whether an error is one the caller can put right, of this package or of attnzoo."""
    errors = sys.modules.get("attnzoo.errors")  # --help must not import torch
    return isinstance(error, UserError) or (
        errors is not None and isinstance(error, errors.UsageError)
    )


def printable(text: str) -> str:
    """The text with control characters escaped: a name must not drive the terminal."""
    return "".join(
        c if c in "\n\t" or (c.isprintable() and not "\ud800" <= c <= "\udfff")
        else c.encode("unicode_escape").decode("ascii")
        for c in text
    )  # fmt: skip


class user_errors:
    """Turns the ValueError and TypeError of a set-up phase into ``UserError``."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, ValueError | TypeError | OSError) and not isinstance(
            error, UserError
        ):
            raise UserError(" ".join(str(error).split())) from error


def parse_options(pairs: Iterable[str]) -> dict[str, Any]:
    """Parses ``option=value`` pairs; values are Python literals, or else plain strings.

    Raises:
        UserError: A pair has no ``=``.
    """
    options = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise UserError(f"--set takes option=value, got {pair!r}")
        # "none" stays a word: it is a value of many options; None is Python's.
        lowered = {"true": True, "false": False}
        try:
            value = lowered[text.lower()] if text.lower() in lowered else ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        options[name] = value
    return options


def whole(minimum: int) -> Callable[[str], int]:
    """An argparse type: an integer of at least ``minimum``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {value}")
        return value

    return parse


def numbers(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """An argparse type: a comma-separated list."""

    def parse(text: str) -> list[Any]:
        try:
            return [kind(part) for part in text.split(",") if part.strip()]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list like 1,2,3") from None

    return parse
