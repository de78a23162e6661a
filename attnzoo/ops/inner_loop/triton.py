"""Test-time training of packed tokens: the inner step, and what reads the trained model, fused.

A first launch makes the gradients of parts of the tokens, a second adds them up and takes the
step, a third reads. The backward goes the same way back, and computes anew what the tokens give.
The convolution's programs are the first of each launch and wait for none of the heads'.
"""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportReturnType=false

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.ops.precision import operand_dtype
from attnzoo.ops.triton_common import (
    _add_dot,
    _ceil,
    _dot,
    _is_fast,
    _power_of_2,
    _precision,
    _rows,
    _width,
    column_sum,
    launch_kernel,
    launched,
)
from attnzoo.ops.triton_replay import replayed


@triton.jit
def _part(program, each, splits, n, chunk):
    """A program's number in its part of the tokens; part, image, first token, and how many."""
    part = (program // each).to(tl.int64)
    start = (part % splits) * chunk
    length = tl.minimum(chunk, n - start).to(tl.int32)
    return program % each, part, part // splits, start, length


@triton.jit
def _square(e, W: tl.constexpr):
    """Columns of a head, the places of its matrices' numbers, and which of both there are."""
    column = tl.arange(0, W)
    is_column = column < e
    place = column[:, None] * e + column[None, :]
    return column, is_column, place, is_column[:, None] & is_column[None, :]


@triton.jit
def _matrix(base, heads, head, e, place, mask, DTYPE: tl.constexpr):
    """Two matrices of a head, of all heads' first ones and then all second ones."""
    first = tl.load(base + head * e * e + place, mask=mask, other=0.0).to(DTYPE)
    second = tl.load(base + (heads + head) * e * e + place, mask=mask, other=0.0).to(DTYPE)
    return first, second


@triton.jit
def _window(x, tap, row, is_row, start, height, width, x_row, column, is_column):
    """What a tap sees of rows of tokens behind ``start``, to which ``x`` points."""
    token = start.to(tl.int32) + row
    i, j = token // width + tap // 3 - 1, token % width + tap % 3 - 1
    is_seen = is_row & (i >= 0) & (i < height) & (j >= 0) & (j < width)
    place = tl.expand_dims((row + (tap // 3 - 1) * width + tap % 3 - 1) * x_row, -1) + column
    mask = tl.expand_dims(is_seen, -1) & is_column
    return tl.load(x + place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _window_products(
    x, y, partial, start, length, height, width, x_row, y_row, c, column, R: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """For each tap the sum of y times the x that the tap sees: (9, c)."""
    is_column = column < c
    tap = tl.arange(0, 16)[:, None]
    total = tl.zeros((16, R, C), tl.float32)
    for begin in range(0, length, R):
        row = begin + tl.arange(0, R)
        is_row = row < length
        mask = is_row[:, None] & is_column[None, :]
        factor = tl.load(y + row[:, None] * y_row + column[None, :], mask=mask, other=0.0)
        is_row = is_row[None, :] & (tap < 9)
        z = _window(x, tap, row[None, :], is_row, start, height, width, x_row, column, is_column)
        total += z * factor.to(tl.float32)[None, :, :]
    place = partial + tap * c + column[None, :]
    tl.store(place, tl.sum(total, 1), mask=(tap < 9) & is_column[None, :])


@triton.jit
def _window_sum(
    x, taps, out, row, length, start, height, width, x_row, out_row, c, column,
    FLIP: tl.constexpr,
):  # fmt: skip
    """The convolution with an image's own taps, (9, c), or its transpose; returns its sum."""
    is_row, is_column = row < length, column < c
    total = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    for t in tl.static_range(9):
        # The transposed stencil is the stencil turned by half a turn.
        tap = tl.load(taps + (8 - t if FLIP else t) * c + column, mask=is_column, other=0.0)
        z = _window(x, t, row, is_row, start, height, width, x_row, column, is_column)
        total += z * tap[None, :]
    place = out + row[:, None] * out_row + column[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])
    return tl.sum(total, 0)


@triton.jit
def _inner_fold_kernel(
    tokens, w1, w2, partial, n, token_row, heads, e, splits, chunk, size, windows, blocks, height,
    width, R: tl.constexpr, W: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """K^T (v * SiLU(z_2)) and K^T (v * z_1 * SiLU'(z_2)) of a part of the tokens.

    Of the convolution, for each tap the sum of v times the k that the tap sees.
    """
    program = tl.program_id(0)
    if program < windows:
        block, part, sample, start, length = _part(program, blocks, splits, n, chunk)
        local = tokens + (sample * n + start) * token_row + 3 * heads * e
        _window_products(
            local + e, local + 2 * e, partial + part * size + 2 * heads * e * e, start, length,
            height, width, token_row, token_row, e, block * C + tl.arange(0, C), R // 2, C,
        )  # fmt: skip
    else:
        head, part, sample, start, length = _part(program - windows, heads, splits, n, chunk)
        column, is_column, place, is_place = _square(e, W)
        first = tl.load(w1 + head * e * e + place, mask=is_place, other=0.0).to(DTYPE)
        second = tl.load(w2 + head * e * e + place, mask=is_place, other=0.0).to(DTYPE)
        keys = tokens + (sample * n + start) * token_row + (heads + head) * e
        g1 = tl.zeros((W, W), tl.float32)
        g2 = tl.zeros((W, W), tl.float32)
        for begin in range(0, length, R):
            row = begin + tl.arange(0, R)
            mask = (row < length)[:, None] & is_column[None, :]
            here = keys + row[:, None] * token_row + column[None, :]
            k = tl.load(here, mask=mask, other=0.0).to(DTYPE)
            v = tl.load(here + heads * e, mask=mask, other=0.0).to(tl.float32)
            linear = _dot(k, first, P)
            gate = _dot(k, second, P)
            s = tl.sigmoid(gate)
            turned = tl.trans(k)
            g1 = _add_dot(g1, turned, (v * gate * s).to(DTYPE), P)
            g2 = _add_dot(g2, turned, (v * linear * s * (1 + gate * (1 - s))).to(DTYPE), P)
        partial += part * size + head * e * e
        tl.store(partial + place, g1, mask=is_place)
        tl.store(partial + heads * e * e + place, g2, mask=is_place)


@triton.jit
def _inner_read_kernel(
    tokens, trained, out, n, token_row, out_row, heads, e, splits, chunk, size, windows, blocks,
    height, width, R: tl.constexpr, W: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """(q W_1) * SiLU(q W_2), and behind the heads the convolution of its queries."""
    program = tl.program_id(0)
    if program < windows:
        block, _, sample, start, length = _part(program, blocks, splits, n, chunk)
        channel = block * C + tl.arange(0, C)
        token = sample * n + start
        taps = trained + sample * size + 2 * heads * e * e
        for begin in range(0, length, R):
            _window_sum(
                tokens + token * token_row + 3 * heads * e, taps,
                out + token * out_row + heads * e, begin + tl.arange(0, R), length, start, height,
                width, token_row, out_row, e, channel, False,
            )  # fmt: skip
    else:
        head, _, sample, start, length = _part(program - windows, heads, splits, n, chunk)
        column, is_column, place, is_place = _square(e, W)
        first, second = _matrix(trained + sample * size, heads, head, e, place, is_place, DTYPE)
        token = sample * n + start
        queries = tokens + token * token_row + head * e
        out += token * out_row + head * e
        for begin in range(0, length, R):
            row = begin + tl.arange(0, R)
            mask = (row < length)[:, None] & is_column[None, :]
            here = queries + row[:, None] * token_row + column[None, :]
            q = tl.load(here, mask=mask, other=0.0).to(DTYPE)
            gate = _dot(q, second, P)
            o = _dot(q, first, P) * gate * tl.sigmoid(gate)
            here = out + row[:, None] * out_row + column[None, :]
            tl.store(here, o.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _inner_query_kernel(
    tokens, trained, slope, grad, partial, sums, n, token_row, slope_row, grad_row, sums_row,
    heads, e, splits, chunk, size, windows, blocks, height, width, R: tl.constexpr,
    W: tl.constexpr, C: tl.constexpr, P: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries, their sum, and a part of those of what is trained."""
    program = tl.program_id(0)
    if program < windows:
        block, part, sample, start, length = _part(program, blocks, splits, n, chunk)
        channel = block * C + tl.arange(0, C)
        token = sample * n + start
        tokens += token * token_row + 3 * heads * e
        slope += token * slope_row + heads * e
        grad += token * grad_row + 3 * heads * e
        taps = trained + sample * size + 2 * heads * e * e
        of_queries = tl.zeros((C,), tl.float32)
        for begin in range(0, length, R):
            of_queries += _window_sum(
                slope, taps, grad, begin + tl.arange(0, R), length, start, height, width,
                slope_row, grad_row, e, channel, True,
            )  # fmt: skip
        here = sums + part * sums_row + size + 3 * heads * e + channel
        tl.store(here, of_queries, mask=channel < e)
        _window_products(
            tokens, slope, partial + part * size + 2 * heads * e * e, start, length, height,
            width, token_row, slope_row, e, channel, R // 2, C,
        )  # fmt: skip
    else:
        head, part, sample, start, length = _part(program - windows, heads, splits, n, chunk)
        column, is_column, place, is_place = _square(e, W)
        first, second = _matrix(trained + sample * size, heads, head, e, place, is_place, DTYPE)
        token = sample * n + start
        queries = tokens + token * token_row + head * e
        slope += token * slope_row + head * e
        grad += token * grad_row + head * e
        g1 = tl.zeros((W, W), tl.float32)
        g2 = tl.zeros((W, W), tl.float32)
        of_query = tl.zeros((W,), tl.float32)
        for begin in range(0, length, R):
            row = begin + tl.arange(0, R)
            mask = (row < length)[:, None] & is_column[None, :]
            here = queries + row[:, None] * token_row + column[None, :]
            q = tl.load(here, mask=mask, other=0.0).to(DTYPE)
            here = slope + row[:, None] * slope_row + column[None, :]
            o = tl.load(here, mask=mask, other=0.0).to(tl.float32)
            gate = _dot(q, second, P)
            s = tl.sigmoid(gate)
            of_gate = (o * _dot(q, first, P) * s * (1 + gate * (1 - s))).to(DTYPE)
            of_linear = (o * gate * s).to(DTYPE)
            found = _dot(of_linear, tl.trans(first), P)
            found = _add_dot(found, of_gate, tl.trans(second), P)
            here = grad + row[:, None] * grad_row + column[None, :]
            tl.store(here, found.to(grad.dtype.element_ty), mask=mask)
            of_query += tl.sum(found, 0)
            turned = tl.trans(q)
            g1 = _add_dot(g1, turned, of_linear, P)
            g2 = _add_dot(g2, turned, of_gate, P)
        tl.store(sums + part * sums_row + size + head * e + column, of_query, mask=is_column)
        partial += part * size + head * e * e
        tl.store(partial + place, g1, mask=is_place)
        tl.store(partial + heads * e * e + place, g2, mask=is_place)


@triton.jit
def _inner_key_kernel(
    tokens, w1, w2, moved, passed, grad, sums, n, token_row, grad_row, sums_row, heads, e, splits,
    chunk, size, windows, blocks, height, width, R: tl.constexpr, W: tl.constexpr,
    C: tl.constexpr, P: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values, their sums, and a part of those of the first weights.

    ``moved`` are the gradients of what ``_inner_fold_kernel`` sums; ``passed``, those of the
    weights past the step, are the first part's.
    """
    program = tl.program_id(0)
    if program < windows:
        block, part, sample, start, length = _part(program, blocks, splits, n, chunk)
        channel = block * C + tl.arange(0, C)
        token = sample * n + start
        tokens += token * token_row + 3 * heads * e
        grad += token * grad_row + 3 * heads * e
        taps = moved + sample * size + 2 * heads * e * e
        near_keys = tl.zeros((C,), tl.float32)
        near_values = tl.zeros((C,), tl.float32)
        for begin in range(0, length, R):
            row = begin + tl.arange(0, R)
            near_keys += _window_sum(
                tokens + 2 * e, taps, grad + e, row, length, start, height, width, token_row,
                grad_row, e, channel, True,
            )  # fmt: skip
            near_values += _window_sum(
                tokens + e, taps, grad + 2 * e, row, length, start, height, width, token_row,
                grad_row, e, channel, False,
            )  # fmt: skip
        tap = tl.arange(0, 16)[None, :]
        is_tap = (channel < e)[:, None] & (tap < 9)
        here = 2 * heads * e * e + channel[:, None] * 9 + tap
        is_own = is_tap & (part % splits == 0)
        g = tl.load(passed + sample * size + here, mask=is_own, other=0.0)
        sums += part * sums_row
        tl.store(sums + here, g, mask=is_tap)
        near = sums + size + 3 * heads * e + channel
        tl.store(near + e, near_keys, mask=channel < e)
        tl.store(near + 2 * e, near_values, mask=channel < e)
    else:
        head, part, sample, start, length = _part(program - windows, heads, splits, n, chunk)
        column, is_column, place, is_place = _square(e, W)
        first = tl.load(w1 + head * e * e + place, mask=is_place, other=0.0).to(DTYPE)
        second = tl.load(w2 + head * e * e + place, mask=is_place, other=0.0).to(DTYPE)
        m1, m2 = _matrix(moved + sample * size, heads, head, e, place, is_place, DTYPE)
        is_first = is_place & (part % splits == 0)
        g1, g2 = _matrix(passed + sample * size, heads, head, e, place, is_first, tl.float32)
        of_keys = tl.zeros((W,), tl.float32)
        of_values = tl.zeros((W,), tl.float32)
        token = sample * n + start
        keys = tokens + token * token_row + (heads + head) * e
        grad += token * grad_row + (heads + head) * e
        for begin in range(0, length, R):
            row = begin + tl.arange(0, R)
            mask = (row < length)[:, None] & is_column[None, :]
            here = keys + row[:, None] * token_row + column[None, :]
            k = tl.load(here, mask=mask, other=0.0).to(DTYPE)
            v = tl.load(here + heads * e, mask=mask, other=0.0).to(tl.float32)
            linear = _dot(k, first, P)
            gate = _dot(k, second, P)
            s = tl.sigmoid(gate)
            silu = gate * s
            bend = s * (1 + gate * (1 - s))
            one = _dot(k, m1, P)
            two = _dot(k, m2, P)
            of_value = one * silu + two * linear * bend
            there = grad + row[:, None] * grad_row + column[None, :]
            tl.store(there + heads * e, of_value.to(grad.dtype.element_ty), mask=mask)
            of_values += tl.sum(of_value, 0)
            of_linear = (two * v * bend).to(DTYPE)
            of_bend = linear * s * (1 - s) * (2 + gate * (1 - 2 * s))
            of_gate = (v * (one * bend + two * of_bend)).to(DTYPE)
            found = _dot((v * silu).to(DTYPE), tl.trans(m1), P)
            found = _add_dot(found, (v * linear * bend).to(DTYPE), tl.trans(m2), P)
            found = _add_dot(found, of_linear, tl.trans(first), P)
            found = _add_dot(found, of_gate, tl.trans(second), P)
            tl.store(there, found.to(grad.dtype.element_ty), mask=mask)
            of_keys += tl.sum(found, 0)
            turned = tl.trans(k)
            g1 = _add_dot(g1, turned, of_linear, P)
            g2 = _add_dot(g2, turned, of_gate, P)
        sums += part * sums_row
        tl.store(sums + head * e * e + place, g1, mask=is_place)
        tl.store(sums + (heads + head) * e * e + place, g2, mask=is_place)
        own = sums + size + (heads + head) * e + column
        tl.store(own, of_keys, mask=is_column)
        tl.store(own + heads * e, of_values, mask=is_column)


@triton.jit
def _columns(program, heads, matrices, e, R: tl.constexpr, C: tl.constexpr):
    """Of a program of the step its image, its place in the weights, and as parameters lie.

    Behind the heads' matrices, of e rows, come the taps, of nine, which lie channel by channel.
    """
    matrix = program % matrices
    is_taps = matrix == 2 * heads
    row = tl.arange(0, R)
    column = tl.program_id(1) * C + tl.arange(0, C)
    mask = (row < tl.where(is_taps, 9, e))[:, None] & (column < e)[None, :]
    place = matrix * e * e + row[:, None] * e + column[None, :]
    laid = row[:, None] * tl.where(is_taps, 1, e) + column[None, :] * tl.where(is_taps, 9, 1)
    return (program // matrices).to(tl.int64), matrix, place, laid, mask


@triton.jit
def _parts_sum(
    partial, splits, size, place, mask, K: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    """The sum of parts that lie ``size`` apart."""
    total = tl.zeros((R, C), tl.float32)
    for begin in range(0, splits, K):
        # Between rows and columns: one thread has all parts of its numbers.
        part = (begin + tl.arange(0, K))[None, :, None]
        is_here = (part < splits) & mask[:, None, :]
        here = partial + part * size + place[:, None, :]
        total += tl.sum(tl.load(here, mask=is_here, other=0.0), 1)
    return total


@triton.jit
def _step_kernel(
    partial, w1, w2, taps, gradient, trained, heads, matrices, e, splits, size, scale, rate,
    K: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Sums the parts of gradients and takes the step, of some columns of a matrix."""
    sample, matrix, place, laid, mask = _columns(tl.program_id(0), heads, matrices, e, R, C)
    g = _parts_sum(partial + sample * splits * size, splits, size, place, mask, K, R, C) * scale
    norm = tl.sqrt(tl.sum(g * g, 0)) + 1
    is_first, is_taps = matrix < heads, matrix == 2 * heads
    w = tl.load(w1 + matrix * e * e + laid, mask=mask & is_first, other=0.0).to(tl.float32)
    is_second = mask & (is_first == 0) & (is_taps == 0)
    w += tl.load(w2 + (matrix - heads) * e * e + laid, mask=is_second, other=0.0).to(tl.float32)
    w += tl.load(taps + laid, mask=mask & is_taps, other=0.0).to(tl.float32)
    tl.store(gradient + sample * size + place, g, mask=mask)
    tl.store(trained + sample * size + place, w - rate * g / norm[None, :], mask=mask)


@triton.jit
def _step_gradient_kernel(
    partial, gradient, moved, passed, heads, matrices, e, splits, size, scale, rate,
    K: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Of sums and of weights, of parts of the gradients of what is trained.

    Those of weights lie as their parameters do.
    """
    sample, matrix, place, laid, mask = _columns(tl.program_id(0), heads, matrices, e, R, C)
    slope = _parts_sum(partial + sample * splits * size, splits, size, place, mask, K, R, C)
    g = tl.load(gradient + sample * size + place, mask=mask, other=0.0)
    norm = tl.sqrt(tl.sum(g * g, 0))
    along = tl.sum(slope * g, 0) / (tl.where(norm > 0, norm, 1.0) * (norm + 1))
    found = -rate * scale * (slope - g * along[None, :]) / (norm + 1)[None, :]
    tl.store(moved + sample * size + place, found, mask=mask)
    tl.store(passed + sample * size + matrix * e * e + laid, slope, mask=mask)


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
PROGRAMS = 264  # of a launch at most, if it splits tokens: two on each of an H100's units
WINDOW = 16  # channels of a program of the convolution
STEP = 16, 32, 16  # columns of a program of the step, parts that it loads at once, warps
# Tokens of a tile in bfloat16 and in float32, warps, stages, registers.
FOLD = 64, 32, 4, 2, 255
READ = 128, 32, 8, 1, 128
QUERY = 64, 32, 4, 1, 255
KEY = 32, 32, 4, 2, 255  # longer tiles would not stay in the registers


def _compute_type(dtype: torch.dtype) -> torch.dtype:
    """Gradients of a mean over many tokens are too small for float16."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


class _Cut(NamedTuple):
    """How tokens and weights are divided.

    Attributes:
        parts: Of an image's tokens.
        chunk: Tokens of each.
        size: Numbers of all weights: two matrices of each head, (e, e), and the taps, (9, e).
        windows: Programs of the convolution.
        blocks: Those of one part.
    """

    parts: int
    chunk: int
    size: int
    windows: int
    blocks: int


@functools.lru_cache(maxsize=1024)
def _cut(b: int, n: int, heads: int, e: int, has_taps: bool) -> _Cut:
    blocks = _ceil(e, WINDOW)
    parts = min(_ceil(n, 64), max(1, PROGRAMS // (b * (heads + has_taps * blocks))))
    chunk = _ceil(_ceil(n, parts), 64) * 64
    parts = _ceil(n, chunk)
    size, windows = 2 * heads * e * e + has_taps * 9 * e, has_taps * b * parts * blocks
    return _Cut(parts, chunk, size, windows, blocks)


def _float32(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _launch(
    kernel: Any, tile: tuple[int, ...], tensors: tuple[Tensor, ...], *rows: int,
    first: Tensor, grid: tuple[int, int], cut: _Cut,
) -> None:  # fmt: skip
    """Starts one of the kernels of tokens, the first of ``tensors``, with spacings of ``rows``."""
    (b, n, _), (heads, e, _) = tensors[0].shape, first.shape
    dtype = _compute_type(tensors[0].dtype)
    size = tile[dtype == torch.float32], _width(e), WINDOW
    limit = {"maxnreg": tile[4]} if _is_fast() else {}
    launch_kernel(kernel, (cut.windows + b * cut.parts * heads,),
        *tensors, n, *rows, heads, e, *cut, *grid, *size, _precision(dtype), _TYPES[dtype],
        num_warps=tile[2], num_stages=tile[3], **limit,
    )  # fmt: skip


def _launch_step(
    kernel: Any, partial: Tensor, others: tuple[Tensor, ...], first: Tensor, tokens: int,
    rate: float,
) -> None:  # fmt: skip
    """Starts a kernel of the step, of parts of gradients still to be divided by -3 n."""
    (b, parts, size), (heads, e, _) = partial.shape, first.shape
    matrices, (columns, loads, warps) = 2 * heads + (size > 2 * first.numel()), STEP
    launch_kernel(kernel, (b * matrices, _ceil(e, columns)),
        partial, *others, heads, matrices, e, parts, size, -1 / (3 * tokens), rate,
        min(loads, _power_of_2(parts)), _width(e), columns, num_warps=warps,
    )  # fmt: skip


@launched(
    "trained_tokens",
    "(Tensor tokens, Tensor first, Tensor second, Tensor? taps, Tensor? bias, int height, "
    "int width, float rate) -> (Tensor, Tensor, Tensor)",
)
def _inner(
    tokens: Tensor, first: Tensor, second: Tensor, taps: Tensor | None, bias: Tensor | None,
    height: int, width: int, rate: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Outputs, and of each image the gradients and the trained weights, (b, size).

    ``bias`` is in the tokens already; it is given the sum of their gradients.
    """
    first, second = first.contiguous(), second.contiguous()
    tokens, row = _rows(tokens)
    (b, n, columns), (heads, e, _), has_taps = tokens.shape, first.shape, taps is not None
    cut = _cut(b, n, heads, e, has_taps)
    options = {"first": first, "grid": (height, width), "cut": cut}
    partial = _float32(tokens, b, cut.parts, cut.size)
    _launch(_inner_fold_kernel, FOLD, (tokens, first, second, partial), row, **options)
    gradient, trained = _float32(tokens, b, cut.size), _float32(tokens, b, cut.size)
    weights = first, second, first if taps is None else taps.contiguous()
    _launch_step(_step_kernel, partial, (*weights, gradient, trained), first, n, rate)
    out = torch.empty((b, n, columns // 3), dtype=tokens.dtype, device=tokens.device)
    _launch(_inner_read_kernel, READ, (tokens, trained, out), row, columns // 3, **options)
    return out, gradient, trained


# Nothing but the backward reads the others.
_inner.register_inference(replayed(_inner.function, 1))


@_inner.register_fake
def _(
    tokens: Tensor, first: Tensor, second: Tensor, taps: Tensor | None, bias: Tensor | None,
    height: int, width: int, rate: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (b, n, columns), (heads, e, _) = tokens.shape, first.shape
    size = 2 * heads * e * e + (taps is not None) * 9 * e
    weights = (tokens.new_empty(b, size, dtype=torch.float32) for _ in range(2))
    return tokens.new_empty(b, n, columns // 3), *weights


@launched(
    "trained_tokens_backward",
    "(Tensor grad, Tensor gradient, Tensor trained, Tensor tokens, Tensor first, Tensor second, "
    "int height, int width, float rate) -> (Tensor, Tensor)",
)
def _inner_backward(
    grad: Tensor, gradient: Tensor, trained: Tensor, tokens: Tensor, first: Tensor,
    second: Tensor, height: int, width: int, rate: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Of tokens and, one behind the other as they lie, of all weights and of the bias."""
    first, second = first.contiguous(), second.contiguous()
    (tokens, row), (grad, grad_row) = _rows(tokens), _rows(grad)
    (b, n, columns), (heads, e, _) = tokens.shape, first.shape
    cut = _cut(b, n, heads, e, gradient.shape[1] > 2 * first.numel())
    options = {"first": first, "grid": (height, width), "cut": cut}
    found = torch.empty((b, n, columns), dtype=tokens.dtype, device=tokens.device)
    partial = _float32(tokens, b, cut.parts, cut.size)
    sums = _float32(tokens, b, cut.parts, cut.size + columns)
    rows = columns, sums.shape[2]
    tensors = tokens, trained, grad, found, partial, sums
    _launch(_inner_query_kernel, QUERY, tensors, row, grad_row, *rows, **options)
    moved, passed = torch.empty_like(gradient), torch.empty_like(gradient)
    others = gradient, moved, passed
    _launch_step(_step_gradient_kernel, partial, others, first, n, rate)
    tensors = tokens, first, second, moved, passed, found, sums
    _launch(_inner_key_kernel, KEY, tensors, row, *rows, **options)
    return found, column_sum(sums.flatten(0, 1), first.dtype)


@_inner_backward.register_fake
def _(
    grad: Tensor, gradient: Tensor, trained: Tensor, tokens: Tensor, first: Tensor,
    second: Tensor, height: int, width: int, rate: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return tokens.new_empty(tokens.shape), first.new_empty(gradient.shape[1] + tokens.shape[2])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tokens, *weights = inputs[:5]
    ctx.options = inputs[5:]
    ctx.set_materialize_grads(False)
    ctx.like = [None if z is None else (z.shape, z.dtype) for z in weights]
    ctx.save_for_backward(*output[1:], tokens, *weights[:2])


def _gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    found, sums = _inner_backward(grad, *ctx.saved_tensors, *ctx.options)
    start, own = 0, []
    for like in ctx.like:
        if like is not None:
            shape, dtype = like
            own.append(sums[start : start + shape.numel()].view(shape).to(dtype))
            start += shape.numel()
        else:
            own.append(None)
    return found, *own, None, None, None


_inner.register_autograd(_gradients, setup_context=_setup)


def inner_tokens(
    tokens: Tensor, grid: tuple[int, int], first: Tensor, second: Tensor,
    taps: Tensor | None = None, rate: float = 1.0, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See ``attnzoo.ops.inner_loop``."""
    return _inner(tokens.to(operand_dtype(tokens)), first, second, taps, bias, *grid, rate)[0]
