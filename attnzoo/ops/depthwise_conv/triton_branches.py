"""Three depthwise branches with batch norms in training, as one convolution.

With the batch's own mean and variance a norm is affine, so that the sum of the normed branches is
one 3x3 convolution. The forward reads the tokens twice: for the moments of the branches and for
that convolution. The backward computes the branches again, in three walks: for the sums that the
norms' gradients need, for the weights' gradients and for the tokens'. No branch is ever stored.
"""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.ops.depthwise_conv.triton import _pixel, _shifted, stencil
from attnzoo.ops.precision import operand_dtype
from attnzoo.ops.processes import gathered, summed
from attnzoo.ops.triton_common import _ceil, _rows, column_sum, launched


@triton.jit
def _three(weight, column, is_column):
    tap = weight + column * 3
    k0 = tl.load(tap, mask=is_column, other=0.0).to(tl.float32)[None, :]
    k1 = tl.load(tap + 1, mask=is_column, other=0.0).to(tl.float32)[None, :]
    k2 = tl.load(tap + 2, mask=is_column, other=0.0).to(tl.float32)[None, :]
    return k0, k1, k2


@triton.jit
def _row_of(weight, row: tl.constexpr, column, is_column):
    """A row of the 3x3 kernel."""
    tap = weight + column * 9 + 3 * row
    k0 = tl.load(tap, mask=is_column, other=0.0).to(tl.float32)[None, :]
    k1 = tl.load(tap + 1, mask=is_column, other=0.0).to(tl.float32)[None, :]
    k2 = tl.load(tap + 2, mask=is_column, other=0.0).to(tl.float32)[None, :]
    return k0, k1, k2


@triton.jit
def _of(table, row: tl.constexpr, c, column, is_column):
    """Row ``row`` of a table (rows, c), by channel."""
    return tl.load(table + row * c + column, mask=is_column, other=0.0)[None, :]


@triton.jit
def _branch_moments_kernel(
    x, square, upright, level, partial, height, width, c, x_row, strips, blocks_w,
    ROWS: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of the branches in a strip, (6, c), and its pixels."""
    sample = (tl.program_id(0) // strips).to(tl.int64)
    first = (tl.program_id(0) % strips) * ROWS
    w = tl.program_id(1) * W + tl.arange(0, W)
    column = tl.program_id(2) * C + tl.arange(0, C)
    is_c = column < c
    is_column = is_c[None, :]
    k00, k01, k02 = _row_of(square, 0, column, is_c)
    k10, k11, k12 = _row_of(square, 1, column, is_c)
    k20, k21, k22 = _row_of(square, 2, column, is_c)
    u0, u1, u2 = _three(upright, column, is_c)
    l0, l1, l2 = _three(level, column, is_c)
    image = x + sample * height * width * x_row
    a0, a1, a2 = _shifted(image, first - 1, w, column, height, width, c, x_row, is_column)
    b0, b1, b2 = _shifted(image, first, w, column, height, width, c, x_row, is_column)
    # Of deviations from each pixel of the first row: squares of numbers far from 0 lose digits.
    origin1 = tl.zeros((W, C), tl.float32)
    origin2 = tl.zeros((W, C), tl.float32)
    origin3 = tl.zeros((W, C), tl.float32)
    sum1 = tl.zeros((W, C), tl.float32)
    sum2 = tl.zeros((W, C), tl.float32)
    sum3 = tl.zeros((W, C), tl.float32)
    square1 = tl.zeros((W, C), tl.float32)
    square2 = tl.zeros((W, C), tl.float32)
    square3 = tl.zeros((W, C), tl.float32)
    for turn in range(ROWS):
        h = first + turn
        c0, c1, c2 = _shifted(image, h + 1, w, column, height, width, c, x_row, is_column)
        y1 = a0 * k00 + a1 * k01 + a2 * k02 + b0 * k10 + b1 * k11 + b2 * k12
        y1 += c0 * k20 + c1 * k21 + c2 * k22
        y2 = a1 * u0 + b1 * u1 + c1 * u2
        y3 = b0 * l0 + b1 * l1 + b2 * l2
        start = turn + tl.zeros_like(w) == 0
        origin1 = tl.where(start[:, None], y1, origin1)
        origin2 = tl.where(start[:, None], y2, origin2)
        origin3 = tl.where(start[:, None], y3, origin3)
        is_row = (h + tl.zeros_like(w) < height)[:, None]
        y1 = tl.where(is_row, y1 - origin1, 0.0)
        y2 = tl.where(is_row, y2 - origin2, 0.0)
        y3 = tl.where(is_row, y3 - origin3, 0.0)
        sum1 += y1
        sum2 += y2
        sum3 += y3
        square1 += y1 * y1
        square2 += y2 * y2
        square3 += y3 * y3
        a0, a1, a2 = b0, b1, b2
        b0, b1, b2 = c0, c1, c2
    line = partial + (tl.program_id(0).to(tl.int64) * blocks_w + tl.program_id(1)) * 7 * c
    line += column
    rows = tl.minimum(ROWS, height - first).to(tl.float32)
    lanes = tl.minimum(W, width - tl.program_id(1) * W).to(tl.float32)
    is_w = (w < width)[:, None]
    _put_moments(line, c, origin1, sum1, square1, rows, lanes, is_w, is_c)
    _put_moments(line + c, c, origin2, sum2, square2, rows, lanes, is_w, is_c)
    _put_moments(line + 2 * c, c, origin3, sum3, square3, rows, lanes, is_w, is_c)
    tl.store(line + 6 * c, rows * lanes + tl.zeros((C,), tl.float32), mask=is_c)


@triton.jit
def _put_moments(line, c, origin, total, squares, rows, lanes, is_w, is_c):
    mean_here = origin + total / rows
    mean = tl.sum(tl.where(is_w, mean_here, 0.0), 0) / lanes
    off = mean_here - mean[None, :]
    squares = squares - total * total / rows + rows * off * off
    tl.store(line, mean, mask=is_c)
    tl.store(line + 3 * c, tl.sum(tl.where(is_w, squares, 0.0), 0), mask=is_c)


@triton.jit
def _total_moments(
    partial, place, parts, c, total, column, is_c, B: tl.constexpr, C: tl.constexpr
):
    """Mean and variance of one branch, of its moments in all strips."""
    sums = tl.zeros((B, C), tl.float32)
    part = tl.arange(0, B)
    for first in range(0, parts, B):
        here = partial + (first + part).to(tl.int64)[:, None] * 7 * c + column[None, :]
        mask = (first + part < parts)[:, None] & is_c[None, :]
        pixels = tl.load(here + 6 * c, mask=mask, other=0.0)
        sums += pixels * tl.load(here + place, mask=mask, other=0.0)
    mean = tl.sum(sums, 0) / total
    squares = tl.zeros((B, C), tl.float32)
    for first in range(0, parts, B):
        here = partial + (first + part).to(tl.int64)[:, None] * 7 * c + column[None, :]
        mask = (first + part < parts)[:, None] & is_c[None, :]
        pixels = tl.load(here + 6 * c, mask=mask, other=0.0)
        off = tl.load(here + place, mask=mask, other=0.0) - mean[None, :]
        squares += tl.load(here + place + 3 * c, mask=mask, other=0.0) + pixels * off * off
    return mean, tl.sum(squares, 0) / total


@triton.jit
def _branch_merge_kernel(
    partial, square, upright, level, gains, shifts, stats, merged, bias, parts, c, total, eps,
    B: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Means, variances and 1 / deviations (9, c), and the one kernel (c, 9) with its bias."""
    column = tl.program_id(0) * C + tl.arange(0, C)
    is_c = column < c
    mean1, variance1 = _total_moments(partial, 0, parts, c, total, column, is_c, B, C)
    mean2, variance2 = _total_moments(partial, c, parts, c, total, column, is_c, B, C)
    mean3, variance3 = _total_moments(partial, 2 * c, parts, c, total, column, is_c, B, C)
    inverse1 = 1.0 / tl.sqrt(variance1 + eps)
    inverse2 = 1.0 / tl.sqrt(variance2 + eps)
    inverse3 = 1.0 / tl.sqrt(variance3 + eps)
    line = stats + column
    tl.store(line, mean1, mask=is_c)
    tl.store(line + c, mean2, mask=is_c)
    tl.store(line + 2 * c, mean3, mask=is_c)
    tl.store(line + 3 * c, variance1, mask=is_c)
    tl.store(line + 4 * c, variance2, mask=is_c)
    tl.store(line + 5 * c, variance3, mask=is_c)
    tl.store(line + 6 * c, inverse1, mask=is_c)
    tl.store(line + 7 * c, inverse2, mask=is_c)
    tl.store(line + 8 * c, inverse3, mask=is_c)
    scale1 = inverse1 * tl.load(gains + column, mask=is_c, other=0.0)
    scale2 = inverse2 * tl.load(gains + c + column, mask=is_c, other=0.0)
    scale3 = inverse3 * tl.load(gains + 2 * c + column, mask=is_c, other=0.0)
    shift = tl.load(shifts + column, mask=is_c, other=0.0)
    shift += tl.load(shifts + c + column, mask=is_c, other=0.0)
    shift += tl.load(shifts + 2 * c + column, mask=is_c, other=0.0)
    shift -= mean1 * scale1 + mean2 * scale2 + mean3 * scale3
    tl.store(bias + column, shift, mask=is_c)
    for tap in tl.static_range(9):
        k = tl.load(square + column * 9 + tap, mask=is_c, other=0.0).to(tl.float32) * scale1
        if tap % 3 == 1:
            down = tl.load(upright + column * 3 + tap // 3, mask=is_c, other=0.0)
            k += down.to(tl.float32) * scale2
        if tap // 3 == 1:
            along = tl.load(level + column * 3 + tap % 3, mask=is_c, other=0.0)
            k += along.to(tl.float32) * scale3
        tl.store(merged + column * 9 + tap, k, mask=is_c)


@triton.jit
def _branch_sums_kernel(
    x, grad, square, upright, level, stats, partial, height, width, c, x_row, g_row, strips,
    blocks_w, ROWS: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Sums of the gradient, and of it times each branch less its mean, in a strip, (4, c)."""
    sample = (tl.program_id(0) // strips).to(tl.int64)
    first = (tl.program_id(0) % strips) * ROWS
    w = tl.program_id(1) * W + tl.arange(0, W)
    column = tl.program_id(2) * C + tl.arange(0, C)
    is_c = column < c
    is_column = is_c[None, :]
    k00, k01, k02 = _row_of(square, 0, column, is_c)
    k10, k11, k12 = _row_of(square, 1, column, is_c)
    k20, k21, k22 = _row_of(square, 2, column, is_c)
    u0, u1, u2 = _three(upright, column, is_c)
    l0, l1, l2 = _three(level, column, is_c)
    mean1 = _of(stats, 0, c, column, is_c)
    mean2 = _of(stats, 1, c, column, is_c)
    mean3 = _of(stats, 2, c, column, is_c)
    image = x + sample * height * width * x_row
    slopes = grad + sample * height * width * g_row
    a0, a1, a2 = _shifted(image, first - 1, w, column, height, width, c, x_row, is_column)
    b0, b1, b2 = _shifted(image, first, w, column, height, width, c, x_row, is_column)
    total = tl.zeros((W, C), tl.float32)
    sum1 = tl.zeros((W, C), tl.float32)
    sum2 = tl.zeros((W, C), tl.float32)
    sum3 = tl.zeros((W, C), tl.float32)
    for turn in range(ROWS):
        h = first + turn
        c0, c1, c2 = _shifted(image, h + 1, w, column, height, width, c, x_row, is_column)
        g = _pixel(slopes, h, w, column, height, width, g_row, is_column)
        y1 = a0 * k00 + a1 * k01 + a2 * k02 + b0 * k10 + b1 * k11 + b2 * k12
        y1 += c0 * k20 + c1 * k21 + c2 * k22
        total += g
        sum1 += g * (y1 - mean1)
        sum2 += g * (a1 * u0 + b1 * u1 + c1 * u2 - mean2)
        sum3 += g * (b0 * l0 + b1 * l1 + b2 * l2 - mean3)
        a0, a1, a2 = b0, b1, b2
        b0, b1, b2 = c0, c1, c2
    line = partial + (tl.program_id(0).to(tl.int64) * blocks_w + tl.program_id(1)) * 4 * c
    line += column
    tl.store(line, tl.sum(total, 0), mask=is_c)
    tl.store(line + c, tl.sum(sum1, 0), mask=is_c)
    tl.store(line + 2 * c, tl.sum(sum2, 0), mask=is_c)
    tl.store(line + 3 * c, tl.sum(sum3, 0), mask=is_c)


@triton.jit
def _branch_slopes_kernel(
    partial, stats, gains, slopes, grad_gains, parts, c, total, B: tl.constexpr, C: tl.constexpr
):
    """Of each branch scale, shift and factor: its gradient is scale g - shift - factor y.

    That is (9, c); and the gradients of the norms' weights and biases, (4, c).
    """
    column = tl.program_id(0) * C + tl.arange(0, C)
    is_c = column < c
    part = tl.arange(0, B)
    sums = tl.zeros((B, C), tl.float32)
    sum1 = tl.zeros((B, C), tl.float32)
    sum2 = tl.zeros((B, C), tl.float32)
    sum3 = tl.zeros((B, C), tl.float32)
    for first in range(0, parts, B):
        here = partial + (first + part).to(tl.int64)[:, None] * 4 * c + column[None, :]
        mask = (first + part < parts)[:, None] & is_c[None, :]
        sums += tl.load(here, mask=mask, other=0.0)
        sum1 += tl.load(here + c, mask=mask, other=0.0)
        sum2 += tl.load(here + 2 * c, mask=mask, other=0.0)
        sum3 += tl.load(here + 3 * c, mask=mask, other=0.0)
    whole = tl.sum(sums, 0)
    tl.store(grad_gains + 3 * c + column, whole, mask=is_c)
    mean = whole / total
    _put_slopes(slopes, stats, gains, grad_gains, tl.sum(sum1, 0), mean, c, total, column, is_c)
    _put_slopes(
        slopes + 3 * c, stats + c, gains + c, grad_gains + c, tl.sum(sum2, 0), mean, c, total,
        column, is_c,
    )  # fmt: skip
    _put_slopes(
        slopes + 6 * c, stats + 2 * c, gains + 2 * c, grad_gains + 2 * c, tl.sum(sum3, 0), mean,
        c, total, column, is_c,
    )  # fmt: skip


@triton.jit
def _put_slopes(slopes, stats, gains, grad_gains, along, mean, c, total, column, is_c):
    center = tl.load(stats + column, mask=is_c, other=0.0)
    inverse = tl.load(stats + 6 * c + column, mask=is_c, other=0.0)
    scale = inverse * tl.load(gains + column, mask=is_c, other=0.0)
    along *= inverse
    factor = scale * inverse * along / total
    tl.store(grad_gains + column, along, mask=is_c)
    tl.store(slopes + column, scale, mask=is_c)
    tl.store(slopes + c + column, scale * mean - factor * center, mask=is_c)
    tl.store(slopes + 2 * c + column, factor, mask=is_c)


@triton.jit
def _branch_weight_kernel(
    x, grad, square, upright, level, slopes, partial, height, width, c, x_row, g_row, strips,
    blocks_w, ROWS: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Gradients of the branches' weights in a strip, (15, c)."""
    sample = (tl.program_id(0) // strips).to(tl.int64)
    first = (tl.program_id(0) % strips) * ROWS
    w = tl.program_id(1) * W + tl.arange(0, W)
    column = tl.program_id(2) * C + tl.arange(0, C)
    is_c = column < c
    is_column = is_c[None, :]
    image = x + sample * height * width * x_row
    grads = grad + sample * height * width * g_row
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
    tu0 = tl.zeros((W, C), tl.float32)
    tu1 = tl.zeros((W, C), tl.float32)
    tu2 = tl.zeros((W, C), tl.float32)
    tl0 = tl.zeros((W, C), tl.float32)
    tl1 = tl.zeros((W, C), tl.float32)
    tl2 = tl.zeros((W, C), tl.float32)
    for turn in range(ROWS):
        h = first + turn
        c0, c1, c2 = _shifted(image, h + 1, w, column, height, width, c, x_row, is_column)
        g = _pixel(grads, h, w, column, height, width, g_row, is_column)
        # Taps are loaded where they are used: they would not fit into registers.
        k0, k1, k2 = _row_of(square, 0, column, is_c)
        y = a0 * k0 + a1 * k1 + a2 * k2
        k0, k1, k2 = _row_of(square, 1, column, is_c)
        y += b0 * k0 + b1 * k1 + b2 * k2
        k0, k1, k2 = _row_of(square, 2, column, is_c)
        y += c0 * k0 + c1 * k1 + c2 * k2
        is_here = ((h + tl.zeros_like(w) < height) & (w < width))[:, None]
        y = _slope(g, y, slopes, 0, c, column, is_c, is_here)
        t00 += y * a0
        t01 += y * a1
        t02 += y * a2
        t10 += y * b0
        t11 += y * b1
        t12 += y * b2
        t20 += y * c0
        t21 += y * c1
        t22 += y * c2
        k0, k1, k2 = _three(upright, column, is_c)
        y = _slope(g, a1 * k0 + b1 * k1 + c1 * k2, slopes, 3, c, column, is_c, is_here)
        tu0 += y * a1
        tu1 += y * b1
        tu2 += y * c1
        k0, k1, k2 = _three(level, column, is_c)
        y = _slope(g, b0 * k0 + b1 * k1 + b2 * k2, slopes, 6, c, column, is_c, is_here)
        tl0 += y * b0
        tl1 += y * b1
        tl2 += y * b2
        a0, a1, a2 = b0, b1, b2
        b0, b1, b2 = c0, c1, c2
    line = partial + (tl.program_id(0).to(tl.int64) * blocks_w + tl.program_id(1)) * 15 * c
    line += column
    tl.store(line, tl.sum(t00, 0), mask=is_c)
    tl.store(line + c, tl.sum(t01, 0), mask=is_c)
    tl.store(line + 2 * c, tl.sum(t02, 0), mask=is_c)
    tl.store(line + 3 * c, tl.sum(t10, 0), mask=is_c)
    tl.store(line + 4 * c, tl.sum(t11, 0), mask=is_c)
    tl.store(line + 5 * c, tl.sum(t12, 0), mask=is_c)
    tl.store(line + 6 * c, tl.sum(t20, 0), mask=is_c)
    tl.store(line + 7 * c, tl.sum(t21, 0), mask=is_c)
    tl.store(line + 8 * c, tl.sum(t22, 0), mask=is_c)
    tl.store(line + 9 * c, tl.sum(tu0, 0), mask=is_c)
    tl.store(line + 10 * c, tl.sum(tu1, 0), mask=is_c)
    tl.store(line + 11 * c, tl.sum(tu2, 0), mask=is_c)
    tl.store(line + 12 * c, tl.sum(tl0, 0), mask=is_c)
    tl.store(line + 13 * c, tl.sum(tl1, 0), mask=is_c)
    tl.store(line + 14 * c, tl.sum(tl2, 0), mask=is_c)


@triton.jit
def _slope(g, y, slopes, row: tl.constexpr, c, column, is_c, is_here):
    """The gradient of a branch's pixels; 0 where there is none."""
    found = g * _of(slopes, row, c, column, is_c) - _of(slopes, row + 1, c, column, is_c)
    return tl.where(is_here, found - y * _of(slopes, row + 2, c, column, is_c), 0.0)


@triton.jit
def _branch_token_kernel(
    x, grad, square, upright, level, slopes, out, height, width, c, x_row, g_row, strips,
    ROWS: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The tokens' gradient. Each row of the branches' gradients adds to three rows of it."""
    sample = (tl.program_id(0) // strips).to(tl.int64)
    first = (tl.program_id(0) % strips) * ROWS
    w = tl.program_id(1) * W + tl.arange(0, W)
    column = tl.program_id(2) * C + tl.arange(0, C)
    is_c = column < c
    is_column = is_c[None, :]
    image = x + sample * height * width * x_row
    grads = grad + sample * height * width * g_row
    a0 = _pixel(image, first - 2, w - 2, column, height, width, x_row, is_column)
    a1 = _pixel(image, first - 2, w - 1, column, height, width, x_row, is_column)
    a2 = _pixel(image, first - 2, w, column, height, width, x_row, is_column)
    a3 = _pixel(image, first - 2, w + 1, column, height, width, x_row, is_column)
    a4 = _pixel(image, first - 2, w + 2, column, height, width, x_row, is_column)
    b0 = _pixel(image, first - 1, w - 2, column, height, width, x_row, is_column)
    b1 = _pixel(image, first - 1, w - 1, column, height, width, x_row, is_column)
    b2 = _pixel(image, first - 1, w, column, height, width, x_row, is_column)
    b3 = _pixel(image, first - 1, w + 1, column, height, width, x_row, is_column)
    b4 = _pixel(image, first - 1, w + 2, column, height, width, x_row, is_column)
    before = tl.zeros((W, C), tl.float32)
    here = tl.zeros((W, C), tl.float32)
    for turn in range(ROWS + 2):
        h = first + turn - 1
        c0 = _pixel(image, h + 1, w - 2, column, height, width, x_row, is_column)
        c1 = _pixel(image, h + 1, w - 1, column, height, width, x_row, is_column)
        c2 = _pixel(image, h + 1, w, column, height, width, x_row, is_column)
        c3 = _pixel(image, h + 1, w + 1, column, height, width, x_row, is_column)
        c4 = _pixel(image, h + 1, w + 2, column, height, width, x_row, is_column)
        is_row = (h + tl.zeros_like(w) >= 0) & (h + tl.zeros_like(w) < height)
        is_left = (is_row & (w > 0) & (w <= width))[:, None]
        is_here = (is_row & (w < width))[:, None]
        is_right = (is_row & (w + 1 < width))[:, None]
        g0 = _pixel(grads, h, w - 1, column, height, width, g_row, is_column)
        g1 = _pixel(grads, h, w, column, height, width, g_row, is_column)
        g2 = _pixel(grads, h, w + 1, column, height, width, g_row, is_column)
        # The 3x3 branch.
        k0, k1, k2 = _row_of(square, 0, column, is_c)
        y0 = a0 * k0 + a1 * k1 + a2 * k2
        y1 = a1 * k0 + a2 * k1 + a3 * k2
        y2 = a2 * k0 + a3 * k1 + a4 * k2
        k0, k1, k2 = _row_of(square, 1, column, is_c)
        y0 += b0 * k0 + b1 * k1 + b2 * k2
        y1 += b1 * k0 + b2 * k1 + b3 * k2
        y2 += b2 * k0 + b3 * k1 + b4 * k2
        k0, k1, k2 = _row_of(square, 2, column, is_c)
        y0 += c0 * k0 + c1 * k1 + c2 * k2
        y1 += c1 * k0 + c2 * k1 + c3 * k2
        y2 += c2 * k0 + c3 * k1 + c4 * k2
        y0 = _slope(g0, y0, slopes, 0, c, column, is_c, is_left)
        y1 = _slope(g1, y1, slopes, 0, c, column, is_c, is_here)
        y2 = _slope(g2, y2, slopes, 0, c, column, is_c, is_right)
        after = y2 * k0 + y1 * k1 + y0 * k2
        k0, k1, k2 = _row_of(square, 1, column, is_c)
        here += y2 * k0 + y1 * k1 + y0 * k2
        k0, k1, k2 = _row_of(square, 0, column, is_c)
        before += y2 * k0 + y1 * k1 + y0 * k2
        # The 3x1 branch.
        k0, k1, k2 = _three(upright, column, is_c)
        y = a2 * k0 + b2 * k1 + c2 * k2
        y = _slope(g1, y, slopes, 3, c, column, is_c, is_here)
        before += y * k0
        here += y * k1
        after += y * k2
        # The 1x3 branch.
        k0, k1, k2 = _three(level, column, is_c)
        y0 = _slope(g0, b0 * k0 + b1 * k1 + b2 * k2, slopes, 6, c, column, is_c, is_left)
        y1 = _slope(g1, b1 * k0 + b2 * k1 + b3 * k2, slopes, 6, c, column, is_c, is_here)
        y2 = _slope(g2, b2 * k0 + b3 * k1 + b4 * k2, slopes, 6, c, column, is_c, is_right)
        here += y2 * k0 + y1 * k1 + y0 * k2
        done = h - 1
        place = ((sample * height + done) * width + w)[:, None] * c + column[None, :]
        row = done + tl.zeros_like(w)
        mask = ((w < width) & (row >= first) & (row < height))[:, None] & is_column
        tl.store(out + place, before.to(out.dtype.element_ty), mask=mask)
        before, here = here, after
        a0, a1, a2, a3, a4 = b0, b1, b2, b3, b4
        b0, b1, b2, b3, b4 = c0, c1, c2, c3, c4


# Rows that a program walks down, pixels and channels of its tile, warps.
MOMENTS_BLOCK = (16, 16, 64, 4)
SUMS_BLOCK = (16, 16, 64, 4)
WEIGHT_BLOCK = (16, 8, 32, 2)
TOKEN_BLOCK = (16, 8, 64, 4)
PARTS = 64  # that a program adds up at a time
CHANNELS = 16  # whose parts a program adds up


def _parts(grid: tuple[int, int], b: int, c: int, block: tuple[int, ...]) -> tuple[int, ...]:
    """Strips of an image, blocks of its width, and the launch's grid."""
    strips, blocks = _ceil(grid[0], block[0]), _ceil(grid[1], block[1])
    return strips, blocks, b * strips, blocks, _ceil(c, block[2])


SCHEMA = (
    "Tensor x, Tensor square, Tensor upright, Tensor level, Tensor gains, Tensor shifts, "
    "Tensor? added, float eps, int height, int width, int processes=1"
)


@launched("normed_branches", f"({SCHEMA}) -> (Tensor, Tensor)")
def _normed_branches(
    x: Tensor, square: Tensor, upright: Tensor, level: Tensor, gains: Tensor, shifts: Tensor,
    added: Tensor | None, eps: float, height: int, width: int, processes: int = 1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The result, and means, variances and 1 / deviations over all processes, (9, c)."""
    tokens, spacing = _rows(x)
    b, _, c = x.shape
    grid = height, width
    rows, w, channels, warps = MOMENTS_BLOCK
    strips, blocks, *launch = _parts(grid, b, c, MOMENTS_BLOCK)

    def new(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float32, device=x.device)

    partial = new(b * strips * blocks, 7, c)
    stats, merged, bias = new(9, c), new(c, 1, 3, 3), new(c)
    square, upright, level = (z.contiguous() for z in (square, upright, level))
    _branch_moments_kernel[tuple(launch)](
        tokens, square, upright, level, partial, height, width, c, spacing, strips, blocks, rows,
        w, channels, num_warps=warps,
    )  # fmt: skip

    def merge(partial: Tensor, pixels: int) -> None:
        _branch_merge_kernel[(_ceil(c, CHANNELS),)](
            partial, square, upright, level, gains, shifts, stats, merged, bias, len(partial), c,
            pixels, eps, PARTS, CHANNELS,
        )  # fmt: skip

    merge(partial, b * height * width)
    if processes > 1:
        # Processes have as many pixels each: their variances are sums of squares of one.
        stats[6].fill_(1.0)
        merge(gathered.function(stats[:7], processes), processes)
    return stencil(x, merged, bias, grid, added), stats


@_normed_branches.register_fake
def _(
    x: Tensor, square: Tensor, upright: Tensor, level: Tensor, gains: Tensor, shifts: Tensor,
    added: Tensor | None, eps: float, height: int, width: int, processes: int = 1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape), gains.new_empty(9, x.shape[2])


@launched(
    "normed_branches_backward",
    "(Tensor grad, Tensor stats, Tensor x, Tensor square, Tensor upright, Tensor level, "
    "Tensor gains, int height, int width, int processes=1) -> (Tensor, Tensor, Tensor)",
)
def _normed_branches_backward(
    grad: Tensor, stats: Tensor, x: Tensor, square: Tensor, upright: Tensor, level: Tensor,
    gains: Tensor, height: int, width: int, processes: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of x; of the weights, (15, c); of the norms' weights and their one bias, (4, c)."""
    (tokens, spacing), (grad, grad_spacing) = _rows(x), _rows(grad)
    b, _, c = x.shape
    grid = height, width

    def new(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float32, device=x.device)

    slopes, grad_gains = new(9, c), new(4, c)
    square, upright, level = (z.contiguous() for z in (square, upright, level))
    rows, w, channels, warps = SUMS_BLOCK
    strips, blocks, *launch = _parts(grid, b, c, SUMS_BLOCK)
    partial = new(b * strips * blocks, 4, c)
    _branch_sums_kernel[tuple(launch)](
        tokens, grad, square, upright, level, stats, partial, height, width, c, spacing,
        grad_spacing, strips, blocks, rows, w, channels, num_warps=warps,
    )  # fmt: skip
    own = None
    if processes > 1:
        own = column_sum(partial)
        partial = summed.function(own[None])
    _branch_slopes_kernel[(_ceil(c, CHANNELS),)](
        partial, stats, gains, slopes, grad_gains, len(partial), c,
        processes * b * height * width, PARTS, CHANNELS,
    )  # fmt: skip
    if own is not None:  # weights see the loss of their own process
        torch.mul(own[1:], stats[6:], out=grad_gains[:3])
        grad_gains[3].copy_(own[0])
    rows, w, channels, warps = WEIGHT_BLOCK
    strips, blocks, *launch = _parts(grid, b, c, WEIGHT_BLOCK)
    partial = new(b * strips * blocks, 15, c)
    _branch_weight_kernel[tuple(launch)](
        tokens, grad, square, upright, level, slopes, partial, height, width, c, spacing,
        grad_spacing, strips, blocks, rows, w, channels, num_warps=warps,
    )  # fmt: skip
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, w, channels, warps = TOKEN_BLOCK
    strips, blocks, *launch = _parts(grid, b, c, TOKEN_BLOCK)
    _branch_token_kernel[tuple(launch)](
        tokens, grad, square, upright, level, slopes, grad_x, height, width, c, spacing,
        grad_spacing, strips, rows, w, channels, num_warps=warps,
    )  # fmt: skip
    return grad_x, column_sum(partial), grad_gains


@_normed_branches_backward.register_fake
def _(
    grad: Tensor, stats: Tensor, x: Tensor, square: Tensor, upright: Tensor, level: Tensor,
    gains: Tensor, height: int, width: int, processes: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    c = x.shape[2]
    return x.new_empty(x.shape), stats.new_empty(15, c), stats.new_empty(4, c)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, square, upright, level, gains, _, added, _, *ctx.grid = inputs
    ctx.has_added = added is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], x, square, upright, level, gains)


def _gradients(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 11
    saved = ctx.saved_tensors
    grad_x, weights, gains = _normed_branches_backward(grad, *saved, *ctx.grid)
    parts = [
        part.t().reshape(weight.shape).to(weight.dtype)
        for part, weight in zip(weights.split([9, 3, 3]), saved[2:5], strict=True)
    ]
    # Not expanded: gradients that share memory would be clipped once for each.
    shifts = gains[3:].repeat(3, 1)
    return grad_x, *parts, gains[:3], shifts, grad if ctx.has_added else None, *[None] * 4


_normed_branches.register_autograd(_gradients, setup_context=_setup)


def normed_branches(
    x: Tensor, grid: tuple[int, int], weights: Sequence[Tensor], gains: Tensor,
    shifts: Tensor, eps: float, added: Tensor | None = None, processes: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The sum of a 3x3, a 3x1 and a 1x3 branch, each normed over the batch.

    Args:
        x: (b, h * w, c).
        grid: (h, w).
        weights: Of the branches, (c, 1, 3, 3), (c, 1, 3, 1) and (c, 1, 1, 3).
        gains: Weights of the norms, (3, c).
        shifts: Their biases, (3, c).
        eps: Added to the variances.
        added: (b, h * w, c), added to the result, or None.
        processes: How many norm over all of their batches, of one shape; every one of them calls
            this, and its backward.

    Returns:
        (b, h * w, c); means and biased variances of the branches, (3, c) each.
    """
    out, stats = _normed_branches(
        x.to(operand_dtype(x)), *weights, gains.float(), shifts.float(), added, eps, *grid,
        processes,
    )  # fmt: skip
    return out, stats[:3], stats[3:6]
