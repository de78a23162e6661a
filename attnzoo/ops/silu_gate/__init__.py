"""The product with the SiLU of a gate, of one tensor or of a sum of two."""

from __future__ import annotations

from torch import Tensor

from attnzoo.ops.dispatch import Impl, operator


@operator
def silu_gate(
    x: Tensor, gate: Tensor, other: Tensor | None = None, *, impl: Impl = "auto"
) -> Tensor:
    """(x + other) * SiLU(gate), in float32.

    Args:
        x: (b, n, c).
        gate: (b, n, c).
        other: (b, n, c), or None.
        impl: See ``attnzoo.ops.dispatch``.

    Returns:
        (b, n, c), in the dtype of ``gate``.
    """
    ...
