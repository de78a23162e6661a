"""Token-wise DyDiLA composed from routing, power map and linear core."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from attnzoo.ops.dispatch import Impl
from attnzoo.ops.power_map import power_map
from attnzoo.ops.routed_linear import (
    RouterGradient,
    decide,
    gated,
    pick,
    routed_linear,
)
from attnzoo.ops.token_difference.operands import Weights


def focused_difference(
    tokens: Tensor,
    redundant: Tensor,
    kernel_routers: Sequence[Tensor],
    gammas: Tensor,
    difference_router: Tensor,
    lambdas: Tensor,
    gradient: RouterGradient,
    impl: Impl = "reference",
) -> tuple[Tensor, Tensor]:
    """phi(Z) - lambda phi(Z'), and phi(Z); phi is the power map whose power a token chooses."""
    powered = []
    for z, router, powers in zip((tokens, redundant), kernel_routers, gammas, strict=True):
        gamma, _ = pick(router, [z], powers, gradient, impl)
        powered.append(power_map(z, gamma, impl=impl))
    factor, _ = pick(difference_router, powered, lambdas, gradient, impl)
    return powered[0] - factor * powered[1], powered[0]


def dynamic_differential_attention(
    x: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Weights,
    eps: float,
    learn: bool,
    heads: int,
    impl: Impl = "reference",
) -> Tensor:
    """See ``attnzoo.ops.token_difference``."""
    gradient: RouterGradient = "ste" if learn else "none"
    gammas, lambdas = weights.gammas.expand(4, -1), weights.lambdas.expand(2, -1)
    sides = []
    for i, shared in enumerate((query, key)):
        chosen = decide(weights.projector_routers[i], [x], gradient)
        prime = routed_linear(x, weights.projectors[i], chosen.index, impl=impl)
        prime = gated(prime, chosen, gradient, impl=impl)
        sides.append(focused_difference(
            shared, prime, weights.kernel_routers[i::2], gammas[i::2],
            weights.difference_routers[i], lambdas[i], gradient, impl,
        ))  # fmt: skip
    (query, base), (key, key_base) = (
        [z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in side] for side in sides
    )
    value = value.unflatten(-1, (heads, -1)).transpose(1, 2)
    norm = base @ key_base.sum(-2).unsqueeze(-1) + eps
    return (query @ key.mT @ value / norm).transpose(1, 2).flatten(2)
