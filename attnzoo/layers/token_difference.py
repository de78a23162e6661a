"""DyDiLA's fused kernels with a layer's parameters (arXiv 2601.13683)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.layers.linear_attention import linear
from attnzoo.ops.precision import operand_dtype
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
    config, projectors = layer.config, layer.projectors
    if not torch.is_grad_enabled():  # one cast for all; gradients are added before theirs
        dtype = operand_dtype(x)
        x = x if x.dtype is dtype else x.to(dtype)
    query, key, value = linear(layer.shared, x).chunk(3, dim=-1)
    x = x if x.dtype is query.dtype else x.to(query.dtype)  # by autocast
    modules = layer.projector_routers, layer.kernel_routers, layer.differential_routers
    # Looking up a module's weight takes a host as long as a view.
    routers = [router.weight for some in modules for router in some._modules.values()]
    cast = [
        z if z.dtype is x.dtype else z.to(x.dtype)
        for z in (projectors.query, projectors.key, *routers)
    ]
    weights = Weights(
        projectors=cast[:2],
        projector_routers=cast[2:4],
        kernel_routers=cast[4:8],
        difference_routers=cast[8:],
        gammas=layer.gammas(),
        lambdas=layer.lambda_,
    )
    operands = x, query, key, value, weights, config.eps, config.router_gradient == "ste"
    if config.impl == "auto":  # which has found them able
        from attnzoo.ops.token_difference import triton

        out = triton.dynamic_differential_attention(*operands, layer.num_heads)
    else:
        out = dynamic_differential_attention(*operands, layer.num_heads, impl="triton")
    conv = layer.conv
    return linear(layer.proj, out if conv is None else conv(value, grid, out))
