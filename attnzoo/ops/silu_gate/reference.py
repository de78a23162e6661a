"""The gate as it is written."""

from __future__ import annotations

from torch import Tensor

from attnzoo.ops.precision import in_float32


def silu_gate(x: Tensor, gate: Tensor, other: Tensor | None = None) -> Tensor:
    """See ``attnzoo.ops.silu_gate``."""
    return _product(gate, x, other)


@in_float32
def _product(gate: Tensor, x: Tensor, other: Tensor | None) -> Tensor:
    total = x if other is None else x + other
    return total * gate * gate.sigmoid()
