"""The strided depthwise convolution on tokens, forward and backward."""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.ops.depthwise_conv.triton import tap_sums
from attnzoo.ops.downsample import coarse_grid
from attnzoo.ops.precision import operand_dtype
from attnzoo.ops.triton_common import _ceil, _rows, launched


@triton.jit
def _tokens_of(z, sample, h, w, height, width, row_stride, column, mask):
    """Tokens at rows ``h`` and columns ``w`` of an image; 0 outside."""
    is_there = mask & ((h >= 0) & (h < height) & (w >= 0) & (w < width))[:, None]
    place = (sample.to(tl.int64) * height * width + h * width + w) * row_stride
    return tl.load(z + place[:, None] + column[None, :], mask=is_there, other=0.0).to(tl.float32)


@triton.jit
def _downsample_kernel(
    x, weight, bias, out, rows, height, width, high, wide, c, kernels, x_row,
    K: tl.constexpr, S: tl.constexpr, PAD: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.program_id(1) * C + tl.arange(0, C)
    mask = (row < rows)[:, None] & (column < c)[None, :]
    sample, place = row // (high * wide), row % (high * wide)
    h, w = place // wide * S - PAD, place % wide * S - PAD
    tap = weight + column % kernels * (K * K)
    total = tl.zeros((R, C), tl.float32)
    for i in tl.static_range(K):
        for j in tl.static_range(K):
            z = _tokens_of(x, sample, h + i, w + j, height, width, x_row, column, mask)
            total += z * tl.load(tap + (i * K + j)).to(tl.float32)[None, :]
    total += tl.load(bias + column % kernels).to(tl.float32)[None, :]
    place = out + row.to(tl.int64)[:, None] * c + column[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _downsample_gradient_kernel(
    grad, weight, out, rows, height, width, high, wide, c, kernels, g_row,
    K: tl.constexpr, S: tl.constexpr, PAD: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Of the tokens of cells of S x S: each sums over the windows that it is in."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.program_id(1) * C + tl.arange(0, C)
    mask = (row < rows)[:, None] & (column < c)[None, :]
    sample, place = row // (high * wide), row % (high * wide)
    u, v = place // wide, place % wide
    tap = weight + column % kernels * (K * K)
    for r in tl.static_range(S):
        for s in tl.static_range(S):
            total = tl.zeros((R, C), tl.float32)
            for i in tl.static_range((r + PAD) % S, K, S):
                for j in tl.static_range((s + PAD) % S, K, S):
                    z = _tokens_of(
                        grad, sample, u + (r + PAD - i) // S, v + (s + PAD - j) // S, high, wide,
                        g_row, column, mask,
                    )  # fmt: skip
                    total += z * tl.load(tap + (i * K + j)).to(tl.float32)[None, :]
            h, w = u * S + r, v * S + s
            place = (sample.to(tl.int64) * height + h) * width + w
            is_token = mask & ((h < height) & (w < width))[:, None]
            place = out + place[:, None] * c + column[None, :]
            tl.store(place, total.to(out.dtype.element_ty), mask=is_token)


@triton.jit
def _downsample_weight_kernel(
    x, grad, partial, rows, height, width, high, wide, c, x_row, g_row, turns,
    K: tl.constexpr, S: tl.constexpr, PAD: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Of one tap, or, behind the last, of the bias; a part of the windows."""
    column = tl.program_id(1) * C + tl.arange(0, C)
    tap = tl.program_id(2)
    is_bias = tap == K * K
    total = tl.zeros((R, C), tl.float32)
    for turn in range(turns):
        row = (tl.program_id(0) * turns + turn) * R + tl.arange(0, R)
        mask = (row < rows)[:, None] & (column < c)[None, :]
        g = tl.load(
            grad + row.to(tl.int64)[:, None] * g_row + column[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        sample, place = row // (high * wide), row % (high * wide)
        h, w = place // wide * S - PAD + tap // K, place % wide * S - PAD + tap % K
        is_read = mask & (is_bias == 0)
        z = _tokens_of(x, sample, h, w, height, width, x_row, column, is_read)
        total += g * tl.where(is_bias, 1.0, z)
    place = (tl.program_id(0).to(tl.int64) * (K * K + 1) + tap) * c + column
    tl.store(partial + place, tl.sum(total, 0), mask=column < c)


_TILE = 16, 128  # tokens and channels
_PROGRAMS = 2112  # of the gradient of the weights


@launched(
    "downsample",
    "(Tensor x, Tensor weight, Tensor bias, int height, int width, int stride, int padding) "
    "-> Tensor",
)
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int, stride: int, padding: int
) -> Tensor:
    (x, spacing), bias = _rows(x), bias.contiguous()
    b, _, c = x.shape
    high, wide = coarse_grid((height, width), stride)
    out = torch.empty(b, high * wide, c, dtype=x.dtype, device=x.device)
    rows, (block, columns) = b * high * wide, _TILE
    if out.numel():
        _downsample_kernel[(_ceil(rows, block), _ceil(c, columns))](
            x, weight.contiguous(), bias, out, rows, height, width, high, wide, c, len(weight),
            spacing, weight.shape[-1], stride, padding, block, columns, num_warps=4,
        )  # fmt: skip
    return out


@launched(
    "downsample_backward",
    "(Tensor grad, Tensor x, Tensor weight, int height, int width, int stride, int padding) "
    "-> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, height: int, width: int, stride: int, padding: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of tokens, kernels and biases."""
    (x, x_row), (grad, g_row) = _rows(x), _rows(grad)
    b, n, c = x.shape
    kernels, size = len(weight), weight.shape[-1]
    high, wide = coarse_grid((height, width), stride)
    grad_x = torch.empty(b, n, c, dtype=x.dtype, device=x.device)
    block, columns = _TILE
    options = size, stride, padding, block, columns
    taps, rows, tiles = size**2 + 1, b * high * wide, _ceil(c, columns)
    turns = max(1, _ceil(_ceil(rows, block) * taps * tiles, _PROGRAMS))
    programs = _ceil(rows, block * turns)
    partial = torch.empty(programs, taps, c, dtype=torch.float32, device=x.device)
    if grad_x.numel():
        _downsample_gradient_kernel[(_ceil(rows, block), tiles)](
            grad, weight.contiguous(), grad_x, rows, height, width, high, wide, c, kernels, g_row,
            *options, num_warps=4,
        )  # fmt: skip
        _downsample_weight_kernel[(programs, tiles, taps)](
            x, grad, partial, rows, height, width, high, wide, c, x_row, g_row, turns, *options,
            num_warps=4,
        )  # fmt: skip
    return grad_x, *tap_sums(partial, weight)


@_forward.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int, stride: int, padding: int
) -> Tensor:
    high, wide = coarse_grid((height, width), stride)
    return x.new_empty(x.shape[0], high * wide, x.shape[2])


@_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, *_: int) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(len(weight))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, *ctx.sizes = inputs
    ctx.save_for_backward(x, weight)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(grad, *ctx.saved_tensors, *ctx.sizes), None, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup)


def downsample(
    x: Tensor, grid: tuple[int, int], weight: Tensor, bias: Tensor, stride: int, padding: int
) -> Tensor:
    """See ``attnzoo.ops.downsample``; sums in float32."""
    return _forward(x.to(operand_dtype(x)), weight, bias, *grid, stride, padding)
