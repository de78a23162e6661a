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
from attnzoo.ops.triton_common import (
    _ceil,
    _power_of_2,
    _row,
    _rows,
    column_sum,
    launch_kernel,
    launched,
)


@triton.jit
def _tokens(z, n, first, spacing, column, mask, TURN: tl.constexpr, T: tl.constexpr):
    """A tile of an image's tokens, TURN = -1: counted from the last; zeros outside."""
    row = tl.arange(0, T)
    is_here = ((first + row).to(tl.uint32) < n.to(tl.uint32))[:, None] & mask[None, :]
    z += (first if TURN == 1 else n - 1 - first).to(tl.int64) * spacing
    place = row.to(tl.int64)[:, None] * (TURN * spacing) + column[None, :]
    return tl.load(z + place, mask=is_here, other=0.0).to(tl.float32)


@triton.jit
def _causal_conv_kernel(
    x, weight, bias, out, n, c, tiles, spacing, TURN: tl.constexpr, K: tl.constexpr,
    T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    image, first = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles * T
    column = tl.program_id(1) * C + tl.arange(0, C)
    mask = column < c
    x += image * n * spacing
    z = tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)[None, :]
    z += tl.zeros((T, C), tl.float32)
    for k in tl.static_range(K):
        w = tl.load(weight + column * K + k, mask=mask, other=0.0).to(tl.float32)
        move = first - TURN * (K - 1 - k)
        z += w[None, :] * _tokens(x, n, move, spacing, column, mask, 1, T)
    z /= 1.0 + tl.exp(-z)
    row = first + tl.arange(0, T)
    place = out + (image * n + row)[:, None] * c + column[None, :]
    tl.store(place, z.to(out.dtype.element_ty), mask=(row < n)[:, None] & mask[None, :])


@triton.jit
def _push(window, new, H: tl.constexpr):
    """H rows without their first, and one more: of registers of one thread, as ``_row``."""
    row = tl.arange(0, H)[:, None]
    out = new[None, :] + tl.zeros_like(window)
    for k in tl.static_range(H - 1):
        out = tl.where(row == k, _row(window, k + 1, H)[None, :], out)
    return out


@triton.jit
def _causal_conv_gradient_kernel(
    grad, x, weight, bias, out, parts, n, c, chunks, tiles, g_row, spacing, TURN: tl.constexpr,
    K: tl.constexpr, H: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    # A thread walks over its channels' tokens with what the H last ones were. The gradient of a
    # token's x takes the slopes, of what the SiLU takes, of the K - 1 after it: the last H - 1
    # belong to the next program. parts: of the gradients of each tap and of the bias,
    # (programs, K + 1, c).
    image = (tl.program_id(0) // chunks).to(tl.int64)
    begin = tl.program_id(0) % chunks * (tiles * T - H + 1)
    stop = begin + tiles * T - H + 1
    column = tl.multiple_of(tl.program_id(1) * C + tl.arange(0, C), 1)  # a thread each
    mask = column < c
    x += image * n * spacing
    grad += image * n * g_row
    out += image * n * c
    row, tap = tl.arange(0, T), tl.arange(0, H) - (H - K)
    weight += column[None, :] * K
    is_tap = (tap >= 0)[:, None] & mask[None, :]
    w = tl.load(weight + tap[:, None], mask=is_tap, other=0.0).to(tl.float32)
    is_tap = (tl.arange(0, H) < K)[:, None] & mask[None, :]
    back = tl.load(weight + (K - 1 - tl.arange(0, H))[:, None], mask=is_tap, other=0.0)
    back = back.to(tl.float32)
    shift = tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    seen = _tokens(x, n, begin - H, spacing, column, mask, TURN, H)
    slopes, of_taps = tl.zeros((H, C), tl.float32), tl.zeros((H, C), tl.float32)
    of_bias = tl.zeros((C,), tl.float32)
    for turn in range(0, tiles):
        first = begin + turn * T
        x_tile = _tokens(x, n, first, spacing, column, mask, TURN, T)
        dy = _tokens(grad, n, first, g_row, column, mask, TURN, T)
        result = tl.zeros((T, C), tl.float32)
        for k in tl.static_range(T):
            seen = _push(seen, _row(x_tile, k, T), H)
            z = shift + tl.sum(w * seen, 0)
            gate = 1.0 / (1.0 + tl.exp(-z))
            slope = _row(dy, k, T) * gate * (1.0 + z * (1.0 - gate))
            slopes = _push(slopes, slope, H)
            slope = tl.where(first + k < stop, slope, 0.0)
            of_taps += slope[None, :] * seen
            of_bias += slope
            result = tl.where(row[:, None] == k, tl.sum(back * slopes, 0)[None, :], result)
        token = first - (H - 1)
        is_mine = ((token + row >= begin) & (token + row < n))[:, None] & mask[None, :]
        token = (token if TURN == 1 else n - 1 - token).to(tl.int64)
        place = out + token * c + row.to(tl.int64)[:, None] * (TURN * c) + column[None, :]
        tl.store(place, result.to(out.dtype.element_ty), mask=is_mine)
    parts += tl.program_id(0).to(tl.int64) * (K + 1) * c + column
    tl.store(parts[None, :] + tap[:, None] * c, of_taps, mask=(tap >= 0)[:, None] & mask[None, :])
    tl.store(parts + K * c, of_bias, mask=mask)


_TILE = 16, 128  # tokens and channels
GRADIENT = 16, 64, 1  # likewise, and warps
TILES = 4  # of a program


@launched("causal_conv", "(Tensor x, Tensor weight, Tensor bias, bool reverse) -> Tensor")
def _forward(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, spacing = _rows(x)
    (b, n, c), (rows, columns) = x.shape, _TILE
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tiles, bias = _ceil(n, rows), bias.contiguous()
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
    if x.numel() == 0:
        return torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(bias)
    (x, spacing), (grad, g_row) = _rows(x), _rows(grad)
    (b, n, c), (rows, columns, warps), taps = x.shape, GRADIENT, weight.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    window = _power_of_2(taps)
    tiles = max(TILES, _ceil(2 * window, rows))
    chunks, bias = _ceil(n, tiles * rows - window + 1), bias.contiguous()
    parts = torch.empty(b * chunks, taps + 1, c, dtype=torch.float32, device=x.device)
    launch_kernel(_causal_conv_gradient_kernel, (b * chunks, _ceil(c, columns)),
        grad, x, weight.contiguous(), bias, out, parts, n, c, chunks, tiles, g_row, spacing,
        -1 if reverse else 1, taps, window, rows, columns, num_warps=warps,
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
