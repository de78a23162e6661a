"""The normalized difference as one Triton kernel, forward and backward."""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportReturnType=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.ops.triton_common import _ceil, _power_of_2, launch_kernel, launched

_TURNS = 8  # tiles of rows of a program whose sums over rows leave together


@triton.jit
def _loaded(z, b, h, n, z_b, z_h, z_n, column, mask):
    place = b * z_b + h.to(tl.int64) * z_h + n.to(tl.int64) * z_n
    return tl.load(z + place[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _normed_difference_kernel(
    first, second, factor, weight, out, rows, heads, tokens, d, eps, scale, a_b, a_h, a_n, b_b,
    b_h, b_n, R: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Rows are (b, n, h), as the output has them."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.arange(0, D)
    mask = (row < rows)[:, None] & (column < d)[None, :]
    b, n, h = row // (heads * tokens), row // heads % tokens, row % heads
    y = _loaded(first, b, h, n, a_b, a_h, a_n, column, mask)
    y -= tl.load(factor) * _loaded(second, b, h, n, b_b, b_h, b_n, column, mask)
    y *= tl.rsqrt(tl.sum(y * y, 1) / d + eps)[:, None] * scale
    y *= tl.load(weight + column, mask=column < d, other=0.0).to(tl.float32)[None, :]
    tl.store(out + row[:, None] * d + column[None, :], y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _normed_difference_backward_kernel(
    grad, first, second, factor, weight, grad_first, grad_second, partial, rows, heads, tokens, d,
    eps, scale, a_b, a_h, a_n, b_b, b_h, b_n, TURNS: tl.constexpr, R: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, D)
    is_column = column < d
    w = tl.load(weight + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    lam = tl.load(factor)
    of_weight = tl.zeros((R, D), tl.float32)
    of_factor = tl.zeros((R, D), tl.float32)
    for turn in range(TURNS):
        row = (tl.program_id(0).to(tl.int64) * TURNS + turn) * R + tl.arange(0, R)
        mask = (row < rows)[:, None] & is_column[None, :]
        b, n, h = row // (heads * tokens), row // heads % tokens, row % heads
        other = _loaded(second, b, h, n, b_b, b_h, b_n, column, mask)
        y = _loaded(first, b, h, n, a_b, a_h, a_n, column, mask) - lam * other
        place = row[:, None] * d + column[None, :]
        g = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32) * scale
        inverse = tl.rsqrt(tl.sum(y * y, 1) / d + eps)[:, None]
        y *= inverse
        of_weight += g * y
        g *= w
        slope = (g - y * (tl.sum(g * y, 1) / d)[:, None]) * inverse
        of_factor += slope * other
        tl.store(grad_first + place, slope.to(grad_first.dtype.element_ty), mask=mask)
        slope *= -lam
        tl.store(grad_second + place, slope.to(grad_second.dtype.element_ty), mask=mask)
    partial += tl.program_id(0) * 2 * d + column
    tl.store(partial, tl.sum(of_weight, 0), mask=is_column)
    tl.store(partial + d, -tl.sum(of_factor, 0), mask=is_column)


def _row_block(d: int) -> int:
    return max(1, 2048 // _power_of_2(d))


def _even(z: Tensor) -> Tensor:
    return z if z.stride(-1) == 1 else z.contiguous()


@launched(
    "normed_difference",
    "(Tensor first, Tensor second, Tensor factor, Tensor weight, float eps, float scale) "
    "-> Tensor",
)
def _forward(
    first: Tensor, second: Tensor, factor: Tensor, weight: Tensor, eps: float, scale: float
) -> Tensor:
    first, second, weight = _even(first), _even(second), weight.contiguous()
    b, heads, n, d = first.shape
    out = torch.empty(b, n, heads * d, dtype=first.dtype, device=first.device)
    block = _row_block(d)
    if out.numel():
        launch_kernel(_normed_difference_kernel, (_ceil(b * heads * n, block),),
            first, second, factor, weight, out, b * heads * n, heads, n, d, eps, scale,
            *first.stride()[:3], *second.stride()[:3], block, _power_of_2(d),
            num_warps=4,
        )  # fmt: skip
    return out


@launched(
    "normed_difference_backward",
    "(Tensor grad, Tensor first, Tensor second, Tensor factor, Tensor weight, float eps, "
    "float scale) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor, first: Tensor, second: Tensor, factor: Tensor, weight: Tensor, eps: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    first, second, weight = _even(first), _even(second), weight.contiguous()
    b, heads, n, d = first.shape
    # As tokens, which is how attention left what it is the gradient of.
    grads = [torch.empty(b, n, heads, d, dtype=z.dtype, device=z.device) for z in (first, second)]
    block = _row_block(d)
    programs = _ceil(b * heads * n, block * _TURNS)
    partial = torch.empty(programs, 2, d, dtype=torch.float32, device=first.device)
    if first.numel():
        launch_kernel(_normed_difference_backward_kernel, (programs,),
            grad.contiguous(), first, second, factor, weight, *grads, partial, b * heads * n,
            heads, n, d, eps, scale, *first.stride()[:3], *second.stride()[:3], _TURNS, block,
            _power_of_2(d), num_warps=4,
        )  # fmt: skip
    of_weight, of_factor = partial.sum(0)
    return (
        *(z.transpose(1, 2) for z in grads),
        of_factor.sum().view(factor.shape),
        of_weight.to(weight.dtype),
    )


@_forward.register_fake
def _(
    first: Tensor, second: Tensor, factor: Tensor, weight: Tensor, eps: float, scale: float
) -> Tensor:
    b, heads, n, d = first.shape
    return first.new_empty(b, n, heads * d)


@_backward.register_fake
def _(
    grad: Tensor, first: Tensor, second: Tensor, factor: Tensor, weight: Tensor, eps: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    b, heads, n, d = first.shape
    new = [z.new_empty(b, n, heads, d).transpose(1, 2) for z in (first, second)]
    return new[0], new[1], factor.new_empty(factor.shape), weight.new_empty(weight.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(grad, *ctx.saved_tensors, *ctx.options), None, None


_forward.register_autograd(_gradients, setup_context=_setup)


def normed_difference(
    first: Tensor, second: Tensor, factor: Tensor, weight: Tensor, eps: float, scale: float
) -> Tensor:
    """See ``attnzoo.ops.normed_difference``; in float32, rounded once."""
    return _forward(first, second, factor.float(), weight, eps, scale)
