"""Token-wise DyDiLA made of the fused operators."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from attnzoo.ops.fused.difference import focused_difference
from attnzoo.ops.fused.products import half_kernel_product, half_matmul
from attnzoo.ops.fused.routing import routed_pair


def dynamic_differential_attention(
    x: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projector_routers: Sequence[Tensor],
    projectors: Sequence[Tensor],
    kernel_routers: Sequence[Tensor],
    gammas: Tensor,
    difference_routers: Sequence[Tensor],
    lambdas: Tensor,
    eps: float,
    learn: bool = True,
    heads: int = 1,
) -> Tensor:
    """Token-wise DyDiLA, normalised by phi(Q) . sum phi(K), without convolution.

    Queries leave their kernel divided by their normalisers, so that plain products are left.

    Args:
        x: (b, n, d).
        query: Q, (b, n, d); may be a slice of a wider tensor, as may K and V.
        key: K, likewise.
        value: V, likewise.
        projector_routers: Of Q' and K', (projectors, d) each.
        projectors: Of Q' and K', (projectors, d, d) each.
        kernel_routers: Of Q, K, Q', K', (factors, d) each.
        gammas: Exponents of Q, K, Q', K', (4, factors).
        difference_routers: Of queries and of keys, (factors', 2 d) each.
        lambdas: Of queries and of keys, (2, factors').
        eps: Added to the normalisers.
        learn: Whether routers get the straight-through gradient of "ste".
        heads: See ``focused_difference``.

    Returns:
        (b, n, d).
    """
    primes, _, gates = routed_pair(x, projector_routers, projectors)
    query_prime, key_prime = primes.unbind(0)
    key, key_sum = focused_difference(
        key, key_prime, kernel_routers[1::2], gammas[1::2], difference_routers[1], lambdas[1],
        gates[1], learn=learn,
    )  # fmt: skip
    query, _ = focused_difference(
        query, query_prime, kernel_routers[::2], gammas[::2], difference_routers[0], lambdas[0],
        gates[0], key_sum, eps, learn, heads,
    )  # fmt: skip
    query, key, value = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in (query, key, value))
    if query.shape[2] < query.shape[3]:  # the n x n weights are the smaller product
        out = half_matmul(half_matmul(query, key.mT, is_wide=False), value, is_wide=False)
    else:
        out = half_kernel_product(query, key, value)
    return out.transpose(1, 2).flatten(2)
