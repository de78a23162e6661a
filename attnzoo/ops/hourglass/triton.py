"""Means of groups, and the hourglass's sum, gate and gradients, in one pass each."""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.ops.triton_common import _ceil, _rows, launch_kernel, launched


@triton.jit
def _groups_here(b, n, d, SIZE: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Groups of all images, first token and number of tokens of each, channels, what exists."""
    group = tl.program_id(0) * R + tl.arange(0, R)
    channel = tl.program_id(1) * C + tl.arange(0, C)
    groups = tl.cdiv(n, SIZE)
    begin = group % groups * SIZE
    count = tl.where(group < b * groups, tl.minimum(n - begin, SIZE), 0)
    token = (group // groups).to(tl.int64) * n + begin
    mask = (count > 0)[:, None] & (channel < d)[None, :]
    return group.to(tl.int64)[:, None], token[:, None], count[:, None], channel[None, :], mask


@triton.jit
def _token(x, place, mask, d, IS_PAIR: tl.constexpr):
    z = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    if IS_PAIR:
        z += tl.load(x + place + d, mask=mask, other=0.0).to(tl.float32)
    return z


@triton.jit
def _mean(x, token, count, channel, mask, d, x_row, SIZE: tl.constexpr, IS_PAIR: tl.constexpr):
    total = _token(x, token * x_row + channel, mask, d, IS_PAIR)
    for i in range(1, SIZE):
        total += _token(x, (token + i) * x_row + channel, mask & (i < count), d, IS_PAIR)
    return total / tl.maximum(count, 1)


@triton.jit
def _group_means_kernel(
    x, out, b, n, d, x_row, SIZE: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    group, token, count, channel, mask = _groups_here(b, n, d, SIZE, R, C)
    mean = _mean(x, token, count, channel, mask, d, x_row, SIZE, False)
    tl.store(out + group * d + channel, mean.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _group_spread_kernel(
    grad, out, b, n, d, g_row, SIZE: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    """The gradient of means."""
    group, token, count, channel, mask = _groups_here(b, n, d, SIZE, R, C)
    g = tl.load(grad + group * g_row + channel, mask=mask, other=0.0).to(tl.float32)
    g = (g / tl.maximum(count, 1)).to(out.dtype.element_ty)
    for i in range(SIZE):
        tl.store(out + (token + i) * d + channel, g, mask=mask & (i < count))


@triton.jit
def _hourglass_kernel(
    x, rows, factor, out, b, n, d, x_row, r_row, f_row, IS_PAIR: tl.constexpr,
    IS_ACTIVE: tl.constexpr, HAS_FACTOR: tl.constexpr, SIZE: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    group, token, count, channel, mask = _groups_here(b, n, d, SIZE, R, C)
    row = _token(rows, group * r_row + channel, mask, d, False)
    mean = _mean(x, token, count, channel, mask, d, x_row, SIZE, IS_PAIR)
    for i in range(SIZE):
        here = mask & (i < count)
        z = _token(x, (token + i) * x_row + channel, here, d, IS_PAIR) - mean + row
        if IS_ACTIVE:
            z /= 1.0 + tl.exp(-z)
            if HAS_FACTOR:
                z *= _token(factor, (token + i) * f_row + channel, here, d, False)
        tl.store(out + (token + i) * d + channel, z.to(out.dtype.element_ty), mask=here)


@triton.jit
def _slopes(
    grad, x, factor, mean, row, token, channel, here, d, g_row, x_row, f_row,
    IS_PAIR: tl.constexpr, IS_ACTIVE: tl.constexpr, HAS_FACTOR: tl.constexpr,
):  # fmt: skip
    """Gradients of a token's sum and of its factor."""
    slope = _token(grad, token * g_row + channel, here, d, False)
    of_factor = slope
    if IS_ACTIVE:
        z = _token(x, token * x_row + channel, here, d, IS_PAIR) - mean + row
        part = 1.0 / (1.0 + tl.exp(-z))
        of_factor *= z * part
        slope *= part * (1.0 + z * (1.0 - part))
        if HAS_FACTOR:
            slope *= _token(factor, token * f_row + channel, here, d, False)
    return slope, of_factor


@triton.jit
def _hourglass_gradient_kernel(
    grad, x, rows, factor, grad_x, grad_rows, grad_factor, b, n, d, g_row, x_row, r_row, f_row,
    IS_PAIR: tl.constexpr, IS_ACTIVE: tl.constexpr, HAS_FACTOR: tl.constexpr, SIZE: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    group, token, count, channel, mask = _groups_here(b, n, d, SIZE, R, C)
    mean = tl.zeros((R, C), tl.float32)
    row = mean
    if IS_ACTIVE:
        row = _token(rows, group * r_row + channel, mask, d, False)
        mean = _mean(x, token, count, channel, mask, d, x_row, SIZE, IS_PAIR)
    total = tl.zeros((R, C), tl.float32)
    for i in range(SIZE):
        here = mask & (i < count)
        g, of_factor = _slopes(
            grad, x, factor, mean, row, token + i, channel, here, d, g_row, x_row, f_row, IS_PAIR,
            IS_ACTIVE, HAS_FACTOR,
        )  # fmt: skip
        total += g
        if HAS_FACTOR:
            place = grad_factor + (token + i) * d + channel
            tl.store(place, of_factor.to(grad_factor.dtype.element_ty), mask=here)
    tl.store(grad_rows + group * d + channel, total.to(grad_rows.dtype.element_ty), mask=mask)
    total /= tl.maximum(count, 1)
    for i in range(SIZE):
        here = mask & (i < count)
        g, of_factor = _slopes(
            grad, x, factor, mean, row, token + i, channel, here, d, g_row, x_row, f_row, IS_PAIR,
            IS_ACTIVE, HAS_FACTOR,
        )  # fmt: skip
        g = (g - total).to(grad_x.dtype.element_ty)
        place = grad_x + (token + i) * (d * (1 + IS_PAIR)) + channel
        tl.store(place, g, mask=here)
        if IS_PAIR:
            tl.store(place + d, g, mask=here)


TILE = 4, 256  # groups and channels


def _launch(kernel: Any, tensors: tuple[Tensor, ...], sizes: tuple[int, int, int],
            spacings: tuple[int, ...], size: int, *flags: bool) -> None:  # fmt: skip
    b, n, d = sizes
    grid = _ceil(b * _ceil(n, size), TILE[0]), _ceil(d, TILE[1])
    if all(grid):
        launch_kernel(kernel, grid, *tensors, *sizes, *spacings, *flags, size, *TILE, num_warps=4)


@launched("group_means", "(Tensor x, int size) -> Tensor")
def _means(x: Tensor, size: int) -> Tensor:
    x, x_row = _rows(x)
    b, n, c = x.shape
    out = torch.empty(b, _ceil(n, size), c, dtype=x.dtype, device=x.device)
    _launch(_group_means_kernel, (x, out), (b, n, c), (x_row,), size)
    return out


@launched("group_means_backward", "(Tensor grad, int n, int size) -> Tensor")
def _spread(grad: Tensor, n: int, size: int) -> Tensor:
    grad, g_row = _rows(grad)
    b, _, c = grad.shape
    out = torch.empty(b, n, c, dtype=grad.dtype, device=grad.device)
    _launch(_group_spread_kernel, (grad, out), (b, n, c), (g_row,), size)
    return out


@_means.register_fake
def _(x: Tensor, size: int) -> Tensor:
    return x.new_empty(x.shape[0], -(-x.shape[1] // size), x.shape[2])


@_spread.register_fake
def _(grad: Tensor, n: int, size: int) -> Tensor:
    return grad.new_empty(grad.shape[0], n, grad.shape[2])


def _setup_means(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.size = inputs
    ctx.n = x.shape[1]


_means.register_autograd(
    lambda ctx, grad: (_spread(grad, ctx.n, ctx.size), None), setup_context=_setup_means
)

SCHEMA = "Tensor x, Tensor rows, Tensor? factor, int size, bool is_active"


def _operands(
    x: Tensor, rows: Tensor, factor: Tensor | None, is_active: bool
) -> tuple[tuple[Tensor, ...], tuple[int, int, int], tuple[int, ...], tuple[bool, ...]]:
    """Tensors, sizes, spacings and flags, as the kernels take them."""
    both = [_rows(z) for z in (x, rows, rows if factor is None else factor)]
    sizes = x.shape[0], x.shape[1], rows.shape[2]
    flags = x.shape[2] > rows.shape[2], is_active, factor is not None
    return tuple(z for z, _ in both), sizes, tuple(row for _, row in both), flags


@launched("hourglass", f"({SCHEMA}) -> Tensor")
def _forward(x: Tensor, rows: Tensor, factor: Tensor | None, size: int, is_active: bool) -> Tensor:
    tensors, sizes, spacings, flags = _operands(x, rows, factor, is_active)
    out = torch.empty(sizes, dtype=rows.dtype, device=x.device)
    _launch(_hourglass_kernel, (*tensors, out), sizes, spacings, size, *flags)
    return out


@launched("hourglass_backward", f"(Tensor grad, {SCHEMA}) -> (Tensor, Tensor, Tensor)")
def _backward(
    grad: Tensor, x: Tensor, rows: Tensor, factor: Tensor | None, size: int, is_active: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x``, ``rows`` and the factor, which is empty where there is none."""
    grad, g_row = _rows(grad)
    tensors, sizes, spacings, flags = _operands(x, rows, factor, is_active)
    like = (x, rows, rows[:0] if factor is None else factor)
    outs = [torch.empty(z.shape, dtype=z.dtype, device=z.device) for z in like]
    _launch(
        _hourglass_gradient_kernel, (grad, *tensors, *outs), sizes, (g_row, *spacings), size,
        *flags,
    )  # fmt: skip
    return outs[0], outs[1], outs[2]


@_forward.register_fake
def _(x: Tensor, rows: Tensor, *_: Any) -> Tensor:
    return rows.new_empty(*x.shape[:2], rows.shape[2])


@_backward.register_fake
def _(grad: Tensor, x: Tensor, rows: Tensor, factor: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    last = rows[:0] if factor is None else factor
    return x.new_empty(x.shape), rows.new_empty(rows.shape), last.new_empty(last.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *operands, ctx.size, ctx.is_active = inputs
    ctx.save_for_backward(*operands)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    operands = ctx.saved_tensors
    *found, of_factor = _backward(grad, *operands, ctx.size, ctx.is_active)
    return *found, None if operands[2] is None else of_factor, None, None


_forward.register_autograd(_gradients, setup_context=_setup)


def group_means(x: Tensor, size: int) -> Tensor:
    """See ``attnzoo.ops.hourglass``; in float32, rounded once."""
    return _means(x, size)


def hourglass(
    x: Tensor, means: Tensor, rows: Tensor, size: int, is_active: bool = False,
    factor: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See ``attnzoo.ops.hourglass``; in float32, rounded once."""
    return _forward(x, rows, factor, size, is_active)
