"""Functions that PyTorch sees as one node each, and how much each of them multiplies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

# Multiply-accumulates by operator, of its arguments; the packages of the operators state them.
MACS: dict[str, Callable[..., int]] = {}


def custom_op(
    name: str, *, schema: str | None = None, device_types: str | None = None
) -> Callable[[Callable[..., Any]], Any]:
    """Makes a function the operator ``attnzoo::NAME``, which torch's own counter knows too."""

    def flops(*args: Any, **kwargs: Any) -> int:
        return 2 * MACS[name](*args, **kwargs) if name in MACS else 0

    def register(function: Callable[..., Any]) -> Any:
        found = torch.library.custom_op(
            f"attnzoo::{name}", function, mutates_args=(), device_types=device_types, schema=schema
        )
        register_flop_formula(getattr(torch.ops.attnzoo, name), get_raw=True)(flops)
        return found

    return register
