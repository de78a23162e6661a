"""Map-wise DyDiLA (arXiv 2601.13683, Eq. 10): the difference of two linear attention maps.

Every token's Q', K' are projected by matrices it chooses, Q, K, Q', K' sharpened by powers it
chooses, and lambda times the map of (Q', K') is subtracted from that of (Q, K), each over its sum.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnzoo.ops.dispatch import MACS, Impl, choose
from attnzoo.ops.linear_core import linear_attention_macs
from attnzoo.ops.map_difference.operands import Operands
from attnzoo.ops.token_difference import Weights
from attnzoo.ops.token_difference import unserved as unserved_routers

# Of a token, which the kernels hold in registers.
WIDEST = 2048


def dynamic_map_attention(
    x: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Weights,
    eps: float,
    learn: bool = True,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Map-wise DyDiLA of one head, each map over its own sum, without convolution.

    Args:
        x: (b, n, d).
        query: Q, (b, n, d); may be a slice of a wider tensor, as may K and V.
        key: K, likewise.
        value: V, likewise.
        weights: The parameters; one set of exponents, one of lambdas, and the one difference
            router, which reads queries.
        eps: Added to the normalizers.
        learn: Whether routers get the straight-through gradient of "ste".
        impl: "torch" and "reference" compose it from the other operators.

    Returns:
        (b, n, d).
    """

    def limits() -> str | None:
        choices = *weights.projector_routers, *weights.kernel_routers, *weights.difference_routers
        return unserved(x.shape[-1], 1, max(router.shape[0] for router in choices))

    chosen = choose("map_difference", impl, x, x.dtype, limits)
    operands = x, query, key, value, weights, eps, learn
    if chosen == "triton":
        from attnzoo.ops.map_difference import triton

        return triton.dynamic_map_attention(*operands)
    from attnzoo.ops.map_difference import reference

    return reference.dynamic_map_attention(*operands, chosen)


def unserved(width: int, heads: int, choices: int) -> str | None:
    """The first limit of the kernels that these sizes exceed, or None."""
    if heads > 1:
        return f"{heads} heads"
    if width > WIDEST:
        return f"tokens of width {width}, more than {WIDEST}"
    return unserved_routers(width, heads, choices)


def _of_routers(p: Operands) -> int:
    routers = p.query_router, p.prime_query_router, p.key_router, p.prime_key_router, p.rd
    return p.query[..., 0].numel() * sum(router.numel() for router in routers)


def _of_maps(p: Operands) -> int:
    # Map by map; side by side they share a product with V where tokens are few.
    b, n, d = p.query.shape
    return 2 * b * linear_attention_macs(n, n, d, d)


def _backward_macs(*args: Any, **_: Any) -> int:
    p = Operands(*args[-len(Operands._fields) :])
    return 2 * (_of_maps(p) + (_of_routers(p) if p.learn else 0))


MACS |= {
    "map_attention": lambda *args, **_: _of_routers(Operands(*args)) + _of_maps(Operands(*args)),
    "map_attention_backward": _backward_macs,
}
