"""The causal convolution and its SiLU in one pass, and its gradients in two.

The first makes the gradient of what the SiLU takes, and the sums over tokens; the second is the
convolution of it the other way round.
"""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.ops.precision import autocast_operands
from attnzoo.ops.triton_common import _ceil, _rows, column_sum, launch_kernel, launched


@triton.jit
def _tokens(z, n, first, move, spacing, column, mask, T: tl.constexpr):
    """A tile of an image's tokens, ``move`` tokens further on; zeros outside."""
    row = first + move + tl.arange(0, T)
    is_here = ((row >= 0) & (row < n))[:, None] & mask[None, :]
    place = row.to(tl.int64)[:, None] * spacing + column[None, :]
    return tl.load(z + place, mask=is_here, other=0.0).to(tl.float32)


@triton.jit
def _convolved(
    x, weight, bias, n, first, spacing, column, mask, HAS_BIAS: tl.constexpr, TURN: tl.constexpr,
    K: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((T, column.shape[0]), tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(K):
        w = tl.load(weight + column * K + k, mask=mask, other=0.0).to(tl.float32)
        move = -TURN * (K - 1 - k)
        total += w[None, :] * _tokens(x, n, first, move, spacing, column, mask, T)
    return total


@triton.jit
def _causal_conv_kernel(
    x, weight, bias, out, n, c, tiles, spacing, IS_WHOLE: tl.constexpr, TURN: tl.constexpr,
    K: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    # IS_WHOLE: with the bias and the SiLU.
    image, first = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles * T
    column = tl.program_id(1) * C + tl.arange(0, C)
    mask = column < c
    x += image * n * spacing
    z = _convolved(x, weight, bias, n, first, spacing, column, mask, IS_WHOLE, TURN, K, T)
    if IS_WHOLE:
        z /= 1.0 + tl.exp(-z)
    row = first + tl.arange(0, T)
    place = out + (image * n + row)[:, None] * c + column[None, :]
    tl.store(place, z.to(out.dtype.element_ty), mask=(row < n)[:, None] & mask[None, :])


@triton.jit
def _causal_conv_slope_kernel(
    grad, x, weight, bias, out, parts, n, c, tiles, g_row, spacing, TURN: tl.constexpr,
    K: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    # parts: of the gradients of each tap and of the bias, (programs, K + 1, c).
    image, first = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles * T
    column = tl.program_id(1) * C + tl.arange(0, C)
    mask = column < c
    x += image * n * spacing
    grad += image * n * g_row
    z = _convolved(x, weight, bias, n, first, spacing, column, mask, True, TURN, K, T)
    gate = 1.0 / (1.0 + tl.exp(-z))
    slope = _tokens(grad, n, first, 0, g_row, column, mask, T) * gate * (1.0 + z * (1.0 - gate))
    row = first + tl.arange(0, T)
    place = out + (image * n + row)[:, None] * c + column[None, :]
    tl.store(place, slope.to(out.dtype.element_ty), mask=(row < n)[:, None] & mask[None, :])
    parts += tl.program_id(0).to(tl.int64) * (K + 1) * c + column
    for k in tl.static_range(K):
        z = _tokens(x, n, first, -TURN * (K - 1 - k), spacing, column, mask, T)
        tl.store(parts + k * c, tl.sum(slope * z, 0), mask=mask)
    tl.store(parts + K * c, tl.sum(slope, 0), mask=mask)


_TILE = 16, 128  # tokens and channels
_SLOPE_TILE = 32, 64


def _convolve(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool, is_whole: bool) -> Tensor:
    x, spacing = _rows(x)
    (b, n, c), (rows, columns) = x.shape, _TILE
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tiles, bias = _ceil(n, rows), bias.contiguous()
    launch_kernel(_causal_conv_kernel, (b * tiles, _ceil(c, columns)),
        x, weight.contiguous(), bias, out, n, c, tiles, spacing, is_whole, -1 if reverse else 1,
        weight.shape[-1], rows, columns, num_warps=4,
    )  # fmt: skip
    return out


@launched("causal_conv", "(Tensor x, Tensor weight, Tensor bias, bool reverse) -> Tensor")
def _forward(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return _convolve(x, weight, bias, reverse, True)


@launched(
    "causal_conv_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor bias, bool reverse) "
    "-> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if x.numel() == 0:
        return torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(bias)
    (x, spacing), (grad, g_row) = _rows(x), _rows(grad)
    (b, n, c), (rows, columns), taps = x.shape, _SLOPE_TILE, weight.shape[-1]
    slopes = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tiles, bias = _ceil(n, rows), bias.contiguous()
    parts = torch.empty(b * tiles, taps + 1, c, dtype=torch.float32, device=x.device)
    launch_kernel(_causal_conv_slope_kernel, (b * tiles, _ceil(c, columns)),
        grad, x, weight.contiguous(), bias, slopes, parts, n, c, tiles, g_row, spacing,
        -1 if reverse else 1, taps, rows, columns, num_warps=4,
    )  # fmt: skip
    out = _convolve(slopes, weight, bias, not reverse, False)
    sums = column_sum(parts)
    of_weight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device)
    of_weight.squeeze(1).copy_(sums[:taps].t())
    return out, of_weight, sums[taps].to(bias.dtype, copy=True)


@_forward.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@_backward.register_fake
def _(grad: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    return tuple(z.new_empty(z.shape) for z in operands[:3])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *operands, ctx.reverse = inputs
    ctx.save_for_backward(*operands)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(grad, *ctx.saved_tensors, ctx.reverse), None


_forward.register_autograd(_gradients, setup_context=_setup)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool = False) -> Tensor:
    """See ``attnzoo.ops.causal_conv``."""
    return _forward(*autocast_operands(x), weight, bias, reverse)
