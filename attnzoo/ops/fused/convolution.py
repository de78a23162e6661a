"""The 3x3 depthwise convolution of tokens as one operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.ops.fused.support import kernels, operator


@operator("stencil")
def _stencil(
    x: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None, height: int, width: int
) -> Tensor:
    return kernels().stencil(x, weight, bias, (height, width), added)


@_stencil.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None, height: int, width: int
) -> Tensor:
    return x.new_empty(x.shape)


@operator("stencil_backward")
def _stencil_backward(
    grad: Tensor, x: Tensor, weight: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    launch, grid = kernels(), (height, width)
    grad_x = launch.stencil(grad, weight, None, grid, is_transposed=True)
    return grad_x, *launch.stencil_weight_gradient(x, grad, grid)


@_stencil_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    wide = weight.new_empty
    return (
        x.new_empty(x.shape),
        wide(weight.shape, dtype=torch.float32),
        wide(weight.shape[0], dtype=torch.float32),
    )


def _stencil_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, added, *grid = inputs
    ctx.grid, ctx.has_bias, ctx.has_added = grid, bias is not None, added is not None
    ctx.save_for_backward(x, weight)


def _stencil_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = _stencil_backward(grad, x, weight, *ctx.grid)
    return (
        grad_x,
        grad_weight.to(weight.dtype),
        grad_bias.to(weight.dtype) if ctx.has_bias else None,
        grad if ctx.has_added else None,
        None,
        None,
    )


_stencil.register_autograd(_stencil_gradients, setup_context=_stencil_setup)


def depthwise3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: tuple[int, int],
    added: Tensor | None = None,
) -> Tensor:
    """3x3 depthwise convolution of tokens with zero padding, added to ``added``.

    Args:
        x: (b, h * w, c).
        weight: (c, 1, 3, 3).
        bias: (c,) or None.
        grid: (h, w).
        added: (b, h * w, c) or None.

    Returns:
        (b, h * w, c).
    """
    return _stencil(x, weight, bias, added, *grid)
