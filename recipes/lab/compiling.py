"""Whether a run compiles its model's blocks, and what it does where that fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

import attnzoo
from backbones import DiT
from backbones.recorded import compile_blocks, uncompile_blocks
from recipes.lab import failures

# Compiling takes about a minute; a call of a small model saves some ten milliseconds by it.
_CALLS_TO_PAY = 5000

Result = TypeVar("Result")


def pays(model: DiT, calls: int) -> bool:
    """Whether so many calls of a model win back the time that compiling takes."""
    return calls >= _CALLS_TO_PAY and next(model.parameters()).device.type == "cuda"


class Compiling:
    """Compiles the blocks of a model if that is wanted.

    Args:
        model: The model.
        mode: "on"; "off"; or "auto", if it pays and as long as the first call works.
        calls: How often the model will be called.
        say: Gets in one line why "auto" has gone back to the blocks as they are written.
        **options: Of ``compile_blocks``.

    Attributes:
        is_on: Whether the blocks are compiled.
    """

    def __init__(
        self, model: DiT, mode: str, calls: int, say: Callable[[str], Any], **options: Any
    ) -> None:
        self._model, self._say = model, say
        self.is_on = mode == "on" or (mode == "auto" and pays(model, calls))
        self._may_give_up = self.is_on and mode == "auto"
        if self.is_on:
            compile_blocks(model, **options)

    def attempt(self, call: Callable[[], Result], undo: Callable[[], Any] | None = None) -> Result:
        """``call()``, repeated with the blocks as they are written if it is the first and fails.

        Args:
            call: Calls the model.
            undo: What it may have done has to be undone before it is repeated.
        """
        try:
            result = call()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if failures.is_echo(error) or not self.gives_up(str(error)):
                raise
            if undo is not None:
                undo()
            result = call()
        self._may_give_up = False
        return result

    def gives_up(self, reason: str) -> bool:
        """Goes back to the blocks as they are written, if it may; whether it did."""
        if not self._may_give_up:
            return False
        self.is_on = self._may_give_up = False
        uncompile_blocks(self._model)
        attnzoo.auxiliary_loss(self._model)  # of a forward that broke off
        self._say(f"blocks are not compiled: {' '.join(reason.split())[:200]}")
        return True
