"""RMSNorm over each head times SiLU of a gate in one pass, forward and backward."""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportReturnType=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.ops.triton_common import _ceil, column_sum, launched


@triton.jit
def _of_head(z, row, heads, z_token, z_head, column, mask):
    place = (row // heads).to(tl.int64) * z_token + (row % heads) * z_head
    return tl.load(z + place[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _gated_norm_kernel(
    x, gate, weight, out, rows, heads, d, eps, x_token, x_head, g_token, g_head,
    R: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.arange(0, D)
    mask = (row < rows)[:, None] & (column < d)[None, :]
    y = _of_head(x, row, heads, x_token, x_head, column, mask)
    z = _of_head(gate, row, heads, g_token, g_head, column, mask)
    w = tl.load(weight + column, mask=column < d, other=0.0).to(tl.float32)
    y *= tl.rsqrt(tl.sum(y * y, 1) / d + eps)[:, None]
    y *= w[None, :] * z / (1 + tl.exp(-z))
    place = row.to(tl.int64)[:, None] * d + column[None, :]
    tl.store(out + place, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _gated_norm_backward_kernel(
    grad, x, gate, weight, grad_x, grad_gate, partial, rows, heads, d, eps, x_token, x_head,
    g_token, g_head, o_token, o_head, turns, R: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, D)
    w = tl.load(weight + column, mask=column < d, other=0.0).to(tl.float32)[None, :]
    of_weight = tl.zeros((R, D), tl.float32)
    for turn in range(turns):
        row = (tl.program_id(0) * turns + turn) * R + tl.arange(0, R)
        mask = (row < rows)[:, None] & (column < d)[None, :]
        place = row.to(tl.int64)[:, None] * d + column[None, :]
        y = _of_head(x, row, heads, x_token, x_head, column, mask)
        z = _of_head(gate, row, heads, g_token, g_head, column, mask)
        g = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(y * y, 1) / d + eps)[:, None]
        share = 1 / (1 + tl.exp(-z))
        y *= inverse
        of_gate = g * w * y * share * (1 + z * (1 - share))
        spot = (row // heads).to(tl.int64) * o_token + (row % heads) * o_head
        spot = grad_gate + spot[:, None] + column[None, :]
        tl.store(spot, of_gate.to(grad_gate.dtype.element_ty), mask=mask)
        g *= z * share
        of_weight += g * y
        g *= w
        of_x = (g - y * (tl.sum(g * y, 1) / d)[:, None]) * inverse
        tl.store(grad_x + place, of_x.to(grad_x.dtype.element_ty), mask=mask)
    place = partial + tl.program_id(0) * d + column
    tl.store(place, tl.sum(of_weight, 0), mask=column < d)


_NUMBERS = 2048  # of a tile
_PROGRAMS = 528  # of a backward, whose sums over rows another launch adds up


def _spaced(z: Tensor) -> Tensor:
    """(b, n, h, d) whose tokens are equally far apart over the batch, and channels beside."""
    is_even = z.stride(3) == 1 and (z.shape[0] == 1 or z.stride(0) == z.shape[1] * z.stride(1))
    # ``contiguous`` alone leaves a single token the spacing that it has.
    return z if is_even else z.contiguous().view(-1).view(z.shape)


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """Rows, rows of a tile and its columns."""
    columns = triton.next_power_of_2(x.shape[3])
    return x.shape[:3].numel(), max(1, _NUMBERS // columns), columns


@launched("gated_norm", "(Tensor x, Tensor gate, Tensor weight, float eps) -> Tensor")
def _forward(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    x, gate, weight = _spaced(x), _spaced(gate), weight.contiguous()
    b, n, heads, d = x.shape
    out = torch.empty(b, n, heads * d, dtype=gate.dtype, device=x.device)
    rows, block, columns = _sizes(x)
    if rows:
        _gated_norm_kernel[(_ceil(rows, block),)](
            x, gate, weight, out, rows, heads, d, eps, *x.stride()[1:3], *gate.stride()[1:3],
            block, columns, num_warps=4,
        )  # fmt: skip
    return out


@launched(
    "gated_norm_backward",
    "(Tensor grad, Tensor x, Tensor gate, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    of_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    of_x, of_weight = put_gradients(grad, x, gate, weight, eps, of_gate)
    return of_x, of_gate, of_weight


def put_gradients(
    grad: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float, of_gate: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x and the weight; that of the gate into ``of_gate``, whose rows have spaces."""
    x, gate, weight = _spaced(x), _spaced(gate), weight.contiguous()
    of_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, block, columns = _sizes(x)
    turns = max(1, _ceil(rows, block * _PROGRAMS))
    programs = _ceil(rows, block * turns)
    partial = torch.empty(programs, x.shape[3], dtype=torch.float32, device=x.device)
    if rows:
        _gated_norm_backward_kernel[(programs,)](
            grad.contiguous(), x, gate, weight, of_x, of_gate, partial, rows, x.shape[2],
            x.shape[3], eps, *x.stride()[1:3], *gate.stride()[1:3], *of_gate.stride()[1:3], turns,
            block, columns, num_warps=4,
        )  # fmt: skip
    return of_x, column_sum(partial).to(weight.dtype)


@_forward.register_fake
def _(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    return gate.new_empty(*x.shape[:2], x.shape[2] * x.shape[3])


@_backward.register_fake
def _(
    grad: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), gate.new_empty(gate.shape), weight.new_empty(weight.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *operands, ctx.eps = inputs
    ctx.save_for_backward(*operands)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(grad, *ctx.saved_tensors, ctx.eps), None


_forward.register_autograd(_gradients, setup_context=_setup)


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ``attnzoo.ops.gated_norm``; in float32, rounded once."""
    return _forward(x, gate, weight, eps)
