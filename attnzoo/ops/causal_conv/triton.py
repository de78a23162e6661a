"""The causal convolution and its SiLU in one pass, and its gradients in another."""

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
    x, weight, bias, n, first, move, spacing, column, mask, TURN: tl.constexpr, K: tl.constexpr,
    T: tl.constexpr,
):  # fmt: skip
    total = tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(K):
        w = tl.load(weight + column * K + k, mask=mask, other=0.0).to(tl.float32)
        there = move - TURN * (K - 1 - k)
        total += w[None, :] * _tokens(x, n, first, there, spacing, column, mask, T)
    return total, 1.0 / (1.0 + tl.exp(-total))


@triton.jit
def _causal_conv_kernel(
    x, weight, bias, out, n, c, tiles, spacing, TURN: tl.constexpr, K: tl.constexpr,
    T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    image, first = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles * T
    column = tl.program_id(1) * C + tl.arange(0, C)
    mask = column < c
    x += image * n * spacing
    z, gate = _convolved(x, weight, bias, n, first, 0, spacing, column, mask, TURN, K, T)
    row = first + tl.arange(0, T)
    place = out + (image * n + row)[:, None] * c + column[None, :]
    is_here = (row < n)[:, None] & mask[None, :]
    tl.store(place, (z * gate).to(out.dtype.element_ty), mask=is_here)


@triton.jit
def _causal_conv_gradient_kernel(
    grad, x, weight, bias, out, parts, n, c, tiles, g_row, spacing, TURN: tl.constexpr,
    K: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    # What the SiLU takes is computed again. parts: of the gradients of each tap and of the bias,
    # (programs, K + 1, c).
    image, first = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles * T
    column = tl.program_id(1) * C + tl.arange(0, C)
    mask = column < c
    x += image * n * spacing
    grad += image * n * g_row
    total, slopes = tl.zeros((T, C), tl.float32), tl.zeros((T, C), tl.float32)
    for k in tl.static_range(K):
        move = TURN * (K - 1 - k)
        w = tl.load(weight + column * K + k, mask=mask, other=0.0).to(tl.float32)
        z, gate = _convolved(x, weight, bias, n, first, move, spacing, column, mask, TURN, K, T)
        slopes = _tokens(grad, n, first, move, g_row, column, mask, T)
        slopes *= gate * (1.0 + z * (1.0 - gate))
        total += w[None, :] * slopes
    row = first + tl.arange(0, T)
    place = out + (image * n + row)[:, None] * c + column[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=(row < n)[:, None] & mask[None, :])
    parts += tl.program_id(0).to(tl.int64) * (K + 1) * c + column
    for k in tl.static_range(K):
        z = _tokens(x, n, first, -TURN * (K - 1 - k), spacing, column, mask, T)
        tl.store(parts + k * c, tl.sum(slopes * z, 0), mask=mask)
    tl.store(parts + K * c, tl.sum(slopes, 0), mask=mask)


_TILE = 16, 128  # tokens and channels
_GRADIENT_TILE = 64, 64


@launched("causal_conv", "(Tensor x, Tensor weight, Tensor bias, bool reverse) -> Tensor")
def _forward(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    x, spacing = _rows(x)
    (b, n, c), (rows, columns) = x.shape, _TILE
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        tiles = _ceil(n, rows)
        launch_kernel(_causal_conv_kernel, (b * tiles, _ceil(c, columns)),
            x, weight.contiguous(), bias, out, n, c, tiles, spacing, -1 if reverse else 1,
            weight.shape[-1], rows, columns, num_warps=4,
        )  # fmt: skip
    return out


@launched(
    "causal_conv_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor bias, bool reverse) "
    "-> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (x, spacing), (grad, g_row) = _rows(x), _rows(grad)
    (b, n, c), (rows, columns), taps = x.shape, _GRADIENT_TILE, weight.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out, torch.zeros_like(weight), torch.zeros_like(bias)
    tiles = _ceil(n, rows)
    parts = torch.empty(b * tiles, taps + 1, c, dtype=torch.float32, device=x.device)
    launch_kernel(_causal_conv_gradient_kernel, (b * tiles, _ceil(c, columns)),
        grad, x, weight.contiguous(), bias, out, parts, n, c, tiles, g_row, spacing,
        -1 if reverse else 1, taps, rows, columns, num_warps=8,
    )  # fmt: skip
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
