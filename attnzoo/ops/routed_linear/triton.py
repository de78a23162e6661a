"""Routing by Triton kernels: decisions, counting sort, products of rows by chosen matrices."""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.ops.linear_core.torch import wide_bmm
from attnzoo.ops.precision import autocast_operands
from attnzoo.ops.triton_common import (
    _add_dot,
    _ceil,
    _power_of_2,
    _precision,
    _rows,
    _shared_memory,
    _width,
    launch_kernel,
    launched,
    on_its_device,
)


@triton.jit
def _count_kernel(
    index, counts, total, experts: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr
):
    block = tl.program_id(0)
    slots = tl.arange(0, experts)
    found = tl.zeros((experts,), tl.int32)
    for chunk in range(CHUNKS):
        token = (block * CHUNKS + chunk) * CHUNK + tl.arange(0, CHUNK)
        expert = tl.load(index + token, mask=token < total, other=experts).to(tl.int32)
        found += tl.sum((expert[:, None] == slots[None, :]).to(tl.int32), 0)
    tl.store(counts + block * experts + slots, found)


@triton.jit
def _place_kernel(
    index,
    counts,
    order,
    ends,
    total,
    blocks,
    kept,
    experts: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    TABLE: tl.constexpr,
    TABLES: tl.constexpr,
):
    block = tl.program_id(0)
    slots = tl.arange(0, experts)
    sums = tl.zeros((experts,), tl.int32)
    before = tl.zeros((experts,), tl.int32)
    for part in range(TABLES):
        other = part * TABLE + tl.arange(0, TABLE)
        entry = counts + other[:, None] * experts + slots[None, :]
        table = tl.load(entry, mask=other[:, None] < blocks, other=0)
        sums += tl.sum(table, 0)
        before += tl.sum(tl.where(other[:, None] < block, table, 0), 0)
    end = tl.cumsum(sums, 0)
    first = end - sums + before
    for chunk in range(CHUNKS):
        token = (block * CHUNKS + chunk) * CHUNK + tl.arange(0, CHUNK)
        expert = tl.load(index + token, mask=token < total, other=experts).to(tl.int32)
        hits = (expert[:, None] == slots[None, :]).to(tl.int32)
        place = tl.sum(hits * (first[None, :] + tl.cumsum(hits, 0) - 1), 1)
        tl.store(order + place, token, mask=token < total)
        first += tl.sum(hits, 0)
    if block == 0:
        tl.store(ends + slots, end, mask=slots < kept)


# Pairs of token and expert that a program of the sort holds at a time.
SORTED_ENTRIES = 8192


def sort_by_expert(
    index: Tensor, experts: int, order: Tensor | None = None, ends: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A stable counting sort on the device.

    Args:
        index: (t,), each in [0, experts).
        experts: How many there are.
        order: Where to put the first result, of any integer type.
        ends: Where to put the second result, of any integer type.

    Returns:
        Tokens in the order of their experts, (t,), and where each expert's segment ends,
        (experts,); int32 unless the caller brought them.
    """
    total, slots = index.numel(), max(2, _power_of_2(experts))
    if order is None:
        order = torch.empty(total, dtype=torch.int32, device=index.device)
    if ends is None:
        ends = torch.empty(experts, dtype=torch.int32, device=index.device)
    # At most 1024 blocks, each of which reads the counts of all.
    block = max(512, _power_of_2(_ceil(total, 1024)))
    blocks = max(1, _ceil(total, block))
    counts = torch.empty(blocks, slots, dtype=torch.int32, device=index.device)
    # In parts that fit into registers and shared memory.
    chunk = min(block, max(16, SORTED_ENTRIES // slots))
    launch_kernel(_count_kernel, (blocks,), index, counts, total, slots, chunk, block // chunk)
    width = max(2, _power_of_2(blocks))
    table = min(width, 2 * SORTED_ENTRIES // slots)
    launch_kernel(_place_kernel, (blocks,),
        index, counts, order, ends, total, blocks, experts, slots, chunk, block // chunk, table,
        width // table,
    )  # fmt: skip
    return order, ends


@triton.jit
def _grouped_kernel(
    a,
    b,
    b_other,
    c,
    order,
    ends,
    a_rows,
    c_rows,
    N,
    K,
    a_row,
    b_expert,
    b_k,
    b_n,
    b_experts,
    FIRST: tl.constexpr,
    experts: tl.constexpr,
    SLOTS: tl.constexpr,
    M_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    IS_EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Programs that share rows of `a` are neighbours; the weights of all experts fit in L2.
    tiles_n = tl.cdiv(N, N_BLOCK)
    slots = tl.arange(0, SLOTS)
    is_slot = slots < experts
    end = tl.load(ends + slots, mask=is_slot, other=0).to(tl.int32)
    start = tl.load(ends + slots - 1, mask=is_slot & (slots > 0), other=0).to(tl.int32)
    tiles = tl.where(slots < FIRST, 0, (end - start + M_BLOCK - 1) // M_BLOCK)
    last = tl.cumsum(tiles, 0)
    for turn in range(tl.program_id(0), tl.max(last, 0) * tiles_n, tl.num_programs(0)):
        tile = turn // tiles_n
        column = (turn % tiles_n) * N_BLOCK + tl.arange(0, N_BLOCK)
        expert = tl.sum((is_slot & (last <= tile)).to(tl.int32), 0)
        mine = slots == expert
        first = tl.sum(tl.where(mine, start + (tile - last + tiles) * M_BLOCK, 0), 0)
        stop = tl.sum(tl.where(mine, end, 0), 0)
        row = first + tl.arange(0, M_BLOCK)
        is_row = row < stop
        token = tl.load(order + row, mask=is_row, other=0).to(tl.int32)
        k = tl.arange(0, K_BLOCK)
        source = tl.where(token < a_rows, token, token - a_rows)
        a_tile = a + source.to(tl.int64)[:, None] * a_row + k[None, :]
        is_other = expert >= b_experts
        own = tl.where(is_other, expert - b_experts, expert).to(tl.int64)
        b_mine = tl.where(is_other, b_other, b) + own * b_expert
        b_tile = b_mine + k[:, None] * b_k + column[None, :] * b_n
        total = tl.zeros((M_BLOCK, N_BLOCK), tl.float32)
        # Tiles by their number: pointers that move would be added to one by one.
        for step in range(tl.cdiv(K, K_BLOCK)):
            x_tile, w_tile = a_tile + step * K_BLOCK, b_tile + step * K_BLOCK * b_k
            if IS_EVEN:
                # Rows past the segment repeat token 0 and are never stored.
                x = tl.load(x_tile)
                w = tl.load(w_tile)
            else:
                is_k = k < K - step * K_BLOCK
                x = tl.load(x_tile, mask=is_row[:, None] & is_k[None, :], other=0.0)
                w = tl.load(w_tile, mask=is_k[:, None] & (column[None, :] < N), other=0.0)
            total = _add_dot(total, x, w, PRECISION)
        target = tl.where(token < c_rows, token, token - c_rows)
        out = c + target.to(tl.int64)[:, None] * N + column[None, :]
        mask = is_row[:, None] & (column[None, :] < N)
        if FIRST:
            total += tl.load(out, mask=mask, other=0.0).to(tl.float32)
        tl.store(out, total.to(c.dtype.element_ty), mask=mask)


@triton.jit
def _shares(
    ends, tiles, programs, experts: tl.constexpr, SLOTS: tl.constexpr, K_BLOCK: tl.constexpr
):
    """The sums over tokens as one line of steps, expert by expert and tile by tile.

    Returns where each expert's tokens start and end, its steps for a tile, the steps of all
    experts up to it, and how many steps a program takes, so that all take as many.
    """
    slots = tl.arange(0, SLOTS)
    is_slot = slots < experts
    end = tl.load(ends + slots, mask=is_slot, other=0).to(tl.int32)
    start = tl.load(ends + slots - 1, mask=is_slot & (slots > 0), other=0).to(tl.int32)
    steps = (end - start + K_BLOCK - 1) // K_BLOCK
    last = tl.cumsum(steps * tiles, 0)
    return start, end, steps, last, tl.cdiv(tl.max(last, 0), programs)


@triton.jit
def _grouped_weight_kernel(
    a,
    g,
    out,
    partial,
    order,
    ends,
    a_rows,
    M,
    N,
    a_row,
    g_row,
    programs,
    experts: tl.constexpr,
    SLOTS: tl.constexpr,
    M_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    IS_EVEN: tl.constexpr,
    IS_TWICE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # A program takes one share of all steps, however many tokens each expert has.
    tiles_n = tl.cdiv(N, N_BLOCK)
    tiles = tiles_n * tl.cdiv(M, M_BLOCK)
    begin, end, steps, last, share = _shares(ends, tiles, programs, experts, SLOTS, K_BLOCK)
    slots = tl.arange(0, SLOTS)
    here = tl.program_id(0) * share
    stop = tl.minimum(here + share, tl.max(last, 0))
    slot = partial + tl.program_id(0).to(tl.int64) * 2 * M_BLOCK * N_BLOCK
    while here < stop:
        expert = tl.sum((last <= here).to(tl.int32), 0)
        mine = slots == expert
        depth = tl.sum(tl.where(mine, steps, 0), 0)
        place = here - tl.sum(tl.where(mine, last - steps * tiles, 0), 0)
        tile, step = place // depth, place % depth
        count = tl.minimum(depth - step, stop - here)
        first = tl.sum(tl.where(mine, begin, 0), 0) + step * K_BLOCK
        limit = tl.sum(tl.where(mine, end, 0), 0)
        m = (tile // tiles_n) * M_BLOCK + tl.arange(0, M_BLOCK)
        n = (tile % tiles_n) * N_BLOCK + tl.arange(0, N_BLOCK)
        total = tl.zeros((M_BLOCK, N_BLOCK), tl.float32)
        for turn in range(count):
            row = first + turn * K_BLOCK + tl.arange(0, K_BLOCK)
            is_row = row < limit
            token = tl.load(order + row, mask=is_row, other=0).to(tl.int32)
            source = tl.where(token < a_rows, token, token - a_rows) if IS_TWICE else token
            x_tile = a + m[None, :] + source.to(tl.int64)[:, None] * a_row
            y_tile = g + n[None, :] + token.to(tl.int64)[:, None] * g_row
            # Rows past the segment are 0 in one operand, and repeat token 0 in the other.
            if IS_EVEN:
                x = tl.load(x_tile, mask=is_row[:, None], other=0.0)
                y = tl.load(y_tile)
            else:
                x = tl.load(x_tile, mask=is_row[:, None] & (m[None, :] < M), other=0.0)
                y = tl.load(y_tile, mask=n[None, :] < N, other=0.0)
            total = _add_dot(total, tl.trans(x), y, PRECISION)
        if count == depth:
            whole = out + expert.to(tl.int64) * M * N + m[:, None] * N + n[None, :]
            mask = (m[:, None] < M) & (n[None, :] < N)
            tl.store(whole, total.to(out.dtype.element_ty), mask=mask)
        else:
            entry = tl.arange(0, M_BLOCK)[:, None] * N_BLOCK + tl.arange(0, N_BLOCK)[None, :]
            tl.store(slot + entry, total)
        slot = partial + (tl.program_id(0).to(tl.int64) * 2 + 1) * M_BLOCK * N_BLOCK
        here += count


@triton.jit
def _grouped_sum_kernel(
    partial, out, ends, M, N, programs, experts: tl.constexpr, SLOTS: tl.constexpr,
    M_BLOCK: tl.constexpr, N_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Adds up those tiles of which several programs took a part."""
    tiles_n = tl.cdiv(N, N_BLOCK)
    tiles = tiles_n * tl.cdiv(M, M_BLOCK)
    expert, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    _, _, steps, last, share = _shares(ends, tiles, programs, experts, SLOTS, K_BLOCK)
    mine = tl.arange(0, SLOTS) == expert
    depth = tl.sum(tl.where(mine, steps, 0), 0)
    begin = tl.sum(tl.where(mine, last, 0), 0) - (tiles - tile) * depth
    share = tl.maximum(share, 1)
    first, stop = begin // share, (begin + depth + share - 1) // share
    if (stop - first > 1) | (depth == 0):
        row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
        column = tl.arange(0, N_BLOCK)[None, :]
        total = tl.zeros((ROWS, N_BLOCK), tl.float32)
        for program in range(tl.where(depth == 0, stop, first), stop):
            # The second of a program that began with an earlier tile.
            slot = 2 * program + tl.where(program * share < begin, 1, 0)
            spot = partial + slot.to(tl.int64) * M_BLOCK * N_BLOCK
            total += tl.load(spot + row * N_BLOCK + column)
        m, n = tile // tiles_n * M_BLOCK + row, tile % tiles_n * N_BLOCK + column
        spot = out + expert.to(tl.int64) * M * N + m * N + n
        tl.store(spot, total.to(out.dtype.element_ty), mask=(m < M) & (n < N))


# (rows, columns, depth of a tile, warps, stages, programs of each multiprocessor) by bytes of an
# element; 0 programs are one for each tile.
GROUPED_TILES = {2: (128, 256, 64, 8, 4, 1), 4: (64, 64, 32, 4, 2, 0)}
WEIGHT_TILES = {2: (128, 256, 64, 8, 3, 1), 4: (64, 64, 32, 4, 2, 4)}
# Where wide tiles would be half empty.
NARROW_TILES = {2: (128, 128, 64, 8, 3, 0), 4: (64, 64, 32, 4, 2, 0)}
NARROW_WEIGHT_TILES = {2: (128, 128, 64, 8, 3, 2), 4: (64, 64, 32, 4, 2, 4)}
SUM_ROWS = 16  # of a tile, that a program adds up


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _within(
    tile: tuple[int, ...], itemsize: int, room: int | None, of_result: int = 0
) -> tuple[int, ...]:
    """The tile, made smaller where shared memory is."""
    m, n, k, warps, stages, each = tile
    while room and n > 16 and max((m + n) * k * itemsize * stages, m * n * of_result) > room:
        stages, n = (stages - 1, n) if stages > 2 else (stages, n // 2)
    return m, n, k, warps, stages, each


def grouped_product(
    a: Tensor,
    weight: Tensor,
    order: Tensor,
    ends: Tensor,
    other: Tensor | None = None,
    tiles: tuple[int, ...] | None = None,
    is_sum: bool = False,
) -> Tensor:
    """Row i of the result is a[i mod rows of a] times the matrix of the expert that i chose.

    Gathering by ``order`` is part of the operand's load and scattering part of the store.

    Args:
        a: (rows, k).
        weight: (experts, k, n), any strides.
        order: (t,), as many as rows, or twice as many; from ``sort_by_expert``.
        ends: From ``sort_by_expert``.
        other: More experts, (experts, k, n), strides as of ``weight``; saves joining the two.
        tiles: Overrides ``GROUPED_TILES``.
        is_sum: Adds rows i and t / 2 + i of the result, whose experts are of ``weight`` and of
            ``other``.

    Returns:
        (t, n), or (t / 2, n).
    """
    a, spacing = _rows(a)
    experts, depth, width = weight.shape
    total = experts * (1 if other is None else 2)
    rows = order.numel() // 2 if is_sum else order.numel()
    out = torch.empty(rows, width, dtype=a.dtype, device=a.device)
    if out.numel() == 0:
        return out
    size, room = a.element_size(), _shared_memory(a.device)
    tiles = tiles or (NARROW_TILES if width % 256 else GROUPED_TILES)[size]
    m, n, k, warps, stages, each = _within(tiles, size, room)
    # One after the other, as the second adds to what the first has stored.
    for first, stop in [(0, experts), (experts, total)] if is_sum else [(0, total)]:
        programs = (_ceil(rows, m) + stop - first) * _ceil(width, n)
        if each:
            programs = min(programs, each * _processors(a.device))
        launch_kernel(_grouped_kernel, (programs,),
            a, weight, weight if other is None else other, out, order, ends, a.shape[0], rows,
            width, depth, spacing, *weight.stride(), experts, first, stop,
            max(2, _power_of_2(stop)), m, n, k, width % n == 0 and depth % k == 0,
            _precision(a.dtype), num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out


def grouped_weight_gradient(
    a: Tensor, grad: Tensor, order: Tensor, ends: Tensor, experts: int,
    tiles: tuple[int, ...] | None = None,
) -> Tensor:  # fmt: skip
    """Sum of a_i^T grad_i over each expert's tokens: (rows, k), (t, n) -> (experts, k, n)."""
    a, spacing = _rows(a)
    grad, grad_spacing = _rows(grad)
    depth, width = a.shape[1], grad.shape[1]
    out = torch.empty(experts, depth, width, dtype=a.dtype, device=a.device)
    size, room = a.element_size(), _shared_memory(a.device)
    tiles = tiles or (NARROW_WEIGHT_TILES if width % 256 else WEIGHT_TILES)[size]
    m, n, k, warps, stages, each = _within(tiles, size, room, 4)
    blocks, total = _ceil(depth, m) * _ceil(width, n), order.numel()
    programs = each * _processors(a.device)
    partial = torch.empty(2 * programs, m, n, dtype=torch.float32, device=a.device)
    sizes = experts, max(2, _power_of_2(experts)), m, n, k
    if total:
        launch_kernel(_grouped_weight_kernel, (programs,),
            a, grad, out, partial, order, ends, a.shape[0], depth, width, spacing, grad_spacing,
            programs, *sizes, depth % m == 0 and width % n == 0, total > a.shape[0],
            # Every other stage waits for tokens' numbers.
            _precision(a.dtype), num_warps=warps, num_stages=2 * stages - 1,
        )  # fmt: skip
    if out.numel():
        launch_kernel(_grouped_sum_kernel, (blocks * experts, _ceil(m, SUM_ROWS)),
            partial, out, ends, depth, width, programs, *sizes, SUM_ROWS,
        )  # fmt: skip
    return out


@triton.jit
def _decide(logits, table, choices, dtype: tl.constexpr, C: tl.constexpr):
    """(scalar each row chose, probabilities, the choice): the first of equal logits wins."""
    choice = tl.arange(0, C)
    # Rounded as the library's router rounds them, so that both break ties alike.
    logits = logits.to(dtype).to(tl.float32)
    logits = tl.where(choice[None, :] < choices, logits, -float("inf"))
    index = tl.argmax(logits, 1)
    weights = tl.exp(logits - tl.max(logits, 1)[:, None])
    values = tl.load(table + choice, mask=choice < choices, other=0.0)
    chosen = tl.sum(tl.where(choice[None, :] == index[:, None], values[None, :], 0.0), 1)
    return chosen, weights / tl.sum(weights, 1)[:, None], index


@triton.jit
def _top1_kernel(
    x, r1, r2, index, probability, rows, d, x_row, experts, R: tl.constexpr, K: tl.constexpr,
    E: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    is_row = row < rows
    choice = tl.arange(0, E)
    is_choice = choice < experts
    logits1 = tl.zeros((R, E), tl.float32)
    logits2 = tl.zeros((R, E), tl.float32)
    for first in range(0, d, K):
        k = first + tl.arange(0, K)
        tile = x + row[:, None] * x_row + k[None, :]
        token = tl.load(tile, mask=is_row[:, None] & (k < d)[None, :], other=0.0)
        place = choice[None, :] * d + k[:, None]
        mask = is_choice[None, :] & (k < d)[:, None]
        w = tl.load(r1 + place, mask=mask, other=0.0)
        logits1 = _add_dot(logits1, token.to(w.dtype), w, P)
        w = tl.load(r2 + place, mask=mask, other=0.0)
        logits2 = _add_dot(logits2, token.to(w.dtype), w, P)
    dtype: tl.constexpr = x.dtype.element_ty
    line = probability + row[:, None] * (2 * C) + choice[None, :]
    # The padding keeps probabilities of 0.
    mask = is_row[:, None] & (choice < C)[None, :]
    _, p, best = _decide(logits1, r1, experts, dtype, E)
    tl.store(index + row, tl.minimum(best, experts - 1), mask=is_row)
    tl.store(line, p, mask=mask)
    _, p, best = _decide(logits2, r2, experts, dtype, E)
    tl.store(index + rows + row, tl.minimum(best, experts - 1) + experts, mask=is_row)
    tl.store(line + C, p, mask=mask)


def top1(x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Decisions of two routers of as many experts.

    Args:
        x: (t, d).
        first: (experts, d).
        second: (experts, d).

    Returns:
        Choices of the first router, then those of the second plus ``experts``, (2 t,) int32; and
        probabilities (t, 2, padded experts), 0 in the padding.
    """
    x, spacing = _rows(x)
    rows, d = x.shape
    experts = first.shape[0]
    padded = _ceil(experts, 8) * 8
    index = torch.empty(2 * rows, dtype=torch.int32, device=x.device)
    probability = torch.empty(rows, 2, padded, dtype=torch.float32, device=x.device)
    if rows:
        launch_kernel(_top1_kernel, (_ceil(rows, 64),),
            x, first.contiguous(), second.contiguous(), index, probability, rows, d, spacing,
            experts, 64, 64, _width(experts), padded, _precision(first.dtype), num_warps=4,
        )  # fmt: skip
    return index, probability


@launched("routed_gates")
def _routed_gates(x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    index, probability = top1(x, first, second)
    return x.new_ones(2, x.shape[0], dtype=torch.float32), index, probability


@_routed_gates.register_inference
@on_its_device
def _(x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    index, probability = top1(x, first, second)
    # Nothing reads the gates but their gradient.
    return x.new_empty(2, x.shape[0], dtype=torch.float32), index, probability


@_routed_gates.register_fake
def _(x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    padded = -(-first.shape[0] // 8) * 8
    return (
        x.new_empty(2, x.shape[0], dtype=torch.float32),
        x.new_empty(2 * x.shape[0], dtype=torch.int32),
        x.new_empty(x.shape[0], 2, padded, dtype=torch.float32),
    )


def _gates_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output[1:])


@launched("routed_gates_backward")
def _routed_gates_backward(
    grad: Tensor, x: Tensor, first: Tensor, second: Tensor, index: Tensor, probability: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient that each token's chosen probability, over itself, hands its router."""
    rows, _, padded = probability.shape
    experts = first.shape[0]
    offset = torch.arange(2, device=x.device)[:, None] * experts
    chosen = (index.view(2, rows) - offset).t().unsqueeze(-1)
    mine = chosen == torch.arange(padded, device=x.device)
    grad_logits = (grad.t().unsqueeze(-1) * (mine.float() - probability)).to(x.dtype)
    grad_logits = grad_logits.flatten(1)
    pad = (0, 0, 0, padded - experts)
    routers = torch.cat([F.pad(first, pad), F.pad(second, pad)]).to(x.dtype)
    grad_routers = wide_bmm(grad_logits.t()[None], x[None], is_wide=True)[0]
    grad_first, grad_second = grad_routers.unflatten(0, (2, padded))[:, :experts]
    return (
        grad_logits @ routers,
        # Copies: an operator's results may not share memory.
        grad_first.to(first.dtype, copy=True),
        grad_second.to(second.dtype, copy=True),
    )


@_routed_gates_backward.register_fake
def _(
    grad: Tensor, x: Tensor, first: Tensor, second: Tensor, index: Tensor, probability: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), first.new_empty(first.shape), second.new_empty(second.shape)


def _gates_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    return (None,) * 3 if grad is None else _routed_gates_backward(grad, *ctx.saved_tensors)


_routed_gates.register_autograd(_gates_backward, setup_context=_gates_setup)


@launched("grouped_linear")
def _grouped_linear(
    x: Tensor, first: Tensor, second: Tensor | None, index: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    order, ends = sort_by_expert(index, first.shape[0] * (1 if second is None else 2))
    # Both have the strides of the first.
    first, second = first.contiguous(), None if second is None else second.contiguous()
    return grouped_product(x, first, order, ends, second), order, ends


@_grouped_linear.register_fake
def _(
    x: Tensor, first: Tensor, second: Tensor | None, index: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(index.shape[0], first.shape[2]),
        torch.empty_like(index, dtype=torch.int32),
        index.new_empty(first.shape[0] * (1 if second is None else 2), dtype=torch.int32),
    )


@launched("grouped_linear_backward")
def _grouped_linear_backward(
    grad: Tensor, x: Tensor, first: Tensor, second: Tensor | None, order: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    first, second = first.contiguous(), None if second is None else second.contiguous()
    is_pair = second is not None
    other = second.mT if is_pair else None
    grad_x = grouped_product(grad, first.mT, order, ends, other, is_sum=is_pair)
    return grad_x, grouped_weight_gradient(x, grad, order, ends, ends.shape[0])


@_grouped_linear_backward.register_fake
def _(
    grad: Tensor, x: Tensor, first: Tensor, second: Tensor | None, order: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(ends.shape[0], *first.shape[1:])


def _grouped_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.save_for_backward(*inputs[:3], *output[1:])
    ctx.set_materialize_grads(False)


def _grouped_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, first, second, order, ends = ctx.saved_tensors
    grad_x, grad_weight = _grouped_linear_backward(
        grad.contiguous(), x, first, second, order, ends
    )
    experts = first.shape[0]
    return grad_x, grad_weight[:experts], None if second is None else grad_weight[experts:], None


_grouped_linear.register_autograd(_grouped_backward, setup_context=_grouped_setup)


def routed_linear(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """See ``attnzoo.ops.routed_linear``."""
    x, weight = autocast_operands(x, weight)
    tokens = x.reshape(-1, x.shape[-1])
    out, _, _ = _grouped_linear(tokens, weight, None, index.reshape(-1))
    return out.unflatten(0, x.shape[:-1])


def grouped_linear(x: Tensor, first: Tensor, second: Tensor, index: Tensor) -> Tensor:
    """See ``attnzoo.ops.routed_linear``."""
    out = _grouped_linear(x, first, second, index)[0]
    return out.view(2, x.shape[0], out.shape[1])


def routed_pair(
    x: Tensor,
    routers: Sequence[Tensor],
    projectors: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Two routed projections of the same tokens: decisions, sorting and both products.

    Args:
        x: (b, n, d).
        routers: Two of (experts, d).
        projectors: Two of (experts, d, e).

    Returns:
        Projected tokens (2, b, n, e); choices (2, b, n), those of the second plus ``experts``;
        and gates (2, b, n) of value 1, by which the tokens count as multiplied: whoever uses the
        tokens must return the gates' gradients, and the routers learn from those.
    """
    tokens = x.flatten(0, 1)
    gates, index, _ = _routed_gates(tokens, *routers)
    shape = (2, *x.shape[:2])
    out = grouped_linear(tokens, *projectors, index)
    return out.view(*shape, out.shape[2]), index.view(shape), gates.view(shape)
