"""DyDiLA's fused kernels with a layer's parameters (arXiv 2601.13683)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.precision import autocast_operands
from attnzoo.ops.token_difference import Weights, dynamic_differential_attention, unserved

_SERVED: dict[str, Any] = {
    "projection": "redundancy", "kernel": "routed", "differential": "token",
    "normalizer": "base", "balance_coefficient": 0,
}  # fmt: skip


def unserved_option(layer: Any) -> str | None:
    """The first option of the layer that the kernels do not serve, or None."""
    config = layer.config
    for name, value in _SERVED.items():
        if getattr(config, name) != value:
            return f"{name}={getattr(config, name)!r}"
    most = max(config.n_projectors, config.n_kernel_factors, config.n_differential_factors)
    return unserved(layer.dim, layer.num_heads, most)


def fused_forward(layer: Any, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """What the layer computes of tokens, (b, h * w, dim) -> (b, h * w, dim), by the kernels."""
    config, sides = layer.config, ("query", "key")
    x, weight = autocast_operands(x, layer.shared.weight)
    bias = None if layer.shared.bias is None else layer.shared.bias.to(x.dtype)
    query, key, value = F.linear(x, weight, bias).split(layer.dim, dim=-1)

    def cast(*weights: Tensor) -> list[Tensor]:
        return [z if z.dtype is x.dtype else z.to(x.dtype) for z in weights]

    weights = Weights(
        projector_routers=cast(*(layer.projector_routers[z].weight for z in sides)),
        projectors=cast(*(layer.projectors[z] for z in sides)),
        kernel_routers=cast(*(router.weight for router in layer.kernel_routers.values())),
        gammas=layer.gammas().expand(4, -1),
        difference_routers=cast(*(layer.differential_routers[z].weight for z in sides)),
        lambdas=layer.lambda_.expand(2, -1),
    )
    out = dynamic_differential_attention(
        x, query, key, value, weights, config.eps, config.router_gradient == "ste",
        layer.num_heads, impl="triton",
    )  # fmt: skip
    return layer.proj(out if layer.conv is None else layer.conv(value, grid, out))
