"""DyDiLA's fused kernels with a layer's parameters (arXiv 2601.13683)."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnzoo.layers.depthwise_conv import DepthwiseConv
from attnzoo.layers.linear import linear_beside
from attnzoo.ops.dispatch import (
    choose_once,
    is_inference,
    is_watched,
    is_without_kernels,
    linear,
)
from attnzoo.ops.linear_core import linear_tokens, slower
from attnzoo.ops.map_difference import dynamic_map_attention
from attnzoo.ops.map_difference import unserved as unserved_maps
from attnzoo.ops.precision import operand_dtype
from attnzoo.ops.routed_linear import by_ones
from attnzoo.ops.token_difference import Weights, dynamic_differential_attention, unserved

_SERVED: dict[str, Any] = {
    "projection": "redundancy", "kernel": "routed", "normalizer": "base",
    "balance_coefficient": 0,
}  # fmt: skip


def unserved_option(layer: Any) -> str | None:
    """The first option of the layer that the kernels do not serve, or None."""
    config = layer.config
    for name, value in _SERVED.items():
        if getattr(config, name) != value:
            return f"{name}={getattr(config, name)!r}"
    is_map = config.differential == "map"
    if config.differential == "none" or (is_map and config.map_router != "token"):
        name = "map_router" if is_map else "differential"
        return f"{name}={getattr(config, name)!r}"
    most = max(config.n_projectors, config.n_kernel_factors, config.n_differential_factors)
    limits = unserved_maps if is_map else unserved
    return limits(layer.dim, layer.num_heads, most)


def fused_forward(layer: Any, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """What the layer computes of tokens, (b, h * w, dim) -> (b, h * w, dim), by the kernels."""
    config = layer.config
    if config.impl == "auto" and is_inference():  # which has found them able
        return _inferred(layer, x, grid)
    if not torch.is_grad_enabled():  # one cast for all; gradients are added before theirs
        dtype = operand_dtype(x)
        x = x if x.dtype is dtype else x.to(dtype)
    is_packed = _is_packed(layer, x)
    qkv, x = linear_beside(layer.shared, x) if is_packed else (linear(layer.shared, x), x)
    x = x if x.dtype is qkv.dtype else x.to(qkv.dtype)  # by autocast
    cast = [z if z.dtype is x.dtype else z.to(x.dtype) for z in _weights(layer)]
    weights = Weights(
        projector_routers=cast[:2],
        projectors=cast[2:4],
        kernel_routers=cast[4:8],
        difference_routers=cast[8:],
        gammas=layer.gammas(),
        lambdas=layer.lambda_,
    )
    learn = config.router_gradient == "ste"
    if is_packed:
        return linear(layer.proj, _packed(layer, x, qkv, weights, learn, grid))
    query, key, value = qkv.chunk(3, dim=-1)
    operands = x, query, key, value, weights, config.eps, learn
    if config.differential == "map":
        out = dynamic_map_attention(*operands, impl="triton")
    elif config.impl == "auto":  # which has found them able
        from attnzoo.ops.token_difference import triton

        out = triton.dynamic_differential_attention(*operands, layer.num_heads)
    else:
        out = dynamic_differential_attention(*operands, layer.num_heads, impl="triton")
    conv = layer.conv
    return linear(layer.proj, out if conv is None else conv(value, grid, out))


def _inferred(layer: Any, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """``fused_forward`` without gradients: between the projections only launches are left."""
    dtype = operand_dtype(x)
    x = x if x.dtype is dtype else x.to(dtype)  # one cast for all
    qkv, conv = linear(layer.shared, x), layer.conv
    kernel = conv.kernel if isinstance(conv, DepthwiseConv) else None
    out = _attend(layer.config.differential)(
        x, qkv, *(kernel or (None, None)), *grid, layer.gammas(), layer.lambda_,
        *_known_weights(layer),
        layer.config.eps, layer.num_heads,
    )  # fmt: skip
    if conv is not None and kernel is None:
        out = conv(qkv.chunk(3, dim=-1)[2], grid, out)
    return linear(layer.proj, out)


@functools.cache  # importing takes a host as long as a view
def _attend(differential: str) -> Callable[..., Tensor]:
    name = "map" if differential == "map" else "token"
    return importlib.import_module(f"attnzoo.ops.{name}_difference.triton").attend


def _weights(layer: Any) -> list[Tensor]:
    """Routers of projectors, projectors, and routers of kernels and of differences."""
    modules = layer.projector_routers, layer.kernel_routers, layer.differential_routers
    first, *others = [[router.weight for router in some._modules.values()] for some in modules]
    projectors = layer.projectors
    return [*first, projectors.query, projectors.key, *others[0], *others[1]]


def _known_weights(layer: Any) -> list[Tensor]:
    """``_weights`` where they are parameters: each lookup takes a host as long as a view."""
    own = layer._modules
    try:
        pair = own["projectors"]._parameters
        first, *others = [
            [router._parameters["weight"] for router in own[some]._modules.values()]
            for some in ("projector_routers", "kernel_routers", "differential_routers")
        ]
        return [*first, pair["query"], pair["key"], *others[0], *others[1]]
    except KeyError:  # of a parametrization
        return _weights(layer)


def _is_packed(layer: Any, x: Tensor) -> bool:
    """Whether one operator computes all between the projections, with one gradient of them."""
    if layer.config.differential == "map" or not torch.is_grad_enabled():
        return False
    if is_watched():  # a counter is to see what there is
        return False
    conv = layer.conv
    if conv is not None and not (layer.training and conv.is_joined(x)):
        return False
    return layer.num_heads == 1 or not slower(layer.dim // layer.num_heads, is_normalized=False)


def _packed(
    layer: Any, x: Tensor, qkv: Tensor, weights: Weights, learn: bool, grid: tuple[int, int]
) -> Tensor:
    from attnzoo.ops.token_difference.triton_packed import Conv, packed_attention

    conv = layer.conv
    branches = None if conv is None else Conv(*conv.joined_operands())
    options = layer.config.eps, learn, layer.num_heads, grid, branches
    out, stats = packed_attention(x, qkv, weights, *options)
    if conv is not None:
        conv.move(stats[:3], stats[3:6], x)
    return out


def serves_maps(layer: Any, x: Tensor) -> bool:
    """Whether ``map_forward`` computes a layer of maps, and by kernels here."""
    if is_without_kernels(x):
        return False
    config = layer.config
    options = config.impl, config.projection, config.normalizer
    if layer._is_altered:
        return False
    if options != ("auto", "redundancy", "base") or slower(layer.dim // layer.num_heads):
        return False
    if layer.training and config.balance_coefficient:
        return False
    return choose_once(layer, "linear_tokens", x, lambda: None) == "triton"


def map_forward(layer: Any, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """What a layer with differences of maps computes of tokens, (b, h * w, dim), by the kernels.

    Both sides are projected together, and each map is linear attention of tokens (DyDiLA,
    arXiv 2601.13683, Eq. 10).
    """
    from attnzoo.ops.routed_linear.triton import routed_pair

    config = layer.config
    query, key, value = linear(layer.shared, x).chunk(3, dim=-1)
    x = x if x.dtype is query.dtype else x.to(query.dtype)  # by autocast
    projectors = [layer.projectors[z].to(x.dtype) for z in ("query", "key")]
    routers = [layer.projector_routers[z].weight for z in ("query", "key")]
    primes, _, gates = routed_pair(x, routers, projectors)
    if config.router_gradient == "ste":
        primes = by_ones(primes, gates)
    queries, keys = (
        [
            layer.measured(shared, side, "auto")[0],
            layer.measured(prime, f"{side}_prime", "auto")[0],
        ]
        for shared, side, prime in zip((query, key), ("query", "key"), primes, strict=True)
    )
    factor, _ = layer.factor(queries, "map", "auto")
    maps = [
        linear_tokens(*pair, value, layer.num_heads, eps=config.eps)
        for pair in zip(queries, keys, strict=True)
    ]
    out = torch.addcmul(maps[0], factor.to(maps[0].dtype), maps[1], value=-1)
    conv = layer.conv
    return linear(layer.proj, out if conv is None else conv(value, grid, out))
