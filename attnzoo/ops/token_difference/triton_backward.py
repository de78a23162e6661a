"""Gradients of the routed power map and token difference, from what the forward kept."""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.ops.power_map.triton import _exp2, _log2
from attnzoo.ops.token_difference.operands import SCHEMA, Operands
from attnzoo.ops.triton_common import (
    _LARGEST,
    _LN2,
    _NORMAL,
    _add_dot,
    _ceil,
    _dot,
    _is_fast,
    _power_of_2,
    _precision,
    _rows,
    _shared_memory,
    _width,
    column_sum,
    launch_kernel,
    launched,
    sample_sum,
)


@triton.jit
def _weights(weight, w_row, d, choices, column, C: tl.constexpr):
    """Columns ``column`` of a router's matrix (choices, d), as (C, columns)."""
    choice = tl.arange(0, C)
    mask = (choice[:, None] < choices) & (column < d)[None, :]
    return tl.load(weight + choice[:, None] * w_row + column[None, :], mask=mask, other=0.0)


@triton.jit
def _tile(line, column, is_row, d, EVEN: tl.constexpr):
    """Columns of the rows that ``line`` points to."""
    mask = is_row[:, None] if EVEN else is_row[:, None] & (column < d)[None, :]
    return tl.load(line + column[None, :], mask=mask, other=0.0)


@triton.jit
def _relu(x):
    """In float32; NaN stays."""
    return tl.maximum(x.to(tl.float32), 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _exponent(gamma):
    """gamma, but for 0: its product with the infinite logarithm of a 0 has to be one."""
    return tl.where(gamma == 0.0, 1e-30, gamma)


@triton.jit
def _risen(x, unit, exponent, FAST: tl.constexpr):
    """ReLU(x) over the pivot, which is ``unit``, to a power; powers of 0 are 0."""
    return tl.where(x <= _NORMAL, 0.0, _exp2(exponent[:, None] * _log2(unit, FAST), FAST))


@triton.jit
def _of_head(tile, head, H: tl.constexpr):
    """Column ``head`` of a tile (rows, H)."""
    return tl.sum(tl.where(tl.arange(0, H)[None, :] == head, tile, 0.0), 1)


@triton.jit
def _share(table, line, is_row, choices, C: tl.constexpr):
    """Straight-through gradient (R, C) of the logits, for one of the scalar they choose."""
    choice = tl.arange(0, C)
    is_choice = choice < choices
    values = tl.load(table + choice, mask=is_choice, other=0.0)
    p = tl.load(line + choice[None, :], mask=is_row[:, None] & is_choice[None, :], other=0.0)
    return p * (values[None, :] - tl.sum(p * values[None, :], 1)[:, None])


@triton.jit
def _table_gradient(grad, choice_of_row, is_row, C: tl.constexpr):
    """Of the values (C,) that rows chose from."""
    mine = (tl.arange(0, C)[None, :] == choice_of_row[:, None]) & is_row[:, None]
    return tl.sum(tl.where(mine, grad[:, None], 0.0), 0)


@triton.jit
def _power_and_log(x, gamma, shift, dead, FAST: tl.constexpr):
    """ReLU(x) over the pivot to a power, and the same times its logarithm; see ``_dead``."""
    log_unit = tl.where(x <= _NORMAL, dead[:, None], _log2(x, FAST) + shift[:, None])
    power = _exp2(gamma[:, None] * log_unit, FAST)
    return power, power * log_unit


@triton.jit
def _dead(gamma):
    """The logarithm of a 0, finite, so that its power times it is 0 too."""
    return tl.where(gamma < 0.0, _LARGEST, -_LARGEST)


@triton.jit
def _power_slope(grad, x, less, shift, along, steep, radial, FAST: tl.constexpr):
    """Gradient of x, given its row's numbers; ``less`` is gamma - 1."""
    slope = _exp2(less[:, None] * _log2(x, FAST) + shift[:, None], FAST)
    grad = grad - slope * x * along[:, None]
    grad = grad * slope * steep[:, None] + x * radial[:, None]
    return tl.where(x <= _NORMAL, 0.0, grad)


@triton.jit
def _add_products(total, a, b):
    """Adds a * b, (R, C), to (R, C / 2): neighbors lie in one thread, and take one register."""
    a0, a1 = tl.split(tl.reshape(a, (a.shape[0], a.shape[1] // 2, 2)))
    b0, b1 = tl.split(tl.reshape(b, (b.shape[0], b.shape[1] // 2, 2)))
    total += a0 * b0
    total += a1 * b1
    return total


@triton.jit
def _difference_backward_kernel(
    grad,
    grad_sum,
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
    shifts,
    grad_logits,
    grad_norm,
    grad_gammas,
    grad_lambdas,
    n,
    rows,
    d,
    z1_row,
    z2_row,
    grad_row,
    grad_z1_row,
    gammas_row,
    grad_gammas_part,
    grad_gammas_row,
    lambdas_part,
    n_gamma,
    n_lambda,
    eps,
    blocks,
    head_dim,
    NORMALIZE: tl.constexpr,
    LEARN: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    FAST: tl.constexpr,
    EVEN: tl.constexpr,
    S: tl.constexpr,
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
    gate_line = grad_logits + row[:, None] * (2 * G + L)
    g = tl.arange(0, G)
    lam = tl.arange(0, L)
    heads = tl.arange(0, H)
    gamma1 = tl.load(stats + row, mask=is_row, other=1.0)
    inverse1 = tl.load(stats + rows + row, mask=is_row, other=1.0)
    norm1 = tl.load(stats + 2 * rows + row, mask=is_row, other=1.0)
    scale1 = tl.load(stats + 3 * rows + row, mask=is_row, other=0.0)
    gamma2 = tl.load(stats + 4 * rows + row, mask=is_row, other=1.0)
    inverse2 = tl.load(stats + 5 * rows + row, mask=is_row, other=1.0)
    norm2 = tl.load(stats + 6 * rows + row, mask=is_row, other=1.0)
    scale2 = tl.load(stats + 7 * rows + row, mask=is_row, other=0.0)
    factor = tl.load(stats + 8 * rows + row, mask=is_row, other=0.0)
    gamma1 = _exponent(gamma1)
    gamma2 = _exponent(gamma2)
    shift1 = tl.log2(inverse1)
    shift2 = tl.log2(inverse2)
    # Of the powers with their norms restored, for the kernel that follows.
    tl.store(shifts + row, gamma1 * shift1 + tl.log2(scale1), mask=is_row)
    tl.store(shifts + rows + row, gamma2 * shift2 + tl.log2(scale2), mask=is_row)
    c1 = tl.load(choices + row, mask=is_row, other=0)
    c2 = tl.load(choices + rows + row, mask=is_row, other=0)
    cd = tl.load(choices + 2 * rows + row, mask=is_row, other=0)
    if NORMALIZE:
        is_head = is_row[:, None] & (heads[None, :] * head_dim < d)
        line_of_norms = stats + (9 + heads[None, :]) * rows + row[:, None]
        found = tl.load(line_of_norms, mask=is_head, other=1.0)
        over = 1.0 / found
    if LEARN:
        share = _share(lambdas, line + 2 * n_gamma, is_row, n_lambda, L)
        bend = share.to(dtype)
        # The compiler lays tiles out for products where what they are multiplied with comes from
        # one. Else it computes powers twice: as they are loaded, and as the products need them.
        left = tl.zeros((R, 16), dtype)
        right = tl.zeros((16, C), dtype)
        nothing = tl.sum(_add_dot(_dot(left, right, P), left, right, P), 1)
        shift1 += nothing
        shift2 += nothing

    # One walk for all sums over a row. What the gradients of the factor and of the normalizers
    # add to those of the powers is linear in them, and is added to the sums.
    along1 = tl.zeros((R, C // 2), tl.float32)
    along2 = tl.zeros((R, C // 2), tl.float32)
    slope1 = tl.zeros((R, C // 2), tl.float32)
    slope2 = tl.zeros((R, C // 2), tl.float32)
    self1 = tl.zeros((R, C // 2), tl.float32)
    self2 = tl.zeros((R, C // 2), tl.float32)
    bend_along1 = tl.zeros((R, C // 2), tl.float32)
    bend_along2 = tl.zeros((R, C // 2), tl.float32)
    bend_slope1 = tl.zeros((R, C // 2), tl.float32)
    bend_slope2 = tl.zeros((R, C // 2), tl.float32)
    total_slope = tl.zeros((R, C // 2), tl.float32)
    normals = tl.zeros((R, H), tl.float32)
    totals = tl.zeros((R, H), tl.float32)
    for first in tl.range(0, d, C, num_stages=S):
        column = first + tl.arange(0, C)
        gd = _tile(grad_line, column, is_row, d, EVEN).to(tl.float32)
        if NORMALIZE:
            head = 0 if H == 1 else first // head_dim
            gd *= _of_head(over, head, H)[:, None]
        x = _tile(line2, column, is_row, d, EVEN).to(tl.float32)
        power, slope = _power_and_log(x, gamma2, shift2, _dead(gamma2), FAST)
        along2 = _add_products(along2, gd, power)
        slope2 = _add_products(slope2, gd, slope)
        self2 = _add_products(self2, power, slope)
        if LEARN:
            w = _weights(rd + d, 2 * d, d, n_lambda, column, L)
            bent = _dot(bend.to(w.dtype), w, P)
            bend_along2 = _add_products(bend_along2, bent, power)
            bend_slope2 = _add_products(bend_slope2, bent, slope)
        if NORMALIZE and H > 1:
            here = tl.sum(gd * power, 1) * scale2 * factor
            normals += tl.where(heads[None, :] == head, here[:, None], 0.0)
        x = _tile(line1, column, is_row, d, EVEN).to(tl.float32)
        power, slope = _power_and_log(x, gamma1, shift1, _dead(gamma1), FAST)
        if NORMALIZE:
            total = tl.load(key_sum + sample * d + column, mask=column < d, other=0.0)[None, :]
            if H == 1:
                total_slope = _add_products(total_slope, slope, tl.broadcast_to(total, (R, C)))
            else:
                mine = heads[None, :] == head
                normals -= tl.where(mine, (tl.sum(gd * power, 1) * scale1)[:, None], 0.0)
                totals += tl.where(mine, tl.sum(slope * total, 1)[:, None], 0.0)
        else:
            gd += tl.load(grad_sum + sample * d + column, mask=column < d, other=0.0)[None, :]
        along1 = _add_products(along1, gd, power)
        slope1 = _add_products(slope1, gd, slope)
        self1 = _add_products(self1, power, slope)
        if LEARN:
            w = _weights(rd, 2 * d, d, n_lambda, column, L)
            bent = _dot(bend.to(w.dtype), w, P)
            bend_along1 = _add_products(bend_along1, bent, power)
            bend_slope1 = _add_products(bend_slope1, bent, slope)
    sum1 = tl.sum(along1, 1)
    sum2 = tl.sum(along2, 1)
    line_sum1 = tl.sum(slope1, 1)
    line_sum2 = -factor * tl.sum(slope2, 1)
    grad_factor = -scale2 * sum2
    if NORMALIZE:
        if H == 1:
            normals = (scale2 * factor * sum2 - scale1 * sum1)[:, None]
            totals = tl.sum(total_slope, 1)[:, None]
        # The gradients of the normalizers, which the forward found as phi(Z) . key_sum.
        normals *= over
        tl.store(grad_norm + heads[None, :] * rows + row[:, None], normals, mask=is_head)
        found = tl.where(is_head & (scale1 > 0.0)[:, None], (found - eps) / scale1[:, None], 0.0)
        sum1 += tl.sum(normals * found, 1)
        line_sum1 += tl.sum(normals * totals, 1)
    lambda_table = _table_gradient(grad_factor, cd, is_row, L)
    sum2 *= -factor
    if LEARN:
        gl = (grad_factor[:, None] * share).to(dtype)
        tl.store(gate_line + 2 * G + lam[None, :], gl, mask=is_row[:, None])
        sum1 += grad_factor * tl.sum(bend_along1, 1)
        sum2 += grad_factor * tl.sum(bend_along2, 1)
        line_sum1 += grad_factor * tl.sum(bend_slope1, 1)
        line_sum2 += grad_factor * tl.sum(bend_slope2, 1)
    mean1 = sum1 / norm1
    mean2 = sum2 / norm2
    grad_gamma1 = (line_sum1 - mean1 / norm1 * tl.sum(self1, 1)) * scale1 * _LN2
    grad_gamma2 = (line_sum2 - mean2 / norm2 * tl.sum(self2, 1)) * scale2 * _LN2
    gamma_table1 = _table_gradient(grad_gamma1, c1, is_row, G)
    gamma_table2 = _table_gradient(grad_gamma2, c2, is_row, G)
    if LEARN:
        g1 = grad_gamma1[:, None] * _share(gammas, line, is_row, n_gamma, G)
        g2 = grad_gamma2[:, None] * _share(gammas + gammas_row, line + n_gamma, is_row, n_gamma, G)
        g1 = g1.to(dtype)
        g2 = g2.to(dtype)
        tl.store(gate_line + g[None, :], g1, mask=is_row[:, None])
        tl.store(gate_line + G + g[None, :], g2, mask=is_row[:, None])
    along1 = mean1 / norm1 * inverse1
    steep1 = scale1 * gamma1 * inverse1
    radial1 = mean1 / tl.maximum(scale1 * norm1, _NORMAL)
    less1 = gamma1 - 1.0
    shift1 *= less1
    along2 = mean2 / norm2 * inverse2
    steep2 = scale2 * gamma2 * inverse2
    radial2 = mean2 / tl.maximum(scale2 * norm2, _NORMAL)
    less2 = gamma2 - 1.0
    shift2 *= less2

    gate_tile = tl.zeros((R, C // 2), tl.float32)
    for first in tl.range(0, d, C, num_stages=S):
        column = first + tl.arange(0, C)
        mask = is_row[:, None] & (column < d)[None, :]
        gd = _tile(grad_line, column, is_row, d, EVEN).to(tl.float32)
        if NORMALIZE:
            head = 0 if H == 1 else first // head_dim
            gd *= _of_head(over, head, H)[:, None]
        x = _tile(line2, column, is_row, d, EVEN).to(tl.float32)
        gx = -factor[:, None] * gd
        if LEARN:
            w = _weights(rd + d, 2 * d, d, n_lambda, column, L)
            gx += _dot(gl.to(w.dtype), w, P)
        gx = _power_slope(gx, x, less2, shift2, along2, steep2, radial2, FAST)
        if LEARN:
            w = _weights(r2, d, d, n_gamma, column, G)
            gx += _dot(g2.to(w.dtype), w, P)
        tl.store(grad_z2 + row[:, None] * d + column[None, :], gx.to(dtype), mask=mask)
        gate_tile = _add_products(gate_tile, gx, x)
        x = _tile(line1, column, is_row, d, EVEN).to(tl.float32)
        gx = gd
        if NORMALIZE:
            total = tl.load(key_sum + sample * d + column, mask=column < d, other=0.0)
            gx += _of_head(normals, head, H)[:, None] * total[None, :]
        else:
            gx += tl.load(grad_sum + sample * d + column, mask=column < d, other=0.0)[None, :]
        if LEARN:
            w = _weights(rd, 2 * d, d, n_lambda, column, L)
            gx += _dot(gl.to(w.dtype), w, P)
        gx = _power_slope(gx, x, less1, shift1, along1, steep1, radial1, FAST)
        if LEARN:
            w = _weights(r1, d, d, n_gamma, column, G)
            gx += _dot(g1.to(w.dtype), w, P)
        place = row[:, None] * grad_z1_row + column[None, :]
        tl.store(grad_z1 + place, gx.to(dtype), mask=mask)
    # Of the factor of 1 that multiplies z2, through which its own router learns.
    tl.store(grad_gate + row, tl.sum(gate_tile, 1), mask=is_row)
    part = tl.program_id(0).to(tl.int64)
    table = grad_gammas + part * grad_gammas_part + g
    tl.store(table, gamma_table1, mask=g < n_gamma)
    tl.store(table + grad_gammas_row, gamma_table2, mask=g < n_gamma)
    tl.store(grad_lambdas + part * lambdas_part + lam, lambda_table, mask=lam < n_lambda)


@triton.jit
def _restored(x, row, gammas, shifts, is_row, FAST: tl.constexpr):
    """What the forward made of tile ``x``."""
    gamma = _exponent(tl.load(gammas + row, mask=is_row, other=1.0))
    shift = tl.load(shifts + row, mask=is_row, other=0.0)
    power = _exp2(gamma[:, None] * _log2(x.to(tl.float32), FAST) + shift[:, None], FAST)
    return tl.where(x <= _NORMAL, 0.0, power)


@triton.jit
def _router_gradient_kernel(
    z1,
    z2,
    stats,
    shifts,
    grad_logits,
    grad_norm,
    grad_routers,
    grad_key_sum,
    n,
    rows,
    d,
    z1_row,
    z2_row,
    routers_part,
    n_gamma,
    n_lambda,
    splits,
    chunk,
    head_dim,
    NORMALIZE: tl.constexpr,
    LEARN: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    G: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    FAST: tl.constexpr,
    EVEN: tl.constexpr,
):
    column = tl.program_id(0) * C + tl.arange(0, C)
    is_column = (column < d)[None, :]
    part = tl.program_id(1).to(tl.int64)
    sample = part // splits
    start = (part % splits) * chunk
    stop = tl.minimum(start + chunk, n)
    dtype: tl.constexpr = z1.dtype.element_ty
    g = tl.arange(0, G)
    lam = tl.arange(0, L)
    total1 = tl.zeros((G, C), tl.float32)
    total2 = tl.zeros((G, C), tl.float32)
    base_total = tl.zeros((L, C), tl.float32)
    redundant_total = tl.zeros((L, C), tl.float32)
    key_total = tl.zeros((16, C), tl.float32)
    lines = tl.arange(0, 16)
    for first in range(start, stop, R):
        inside = first + tl.arange(0, R)
        is_row = inside < stop
        row = sample * n + inside
        line = grad_logits + row[None, :] * (2 * G + L)
        if LEARN:
            gl = tl.load(line + 2 * G + lam[:, None], mask=is_row[None, :], other=0.0)
            x = _tile(z2 + row[:, None] * z2_row, column, is_row, d, EVEN)
            g2 = tl.load(line + G + g[:, None], mask=is_row[None, :], other=0.0)
            total2 = _add_dot(total2, g2, x, P)
            redundant = _restored(x, row, stats + 4 * rows, shifts + rows, is_row, FAST)
            redundant_total = _add_dot(redundant_total, gl, redundant.to(dtype), P)
        x = _tile(z1 + row[:, None] * z1_row, column, is_row, d, EVEN)
        base = _restored(x, row, stats, shifts, is_row, FAST)
        if NORMALIZE:
            # As the first row of a product: a sum's layout would have powers computed twice.
            head = tl.program_id(0) * C // head_dim
            normal = tl.load(grad_norm + head * rows + row, mask=is_row, other=0.0)
            normal = tl.where(lines[:, None] == 0, normal[None, :], 0.0)
            key_total = _add_dot(key_total, normal.to(dtype), base.to(dtype), P)
        if LEARN:
            base_total = _add_dot(base_total, gl, base.to(dtype), P)
            g1 = tl.load(line + g[:, None], mask=is_row[None, :], other=0.0)
            total1 = _add_dot(total1, g1, x, P)
    if NORMALIZE:
        tl.store(grad_key_sum + part * d + column, tl.sum(key_total, 0), mask=column < d)
    if LEARN:
        is_g = (g[:, None] < n_gamma) & is_column
        is_l = (lam[:, None] < n_lambda) & is_column
        place = grad_routers + part * routers_part + column[None, :]
        tl.store(place + g[:, None] * d, total1, mask=is_g)
        tl.store(place + (n_gamma + g[:, None]) * d, total2, mask=is_g)
        place += 2 * n_gamma * d
        tl.store(place + lam[:, None] * (2 * d), base_total, mask=is_l)
        tl.store(place + lam[:, None] * (2 * d) + d, redundant_total, mask=is_l)


# Rows and columns of a tile, warps, and stages, of the kernel that walks along (z1, z2). Of few
# rows columns are split between warps, so that these fill more of a GPU.
DIFFERENCE_BACKWARD_BLOCK = (32, 16, 2, 3)
FEW_BACKWARD_BLOCK = (16, 64, 4, 3)
# Registers of a thread, which leave an H100 sixteen warps; what spills is used between walks.
BACKWARD_REGISTERS = 128
FEW_ROWS = 8192
# Rows and columns of the routers' gradients: products of 64 rows spill registers in float32.
ROUTER_GRADIENT_TILE = (32, 64)
ROUTER_PROGRAMS = 792


def _are_many(rows: int, z: Tensor) -> bool:
    """Whether rows fill a GPU by tiles of many; in float32 such tiles would spill registers."""
    return rows > FEW_ROWS and z.element_size() == 2


def _columns(most: int, head_dim: int, heads: int) -> int:
    """Columns of a tile: at most ``most``, and within one head where there are several."""
    return most if heads == 1 else min(most, head_dim & -head_dim)


def _fitting_columns(
    columns: int, rows: int, stages: int, choices: int, itemsize: int, room: int | None
) -> int:
    """Columns of a tile, ``columns`` or less, with which four routers of ``choices`` rows fit."""
    factors, loads = 3 * rows * choices * itemsize, max(1, stages - 1) * itemsize
    while room and columns > 16:
        if factors + loads * columns * (4 * choices + 3 * rows) + 2**14 <= room:
            break
        columns //= 2
    return columns


def _fitting_stages(operands: int, room: int | None) -> int:
    """How many loads of ``operands`` bytes, at most three, fit beside what a product takes."""
    stages = 3
    while room and (stages - 1) * operands + max(operands, 36 * 2**10) > room and stages > 1:
        stages -= 1
    return stages


class Parts(NamedTuple):
    """What programs of the backward leave of its weights' gradients, to be added up.

    Attributes:
        gammas: (programs, 2, factors), may be a slice of a wider tensor.
        lambdas: (programs, factors'), likewise.
        routers: (programs, numbers), likewise: of r1, r2 and rd, one behind the other.
    """

    gammas: Tensor
    lambdas: Tensor
    routers: Tensor


def new_parts(z1: Tensor, n_gamma: int, n_lambda: int, sides: int) -> list[Tensor]:
    """``Parts`` of several differences, (programs, ..., sides, ...): one sum serves them all."""
    b, n, d = z1.shape
    programs, splits = b * _ceil(n, _tile_of(z1)[0]), b * _split(z1)[0]
    shapes = (programs, 2, sides, n_gamma), (programs, sides, n_lambda)
    shapes = *shapes, (splits, sides, 2 * d * (n_gamma + n_lambda))
    return [torch.empty(s, dtype=torch.float32, device=z1.device) for s in shapes]


def _tile_of(z1: Tensor) -> tuple[int, ...]:
    is_many = _are_many(z1.shape[0] * z1.shape[1], z1)
    return DIFFERENCE_BACKWARD_BLOCK if is_many else FEW_BACKWARD_BLOCK


def _split(z1: Tensor) -> tuple[int, int]:
    """Into how many parts of how many tokens the routers' gradients split a sample."""
    b, n, d = z1.shape
    programs = max(1, b) * _ceil(d, ROUTER_GRADIENT_TILE[1])
    splits = max(1, min(_ceil(n, 256), _ceil(ROUTER_PROGRAMS, programs)))
    part = _ceil(_ceil(n, splits), 64) * 64
    return max(1, _ceil(n, part)), part


def difference_gradients(
    grad: Tensor,
    grad_sum: Tensor | None,
    saved: Sequence[Tensor],
    operands: Sequence[Any],
    found: tuple[Tensor, Tensor, Tensor],
    left: Parts,
) -> Tensor:
    """Writes gradients of ``difference_forward``.

    Args:
        grad: Of the difference.
        grad_sum: Of the sum, where the difference is not normalized.
        saved: Statistics, choices and probabilities.
        operands: ``Operands``.
        found: Where to put those of z1, which may be a slice of a wider tensor, of z2 and of the
            gate.
        left: Where to put parts of the others; routers' where ``learn`` is on.

    Returns:
        The gradient of key_sum, (b, d), or nothing.
    """
    z1, z2, r1, r2, rd, gammas, lambdas, _, key_sum, eps, heads, learn, _ = Operands(*operands)
    (stats, choices, probability), (grad_z1, grad_z2, grad_gate) = saved, found
    b, n, d = z1.shape
    (z1, spacing1), (z2, spacing2) = _rows(z1), _rows(z2)
    grad, grad_spacing = _rows(grad)
    r1, r2, rd = (router.contiguous() for router in (r1, r2, rd))
    size, chunk, warps, stages = _tile_of(z1)
    rows, n_gamma, n_lambda = b * n, gammas.shape[1], lambdas.numel()
    room, itemsize = _shared_memory(z1.device), max(z1.element_size(), r1.element_size())
    gammas_width, lambdas_width = _width(n_gamma), _width(n_lambda)
    if itemsize == 4:  # twice the bytes: one load under way
        stages = 2
    chunk = _fitting_columns(
        _columns(chunk, d // heads, heads), size, stages, max(gammas_width, lambdas_width),
        itemsize, room,
    )  # fmt: skip
    if chunk <= size:
        warps = size // 16  # the compiler lets warps share columns then, sixteen rows each
    blocks, is_normalized = _ceil(n, size), key_sum is not None

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=z1.device)

    grad_norm = new(heads, rows if is_normalized else 0)
    grad_logits = new(rows if learn else 0, 2 * gammas_width + lambdas_width, dtype=z1.dtype)
    shifts = new(2, rows)
    splits, part = _split(z1)
    grad_key_sum = new(b, splits if is_normalized else 0, d)
    stand_in = grad_gate if grad_sum is None else grad_sum.contiguous()
    if rows:
        shared = gammas_width, lambdas_width, _precision(r1.dtype), _is_fast()
        # Eight entries of a tile a thread, of half precision, do with those.
        is_small, is_half = size * chunk <= 256 * warps, z1.element_size() == 2
        limits = {"maxnreg": BACKWARD_REGISTERS} if is_half and _is_fast() else {}
        launch_kernel(_difference_backward_kernel, (b * blocks,),
            grad, stand_in, z1, z2, r1, r2, gammas, rd, lambdas,
            key_sum if is_normalized else stand_in, stats, choices, probability, grad_z1, grad_z2,
            grad_gate, shifts, grad_logits, grad_norm, left.gammas, left.lambdas, n, rows, d,
            spacing1, spacing2, grad_spacing, grad_z1.stride(1), gammas.stride(0),
            *left.gammas.stride()[:2], left.lambdas.stride(0), n_gamma, n_lambda, eps, blocks,
            d // heads, is_normalized, learn, size, chunk, _power_of_2(heads), *shared,
            d % chunk == 0, stages,
            num_warps=warps, **(limits if is_small else {}),
        )  # fmt: skip
        if learn or is_normalized:
            size, chunk = ROUTER_GRADIENT_TILE
            chunk = _columns(chunk, d // heads, heads)
            loaded = size * itemsize * (2 * chunk + 2 * gammas_width + lambdas_width)
            launch_kernel(_router_gradient_kernel, (_ceil(d, chunk), b * splits),
                z1, z2, stats, shifts, grad_logits, grad_norm, left.routers, grad_key_sum, n, rows,
                d, spacing1, spacing2, left.routers.stride(0), n_gamma, n_lambda, splits, part,
                d // heads, is_normalized, learn, size, chunk, *shared, d % chunk == 0,
                num_warps=4, num_stages=_fitting_stages(loaded, room), **limits,
            )  # fmt: skip
    return sample_sum(grad_key_sum) if is_normalized else grad_key_sum.flatten(1)


@launched(
    "focused_difference_backward",
    "(Tensor grad, Tensor? grad_sum, Tensor stats, Tensor choices, "
    f"Tensor probability, {SCHEMA}) -> ({', '.join(['Tensor'] * 7)})",
)
def difference_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    stats: Tensor,
    choices: Tensor,
    probability: Tensor,
    *operands: Any,
) -> tuple[Tensor, ...]:
    """Gradients of ``difference_forward``.

    Returns:
        Of z1, z2 (b, n, d); of the gate (b, n); of the routers r1, r2 and rd, one behind the
        other, unset where ``learn`` is off; of gammas (2, gammas) and lambdas; of key_sum (b, d)
        or nothing.
    """
    p = Operands(*operands)
    found = [torch.empty(p.z1.shape, dtype=p.z1.dtype, device=p.z1.device) for _ in range(2)]
    gate = p.gammas.new_empty(p.z1.shape[:2])
    gammas, lambdas, routers = new_parts(p.z1, p.gammas.shape[1], p.lambdas.numel(), 1)
    left = Parts(gammas[:, :, 0], lambdas[:, 0], routers[:, 0])
    saved = stats, choices, probability
    key_sum = difference_gradients(grad, grad_sum, saved, operands, (*found, gate), left)
    if not p.learn:
        routers.zero_()
    sums = column_sum(routers[:, 0], p.r1.dtype), column_sum(left.gammas), column_sum(left.lambdas)
    return *found, gate, *sums, key_sum


@difference_backward.register_fake
def _(grad: Tensor, grad_sum: Any, stats: Any, choices: Any, probability: Any,
      *operands: Any) -> tuple[Tensor, ...]:  # fmt: skip
    p = Operands(*operands)
    b, n, d = p.z1.shape
    wide = p.gammas.new_empty
    return (
        p.z1.new_empty(b, n, d), p.z1.new_empty(b, n, d), wide(b, n),
        p.r1.new_empty(p.r1.numel() + p.r2.numel() + p.rd.numel()), wide(p.gammas.shape),
        wide(p.lambdas.shape), wide(b, 0 if p.key_sum is None else d),
    )  # fmt: skip
