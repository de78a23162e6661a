"""Routed power map and token difference in one pass; the backward has a file of its own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.ops.kernels.grouped import _decide
from attnzoo.ops.kernels.power_map import _pivot, _unit_power
from attnzoo.ops.kernels.shared import (
    _LARGEST,
    _NORMAL,
    _add_dot,
    _ceil,
    _is_fast,
    _precision,
    _rows,
    _width,
)


@triton.jit
def _weights(weight, w_row, d, choices, column, C: tl.constexpr):
    """Columns ``column`` of a router's matrix (choices, d), as (C, columns)."""
    choice = tl.arange(0, C)
    mask = (choice[:, None] < choices) & (column < d)[None, :]
    return tl.load(weight + choice[:, None] * w_row + column[None, :], mask=mask, other=0.0)


@triton.jit
def _of_head(tile, head, H: tl.constexpr):
    """Column ``head`` of a tile (rows, H)."""
    return tl.sum(tl.where(tl.arange(0, H)[None, :] == head, tile, 0.0), 1)


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
    head_dim,
    NORMALIZE: tl.constexpr,
    SAVE: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    FAST: tl.constexpr,
):
    # Tokens are walked three times, from memory once: for the exponents, for the norms and the
    # factor, and for the result. With several heads no tile of columns spans two of them.
    sample = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    inside = block * R + tl.arange(0, R)
    is_row = inside < n
    row = sample.to(tl.int64) * n + inside
    dtype: tl.constexpr = out.dtype.element_ty
    line1 = z1 + row[:, None] * z1_row
    line2 = z2 + row[:, None] * z2_row

    peak_tile1 = tl.zeros((R, C), tl.float32)
    low_tile1 = tl.full((R, C), _LARGEST, tl.float32)
    peak_tile2 = tl.zeros((R, C), tl.float32)
    low_tile2 = tl.full((R, C), _LARGEST, tl.float32)
    logits1 = tl.zeros((R, G), tl.float32)
    logits2 = tl.zeros((R, G), tl.float32)
    for first in range(0, d, C):
        column = first + tl.arange(0, C)
        mask = is_row[:, None] & (column < d)[None, :]
        x = tl.load(line1 + column[None, :], mask=mask, other=0.0)
        w = _weights(r1, d, d, n_gamma, column, G)
        logits1 = _add_dot(logits1, x.to(w.dtype), tl.trans(w), P)
        x = x.to(tl.float32)
        peak_tile1 = tl.maximum(peak_tile1, x)
        low_tile1 = tl.minimum(low_tile1, tl.where(x > _NORMAL, x, _LARGEST))
        x = tl.load(line2 + column[None, :], mask=mask, other=0.0)
        w = _weights(r2, d, d, n_gamma, column, G)
        logits2 = _add_dot(logits2, x.to(w.dtype), tl.trans(w), P)
        x = x.to(tl.float32)
        peak_tile2 = tl.maximum(peak_tile2, x)
        low_tile2 = tl.minimum(low_tile2, tl.where(x > _NORMAL, x, _LARGEST))
    gamma1, p1, c1 = _decide(logits1, gammas, n_gamma, dtype, G)
    gamma2, p2, c2 = _decide(logits2, gammas + n_gamma, n_gamma, dtype, G)
    peak1 = tl.maximum(tl.max(peak_tile1, 1), _NORMAL)
    pivot1 = _pivot(gamma1, tl.min(low_tile1, 1), peak1)
    peak2 = tl.maximum(tl.max(peak_tile2, 1), _NORMAL)
    pivot2 = _pivot(gamma2, tl.min(low_tile2, 1), peak2)

    squares1 = tl.zeros((R, C), tl.float32)
    squares2 = tl.zeros((R, C), tl.float32)
    units1 = tl.zeros((R, C), tl.float32)
    units2 = tl.zeros((R, C), tl.float32)
    along = tl.zeros((R, C), tl.float32)
    normals = tl.zeros((R, H), tl.float32)
    heads = tl.arange(0, H)
    logits1 = tl.zeros((R, L), tl.float32)
    logits2 = tl.zeros((R, L), tl.float32)
    for first in range(0, d, C):
        column = first + tl.arange(0, C)
        is_column = (column < d)[None, :]
        mask = is_row[:, None] & is_column
        x = tl.load(line1 + column[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.where(x <= 0, 0.0, x)
        _, _, power = _unit_power(x, gamma1, pivot1, FAST)
        ratio = x * (1.0 / peak1)[:, None]
        squares1 += power * power
        units1 += ratio * ratio
        w = _weights(rd, 2 * d, d, n_lambda, column, L)
        logits1 = _add_dot(logits1, power.to(dtype).to(w.dtype), tl.trans(w), P)
        if NORMALIZE:
            total = tl.load(key_sum + sample * d + column, mask=column < d, other=0.0)
            if H == 1:
                along += power * total[None, :]
            else:
                sums_here = tl.sum(power * total[None, :], 1)[:, None]
                normals += tl.where(heads[None, :] == first // head_dim, sums_here, 0.0)
        x = tl.load(line2 + column[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.where(x <= 0, 0.0, x)
        _, _, power = _unit_power(x, gamma2, pivot2, FAST)
        ratio = x * (1.0 / peak2)[:, None]
        squares2 += power * power
        units2 += ratio * ratio
        w = _weights(rd + d, 2 * d, d, n_lambda, column, L)
        logits2 = _add_dot(logits2, power.to(dtype).to(w.dtype), tl.trans(w), P)
    norm1 = tl.maximum(tl.sqrt(tl.sum(squares1, 1)), _NORMAL)
    norm2 = tl.maximum(tl.sqrt(tl.sum(squares2, 1)), _NORMAL)
    scale1 = peak1 * tl.sqrt(tl.sum(units1, 1)) / norm1
    scale2 = peak2 * tl.sqrt(tl.sum(units2, 1)) / norm2
    logits = logits1 * scale1[:, None] + logits2 * scale2[:, None]
    factor, pd, cd = _decide(logits, lambdas, n_lambda, dtype, L)
    if NORMALIZE:
        if H == 1:
            normals = tl.sum(along, 1)[:, None]
        normals = normals * scale1[:, None] + eps

    for first in range(0, d, C):
        column = first + tl.arange(0, C)
        is_column = (column < d)[None, :]
        mask = is_row[:, None] & is_column
        x = tl.load(line1 + column[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.where(x <= 0, 0.0, x)
        _, _, power = _unit_power(x, gamma1, pivot1, FAST)
        result = (power * scale1[:, None]).to(dtype).to(tl.float32)
        if not NORMALIZE:
            place = tl.program_id(0).to(tl.int64) * d + column
            tl.store(sums + place, tl.sum(tl.where(mask, result, 0.0), 0), mask=column < d)
        x = tl.load(line2 + column[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.where(x <= 0, 0.0, x)
        _, _, power = _unit_power(x, gamma2, pivot2, FAST)
        redundant = (power * scale2[:, None]).to(dtype).to(tl.float32)
        result -= factor[:, None] * redundant
        if NORMALIZE:
            result *= (1.0 / _of_head(normals, first // head_dim, H))[:, None]
        tl.store(out + row[:, None] * d + column[None, :], result.to(dtype), mask=mask)
    if SAVE:
        tl.store(stats + row, gamma1, mask=is_row)
        tl.store(stats + rows + row, pivot1, mask=is_row)
        tl.store(stats + 2 * rows + row, norm1, mask=is_row)
        tl.store(stats + 3 * rows + row, scale1, mask=is_row)
        tl.store(stats + 4 * rows + row, gamma2, mask=is_row)
        tl.store(stats + 5 * rows + row, pivot2, mask=is_row)
        tl.store(stats + 6 * rows + row, norm2, mask=is_row)
        tl.store(stats + 7 * rows + row, scale2, mask=is_row)
        tl.store(stats + 8 * rows + row, factor, mask=is_row)
        if NORMALIZE:
            is_head = is_row[:, None] & (heads[None, :] * head_dim < d)
            tl.store(stats + (9 + heads[None, :]) * rows + row[:, None], normals, mask=is_head)
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


# Rows and columns of a tile, warps and stages.
DIFFERENCE_BLOCK = (16, 64, 2, 3)


def _columns(most: int, head_dim: int, heads: int) -> int:
    """Columns of a tile: at most ``most``, and within one head where there are several."""
    return most if heads == 1 else min(most, head_dim & -head_dim)


def difference_forward(
    z1: Tensor,
    z2: Tensor,
    routers: tuple[Tensor, Tensor, Tensor],
    gammas: Tensor,
    lambdas: Tensor,
    key_sum: Tensor | None,
    eps: float,
    heads: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``attnzoo.ops.fused.focused_difference``.

    Returns:
        The difference (b, n, d), the sum of the powered z1 over n (b, d) or nothing, statistics of
        the rows (9 + heads, t), choices (3, t), probabilities (t, 2 gammas + lambdas) for the
        backward.
    """
    b, n, d = z1.shape
    (z1, spacing1), (z2, spacing2) = _rows(z1), _rows(z2)
    r1, r2, rd = (router.contiguous() for router in routers)
    size, chunk, warps, stages = DIFFERENCE_BLOCK
    chunk = _columns(chunk, d // heads, heads)
    blocks = _ceil(n, size)
    rows, n_gamma, n_lambda = b * n, gammas.shape[1], lambdas.numel()

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=z1.device)

    out = new(b, n, d, dtype=z1.dtype)
    sums = new(b, blocks if key_sum is None else 0, d)
    kept = rows if save else 0
    stats, choices = new(9 + heads, kept), new(3, kept, dtype=torch.int32)
    probability = new(kept, 2 * n_gamma + n_lambda)
    if rows:
        _difference_kernel[(b * blocks,)](
            z1, z2, r1, r2, gammas, rd, lambdas, out if key_sum is None else key_sum,
            out, sums, stats, choices, probability, n, rows, d, spacing1, spacing2,
            n_gamma, n_lambda, eps, blocks, d // heads, key_sum is not None, save, size, chunk,
            triton.next_power_of_2(heads), _width(n_gamma), _width(n_lambda),
            _precision(r1.dtype), _is_fast(), num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out, sums.sum(1), stats, choices, probability
