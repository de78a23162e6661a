"""Triton kernels behind ``attnzoo.ops.fused``, and the functions that launch them.

Importing this module needs Triton; nothing imports it unasked. Every kernel computes in float32
and runs under Triton's interpreter on a CPU. No launch waits for the device: sizes that depend on
the data (how many tokens chose an expert) stay there.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

_TINY = tl.constexpr(1e-30)  # entries this far below the largest count as 0
_NORMAL = tl.constexpr(1.1754943508222875e-38)
_LN2 = tl.constexpr(0.6931471805599453)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _width(n: int) -> int:
    """The next power of two a dot product accepts."""
    return max(16, triton.next_power_of_2(n))


def _precision(dtype: torch.dtype) -> str:
    """float32 operands stay float32-accurate unless the user has allowed TF32."""
    if triton.knobs.runtime.interpret:
        return "ieee"
    is_allowed = torch.backends.cuda.matmul.allow_tf32
    return "tf32" if dtype != torch.float32 or is_allowed else "tf32x3"


def _is_fast() -> bool:
    return not triton.knobs.runtime.interpret and torch.version.hip is None


def _rows(z: Tensor) -> tuple[Tensor, int]:
    """(b, n, d) or (t, d) with equally spaced rows of unit stride, and their spacing."""
    spacing = z.stride(-2)
    is_regular = z.stride(-1) == 1 and (z.dim() == 2 or z.stride(0) == z.shape[1] * spacing)
    z = z if is_regular or z.numel() == 0 else z.contiguous()
    return z, z.stride(-2)


@triton.jit
def _dot(a, b, P: tl.constexpr):
    if P == "ieee":
        # The interpreter would multiply the bits of bfloat16 operands as integers.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=P)


@triton.jit
def _add_dot(total, a, b, P: tl.constexpr):
    if P == "ieee":
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=P)


# ------------------------------------------------------------------ counting sort and grouped GEMM


@triton.jit
def _count_kernel(index, counts, total, experts: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    token = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(index + token, mask=token < total, other=experts).to(tl.int32)
    slots = tl.arange(0, experts)
    hits = (expert[:, None] == slots[None, :]).to(tl.int32)
    tl.store(counts + block * experts + slots, tl.sum(hits, 0))


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
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    block = tl.program_id(0)
    slots = tl.arange(0, experts)
    other = tl.arange(0, BLOCKS)
    table = tl.load(
        counts + other[:, None] * experts + slots[None, :], mask=other[:, None] < blocks, other=0
    )
    sums = tl.sum(table, 0)
    end = tl.cumsum(sums, 0)
    first = end - sums + tl.sum(tl.where(other[:, None] < block, table, 0), 0)
    token = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(index + token, mask=token < total, other=experts).to(tl.int32)
    hits = (expert[:, None] == slots[None, :]).to(tl.int32)
    place = tl.sum(hits * (first[None, :] + tl.cumsum(hits, 0) - 1), 1)
    tl.store(order + place, token, mask=token < total)
    if block == 0:
        tl.store(ends + slots, end, mask=slots < kept)


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
    total, slots = index.numel(), max(2, triton.next_power_of_2(experts))
    if order is None:
        order = torch.empty(total, dtype=torch.int32, device=index.device)
    if ends is None:
        ends = torch.empty(experts, dtype=torch.int32, device=index.device)
    # At most 1024 blocks, so that one program can hold the table of their counts.
    block = max(512, triton.next_power_of_2(_ceil(total, 1024)))
    blocks = max(1, _ceil(total, block))
    counts = torch.empty(blocks, slots, dtype=torch.int32, device=index.device)
    _count_kernel[(blocks,)](index, counts, total, slots, block)
    width = max(2, triton.next_power_of_2(blocks))
    _place_kernel[(blocks,)](
        index, counts, order, ends, total, blocks, experts, slots, block, width
    )
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
    N,
    K,
    a_row,
    b_expert,
    b_k,
    b_n,
    b_experts,
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
    tile = tl.program_id(0) // tiles_n
    column = (tl.program_id(0) % tiles_n) * N_BLOCK + tl.arange(0, N_BLOCK)
    slots = tl.arange(0, SLOTS)
    is_slot = slots < experts
    end = tl.load(ends + slots, mask=is_slot, other=0).to(tl.int32)
    start = tl.load(ends + slots - 1, mask=is_slot & (slots > 0), other=0).to(tl.int32)
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
        out = c + token.to(tl.int64)[:, None] * N + column[None, :]
        tl.store(out, total.to(c.dtype.element_ty), mask=is_row[:, None] & (column[None, :] < N))


@triton.jit
def _grouped_weight_kernel(
    a,
    g,
    out,
    order,
    ends,
    a_rows,
    M,
    N,
    a_row,
    g_row,
    M_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles_n = tl.cdiv(N, N_BLOCK)
    m = (tl.program_id(0) // tiles_n) * M_BLOCK + tl.arange(0, M_BLOCK)
    n = (tl.program_id(0) % tiles_n) * N_BLOCK + tl.arange(0, N_BLOCK)
    expert = tl.program_id(1)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0).to(tl.int32)
    stop = tl.load(ends + expert).to(tl.int32)
    total = tl.zeros((M_BLOCK, N_BLOCK), tl.float32)
    for first in range(start, stop, K_BLOCK):
        row = first + tl.arange(0, K_BLOCK)
        is_row = row < stop
        token = tl.load(order + row, mask=is_row, other=0).to(tl.int64)
        x = tl.load(
            a + (token % a_rows)[:, None] * a_row + m[None, :],
            mask=is_row[:, None] & (m[None, :] < M),
            other=0.0,
        )
        y = tl.load(
            g + token[:, None] * g_row + n[None, :],
            mask=is_row[:, None] & (n[None, :] < N),
            other=0.0,
        )
        total = _add_dot(total, tl.trans(x), y, PRECISION)
    tile = out + expert.to(tl.int64) * M * N + m[:, None] * N + n[None, :]
    tl.store(tile, total.to(out.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


# (rows, columns, depth of a tile, warps, stages) by bytes of an element.
GROUPED_TILES = {2: (128, 256, 64, 8, 4), 4: (64, 64, 32, 4, 2)}
WEIGHT_TILES = {2: (128, 128, 64, 8, 3), 4: (64, 64, 32, 4, 2)}


def _fitting(
    table: dict[int, tuple[int, ...]], itemsize: int, device: torch.device
) -> tuple[int, ...]:
    """The tile for elements of ``itemsize`` bytes, made smaller where shared memory is."""
    return _within(table[itemsize], itemsize, _shared_memory(device))


@functools.cache
def _shared_memory(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", None)


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
    a, spacing = _rows(a)
    experts, depth, width = weight.shape
    total = experts * (1 if other is None else 2)
    out = torch.empty(order.numel(), width, dtype=a.dtype, device=a.device)
    if out.numel() == 0:
        return out
    m, n, k, warps, stages = tiles or _fitting(GROUPED_TILES, a.element_size(), a.device)
    grid = ((_ceil(order.numel(), m) + total) * _ceil(width, n),)
    _grouped_kernel[grid](
        a, weight, weight if other is None else other, out, order, ends, a.shape[0], width, depth,
        spacing, *weight.stride(), experts, total, max(2, triton.next_power_of_2(total)), m, n, k,
        width % n == 0 and depth % k == 0, _precision(a.dtype), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def grouped_weight_gradient(
    a: Tensor, grad: Tensor, order: Tensor, ends: Tensor, experts: int,
    tiles: tuple[int, ...] | None = None,
) -> Tensor:  # fmt: skip
    """Sum of a_i^T grad_i over each expert's tokens: (rows, k), (t, n) -> (experts, k, n)."""
    a, spacing = _rows(a)
    grad, grad_spacing = _rows(grad)
    out = torch.empty(experts, a.shape[1], grad.shape[1], dtype=a.dtype, device=a.device)
    m, n, k, warps, stages = tiles or _fitting(WEIGHT_TILES, a.element_size(), a.device)
    grid = (_ceil(a.shape[1], m) * _ceil(grad.shape[1], n), experts)
    _grouped_weight_kernel[grid](
        a, grad, out, order, ends, max(1, a.shape[0]), a.shape[1], grad.shape[1], spacing,
        grad_spacing, m, n, k, _precision(a.dtype), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


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
        _top1_kernel[(_ceil(rows, 64),)](
            x, first.contiguous(), second.contiguous(), index, probability, rows, d, spacing,
            experts, 64, 64, _width(experts), padded, _precision(first.dtype), num_warps=4,
        )  # fmt: skip
    return index, probability


# --------------------------------------------------------------------------------- the power map


@triton.jit
def _log2(x, FAST: tl.constexpr):
    if FAST:  # the unit's own instruction; the library's function spends ten on the last digit
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.log2(x)


@triton.jit
def _unit_power(x, gamma, peak, is_column, FAST: tl.constexpr):
    unit = x / peak[:, None]
    # Not tl.maximum, which would hide a NaN.
    log_unit = _log2(tl.where(unit < _TINY, _TINY, unit), FAST)
    power = tl.where(is_column, tl.exp2(gamma[:, None] * log_unit), 0.0)
    return unit, log_unit, power


@triton.jit
def _power(x, gamma, is_column, FAST: tl.constexpr):
    """(unnormalised power, largest entry, norm of the power, factor that restores the norm)."""
    peak = tl.maximum(tl.max(x, 1), _NORMAL)
    unit, _, power = _unit_power(x, gamma, peak, is_column, FAST)
    norm = tl.maximum(tl.sqrt(tl.sum(power * power, 1)), _NORMAL)
    return power, peak, norm, peak * tl.sqrt(tl.sum(unit * unit, 1)) / norm


@triton.jit
def _power_backward(grad, x, gamma, peak, norm, scale, is_column, FAST: tl.constexpr):
    """Gradients of x^gamma / |x^gamma| * |x| with respect to x, tile, and gamma, row."""
    unit, log_unit, power = _unit_power(x, gamma, peak, is_column, FAST)
    along = tl.sum(grad * power, 1) / norm
    shared = (grad - power * (along / norm)[:, None]) * power * scale[:, None]
    grad_gamma = tl.sum(shared * log_unit, 1) * _LN2
    slope = tl.where(unit > _TINY, shared * gamma[:, None] / (unit * peak[:, None]), 0.0)
    x_norm = tl.maximum(scale * norm, _NORMAL)
    return slope + x * (along / x_norm)[:, None], grad_gamma


@triton.jit
def _power_map_kernel(
    z, gamma, out, stats, rows, d, z_row, R: tl.constexpr, D: tl.constexpr, FAST: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.arange(0, D)
    is_row = row < rows
    is_column = (column < d)[None, :]
    mask = is_row[:, None] & is_column
    x = tl.load(z + row[:, None] * z_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
    x = tl.where(x <= 0, 0.0, x)
    power, peak, norm, scale = _power(
        x, tl.load(gamma + row, mask=is_row, other=1.0), is_column, FAST
    )
    result = (power * scale[:, None]).to(out.dtype.element_ty)
    tl.store(out + row[:, None] * d + column[None, :], result, mask=mask)
    tl.store(stats + row, peak, mask=is_row)
    tl.store(stats + rows + row, norm, mask=is_row)
    tl.store(stats + 2 * rows + row, scale, mask=is_row)


@triton.jit
def _power_map_backward_kernel(
    grad, z, gamma, stats, grad_z, grad_gamma, rows, d, g_row, z_row,
    R: tl.constexpr, D: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.arange(0, D)
    is_row = row < rows
    is_column = (column < d)[None, :]
    mask = is_row[:, None] & is_column
    x = tl.load(z + row[:, None] * z_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
    x = tl.where(x <= 0, 0.0, x)
    g = tl.load(grad + row[:, None] * g_row + column[None, :], mask=mask, other=0.0)
    peak = tl.load(stats + row, mask=is_row, other=1.0)
    norm = tl.load(stats + rows + row, mask=is_row, other=1.0)
    scale = tl.load(stats + 2 * rows + row, mask=is_row, other=0.0)
    power = tl.load(gamma + row, mask=is_row, other=1.0)
    slope, gamma_slope = _power_backward(
        g.to(tl.float32), x, power, peak, norm, scale, is_column, FAST
    )
    slope = tl.where(x == 0, 0.0, slope).to(grad_z.dtype.element_ty)
    tl.store(grad_z + row[:, None] * d + column[None, :], slope, mask=mask)
    tl.store(grad_gamma + row, gamma_slope, mask=is_row)


def _row_block(d: int) -> tuple[int, int]:
    """Rows and warps of a program that holds whole rows."""
    width = triton.next_power_of_2(d)
    return max(1, 2048 // width), 2


def power_map_forward(z: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Power map of ReLU(z): (t, d), (t,) float32 -> (t, d) and (3, t) statistics of the rows."""
    z, spacing = _rows(z)
    rows, d = z.shape
    out = torch.empty(rows, d, dtype=z.dtype, device=z.device)
    stats = torch.empty(3, rows, dtype=torch.float32, device=z.device)
    block, warps = _row_block(d)
    if rows:
        _power_map_kernel[(_ceil(rows, block),)](
            z, gamma, out, stats, rows, d, spacing, block, triton.next_power_of_2(d),
            _is_fast(), num_warps=warps,
        )  # fmt: skip
    return out, stats


def power_map_backward(
    grad: Tensor, z: Tensor, gamma: Tensor, stats: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of ``power_map_forward`` with respect to z, (t, d), and gamma, (t,)."""
    z, spacing = _rows(z)
    grad, grad_spacing = _rows(grad)
    rows, d = z.shape
    grad_z = torch.empty(rows, d, dtype=z.dtype, device=z.device)
    grad_gamma = torch.empty(rows, dtype=torch.float32, device=z.device)
    block, warps = _row_block(d)
    if rows:
        _power_map_backward_kernel[(_ceil(rows, block),)](
            grad, z, gamma, stats, grad_z, grad_gamma, rows, d, grad_spacing, spacing, block,
            triton.next_power_of_2(d), _is_fast(), num_warps=warps,
        )  # fmt: skip
    return grad_z, grad_gamma


# ------------------------------------------- routed power map and token difference, in one pass


@triton.jit
def _weights(weight, w_row, d, choices, column, C: tl.constexpr):
    """Columns ``column`` of a router's matrix (choices, d), as (C, columns)."""
    choice = tl.arange(0, C)
    mask = (choice[:, None] < choices) & (column < d)[None, :]
    return tl.load(weight + choice[:, None] * w_row + column[None, :], mask=mask, other=0.0)


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
def _difference_kernel(
    z1,
    z2,
    r1,
    r2,
    gammas,
    rd,
    lambdas,
    key_sum,
    out,
    sums,
    stats,
    choices,
    probability,
    n,
    rows,
    d,
    z1_row,
    z2_row,
    n_gamma,
    n_lambda,
    eps,
    blocks,
    NORMALIZE: tl.constexpr,
    SAVE: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    G: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    FAST: tl.constexpr,
):
    # Tokens are walked three times, from memory once: for the exponents, for the norms and the
    # factor, and for the result.
    sample = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    inside = block * R + tl.arange(0, R)
    is_row = inside < n
    row = sample.to(tl.int64) * n + inside
    dtype: tl.constexpr = out.dtype.element_ty
    line1 = z1 + row[:, None] * z1_row
    line2 = z2 + row[:, None] * z2_row

    peak_tile1 = tl.zeros((R, C), tl.float32)
    peak_tile2 = tl.zeros((R, C), tl.float32)
    logits1 = tl.zeros((R, G), tl.float32)
    logits2 = tl.zeros((R, G), tl.float32)
    for first in range(0, d, C):
        column = first + tl.arange(0, C)
        mask = is_row[:, None] & (column < d)[None, :]
        x = tl.load(line1 + column[None, :], mask=mask, other=0.0)
        w = _weights(r1, d, d, n_gamma, column, G)
        logits1 = _add_dot(logits1, x.to(w.dtype), tl.trans(w), P)
        peak_tile1 = tl.maximum(peak_tile1, x.to(tl.float32))
        x = tl.load(line2 + column[None, :], mask=mask, other=0.0)
        w = _weights(r2, d, d, n_gamma, column, G)
        logits2 = _add_dot(logits2, x.to(w.dtype), tl.trans(w), P)
        peak_tile2 = tl.maximum(peak_tile2, x.to(tl.float32))
    gamma1, p1, c1 = _decide(logits1, gammas, n_gamma, dtype, G)
    gamma2, p2, c2 = _decide(logits2, gammas + n_gamma, n_gamma, dtype, G)
    peak1 = tl.maximum(tl.max(peak_tile1, 1), _NORMAL)
    peak2 = tl.maximum(tl.max(peak_tile2, 1), _NORMAL)

    squares1 = tl.zeros((R, C), tl.float32)
    squares2 = tl.zeros((R, C), tl.float32)
    units1 = tl.zeros((R, C), tl.float32)
    units2 = tl.zeros((R, C), tl.float32)
    along = tl.zeros((R, C), tl.float32)
    logits1 = tl.zeros((R, L), tl.float32)
    logits2 = tl.zeros((R, L), tl.float32)
    for first in range(0, d, C):
        column = first + tl.arange(0, C)
        is_column = (column < d)[None, :]
        mask = is_row[:, None] & is_column
        x = tl.load(line1 + column[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.where(x <= 0, 0.0, x)
        unit, _, power = _unit_power(x, gamma1, peak1, is_column, FAST)
        squares1 += power * power
        units1 += unit * unit
        w = _weights(rd, 2 * d, d, n_lambda, column, L)
        logits1 = _add_dot(logits1, power.to(dtype).to(w.dtype), tl.trans(w), P)
        if NORMALIZE:
            total = tl.load(key_sum + sample * d + column, mask=column < d, other=0.0)
            along += power * total[None, :]
        x = tl.load(line2 + column[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.where(x <= 0, 0.0, x)
        unit, _, power = _unit_power(x, gamma2, peak2, is_column, FAST)
        squares2 += power * power
        units2 += unit * unit
        w = _weights(rd + d, 2 * d, d, n_lambda, column, L)
        logits2 = _add_dot(logits2, power.to(dtype).to(w.dtype), tl.trans(w), P)
    norm1 = tl.maximum(tl.sqrt(tl.sum(squares1, 1)), _NORMAL)
    norm2 = tl.maximum(tl.sqrt(tl.sum(squares2, 1)), _NORMAL)
    scale1 = peak1 * tl.sqrt(tl.sum(units1, 1)) / norm1
    scale2 = peak2 * tl.sqrt(tl.sum(units2, 1)) / norm2
    logits = logits1 * scale1[:, None] + logits2 * scale2[:, None]
    factor, pd, cd = _decide(logits, lambdas, n_lambda, dtype, L)
    if NORMALIZE:
        norm = tl.sum(along, 1) * scale1 + eps
        outer = 1.0 / norm
    else:
        norm = factor
        outer = tl.full((R,), 1.0, tl.float32)

    for first in range(0, d, C):
        column = first + tl.arange(0, C)
        is_column = (column < d)[None, :]
        mask = is_row[:, None] & is_column
        x = tl.load(line1 + column[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.where(x <= 0, 0.0, x)
        _, _, power = _unit_power(x, gamma1, peak1, is_column, FAST)
        result = (power * scale1[:, None]).to(dtype).to(tl.float32)
        if not NORMALIZE:
            place = tl.program_id(0).to(tl.int64) * d + column
            tl.store(sums + place, tl.sum(tl.where(mask, result, 0.0), 0), mask=column < d)
        x = tl.load(line2 + column[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.where(x <= 0, 0.0, x)
        _, _, power = _unit_power(x, gamma2, peak2, is_column, FAST)
        redundant = (power * scale2[:, None]).to(dtype).to(tl.float32)
        result = (result - factor[:, None] * redundant) * outer[:, None]
        tl.store(out + row[:, None] * d + column[None, :], result.to(dtype), mask=mask)
    if SAVE:
        tl.store(stats + row, gamma1, mask=is_row)
        tl.store(stats + rows + row, peak1, mask=is_row)
        tl.store(stats + 2 * rows + row, norm1, mask=is_row)
        tl.store(stats + 3 * rows + row, scale1, mask=is_row)
        tl.store(stats + 4 * rows + row, gamma2, mask=is_row)
        tl.store(stats + 5 * rows + row, peak2, mask=is_row)
        tl.store(stats + 6 * rows + row, norm2, mask=is_row)
        tl.store(stats + 7 * rows + row, scale2, mask=is_row)
        tl.store(stats + 8 * rows + row, factor, mask=is_row)
        tl.store(stats + 9 * rows + row, norm, mask=is_row)
        tl.store(choices + row, c1, mask=is_row)
        tl.store(choices + rows + row, c2, mask=is_row)
        tl.store(choices + 2 * rows + row, cd, mask=is_row)
        width = 2 * n_gamma + n_lambda
        g = tl.arange(0, G)
        is_g = is_row[:, None] & (g[None, :] < n_gamma)
        line = probability + row[:, None] * width
        tl.store(line + g[None, :], p1, mask=is_g)
        tl.store(line + n_gamma + g[None, :], p2, mask=is_g)
        lam = tl.arange(0, L)
        is_l = is_row[:, None] & (lam[None, :] < n_lambda)
        tl.store(line + 2 * n_gamma + lam[None, :], pd, mask=is_l)


@triton.jit
def _scalar_backward(
    grad, table, choice_of_row, line, is_row, choices, LEARN: tl.constexpr, C: tl.constexpr
):
    """Straight-through gradients of a routed scalar: of the logits (R, C), of the table (C,)."""
    choice = tl.arange(0, C)
    is_choice = choice < choices
    mine = choice[None, :] == choice_of_row[:, None]
    grad_table = tl.sum(tl.where(mine & is_row[:, None], grad[:, None], 0.0), 0)
    if LEARN:
        values = tl.load(table + choice, mask=is_choice, other=0.0)
        p = tl.load(line + choice[None, :], mask=is_row[:, None] & is_choice[None, :], other=0.0)
        mean = tl.sum(p * values[None, :], 1)
        grad_logits = grad[:, None] * p * (values[None, :] - mean[:, None])
    else:
        grad_logits = tl.zeros(mine.shape, tl.float32)
    return grad_logits, grad_table


@triton.jit
def _power_slope(grad, z, gamma, peak, norm, scale, mean, x_norm, is_column, FAST: tl.constexpr):
    """Gradient of z, given <grad, power> / norm of the whole row as ``mean``."""
    x = tl.where(z <= 0, 0.0, z)
    unit, _, power = _unit_power(x, gamma, peak, is_column, FAST)
    shared = (grad - power * (mean / norm)[:, None]) * power * scale[:, None]
    slope = tl.where(unit > _TINY, shared * gamma[:, None] / (unit * peak[:, None]), 0.0)
    return tl.where(z <= 0, 0.0, slope + x * (mean / x_norm)[:, None])


@triton.jit
def _difference_backward_kernel(
    grad,
    grad_sum,
    out,
    z1,
    z2,
    r1,
    r2,
    gammas,
    rd,
    lambdas,
    key_sum,
    stats,
    choices,
    probability,
    grad_z1,
    grad_z2,
    grad_gate,
    grad_logits,
    grad_norm,
    grad_tables,
    n,
    rows,
    d,
    z1_row,
    z2_row,
    grad_row,
    n_gamma,
    n_lambda,
    blocks,
    NORMALIZE: tl.constexpr,
    LEARN: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    G: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    FAST: tl.constexpr,
):
    sample = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    inside = block * R + tl.arange(0, R)
    is_row = inside < n
    row = sample.to(tl.int64) * n + inside
    dtype: tl.constexpr = grad_z1.dtype.element_ty
    line1 = z1 + row[:, None] * z1_row
    line2 = z2 + row[:, None] * z2_row
    grad_line = grad + row[:, None] * grad_row
    width = 2 * n_gamma + n_lambda
    line = probability + row[:, None] * width
    gate_line = grad_logits + row[:, None] * width
    g = tl.arange(0, G)
    lam = tl.arange(0, L)
    is_g = is_row[:, None] & (g[None, :] < n_gamma)
    is_l = is_row[:, None] & (lam[None, :] < n_lambda)
    gamma1 = tl.load(stats + row, mask=is_row, other=1.0)
    peak1 = tl.load(stats + rows + row, mask=is_row, other=1.0)
    norm1 = tl.load(stats + 2 * rows + row, mask=is_row, other=1.0)
    scale1 = tl.load(stats + 3 * rows + row, mask=is_row, other=0.0)
    gamma2 = tl.load(stats + 4 * rows + row, mask=is_row, other=1.0)
    peak2 = tl.load(stats + 5 * rows + row, mask=is_row, other=1.0)
    norm2 = tl.load(stats + 6 * rows + row, mask=is_row, other=1.0)
    scale2 = tl.load(stats + 7 * rows + row, mask=is_row, other=0.0)
    factor = tl.load(stats + 8 * rows + row, mask=is_row, other=0.0)
    c1 = tl.load(choices + row, mask=is_row, other=0)
    c2 = tl.load(choices + rows + row, mask=is_row, other=0)
    cd = tl.load(choices + 2 * rows + row, mask=is_row, other=0)
    if NORMALIZE:
        outer = 1.0 / tl.load(stats + 9 * rows + row, mask=is_row, other=1.0)
    else:
        outer = tl.full((R,), 1.0, tl.float32)

    # Gradients of the factor and of the normaliser.
    factor_tile = tl.zeros((R, C), tl.float32)
    norm_tile = tl.zeros((R, C), tl.float32)
    for first in range(0, d, C):
        column = first + tl.arange(0, C)
        is_column = (column < d)[None, :]
        mask = is_row[:, None] & is_column
        gd = tl.load(grad_line + column[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(line2 + column[None, :], mask=mask, other=0.0).to(tl.float32)
        _, _, power = _unit_power(tl.where(x <= 0, 0.0, x), gamma2, peak2, is_column, FAST)
        factor_tile += gd * (power * scale2[:, None]).to(dtype).to(tl.float32)
        if NORMALIZE:
            place = row[:, None] * d + column[None, :]
            norm_tile += gd * tl.load(out + place, mask=mask, other=0.0).to(tl.float32)
    normal = -tl.sum(norm_tile, 1) * outer
    if NORMALIZE:
        tl.store(grad_norm + row, normal, mask=is_row)
    gl, lambda_table = _scalar_backward(
        -tl.sum(factor_tile, 1) * outer, lambdas, cd, line + 2 * n_gamma, is_row, n_lambda,
        LEARN, L,
    )  # fmt: skip
    gl = gl.to(dtype)
    if LEARN:
        tl.store(gate_line + 2 * n_gamma + lam[None, :], gl, mask=is_l)

    # The sums over a row that the power map's backward needs.
    along1 = tl.zeros((R, C), tl.float32)
    along2 = tl.zeros((R, C), tl.float32)
    slope1 = tl.zeros((R, C), tl.float32)
    slope2 = tl.zeros((R, C), tl.float32)
    self1 = tl.zeros((R, C), tl.float32)
    self2 = tl.zeros((R, C), tl.float32)
    for first in range(0, d, C):
        column = first + tl.arange(0, C)
        is_column = (column < d)[None, :]
        mask = is_row[:, None] & is_column
        gd = tl.load(grad_line + column[None, :], mask=mask, other=0.0).to(tl.float32)
        gd = gd * outer[:, None]
        gx = -factor[:, None] * gd
        if LEARN:
            w = _weights(rd + d, 2 * d, d, n_lambda, column, L)
            gx += _dot(gl.to(w.dtype), w, P)
        x = tl.load(line2 + column[None, :], mask=mask, other=0.0).to(tl.float32)
        _, log_unit, power = _unit_power(tl.where(x <= 0, 0.0, x), gamma2, peak2, is_column, FAST)
        along2 += gx * power
        slope2 += gx * power * log_unit
        self2 += power * power * log_unit
        gx = gd
        if NORMALIZE:
            total = tl.load(key_sum + sample * d + column, mask=column < d, other=0.0)
            gx += normal[:, None] * total[None, :]
        else:
            gx += tl.load(grad_sum + sample * d + column, mask=column < d, other=0.0)[None, :]
        if LEARN:
            w = _weights(rd, 2 * d, d, n_lambda, column, L)
            gx += _dot(gl.to(w.dtype), w, P)
        x = tl.load(line1 + column[None, :], mask=mask, other=0.0).to(tl.float32)
        _, log_unit, power = _unit_power(tl.where(x <= 0, 0.0, x), gamma1, peak1, is_column, FAST)
        along1 += gx * power
        slope1 += gx * power * log_unit
        self1 += power * power * log_unit
    mean1 = tl.sum(along1, 1) / norm1
    mean2 = tl.sum(along2, 1) / norm2
    grad_gamma1 = (tl.sum(slope1, 1) - mean1 / norm1 * tl.sum(self1, 1)) * scale1 * _LN2
    grad_gamma2 = (tl.sum(slope2, 1) - mean2 / norm2 * tl.sum(self2, 1)) * scale2 * _LN2
    g1, gamma_table1 = _scalar_backward(grad_gamma1, gammas, c1, line, is_row, n_gamma, LEARN, G)
    g2, gamma_table2 = _scalar_backward(
        grad_gamma2, gammas + n_gamma, c2, line + n_gamma, is_row, n_gamma, LEARN, G
    )
    g1 = g1.to(dtype)
    g2 = g2.to(dtype)
    if LEARN:
        tl.store(gate_line + g[None, :], g1, mask=is_g)
        tl.store(gate_line + n_gamma + g[None, :], g2, mask=is_g)
    x_norm1 = tl.maximum(scale1 * norm1, _NORMAL)
    x_norm2 = tl.maximum(scale2 * norm2, _NORMAL)

    gate_tile = tl.zeros((R, C), tl.float32)
    for first in range(0, d, C):
        column = first + tl.arange(0, C)
        is_column = (column < d)[None, :]
        mask = is_row[:, None] & is_column
        place = row[:, None] * d + column[None, :]
        gd = tl.load(grad_line + column[None, :], mask=mask, other=0.0).to(tl.float32)
        gd = gd * outer[:, None]
        z = tl.load(line2 + column[None, :], mask=mask, other=0.0).to(tl.float32)
        gx = -factor[:, None] * gd
        if LEARN:
            w = _weights(rd + d, 2 * d, d, n_lambda, column, L)
            gx += _dot(gl.to(w.dtype), w, P)
        gx = _power_slope(gx, z, gamma2, peak2, norm2, scale2, mean2, x_norm2, is_column, FAST)
        if LEARN:
            w = _weights(r2, d, d, n_gamma, column, G)
            gx += _dot(g2.to(w.dtype), w, P)
        tl.store(grad_z2 + place, gx.to(dtype), mask=mask)
        gate_tile += gx * z
        z = tl.load(line1 + column[None, :], mask=mask, other=0.0).to(tl.float32)
        gx = gd
        if NORMALIZE:
            total = tl.load(key_sum + sample * d + column, mask=column < d, other=0.0)
            gx += normal[:, None] * total[None, :]
        else:
            gx += tl.load(grad_sum + sample * d + column, mask=column < d, other=0.0)[None, :]
        if LEARN:
            w = _weights(rd, 2 * d, d, n_lambda, column, L)
            gx += _dot(gl.to(w.dtype), w, P)
        gx = _power_slope(gx, z, gamma1, peak1, norm1, scale1, mean1, x_norm1, is_column, FAST)
        if LEARN:
            w = _weights(r1, d, d, n_gamma, column, G)
            gx += _dot(g1.to(w.dtype), w, P)
        tl.store(grad_z1 + place, gx.to(dtype), mask=mask)
    # Of the factor of 1 that multiplies z2, through which its own router learns.
    tl.store(grad_gate + row, tl.sum(gate_tile, 1), mask=is_row)
    tables = grad_tables + tl.program_id(0).to(tl.int64) * width
    tl.store(tables + g, gamma_table1, mask=g < n_gamma)
    tl.store(tables + n_gamma + g, gamma_table2, mask=g < n_gamma)
    tl.store(tables + 2 * n_gamma + lam, lambda_table, mask=lam < n_lambda)


@triton.jit
def _restored(
    z, row, rows, stats, first, is_row, is_column, dtype: tl.constexpr, FAST: tl.constexpr
):
    """What the forward made of tile ``z``, from the rows' saved statistics."""
    x = z.to(tl.float32)
    gamma = tl.load(stats + first * rows + row, mask=is_row, other=1.0)
    peak = tl.load(stats + (first + 1) * rows + row, mask=is_row, other=1.0)
    scale = tl.load(stats + (first + 3) * rows + row, mask=is_row, other=0.0)
    _, _, power = _unit_power(tl.where(x <= 0, 0.0, x), gamma, peak, is_column, FAST)
    return (power * scale[:, None]).to(dtype)


@triton.jit
def _router_gradient_kernel(
    z1,
    z2,
    stats,
    grad_logits,
    grad_norm,
    grad_r1,
    grad_r2,
    grad_rd,
    grad_key_sum,
    n,
    rows,
    d,
    z1_row,
    z2_row,
    n_gamma,
    n_lambda,
    splits,
    chunk,
    NORMALIZE: tl.constexpr,
    LEARN: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    G: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    FAST: tl.constexpr,
):
    column = tl.program_id(0) * C + tl.arange(0, C)
    is_column = (column < d)[None, :]
    part = tl.program_id(1).to(tl.int64)
    sample = part // splits
    start = (part % splits) * chunk
    stop = tl.minimum(start + chunk, n)
    dtype: tl.constexpr = z1.dtype.element_ty
    width = 2 * n_gamma + n_lambda
    g = tl.arange(0, G)
    lam = tl.arange(0, L)
    total1 = tl.zeros((G, C), tl.float32)
    total2 = tl.zeros((G, C), tl.float32)
    base_total = tl.zeros((L, C), tl.float32)
    redundant_total = tl.zeros((L, C), tl.float32)
    key_total = tl.zeros((C,), tl.float32)
    for first in range(start, stop, R):
        inside = first + tl.arange(0, R)
        is_row = inside < stop
        row = sample * n + inside
        mask = is_row[:, None] & is_column
        z = tl.load(z1 + row[:, None] * z1_row + column[None, :], mask=mask, other=0.0)
        base = _restored(z, row, rows, stats, 0, is_row, is_column, dtype, FAST)
        if NORMALIZE:
            normal = tl.load(grad_norm + row, mask=is_row, other=0.0)
            key_total += tl.sum(normal[:, None] * base.to(tl.float32), 0)
        if LEARN:
            line = grad_logits + row[:, None] * width
            is_g = is_row[:, None] & (g[None, :] < n_gamma)
            is_l = is_row[:, None] & (lam[None, :] < n_lambda)
            g1 = tl.load(line + g[None, :], mask=is_g, other=0.0)
            g2 = tl.load(line + n_gamma + g[None, :], mask=is_g, other=0.0)
            gl = tl.load(line + 2 * n_gamma + lam[None, :], mask=is_l, other=0.0)
            total1 = _add_dot(total1, tl.trans(g1), z, P)
            base_total = _add_dot(base_total, tl.trans(gl), base, P)
            z = tl.load(z2 + row[:, None] * z2_row + column[None, :], mask=mask, other=0.0)
            total2 = _add_dot(total2, tl.trans(g2), z, P)
            redundant = _restored(z, row, rows, stats, 4, is_row, is_column, dtype, FAST)
            redundant_total = _add_dot(redundant_total, tl.trans(gl), redundant, P)
    if NORMALIZE:
        tl.store(grad_key_sum + part * d + column, key_total, mask=column < d)
    if LEARN:
        is_g = (g[:, None] < n_gamma) & is_column
        is_l = (lam[:, None] < n_lambda) & is_column
        place = (part * n_gamma + g[:, None]) * d + column[None, :]
        tl.store(grad_r1 + place, total1, mask=is_g)
        tl.store(grad_r2 + place, total2, mask=is_g)
        place = (part * n_lambda + lam[:, None]) * 2 * d + column[None, :]
        tl.store(grad_rd + place, base_total, mask=is_l)
        tl.store(grad_rd + place + d, redundant_total, mask=is_l)


# Rows and columns of a tile, warps and stages, of the two kernels that walk along (z1, z2).
DIFFERENCE_BLOCK = (16, 64, 2, 2)
DIFFERENCE_BACKWARD_BLOCK = (16, 128, 4, 2)


def difference_forward(
    z1: Tensor,
    z2: Tensor,
    routers: tuple[Tensor, Tensor, Tensor],
    gammas: Tensor,
    lambdas: Tensor,
    key_sum: Tensor | None,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``attnzoo.ops.fused.focused_difference``.

    Returns:
        The difference (b, n, d), the sum of the powered z1 over n (b, d) or nothing, statistics of
        the rows (10, t), choices (3, t), probabilities (t, 2 gammas + lambdas) for the backward.
    """
    b, n, d = z1.shape
    (z1, spacing1), (z2, spacing2) = _rows(z1), _rows(z2)
    r1, r2, rd = (router.contiguous() for router in routers)
    size, chunk, warps, stages = DIFFERENCE_BLOCK
    blocks = _ceil(n, size)
    rows, n_gamma, n_lambda = b * n, gammas.shape[1], lambdas.numel()

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=z1.device)

    out = new(b, n, d, dtype=z1.dtype)
    sums = new(b, blocks if key_sum is None else 0, d)
    kept = rows if save else 0
    stats, choices = new(10, kept), new(3, kept, dtype=torch.int32)
    probability = new(kept, 2 * n_gamma + n_lambda)
    if rows:
        _difference_kernel[(b * blocks,)](
            z1, z2, r1, r2, gammas, rd, lambdas, out if key_sum is None else key_sum,
            out, sums, stats, choices, probability, n, rows, d, spacing1, spacing2,
            n_gamma, n_lambda, eps, blocks, key_sum is not None, save, size, chunk,
            _width(n_gamma), _width(n_lambda), _precision(r1.dtype), _is_fast(),
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out, sums.sum(1), stats, choices, probability


def difference_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    out: Tensor,
    z1: Tensor,
    z2: Tensor,
    routers: tuple[Tensor, Tensor, Tensor],
    gammas: Tensor,
    lambdas: Tensor,
    key_sum: Tensor | None,
    saved: tuple[Tensor, Tensor, Tensor],
    learn: bool,
) -> tuple[Tensor, ...]:
    """Gradients of ``difference_forward``.

    Returns:
        Of z1, z2 (b, n, d); of the gate (b, n); of the three routers; of gammas; of lambdas; of
        key_sum (b, d) or nothing. Routers get 0 where ``learn`` is off.
    """
    b, n, d = z1.shape
    (z1, spacing1), (z2, spacing2) = _rows(z1), _rows(z2)
    grad, grad_spacing = _rows(grad)
    r1, r2, rd = (router.contiguous() for router in routers)
    stats, choices, probability = saved
    size, chunk, warps, stages = DIFFERENCE_BACKWARD_BLOCK
    blocks = _ceil(n, size)
    rows, n_gamma, n_lambda = b * n, gammas.shape[1], lambdas.numel()
    width, is_normalized = 2 * n_gamma + n_lambda, key_sum is not None

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=z1.device)

    grad_z1, grad_z2 = new(b, n, d, dtype=z1.dtype), new(b, n, d, dtype=z1.dtype)
    grad_gate, grad_norm = new(b, n), new(rows if is_normalized else 0)
    grad_logits = new(rows if learn else 0, width, dtype=z1.dtype)
    tables = new(b * blocks, width)
    splits = max(1, min(_ceil(n, 256), _ceil(64, max(b, 1))))
    part = _ceil(_ceil(n, splits), 64) * 64
    splits = max(1, _ceil(n, part))
    parts = b * splits
    grad_r1, grad_r2 = (new(parts if learn else 0, n_gamma, d) for _ in range(2))
    grad_rd = new(parts if learn else 0, n_lambda, 2 * d)
    grad_key_sum = new(b, splits if is_normalized else 0, d)
    stand_in = grad_gate if grad_sum is None else grad_sum.contiguous()
    if rows:
        shared = _width(n_gamma), _width(n_lambda), _precision(r1.dtype), _is_fast()
        _difference_backward_kernel[(b * blocks,)](
            grad, stand_in, out, z1, z2, r1, r2, gammas, rd, lambdas,
            key_sum if is_normalized else stand_in, stats, choices, probability, grad_z1, grad_z2,
            grad_gate, grad_logits, grad_norm, tables, n, rows, d, spacing1, spacing2,
            grad_spacing, n_gamma, n_lambda, blocks, is_normalized, learn, size, chunk,
            *shared, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if learn or is_normalized:
            column_block = 64
            _router_gradient_kernel[(_ceil(d, column_block), parts)](
                z1, z2, stats, grad_logits, grad_norm, grad_r1, grad_r2, grad_rd, grad_key_sum,
                n, rows, d, spacing1, spacing2, n_gamma, n_lambda, splits, part, is_normalized,
                learn, 64, column_block, *shared, num_warps=4,
            )  # fmt: skip
    table = tables.sum(0)
    return (
        grad_z1, grad_z2, grad_gate, grad_r1.sum(0), grad_r2.sum(0), grad_rd.sum(0),
        table[: 2 * n_gamma].reshape(2, n_gamma).clone(), table[2 * n_gamma :].clone(),
        grad_key_sum.sum(1),
    )  # fmt: skip


# -------------------------------------------------------------------------- 3x3 depthwise stencil


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
    x, weight, bias, added, out, height, width, c, x_row, strips, ROWS: tl.constexpr,
    W: tl.constexpr, C: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    FLIP: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // strips).to(tl.int64)
    first = (tl.program_id(0) % strips) * ROWS
    w = tl.program_id(1) * W + tl.arange(0, W)
    column = tl.program_id(2) * C + tl.arange(0, C)
    is_column = (column < c)[None, :]
    tap = weight + column * 9
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
            total += tl.load(bias + column, mask=is_tap, other=0.0).to(tl.float32)[None, :]
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


# Rows a program walks down, pixels and channels of its tile, warps.
STENCIL_BLOCK = (4, 32, 64, 4)
STENCIL_WEIGHT_BLOCK = (16, 8, 64, 4)


def stencil(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: tuple[int, int],
    added: Tensor | None = None,
    is_transposed: bool = False,
) -> Tensor:
    """3x3 depthwise convolution of tokens, with zero padding.

    Args:
        x: (b, h * w, c).
        weight: (c, 1, 3, 3).
        bias: (c,) or None.
        grid: (h, w).
        added: (b, h * w, c), added to the result, or None.
        is_transposed: Applies the adjoint, for the gradient of x.

    Returns:
        (b, h * w, c).
    """
    x, spacing = _rows(x)
    b, n, c = x.shape
    out = torch.empty(b, n, c, dtype=x.dtype, device=x.device)
    rows, w, channels, warps = STENCIL_BLOCK
    strips = _ceil(grid[0], rows)
    if out.numel():
        _stencil_kernel[(b * strips, _ceil(grid[1], w), _ceil(c, channels))](
            x, weight.contiguous(), weight if bias is None else bias,
            out if added is None else added.contiguous(), out, *grid, c, spacing, strips, rows, w,
            channels, bias is not None, added is not None, is_transposed, num_warps=warps,
        )  # fmt: skip
    return out


def stencil_weight_gradient(
    x: Tensor, grad: Tensor, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Gradients of weight, (c, 1, 3, 3), and bias, (c,), in float32."""
    (x, spacing), (grad, grad_spacing) = _rows(x), _rows(grad)
    b, _, c = x.shape
    rows, w, channels, warps = STENCIL_WEIGHT_BLOCK
    strips, blocks = _ceil(grid[0], rows), _ceil(grid[1], w)
    partial = torch.empty(b * strips * blocks, 10, c, dtype=torch.float32, device=x.device)
    if partial.numel():
        _stencil_weight_kernel[(b * strips, blocks, _ceil(c, channels))](
            x, grad, partial, *grid, c, spacing, grad_spacing, strips, blocks, rows, w, channels,
            num_warps=warps,
        )  # fmt: skip
    total = partial.sum(0)
    return total[:9].t().contiguous().view(c, 1, 3, 3), total[9].clone()
