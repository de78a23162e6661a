"""RMSNorm over each head, times a gate: what follows the scans of gated linear attention."""

from __future__ import annotations

from torch import Tensor

from attnzoo.ops.dispatch import Impl, operator


@operator
def gated_norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, *, impl: Impl = "auto"
) -> Tensor:
    """RMSNorm(x) * SiLU(gate), the norm over each head, as tokens.

    Args:
        x: (b, n, h, d).
        gate: Likewise.
        weight: (d,), of the norm.
        eps: Of the norm.
        impl: See ``attnzoo.ops.dispatch``.

    Returns:
        (b, n, h * d), in the dtype of ``gate``.
    """
    ...
