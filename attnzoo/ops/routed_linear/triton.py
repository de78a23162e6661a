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
    logits,
    router,
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
    first_expert,
    logits_row,
    experts: tl.constexpr,
    SLOTS: tl.constexpr,
    M_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    IS_EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    LOGITS: tl.constexpr,
    ADD: tl.constexpr,
):
    # Programs that share rows of `a` are neighbors; the weights of all experts fit in L2.
    tiles_n = tl.cdiv(N, N_BLOCK)
    tile = tl.program_id(0) // tiles_n
    column = (tl.program_id(0) % tiles_n) * N_BLOCK + tl.arange(0, N_BLOCK)
    slots = tl.arange(0, SLOTS)
    is_slot = slots < experts
    ends += first_expert
    end = tl.load(ends + slots, mask=is_slot, other=0).to(tl.int32)
    is_later = is_slot & (slots + first_expert > 0)
    start = tl.load(ends + slots - 1, mask=is_later, other=0).to(tl.int32)
    tiles = (end - start + M_BLOCK - 1) // M_BLOCK
    last = tl.cumsum(tiles, 0)
    expert = tl.sum((is_slot & (last <= tile)).to(tl.int32), 0)
    if expert < experts:
        mine = slots == expert
        first = tl.sum(tl.where(mine, start + (tile - last + tiles) * M_BLOCK, 0), 0)
        stop = tl.sum(tl.where(mine, end, 0), 0)
        row = first + tl.arange(0, M_BLOCK)
        is_row = row < stop
        token = tl.load(order + row, mask=is_row, other=0).to(tl.int32)
        k = tl.arange(0, K_BLOCK)
        a_tile = a + (token % a_rows).to(tl.int64)[:, None] * a_row + k[None, :]
        if expert < b_experts:
            b_mine = b + expert.to(tl.int64) * b_expert
        else:
            b_mine = b_other + (expert - b_experts).to(tl.int64) * b_expert
        b_tile = b_mine + k[:, None] * b_k + column[None, :] * b_n
        total = tl.zeros((M_BLOCK, N_BLOCK), tl.float32)
        for done in range(0, K, K_BLOCK):
            if IS_EVEN:
                # Rows past the segment repeat token 0 and are never stored.
                x = tl.load(a_tile)
                w = tl.load(b_tile)
            else:
                is_k = k < K - done
                x = tl.load(a_tile, mask=is_row[:, None] & is_k[None, :], other=0.0)
                w = tl.load(b_tile, mask=is_k[:, None] & (column[None, :] < N), other=0.0)
            total = _add_dot(total, x, w, PRECISION)
            a_tile += K_BLOCK
            b_tile += K_BLOCK * b_k
        if LOGITS > 0:
            # Of a router of these experts: its part is a product of few columns more.
            e = tl.arange(0, LOGITS)
            is_e = e < experts
            x = logits + (token % c_rows).to(tl.int64)[:, None] * logits_row + e[None, :]
            x = tl.load(x, mask=is_row[:, None] & is_e[None, :], other=0.0)
            w = router + e[:, None] * N + column[None, :]
            w = tl.load(w, mask=is_e[:, None] & (column[None, :] < N), other=0.0)
            total = _add_dot(total, x, w.to(x.dtype), PRECISION)
        out = c + (token % c_rows).to(tl.int64)[:, None] * N + column[None, :]
        is_inside = is_row[:, None] & (column[None, :] < N)
        if ADD:
            total += tl.load(out, mask=is_inside, other=0.0).to(tl.float32)
        tl.store(out, total.to(c.dtype.element_ty), mask=is_inside)


@triton.jit
def _segments(ends, CHUNK, experts: tl.constexpr, SLOTS: tl.constexpr):
    """Where each expert's segment starts and ends, and its parts of CHUNK, with those before."""
    slots = tl.arange(0, SLOTS)
    is_slot = slots < experts
    end = tl.load(ends + slots, mask=is_slot, other=0).to(tl.int32)
    start = tl.load(ends + slots - 1, mask=is_slot & (slots > 0), other=0).to(tl.int32)
    parts = (end - start + CHUNK - 1) // CHUNK
    return start, end, parts, tl.cumsum(parts, 0)


@triton.jit
def _grouped_weight_kernel(
    a,
    g,
    partial,
    order,
    ends,
    a_rows,
    M,
    N,
    a_row,
    g_row,
    chunk,
    experts: tl.constexpr,
    SLOTS: tl.constexpr,
    M_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    IS_EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # A program sums over one part of one expert's tokens, however many tokens each expert has.
    tiles_n = tl.cdiv(N, N_BLOCK)
    tiles = tiles_n * tl.cdiv(M, M_BLOCK)
    m = (tl.program_id(0) % tiles // tiles_n) * M_BLOCK + tl.arange(0, M_BLOCK)
    n = (tl.program_id(0) % tiles_n) * N_BLOCK + tl.arange(0, N_BLOCK)
    part = tl.program_id(0) // tiles
    begin, end, parts, last = _segments(ends, chunk, experts, SLOTS)
    slots = tl.arange(0, SLOTS)
    expert = tl.sum(((slots < experts) & (last <= part)).to(tl.int32), 0)
    if expert < experts:
        mine = slots == expert
        start = tl.sum(tl.where(mine, begin + (part - last + parts) * chunk, 0), 0)
        stop = tl.minimum(start + chunk, tl.sum(tl.where(mine, end, 0), 0))
        total = tl.zeros((M_BLOCK, N_BLOCK), tl.float32)
        for first in range(start, stop, K_BLOCK):
            row = first + tl.arange(0, K_BLOCK)
            is_row = row < stop
            token = tl.load(order + row, mask=is_row, other=0).to(tl.int64)
            x_tile = a + (token % a_rows)[:, None] * a_row + m[None, :]
            y_tile = g + token[:, None] * g_row + n[None, :]
            if IS_EVEN:
                x = tl.load(x_tile, mask=is_row[:, None], other=0.0)
                y = tl.load(y_tile, mask=is_row[:, None], other=0.0)
            else:
                x = tl.load(x_tile, mask=is_row[:, None] & (m[None, :] < M), other=0.0)
                y = tl.load(y_tile, mask=is_row[:, None] & (n[None, :] < N), other=0.0)
            total = _add_dot(total, tl.trans(x), y, PRECISION)
        tile = partial + part.to(tl.int64) * M * N + m[:, None] * N + n[None, :]
        tl.store(tile, total, mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def _grouped_sum_kernel(
    partial, out, ends, size, chunk, experts: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds up what the parts of each expert's tokens gave."""
    expert = tl.program_id(1)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _, _, parts, last = _segments(ends, chunk, experts, SLOTS)
    mine = tl.arange(0, SLOTS) == expert
    count = tl.sum(tl.where(mine, parts, 0), 0)
    first = tl.sum(tl.where(mine, last - parts, 0), 0)
    tile = partial + first.to(tl.int64) * size + place
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(count):
        total += tl.load(tile, mask=place < size, other=0.0)
        tile += size
    here = out + expert.to(tl.int64) * size + place
    tl.store(here, total.to(out.dtype.element_ty), mask=place < size)


# (rows, columns, depth of a tile, warps, stages) by bytes of an element.
GROUPED_TILES = {2: (128, 256, 64, 8, 4), 4: (64, 64, 32, 4, 2)}
# Where wide tiles would be half empty.
NARROW_TILES = {2: (128, 128, 64, 8, 3), 4: (64, 64, 32, 4, 2)}
WEIGHT_TILES = {2: (128, 128, 32, 8, 5), 4: (64, 64, 32, 4, 2)}
# Programs to split the sums of weights' gradients for; entries of one that adds the parts up.
WEIGHT_PROGRAMS = 264
SUM_BLOCK = 1024


def _fitting(
    table: dict[int, tuple[int, ...]], itemsize: int, device: torch.device
) -> tuple[int, ...]:
    """The tile for elements of ``itemsize`` bytes, made smaller where shared memory is."""
    return _within(table[itemsize], itemsize, _shared_memory(device))


def _grouped_tile(a: Tensor, width: int) -> tuple[int, ...]:
    table = GROUPED_TILES if width % 256 == 0 else NARROW_TILES
    return _fitting(table, a.element_size(), a.device)


@functools.cache
def _within(tile: tuple[int, ...], itemsize: int, room: int | None) -> tuple[int, ...]:
    m, n, k, warps, stages = tile
    while room and (m + n) * k * itemsize * stages > room and n > 16:
        stages, n = (stages - 1, n) if stages > 2 else (stages, n // 2)
    return m, n, k, warps, stages


def grouped_product(
    a: Tensor,
    weight: Tensor,
    order: Tensor,
    ends: Tensor,
    other: Tensor | None = None,
    tiles: tuple[int, ...] | None = None,
) -> Tensor:
    """Row i of the result is a[i mod rows of a] times the matrix of the expert that i chose.

    Gathering by ``order`` is part of the operand's load and scattering part of the store.

    Args:
        a: (rows, k).
        weight: (experts, k, n), any strides.
        order: (t,), a multiple of rows; from ``sort_by_expert``.
        ends: From ``sort_by_expert``.
        other: More experts, (experts, k, n), strides as of ``weight``; saves joining the two.
        tiles: Overrides ``GROUPED_TILES``.

    Returns:
        (t, n).
    """
    out = torch.empty(order.numel(), weight.shape[2], dtype=a.dtype, device=a.device)
    total = weight.shape[0] * (1 if other is None else 2)
    _grouped_launch(a, weight, other, out, order, ends, order.numel(), total, tiles=tiles)
    return out


def grouped_input_gradient(
    grad: Tensor,
    weights: Sequence[Tensor],
    order: Tensor,
    ends: Tensor,
    gates: tuple[Tensor, Sequence[Tensor]] | None = None,
    tiles: tuple[int, ...] | None = None,
) -> Tensor:
    """Of the tokens that ``grouped_product`` multiplied once for each of ``weights``.

    One launch for each, which adds to what the one before it left.

    Args:
        grad: (tokens * weights, n).
        weights: Each (experts, k, n).
        order: As there.
        ends: As there.
        gates: Gradients of the routers' logits (tokens, weights, padded experts), and the routers,
            (experts, k) each and contiguous, whose part is to be added; or None.
        tiles: As there.

    Returns:
        (tokens, k).
    """
    experts, width, _ = weights[0].shape
    tokens = len(grad) // len(weights)
    out = torch.empty(tokens, width, dtype=grad.dtype, device=grad.device)
    for i, weight in enumerate(weights):
        more = () if gates is None else (gates[0][:, i], gates[1][i])
        _grouped_launch(
            grad, weight.mT, None, out, order, ends, tokens, experts, i * experts, i > 0, *more,
            tiles=tiles,
        )  # fmt: skip
    return out


def _grouped_launch(
    a: Tensor, weight: Tensor, other: Tensor | None, out: Tensor, order: Tensor, ends: Tensor,
    entries: int, experts: int, first_expert: int = 0, add: bool = False,
    logits: Tensor | None = None, router: Tensor | None = None,
    tiles: tuple[int, ...] | None = None,
) -> None:  # fmt: skip
    """Products with ``experts`` from ``first_expert`` on, which ``entries`` of ``order`` chose."""
    if not out.numel():
        return
    a, spacing = _rows(a)
    _, depth, width = weight.shape
    m, n, k, warps, stages = tiles or _grouped_tile(a, width)
    grid = ((_ceil(entries, m) + experts) * _ceil(width, n),)
    pitch = 0 if logits is None else logits.stride(0)
    launch_kernel(_grouped_kernel, grid,
        a, weight, weight if other is None else other, out, out if logits is None else logits,
        out if router is None else router, order, ends, a.shape[0], len(out), width, depth,
        spacing, *weight.stride(), weight.shape[0], first_expert, pitch, experts,
        max(2, _power_of_2(experts)), m, n, k, width % n == 0 and depth % k == 0,
        _precision(a.dtype), _width(experts) if pitch else 0, add, num_warps=warps,
        num_stages=stages,
    )  # fmt: skip


def grouped_weight_gradient(
    a: Tensor, grad: Tensor, order: Tensor, ends: Tensor, experts: int,
    tiles: tuple[int, ...] | None = None,
) -> Tensor:  # fmt: skip
    """Sum of a_i^T grad_i over each expert's tokens: (rows, k), (t, n) -> (experts, k, n)."""
    a, spacing = _rows(a)
    grad, grad_spacing = _rows(grad)
    depth, width = a.shape[1], grad.shape[1]
    out = torch.empty(experts, depth, width, dtype=a.dtype, device=a.device)
    m, n, k, warps, stages = tiles or _fitting(WEIGHT_TILES, a.element_size(), a.device)
    blocks, total = _ceil(depth, m) * _ceil(width, n), order.numel()
    # The last part of an expert's tokens is half full on average.
    parts = max(1, WEIGHT_PROGRAMS // blocks - experts // 2)
    chunk = _ceil(_ceil(total, parts), k) * k
    most = _ceil(total, chunk) + experts if total else 0
    partial = torch.empty(most, depth, width, dtype=torch.float32, device=a.device)
    slots = max(2, _power_of_2(experts))
    if total:
        launch_kernel(_grouped_weight_kernel, (blocks * most,),
            a, grad, partial, order, ends, a.shape[0], depth, width, spacing, grad_spacing, chunk,
            experts, slots, m, n, k, depth % m == 0 and width % n == 0, _precision(a.dtype),
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    launch_kernel(
        _grouped_sum_kernel,
        (_ceil(depth * width, SUM_BLOCK), experts),
        partial,
        out,
        ends,
        depth * width,
        max(1, chunk),
        experts,
        slots,
        SUM_BLOCK,
    )
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
    values = tl.load(table + choice, mask=choice < choices, other=0.0).to(tl.float32)
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


@triton.jit
def _gate_logits_kernel(
    grad, index, probability, out, rows, experts, R: tl.constexpr, E: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    side = tl.program_id(1)
    choice = tl.arange(0, E)
    is_row = row < rows
    mask = is_row[:, None] & (choice < C)[None, :]
    place = row[:, None] * (2 * C) + side * C + choice[None, :]
    g = tl.load(grad + side * rows + row, mask=is_row, other=0.0)
    mine = tl.load(index + side * rows + row, mask=is_row, other=0).to(tl.int32) - side * experts
    p = tl.load(probability + place, mask=mask, other=0.0)
    z = g[:, None] * (tl.where(choice[None, :] == mine[:, None], 1.0, 0.0) - p)
    tl.store(out + place, z.to(out.dtype.element_ty), mask=mask)


def gate_gradients(
    grad: Tensor, x: Tensor, first: Tensor, index: Tensor, probability: Tensor
) -> tuple[Tensor, Tensor]:
    """What each token's chosen probability, over itself, hands its router.

    Args:
        grad: Of the gates, (2, t) in float32.
        x: (t, d).
        first: The first router, (experts, d).
        index: From ``top1``.
        probability: Likewise.

    Returns:
        Gradients of the logits, (t, 2, padded experts), and of both routers, (2, experts, d).
    """
    rows, _, padded = probability.shape
    logits = torch.empty(probability.shape, dtype=x.dtype, device=x.device)
    experts = len(first)
    if rows:
        launch_kernel(_gate_logits_kernel, (_ceil(rows, 128), 2),
            grad.contiguous(), index, probability, logits, rows, experts, 128,
            _power_of_2(padded), padded, num_warps=4,
        )  # fmt: skip
    of_routers = wide_bmm(logits.flatten(1).t()[None], x[None], is_wide=True)[0]
    of_routers = of_routers.unflatten(0, (2, padded))[:, :experts].to(first.dtype)
    return logits, of_routers.contiguous()


@launched("routed_gates_backward")
def _routed_gates_backward(
    grad: Tensor, x: Tensor, first: Tensor, second: Tensor, index: Tensor, probability: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the tokens and of the routers."""
    logits, of_routers = gate_gradients(grad, x, first, index, probability)
    pad = (0, 0, 0, probability.shape[2] - first.shape[0])
    routers = torch.cat([F.pad(first, pad), F.pad(second, pad)]).to(x.dtype)
    # Copies: an operator's results may not share memory.
    return logits.flatten(1) @ routers, of_routers[0].clone(), of_routers[1].clone()


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
    weights = [z.contiguous() for z in (first, second) if z is not None]
    grad_x = grouped_input_gradient(grad, weights, order, ends)
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
