"""The 3x3 and 5x5 depthwise convolutions on tokens, forward and backward."""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.ops.depthwise_conv.torch import widened
from attnzoo.ops.precision import operand_dtype
from attnzoo.ops.triton_common import _ceil, _rows, launch_kernel, launched
from attnzoo.ops.triton_replay import replayed


@triton.jit
def _shifted(image, h, w, column, height, width, c, row_stride, is_column):
    """Rows ``h`` of the image at columns w - 1, w, w + 1; 0 outside."""
    here = h + tl.zeros_like(w)  # the interpreter loses the type of a scalar mask
    is_h = (here >= 0) & (here < height)
    line = image + h.to(tl.int64) * width * row_stride + column[None, :]
    left = tl.load(
        line + (w - 1)[:, None] * row_stride,
        mask=((w > 0) & (w <= width) & is_h)[:, None] & is_column,
        other=0.0,
    )
    middle = tl.load(
        line + w[:, None] * row_stride, mask=((w < width) & is_h)[:, None] & is_column, other=0.0
    )
    right = tl.load(
        line + (w + 1)[:, None] * row_stride,
        mask=((w + 1 < width) & is_h)[:, None] & is_column,
        other=0.0,
    )
    return left.to(tl.float32), middle.to(tl.float32), right.to(tl.float32)


@triton.jit
def _stencil_kernel(
    x, weight, bias, added, out, height, width, c, kernels, x_row, strips, ROWS: tl.constexpr,
    W: tl.constexpr, C: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    FLIP: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // strips).to(tl.int64)
    first = (tl.program_id(0) % strips) * ROWS
    w = tl.program_id(1) * W + tl.arange(0, W)
    column = tl.program_id(2) * C + tl.arange(0, C)
    is_column = (column < c)[None, :]
    tap = weight + column % kernels * 9
    is_tap = column < c
    # The transposed stencil is the stencil turned by half a turn.
    o: tl.constexpr = 8 if FLIP else 0
    s: tl.constexpr = -1 if FLIP else 1
    k00 = tl.load(tap + o, mask=is_tap, other=0.0).to(tl.float32)[None, :]
    k01 = tl.load(tap + o + s, mask=is_tap, other=0.0).to(tl.float32)[None, :]
    k02 = tl.load(tap + o + 2 * s, mask=is_tap, other=0.0).to(tl.float32)[None, :]
    k10 = tl.load(tap + o + 3 * s, mask=is_tap, other=0.0).to(tl.float32)[None, :]
    k11 = tl.load(tap + 4, mask=is_tap, other=0.0).to(tl.float32)[None, :]
    k12 = tl.load(tap + o + 5 * s, mask=is_tap, other=0.0).to(tl.float32)[None, :]
    k20 = tl.load(tap + o + 6 * s, mask=is_tap, other=0.0).to(tl.float32)[None, :]
    k21 = tl.load(tap + o + 7 * s, mask=is_tap, other=0.0).to(tl.float32)[None, :]
    k22 = tl.load(tap + o + 8 * s, mask=is_tap, other=0.0).to(tl.float32)[None, :]
    image = x + sample * height * width * x_row
    a0, a1, a2 = _shifted(image, first - 1, w, column, height, width, c, x_row, is_column)
    b0, b1, b2 = _shifted(image, first, w, column, height, width, c, x_row, is_column)
    for turn in range(ROWS):
        h = first + turn
        c0, c1, c2 = _shifted(image, h + 1, w, column, height, width, c, x_row, is_column)
        total = a0 * k00 + a1 * k01 + a2 * k02 + b0 * k10 + b1 * k11 + b2 * k12
        total += c0 * k20 + c1 * k21 + c2 * k22
        if BIAS:
            here = bias + column % kernels
            total += tl.load(here, mask=is_tap, other=0.0).to(tl.float32)[None, :]
        place = ((sample * height + h) * width + w)[:, None] * c + column[None, :]
        here = h + tl.zeros_like(w)
        mask = ((w < width) & (here < height))[:, None] & is_column
        if ADD:
            total += tl.load(added + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)
        a0, a1, a2 = b0, b1, b2
        b0, b1, b2 = c0, c1, c2


@triton.jit
def _stencil_weight_kernel(
    x, grad, partial, height, width, c, x_row, g_row, strips, blocks_w, ROWS: tl.constexpr,
    W: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // strips).to(tl.int64)
    first = (tl.program_id(0) % strips) * ROWS
    w = tl.program_id(1) * W + tl.arange(0, W)
    column = tl.program_id(2) * C + tl.arange(0, C)
    is_column = (column < c)[None, :]
    image = x + sample * height * width * x_row
    a0, a1, a2 = _shifted(image, first - 1, w, column, height, width, c, x_row, is_column)
    b0, b1, b2 = _shifted(image, first, w, column, height, width, c, x_row, is_column)
    t00 = tl.zeros((W, C), tl.float32)
    t01 = tl.zeros((W, C), tl.float32)
    t02 = tl.zeros((W, C), tl.float32)
    t10 = tl.zeros((W, C), tl.float32)
    t11 = tl.zeros((W, C), tl.float32)
    t12 = tl.zeros((W, C), tl.float32)
    t20 = tl.zeros((W, C), tl.float32)
    t21 = tl.zeros((W, C), tl.float32)
    t22 = tl.zeros((W, C), tl.float32)
    tb = tl.zeros((W, C), tl.float32)
    for turn in range(ROWS):
        h = first + turn
        c0, c1, c2 = _shifted(image, h + 1, w, column, height, width, c, x_row, is_column)
        place = ((sample * height + h) * width + w)[:, None] * g_row + column[None, :]
        here = h + tl.zeros_like(w)
        mask = ((w < width) & (here < height))[:, None] & is_column
        g = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
        t00 += g * a0
        t01 += g * a1
        t02 += g * a2
        t10 += g * b0
        t11 += g * b1
        t12 += g * b2
        t20 += g * c0
        t21 += g * c1
        t22 += g * c2
        tb += g
        a0, a1, a2 = b0, b1, b2
        b0, b1, b2 = c0, c1, c2
    line = partial + (tl.program_id(0).to(tl.int64) * blocks_w + tl.program_id(1)) * 10 * c
    line += column
    is_c = column < c
    tl.store(line, tl.sum(t00, 0), mask=is_c)
    tl.store(line + c, tl.sum(t01, 0), mask=is_c)
    tl.store(line + 2 * c, tl.sum(t02, 0), mask=is_c)
    tl.store(line + 3 * c, tl.sum(t10, 0), mask=is_c)
    tl.store(line + 4 * c, tl.sum(t11, 0), mask=is_c)
    tl.store(line + 5 * c, tl.sum(t12, 0), mask=is_c)
    tl.store(line + 6 * c, tl.sum(t20, 0), mask=is_c)
    tl.store(line + 7 * c, tl.sum(t21, 0), mask=is_c)
    tl.store(line + 8 * c, tl.sum(t22, 0), mask=is_c)
    tl.store(line + 9 * c, tl.sum(tb, 0), mask=is_c)


@triton.jit
def _pixel(image, h, w, column, height, width, row_stride, is_column):
    """Row ``h`` of the image at columns ``w``; 0 outside."""
    here = h + tl.zeros_like(w)
    mask = (here >= 0) & (here < height) & (w >= 0) & (w < width)
    line = image + h.to(tl.int64) * width * row_stride
    place = (w * row_stride)[:, None] + column[None, :]
    return tl.load(line + place, mask=mask[:, None] & is_column, other=0.0).to(tl.float32)


@triton.jit
def _taps(tap, row: tl.constexpr, c, is_tap, FLIP: tl.constexpr):
    """One row of the kernels of some channels."""
    # The transposed stencil is the stencil turned by half a turn.
    o: tl.constexpr = 24 - 5 * row if FLIP else 5 * row
    s: tl.constexpr = -1 if FLIP else 1
    return (
        tl.load(tap + o * c, mask=is_tap, other=0.0)[None, :],
        tl.load(tap + (o + s) * c, mask=is_tap, other=0.0)[None, :],
        tl.load(tap + (o + 2 * s) * c, mask=is_tap, other=0.0)[None, :],
        tl.load(tap + (o + 3 * s) * c, mask=is_tap, other=0.0)[None, :],
        tl.load(tap + (o + 4 * s) * c, mask=is_tap, other=0.0)[None, :],
    )


# Channels that are known to lie beside one another in fours or more would be loaded so, and a
# thread had the taps of as many in its registers: more than there are.
@triton.jit(do_not_specialize=["x_row", "out_row"])
def _wide_stencil_kernel(
    x, taps, bias, added, out, height, width, c, kernels, x_row, out_row, strips,
    UNIT: tl.constexpr, ROWS: tl.constexpr, W: tl.constexpr, C: tl.constexpr, BIAS: tl.constexpr,
    ADD: tl.constexpr, FLIP: tl.constexpr,
):  # fmt: skip
    """5x5, of ``taps``, (25, c) in float32; rows are UNIT times as far apart as said.

    Each row of pixels adds to the five rows of outputs around it.
    """
    sample = (tl.program_id(0) // strips).to(tl.int64)
    first = (tl.program_id(0) % strips) * ROWS
    w = tl.program_id(1) * W + tl.arange(0, W)
    column = tl.program_id(2) * C + tl.arange(0, C)
    is_tap = column < c
    is_column = is_tap[None, :]
    x_row *= UNIT
    out_row *= UNIT
    tap = taps + column
    k00, k01, k02, k03, k04 = _taps(tap, 0, c, is_tap, FLIP)
    k10, k11, k12, k13, k14 = _taps(tap, 1, c, is_tap, FLIP)
    k20, k21, k22, k23, k24 = _taps(tap, 2, c, is_tap, FLIP)
    k30, k31, k32, k33, k34 = _taps(tap, 3, c, is_tap, FLIP)
    k40, k41, k42, k43, k44 = _taps(tap, 4, c, is_tap, FLIP)
    image = x + sample * height * width * x_row
    start = tl.zeros((W, C), tl.float32)
    if BIAS:
        start += tl.load(bias + column % kernels, mask=is_tap, other=0.0).to(tl.float32)[None, :]
    s0, s1, s2, s3 = start, start, start, start
    for turn in range(ROWS + 4):
        h = first + turn - 2
        x0 = _pixel(image, h, w - 2, column, height, width, x_row, is_column)
        x1 = _pixel(image, h, w - 1, column, height, width, x_row, is_column)
        x2 = _pixel(image, h, w, column, height, width, x_row, is_column)
        x3 = _pixel(image, h, w + 1, column, height, width, x_row, is_column)
        x4 = _pixel(image, h, w + 2, column, height, width, x_row, is_column)
        total = s0 + x0 * k40 + x1 * k41 + x2 * k42 + x3 * k43 + x4 * k44
        s0 = s1 + x0 * k30 + x1 * k31 + x2 * k32 + x3 * k33 + x4 * k34
        s1 = s2 + x0 * k20 + x1 * k21 + x2 * k22 + x3 * k23 + x4 * k24
        s2 = s3 + x0 * k10 + x1 * k11 + x2 * k12 + x3 * k13 + x4 * k14
        s3 = start + x0 * k00 + x1 * k01 + x2 * k02 + x3 * k03 + x4 * k04
        done = h - 2
        line = (sample * height + done) * width * out_row
        place = (w * out_row)[:, None] + column[None, :]
        here = done + tl.zeros_like(w)
        mask = ((w < width) & (here >= first) & (here < height))[:, None] & is_column
        if ADD:
            total += tl.load(added + line + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + line + place, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _wide_stencil_weight_kernel(
    x, grad, partial, height, width, c, x_row, g_row, strips, blocks_w, ROWS: tl.constexpr,
    W: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """5x5. Each row of pixels meets the five rows of gradients around it."""
    sample = (tl.program_id(0) // strips).to(tl.int64)
    first = (tl.program_id(0) % strips) * ROWS
    last = tl.minimum(first + ROWS, height)
    w = tl.program_id(1) * W + tl.arange(0, W)
    column = tl.program_id(2) * C + tl.arange(0, C)
    is_c = column < c
    is_column = is_c[None, :]
    image = x + sample * height * width * x_row
    slopes = grad + sample * height * width * g_row
    g1 = tl.zeros((W, C), tl.float32)
    g2 = tl.zeros((W, C), tl.float32)
    g3 = tl.zeros((W, C), tl.float32)
    g4 = tl.zeros((W, C), tl.float32)
    t00 = tl.zeros((W, C), tl.float32)
    t01 = tl.zeros((W, C), tl.float32)
    t02 = tl.zeros((W, C), tl.float32)
    t03 = tl.zeros((W, C), tl.float32)
    t04 = tl.zeros((W, C), tl.float32)
    t10 = tl.zeros((W, C), tl.float32)
    t11 = tl.zeros((W, C), tl.float32)
    t12 = tl.zeros((W, C), tl.float32)
    t13 = tl.zeros((W, C), tl.float32)
    t14 = tl.zeros((W, C), tl.float32)
    t20 = tl.zeros((W, C), tl.float32)
    t21 = tl.zeros((W, C), tl.float32)
    t22 = tl.zeros((W, C), tl.float32)
    t23 = tl.zeros((W, C), tl.float32)
    t24 = tl.zeros((W, C), tl.float32)
    t30 = tl.zeros((W, C), tl.float32)
    t31 = tl.zeros((W, C), tl.float32)
    t32 = tl.zeros((W, C), tl.float32)
    t33 = tl.zeros((W, C), tl.float32)
    t34 = tl.zeros((W, C), tl.float32)
    t40 = tl.zeros((W, C), tl.float32)
    t41 = tl.zeros((W, C), tl.float32)
    t42 = tl.zeros((W, C), tl.float32)
    t43 = tl.zeros((W, C), tl.float32)
    t44 = tl.zeros((W, C), tl.float32)
    tb = tl.zeros((W, C), tl.float32)
    for turn in range(ROWS + 4):
        h = first + turn - 2
        g0 = _pixel(slopes, h + 2, w, column, last, width, g_row, is_column)
        x0 = _pixel(image, h, w - 2, column, height, width, x_row, is_column)
        x1 = _pixel(image, h, w - 1, column, height, width, x_row, is_column)
        x2 = _pixel(image, h, w, column, height, width, x_row, is_column)
        x3 = _pixel(image, h, w + 1, column, height, width, x_row, is_column)
        x4 = _pixel(image, h, w + 2, column, height, width, x_row, is_column)
        t00 += g0 * x0
        t01 += g0 * x1
        t02 += g0 * x2
        t03 += g0 * x3
        t04 += g0 * x4
        t10 += g1 * x0
        t11 += g1 * x1
        t12 += g1 * x2
        t13 += g1 * x3
        t14 += g1 * x4
        t20 += g2 * x0
        t21 += g2 * x1
        t22 += g2 * x2
        t23 += g2 * x3
        t24 += g2 * x4
        t30 += g3 * x0
        t31 += g3 * x1
        t32 += g3 * x2
        t33 += g3 * x3
        t34 += g3 * x4
        t40 += g4 * x0
        t41 += g4 * x1
        t42 += g4 * x2
        t43 += g4 * x3
        t44 += g4 * x4
        tb += g0
        g1, g2, g3, g4 = g0, g1, g2, g3
    place = partial + (tl.program_id(0).to(tl.int64) * blocks_w + tl.program_id(1)) * 26 * c
    place += column
    tl.store(place, tl.sum(t00, 0), mask=is_c)
    tl.store(place + c, tl.sum(t01, 0), mask=is_c)
    tl.store(place + 2 * c, tl.sum(t02, 0), mask=is_c)
    tl.store(place + 3 * c, tl.sum(t03, 0), mask=is_c)
    tl.store(place + 4 * c, tl.sum(t04, 0), mask=is_c)
    tl.store(place + 5 * c, tl.sum(t10, 0), mask=is_c)
    tl.store(place + 6 * c, tl.sum(t11, 0), mask=is_c)
    tl.store(place + 7 * c, tl.sum(t12, 0), mask=is_c)
    tl.store(place + 8 * c, tl.sum(t13, 0), mask=is_c)
    tl.store(place + 9 * c, tl.sum(t14, 0), mask=is_c)
    tl.store(place + 10 * c, tl.sum(t20, 0), mask=is_c)
    tl.store(place + 11 * c, tl.sum(t21, 0), mask=is_c)
    tl.store(place + 12 * c, tl.sum(t22, 0), mask=is_c)
    tl.store(place + 13 * c, tl.sum(t23, 0), mask=is_c)
    tl.store(place + 14 * c, tl.sum(t24, 0), mask=is_c)
    tl.store(place + 15 * c, tl.sum(t30, 0), mask=is_c)
    tl.store(place + 16 * c, tl.sum(t31, 0), mask=is_c)
    tl.store(place + 17 * c, tl.sum(t32, 0), mask=is_c)
    tl.store(place + 18 * c, tl.sum(t33, 0), mask=is_c)
    tl.store(place + 19 * c, tl.sum(t34, 0), mask=is_c)
    tl.store(place + 20 * c, tl.sum(t40, 0), mask=is_c)
    tl.store(place + 21 * c, tl.sum(t41, 0), mask=is_c)
    tl.store(place + 22 * c, tl.sum(t42, 0), mask=is_c)
    tl.store(place + 23 * c, tl.sum(t43, 0), mask=is_c)
    tl.store(place + 24 * c, tl.sum(t44, 0), mask=is_c)
    tl.store(place + 25 * c, tl.sum(tb, 0), mask=is_c)


@triton.jit
def _tap_sums_kernel(
    partial, weight, bias, rows, c, kernels, shared, taps, R: tl.constexpr, K: tl.constexpr
):
    """Adds up the parts of one tap, or, behind the last, of the bias, over all that share it."""
    tap, kernel = tl.program_id(0), tl.program_id(1) * K + tl.arange(0, K)
    mask = kernel < kernels
    total = tl.zeros((R, K), tl.float32)
    for start in range(0, rows, R):
        row = start + tl.arange(0, R)
        place = ((row // shared).to(tl.int64) * (taps + 1) + tap) * c + row % shared * kernels
        place = partial + place[:, None] + kernel[None, :]
        total += tl.load(place, mask=(row < rows)[:, None] & mask[None, :], other=0.0)
    total = tl.sum(total, 0)
    place = weight + kernel * taps + tap
    tl.store(place, total.to(weight.dtype.element_ty), mask=mask & (tap < taps))
    tl.store(bias + kernel, total.to(bias.dtype.element_ty), mask=mask & (tap == taps))


def tap_sums(partial: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a depthwise convolution's weight, ``like``, and bias, in its type.

    Args:
        partial: (parts, taps + 1, c), the last of the bias; c a multiple of ``like``'s channels.
        like: (kernels, 1, rows, columns).
    """
    parts, taps, c = partial.shape
    kernels = len(like)
    weight = torch.empty(like.shape, dtype=like.dtype, device=partial.device)
    bias = torch.empty(kernels, dtype=like.dtype, device=partial.device)
    if kernels:
        launch_kernel(_tap_sums_kernel, (taps, _ceil(kernels, 8)),
            partial, weight, bias, parts * (c // kernels), c, kernels, c // kernels, taps - 1, 256,
            8, num_warps=4,
        )  # fmt: skip
    return weight, bias


# Rows a program walks down, pixels and channels of its tile, warps.
STENCIL_BLOCK = (8, 32, 64, 4)
STENCIL_WEIGHT_BLOCK = (16, 4, 32, 1)
WIDE_STENCIL_BLOCK = (8, 32, 64, 4)
WIDE_STENCIL_WEIGHT_BLOCK = (16, 4, 32, 1)


def stencil(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: tuple[int, int],
    added: Tensor | None = None,
    is_transposed: bool = False,
) -> Tensor:
    """3x3 or 5x5 depthwise convolution of tokens, with zero padding.

    Args:
        x: (b, h * w, c).
        weight: (kernels, 1, 3, 3) or (kernels, 1, 5, 5), as in ``depthwise_conv``.
        bias: (kernels,) or None.
        grid: (h, w).
        added: (b, h * w, c), added to the result, or None.
        is_transposed: Applies the adjoint, for the gradient of x.

    Returns:
        (b, h * w, c).
    """
    x, spacing = _rows(x)
    b, n, c = x.shape
    out = torch.empty(b, n, c, dtype=x.dtype, device=x.device)
    added = out if added is None else added.contiguous()
    options = bias is not None, added is not out, is_transposed
    kernels = weight.shape[0]
    if weight.shape[-1] == 5:
        rows, w, channels, warps = WIDE_STENCIL_BLOCK
        # Loaded where they are used, of neighboring channels together.
        taps = weight.flatten(1).t().unsqueeze(1).expand(25, c // kernels, kernels)
        taps = taps.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        unit = 1 if spacing % 2 or c % 2 else 2
        strides = spacing // unit, c // unit
    else:
        rows, w, channels, warps = STENCIL_BLOCK
        taps = weight.contiguous()
    strips = _ceil(grid[0], rows)
    programs = b * strips, _ceil(grid[1], w), _ceil(c, channels)
    operands = x, taps, taps if bias is None else bias, added, out, *grid, c, kernels
    if not out.numel():
        return out
    if weight.shape[-1] == 5:
        launch_kernel(
            _wide_stencil_kernel,
            programs,
            *operands,
            *strides,
            strips,
            unit,
            rows,
            w,
            channels,
            *options,
            num_warps=warps,
        )
    else:
        launch_kernel(
            _stencil_kernel,
            programs,
            *operands,
            spacing,
            strips,
            rows,
            w,
            channels,
            *options,
            num_warps=warps,
        )
    return out


def stencil_weight_gradient(
    x: Tensor, grad: Tensor, grid: tuple[int, int], weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of ``weight`` of ``stencil`` and of the bias, in its type."""
    size = weight.shape[-1]
    (x, spacing), (grad, grad_spacing) = _rows(x), _rows(grad)
    b, _, c = x.shape
    is_wide, taps = size == 5, size**2
    kernel = _wide_stencil_weight_kernel if is_wide else _stencil_weight_kernel
    rows, w, channels, warps = WIDE_STENCIL_WEIGHT_BLOCK if is_wide else STENCIL_WEIGHT_BLOCK
    strips, blocks = _ceil(grid[0], rows), _ceil(grid[1], w)
    partial = torch.empty(b * strips * blocks, taps + 1, c, dtype=torch.float32, device=x.device)
    if partial.numel():
        launch_kernel(kernel, (b * strips, blocks, _ceil(c, channels)),
            x, grad, partial, *grid, c, spacing, grad_spacing, strips, blocks, rows, w, channels,
            num_warps=warps,
        )  # fmt: skip
    return tap_sums(partial, weight)


@launched("stencil")
def _stencil(
    x: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None, height: int, width: int
) -> Tensor:
    return stencil(x, weight, bias, (height, width), added)


@_stencil.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None, height: int, width: int
) -> Tensor:
    return x.new_empty(x.shape)


@launched("stencil_backward")
def _stencil_backward(
    grad: Tensor, x: Tensor, weight: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    grid = height, width
    grad_x = stencil(grad, weight, None, grid, is_transposed=True)
    return grad_x, *stencil_weight_gradient(x, grad, grid, weight)


@_stencil_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(len(weight))


def _stencil_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, added, *grid = inputs
    ctx.grid, ctx.has_bias, ctx.has_added = grid, bias is not None, added is not None
    ctx.save_for_backward(x, weight)


def _stencil_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = _stencil_backward(grad, x, weight, *ctx.grid)
    return (
        grad_x,
        grad_weight,
        grad_bias if ctx.has_bias else None,
        grad if ctx.has_added else None,
        None,
        None,
    )


_stencil.register_inference(replayed(_stencil.function))
_stencil.register_autograd(_stencil_gradients, setup_context=_stencil_setup)


def depthwise_conv(
    x: Tensor, grid: tuple[int, int], weight: Tensor, bias: Tensor | None,
    added: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See ``attnzoo.ops.depthwise_conv``."""
    dtype, (_, _, high, wide) = operand_dtype(x), weight.shape
    size = 3 if max(high, wide) <= 3 else 5
    if high != wide or high != size:
        weight = widened(weight, size)
    return _stencil(x if x.dtype is dtype else x.to(dtype), weight, bias, added, *grid)
