"""Feature fixation between its projections: the neighbors' channels, gated features, the core."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnzoo.ops.dispatch import MACS, Impl, operator
from attnzoo.ops.fixation_core.torch import fixed, shifted
from attnzoo.ops.linear_core import linear_attention_macs
from attnzoo.ops.precision import operand_dtype

WIDEST = 128  # bytes of a token's head, in the kernels

__all__ = ["fixation_core", "fixed", "shifted", "unserved"]


def unserved(qkv: Tensor, weight: Tensor, *_: Any) -> str | None:
    """What the Triton kernels do not serve; ``qkv`` tells no more than the type."""
    if weight.shape[1] != 3 * weight.shape[0]:
        return "two gates"
    is_wide = len(weight) * operand_dtype(qkv).itemsize > WIDEST
    return f"heads of width {len(weight)}" if is_wide else None


@operator
def fixation_core(
    qkv: Tensor,
    weight: Tensor,
    bias: Tensor,
    heads: int,
    grid: tuple[int, int],
    is_shifted: bool,
    eps: float,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Linear attention of gated features, whose gate sees query, key and value of a head.

    With q = ReLU(Q) + 1 / sqrt(d), k likewise and g = sigmoid(W [q; k; V] + b), a head gives
    (g q) ((g k)^T V) / ((g q) sum_j (g k)_j^T + eps).

    Args:
        qkv: (b, h * w, 3 * c), queries, keys and values side by side.
        weight: W, (d, 3 * d), or (2 * d, 3 * d) with a second gate, of the keys.
        bias: b, (d,) or (2 * d,).
        heads: c = heads * d.
        grid: (h, w).
        is_shifted: Whether keys and values come ``shifted``.
        eps: Added to the normalizer.
        impl: See ``attnzoo.ops.dispatch``.

    Returns:
        (b, h * w, c).
    """
    ...


def _macs(qkv: Tensor, weight: Tensor, bias: Any, heads: int, *_: Any, **__: Any) -> int:
    b, n, c = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    d = c // heads
    return b * heads * (n * weight.numel() + linear_attention_macs(n, n, d, d))


MACS |= {
    "fixation_core": _macs,
    "fixation_core_backward": lambda *operands, **_: 2 * _macs(*operands[3:]),
}
