"""Linear attention's core on tokens: keys and values to a state, queries to outputs, and back.

Tokens are read as they leave a projection, (b, n, h * d) with any spacing of the rows, and the
kernel function is applied as they are loaded. A tile covers the columns of one *unit*: as many
heads as fit into it, whose states are the diagonal blocks of one square, or one head. A head that
is wider than a tile has several.

With "softmax", queries have theirs over a head's channels, in units of one head, and keys over all
tokens: a state's last row is the sum of exp(k - peak), by which the others are yet to be divided.

Sums over tokens are split among programs, which leave partial sums in float32 behind; a second
launch adds them up, always in the same order.
"""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.ops.linear_core.torch import check_activation, features
from attnzoo.ops.precision import operand_dtype
from attnzoo.ops.triton_common import (
    _LARGEST,
    _add_dot,
    _ceil,
    _dot,
    _is_fast,
    _laid_out,
    _precision,
    _rows,
    _shared_memory,
    launch_kernel,
    launched,
)
from attnzoo.ops.triton_replay import replayed


@triton.jit
def _unit(tile, i, heads, head_dim, G: tl.constexpr, W: tl.constexpr):
    """First head and column of a unit; of its columns in tile ``i``, their places, and which."""
    head = tile * G
    column = i * W + tl.arange(0, W)
    width = tl.minimum(G, heads - head) * head_dim
    return head, head * head_dim, column, column < width


@triton.jit
def _tokens(base, row, spacing, column, mask, PHI: tl.constexpr):
    x = tl.load(base + row[:, None] * spacing + column[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32)
    if PHI == "relu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)  # as torch's
    if PHI == "elu":  # which is 1 where there is no token
        x = tl.where(mask, tl.where(x > 0, x + 1, tl.exp(x)), 0.0)
    return x


@triton.jit
def _softmax(x, is_column):
    """Of queries over the channels of their head; finite where there is no token."""
    x = tl.where(is_column[None, :], x, -float("inf"))
    x = tl.exp(x - tl.max(x, 1)[:, None])
    return x * (1.0 / tl.sum(x, 1))[:, None]


@triton.jit
def _to_token(slope, x, PHI: tl.constexpr):
    """The slope of a token, of that of its features ``x``."""
    if PHI == "relu":
        slope = tl.where(x <= 0, 0.0, slope)
    if PHI == "elu":  # its derivative is exp(z) = x up to z = 0, and 1 beyond
        slope *= tl.where(x > 1, 1.0, x)
    return slope


@triton.jit
def _block(state, head, a, b, is_a, is_b, head_dim, G: tl.constexpr):
    """Places of (a, b) in the unit's states, each (head_dim + 1, head_dim), and which exist."""
    if G == 1:  # neighbors are loaded together where no division hides that they are
        place = (head * (head_dim + 1) + a)[:, None] * head_dim + b[None, :]
        return state + place, is_a[:, None] & is_b[None, :]
    place = (head + a // head_dim)[:, None] * (head_dim + 1) + (a % head_dim)[:, None]
    mask = is_a[:, None] & is_b[None, :]
    if G > 1:
        mask = mask & ((a // head_dim)[:, None] == (b // head_dim)[None, :])
    return state + place * head_dim + (b % head_dim)[None, :], mask


@triton.jit
def _block_transposed(state, head, a, b, is_a, is_b, head_dim, G: tl.constexpr):
    """``_block``, as (b, a)."""
    if G == 1:
        place = (head * (head_dim + 1) + a)[None, :] * head_dim + b[:, None]
        return state + place, is_a[None, :] & is_b[:, None]
    place = (head + a // head_dim)[None, :] * (head_dim + 1) + (a % head_dim)[None, :]
    mask = is_a[None, :] & is_b[:, None]
    if G > 1:
        mask = mask & ((a // head_dim)[None, :] == (b // head_dim)[:, None])
    return state + place * head_dim + (b % head_dim)[:, None], mask


@triton.jit
def _key_sum(state, head, a, head_dim, G: tl.constexpr):
    """Places of the sum of the keys, which is each state's last row."""
    if G == 1:
        return state + (head * (head_dim + 1) + head_dim) * head_dim + a
    return state + ((head + a // head_dim) * (head_dim + 1) + head_dim) * head_dim + a % head_dim


@triton.jit
def _same_head(column, head_dim, dtype: tl.constexpr):
    return (
        ((column // head_dim)[:, None] == (column // head_dim)[None, :]).to(tl.float32).to(dtype)
    )


@triton.jit
def _per_head(x, same, dtype: tl.constexpr, G: tl.constexpr, P: tl.constexpr):
    """Sums of rows over each head's columns, for every column of that head."""
    if G == 1:
        return tl.sum(x, 1)[:, None] + tl.zeros_like(x)
    high = x.to(dtype)
    total = _dot(high, same, P)
    if dtype != tl.float32:
        # Two numbers in half precision carry twice the digits.
        total = _add_dot(total, (x - high.to(tl.float32)).to(dtype), same, P)
    return total


@triton.jit
def _fold_kernel(
    a, b, inverse, weight, peaks, state, n, a_row, b_row, heads, head_dim, tiles, units, splits,
    chunk, PHI: tl.constexpr, SCALED: tl.constexpr, G: tl.constexpr, R: tl.constexpr,
    W: tl.constexpr, P: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """phi(a)^T b and the sum of phi(a) of a part of the tokens; or of scaled b, weighted a."""
    programs = units * tiles * tiles
    tile = tl.program_id(0) % programs
    part = (tl.program_id(0) // programs).to(tl.int64)
    sample = part // splits
    start = (part % splits) * chunk
    length = tl.minimum(chunk, n - start).to(tl.int32)
    i = tile // tiles % tiles
    j = tile % tiles
    head, first, a_column, is_a = _unit(tile // (tiles * tiles), i, heads, head_dim, G, W)
    _, _, b_column, is_b = _unit(tile // (tiles * tiles), j, heads, head_dim, G, W)
    a += (sample * n + start) * a_row + first
    b += (sample * n + start) * b_row + first
    scales = (sample * heads + head) * n + start
    acc = tl.zeros((W, W), tl.float32)
    total = tl.zeros((R, W), tl.float32)
    # Finite, so that keys of -inf, which weigh nothing, may come first.
    peak = tl.full((W,), -_LARGEST, tl.float32)
    for begin in range(0, length, R):
        row = begin + tl.arange(0, R)
        is_row = row < length
        x = _tokens(a, row, a_row, a_column, is_row[:, None] & is_a[None, :], PHI)
        y = _tokens(b, row, b_row, b_column, is_row[:, None] & is_b[None, :], "none")
        if PHI == "softmax":
            x = tl.where(is_row[:, None] & is_a[None, :], x, -float("inf"))
            higher = tl.maximum(peak, tl.max(x, 0))
            shrink = tl.exp(peak - higher)
            # Rounded as in the product, so that the weights still add up to 1.
            x = tl.exp(x - higher[None, :]).to(DTYPE).to(tl.float32)
            acc *= shrink[:, None]
            total *= shrink[None, :]
            peak = higher
        if SCALED:
            y *= tl.load(inverse + scales + row, mask=is_row, other=0.0)[:, None]
            total += x * tl.load(weight + scales + row, mask=is_row, other=0.0)[:, None]
        else:
            total += x
        acc = _add_dot(acc, tl.trans(x.to(DTYPE)), y.to(DTYPE), P)
    state += part * heads * (head_dim + 1) * head_dim
    place, exists = _block(state, head, a_column, b_column, is_a, is_b, head_dim, G)
    tl.store(place, acc, mask=exists)
    last = _key_sum(state, head, a_column, head_dim, G)
    tl.store(last, tl.sum(total, 0), mask=is_a & (j == 0))
    if PHI == "softmax":
        peaks += part * heads * head_dim + first
        tl.store(peaks + a_column, peak, mask=is_a & (j == 0))


@triton.jit
def _state_sum_kernel(
    partial, peaks, total, rounded, peak, parts, size, head_dim, ROUND: tl.constexpr,
    PEAKS: tl.constexpr, S: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The sum of the parts of a sample's states, and, with ROUND, that in another type too.

    With PEAKS each part's rows are relative to the part's peaks, the sum's to the highest.
    """
    column = tl.program_id(0) * C + tl.arange(0, C)
    is_column = column < size
    sample = tl.program_id(1).to(tl.int64)
    found = tl.zeros((S, C), tl.float32)
    highest = tl.full((C,), -_LARGEST, tl.float32)
    row = column // head_dim % (head_dim + 1)
    channel = column // head_dim // (head_dim + 1) * head_dim
    channel += tl.where(row < head_dim, row, column % head_dim)
    channels = size // (head_dim + 1)
    for first in range(0, parts, S):
        part = first + tl.arange(0, S)
        place = partial + (sample * parts + part)[:, None] * size + column[None, :]
        mask = (part < parts)[:, None] & is_column[None, :]
        z = tl.load(place, mask=mask, other=0.0)
        if PEAKS:
            place = peaks + (sample * parts + part)[:, None] * channels + channel[None, :]
            of_part = tl.load(place, mask=mask, other=-float("inf"))
            higher = tl.maximum(highest, tl.max(of_part, 0))
            found *= tl.exp(highest - higher)[None, :]
            z *= tl.exp(of_part - higher[None, :])
            highest = higher
        found += z
    found = tl.sum(found, 0)
    tl.store(total + sample * size + column, found, mask=is_column)
    if ROUND:
        rounding = found.to(rounded.dtype.element_ty)
        tl.store(rounded + sample * size + column, rounding, mask=is_column)
    if PEAKS:
        tl.store(peak + sample * channels + channel, highest, mask=is_column & (row == head_dim))


@triton.jit
def _read_kernel(
    q, state, out, n, q_row, out_row, heads, head_dim, units, splits, chunk, eps,
    PHI: tl.constexpr, DIVIDE: tl.constexpr, G: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    P: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """phi(q) state, divided by phi(q) . key sum + eps where asked for, of a part of the tokens."""
    unit = tl.program_id(0) % units
    part = (tl.program_id(0) // units).to(tl.int64)
    sample = part // splits
    start = (part % splits) * chunk
    length = tl.minimum(chunk, n - start).to(tl.int32)
    head, first, column, is_column = _unit(unit, 0, heads, head_dim, G, W)
    q += (sample * n + start) * q_row + first
    out += (sample * n + start) * out_row + first
    state += sample * heads * (head_dim + 1) * head_dim
    place, exists = _block(state, head, column, column, is_column, is_column, head_dim, G)
    block = tl.load(place, mask=exists, other=0.0)
    last = _key_sum(state, head, column, head_dim, G)
    key_sum = tl.load(last, mask=is_column, other=1.0)
    if PHI == "softmax":
        block /= key_sum[:, None]
    block = block.to(DTYPE)
    same = _same_head(column, head_dim, DTYPE)
    for begin in range(0, length, R):
        row = begin + tl.arange(0, R)
        mask = (row < length)[:, None] & is_column[None, :]
        x = _tokens(q, row, q_row, column, mask, PHI)
        if PHI == "softmax":
            x = _softmax(x, is_column)
        acc = _dot(x.to(DTYPE), block, P)
        if DIVIDE:
            acc = acc / (_per_head(x * key_sum[None, :], same, DTYPE, G, P) + eps)
        here = out + row[:, None] * out_row + column[None, :]
        tl.store(here, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _wide_read_kernel(
    q, state, rounded, out, inverse, n, q_row, out_row, heads, head_dim, groups, units, blocks,
    eps, PHI: tl.constexpr, DIVIDE: tl.constexpr, ADD: tl.constexpr, TILES: tl.constexpr,
    DEPTH: tl.constexpr, R: tl.constexpr, W: tl.constexpr, P: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """``_read_kernel`` of heads of several tiles, TILES together, from the state ``rounded``.

    With ADD what lies in ``out`` is added.
    """
    tile = tl.program_id(0) % (units * groups)
    part = (tl.program_id(0) // (units * groups)).to(tl.int64)
    sample = part // blocks
    start = (part % blocks) * R
    group = tile % groups
    head, first, _, _ = _unit(tile // groups, 0, heads, head_dim, 1, W)
    row = tl.arange(0, R)
    is_row = row < n - start
    q += (sample * n + start) * q_row + first
    out += (sample * n + start) * out_row + first
    state += sample * heads * (head_dim + 1) * head_dim
    rounded += sample * heads * (head_dim + 1) * head_dim
    norm = tl.zeros((R,), tl.float32)
    acc = ()
    for _i in tl.static_range(TILES):
        acc += (tl.zeros((R, W), tl.float32),)
    for begin in range(0, head_dim, DEPTH):
        a = begin + tl.arange(0, DEPTH)
        is_a = a < head_dim
        x = _tokens(q, row, q_row, a, is_row[:, None] & is_a[None, :], PHI)
        if DIVIDE:
            sums = tl.load(_key_sum(state, head, a, head_dim, 1), mask=is_a, other=0.0)
            norm += tl.sum(x * sums[None, :], 1)
        found = ()
        for j in tl.static_range(TILES):
            column = (group * TILES + j) * W + tl.arange(0, W)
            place, exists = _block(rounded, head, a, column, is_a, column < head_dim, head_dim, 1)
            block = tl.load(place, mask=exists, other=0.0).to(DTYPE)
            found += (_add_dot(acc[j], x.to(DTYPE), block, P),)
        acc = found
    factor = tl.full((R,), 1.0, tl.float32)
    if DIVIDE:
        factor = 1 / (norm + eps)
        line = inverse + (sample * heads + head) * n + start + row
        tl.store(line, factor, mask=is_row & (group == 0))
    for j in tl.static_range(TILES):
        column = (group * TILES + j) * W + tl.arange(0, W)
        mask = is_row[:, None] & (column < head_dim)[None, :]
        here = out + row[:, None] * out_row + column[None, :]
        total = acc[j] * factor[:, None]
        if ADD:
            total += tl.load(here, mask=mask, other=0.0).to(tl.float32)
        tl.store(here, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _query_gradient_kernel(
    q, grad, state, grad_q, grad_state, n, q_row, grad_row, out_row, heads, head_dim, units,
    splits, chunk, eps, PHI: tl.constexpr, DIVIDE: tl.constexpr, G: tl.constexpr,
    R: tl.constexpr, W: tl.constexpr, P: tl.constexpr, DTYPE: tl.constexpr,
    ONCE: tl.constexpr,
):  # fmt: skip
    """Of queries, and of the state a part of it; heads no wider than a tile."""
    unit = tl.program_id(0) % units
    part = (tl.program_id(0) // units).to(tl.int64)
    sample = part // splits
    start = (part % splits) * chunk
    length = tl.minimum(chunk, n - start).to(tl.int32)
    head, first, column, is_column = _unit(unit, 0, heads, head_dim, G, W)
    q += (sample * n + start) * q_row + first
    grad += (sample * n + start) * grad_row + first
    grad_q += (sample * n + start) * out_row + first
    state += sample * heads * (head_dim + 1) * head_dim
    place, exists = _block_transposed(
        state, head, column, column, is_column, is_column, head_dim, G
    )
    block = tl.load(place, mask=exists, other=0.0)
    last = _key_sum(state, head, column, head_dim, G)
    key_sum = tl.load(last, mask=is_column, other=1.0)
    if PHI == "softmax":
        block /= key_sum[None, :]
        # What all channels share of the values moves no softmax, but its rounding does.
        block -= (tl.sum(block, 1) / head_dim)[:, None]
    block = block.to(DTYPE)
    same = _same_head(column, head_dim, DTYPE)
    acc = tl.zeros((W, W), tl.float32)
    total = tl.zeros((R, W), tl.float32)
    for begin in range(0, length, R):
        row = begin + tl.arange(0, R)
        mask = (row < length)[:, None] & is_column[None, :]
        x = _tokens(q, row, q_row, column, mask, PHI)
        if PHI == "softmax":
            x = _softmax(x, is_column)
        g = _tokens(grad, row, grad_row, column, mask, "none")
        if DIVIDE:
            inverse = 1.0 / (_per_head(x * key_sum[None, :], same, DTYPE, G, P) + eps)
            g = tl.where(mask, g * inverse, 0.0)
        rounded = g.to(DTYPE)
        rounded = _laid_out(rounded, rounded, ONCE)
        slope = _dot(rounded, block, P)
        x = _laid_out(x, slope, ONCE)
        if DIVIDE:
            of_norm = tl.where(mask, -_per_head(slope * x, same, DTYPE, G, P) * inverse, 0.0)
            slope += of_norm * key_sum[None, :]
            total += x * of_norm
        acc = _add_dot(acc, tl.trans(x.to(DTYPE)), rounded, P)
        if PHI == "softmax":
            slope = x * (slope - tl.sum(x * slope, 1)[:, None])
        slope = _to_token(slope, x, PHI)
        here = grad_q + row[:, None] * out_row + column[None, :]
        tl.store(here, slope.to(grad_q.dtype.element_ty), mask=mask)
    grad_state += part * heads * (head_dim + 1) * head_dim
    place, exists = _block(grad_state, head, column, column, is_column, is_column, head_dim, G)
    tl.store(place, acc, mask=exists)
    last = _key_sum(grad_state, head, column, head_dim, G)
    tl.store(last, tl.sum(total, 0), mask=is_column)


@triton.jit
def _key_gradient_kernel(
    k, v, state, peaks, grad_state, grad_k, grad_v, n, k_row, v_row, grad_k_row, grad_v_row,
    heads, head_dim, units, splits, chunk, PHI: tl.constexpr, DIVIDE: tl.constexpr,
    ADD: tl.constexpr, G: tl.constexpr, R: tl.constexpr, W: tl.constexpr, P: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Of keys and values, from the state's; heads no wider than a tile."""
    unit = tl.program_id(0) % units
    part = (tl.program_id(0) // units).to(tl.int64)
    sample = part // splits
    start = (part % splits) * chunk
    length = tl.minimum(chunk, n - start).to(tl.int32)
    head, first, column, is_column = _unit(unit, 0, heads, head_dim, G, W)
    k += (sample * n + start) * k_row + first
    v += (sample * n + start) * v_row + first
    grad_k += (sample * n + start) * grad_k_row + first
    grad_v += (sample * n + start) * grad_v_row + first
    grad_state += sample * heads * (head_dim + 1) * head_dim
    place, exists = _block(grad_state, head, column, column, is_column, is_column, head_dim, G)
    block = tl.load(place, mask=exists, other=0.0).to(DTYPE)
    last = _key_sum(grad_state, head, column, head_dim, G)
    grad_sum = tl.load(last, mask=is_column, other=0.0)
    if PHI == "softmax":
        state += sample * heads * (head_dim + 1) * head_dim
        last = _key_sum(state, head, column, head_dim, G)
        share = 1.0 / tl.load(last, mask=is_column, other=1.0)
        peaks += sample * heads * head_dim + first
        peak = tl.load(peaks + column, mask=is_column, other=0.0)
        place, _ = _block(state, head, column, column, is_column, is_column, head_dim, G)
        # Of the slopes, each weighed by its key.
        mean = tl.load(place, mask=exists, other=0.0) * block.to(tl.float32)
        mean = tl.sum(mean, 1) * share
    for begin in range(0, length, R):
        row = begin + tl.arange(0, R)
        mask = (row < length)[:, None] & is_column[None, :]
        x = _tokens(k, row, k_row, column, mask, PHI)
        if PHI == "softmax":
            x = tl.where(mask, x, -float("inf"))
            x = tl.exp(x - peak[None, :]) * share[None, :]
        y = _tokens(v, row, v_row, column, mask, "none")
        here = grad_v + row[:, None] * grad_v_row + column[None, :]
        of_value = _dot(x.to(DTYPE), block, P)
        if ADD:
            of_value += tl.load(here, mask=mask, other=0.0).to(tl.float32)
        tl.store(here, of_value.to(grad_v.dtype.element_ty), mask=mask)
        slope = _dot(y.to(DTYPE), tl.trans(block), P)
        if DIVIDE:
            slope += grad_sum[None, :]
        if PHI == "softmax":
            slope = x * (slope - mean[None, :])
        slope = _to_token(slope, x, PHI)
        here = grad_k + row[:, None] * grad_k_row + column[None, :]
        tl.store(here, slope.to(grad_k.dtype.element_ty), mask=mask)


@triton.jit
def _wide_gradient_kernel(
    x, y, out, inverse, state, rounded, grad, weight, n, x_row, y_row, grad_row, heads, head_dim,
    tiles, units, blocks, PHI: tl.constexpr, SCALED: tl.constexpr, DIVIDE: tl.constexpr,
    R: tl.constexpr, W: tl.constexpr, P: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Of queries, from the outputs' (scaled), or of keys, from values and the state's gradient."""
    tile = tl.program_id(0) % (units * tiles)
    part = (tl.program_id(0) // (units * tiles)).to(tl.int64)
    sample = part // blocks
    start = (part % blocks) * R
    i = tile % tiles
    head, first, column, is_column = _unit(tile // tiles, i, heads, head_dim, 1, W)
    row = tl.arange(0, R)
    is_row = row < n - start
    x += (sample * n + start) * x_row + first
    y += (sample * n + start) * y_row + first
    grad += (sample * n + start) * grad_row + first
    out += ((sample * n + start) * heads + head) * head_dim
    state += sample * heads * (head_dim + 1) * head_dim
    rounded += sample * heads * (head_dim + 1) * head_dim
    scales = (sample * heads + head) * n + start + row
    acc = tl.zeros((R, W), tl.float32)
    along = tl.zeros((R,), tl.float32)
    if SCALED:
        factor = tl.load(inverse + scales, mask=is_row, other=0.0)
    for j in range(tiles):
        _, _, b, is_b = _unit(tile // tiles, j, heads, head_dim, 1, W)
        is_here = is_row[:, None] & is_b[None, :]
        z = _tokens(y, row, y_row, b, is_here, "none")
        if SCALED:
            along += tl.sum(z * _tokens(out, row, heads * head_dim, b, is_here, "none"), 1)
            z *= factor[:, None]
        place, exists = _block_transposed(rounded, head, column, b, is_column, is_b, head_dim, 1)
        acc = _add_dot(acc, z.to(DTYPE), tl.load(place, mask=exists, other=0.0).to(DTYPE), P)
    if DIVIDE:
        last = tl.load(_key_sum(state, head, column, head_dim, 1), mask=is_column, other=0.0)
        if SCALED:
            of_norm = -along * factor
            tl.store(weight + scales, of_norm, mask=is_row & (i == 0))
            acc += of_norm[:, None] * last[None, :]
        else:
            acc += last[None, :]
    mask = is_row[:, None] & is_column[None, :]
    if PHI != "none":
        acc = _to_token(acc, _tokens(x, row, x_row, column, mask, PHI), PHI)
    here = grad + row[:, None] * grad_row + column[None, :]
    tl.store(here, acc.to(grad.dtype.element_ty), mask=mask)


class Block(NamedTuple):
    """How a kernel is launched.

    Attributes:
        width: Columns of a tile of several narrow heads.
        rows: Tokens of a tile.
        programs: How many to split the tokens for, at least.
        warps: Of a program.
        stages: Of its loop.
    """

    width: int
    rows: int
    programs: int
    warps: int
    stages: int


# By kernel; by whether the heads are narrow (up to 64), up to 128, or wider; in half precision.
BLOCKS: dict[str, tuple[Block, Block, Block]] = {
    "fold": (Block(64, 64, 264, 4, 3), Block(128, 32, 264, 4, 3), Block(128, 64, 126, 8, 3)),
    "read": (Block(64, 64, 264, 4, 3), Block(128, 32, 528, 4, 1), Block(128, 64, 0, 8, 3)),
    "query_gradient": (Block(64, 32, 264, 4, 2), Block(128, 64, 264, 8, 3),
                       Block(128, 64, 0, 4, 2)),
    "key_gradient": (Block(64, 64, 264, 8, 3), Block(128, 64, 264, 8, 3),
                     Block(128, 64, 0, 4, 2)),
}  # fmt: skip
# Of heads of at most 32 channels: where one is a tile, sums over its channels are no product.
SMALL_BLOCKS = {"read": Block(32, 64, 528, 4, 3), "query_gradient": Block(32, 64, 528, 2, 3)}
SMALL, NARROW, MEDIUM = 32, 64, 128
ROOMY = 200 * 2**10  # bytes of shared memory for the tiles of wide heads
FLOAT32_ROWS = 32
# Of a wide head, where tiles are: tiles that a program reads together, so that queries are loaded
# once, and channels that it multiplies at a time.
READ_TILES, READ_DEPTH = 3, 64


class _Launch(NamedTuple):
    """Sizes of one launch.

    Attributes:
        group: Heads of a unit.
        units: How many there are.
        tiles: Of one head.
        splits: Parts of the tokens.
        chunk: Tokens of a part.
        tile: Rows and columns of a tile.
        options: What Triton is told.
    """

    group: int
    units: int
    tiles: int
    splits: int
    chunk: int
    tile: tuple[int, int]
    options: dict[str, int]


def _is_wide(dtype: torch.dtype, width: int) -> bool:
    """Whether a head has several tiles."""
    return width > (NARROW if dtype == torch.float32 else MEDIUM)


def _launch(
    kernel: str, dtype: torch.dtype, device: torch.device, b: int, n: int, heads: int, width: int,
    activation: str,
) -> _Launch:  # fmt: skip
    kind = 2 if _is_wide(dtype, width) else 0 if width <= NARROW else 1
    room = _shared_memory(device)
    is_small = bool(room and room < ROOMY)
    sizes = b, n, heads, width
    block = BLOCKS[kernel][kind]
    if width <= SMALL:
        block = SMALL_BLOCKS.get(kernel, block)
    is_alone = activation == "softmax" and kernel in ("read", "query_gradient")
    return _sizes(block, kind, dtype, is_small, is_alone, FLOAT32_ROWS, kernel, *sizes)


@functools.lru_cache(maxsize=1024)
def _sizes(
    block: Block, kind: int, dtype: torch.dtype, is_small: bool, is_alone: bool,
    float32_rows: int, kernel: str, b: int, n: int, heads: int, width: int,
) -> _Launch:  # fmt: skip
    """Of a launch; asked anew for every one, it took the host as long as the launch."""
    columns, rows, warps, stages = block.width, block.rows, block.warps, block.stages
    if dtype == torch.float32:
        # Products of float32 take several registers for one number of theirs.
        rows, warps, stages = float32_rows, 4, 1
        columns = 64 if width > 32 else 32
    elif kind and is_small:
        rows, columns = (32, columns) if kind == 1 else (64, 64)
        stages = min(stages, 2)
    group, tiles = (max(1, columns // width), 1) if kind < 2 else (1, _ceil(width, columns))
    if is_alone:  # sums over a head's channels are sums over the tile's
        group = 1
    units = _ceil(heads, group)
    there = max(1, b * units * tiles * (tiles if kernel == "fold" else 1))
    most = max(1, _ceil(n, rows))
    splits = most if not block.programs else max(1, min(most, _ceil(block.programs, there)))
    chunk = max(1, _ceil(_ceil(n, splits), rows)) * rows
    return _Launch(
        group, units, tiles, max(1, _ceil(n, chunk)), chunk, (rows, columns),
        {"num_warps": warps, "num_stages": stages},
    )  # fmt: skip


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _tail(launch: _Launch, dtype: torch.dtype) -> tuple[Any, ...]:
    return launch.group, *launch.tile, _precision(dtype), _TYPES[dtype]


def _sum(
    partial: Tensor, dtype: torch.dtype = torch.float32, peaks: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(b, splits, h, d + 1, d) -> (b, h, d + 1, d), that in another type too, and its peaks."""
    b, splits, *sizes = partial.shape
    total = torch.empty(b, *sizes, dtype=torch.float32, device=partial.device)
    rounded = total
    if dtype != torch.float32:
        rounded = torch.empty(b, *sizes, dtype=dtype, device=partial.device)
    peak = total
    if peaks is not None:
        peak = torch.empty(b, sizes[0], sizes[2], dtype=torch.float32, device=partial.device)
    if total.numel():
        size = sizes[0] * sizes[1] * sizes[2]
        launch_kernel(_state_sum_kernel, (_ceil(size, 256), b),
            partial, partial if peaks is None else peaks, total, rounded, peak, splits, size,
            sizes[2], dtype != torch.float32, peaks is not None, 8, 256, num_warps=4,
        )  # fmt: skip
    return total, rounded, peak


def _fold(
    a: Tensor, b: Tensor, heads: int, activation: str, dtype: torch.dtype,
    inverse: Tensor | None = None, weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """States and sums of (b, m, h * d), (b, m, h * d): (b, h, d + 1, d), the sum last.

    Those of wide heads a second time in ``dtype``; and with "softmax" the peaks, (b, h, d).
    """
    (a, a_row), (b, b_row) = _rows(a), _rows(b)
    batch, m, width = a.shape
    width //= heads
    s = _launch("fold", dtype, a.device, batch, m, heads, width, activation)
    partial = torch.empty(
        batch, s.splits, heads, width + 1, width, dtype=torch.float32, device=a.device
    )
    peaks = None
    if activation == "softmax":
        peaks = torch.empty(batch, s.splits, heads, width, dtype=torch.float32, device=a.device)
    if not m:
        partial.zero_()
    elif partial.numel():
        stand_in = partial if inverse is None else inverse
        launch_kernel(_fold_kernel, (batch * s.splits * s.units * s.tiles**2,),
            a, b, stand_in, stand_in if weight is None else weight,
            partial if peaks is None else peaks, partial, m, a_row, b_row, heads, width, s.tiles,
            s.units, s.splits, s.chunk, activation, inverse is not None, *_tail(s, dtype),
            **s.options,
        )  # fmt: skip
    return _sum(partial, dtype if _is_wide(dtype, width) else torch.float32, peaks)


def _read(
    query: Tensor, state: Tensor, out: Tensor, heads: int, activation: str, divide: bool,
    eps: float, dtype: torch.dtype, rounded: Tensor, add: bool = False,
) -> Tensor:  # fmt: skip
    """Writes ``out``, (b, n, h * d), and returns 1 / norm of wide heads, (b, h, n).

    Of wide heads ``add`` adds to what lies there.
    """
    query, q_row = _rows(query)
    b, n, width = query.shape
    width //= heads
    s = _launch("read", dtype, query.device, b, n, heads, width, activation)
    is_wide = _is_wide(dtype, width)
    inverse = torch.empty(
        b, heads, n if is_wide and divide else 0, dtype=torch.float32, device=query.device
    )
    if out.numel() and is_wide:
        blocks, columns = _ceil(n, s.tile[0]), s.tile[1]
        has_room = dtype != torch.float32 and columns == BLOCKS["read"][2].width
        groups = _ceil(s.tiles, READ_TILES if has_room else 1)
        launch_kernel(_wide_read_kernel, (b * blocks * s.units * groups,),
            query, state, rounded, out, inverse if divide else state, n, q_row, out.stride(1),
            heads, width, groups, s.units, blocks, eps, activation, divide, add,
            _ceil(s.tiles, groups), min(columns, READ_DEPTH), *_tail(s, dtype)[1:], **s.options,
        )  # fmt: skip
    elif out.numel():
        launch_kernel(_read_kernel, (b * s.splits * s.units,),
            query, state, out, n, q_row, out.stride(1), heads, width, s.units, s.splits, s.chunk,
            eps, activation, divide, *_tail(s, dtype), **s.options,
        )  # fmt: skip
    return inverse


def _wide_gradient(
    x: Tensor, y: Tensor, state: Tensor, rounded: Tensor, grad: Tensor, heads: int,
    activation: str, divide: bool, dtype: torch.dtype, kernel: str, out: Tensor | None = None,
    inverse: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Writes ``grad`` of ``x``, and returns the norms' gradient, (b, h, n), given inverses."""
    (x, x_row), (y, y_row) = _rows(x), _rows(y)
    b, n, width = x.shape
    width //= heads
    s = _launch(kernel, dtype, x.device, b, n, heads, width, activation)
    weight = torch.empty_like(inverse) if inverse is not None else state
    blocks = _ceil(n, s.tile[0])
    if grad.numel():
        launch_kernel(_wide_gradient_kernel, (b * blocks * s.units * s.tiles,),
            x, y, y if out is None else out, state if inverse is None else inverse, state,
            rounded, grad, weight, n, x_row, y_row, grad.stride(1), heads, width, s.tiles,
            s.units, blocks, activation, inverse is not None, divide, *_tail(s, dtype)[1:],
            **s.options,
        )  # fmt: skip
    return weight


SCHEMA = (
    "Tensor query, Tensor? key, Tensor? value, int heads, str activation, bool divide, float eps"
)


def _split(query: Tensor, key: Tensor | None, value: Tensor | None) -> tuple[Tensor, ...]:
    return query.chunk(3, dim=-1) if key is None or value is None else (query, key, value)


@launched("linear_core", f"({SCHEMA}) -> (Tensor, Tensor, Tensor)")
def _linear_core(
    query: Tensor, key: Tensor | None, value: Tensor | None, heads: int, activation: str,
    divide: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    query, key, value = _split(query, key, value)
    dtype = value.dtype
    state, rounded, peaks = _fold(key, value, heads, activation, dtype)
    out = torch.empty(query.shape, dtype=dtype, device=query.device)
    inverse = _read(query, state, out, heads, activation, divide, eps, dtype, rounded)
    return out, state, peaks if activation == "softmax" else inverse


# Nothing but the backward reads the others.
_linear_core.register_inference(replayed(_linear_core.function, 1))


@_linear_core.register_fake
def _(
    query: Tensor, key: Tensor | None, value: Tensor | None, heads: int, activation: str,
    divide: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return fake_core(*_split(query, key, value), heads, activation, divide)


def fake_core(
    query: Tensor, key: Tensor, value: Tensor, heads: int, activation: str, divide: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Results of the core without numbers."""
    b, n, width = query.shape
    width //= heads
    norms = n if divide and _is_wide(value.dtype, width) else 0
    norms = width if activation == "softmax" else norms
    return (
        value.new_empty(b, n, heads * width),
        value.new_empty(b, heads, width + 1, width, dtype=torch.float32),
        value.new_empty(b, heads, norms, dtype=torch.float32),
    )


def query_gradient(
    query: Tensor, grad: Tensor, state: Tensor, grad_query: Tensor, heads: int, activation: str,
    divide: bool, eps: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Writes the gradient of queries and returns the state's; of heads no wider than a tile."""
    (query, q_row), (grad, grad_row) = _rows(query), _rows(grad)
    b, n, width = query.shape
    width //= heads
    s = _launch("query_gradient", dtype, query.device, b, n, heads, width, activation)
    partial = torch.empty(
        b, s.splits, heads, width + 1, width, dtype=torch.float32, device=query.device
    )
    if n and partial.numel():
        launch_kernel(_query_gradient_kernel, (b * s.splits * s.units,),
            query, grad, state, grad_query, partial, n, q_row, grad_row, grad_query.stride(1),
            heads, width, s.units, s.splits, s.chunk, eps, activation, divide, *_tail(s, dtype),
            _is_fast() and width <= SMALL, **s.options,
        )  # fmt: skip
    elif not n:
        partial.zero_()
    return _sum(partial)[0]


def core_gradients(
    grad: Tensor, out: Tensor, state: Tensor, inverse: Tensor, query: Tensor, key: Tensor,
    value: Tensor, heads: int, activation: str, divide: bool, eps: float, found: Sequence[Tensor],
    add: bool = False,
) -> None:  # fmt: skip
    """Writes gradients of query, key and value, that of the value added to what is there."""
    grad_query, grad_key, grad_value = found
    dtype, width = value.dtype, query.shape[2] // heads
    if _is_wide(dtype, width):
        options = heads, activation
        rounded, weight = state.to(dtype), None
        if divide:
            weight = _wide_gradient(
                query, grad, state, rounded, grad_query, *options, True, dtype, "query_gradient",
                out, inverse,
            )  # fmt: skip
            grad_state, rounded, _ = _fold(query, grad, *options, dtype, inverse, weight)
        else:
            _wide_gradient(
                query, grad, state, rounded, grad_query, *options, False, dtype, "query_gradient"
            )
            grad_state, rounded, _ = _fold(query, grad, *options, dtype)
        _wide_gradient(
            key, value, grad_state, rounded, grad_key, *options, divide, dtype, "key_gradient"
        )
        _read(key, grad_state, grad_value, *options, False, 0.0, dtype, rounded, add)
        return
    options = heads, activation, divide, eps, dtype
    grad_state = query_gradient(query, grad, state, grad_query, *options)
    (k, k_row), (v, v_row) = _rows(key), _rows(value)
    b, m, _ = k.shape
    s = _launch("key_gradient", dtype, k.device, b, m, heads, width, activation)
    if grad_key.numel():
        launch_kernel(_key_gradient_kernel, (b * s.splits * s.units,),
            k, v, state, inverse if activation == "softmax" else state, grad_state, grad_key,
            grad_value, m, k_row, v_row, grad_key.stride(1),
            grad_value.stride(1), heads, width, s.units, s.splits, s.chunk, activation, divide,
            add, *_tail(s, dtype), **s.options,
        )  # fmt: skip


@launched(
    "linear_core_backward",
    f"(Tensor grad, Tensor out, Tensor state, Tensor inverse, {SCHEMA}) "
    "-> (Tensor, Tensor, Tensor)",
)
def _linear_core_backward(
    grad: Tensor, out: Tensor, state: Tensor, inverse: Tensor, query: Tensor, key: Tensor | None,
    value: Tensor | None, heads: int, activation: str, divide: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of query, key and value; of packed ones all in the first, and then nothing."""
    parts = _split(query, key, value)
    if key is None or value is None:
        whole = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        grads = whole.chunk(3, dim=-1)
        found = whole, *(whole.new_empty(0) for _ in range(2))
    else:
        grads = found = tuple(torch.empty(z.shape, dtype=z.dtype, device=z.device) for z in parts)
    core_gradients(grad, out, state, inverse, *parts, heads, activation, divide, eps, grads)
    return found  # type: ignore[return-value]


@_linear_core_backward.register_fake
def _(
    grad: Tensor, out: Tensor, state: Tensor, inverse: Tensor, query: Tensor, key: Tensor | None,
    value: Tensor | None, heads: int, activation: str, divide: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    others = [query.new_empty(0) if z is None else z.new_empty(z.shape) for z in (key, value)]
    return query.new_empty(query.shape), others[0], others[1]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    out, state, inverse = output
    if not inverse.numel() or ctx.options[1] == "softmax":
        out = inverse  # only wide heads read the output again
    ctx.save_for_backward(out, state, inverse, query, key, value)


def _gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    *saved, key, value = ctx.saved_tensors
    found = _linear_core_backward(grad, *saved, key, value, *ctx.options)
    is_packed = key is None
    return found[0], *((None, None) if is_packed else found[1:]), None, None, None, None


_linear_core.register_autograd(_gradients, setup_context=_setup)


def linear_tokens(
    query: Tensor, key: Tensor | None, value: Tensor | None, heads: int, activation: str = "none",
    is_normalized: bool = True, eps: float = 1e-15,
) -> Tensor:  # fmt: skip
    """See ``attnzoo.ops.linear_core``."""
    check_activation(activation, is_normalized)
    last = query if value is None else value
    dtype = operand_dtype(last)
    if last.dtype != dtype:
        last = last.to(dtype)
    query, value, parts = (last, None, 3) if value is None else (query, last, 1)
    is_wide = _is_wide(dtype, last.shape[-1] // (parts * heads))
    if activation == "softmax" and (is_wide or not last.shape[1]):
        # Over channels of several tiles, or over no keys at all.
        query, key, value = _split(query, key, value)
        query, key = features(query, key, heads, activation, is_normalized)
        activation = "none"
    return _linear_core(query, key, value, heads, activation, is_normalized, eps)[0]
