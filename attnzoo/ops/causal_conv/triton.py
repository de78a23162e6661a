"""The causal convolution and its SiLU in one walk over the tokens, and its gradients in another.

A thread has its channels' tokens one after the other, and the few before in registers.
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
    is_here = ((first + row).to(tl.uint32) < n)[:, None] & mask[None, :]  # nor below 0
    z += (first if TURN == 1 else n - 1 - first).to(tl.int64) * spacing
    place = row.to(tl.int64)[:, None] * (TURN * spacing) + column[None, :]
    return tl.load(z + place, mask=is_here, other=0.0).to(tl.float32)


@triton.jit
def _push(window, new, H: tl.constexpr):
    """H rows without their first, and one more: of registers of one thread, as ``_row``."""
    row = tl.arange(0, H)[:, None]
    out = new[None, :] + tl.zeros_like(window)
    for k in tl.static_range(H - 1):
        out = tl.where(row == k, _row(window, k + 1, H)[None, :], out)
    return out


@triton.jit
def _put(out, z, n, first, begin, c, column, mask, TURN: tl.constexpr, T: tl.constexpr):
    """Stores a tile of tokens, but none before ``begin``."""
    token = first + tl.arange(0, T)
    is_here = ((token >= begin) & (token < n))[:, None] & mask[None, :]
    out += (first if TURN == 1 else n - 1 - first).to(tl.int64) * c
    place = tl.arange(0, T).to(tl.int64)[:, None] * (TURN * c) + column[None, :]
    tl.store(out + place, z.to(out.dtype.element_ty), mask=is_here)


@triton.jit
def _columns(c, C: tl.constexpr):
    """The channels of a program, each with all its tokens in one thread, and which there are."""
    column = tl.multiple_of(tl.program_id(1) * C + tl.arange(0, C), 1)
    return column, column < c


@triton.jit
def _taps(weight, tap, column, mask, K: tl.constexpr):
    """Those that there are, and zeros."""
    is_tap = ((tap >= 0) & (tap < K))[:, None] & mask[None, :]
    return tl.load(weight + column[None, :] * K + tap[:, None], mask=is_tap, other=0.0).to(
        tl.float32
    )


@triton.jit
def _causal_conv_kernel(
    x, weight, bias, out, n, c, chunks, tiles, spacing, TURN: tl.constexpr, K: tl.constexpr,
    H: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    image = (tl.program_id(0) // chunks).to(tl.int64)
    begin = tl.program_id(0) % chunks * tiles * T
    column, mask = _columns(c, C)
    x += image * n * spacing
    out += image * n * c
    w = _taps(weight, tl.arange(0, H) - (H - K), column, mask, K)
    shift = tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    seen = _tokens(x, n, begin - H, spacing, column, mask, TURN, H)
    row = tl.arange(0, T)[:, None]
    for turn in range(0, tiles):
        first = begin + turn * T
        z = _tokens(x, n, first, spacing, column, mask, TURN, T)
        for k in tl.static_range(T):
            seen = _push(seen, _row(z, k, T), H)
            z = tl.where(row == k, (shift + tl.sum(w * seen, 0))[None, :], z)
        _put(out, z / (1.0 + tl.exp(-z)), n, first, begin, c, column, mask, TURN, T)


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
    column, mask = _columns(c, C)
    x += image * n * spacing
    grad += image * n * g_row
    out += image * n * c
    row, tap = tl.arange(0, T)[:, None], tl.arange(0, H) - (H - K)
    w = _taps(weight, tap, column, mask, K)
    back = _taps(weight, K - 1 - tl.arange(0, H), column, mask, K)
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
            result = tl.where(row == k, tl.sum(back * slopes, 0)[None, :], result)
        _put(out, result, n, first - (H - 1), begin, c, column, mask, TURN, T)
    parts += tl.program_id(0).to(tl.int64) * (K + 1) * c + column
    tl.store(parts[None, :] + tap[:, None] * c, of_taps, mask=(tap >= 0)[:, None] & mask[None, :])
    tl.store(parts + K * c, of_bias, mask=mask)


# Tokens and channels of a tile, warps, and tiles of a program.
FORWARD = 16, 64, 1, 2
GRADIENT = 16, 64, 1, 4


@launched("causal_conv", "(Tensor x, Tensor weight, Tensor bias, bool reverse) -> Tensor")
def _forward(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, spacing = _rows(x)
    (b, n, c), (rows, columns, warps, tiles), taps = x.shape, FORWARD, weight.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    chunks = _ceil(n, tiles * rows)
    launch_kernel(_causal_conv_kernel, (b * chunks, _ceil(c, columns)),
        x, weight.contiguous(), bias.contiguous(), out, n, c, chunks, tiles, spacing,
        -1 if reverse else 1, taps, _power_of_2(taps), rows, columns, num_warps=warps,
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
    (b, n, c), (rows, columns, warps, tiles), taps = x.shape, GRADIENT, weight.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    window = _power_of_2(taps)
    tiles = max(tiles, _ceil(2 * window, rows))
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
