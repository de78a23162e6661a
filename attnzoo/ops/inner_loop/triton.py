"""Test-time training of packed tokens: the inner step, and what reads the trained model, fused.

A first launch makes the gradients of parts of the tokens, a second adds them up and takes the
step, a third reads. The backward goes the same way back, and computes anew what the tokens give.
"""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportReturnType=false

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.ops.precision import operand_dtype
from attnzoo.ops.triton_common import (
    _add_dot,
    _ceil,
    _dot,
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
def _matrix(base, heads, head, e, place, mask, DTYPE: tl.constexpr):
    """Two matrices of a head, of all heads' first ones and then all second ones."""
    first = tl.load(base + head * e * e + place, mask=mask, other=0.0).to(DTYPE)
    second = tl.load(base + (heads + head) * e * e + place, mask=mask, other=0.0).to(DTYPE)
    return first, second


@triton.jit
def _unit_fold_kernel(
    tokens, w1, w2, partial, n, token_row, heads, e, splits, chunk, R: tl.constexpr,
    W: tl.constexpr, P: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """K^T (v * SiLU(z_2)) and K^T (v * z_1 * SiLU'(z_2)) of a part of the tokens."""
    head = tl.program_id(0) % heads
    part = (tl.program_id(0) // heads).to(tl.int64)
    start = (part % splits) * chunk
    length = tl.minimum(chunk, n - start).to(tl.int32)
    column = tl.arange(0, W)
    is_column = column < e
    place = column[:, None] * e + column[None, :]
    is_place = is_column[:, None] & is_column[None, :]
    first = tl.load(w1 + head * e * e + place, mask=is_place, other=0.0).to(DTYPE)
    second = tl.load(w2 + head * e * e + place, mask=is_place, other=0.0).to(DTYPE)
    keys = tokens + ((part // splits) * n + start) * token_row + (heads + head) * e
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
    partial += (part * 2 * heads + head) * e * e
    tl.store(partial + place, g1, mask=is_place)
    tl.store(partial + heads * e * e + place, g2, mask=is_place)


@triton.jit
def _unit_read_kernel(
    tokens, trained, local, out, n, token_row, local_row, out_row, heads, e, splits, chunk,
    LOCAL: tl.constexpr, R: tl.constexpr, W: tl.constexpr, P: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """(q W_1) * SiLU(q W_2), and behind the last head the columns of ``local``."""
    head = tl.program_id(0) % heads
    part = (tl.program_id(0) // heads).to(tl.int64)
    start = (part % splits) * chunk
    length = tl.minimum(chunk, n - start).to(tl.int32)
    column = tl.arange(0, W)
    is_column = column < e
    place = column[:, None] * e + column[None, :]
    is_place = is_column[:, None] & is_column[None, :]
    trained += (part // splits) * 2 * heads * e * e
    first, second = _matrix(trained, heads, head, e, place, is_place, DTYPE)
    token = (part // splits) * n + start
    queries = tokens + token * token_row + head * e
    out += token * out_row
    local += token * local_row
    for begin in range(0, length, R):
        row = begin + tl.arange(0, R)
        mask = (row < length)[:, None] & is_column[None, :]
        here = queries + row[:, None] * token_row + column[None, :]
        q = tl.load(here, mask=mask, other=0.0).to(DTYPE)
        gate = _dot(q, second, P)
        o = _dot(q, first, P) * gate * tl.sigmoid(gate)
        there = out + row[:, None] * out_row + column[None, :]
        tl.store(there + head * e, o.to(out.dtype.element_ty), mask=mask)
        if LOCAL:
            is_last = mask & (head == heads - 1)
            beside = local + row[:, None] * local_row + column[None, :]
            z = tl.load(beside, mask=is_last, other=0.0)
            tl.store(there + heads * e, z.to(out.dtype.element_ty), mask=is_last)


@triton.jit
def _unit_query_kernel(
    tokens, trained, slope, grad, partial, n, token_row, slope_row, grad_row, heads, e, splits,
    chunk, R: tl.constexpr, W: tl.constexpr, P: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries, and a part of those of the trained matrices."""
    head = tl.program_id(0) % heads
    part = (tl.program_id(0) // heads).to(tl.int64)
    start = (part % splits) * chunk
    length = tl.minimum(chunk, n - start).to(tl.int32)
    column = tl.arange(0, W)
    is_column = column < e
    place = column[:, None] * e + column[None, :]
    is_place = is_column[:, None] & is_column[None, :]
    trained += (part // splits) * 2 * heads * e * e
    first, second = _matrix(trained, heads, head, e, place, is_place, DTYPE)
    token = (part // splits) * n + start
    queries = tokens + token * token_row + head * e
    slope += token * slope_row + head * e
    grad += token * grad_row + head * e
    g1 = tl.zeros((W, W), tl.float32)
    g2 = tl.zeros((W, W), tl.float32)
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
        turned = tl.trans(q)
        g1 = _add_dot(g1, turned, of_linear, P)
        g2 = _add_dot(g2, turned, of_gate, P)
    partial += (part * 2 * heads + head) * e * e
    tl.store(partial + place, g1, mask=is_place)
    tl.store(partial + heads * e * e + place, g2, mask=is_place)


@triton.jit
def _unit_key_kernel(
    tokens, w1, w2, moved, grad, partial, n, token_row, grad_row, heads, e, splits, parts, chunk,
    R: tl.constexpr, W: tl.constexpr, P: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values, and a part of those of the first matrices.

    ``moved`` are the gradients of what ``_unit_fold_kernel`` sums.
    """
    head = tl.program_id(0) % heads
    part = (tl.program_id(0) // heads).to(tl.int64)
    sample = part // splits
    start = (part % splits) * chunk
    length = tl.minimum(chunk, n - start).to(tl.int32)
    column = tl.arange(0, W)
    is_column = column < e
    place = column[:, None] * e + column[None, :]
    is_place = is_column[:, None] & is_column[None, :]
    first = tl.load(w1 + head * e * e + place, mask=is_place, other=0.0).to(DTYPE)
    second = tl.load(w2 + head * e * e + place, mask=is_place, other=0.0).to(DTYPE)
    moved += sample * 2 * heads * e * e
    m1, m2 = _matrix(moved, heads, head, e, place, is_place, DTYPE)
    token = sample * n + start
    keys = tokens + token * token_row + (heads + head) * e
    grad += token * grad_row + (heads + head) * e
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
        silu = gate * s
        bend = s * (1 + gate * (1 - s))
        one = _dot(k, m1, P)
        two = _dot(k, m2, P)
        of_value = one * silu + two * linear * bend
        there = grad + row[:, None] * grad_row + column[None, :]
        tl.store(there + heads * e, of_value.to(grad.dtype.element_ty), mask=mask)
        of_linear = (two * v * bend).to(DTYPE)
        of_bend = linear * s * (1 - s) * (2 + gate * (1 - 2 * s))
        of_gate = (v * (one * bend + two * of_bend)).to(DTYPE)
        found = _dot((v * silu).to(DTYPE), tl.trans(m1), P)
        found = _add_dot(found, (v * linear * bend).to(DTYPE), tl.trans(m2), P)
        found = _add_dot(found, of_linear, tl.trans(first), P)
        found = _add_dot(found, of_gate, tl.trans(second), P)
        tl.store(there, found.to(grad.dtype.element_ty), mask=mask)
        turned = tl.trans(k)
        g1 = _add_dot(g1, turned, of_linear, P)
        g2 = _add_dot(g2, turned, of_gate, P)
    partial += ((sample * parts + part % splits) * 2 * heads + head) * e * e
    tl.store(partial + place, g1, mask=is_place)
    tl.store(partial + heads * e * e + place, g2, mask=is_place)


@triton.jit
def _parts_sum(partial, splits, size, row, column, columns, mask, B: tl.constexpr,
               R: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """The sum of matrices that lie ``size`` apart."""
    total = tl.zeros((R, C), tl.float32)
    part = tl.arange(0, B)
    place = partial + (row[:, None] * columns + column[None, :])[None, :, :]
    for begin in range(0, splits, B):
        here = begin + part
        is_here = (here < splits)[:, None, None] & mask[None, :, :]
        z = tl.load(place + here.to(tl.int64)[:, None, None] * size, mask=is_here, other=0.0)
        total += tl.sum(z, 0)
    return total


@triton.jit
def _step_kernel(
    partial, w1, w2, gradient, trained, splits, matrices, rows, columns, w_row, w_column, scale,
    rate, KINDS: tl.constexpr, B: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Sums the parts of gradients and takes the step, of some columns of a matrix."""
    matrix = tl.program_id(0) % matrices
    sample = (tl.program_id(0) // matrices).to(tl.int64)
    size = rows * columns
    row = tl.arange(0, R)
    column = tl.program_id(1) * C + tl.arange(0, C)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    partial += (sample * splits * matrices + matrix) * size
    g = _parts_sum(partial, splits, matrices * size, row, column, columns, mask, B, R, C) * scale
    norm = tl.sqrt(tl.sum(g * g, 0)) + 1
    each = matrices // KINDS
    place = (matrix % each) * size + row[:, None] * w_row + column[None, :] * w_column
    w = tl.load(w1 + place, mask=mask & (matrix < each), other=0.0).to(tl.float32)
    if KINDS == 2:
        w += tl.load(w2 + place, mask=mask & (matrix >= each), other=0.0).to(tl.float32)
    here = (sample * matrices + matrix) * size + row[:, None] * columns + column[None, :]
    tl.store(gradient + here, g, mask=mask)
    tl.store(trained + here, w - rate * g / norm[None, :], mask=mask)


@triton.jit
def _step_gradient_kernel(
    partial, gradient, moved, weight, splits, matrices, rows, columns, weight_step, scale, rate,
    B: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Of sums and first matrices, of parts of the gradients of the trained ones."""
    matrix = tl.program_id(0) % matrices
    sample = (tl.program_id(0) // matrices).to(tl.int64)
    size = rows * columns
    row = tl.arange(0, R)
    column = tl.program_id(1) * C + tl.arange(0, C)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    partial += (sample * splits * matrices + matrix) * size
    slope = _parts_sum(partial, splits, matrices * size, row, column, columns, mask, B, R, C)
    place = matrix * size + row[:, None] * columns + column[None, :]
    g = tl.load(gradient + sample * matrices * size + place, mask=mask, other=0.0)
    norm = tl.sqrt(tl.sum(g * g, 0))
    along = tl.sum(slope * g, 0) / (tl.where(norm > 0, norm, 1.0) * (norm + 1))
    found = -rate * scale * (slope - g * along[None, :]) / (norm + 1)[None, :]
    tl.store(moved + sample * matrices * size + place, found, mask=mask)
    tl.store(weight + sample * weight_step + place, slope, mask=mask)


@triton.jit
def _window_products_kernel(
    x, y, partial, height, width, c, x_row, y_row, blocks, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Of some tokens, for each tap the sum of y times the x that the tap sees: (9, c)."""
    n = height * width
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    token = (tl.program_id(0) % blocks) * R + tl.arange(0, R)
    h = token // width
    w = token % width
    column = tl.program_id(1) * C + tl.arange(0, C)
    is_column = column < c
    here = y + (sample * n + token)[:, None] * y_row + column[None, :]
    factor = tl.load(here, mask=(token < n)[:, None] & is_column[None, :], other=0.0)
    factor = factor.to(tl.float32)
    partial += tl.program_id(0).to(tl.int64) * 9 * c + column
    for t in tl.static_range(9):
        i, j = h + t // 3 - 1, w + t % 3 - 1
        is_seen = (token < n) & (i >= 0) & (i < height) & (j >= 0) & (j < width)
        here = x + (sample * n + i * width + j)[:, None] * x_row + column[None, :]
        z = tl.load(here, mask=is_seen[:, None] & is_column[None, :], other=0.0)
        tl.store(partial + t * c, tl.sum(z.to(tl.float32) * factor, 0), mask=is_column)


@triton.jit
def _window_sum_kernel(
    x, taps, out, height, width, c, x_row, out_row, blocks, FLIP: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """The convolution with every image's own taps, (b, 9, c), or its transpose."""
    n = height * width
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    token = (tl.program_id(0) % blocks) * R + tl.arange(0, R)
    h = token // width
    w = token % width
    column = tl.program_id(1) * C + tl.arange(0, C)
    is_column = column < c
    taps += sample * 9 * c + column
    total = tl.zeros((R, C), tl.float32)
    for t in tl.static_range(9):
        i, j = h + t // 3 - 1, w + t % 3 - 1
        is_seen = (token < n) & (i >= 0) & (i < height) & (j >= 0) & (j < width)
        here = x + (sample * n + i * width + j)[:, None] * x_row + column[None, :]
        z = tl.load(here, mask=is_seen[:, None] & is_column[None, :], other=0.0).to(tl.float32)
        # The transposed stencil is the stencil turned by half a turn.
        tap = tl.load(taps + (8 - t if FLIP else t) * c, mask=is_column, other=0.0)
        total += z * tap[None, :]
    here = out + (sample * n + token)[:, None] * out_row + column[None, :]
    mask = (token < n)[:, None] & is_column[None, :]
    tl.store(here, total.to(out.dtype.element_ty), mask=mask)


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
_PROGRAMS = 264  # of a launch, for the tokens to be split: two on each of an H100's units
_TILE = 8192  # numbers that one program sums at a time


def _compute_type(dtype: torch.dtype) -> torch.dtype:
    """Gradients of a mean over many tokens are too small for float16."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


@functools.lru_cache(maxsize=1024)
def _split(b: int, n: int, heads: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Parts of the tokens, tokens of a part and of a tile."""
    rows = 64 if dtype == torch.bfloat16 else 32
    parts = min(_ceil(n, rows), _ceil(_PROGRAMS, b * heads))
    chunk = _ceil(_ceil(n, parts), rows) * rows
    return _ceil(n, chunk), chunk, rows


def _float32(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _step(
    partial: Tensor, first: Tensor, second: Tensor, tokens: int, rate: float
) -> tuple[Tensor, Tensor]:
    """Gradients and trained weights, (b, matrices, rows, columns), of parts of the gradients.

    Args:
        partial: (b, parts, matrices, rows, columns), still to be divided by -3 n.
        first: Half of the weights, or all if ``second`` is the same.
        second: The other half.
        tokens: n.
        rate: Of the step.
    """
    b, parts, matrices, rows, columns = partial.shape
    gradient, trained = (_float32(partial, b, matrices, rows, columns) for _ in range(2))
    kinds = 1 if first is second else 2
    steps = (columns, 1) if kinds == 2 else (1, rows)  # taps lie channel by channel
    height, side = _power_of_2(rows), 16
    launch_kernel(_step_kernel, (b * matrices, _ceil(columns, side)),
        partial, first, second, gradient, trained, parts, matrices, rows, columns, *steps,
        -1 / (3 * tokens), rate, kinds, max(1, _TILE // (height * side)), height, side,
        num_warps=4,
    )  # fmt: skip
    return gradient, trained


def _step_gradient(
    partial: Tensor, gradient: Tensor, weight: Tensor, tokens: int, rate: float
) -> Tensor:
    """Gradients of what ``_step`` sums; writes those of the weights, (b, ...), to ``weight``."""
    b, parts, matrices, rows, columns = partial.shape
    moved = _float32(partial, b, matrices, rows, columns)
    height, side = _power_of_2(rows), 16
    launch_kernel(_step_gradient_kernel, (b * matrices, _ceil(columns, side)),
        partial, gradient, moved, weight, parts, matrices, rows, columns, weight.stride(0),
        -1 / (3 * tokens), rate, max(1, _TILE // (height * side)), height, side, num_warps=4,
    )  # fmt: skip
    return moved


@launched(
    "trained_unit_tokens",
    "(Tensor tokens, Tensor first, Tensor second, Tensor? local, int heads, float rate) "
    "-> (Tensor, Tensor, Tensor)",
)
def _unit(
    tokens: Tensor, first: Tensor, second: Tensor, local: Tensor | None, heads: int, rate: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, and the gradients and the trained matrices, (b, 2 * heads, e, e)."""
    first, second = first.contiguous(), second.contiguous()
    tokens, row = _rows(tokens)
    beside, local_row = (tokens, 0) if local is None else _rows(local)
    (b, n, _), e, dtype = tokens.shape, first.shape[-1], _compute_type(tokens.dtype)
    parts, chunk, rows = _split(b, n, heads, dtype)
    tail = rows, _width(e), _precision(dtype), _TYPES[dtype]
    partial = _float32(tokens, b, parts, 2 * heads, e, e)
    programs = (b * parts * heads,)
    launch_kernel(_unit_fold_kernel, programs,
        tokens, first, second, partial, n, row, heads, e, parts, chunk, *tail, num_warps=4,
        num_stages=2,
    )  # fmt: skip
    gradient, trained = _step(partial, first, second, n, rate)
    width = (heads + (local is not None)) * e
    out = torch.empty((b, n, width), dtype=tokens.dtype, device=tokens.device)
    launch_kernel(_unit_read_kernel, programs,
        tokens, trained, beside, out, n, row, local_row, width, heads, e, parts, chunk,
        local is not None, *tail, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out, gradient, trained


# Nothing but the backward reads the others.
_unit.register_inference(replayed(_unit.function, 1))


@_unit.register_fake
def _(
    tokens: Tensor, first: Tensor, second: Tensor, local: Tensor | None, heads: int, rate: float
) -> tuple[Tensor, Tensor, Tensor]:
    (b, n, _), e = tokens.shape, first.shape[-1]
    matrices = (tokens.new_empty(b, 2 * heads, e, e, dtype=torch.float32) for _ in range(2))
    return tokens.new_empty(b, n, (heads + (local is not None)) * e), *matrices


@launched(
    "trained_unit_tokens_backward",
    "(Tensor grad, Tensor gradient, Tensor trained, Tensor tokens, Tensor first, Tensor second, "
    "int heads, float rate) -> (Tensor, Tensor)",
)
def _unit_backward(
    grad: Tensor, gradient: Tensor, trained: Tensor, tokens: Tensor, first: Tensor,
    second: Tensor, heads: int, rate: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Of tokens and of both matrices, (2 * heads, e, e)."""
    first, second = first.contiguous(), second.contiguous()
    (tokens, row), (grad, grad_row) = _rows(tokens), _rows(grad)
    (b, n, width), e, dtype = tokens.shape, first.shape[-1], _compute_type(tokens.dtype)
    parts, chunk, rows = _split(b, n, heads, dtype)
    tail = rows, _width(e), _precision(dtype), _TYPES[dtype]
    found = torch.empty((b, n, width), dtype=tokens.dtype, device=tokens.device)
    partial = _float32(tokens, b, parts, 2 * heads, e, e)
    programs = (b * parts * heads,)
    launch_kernel(_unit_query_kernel, programs,
        tokens, trained, grad, found, partial, n, row, grad_row, width, heads, e, parts, chunk,
        *tail, num_warps=4, num_stages=1,
    )  # fmt: skip
    # The last part is what comes past the step.
    weights = _float32(tokens, b, parts + 1, 2 * heads, e, e)
    moved = _step_gradient(partial, gradient, weights[:, parts], n, rate)
    # Longer tiles would not stay in the registers.
    launch_kernel(_unit_key_kernel, programs,
        tokens, first, second, moved, found, weights, n, row, width, heads, e, parts, parts + 1,
        chunk, 32, *tail[1:], num_warps=4, num_stages=1,
    )  # fmt: skip
    return found, column_sum(weights.flatten(0, 1))


@_unit_backward.register_fake
def _(
    grad: Tensor, gradient: Tensor, trained: Tensor, tokens: Tensor, first: Tensor,
    second: Tensor, heads: int, rate: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    e = first.shape[-1]
    weights = tokens.new_empty(2 * heads, e, e, dtype=torch.float32)
    return tokens.new_empty(tokens.shape), weights


def _setup_unit(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tokens, first, second, local, ctx.heads, ctx.rate = inputs
    ctx.set_materialize_grads(False)
    ctx.local = None if local is None else local.dtype
    ctx.save_for_backward(*output[1:], tokens, first, second)


def _unit_gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    first, second = ctx.saved_tensors[3:]
    found, weights = _unit_backward(grad, *ctx.saved_tensors, ctx.heads, ctx.rate)
    own, other = weights.split(ctx.heads)
    local = None
    if ctx.local is not None:
        local = grad[..., ctx.heads * first.shape[-1] :].to(ctx.local)
    return found, own.to(first.dtype), other.to(second.dtype), local, None, None


_unit.register_autograd(_unit_gradients, setup_context=_setup_unit)


def unit_tokens(
    tokens: Tensor, first: Tensor, second: Tensor, heads: int, rate: float = 1.0,
    local: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See ``attnzoo.ops.inner_loop``."""
    return _unit(tokens.to(operand_dtype(tokens)), first, second, local, heads, rate)[0]


def _windows(x: Tensor) -> tuple[int, tuple[int, int], tuple[int, int]]:
    """Blocks of an image, programs, and tokens and channels of each, of (b, n, c)."""
    b, n, c = x.shape
    # Few long parts of many tokens: the step adds them up.
    rows, columns = 32 if n <= 1 << 14 else 128, min(64, _power_of_2(c))
    blocks = _ceil(n, rows)
    return blocks, (b * blocks, _ceil(c, columns)), (rows, columns)


def _window_products(x: Tensor, y: Tensor, grid: tuple[int, int]) -> Tensor:
    """Parts of the gradients of taps: (b, blocks, 1, 9, c)."""
    blocks, programs, tile = _windows(x)
    partial = _float32(x, x.shape[0], blocks, 1, 9, x.shape[2])
    launch_kernel(_window_products_kernel, programs,
        x, y, partial, *grid, x.shape[2], x.stride(1), y.stride(1), blocks, *tile, num_warps=4,
    )  # fmt: skip
    return partial


def _window_sum(x: Tensor, taps: Tensor, out: Tensor, grid: tuple[int, int], flip: bool) -> None:
    """Writes the convolution, or its transpose, to ``out``."""
    blocks, programs, tile = _windows(x)
    launch_kernel(_window_sum_kernel, programs,
        x, taps, out, *grid, x.shape[2], x.stride(1), out.stride(1), blocks, flip, *tile,
        num_warps=4,
    )  # fmt: skip


@launched(
    "trained_conv_tokens",
    "(Tensor tokens, Tensor taps, int height, int width, float rate) -> (Tensor, Tensor, Tensor)",
)
def _conv(
    tokens: Tensor, taps: Tensor, height: int, width: int, rate: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, and the gradients and the trained taps, (b, 1, 9, c)."""
    tokens, taps, grid = _rows(tokens)[0], taps.contiguous(), (height, width)
    query, key, value = tokens.chunk(3, dim=-1)
    partial = _window_products(key, value, grid)
    gradient, trained = _step(partial, taps, taps, height * width, rate)
    out = torch.empty(query.shape, dtype=tokens.dtype, device=tokens.device)
    _window_sum(query, trained, out, grid, False)
    return out, gradient, trained


_conv.register_inference(replayed(_conv.function, 1))


@_conv.register_fake
def _(
    tokens: Tensor, taps: Tensor, height: int, width: int, rate: float
) -> tuple[Tensor, Tensor, Tensor]:
    b, n, c = tokens.shape
    kernels = (tokens.new_empty(b, 1, 9, c // 3, dtype=torch.float32) for _ in range(2))
    return tokens.new_empty(b, n, c // 3), *kernels


@launched(
    "trained_conv_tokens_backward",
    "(Tensor grad, Tensor gradient, Tensor trained, Tensor tokens, int height, int width, "
    "float rate) -> (Tensor, Tensor)",
)
def _conv_backward(
    grad: Tensor, gradient: Tensor, trained: Tensor, tokens: Tensor, height: int, width: int,
    rate: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Of tokens and, for each image, of the taps: (b, 1, 9, c)."""
    grad, tokens, grid = _rows(grad)[0], _rows(tokens)[0], (height, width)
    query, key, value = tokens.chunk(3, dim=-1)
    found = torch.empty(tokens.shape, dtype=tokens.dtype, device=tokens.device)
    of_query, of_key, of_value = found.chunk(3, dim=-1)
    _window_sum(grad, trained, of_query, grid, True)
    partial, weight = _window_products(query, grad, grid), torch.empty_like(gradient)
    moved = _step_gradient(partial, gradient, weight, height * width, rate)
    _window_sum(value, moved, of_key, grid, True)
    _window_sum(key, moved, of_value, grid, False)
    return found, weight


@_conv_backward.register_fake
def _(
    grad: Tensor, gradient: Tensor, trained: Tensor, tokens: Tensor, height: int, width: int,
    rate: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return tokens.new_empty(tokens.shape), torch.empty_like(gradient)


def _setup_conv(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tokens, taps, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.shape, ctx.dtype = taps.shape, taps.dtype
    ctx.save_for_backward(*output[1:], tokens)


def _conv_gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    found, weight = _conv_backward(grad, *ctx.saved_tensors, *ctx.options)
    taps = weight.sum(0).squeeze(0).t().reshape(ctx.shape).to(ctx.dtype)
    return found, taps, None, None, None


_conv.register_autograd(_conv_gradients, setup_context=_setup_conv)


def conv_tokens(
    tokens: Tensor, grid: tuple[int, int], weight: Tensor, rate: float = 1.0
) -> Tensor:
    """See ``attnzoo.ops.inner_loop``."""
    return _conv(tokens.to(operand_dtype(tokens)), weight, *grid, rate)[0]
