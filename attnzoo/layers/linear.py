"""Linear layers as diffusion transformers initialize them, and functions behind them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from attnzoo.ops.biased_linear import BiasedLinear
from attnzoo.ops.depthwise_conv import to_image, to_tokens
from attnzoo.ops.dispatch import (
    Impl,
    has_fused_gelu,
    is_bare,
    is_without_kernels,
    linear,
    owns_gradient,
    sums_bias,
)
from attnzoo.ops.linear_core import elu_plus_one as elu_plus_one  # for mechanisms of your own
from attnzoo.ops.precision import autocast_operands
from attnzoo.ops.windows import to_windows


def xavier_linear(in_features: int, out_features: int, bias: bool) -> nn.Linear:
    """A linear layer with Xavier-uniform weight and zero bias (DiT, arXiv 2212.09748)."""
    layer = nn.Linear(in_features, out_features, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def linear_beside(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """``linear``, and x for others to read, into whose gradient the layer's product is added.

    They must leave that gradient to the layer: a fresh tensor, which it overwrites.
    """
    if type(layer) is not nn.Linear or not x.requires_grad:
        return linear(layer, x), x
    if not (owns_gradient(x, layer) and is_bare(layer)):
        return linear(layer, x), x
    bias: Tensor | None = layer.bias
    x, weight = autocast_operands(x, layer.weight)
    return BiasedLinear.apply(x, weight, None if bias is None else bias.to(x.dtype))


def linear_apart(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """``linear``, and its bias if who reads the tokens must give it the sum of their gradients.

    A kernel that makes those has their sum for less than who reads them once more.

    Args:
        layer: A linear layer, or what stands in its place.
        x: (b, n, d).

    Returns:
        (b, n, d_out), and (d_out,) or None.
    """
    if type(layer) is nn.Linear and sums_bias(x, layer) and is_bare(layer):
        x, weight, bias = autocast_operands(x, layer.weight, layer.bias)
        return BiasedLinear.apply(x, weight, bias.detach())[0], bias
    return linear(layer, x), None


def query_key_value(layer: nn.Module, x: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K and V of each head, (b, heads, n, d_head), of tokens and the layer that gives all."""
    qkv = linear(layer, x)
    if torch.compiler.is_dynamo_compiling():  # which joins the two copies of a stack's gradient
        query, key, value = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=heads)
        return query, key, value
    is_ours = type(layer) is nn.Linear and owns_gradient(x, layer)
    parts = _Parts.apply(qkv) if is_ours else qkv.chunk(3, -1)
    query, key, value = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in parts)
    return query, key, value


class _Parts(torch.autograd.Function):
    """Thirds of rows, whose gradients are not copied where a kernel has put them side by side."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, ...]:
        return x.chunk(3, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        base, size = grads[0]._base, grads[0].shape[-1]
        if base is not None and not torch.is_grad_enabled() and base.shape[-1:] == (3 * size,):
            places = [(z.data_ptr(), z.stride()) for z in grads]
            if places == [(z.data_ptr(), z.stride()) for z in base.chunk(3, -1)]:
                return base
        return torch.cat(grads, -1)


def linear_gelu(layer: nn.Module, x: Tensor) -> Tensor:
    """GELU(layer(x)) by the tanh approximation, (..., in) -> (..., out), in one kernel if it can.

    That kernel rounds once, after the activation.
    """
    # The layer is looked at last, so that where there is no such kernel a compiler guards nothing.
    if type(layer) is nn.Linear and has_fused_gelu(x, layer) and is_bare(layer):
        rows = x.reshape(-1, x.shape[-1])
        rows, weight, bias = autocast_operands(rows, layer.weight, layer.bias)
        fused = torch._addmm_activation  # pyright: ignore[reportPrivateImportUsage]
        out = fused(bias, rows, weight.t(), use_gelu=True)
        return out.view(*x.shape[:-1], layer.out_features)
    return F.gelu(linear(layer, x), approximate="tanh")


def windows_linear(
    conv: nn.Conv2d, x: Tensor, grid: tuple[int, int], impl: Impl = "auto"
) -> Tensor:
    """A convolution whose windows touch, of tokens: (b, h * w, c) -> (b, n / window, out).

    On a GPU it is one product of the windows, and so are its gradients: cuDNN copies kernels
    between layouts, and their gradients back.
    """
    if x.is_meta or is_without_kernels(x) or not is_bare(conv):
        image = to_image(x, grid)
        # In this layout PyTorch (2.13) gets one window a row wrong in bfloat16 on a CPU.
        image = image.contiguous() if grid[1] == conv.kernel_size[1] else image
        return to_tokens(conv(image))
    height, width = conv.kernel_size
    rows = x if height == width == 1 else to_windows(x, grid, (height, width), impl=impl)
    return rows_linear(conv, rows)


def rows_linear(conv: nn.Conv2d, rows: Tensor) -> Tensor:
    """A convolution as the product that it is of windows, (..., c * window) -> (..., out)."""
    weight, bias = conv.weight.flatten(1), conv.bias
    if bias is not None and sums_bias(rows, conv):
        return BiasedLinear.apply(*autocast_operands(rows, weight, bias))[0]
    return F.linear(rows, weight, bias)
