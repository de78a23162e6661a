"""MALA and RALA between their projections: ELU features, rotary positions, convolution of V."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnzoo.ops.dispatch import MACS, Impl, operator
from attnzoo.ops.linear_core import linear_attention_macs

WIDEST = 64  # channels of a head, in the kernels


def unserved(
    qkv: Tensor, gate: Any, weight: Tensor | None, bias: Any, heads: int, *_: Any
) -> str | None:
    """What the Triton kernels do not serve."""
    width = int(qkv.shape[-1]) // (3 * heads)
    if width > WIDEST:
        return f"heads of width {width}"
    if weight is not None and weight.shape[-1] not in (3, 5):
        return f"kernels of {tuple(weight.shape[2:])}"
    return None


@operator
def rotary_core(
    qkv: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    heads: int,
    grid: tuple[int, int],
    is_rotated: bool,
    is_weighed: bool,
    eps: float,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """MALA's or RALA's attention of ELU(Q) + 1 and ELU(K) + 1, and a convolution of V, gated.

    With z_i = d_head^-1/2 phi(Q_i) mean_j phi(K_j)^T and rotated features phi~, token i is
    d_head^-1/2 (1 + 1 / (z_i + eps)) phi~(Q_i) mean_j phi~(K_j)^T V_j - z_i mean_j V_j. With
    ``is_weighed``, of keys k_j = n softmax_j(d_head^-1/2 mean_i phi(Q_i) phi(K_j)^T) phi(K_j), it
    is phi~(Q_i) sum_j k~_j^T V_j / (phi(Q_i) sum_j k_j^T + n eps).

    Args:
        qkv: (b, h * w, 3 * c), queries, keys and values side by side.
        gate: (b, h * w, c), what the sum of both is multiplied by.
        weight: (c, 1, 3, 3) or (c, 1, 5, 5) of the convolution, or None if there is none.
        bias: (c,) of the convolution, or None.
        heads: They divide c.
        grid: (h, w).
        is_rotated: Whether products see the features turned by their position; see ``rotated``.
        is_weighed: Whether it is RALA's.
        eps: Added to z, or to the mean over the keys.
        impl: See ``attnzoo.ops.dispatch``.

    Returns:
        (b, h * w, c).
    """
    ...


def _macs(
    qkv: Tensor, gate: Any, table: Any, weight: Tensor | None, bias: Any, heads: int, height: int,
    width: int, is_weighed: bool, *_: Any, **__: Any,
) -> int:  # fmt: skip
    b, n, c = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    taps = 0 if weight is None else weight.shape[-1] ** 2
    core = heads * linear_attention_macs(n, n, c // heads, c // heads)
    return b * (core + n * c * (taps + is_weighed))


MACS |= {
    "rotary_core": _macs,
    "rotary_core_backward": lambda *operands, **_: 2 * _macs(*operands[6:]),
}
