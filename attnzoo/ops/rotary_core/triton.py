"""Attention of ELU features with rotary positions, from the packed projection and back into it.

A program reads a part of one head's tokens; features are made and turned in registers. Sums over
tokens (a state of d + 2 rows of d for each head: K^T V, the sum of the features, that of the
values) are left behind in parts, and added up by a launch of their own. The backward computes
features again from the tokens and leaves the gradients of queries, keys and values side by side.
"""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAssignmentType=false

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.ops.depthwise_conv.triton import stencil, stencil_weight_gradient
from attnzoo.ops.power_map.triton import _exp2
from attnzoo.ops.precision import operand_dtype
from attnzoo.ops.rotary_core.rotary import turns
from attnzoo.ops.triton_common import (
    _LOG2E,
    _add_dot,
    _ceil,
    _dot,
    _is_fast,
    _laid_out,
    _power_of_2,
    _precision,
    _rows,
    _width,
    launch_kernel,
    launched,
    on_its_device,
)
from attnzoo.ops.triton_replay import replayed


@triton.jit
def _tile(z, row, spacing, column, mask):
    return tl.load(z + row[:, None] * spacing + column[None, :], mask=mask, other=0.0)


@triton.jit
def _features(x, FAST: tl.constexpr):
    """ELU + 1 of a tile; 1 where nothing was loaded."""
    x = x.to(tl.float32)
    return tl.where(x > 0, x + 1.0, _exp2(x * _LOG2E, FAST))


@triton.jit
def _to_token(slope, x):
    """The slope of a token, of that of its features ``x``."""
    return slope * tl.where(x > 1, 1.0, x)


@triton.jit
def _angles(table, row, is_row, width, steps, d: tl.constexpr, H: tl.constexpr):
    """Cosines and sines of each token's pairs of channels; 1 and 0 of those that do not turn."""
    pairs: tl.constexpr = d // 4  # known here, so that neighbors are loaded together
    pair = tl.arange(0, H)[None, :]
    line = ((row.to(tl.float32) + 0.5) * (1.0 / width)).to(tl.int32)  # quicker than a division
    line += (line * width + width <= row).to(tl.int32) - (line * width > row).to(tl.int32)
    step = tl.where(pair < pairs, line[:, None], (row - line * width)[:, None])
    place = table + step * pairs + pair % pairs
    mask = is_row[:, None] & (pair < 2 * pairs)
    cosine = tl.load(place, mask=mask, other=1.0)
    return cosine, tl.load(place + steps * pairs, mask=mask, other=0.0)


@triton.jit
def _halves(x, R: tl.constexpr, W: tl.constexpr):
    """Even and odd columns."""
    return tl.split(tl.reshape(x, (R, W // 2, 2)))


@triton.jit
def _whole(even, odd, R: tl.constexpr, W: tl.constexpr):
    return tl.reshape(tl.join(even, odd), (R, W))


@triton.jit
def _turn(even, odd, cosine, sine):
    return even * cosine - odd * sine, odd * cosine + even * sine


@triton.jit
def _turned(x, cosine, sine, R: tl.constexpr, W: tl.constexpr):
    even, odd = _halves(x, R, W)
    return _whole(*_turn(even, odd, cosine, sine), R, W)


@triton.jit
def _state_halves(state, d: tl.constexpr, W: tl.constexpr, dtype: tl.constexpr):
    """K^T V of keys' even and odd channels, (W / 2, W), and their sums over tokens, (W / 2,)."""
    even, column = 2 * tl.arange(0, W // 2), tl.arange(0, W)
    is_even, is_odd, is_column = even < d, even + 1 < d, column < d
    place = state + even[:, None] * d + column[None, :]
    evens = tl.load(place, mask=is_even[:, None] & is_column[None, :], other=0.0)
    odds = tl.load(place + d, mask=is_odd[:, None] & is_column[None, :], other=0.0)
    even_keys = tl.load(state + d * d + even, mask=is_even, other=0.0)
    odd_keys = tl.load(state + d * d + even + 1, mask=is_odd, other=0.0)
    return evens.to(dtype), odds.to(dtype), even_keys, odd_keys


@triton.jit
def _beside(line, dtype: tl.constexpr):
    """A line as the first of 16 columns, the others 0.

    Sums over channels are products with it, rounded as those that they are subtracted from.
    """
    return tl.where(tl.arange(0, 16)[None, :] == 0, line[:, None], 0.0).to(dtype)


@triton.jit
def _mean(parts, image, splits, n, c, column, is_column, S: tl.constexpr):
    """The mean over ``n`` tokens of what was summed in parts, of some channels."""
    split = tl.arange(0, S)
    place = parts + (image * splits + split)[:, None] * c + column[None, :]
    mask = (split < splits)[:, None] & is_column[None, :]
    return tl.sum(tl.load(place, mask=mask, other=0.0), 0) / n


@triton.jit
def _part(n, heads, d, splits, chunk, W: tl.constexpr):
    """Image, head, first token and the one behind the last; columns, and which exist."""
    split, image_head = tl.program_id(0) % splits, tl.program_id(0) // splits
    image, head = (image_head // heads).to(tl.int64), image_head % heads
    column = tl.arange(0, W)
    start = split * chunk
    return image, head, start, tl.minimum(start + chunk, n), column, column < d


@triton.jit
def _elu_sum_kernel(
    z, parts, n, c, z_row, splits, chunk, R: tl.constexpr, C: tl.constexpr, FAST: tl.constexpr
):
    """Sums of features over a part of the tokens."""
    image, start = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits * chunk
    column = tl.program_id(1) * C + tl.arange(0, C)
    z += image * n * z_row
    total = tl.zeros((R, C), tl.float32)
    for first in range(start, tl.minimum(start + chunk, n), R):
        row = first + tl.arange(0, R)
        mask = (row < n)[:, None] & (column < c)[None, :]
        x = _features(_tile(z, row, z_row, column, mask), FAST)
        total += tl.where(mask, x, 0.0)
    place = parts + tl.program_id(0).to(tl.int64) * c + column
    tl.store(place, tl.sum(total, 0), mask=column < c)


@triton.jit
def _elu_fold_kernel(
    key, value, table, anchors, partial, peaks, n, heads, d: tl.constexpr, k_row, splits, chunk,
    scale, width, steps, anchor_splits, TURN: tl.constexpr, WEIGH: tl.constexpr, S: tl.constexpr,
    R: tl.constexpr, W: tl.constexpr, P: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """A part of each state; keys are weighed by exp(score - peak of the part)."""
    image, head, start, stop, column, is_column = _part(n, heads, d, splits, chunk, W)
    key += image * n * k_row + head * d
    value += image * n * k_row + head * d
    acc = tl.zeros((W, W), tl.float32)
    keys = tl.zeros((R, W), tl.float32)
    values = tl.zeros((R, W), tl.float32)
    if WEIGH:
        anchor = _mean(
            anchors, image, anchor_splits, n, heads * d, head * d + column, is_column, S
        )
        anchor *= scale
        peak = tl.full((1,), -float("inf"), tl.float32)
        total = tl.zeros((1,), tl.float32)
    for first in range(start, stop, R):
        row = first + tl.arange(0, R)
        is_row = row < stop
        mask = is_row[:, None] & is_column[None, :]
        x = _tile(key, row, k_row, column, mask)
        v = _tile(value, row, k_row, column, mask)
        x = _features(x, FAST)
        if WEIGH:
            score = tl.where(is_row, tl.sum(x * anchor[None, :], 1), -float("inf"))
            higher = tl.maximum(peak, tl.max(score, 0))
            shrink = tl.exp(peak - higher)
            weight = tl.exp(score - higher)
            total = total * shrink + tl.sum(weight, 0)
            acc *= shrink[:, None]
            keys *= shrink[:, None]
            peak = higher
            x *= weight[:, None]
        else:
            values += v.to(tl.float32)
            x = tl.where(is_row[:, None], x, 0.0)
        keys += x
        if TURN:
            cosine, sine = _angles(table, row, is_row, width, steps, d, W // 2)
            x = _turned(x, cosine, sine, R, W)
        acc = _add_dot(acc, tl.trans(x.to(v.dtype)), v, P)
    state = partial + tl.program_id(0).to(tl.int64) * (d + 2) * d + column
    tl.store(
        state[None, :] + column[:, None] * d, acc, mask=is_column[:, None] & is_column[None, :]
    )
    tl.store(state + d * d, tl.sum(keys, 0), mask=is_column)
    tl.store(state + (d + 1) * d, tl.sum(values, 0), mask=is_column)
    if WEIGH:
        place = peaks + 2 * tl.program_id(0) + tl.arange(0, 1)
        tl.store(place, peak)
        tl.store(place + 1, total)


@triton.jit
def _elu_join_kernel(
    partial, peaks, state, logs, n, numbers, splits, WEIGH: tl.constexpr, S: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """Adds up the parts of a state; weighed, so that weights over all tokens add up to ``n``."""
    head = tl.program_id(0)
    split, column = tl.arange(0, S), tl.program_id(1) * C + tl.arange(0, C)
    is_split, is_column = split < splits, column < numbers
    place = partial + (head * splits + split).to(tl.int64)[:, None] * numbers + column[None, :]
    z = tl.load(place, mask=is_split[:, None] & is_column[None, :], other=0.0)
    if WEIGH:
        place = peaks + 2 * (head * splits + split)
        peak = tl.load(place, mask=is_split, other=-float("inf"))
        highest = tl.max(peak, 0)
        share = tl.exp(peak - highest)
        total = tl.sum(share * tl.load(place + 1, mask=is_split, other=0.0), 0) / n
        z = z * share[:, None] / total
        if tl.program_id(1) == 0:
            tl.store(logs + head, highest + tl.log(total))
    tl.store(state + head.to(tl.int64) * numbers + column, tl.sum(z, 0), mask=is_column)


@triton.jit
def _elu_read_kernel(
    query, gate, table, state, local, plain, norms, out, n, heads, d: tl.constexpr, q_row,
    gate_row, splits, chunk, scale, eps, width, steps, TURN: tl.constexpr, WEIGH: tl.constexpr,
    ADD: tl.constexpr, KEEP: tl.constexpr, R: tl.constexpr, W: tl.constexpr, P: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """What queries read, and the convolution, times the gate.

    Features stay apart, even channels and odd: joined, they would be laid out anew for products.
    """
    image, head, start, stop, column, is_column = _part(n, heads, d, splits, chunk, W)
    dtype: tl.constexpr = query.dtype.element_ty
    query += image * n * q_row + head * d
    gate += image * n * gate_row + head * d
    whole = image * n * heads * d + head * d
    local += whole
    plain += whole
    out += whole
    norms += (image * heads + head) * n
    state += (image * heads + head) * (d + 2) * d
    evens, odds, even_keys, odd_keys = _state_halves(state, d, W, dtype)
    # Means, for sums over many tokens may be too large for float16.
    even_keys, odd_keys = _beside(even_keys / n, dtype), _beside(odd_keys / n, dtype)
    values = tl.load(state + (d + 1) * d + column, mask=is_column, other=0.0) / n
    for first in range(start, stop, R):
        row = first + tl.arange(0, R)
        is_row = row < stop
        mask = is_row[:, None] & is_column[None, :]
        x = _tile(query, row, q_row, column, mask)
        factor = _tile(gate, row, gate_row, column, mask)
        if ADD:
            near = _tile(local, row, heads * d, column, mask)
        even, odd = _halves(_features(x, FAST), R, W)
        norm = tl.sum(_add_dot(_dot(even.to(dtype), even_keys, P), odd.to(dtype), odd_keys, P), 1)
        if TURN:
            cosine, sine = _angles(table, row, is_row, width, steps, d, W // 2)
            even, odd = _turn(even, odd, cosine, sine)
        z = _add_dot(_dot(even.to(dtype), evens, P), odd.to(dtype), odds, P)
        norm *= scale * n
        if WEIGH:
            z *= (1.0 / (norm + eps))[:, None]
        else:
            z = z * (scale + scale / (norm + eps))[:, None] - norm[:, None] * values[None, :]
        if ADD:
            z += near.to(tl.float32)
        place = row[:, None] * (heads * d) + column[None, :]
        if KEEP:
            tl.store(plain + place, z.to(plain.dtype.element_ty), mask=mask)
            tl.store(norms + row, norm, mask=is_row)
        z *= factor.to(tl.float32)
        tl.store(out + place, z.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _elu_query_gradient_kernel(
    grad, query, gate, plain, norms, table, state, spread, grad_q, of_plain, of_gate, partial, n,
    heads, d: tl.constexpr, g_row, q_row, gate_row, gq_row, splits, chunk, scale, eps, width,
    steps, spread_splits, TURN: tl.constexpr, WEIGH: tl.constexpr, FOLD: tl.constexpr,
    WRITE: tl.constexpr, S: tl.constexpr, R: tl.constexpr, W: tl.constexpr, P: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Of the gate, of what it multiplies, and a part of the state's (FOLD); of queries (WRITE).

    Without FOLD ``grad`` is of what the gate multiplies.
    """
    image, head, start, stop, column, is_column = _part(n, heads, d, splits, chunk, W)
    dtype: tl.constexpr = query.dtype.element_ty
    query += image * n * q_row + head * d
    grad += image * n * g_row + head * d
    grad_q += image * n * gq_row + head * d
    gate += image * n * gate_row + head * d
    whole = image * n * heads * d + head * d
    plain += whole
    of_gate += whole
    of_plain += whole
    norms += (image * heads + head) * n
    state += (image * heads + head) * (d + 2) * d
    is_block = is_column[:, None] & is_column[None, :]
    block = tl.load(state + column[:, None] * d + column[None, :], mask=is_block, other=0.0)
    block = block.to(dtype)
    keys = tl.load(state + d * d + column, mask=is_column, other=0.0)
    if not WEIGH:
        values = tl.load(state + (d + 1) * d + column, mask=is_column, other=0.0) / n
    if FOLD:
        acc = tl.zeros((W, W), tl.float32)
        of_keys = tl.zeros((R // 2, W), tl.float32)
        of_values = tl.zeros((R // 2, W), tl.float32)
    if WRITE and WEIGH:
        shared = _mean(spread, image, spread_splits, n, heads * d, head * d + column, is_column, S)
    for first in range(start, stop, R):
        row = first + tl.arange(0, R)
        is_row = row < stop
        mask = is_row[:, None] & is_column[None, :]
        x = _tile(query, row, q_row, column, mask)
        g = _tile(grad, row, g_row, column, mask)
        norm = tl.load(norms + row, mask=is_row, other=1.0)
        if FOLD:
            z = _tile(plain, row, heads * d, column, mask).to(tl.float32)
            factor = _tile(gate, row, gate_row, column, mask).to(tl.float32)
            wide = g.to(tl.float32)
            place = row[:, None] * (heads * d) + column[None, :]
            tl.store(of_gate + place, (z * wide).to(of_gate.dtype.element_ty), mask=mask)
            g = (factor * wide).to(dtype)
            g = _laid_out(g, g, FAST)
            tl.store(of_plain + place, g, mask=mask)
        slope = _dot(g, tl.trans(block), P)
        x = _features(x, FAST)
        x = _laid_out(x, x, FAST)
        turned = x
        if TURN:
            cosine, sine = _angles(table, row, is_row, width, steps, d, W // 2)
            turned = _turned(x, cosine, sine, R, W)
            slope = _turned(slope, cosine, -sine, R, W)
        along = tl.sum(slope * x, 1)
        inverse = 1.0 / (norm + eps)
        if WEIGH:
            factor = inverse
            of_norm = -along * inverse * inverse
        else:
            factor = scale + scale * inverse
            of_norm = -along * scale * inverse * inverse
            of_norm = (of_norm - tl.sum(g.to(tl.float32) * values[None, :], 1)) * scale
        if FOLD:
            acc = _add_dot(acc, tl.trans((turned * factor[:, None]).to(dtype)), g, P)
            # Rows of one thread: half as many sums to keep.
            of_keys += tl.sum(tl.reshape(x * of_norm[:, None], (2, R // 2, W)), 0)
            if not WEIGH:
                z = g.to(tl.float32) * norm[:, None]
                of_values -= tl.sum(tl.reshape(z, (2, R // 2, W)), 0)
        if WRITE:
            slope = slope * factor[:, None] + of_norm[:, None] * keys[None, :]
            if WEIGH:
                slope += shared[None, :]
            target = grad_q + row[:, None] * gq_row + column[None, :]
            tl.store(target, _to_token(slope, x).to(dtype), mask=mask)
    if FOLD:
        line = partial + tl.program_id(0).to(tl.int64) * (d + 2) * d + column
        tl.store(line[None, :] + column[:, None] * d, acc, mask=is_block)
        tl.store(line + d * d, tl.sum(of_keys, 0), mask=is_column)
        tl.store(line + (d + 1) * d, tl.sum(of_values, 0) / n, mask=is_column)


@triton.jit
def _elu_key_gradient_kernel(
    key, value, table, anchors, state, logs, of_state, added, grad_k, grad_v, spread, n, heads,
    d: tl.constexpr, k_row, gk_row, splits, chunk, scale, width, steps, anchor_splits,
    TURN: tl.constexpr, WEIGH: tl.constexpr, ADD: tl.constexpr, S: tl.constexpr, R: tl.constexpr,
    W: tl.constexpr, P: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Of keys and values, and a part of that of the mean query, which weighs the keys."""
    image, head, start, stop, column, is_column = _part(n, heads, d, splits, chunk, W)
    key += image * n * k_row + head * d
    value += image * n * k_row + head * d
    grad_k += image * n * gk_row + head * d
    grad_v += image * n * gk_row + head * d
    added += image * n * heads * d + head * d
    line = (image * heads + head) * (d + 2) * d + column
    is_block = is_column[:, None] & is_column[None, :]
    wide = tl.load((of_state + line)[None, :] + column[:, None] * d, mask=is_block, other=0.0)
    of_keys = tl.load(of_state + line + d * d, mask=is_column, other=0.0)
    of_values = tl.load(of_state + line + (d + 1) * d, mask=is_column, other=0.0)
    block = wide.to(key.dtype.element_ty)
    if WEIGH:
        anchor = _mean(
            anchors, image, anchor_splits, n, heads * d, head * d + column, is_column, S
        )
        anchor *= scale
        log = tl.load(logs + image * heads + head)
        # What a softmax's gradient subtracts: its sum over the keys is one over the state.
        before = tl.load((state + line)[None, :] + column[:, None] * d, mask=is_block, other=0.0)
        sums = tl.load(state + line + d * d, mask=is_column, other=0.0)
        common = (tl.sum(tl.sum(wide * before, 1), 0) + tl.sum(of_keys * sums, 0)) / n
        total = tl.zeros((R, W), tl.float32)
    for first in range(start, stop, R):
        row = first + tl.arange(0, R)
        is_row = row < stop
        mask = is_row[:, None] & is_column[None, :]
        x = _tile(key, row, k_row, column, mask)
        v = _tile(value, row, k_row, column, mask)
        if ADD:
            near = _tile(added, row, heads * d, column, mask)
        slope = _dot(v, tl.trans(block), P)
        x = _features(x, FAST)
        x = _laid_out(x, x, FAST)
        turned = x
        if TURN:
            cosine, sine = _angles(table, row, is_row, width, steps, d, W // 2)
            turned = _turned(x, cosine, sine, R, W)
            slope = _turned(slope, cosine, -sine, R, W)
        slope += of_keys[None, :]
        of_v = _dot(turned.to(block.dtype), block, P)
        if WEIGH:
            weight = tl.where(is_row, tl.exp(tl.sum(x * anchor[None, :], 1) - log), 0.0)
            of_v *= weight[:, None]
            of_score = weight * (tl.sum(slope * x, 1) - common)
            slope = slope * weight[:, None] + of_score[:, None] * anchor[None, :]
            total += x * (of_score * scale)[:, None]
        else:
            of_v += of_values[None, :]
        if ADD:
            of_v += near.to(tl.float32)
        place = row[:, None] * gk_row + column[None, :]
        tl.store(grad_v + place, of_v.to(grad_v.dtype.element_ty), mask=mask)
        tl.store(grad_k + place, _to_token(slope, x).to(grad_k.dtype.element_ty), mask=mask)
    if WEIGH:
        split = tl.program_id(0) % splits
        place = spread + (image * splits + split) * heads * d + head * d + column
        tl.store(place, tl.sum(total, 0), mask=is_column)


class Block(NamedTuple):
    """How a kernel is launched: tokens of a tile, programs at least, warps, stages; registers.

    Those are what a thread may take at most; 0 does not say.
    """

    rows: int
    programs: int
    warps: int
    stages: int
    registers: int = 0


# In half precision, of heads of 32 channels; four programs fit into an SM, and run at once.
# In float32 registers hold fewer tokens.
BLOCKS = {
    "sum": Block(32, 264, 8, 1), "fold": Block(64, 528, 4, 1, 128),
    "read": Block(64, 528, 4, 1, 128), "query_gradient": Block(64, 384, 4, 1, 168),
    "query_only": Block(64, 528, 4, 1, 128), "key_gradient": Block(64, 528, 4, 1, 128),
}  # fmt: skip
SUM_CHANNELS, JOINED, MOST_SPLITS = 128, 2048, 128


class _Launch(NamedTuple):
    """Parts of the tokens, tokens of a part; what the kernel is told; what Triton is told."""

    splits: int
    chunk: int
    constants: tuple[Any, ...]
    options: dict[str, int]


@functools.lru_cache(maxsize=1024)
def _launch(
    block: Block, dtype: torch.dtype, precision: str, n: int, there: int, d: int
) -> _Launch:
    rows, programs, warps, stages, registers = block
    width = max(32, _width(d))  # of which a product takes the half
    limit = {}
    if dtype == torch.float32:
        rows, warps, stages = (min(rows, 32), warps, 1) if width <= 32 else (16, 8, 1)
    elif width > 32:
        warps = 8
    elif registers and _is_fast():
        limit = {"maxnreg": registers}
    splits = max(1, min(_ceil(n, rows), _ceil(programs, max(1, there)), MOST_SPLITS))
    chunk = max(1, _ceil(_ceil(n, splits), rows)) * rows
    options = {"num_warps": warps, "num_stages": stages, **limit}
    return _Launch(max(1, _ceil(n, chunk)), chunk, (rows, width, precision, _is_fast()), options)


def _sizes(kernel: str, query: Tensor, heads: int) -> _Launch:
    b, n, c = query.shape
    precision = _precision(query.dtype)
    return _launch(BLOCKS[kernel], query.dtype, precision, n, b * heads, c // heads)


def _place(table: Tensor | None, width: int) -> tuple[int, int]:
    """What kernels are told of positions: width of the grid, steps of the table."""
    return width, 1 if table is None else table.shape[1]


def _new(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.float32, device=like.device)


def _anchors(query: Tensor, spacing: int) -> Tensor:
    """Sums of the queries' features in parts: (b, splits, c)."""
    b, n, c = query.shape
    columns = _ceil(c, SUM_CHANNELS)
    s = _launch(BLOCKS["sum"], query.dtype, "", n, b * columns, 16)
    parts = _new(query, b, s.splits, c)
    launch_kernel(_elu_sum_kernel, (b * s.splits, columns),
        query, parts, n, c, spacing, s.splits, s.chunk, s.constants[0], SUM_CHANNELS, _is_fast(),
        **s.options,
    )  # fmt: skip
    return parts


def _joined(partial: Tensor, peaks: Tensor | None, logs: Tensor, n: int) -> Tensor:
    """States of their parts: (b * h, splits, d + 2, d) -> (b * h, d + 2, d)."""
    heads, splits, rows, d = partial.shape
    state = _new(partial, heads, rows, d)
    lines = _power_of_2(splits)
    columns = max(16, JOINED // lines)
    launch_kernel(_elu_join_kernel, (heads, _ceil(rows * d, columns)),
        partial, partial if peaks is None else peaks, state, logs, n, rows * d, splits,
        peaks is not None, lines, columns, num_warps=4,
    )  # fmt: skip
    return state


SCHEMA = (
    "Tensor qkv, Tensor gate, Tensor? table, Tensor? weight, Tensor? bias, int heads, int height, "
    "int width, bool is_weighed, float eps"
)


def _run(
    is_kept: bool, qkv: Tensor, gate: Tensor, table: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, heads: int, height: int, width: int,
    is_weighed: bool, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The result; it before the gate; norms, (b * h, n); states, (b * h, d + 2, d); log-sums;
    queries' sums.
    """
    (qkv, spacing), (gate, gate_row) = _rows(qkv), _rows(gate)
    query, key, value = qkv.chunk(3, dim=-1)
    b, n, c = query.shape
    d = c // heads
    out = torch.empty(b, n, c, dtype=qkv.dtype, device=qkv.device)
    plain = torch.empty(out.shape, dtype=out.dtype, device=out.device) if is_kept else out
    norms = _new(qkv, b * heads, n if is_kept else 0)
    logs = _new(qkv, b * heads if is_weighed else 0)
    if not out.numel():
        return out, plain, norms, _new(qkv, b * heads, d + 2, d), logs, _new(qkv, 0)
    local = out if weight is None else stencil(value, weight, bias, (height, width))
    turn, place = qkv if table is None else table, _place(table, width)
    flags = table is not None, is_weighed
    anchors = _anchors(query, spacing) if is_weighed else _new(qkv, 0)
    s = _sizes("fold", query, heads)
    partial = _new(qkv, b * heads, s.splits, d + 2, d)
    peaks = _new(qkv, b * heads, s.splits, 2) if is_weighed else None
    parts = anchors.shape[1] if is_weighed else 1
    launch_kernel(_elu_fold_kernel, (b * heads * s.splits,),
        key, value, turn, anchors if is_weighed else partial, partial,
        partial if peaks is None else peaks, n, heads, d, spacing, s.splits, s.chunk, d**-0.5,
        *place, parts, *flags, _power_of_2(parts), *s.constants, **s.options,
    )  # fmt: skip
    state = _joined(partial, peaks, logs if is_weighed else partial, n)
    s = _sizes("read", query, heads)
    launch_kernel(_elu_read_kernel, (b * heads * s.splits,),
        query, gate, turn, state, local, plain, norms if is_kept else state, out, n, heads, d,
        spacing, gate_row, s.splits, s.chunk, *_scales(n, d, eps, is_weighed), *place, *flags,
        weight is not None, is_kept, *s.constants, **s.options,
    )  # fmt: skip
    return out, plain, norms, state, logs, anchors


def _scales(n: int, d: int, eps: float, is_weighed: bool) -> tuple[float, float]:
    """By what the normalizer is multiplied, and what is added to it."""
    return (1.0, n * eps) if is_weighed else (d**-0.5 / n, eps)


@launched("rotary_core", f"({SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
def _forward(qkv: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return _run(True, qkv, *others)


# Nothing but the backward reads the others.
_forward.register_inference(replayed(on_its_device(functools.partial(_run, False)), 1))


@launched(
    "rotary_core_backward",
    "(Tensor grad, Tensor plain, Tensor norms, Tensor state, Tensor logs, Tensor anchors, "
    f"{SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor, plain: Tensor, norms: Tensor, state: Tensor, logs: Tensor, anchors: Tensor,
    qkv: Tensor, gate: Tensor, table: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    heads: int, height: int, width: int, is_weighed: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Of tokens, of the gate, and of the convolution's kernels and biases."""
    (qkv, spacing), (gate, gate_row), (grad, g_row) = map(_rows, (qkv, gate, grad))
    query, key, value = qkv.chunk(3, dim=-1)
    b, n, c = query.shape
    d, grid = c // heads, (height, width)
    grads = torch.empty(b, n, 3 * c, dtype=qkv.dtype, device=qkv.device)
    of_plain, of_gate = (torch.empty_like(plain) for _ in range(2))
    turn, place = qkv if table is None else table, _place(table, width)
    flags, scales = (table is not None, is_weighed), _scales(n, d, eps, is_weighed)
    grad_q, grad_k, grad_v = grads.chunk(3, dim=-1)
    partial = _new(qkv, b * heads, _sizes("query_gradient", query, heads).splits, d + 2, d)

    def of_queries(
        kernel: str, of: Tensor, row: int, spread: Tensor, parts: int, *which: bool
    ) -> None:
        s = _sizes(kernel, query, heads)
        launch_kernel(_elu_query_gradient_kernel, (b * heads * s.splits,),
            of, query, gate, plain, norms, turn, state, spread, grad_q, of_plain, of_gate, partial,
            n, heads, d, row, spacing, gate_row, 3 * c, s.splits, s.chunk, *scales, *place, parts,
            *flags, *which, _power_of_2(parts), *s.constants, **s.options,
        )  # fmt: skip

    if grads.numel():
        of_queries("query_gradient", grad, g_row, state, 1, True, not is_weighed)
    local, of_weight, of_bias = of_plain, _new(qkv, 0), _new(qkv, 0)
    if weight is not None:
        local = stencil(of_plain, weight, None, grid, is_transposed=True)
        of_weight, of_bias = stencil_weight_gradient(value, of_plain, grid, weight)
    if not grads.numel():
        return grads, of_gate, of_weight, of_bias
    of_state = _joined(partial, None, partial, n)
    k = _sizes("key_gradient", query, heads)
    spread, parts = (_new(qkv, b, k.splits, c), anchors.shape[1]) if is_weighed else (state, 1)
    launch_kernel(_elu_key_gradient_kernel, (b * heads * k.splits,),
        key, value, turn, anchors if is_weighed else state, state, logs if is_weighed else state,
        of_state, local, grad_k, grad_v, spread, n, heads, d, spacing, 3 * c, k.splits, k.chunk,
        d**-0.5, *place, parts, *flags, weight is not None, _power_of_2(parts), *k.constants,
        **k.options,
    )  # fmt: skip
    if is_weighed:
        of_queries("query_only", of_plain, c, spread, k.splits, False, True)
    return grads, of_gate, of_weight, of_bias


@_forward.register_fake
def _(
    qkv: Tensor, gate: Tensor, table: Any, weight: Any, bias: Any, heads: int, height: int,
    width: int, is_weighed: bool, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    b, n, c = qkv.shape
    c //= 3
    wide = {"dtype": torch.float32}
    parts = 0
    if is_weighed and b * n * c:
        columns = _ceil(c, SUM_CHANNELS)
        parts = _launch(BLOCKS["sum"], qkv.dtype, "", n, b * columns, 16).splits
    return (
        qkv.new_empty(b, n, c),
        qkv.new_empty(b, n, c),
        qkv.new_empty(b * heads, n, **wide),
        qkv.new_empty(b * heads, c // heads + 2, c // heads, **wide),
        qkv.new_empty(b * heads if is_weighed else 0, **wide),
        qkv.new_empty(b, parts, c, **wide) if parts else qkv.new_empty(0, **wide),
    )


@_backward.register_fake
def _(
    grad: Tensor, plain: Tensor, norms: Tensor, state: Tensor, logs: Tensor, anchors: Tensor,
    qkv: Tensor, gate: Tensor, table: Any, weight: Tensor | None, *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    of_tokens = qkv.new_empty(qkv.shape), plain.new_empty(plain.shape)
    if weight is None:
        return *of_tokens, state.new_empty(0), state.new_empty(0)
    return *of_tokens, weight.new_empty(weight.shape), weight.new_empty(len(weight))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    *operands, ctx.heads, ctx.height, ctx.width, ctx.is_weighed, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], *operands)


def _gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    *_, weight, bias = saved = ctx.saved_tensors
    sizes = ctx.heads, ctx.height, ctx.width, ctx.is_weighed, ctx.eps
    of_qkv, of_gate, *of_conv = _backward(grad, *saved, *sizes)
    of_conv = [
        None if z is None else g.to(z.dtype) for g, z in zip(of_conv, (weight, bias), strict=True)
    ]
    return of_qkv, of_gate, None, *of_conv, *(None,) * 5


_forward.register_autograd(_gradients, setup_context=_setup)


def rotary_core(
    qkv: Tensor, gate: Tensor, weight: Tensor | None, bias: Tensor | None, heads: int,
    grid: tuple[int, int], is_rotated: bool, is_weighed: bool, eps: float,
) -> Tensor:  # fmt: skip
    """See ``attnzoo.ops.rotary_core``; features, angles and sums in float32."""
    qkv = qkv.to(operand_dtype(qkv))
    pairs = qkv.shape[-1] // (12 * heads)
    table = turns(max(grid), pairs, qkv.device, torch.float32) if is_rotated and pairs else None
    sizes = heads, *grid, is_weighed, eps
    return _forward(qkv, gate.to(qkv.dtype), table, weight, bias, *sizes)[0]
