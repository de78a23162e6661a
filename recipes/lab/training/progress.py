"""What a run says while it trains: lines, and how far it is."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import TextIO

from tqdm.auto import tqdm

from recipes.lab.console import abandon

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Lines on stdout; on stderr a bar, or a line at times where no terminal shows a bar.

    ``TQDM_DISABLE`` silences how far the run is, not what it says. An output that can no longer
    be written is given up, so that training never dies of it.

    Args:
        name: Of the run.
        steps: Where it ends.
        is_main: Whether this process speaks.

    Attributes:
        is_deserted: Whether a reader has closed the pipe, as ``| head`` does.
    """

    def __init__(self, name: str, steps: int, is_main: bool) -> None:
        self.name, self.steps = name, steps
        self.is_main = is_main
        self.is_deserted = False
        self._bar: tqdm | None = None
        self._last_line = time.monotonic()
        is_off = os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false")
        self._shows = is_main and not is_off

    def say(self, text: str) -> None:
        """Writes lines to stdout."""
        if not self.is_main:
            return
        with self._guarded(sys.stderr):
            if self._bar is not None:
                self._bar.clear()
        with self._guarded(sys.stdout):
            print(text, flush=True)
        with self._guarded(sys.stderr):
            if self._bar is not None:
                self._bar.refresh()

    def start(self, done: int) -> None:
        """Begins to show how far the run is, ``done`` steps."""
        if self._shows and sys.stderr is not None and sys.stderr.isatty():
            with self._guarded(sys.stderr):
                self._bar = tqdm(total=self.steps, initial=done, desc=self.name, unit="step")

    def advance(self, step: int, note: str) -> None:
        """Shows that ``step`` is done, and how it went."""
        if self._bar is not None:
            with self._guarded(sys.stderr):
                self._bar.set_postfix_str(note, refresh=False)
                self._bar.update()
            return
        now = time.monotonic()
        if self._shows and now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            with self._guarded(sys.stderr):
                text = f"{self.name}: step {step} of {self.steps}, {note}"
                print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            with self._guarded(sys.stderr):
                self._bar.close()
            self._bar = None

    @contextlib.contextmanager
    def _guarded(self, stream: TextIO) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.is_deserted = self.is_deserted or isinstance(error, BrokenPipeError)
            abandon(stream)
