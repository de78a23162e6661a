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

from attnzoo.ops.depthwise_conv.triton import (
    _filled,
    _is_even,
    _parts,
    _place,
    _put_row,
    _put_sums,
    _row,
    require_fit,
    stencil,
)
from attnzoo.ops.precision import operand_dtype
from attnzoo.ops.processes import gathered, summed
from attnzoo.ops.triton_common import _ceil, _rows, column_sum, launched


@triton.jit
def _taps(weight, column, is_column, N: tl.constexpr):
    found = ()
    for i in tl.static_range(N):
        z = tl.load(weight + column * N + i, mask=is_column, other=0.0)
        found += (z.to(tl.float32),)
    return found


@triton.jit
def _of(table, row: tl.constexpr, c, column, is_column):
    """Row ``row`` of a table (rows, c), by channel."""
    return tl.load(table + row * c + column, mask=is_column, other=0.0)


@triton.jit
def _square(start, a, b, c, k, j: tl.constexpr):
    """Adds the 3x3 branch of three rows of pixels, of which ``j`` is the leftmost."""
    start = start + a[j] * k[0] + a[j + 1] * k[1] + a[j + 2] * k[2]
    start = start + b[j] * k[3] + b[j + 1] * k[4] + b[j + 2] * k[5]
    return start + c[j] * k[6] + c[j + 1] * k[7] + c[j + 2] * k[8]


@triton.jit
def _dot3(start, p, q, r, k):
    return start + p * k[0] + q * k[1] + r * k[2]


@triton.jit
def _branch_moments_kernel(
    x, square, upright, level, partial, height, width, c, strips, blocks_w,
    X_ROW: tl.constexpr, ROWS: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
    WARPS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of the branches in a strip, (6, c), and its pixels."""
    part, sample, first, w, channel = _place(c, strips, blocks_w, ROWS, W, C, WARPS)
    column = channel[None, :] + tl.zeros((WARPS, 1), tl.int32)
    is_column = (column < c) | EVEN
    k = _taps(square, column, is_column, 9)
    u = _taps(upright, column, is_column, 3)
    v = _taps(level, column, is_column, 3)
    image = x + sample * height * width * X_ROW + (w * X_ROW + column)
    stop = tl.minimum(first + ROWS, height)
    end = tl.minimum(stop + 1, height)
    above = _row(image, first - 1, w, height, width, is_column, X_ROW, -1, W + 1, W, EVEN)
    here = _row(image, first, w, height, width, is_column, X_ROW, -1, W + 1, W, EVEN)
    below = _row(image, first + 1, w, height, width, is_column, X_ROW, -1, W + 1, W, EVEN)
    # Of deviations from the first pixel: squares of numbers far from 0 lose digits.
    zero = tl.zeros((WARPS, C), tl.float32)
    origin1 = _square(zero, above, here, below, k, 0)
    origin2 = _dot3(zero, above[1], here[1], below[1], u)
    origin3 = _dot3(zero, here[0], here[1], here[2], v)
    sum1, sum2, sum3, square1, square2, square3 = zero, zero, zero, zero, zero, zero
    for turn in tl.range(0, stop - first, loop_unroll_factor=UNROLL):
        h = first + turn
        # Loaded a turn ahead of its use.
        after = _row(image, h + 2, w, end, width, is_column, X_ROW, -1, W + 1, W, EVEN)
        for j in tl.static_range(W):
            y1 = _square(-origin1, above, here, below, k, j)
            y2 = _dot3(-origin2, above[j + 1], here[j + 1], below[j + 1], u)
            y3 = _dot3(-origin3, here[j], here[j + 1], here[j + 2], v)
            if not EVEN:
                is_w = w + j < width
                y1 = tl.where(is_w, y1, 0.0)
                y2 = tl.where(is_w, y2, 0.0)
                y3 = tl.where(is_w, y3, 0.0)
            sum1 += y1
            sum2 += y2
            sum3 += y3
            square1 += y1 * y1
            square2 += y2 * y2
            square3 += y3 * y3
        above, here, below = here, below, after
    pixels = (tl.maximum(tl.minimum(width - w, W), 0) * (stop - first)).to(tl.float32)
    line = partial + part * 7 * c + channel
    is_c = channel < c
    _put_moments(line, c, origin1, sum1, square1, pixels, is_c)
    _put_moments(line + c, c, origin2, sum2, square2, pixels, is_c)
    _put_moments(line + 2 * c, c, origin3, sum3, square3, pixels, is_c)
    tl.store(line + 6 * c, tl.sum(pixels + zero, 0), mask=is_c)


@triton.jit
def _put_moments(line, c, origin, total, squares, pixels, is_c):
    off = total / tl.maximum(pixels, 1.0)
    mean = tl.sum((origin + off) * pixels, 0) / tl.sum(pixels, 0)
    squares -= total * off
    off += origin - mean[None, :]
    tl.store(line, mean, mask=is_c)
    tl.store(line + 3 * c, tl.sum(squares + pixels * off * off, 0), mask=is_c)


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
    x, grad, square, upright, level, stats, partial, height, width, c, strips, blocks_w,
    X_ROW: tl.constexpr, G_ROW: tl.constexpr, ROWS: tl.constexpr, W: tl.constexpr,
    C: tl.constexpr, WARPS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Each warp's sums of the gradient, and of it times each branch less its mean, (4, c)."""
    part, sample, first, w, channel = _place(c, strips, blocks_w, ROWS, W, C, WARPS)
    column = channel[None, :] + tl.zeros((WARPS, 1), tl.int32)
    is_column = (column < c) | EVEN
    k = _taps(square, column, is_column, 9)
    u = _taps(upright, column, is_column, 3)
    v = _taps(level, column, is_column, 3)
    mean1 = _of(stats, 0, c, column, is_column)
    mean2 = _of(stats, 1, c, column, is_column)
    mean3 = _of(stats, 2, c, column, is_column)
    image = x + sample * height * width * X_ROW + (w * X_ROW + column)
    slopes = grad + sample * height * width * G_ROW + (w * G_ROW + column)
    stop = tl.minimum(first + ROWS, height)
    end = tl.minimum(stop + 1, height)
    above = _row(image, first - 1, w, height, width, is_column, X_ROW, -1, W + 1, W, EVEN)
    here = _row(image, first, w, height, width, is_column, X_ROW, -1, W + 1, W, EVEN)
    below = _row(image, first + 1, w, height, width, is_column, X_ROW, -1, W + 1, W, EVEN)
    g = _row(slopes, first, w, height, width, is_column, G_ROW, 0, W, W, EVEN)
    total = tl.zeros((WARPS, C), tl.float32)
    sum1, sum2, sum3 = total, total, total
    for turn in tl.range(0, stop - first, loop_unroll_factor=UNROLL):
        h = first + turn
        # Loaded a turn ahead of their use.
        after = _row(image, h + 2, w, end, width, is_column, X_ROW, -1, W + 1, W, EVEN)
        later = _row(slopes, h + 1, w, stop, width, is_column, G_ROW, 0, W, W, EVEN)
        for j in tl.static_range(W):
            total += g[j]
            sum1 += g[j] * _square(-mean1, above, here, below, k, j)
            sum2 += g[j] * _dot3(-mean2, above[j + 1], here[j + 1], below[j + 1], u)
            sum3 += g[j] * _dot3(-mean3, here[j], here[j + 1], here[j + 2], v)
        above, here, below, g = here, below, after, later
    sums = (total, sum1, sum2, sum3)
    _put_sums(partial, sums, part, c, column, is_column, WARPS)


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
def _products(sums, d1, d2, d3, a, b, c, W: tl.constexpr):
    """Adds the products of three rows of pixels that the weights' gradients sum up."""
    rows = (a, b, c)
    found = ()
    for i in tl.static_range(9):
        total = sums[i]
        for j in tl.static_range(W):
            total += d1[j + 1] * rows[i // 3][j + 1 + i % 3]
        found += (total,)
    for i in tl.static_range(3):
        total = sums[9 + i]
        for j in tl.static_range(W):
            total += d2[j] * rows[i][j + 2]
        found += (total,)
    for i in tl.static_range(3):
        total = sums[12 + i]
        for j in tl.static_range(W):
            total += d3[j + 1] * b[j + 1 + i]
        found += (total,)
    return found


@triton.jit
def _branch_gradient_kernel(
    x, grad, square, upright, level, slopes, out, partial, height, width, c, strips, blocks_w,
    X_ROW: tl.constexpr, G_ROW: tl.constexpr, OUT_ROW: tl.constexpr, ROWS: tl.constexpr,
    W: tl.constexpr, C: tl.constexpr, WARPS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The tokens' gradient, and each warp's of the branches' weights, (15, c).

    Each row of the branches' gradients adds to three rows of the tokens'.
    """
    part, sample, first, w, channel = _place(c, strips, blocks_w, ROWS, W, C, WARPS)
    column = channel[None, :] + tl.zeros((WARPS, 1), tl.int32)
    is_column = (column < c) | EVEN
    k = _taps(square, column, is_column, 9)
    u = _taps(upright, column, is_column, 3)
    v = _taps(level, column, is_column, 3)
    s = ()
    for i in tl.static_range(9):
        s += (_of(slopes, i, c, column, is_column),)
    image = x + sample * height * width * X_ROW + (w * X_ROW + column)
    grads = grad + sample * height * width * G_ROW + (w * G_ROW + column)
    target = out + sample * height * width * OUT_ROW + (w * OUT_ROW + column)
    begin, stop = tl.maximum(first - 1, 0), tl.minimum(first + ROWS + 1, height)
    a = _row(image, begin - 1, w, height, width, is_column, X_ROW, -2, W + 2, W, EVEN)
    b = _row(image, begin, w, height, width, is_column, X_ROW, -2, W + 2, W, EVEN)
    zero = tl.zeros((WARPS, C), tl.float32)
    before, here, sums = (), (), ()
    for _ in tl.static_range(W):
        before += (zero,)
        here += (zero,)
    for _ in tl.static_range(15):
        sums += (zero,)
    for turn in tl.range(0, stop - begin, loop_unroll_factor=UNROLL):
        h = begin + turn
        below = _row(image, h + 1, w, height, width, is_column, X_ROW, -2, W + 2, W, EVEN)
        g = _row(grads, h, w, height, width, is_column, G_ROW, -1, W + 1, W, EVEN)
        d1, d2, d3 = (), (), ()
        for j in tl.static_range(W + 2):
            z1 = g[j] * s[0] - s[1] - s[2] * _square(zero, a, b, below, k, j)
            z3 = g[j] * s[6] - s[7] - s[8] * _dot3(zero, b[j], b[j + 1], b[j + 2], v)
            if (j == 0) | (j == W + 1) | (not EVEN):
                at = w + j - 1
                is_w = (at >= 0) & (at < width)
                z1 = tl.where(is_w, z1, 0.0)
                z3 = tl.where(is_w, z3, 0.0)
            d1 += (z1,)
            d3 += (z3,)
        for j in tl.static_range(W):
            z2 = g[j + 1] * s[3] - s[4] - s[5] * _dot3(zero, a[j + 2], b[j + 2], below[j + 2], u)
            if not EVEN:
                z2 = tl.where(w + j < width, z2, 0.0)
            d2 += (z2,)
        if (h >= first) & (h < first + ROWS):
            sums = _products(sums, d1, d2, d3, a, b, below, W)
        done, met, after = (), (), ()
        for j in tl.static_range(W):
            done += (_dot3(before[j] + d2[j] * u[0], d1[j + 2], d1[j + 1], d1[j], k),)
            z = _dot3(here[j] + d2[j] * u[1], d1[j + 2], d1[j + 1], d1[j], k[3:6])
            met += (_dot3(z, d3[j + 2], d3[j + 1], d3[j], v),)
            after += (_dot3(d2[j] * u[2], d1[j + 2], d1[j + 1], d1[j], k[6:9]),)
        _put_row(target, done, h - 1, w, width, is_column & (h > first), OUT_ROW, W, EVEN)
        before, here, a, b = met, after, b, below
    # Below the image's last row there is none that completes it.
    is_last = stop <= first + ROWS
    _put_row(target, before, stop - 1, w, width, is_column & is_last, OUT_ROW, W, EVEN)
    _put_sums(partial, sums, part, c, column, is_column, WARPS)


# Rows that a thread walks down, its pixels of a row, channels of its warp, warps side by side; 0
# rows as in ``STENCIL_BLOCK``. Gradients are bound by what a processor computes: of 192 programs
# some of 132 processors had two, and took as long as if all had.
MOMENTS_BLOCK = (16, 4, 64, 4)
SUMS_BLOCK = (16, 4, 64, 4)
GRADIENT_BLOCK = (0, 4, 32, 4)
PROCESSORS = 132
UNROLL = tl.constexpr(3)  # rows of pixels take turns in three places: none is moved
PARTS = 64  # that a program adds up at a time
CHANNELS = 16  # whose parts a program adds up


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
    require_fit(x, grid)
    strips, blocks, parts, programs = _parts(grid, b, c, MOMENTS_BLOCK)

    def new(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float32, device=x.device)

    partial = new(parts, 7, c)
    stats, merged, bias = new(9, c), new(c, 1, 3, 3), new(c)
    square, upright, level = (z.contiguous() for z in (square, upright, level))
    _branch_moments_kernel[(programs,)](
        tokens, square, upright, level, partial, height, width, c, strips, blocks, spacing,
        *MOMENTS_BLOCK, _is_even(width, c, MOMENTS_BLOCK), num_warps=MOMENTS_BLOCK[3],
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
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    operands = grad, stats, x, square, upright, level, gains, height, width, processes
    return grad_x, *branch_gradients(*operands, grad_x)


def branch_gradients(
    grad: Tensor, stats: Tensor, x: Tensor, square: Tensor, upright: Tensor, level: Tensor,
    gains: Tensor, height: int, width: int, processes: int, grad_x: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Those of the weights and of the norms, and that of x into a part of a packed gradient."""
    (tokens, spacing), (grad, grad_spacing) = _rows(x), _rows(grad)
    b, _, c = x.shape
    grid = height, width

    def new(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float32, device=x.device)

    slopes, grad_gains = new(9, c), new(4, c)
    square, upright, level = (z.contiguous() for z in (square, upright, level))
    strips, blocks, parts, programs = _parts(grid, b, c, SUMS_BLOCK)
    partial = new(parts * SUMS_BLOCK[3], 4, c)
    _branch_sums_kernel[(programs,)](
        tokens, grad, square, upright, level, stats, partial, height, width, c, strips,
        blocks, spacing, grad_spacing, *SUMS_BLOCK, _is_even(width, c, SUMS_BLOCK),
        num_warps=SUMS_BLOCK[3],
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
    block = _filled(GRADIENT_BLOCK, grid, b, c, PROCESSORS, 2)
    strips, blocks, parts, programs = _parts(grid, b, c, block)
    partial = new(parts * block[3], 15, c)
    _branch_gradient_kernel[(programs,)](
        tokens, grad, square, upright, level, slopes, grad_x, partial, height, width, c, strips,
        blocks, spacing, grad_spacing, grad_x.stride(1), *block, _is_even(width, c, block),
        num_warps=block[3],
    )  # fmt: skip
    return column_sum(partial), grad_gains


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
    parts = split_branches(weights, saved[2:5])
    # Not expanded: gradients that share memory would be clipped once for each.
    shifts = gains[3:].repeat(3, 1)
    return grad_x, *parts, gains[:3], shifts, grad if ctx.has_added else None, *[None] * 4


def split_branches(found: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the branches' weights, which come as (15, c)."""
    return [
        part.t().reshape(weight.shape).to(weight.dtype)
        for part, weight in zip(found.split([9, 3, 3]), weights, strict=True)
    ]


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
