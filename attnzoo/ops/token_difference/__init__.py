"""Token-wise DyDiLA (arXiv 2601.13683): routed projections and powers, differences, linear core.

Every token's Q', K' are projected by matrices it chooses, Q, K, Q', K' sharpened by powers it
chooses, and Q - lambda Q', K - lambda K' multiplied with V, over phi(Q) . sum phi(K).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnzoo.ops.dispatch import MACS, Impl, choose
from attnzoo.ops.token_difference.operands import Operands, Weights

# Of one router; with more, its matrix leaves no shared memory for the tokens.
MOST_CHOICES = 64


def dynamic_differential_attention(
    x: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Weights,
    eps: float,
    learn: bool = True,
    heads: int = 1,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Token-wise DyDiLA, normalized by phi(Q) . sum phi(K), without convolution.

    Args:
        x: (b, n, d).
        query: Q, (b, n, d); may be a slice of a wider tensor, as may K and V.
        key: K, likewise.
        value: V, likewise.
        weights: The parameters.
        eps: Added to the normalizers.
        learn: Whether routers get the straight-through gradient of "ste".
        heads: Parts of equal width; for the kernels a multiple of 16 where there are several.
        impl: "torch" and "reference" compose it from the other operators.

    Returns:
        (b, n, d).
    """

    def limits() -> str | None:
        choices = *weights.projector_routers, *weights.kernel_routers, *weights.difference_routers
        return unserved(x.shape[-1], heads, max(router.shape[0] for router in choices))

    chosen = choose("token_difference", impl, x, x.dtype, limits)
    if chosen == "triton":
        from attnzoo.ops.token_difference import triton

        return triton.dynamic_differential_attention(
            x, query, key, value, weights, eps, learn, heads
        )
    from attnzoo.ops.token_difference import reference

    return reference.dynamic_differential_attention(
        x, query, key, value, weights, eps, learn, heads, chosen
    )


def unserved(width: int, heads: int, choices: int) -> str | None:
    """The first limit of the kernels that these sizes exceed, or None."""
    if choices > MOST_CHOICES:
        return f"{choices} choices of a router, more than {MOST_CHOICES}"
    is_served = heads == 1 or width // heads % 16 == 0
    return None if is_served else f"heads of width {width // heads}"


def _forward_macs(*args: Any, **_: Any) -> int:
    p = Operands(*args)
    routers = p.r1.numel() + p.r2.numel() + p.rd.numel()
    return p.z1.shape[0] * p.z1.shape[1] * routers + (0 if p.key_sum is None else p.z1.numel())


def _backward_macs(
    grad: Tensor, grad_sum: Any, stats: Any, choices: Any, probability: Any, *args: Any, **_: Any
) -> int:  # fmt: skip
    # What is computed again is not counted, as nowhere.
    p = Operands(*args)
    normalizer = 0 if p.key_sum is None else p.z1.numel()
    return 2 * (_forward_macs(*args) if p.learn else normalizer)


MACS |= {
    "focused_difference": _forward_macs,
    "focused_difference_backward": _backward_macs,
}
