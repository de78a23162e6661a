"""The mean of scans by kernels: both directions of an order of the tokens from one read.

Four kernels: what each chunk adds to the states of both directions; the states that enter each
chunk, by a recurrence over chunks; the outputs; and, in ``triton_backward.py``, the gradients. The
gradients of the states are states of scans the other way round, with queries for keys and the
gradient of the output for values, so that the first two kernels serve the backward as well.

Inside a chunk the weights of both directions make one full matrix. Blocks of 1, 2, 4, ... tokens
are joined pairwise: between two halves of a pair all decays lead to the border between them, so
that one product gives the weights of both directions and no exponent is positive.
"""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAssignmentType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.ops.gated_scan.triton_backward import (
    _gated_gradient_kernel,
    _mild_gradient_kernel,
    _put,
    _rows_of,
)
from attnzoo.ops.gated_scan.triton_common import (
    _LEAST,
    _LOG2E,
    _MILD,
    _are_mild,
    _are_pairs,
    _exp2,
    _half,
    _is_mild,
    _join,
    _leads,
    _level_factor,
    _log2_gate,
    _places,
    _sums_between,
    _tile,
)
from attnzoo.ops.triton_common import (
    _add_dot,
    _ceil,
    _dot,
    _precision,
    _shared_memory,
    _width,
    column_sum,
    launch_kernel,
    launched,
)


@triton.jit
def _gated_update_kernel(
    x, y, gate, reduced, weight, bias, left, right, totals,
    n, heads, dk, dv, chunks, height, width, rank,
    x_image, x_token, x_head, y_image, y_token, y_head, g_image, g_token, g_head,
    r_image, r_token, per_gate, levels,
    QUERY: tl.constexpr, MAPPED: tl.constexpr, COLUMNS: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, R: tl.constexpr,
    FAST: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    # left: x^T y with x decayed until the end of the chunk, for what comes from the left of the
    # next; right: until its start. QUERY: x decays by its own gate as well. With R, a tile of
    # ``rank``, the gates are computed here, and kept for the launches that follow.
    chunk = tl.program_id(0) % chunks
    image_head = tl.program_id(0) // chunks
    image, head = (image_head // heads).to(tl.int64), image_head % heads
    token, is_token = _places(chunk, n, height, width, C, COLUMNS)
    row, wide = tl.arange(0, C), tl.program_id(2) * V + tl.arange(0, V)
    column = tl.program_id(1) * K + tl.arange(0, K)
    mask = is_token[:, None] & (column < dk)[None, :]
    a = _tile(x, image, head, token, column, mask, x_image, x_token, x_head).to(tl.float32)
    if R:
        part, line = tl.arange(0, R), head * dk + column
        mask_r = is_token[:, None] & (part < rank)[None, :]
        low = _tile(reduced, image, head, token, part, mask_r, r_image, r_token, 0)
        mask_r = (column < dk)[:, None] & (part < rank)[None, :]
        w = tl.load(weight + line[:, None] * rank + part[None, :], mask=mask_r, other=0.0)
        g = tl.load(bias + line, mask=column < dk, other=0.0).to(tl.float32)[None, :]
        g = (_dot(low, tl.trans(w), P) + g).to(gate.dtype.element_ty)
        if tl.program_id(2) == 0:
            place = gate + image * g_image + head.to(tl.int64) * g_head
            tl.store(place + token[:, None] * g_token + column[None, :], g, mask=mask)
    else:
        g = _tile(gate, image, head, token, column, mask, g_image, g_token, g_head)
    mask_v = is_token[:, None] & (wide < dv)[None, :]
    b = _tile(y, image, head, token, wide, mask_v, y_image, y_token, y_head)
    b = b.to(x.dtype.element_ty)
    g = _log2_gate(g, mask, per_gate, MAPPED)
    total = tl.sum(g, 0)
    if tl.min(total, 0) > _MILD if FAST else False:
        lead, until = _leads(g, C, P)
        half = 0.5 * total[None, :]
        before, after = half + (until if QUERY else lead), half - (lead if QUERY else until)
    else:
        before, after = tl.zeros_like(g), tl.zeros_like(g)
        for level in range(0, levels):
            before, after = _join(before, after, g, row, level)
        if QUERY:
            before += g
            after += g
    at = image_head.to(tl.int64) * chunks + chunk
    spot = at * dk * dv + column[:, None] * dv + wide[None, :]
    mask_s = (column < dk)[:, None] & (wide < dv)[None, :]
    if LEFT:
        update = _dot(tl.trans((a * _exp2(after)).to(b.dtype)), b, P)
        tl.store(left + spot, update.to(left.dtype.element_ty), mask=mask_s)
    if RIGHT:
        update = _dot(tl.trans((a * _exp2(before)).to(b.dtype)), b, P)
        tl.store(right + spot, update.to(right.dtype.element_ty), mask=mask_s)
    if tl.program_id(2) == 0:
        tl.store(totals + at * dk + column, total, mask=column < dk)


@triton.jit
def _gated_carry_kernel(
    updates, totals, states, rows, chunks, dk, dv, LEFT: tl.constexpr, B: tl.constexpr,
    MANY: tl.constexpr, V: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    # What one channel of keys has from all chunks, by products with their decays, B at a time:
    # a chain of chunks would wait for memory at each. Slot 0 is carried from the left if there is
    # a LEFT, every other from the right. States are multiplied as ``_half`` says.
    slot, image_head = tl.program_id(0) // rows, (tl.program_id(0) % rows).to(tl.int64)
    channel = tl.program_id(1)
    place, wide = tl.arange(0, B), tl.arange(0, V)
    from_left = (slot == 0) & LEFT
    totals += image_head * chunks * dk + channel
    first_entry = ((slot * rows + image_head) * chunks * dk + channel) * dv
    is_later = place[:, None] > place[None, :]
    state = tl.zeros((V,), tl.float32)
    for first in range(0, chunks, B):
        turn = first + place
        chunk = tl.where(from_left, turn, chunks - 1 - turn)
        mask = (turn < chunks)[:, None] & (wide < dv)[None, :]
        spot = first_entry + chunk.to(tl.int64)[:, None] * (dk * dv) + wide[None, :]
        update = tl.load(updates + spot, mask=mask, other=0.0)
        total = tl.load(totals + chunk * dk, mask=turn < chunks, other=0.0)
        total = tl.maximum(total, _LEAST)
        decay = _sums_between(total, is_later, update.dtype, P)
        decay = _exp2(tl.where(is_later, decay, float("-inf"))).to(update.dtype)
        found = _dot(decay, update, P)
        if MANY:
            since = tl.sum(tl.where(is_later, total[None, :], 0.0), 1)[:, None]
            found += _exp2(since) * state[None, :]
            last = tl.where(from_left, first + B - 1, chunks - first - B)
            mask_v = (wide < dv) & (first + B <= chunks)
            total_there = tl.load(totals + last * dk, mask=first + B <= chunks, other=0.0)
            state = tl.sum(tl.where((place == B - 1)[:, None], found, 0.0), 0)
            state *= _exp2(total_there)
            there = updates + first_entry + last.to(tl.int64) * (dk * dv) + wide
            state += tl.load(there, mask=mask_v, other=0.0).to(tl.float32)
        # Outside the product, in which the chunk before counts exactly as it is.
        found *= _exp2(_half(total))[:, None]
        tl.store(states + spot, found.to(states.dtype.element_ty), mask=mask)


@triton.jit
def _mild_pairs(
    weights, q, k, g, row, FORWARD: tl.constexpr, BACKWARD: tl.constexpr, TURNED: tl.constexpr,
    C: tl.constexpr, dtype: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    # Both products have those of a token with itself.
    lead, until = _leads(g, C, P)
    a, b = (lead, until) if TURNED else (until, lead)
    for_left, for_right = q.to(dtype), q.to(dtype)
    if FORWARD:
        for_left = (q * _exp2(a)).to(dtype)
        product = _dot(for_left, tl.trans((k * _exp2(-a)).to(dtype)), P)
        weights += tl.where(row[:, None] >= row[None, :], product, 0.0)
    if BACKWARD:
        for_right = (q * _exp2(-b)).to(dtype)
        product = _dot(for_right, tl.trans((k * _exp2(b)).to(dtype)), P)
        weights += tl.where(row[:, None] <= row[None, :], product, 0.0)
    return weights, for_left, for_right


@triton.jit
def _any_pairs(
    weights, q, k, g, half, row, levels, FORWARD: tl.constexpr, BACKWARD: tl.constexpr,
    TURNED: tl.constexpr, dtype: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    both: tl.constexpr = 2.0 if FORWARD and BACKWARD else 1.0
    own = both * tl.sum(q * k, 1)[:, None]
    weights += tl.where(row[:, None] == row[None, :], own, 0.0)
    if TURNED:
        k *= _exp2(g)
    else:
        q *= _exp2(g)
    before, after = tl.zeros_like(g), tl.zeros_like(g)
    for level in range(0, levels):
        factor, _ = _level_factor(before, after, row, level)
        product = _dot((q * factor).to(dtype), tl.trans((k * factor).to(dtype)), P)
        are_pairs = _are_pairs(row, level, FORWARD, BACKWARD)
        weights += tl.where(are_pairs, product, 0.0)
        before, after = _join(before, after, g, row, level)
    for_left = (q * _exp2(before - half[None, :])).to(dtype)
    return weights, for_left, (q * _exp2(after - half[None, :])).to(dtype)


@triton.jit
def _gated_output_kernel(
    query, key, value, gate, left, right, totals, out, added, out_gate, norm, normed,
    n, heads, dk, dv, chunks, height, width,
    q_image, q_token, q_head, k_image, k_token, k_head, v_image, v_token, v_head,
    g_image, g_token, g_head, o_token, z_image, z_token, z_head, per_gate, scale, eps, count,
    levels, MAPPED: tl.constexpr, COLUMNS: tl.constexpr, FORWARD: tl.constexpr,
    BACKWARD: tl.constexpr, CARRIED: tl.constexpr, ADD: tl.constexpr, TURNED: tl.constexpr,
    NORM: tl.constexpr, KEEP: tl.constexpr, C: tl.constexpr, K: tl.constexpr, TILES: tl.constexpr,
    V: tl.constexpr, WIDE: tl.constexpr, MILD: tl.constexpr, REST: tl.constexpr,
    TURNS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    # TURNED: queries are keys and keys queries, so that the transposed weights are taken. NORM:
    # the output is normed and gated as well, into ``normed``; KEEP: it is stored itself. MILD and
    # REST: chunks that are mild, and those that are not, which are looked for TURNS at a time.
    dtype: tl.constexpr = query.dtype.element_ty
    is_split: tl.constexpr = WIDE > 0 and not (MILD and REST)
    first = tl.program_id(0) * TURNS
    if TURNS > 1:
        if _are_mild(totals, first, count, dk, WIDE, TURNS):
            return
    elif _is_mild(totals, first.to(tl.int64), dk, WIDE) == REST if is_split else False:
        return
    for turn in range(0, 1 if TURNS == 1 else tl.minimum(TURNS, count - first)):
        chunk, image_head = (first + turn) % chunks, (first + turn) // chunks
        at = image_head.to(tl.int64) * chunks + chunk
        if _is_mild(totals, at, dk, WIDE) == 0 if TURNS > 1 else True:
            image, head = (image_head // heads).to(tl.int64), image_head % heads
            token, is_token = _places(chunk, n, height, width, C, COLUMNS)
            row, wide = tl.arange(0, C), tl.arange(0, V)
            mask_v = is_token[:, None] & (wide < dv)[None, :]
            weights = tl.zeros((C, C), tl.float32)
            result = tl.zeros((C, V), tl.float32)
            for tile in range(TILES):
                column = tile * K + tl.arange(0, K)
                mask = is_token[:, None] & (column < dk)[None, :]
                q = _tile(query, image, head, token, column, mask, q_image, q_token, q_head)
                k = _tile(key, image, head, token, column, mask, k_image, k_token, k_head)
                g = _tile(gate, image, head, token, column, mask, g_image, g_token, g_head)
                mask_s = (column < dk)[:, None] & (wide < dv)[None, :]
                spot = at * dk * dv + column[:, None] * dv + wide[None, :]
                from_left, from_right = result, result
                if CARRIED and FORWARD:
                    from_left = tl.load(left + spot, mask=mask_s, other=0.0)
                if CARRIED and BACKWARD:
                    from_right = tl.load(right + spot, mask=mask_s, other=0.0)
                q, k = q.to(tl.float32), k.to(tl.float32)
                g = _log2_gate(g, mask, per_gate, MAPPED)
                half = tl.zeros((K,), tl.float32)
                if CARRIED:
                    half = _half(tl.load(totals + at * dk + column, mask=column < dk, other=0.0))
                if _is_mild(totals, at, dk, WIDE) if MILD and REST else MILD:
                    weights, for_left, for_right = _mild_pairs(
                        weights, q, k, g, row, FORWARD, BACKWARD, TURNED, C, dtype, P
                    )
                else:
                    weights, for_left, for_right = _any_pairs(
                        weights, q, k, g, half, row, levels, FORWARD, BACKWARD, TURNED, dtype, P
                    )
                if CARRIED and FORWARD:
                    result = _add_dot(result, for_left, from_left, P)
                if CARRIED and BACKWARD:
                    result = _add_dot(result, for_right, from_right, P)
            v = _tile(value, image, head, token, wide, mask_v, v_image, v_token, v_head)
            result = _add_dot(result, weights.to(dtype), v.to(dtype), P)
            result *= scale
            if KEEP:
                result = _put(
                    out,
                    added,
                    image,
                    head,
                    token,
                    wide,
                    mask_v,
                    result,
                    n,
                    heads,
                    dv,
                    o_token,
                    ADD,
                )
            elif ADD:
                result += _rows_of(added, image, head, token, wide, mask_v, n, heads, dv)
            if NORM:
                z = _tile(out_gate, image, head, token, wide, mask_v, z_image, z_token, z_head)
                z = z.to(tl.float32)
                result *= tl.rsqrt(tl.sum(result * result, 1) / dv + eps)[:, None]
                w = tl.load(norm + wide, mask=wide < dv, other=0.0).to(tl.float32)[None, :]
                result *= w * z / (1.0 + _exp2(z * -_LOG2E))
                place = (
                    image * n * heads * dv
                    + head * dv
                    + token[:, None] * (heads * dv)
                    + wide[None, :]
                )
                tl.store(normed + place, result.to(normed.dtype.element_ty), mask=mask_v)


_TURNS = 4  # of chunks of which few are not mild, so that few programs start


class _Launch(NamedTuple):
    num_warps: int
    num_stages: int = 1
    maxnreg: int | None = None  # registers of a thread


class Blocks(NamedTuple):
    """Sizes of the kernels for one type of operands."""

    chunk: int  # tokens, at most
    # Channels of a tile of keys (and of values), at most.
    update: tuple[int, int, _Launch]
    # Of mild gates, if they have a launch of their own, and of the rest.
    output: tuple[int, _Launch | None, _Launch]
    # Of gates that are not mild, in tiles of keys and values, and launches with one tile of values
    # and with several; and of mild gates.
    gradient: tuple[int, int, _Launch, _Launch]
    mild: tuple[int, _Launch]
    carry: tuple[int, _Launch]  # chunks of a product


BLOCKS = {
    torch.bfloat16: Blocks(
        64,
        (32, 64, _Launch(4)),
        (32, _Launch(4, 1, 128), _Launch(8, 1, 128)),
        (16, 64, _Launch(8, 1, 128), _Launch(8)),
        (32, _Launch(4)),
        (64, _Launch(4)),
    ),
    torch.float32: Blocks(
        32,
        (32, 64, _Launch(4)),
        (32, None, _Launch(4)),
        (16, 32, _Launch(4), _Launch(4)),
        (32, _Launch(4)),
        (32, _Launch(4)),
    ),
}


class _Order(NamedTuple):
    """The rows' or the columns' order, and which of its two directions are scanned."""

    is_columns: bool
    is_forward: bool
    is_backward: bool

    @property
    def count(self) -> int:
        return self.is_forward + self.is_backward


def _orders(directions: int) -> list[_Order]:
    """From a bit for each of rows forward and backward, columns forward and backward."""
    return [
        _Order(shift > 0, bool(bits & 1), bool(bits & 2))
        for shift in (0, 2)
        if (bits := directions >> shift & 3)
    ]


class _Sizes(NamedTuple):
    images: int
    n: int
    heads: int
    dk: int
    dv: int
    levels: int
    chunks: int

    @property
    def rows(self) -> int:
        return self.images * self.heads

    @property
    def tail(self) -> tuple[int, ...]:
        """Of the states of one direction."""
        return (self.rows, self.chunks, self.dk, self.dv)


def _sizes(query: Tensor, value: Tensor) -> _Sizes:
    images, n, heads, dk = query.shape
    chunk = min(BLOCKS[query.dtype].chunk, _width(n))
    sizes = images, n, heads, dk, value.shape[-1]
    return _Sizes(*sizes, chunk.bit_length() - 1, _ceil(n, chunk))


def _strided(z: Tensor) -> Tensor:
    return z if z.stride(-1) == 1 or z.shape[-1] == 1 else z.contiguous()


def _strides(*operands: Tensor) -> tuple[int, ...]:
    return tuple(stride for z in operands for stride in z.stride()[:3])


class _Call(NamedTuple):
    """What the launches of one call share."""

    sizes: _Sizes
    grid: tuple[int, int]
    normalizer: float
    scale: float
    dtype: torch.dtype

    @property
    def per_gate(self) -> float:
        return 1.0 / self.normalizer if self.normalizer else 1.0

    @property
    def wide(self) -> int:
        """A tile of all channels of keys, if chunks are looked at for how much they forget."""
        # What two factors of both signs lose is more than float32 may.
        return 0 if self.dtype == torch.float32 else _width(self.sizes.dk)

    def new(self, like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=like.device)


class _Carried(NamedTuple):
    """What chunks have from others: states, (directions, rows, chunks, dk, dv); and their gates.

    States are there if there are several chunks, first those that enter a chunk from the left,
    then those from the right. Gates are sums over each chunk, (rows, chunks, dk).
    """

    states: Tensor | None
    totals: Tensor | None

    def or_else(self, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """States from the left and from the right and totals, for a launch."""
        states = (other, other) if self.states is None else (self.states[0], self.states[-1])
        return *states, other if self.totals is None else self.totals


class Low(NamedTuple):
    """What gates are computed of: (b, n, rank), (h * dk, rank) and (h * dk,)."""

    reduced: Tensor
    weight: Tensor
    bias: Tensor


class Norm(NamedTuple):
    """What follows the scans: output gates (b, n, h, dv), weight (dv,) and eps of the norm."""

    gate: Tensor
    weight: Tensor
    eps: float
    out: Tensor  # (b, n, h * dv)


def _carry(
    call: _Call, order: _Order, is_query: bool, x: Tensor, y: Tensor, gate: Tensor,
    low: Low | None = None,
) -> _Carried:  # fmt: skip
    """Of the forward scan from the left, and of the backward scan from the right.

    With queries and the gradient of the output, the gradients of the states that leave a chunk:
    those of the backward scan from the left, and those of the forward scan from the right. With
    ``low``, the gates are written first.
    """
    sizes, blocks = call.sizes, BLOCKS[call.dtype]
    _, n, heads, dk, dv, levels, chunks = sizes
    is_alone, is_checked = chunks == 1, call.wide > 0
    if is_alone and not is_checked and low is None:
        return _Carried(None, None)
    is_left, is_right = order.is_forward, order.is_backward
    if is_query:
        is_left, is_right = is_right, is_left
    totals = call.new(x, *sizes.tail[:3])
    updates = totals if is_alone else call.new(x, order.count, *sizes.tail, dtype=call.dtype)
    keys, values, launch = blocks.update
    keys, values = min(keys, _width(dk)), min(values, _width(dv))
    rank = 0 if low is None else low.weight.shape[1]
    reduced, weight, bias = (gate,) * 3 if low is None else low
    launch_kernel(_gated_update_kernel, (sizes.rows * chunks, _ceil(dk, keys), _ceil(dv, values)),
        x, y, gate, reduced, weight, bias, updates[0], updates[-1], totals,
        n, heads, dk, dv, chunks, *call.grid, rank, *_strides(x, y, gate), *reduced.stride()[:2],
        call.per_gate, levels, is_query, call.normalizer != 0, order.is_columns,
        is_left and not is_alone, is_right and not is_alone, 1 << levels, keys, values,
        rank and _width(rank), is_checked, _precision(call.dtype), **launch._asdict(),
    )  # fmt: skip
    if is_alone:
        return _Carried(None, totals)
    states = call.new(x, order.count, *sizes.tail, dtype=call.dtype)
    block, launch = blocks.carry
    block = min(block, _width(chunks))
    launch_kernel(_gated_carry_kernel, (order.count * sizes.rows, dk),
        updates, totals, states, sizes.rows, chunks, dk, dv, is_left, block, chunks > block,
        _width(dv), _precision(call.dtype), **launch._asdict(),
    )  # fmt: skip
    return _Carried(states, totals)


def _for_width(launch: _Launch, dv: int) -> _Launch:
    """With 8 warps for wide heads, of which 4 would spill kilobytes a thread."""
    return launch if _width(dv) <= 64 else _Launch(8)


def _output(
    call: _Call, order: _Order, is_turned: bool, operands: Sequence[Tensor], carried: _Carried,
    out: Tensor | None, added: Tensor | None, is_rest: bool = False, norm: Norm | None = None,
) -> None:  # fmt: skip
    """Outputs of queries, keys, values and gates; turned, gradients of values.

    Those are outputs of keys, queries and the gradient of the output, with the scans turned.
    """
    is_kept, value = out is not None, operands[2]
    gate, weight, eps, normed = (value, value, 0.0, value) if norm is None else norm
    out = normed.view(value.shape) if out is None else out
    if is_turned:
        order = order._replace(is_forward=order.is_backward, is_backward=order.is_forward)
    _, n, heads, dk, dv, levels, chunks = call.sizes
    keys, mild, rest = BLOCKS[call.dtype].output
    keys = min(keys, _width(dk))
    forms = [(True, True, rest)] if mild is None else [(True, False, mild), (False, True, rest)]
    if is_rest or not call.wide:
        forms = [(False, True, rest)]
    count = call.sizes.rows * chunks
    for *form, launch in forms:
        launch, turns = _for_width(launch, dv), _TURNS if call.wide and not form[0] else 1
        launch_kernel(_gated_output_kernel, (_ceil(count, turns),),
            *operands, *carried.or_else(out), out, out if added is None else added,
            gate, weight, normed, n, heads, dk, dv, chunks, *call.grid, *_strides(*operands),
            out.stride(1), *_strides(gate), call.per_gate, call.scale, eps, count, levels,
            call.normalizer != 0, *order, carried.states is not None, added is not None,
            is_turned, norm is not None, is_kept, 1 << levels, keys, _ceil(dk, keys), _width(dv),
            call.wide, *form, turns, _precision(call.dtype), **launch._asdict(),
        )  # fmt: skip


def _gradient(
    call: _Call, order: _Order, operands: Sequence[Tensor], entering: _Carried, leaving: _Carried,
    outs: Sequence[Tensor], added: Sequence[Tensor] | None, parts: Tensor | None,
) -> None:  # fmt: skip
    """Gradients of queries, keys, gates and values; the operands end with that of the output.

    ``parts`` takes the sums of those of the gates, of each chunk.
    """
    query, key, _, gate, grad = operands
    _, n, heads, dk, dv, levels, chunks = call.sizes
    blocks, added = BLOCKS[call.dtype], outs if added is None else added
    is_added, precision = added is not outs, _precision(call.dtype)
    states = *entering.or_else(outs[0])[:2], *leaving.or_else(outs[0])
    spacings = [z.stride(1) for z in outs]
    sizes = n, heads, dk, dv, chunks, *call.grid, *_strides(*operands), *spacings
    sizes = *sizes, call.per_gate, call.scale
    has_parts = parts is not None
    parts = outs[0] if parts is None else parts
    options = call.normalizer != 0, *order, leaving.states is not None, is_added, has_parts
    has_values, wide, room = False, call.wide, _shared_memory(query.device)
    is_small = room is not None and room < 200 * 2**10
    if is_small and dv > 64:
        wide = 0  # before Hopper the kernel of mild gates spills kilobytes a thread
    if wide:
        keys, launch = blocks.mild[0], _for_width(blocks.mild[1], dv)
        keys = min(16 if is_small else keys, _width(dk))
        has_values = keys >= dk
        launch_kernel(_mild_gradient_kernel, (call.sizes.rows * chunks, _ceil(dk, keys)),
            *operands, *states, *outs, *added, parts, *sizes, *options, has_values, 1 << levels,
            keys, _width(dv), wide, precision, **launch._asdict(),
        )  # fmt: skip
    keys, values, single, several = blocks.gradient
    keys, values = min(keys, _width(dk)), min(values, _width(dv))
    tiles = _ceil(dv, values)
    launch = single if tiles == 1 else several
    count, turns = call.sizes.rows * chunks, _TURNS if wide else 1
    launch_kernel(_gated_gradient_kernel, (_ceil(count, turns), _ceil(dk, keys)),
        *operands, *states, *outs[:3], *added[:3], parts, *sizes, count, levels, *options,
        1 << levels, keys, values, tiles, wide, turns, precision, **launch._asdict(),
    )  # fmt: skip
    turned, to = (key, query, grad, gate), added[3] if is_added else None
    _output(call, order, True, turned, leaving, outs[3], to, has_values)


@launched(
    "gated_scans",
    "(Tensor query, Tensor key, Tensor value, Tensor gate, float normalizer, float scale, "
    "int height, int width, int directions, bool save) -> (Tensor, Tensor)",
)
def gated_scans_forward(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor, normalizer: float, scale: float,
    height: int, width: int, directions: int, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``scale`` times the mean of scans.

    Args:
        query: (b, n, h, dk), float32 or bfloat16.
        key: (b, n, h, dk); like ``value`` in the dtype of ``query``.
        value: (b, n, h, dv).
        gate: (b, n, h, dk), float32 or bfloat16: x of log_gate = logsigmoid(x) / normalizer.
        normalizer: See ``gate``; 0 if ``gate`` is log_gate itself.
        scale: Multiplies the result.
        height: Of the grid of tokens.
        width: Of the grid of tokens.
        directions: Bits 1, 2, 4, 8: rows forward, backward, columns forward, backward.
        save: Whether the states are needed for a backward.

    Returns:
        (b, n, h, dv) in the dtype of ``query``, and what the backward needs of the states.
    """
    operands = [_strided(z) for z in (query, key, value, gate)]
    out = torch.empty(value.shape, dtype=query.dtype, device=query.device)
    return out, put_outputs(operands, (normalizer, scale, height, width, directions), out, save)


def put_outputs(
    operands: Sequence[Tensor], options: tuple[Any, ...], out: Tensor | None, save: bool,
    low: Low | None = None, norm: Norm | None = None,
) -> Tensor:  # fmt: skip
    """The mean of scans into ``out``, if it is wanted.

    Args:
        operands: Queries, keys, values and gates, channels beside each other.
        options: Normalizer, scale, height, width and directions; see ``gated_scans_forward``.
        out: (b, n, h, dv); may be None with ``norm``.
        save: See ``gated_scans_forward``.
        low: What the gates are computed of, which are written then.
        norm: What takes the result normed and gated.

    Returns:
        What the backward needs of the states.
    """
    query, key, value, gate = operands
    normalizer, scale, height, width, directions = options
    orders, sizes = _orders(directions), _sizes(query, value)
    scale /= sum(order.count for order in orders)
    call = _Call(sizes, (height, width), normalizer, scale, query.dtype)
    kept, partial = [], None
    for order in orders if value.numel() else ():
        carried = _carry(call, order, False, key, value, gate, low)
        if carried.states is not None and save:
            kept.append(carried.states)
        if order is orders[-1]:
            _output(call, order, False, operands, carried, out, partial, norm=norm)
        else:
            to = torch.empty(value.shape, dtype=torch.float32, device=value.device)
            _output(call, order, False, operands, carried, to, partial)
            partial, low = to, None
    if not kept:
        return query.new_empty(0, *sizes.tail)
    return kept[0] if len(kept) == 1 else torch.cat(kept)


def kept(query: Tensor, value: Tensor, directions: int, save: bool) -> Tensor:
    """What a forward keeps of its states, without their numbers."""
    sizes = _sizes(query, value)
    count = bin(directions).count("1") if save and sizes.chunks > 1 and value.numel() else 0
    return query.new_empty(count, *sizes.tail)


@gated_scans_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, gate: Tensor, *options: Any) -> Any:
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    return out, kept(query, value, *options[-2:])


@launched(
    "gated_scans_backward",
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor gate, Tensor states, "
    "float normalizer, float scale, int height, int width, int directions) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def gated_scans_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, gate: Tensor, states: Tensor,
    normalizer: float, scale: float, height: int, width: int, directions: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of queries, keys, values and gates, in their dtypes."""
    outs = [
        torch.empty(z.shape, dtype=z.dtype, device=z.device) for z in (query, key, gate, value)
    ]
    operands, options = (query, key, value, gate), (normalizer, scale, height, width, directions)
    put_gradients(grad, operands, states, options, outs)
    grad_query, grad_key, grad_gate, grad_value = outs
    return grad_query, grad_key, grad_value, grad_gate


def put_gradients(
    grad: Tensor, operands: Sequence[Tensor], states: Tensor, options: tuple[Any, ...],
    outs: Sequence[Tensor], has_sum: bool = False,
) -> Tensor | None:  # fmt: skip
    """Gradients into ``outs``, of queries, keys, gates and values.

    Args:
        grad: (b, n, h, dv), of the output.
        operands: Queries, keys, values and gates.
        states: What the forward kept.
        options: Normalizer, scale, height, width and directions; see ``gated_scans_forward``.
        outs: (b, n, h, d), whose tokens lie equally far apart over the batch.
        has_sum: Whether the sum of the gates' gradients over all tokens is wanted.

    Returns:
        It, (h, dk) in float32.
    """
    normalizer, scale, height, width, directions = options
    query, key, value, gate, grad = map(_strided, (*operands, grad))
    orders, sizes = _orders(directions), _sizes(query, value)
    scale /= sum(order.count for order in orders)
    call = _Call(sizes, (height, width), normalizer, scale, query.dtype)
    parts = None
    if has_sum:
        parts = call.new(grad, sizes.images * sizes.chunks, sizes.heads, sizes.dk)
    partial, done = None, 0
    for order in orders if value.numel() else ():
        part = states[done : done + order.count]
        entering = _Carried(part if sizes.chunks > 1 else None, None)
        leaving = _carry(call, order, True, query, grad, gate)
        done += order.count
        to, is_last = outs, order is orders[-1]
        if not is_last:
            to = [torch.empty(z.shape, dtype=torch.float32, device=z.device) for z in outs]
        operands = query, key, value, gate, grad
        _gradient(
            call, order, operands, entering, leaving, to, partial, parts if is_last else None
        )
        partial = to
    return None if parts is None else column_sum(parts)


@gated_scans_backward.register_fake
def _(grad: Tensor, *operands: Any) -> Any:
    return tuple(z.new_empty(z.shape) for z in operands[:4])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    *operands, normalizer, scale, height, width, directions, _ = inputs
    ctx.options = normalizer, scale, height, width, directions
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*operands, output[1])


def _gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    return *gated_scans_backward(grad, *ctx.saved_tensors, *ctx.options), *[None] * 6


gated_scans_forward.register_autograd(_gradients, setup_context=_setup)

_BITS = {"forward": 1, "backward": 2, "columns-forward": 4, "columns-backward": 8}


def bits_of(directions: Any) -> int:
    """As ``gated_scans_forward`` takes them."""
    return sum(_BITS[direction] for direction in directions)


def gated_scans(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor, grid: tuple[int, int],
    directions: Any, scale: float = 1.0, normalizer: float = 0.0,
) -> Tensor:  # fmt: skip
    """See ``gated_scans_forward``; operands of any of the types that the layers have."""
    operands = (query, key, value, gate)
    save = torch.is_grad_enabled() and any(z.requires_grad for z in operands)
    bits = bits_of(directions)
    dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
    dtype = torch.float32 if dtype == torch.float16 else dtype  # which overflows
    query, key, value = (z.to(dtype) for z in (query, key, value))
    gate = gate.float() if gate.dtype == torch.float16 else gate
    return gated_scans_forward(
        query, key, value, gate, normalizer, scale, *grid, bits, save
    )[0]  # fmt: skip
