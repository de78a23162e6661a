"""Map-wise DyDiLA composed from routing, power map and linear core."""

from __future__ import annotations

from torch import Tensor

from attnzoo.ops.dispatch import Impl
from attnzoo.ops.linear_core import linear_attention
from attnzoo.ops.power_map import power_map
from attnzoo.ops.routed_linear import RouterGradient, decide, gated, pick, routed_linear
from attnzoo.ops.token_difference import Weights


def dynamic_map_attention(
    x: Tensor, query: Tensor, key: Tensor, value: Tensor, weights: Weights, eps: float,
    learn: bool, impl: Impl = "reference",
) -> Tensor:  # fmt: skip
    """See ``attnzoo.ops.map_difference``."""
    gradient: RouterGradient = "ste" if learn else "none"
    tokens = [query, key]
    for router, projectors in zip(weights.projector_routers, weights.projectors, strict=True):
        chosen = decide(router, [x], gradient)
        prime = routed_linear(x, projectors, chosen.index, impl=impl)
        tokens.append(gated(prime, chosen, gradient, impl=impl))
    for i, router in enumerate(weights.kernel_routers):
        gamma, _ = pick(router, [tokens[i]], weights.gammas[0], gradient, impl)
        tokens[i] = power_map(tokens[i], gamma, impl=impl)
    router, lambdas = weights.difference_routers[0], weights.lambdas[0]
    factor, _ = pick(router, tokens[::2], lambdas, gradient, impl)
    core: Impl = "reference" if impl == "reference" else "torch"
    maps = [linear_attention(tokens[i], tokens[i + 1], value, eps, impl=core) for i in (0, 2)]
    return maps[0] - factor.to(maps[1].dtype) * maps[1]
