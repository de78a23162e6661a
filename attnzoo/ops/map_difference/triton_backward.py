"""Gradients of map-wise DyDiLA, from what the forward kept."""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.ops.linear_core.torch import is_quadratic_cheaper, wide_bmm
from attnzoo.ops.map_difference.operands import SCHEMA, Operands
from attnzoo.ops.token_difference.triton_backward import (
    _dead,
    _exponent,
    _power_and_log,
    _power_slope,
    _restored,
    _share,
    _table_gradient,
    _tile,
)
from attnzoo.ops.triton_common import (
    _LN2,
    _NORMAL,
    _add_dot,
    _ceil,
    _dot,
    _is_fast,
    _precision,
    _rows,
    _width,
    column_sum,
    launch_kernel,
    launched,
)


class Tiles(NamedTuple):
    """How rows are held in registers.

    Attributes:
        count: Tiles of a row.
        warps: Of a program, each of which takes its own columns of all rows.
    """

    count: int
    warps: int

    @classmethod
    def of(cls, width: int, z: Tensor) -> Tiles:
        """For tokens of that width: a thread takes few enough entries for its registers."""
        warps = 4
        while warps < 16 and width * z.element_size() > MOST_BYTES * warps:
            warps *= 2
        return cls(_ceil(width, COLUMNS.value * warps), warps)

    @property
    def columns(self) -> int:
        """Of a tile."""
        return COLUMNS.value * self.warps


ROWS, COLUMNS = tl.constexpr(16), tl.constexpr(32)  # of a warp in a tile
MOST_BYTES = 200  # of a row in the registers of a warp
GRADIENT_REGISTERS = 0  # of a thread; 0 leaves it to the compiler
# Rows and columns of a tile of the routers' gradients, and how many programs these want.
ROUTER_TILE, ROUTER_PROGRAMS = (32, 64), 264


def _limit(registers: int, z: Tensor) -> dict[str, int]:
    """What Triton is told of a thread's registers."""
    is_limited = registers and z.element_size() == 2 and _is_fast()
    return {"maxnreg": registers} if is_limited else {}


@triton.jit
def _ordered(tile, dtype: tl.constexpr):
    """A tile (W, rows, columns) with its columns in another order.

    A product may sum over columns in any order. In this one a thread's part of the operand is
    what it loaded, 16 bytes of a row at once.
    """
    if dtype == tl.float32:
        return tile
    W: tl.constexpr = tile.shape[0]
    M: tl.constexpr = tile.shape[1]
    tile = tl.reshape(tile, (W, M, 4, 4, 2))
    return tl.reshape(tl.permute(tile, (0, 1, 3, 2, 4)), (W, M, COLUMNS))


@triton.jit
def _place(row, spacing, i: tl.constexpr, W: tl.constexpr):
    """Offsets (2, W, 8, columns) of sixteen rows, so that a warp loads all rows of its columns."""
    return tl.reshape(row, (2, 1, 8, 1)) * spacing + _columns(i, W)[None, :, None, :]


@triton.jit
def _columns(i: tl.constexpr, W: tl.constexpr):
    """Columns (W, columns) of tile ``i``."""
    return (i * W + tl.arange(0, W))[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _mask(is_row, d, i: tl.constexpr, W: tl.constexpr, EVEN: tl.constexpr):
    mask = tl.reshape(is_row, (2, 1, 8, 1))
    return mask if EVEN else mask & (_columns(i, W) < d)[None, :, None, :]


@triton.jit
def _read(
    z, row, spacing, is_row, d, i: tl.constexpr, W: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """Tile ``i`` of rows, (W, rows, columns)."""
    mask = _mask(is_row, d, i, W, EVEN)
    x = tl.load(z + _place(row, spacing, i, W), mask=mask, other=0.0)
    x = tl.reshape(tl.permute(x, (1, 0, 2, 3)), (W, ROWS, COLUMNS))
    return _ordered(x, z.dtype.element_ty)


@triton.jit
def _loaded(
    z, row, spacing, is_row, d, N: tl.constexpr, W: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """Rows in N tiles."""
    tiles = ()
    for i in tl.static_range(N):
        tiles += (_read(z, row, spacing, is_row, d, i, W, EVEN),)
    return tiles


@triton.jit
def _vector(x, is_row, d, i: tl.constexpr, W: tl.constexpr, EVEN: tl.constexpr):
    """Tile ``i`` of a vector, for all rows: read as they are, it lies in threads as they do."""
    return _read(x, tl.zeros((ROWS,), tl.int32), 0, is_row, d, i, W, EVEN).to(tl.float32)


@triton.jit
def _stored(
    out, tile, row, spacing, is_row, d, i: tl.constexpr, W: tl.constexpr, EVEN: tl.constexpr
):
    """Stores a tile in its place."""
    dtype: tl.constexpr = out.dtype.element_ty
    tile = tile.to(dtype)
    if dtype != tl.float32:
        tile = tl.permute(tl.reshape(tile, (W, ROWS, 4, 4, 2)), (0, 1, 3, 2, 4))
    tile = tl.permute(tl.reshape(tile, (W, 2, 8, COLUMNS)), (1, 0, 2, 3))
    tl.store(out + _place(row, spacing, i, W), tile, mask=_mask(is_row, d, i, W, EVEN))


@triton.jit
def _table(
    router, spacing, d, choices, i: tl.constexpr, W: tl.constexpr, G: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """Columns of a router's matrix (choices, d) for a tile, (W, G, columns)."""
    choice = tl.arange(0, G)[None, :, None]
    column = _columns(i, W)[:, None, :]
    mask = (choice < choices) & (column < d)
    return _ordered(tl.load(router + choice * spacing + column, mask=mask, other=0.0), dtype)


@triton.jit
def _add_logits(total, x, w, P: tl.constexpr):
    """Adds a tile's part of the products with a router's ``_table``, by warps (W, rows, G)."""
    return _add_dot(total, x.to(w.dtype), tl.permute(w, (0, 2, 1)), P)


@triton.jit
def _bent(slopes, w, W: tl.constexpr, P: tl.constexpr):
    """Slopes of logits (rows, G) times a router's ``_table``: a tile."""
    slopes = tl.broadcast_to(slopes.to(w.dtype)[None, :, :], (W, slopes.shape[0], slopes.shape[1]))
    return _dot(slopes, w, P)


@triton.jit
def _token_gradient(
    z, z_row, grad, out, vector, router, gammas, difference_router, lambdas, stats, shifts,
    choice, kept, lambda_line, logits, lambda_logits, grad_gate, grad_factor, row, rows, is_row,
    d, n_gamma, n_lambda, eps, QUERY: tl.constexpr, LEARN: tl.constexpr, SECOND: tl.constexpr,
    N: tl.constexpr, W: tl.constexpr, G: tl.constexpr, L: tl.constexpr, P: tl.constexpr,
    FAST: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Of one tensor's rows; returns the exponents' gradient (G,) and that of lambda (rows,).

    ``vector`` is the sum of the keys of queries, and the gradient of that sum of keys.
    """
    dtype: tl.constexpr = out.dtype.element_ty
    lam = tl.arange(0, L)
    gamma = _exponent(tl.load(stats + row, mask=is_row, other=1.0))
    inverse = tl.load(stats + rows + row, mask=is_row, other=1.0)
    norm = tl.load(stats + 2 * rows + row, mask=is_row, other=1.0)
    scale = tl.load(stats + 3 * rows + row, mask=is_row, other=0.0)
    shift = tl.log2(inverse)
    # Of the power with its norm restored, for the kernel that follows.
    tl.store(shifts + row, gamma * shift + tl.log2(scale), mask=is_row)
    xs = _loaded(z, row, z_row, is_row, d, N, W, EVEN)
    gs = _loaded(grad, row, 2 * d, is_row, d, N, W, EVEN)
    dead = _dead(gamma)
    along = tl.zeros((W, ROWS), tl.float32)
    slope = tl.zeros((W, ROWS), tl.float32)
    own = tl.zeros((W, ROWS), tl.float32)
    totals = tl.zeros((W, ROWS), tl.float32)
    bends = tl.zeros((W, ROWS, L), tl.float32)
    steep_bends = tl.zeros((W, ROWS, L), tl.float32)
    for i in tl.static_range(N):
        power, steep = _power_and_log(xs[i].to(tl.float32), gamma, shift, dead, FAST)
        g = gs[i].to(tl.float32)
        total = _vector(vector, is_row, d, i, W, EVEN)
        if QUERY:
            totals += tl.sum(steep * total, 2)
        else:
            g += total
        along += tl.sum(g * power, 2)
        slope += tl.sum(g * steep, 2)
        own += tl.sum(power * steep, 2)
        if QUERY and LEARN:
            w = _table(difference_router, 2 * d, d, n_lambda, i, W, L, dtype)
            bends = _add_logits(bends, power.to(dtype), w, P)
            steep_bends = _add_logits(steep_bends, steep.to(dtype), w, P)
    along_sum = tl.sum(along, 0)
    slope_sum = tl.sum(slope, 0)
    gain = tl.where(is_row, 1.0, 0.0)
    of_normal = tl.zeros((ROWS,), tl.float32)
    bend = tl.zeros((ROWS, L), tl.float32)
    if QUERY:
        normal = tl.load(stats + 4 * rows + row, mask=is_row, other=1.0)
        gain /= normal
        # Of the normalizer, that the forward found as phi(Z) . key_sum, if the factor were 1.
        of_normal = -along_sum * scale / normal / normal
        if SECOND:
            grad_factor = -along_sum * scale / normal
            factor = tl.load(stats + 5 * rows + row, mask=is_row, other=0.0)
            gain *= -factor
            of_normal *= -factor
        found = tl.where(scale > 0.0, (normal - eps) / scale, 0.0)
        along_sum = gain * along_sum + of_normal * found
        slope_sum = gain * slope_sum + of_normal * tl.sum(totals, 0)
        if LEARN:
            bend = grad_factor[:, None] * _share(lambdas, lambda_line, is_row, n_lambda, L)
            along_sum += tl.sum(bend * tl.sum(bends, 0), 1)
            slope_sum += tl.sum(bend * tl.sum(steep_bends, 0), 1)
        # One line more than lambdas: the gradient of the keys' sum is a product of that kind.
        line = tl.where((lam == n_lambda)[None, :], of_normal[:, None], bend)
        tl.store(lambda_logits + lam[None, :], line.to(dtype), mask=is_row[:, None])
    mean = along_sum / norm
    grad_gamma = (slope_sum - mean / norm * tl.sum(own, 0)) * scale * _LN2
    index = tl.load(choice + row, mask=is_row, other=0)
    table = _table_gradient(grad_gamma, index, is_row, G)
    if LEARN:
        gg = (grad_gamma[:, None] * _share(gammas, kept, is_row, n_gamma, G)).to(dtype)
        tl.store(logits + tl.arange(0, G)[None, :], gg, mask=is_row[:, None])
    curve = mean / norm * inverse
    steepness = scale * gamma * inverse
    radial = mean / tl.maximum(scale * norm, _NORMAL)
    less = gamma - 1.0
    shift *= less
    gate = tl.zeros((W, ROWS), tl.float32)
    for i in tl.static_range(N):
        x = xs[i].to(tl.float32)
        gx = gs[i].to(tl.float32)
        total = _vector(vector, is_row, d, i, W, EVEN)
        if QUERY:
            gx = gx * gain[:, None] + total * of_normal[:, None]
        else:
            gx += total
        if QUERY and LEARN:
            w = _table(difference_router, 2 * d, d, n_lambda, i, W, L, dtype)
            gx += _bent(bend.to(dtype), w, W, P)
        gx = _power_slope(gx, x, less, shift, curve, steepness, radial, FAST)
        if LEARN:
            gx += _bent(gg, _table(router, d, d, n_gamma, i, W, G, dtype), W, P)
        _stored(out, gx, row, d, is_row, d, i, W, EVEN)
        if SECOND:
            gate += tl.sum(gx * x, 2)
    if SECOND:  # of the factor of 1 that multiplies a prime, through which its router learns
        tl.store(grad_gate + row, tl.sum(gate, 0), mask=is_row)
    return table, grad_factor


@triton.jit
def _map_gradient_kernel(
    grad, vector, z1, z2, r1, r2, gammas, rd, lambdas, stats, choices, probability, grad_z1,
    grad_z2, grad_gate, shifts, grad_logits, grad_tables, n, rows, d, z1_row, z2_row, vector_row,
    n_gamma, n_lambda, eps, blocks, QUERY: tl.constexpr, LEARN: tl.constexpr, N: tl.constexpr,
    W: tl.constexpr, G: tl.constexpr, L: tl.constexpr, P: tl.constexpr, FAST: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0) // blocks
    inside = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    is_row = inside < n
    row = sample.to(tl.int64) * n + inside
    line = row[:, None]
    kept = probability + line * (2 * n_gamma + (n_lambda if QUERY else 0))
    logits = grad_logits + line * (2 * G + (2 * L if QUERY else 0))
    vector += sample * vector_row
    g = tl.arange(0, G)
    lam = tl.arange(0, L)
    # The second map first: of it comes the gradient of lambda, whose router reads both.
    nothing = tl.zeros((ROWS,), tl.float32)
    table2, grad_factor = _token_gradient(
        z2, z2_row, grad + d, grad_z2, vector + d, r2, gammas, rd + d, lambdas, stats + 5 * rows,
        shifts + rows, choices + rows, kept + n_gamma, kept + 2 * n_gamma, logits + G,
        logits + 2 * G + L, grad_gate, nothing, row, rows, is_row, d, n_gamma, n_lambda, eps,
        QUERY, LEARN, True, N, W, G, L, P, FAST, EVEN,
    )  # fmt: skip
    table1, _ = _token_gradient(
        z1, z1_row, grad, grad_z1, vector, r1, gammas, rd, lambdas, stats, shifts, choices, kept,
        kept + 2 * n_gamma, logits, logits + 2 * G, grad_gate, grad_factor, row, rows, is_row, d,
        n_gamma, n_lambda, eps, QUERY, LEARN, False, N, W, G, L, P, FAST, EVEN,
    )  # fmt: skip
    tables = grad_tables + tl.program_id(0).to(tl.int64) * (n_gamma + n_lambda)
    tl.store(tables + g, table1 + table2, mask=g < n_gamma)
    table = tl.zeros((L,), tl.float32)
    if QUERY:
        index = tl.load(choices + 2 * rows + row, mask=is_row, other=0)
        table = _table_gradient(grad_factor, index, is_row, L)
    tl.store(tables + n_gamma + lam, table, mask=lam < n_lambda)


@triton.jit
def _map_router_kernel(
    z1, z2, stats, shifts, grad_logits, out, n, rows, d, z1_row, z2_row, n_gamma, n_lambda,
    splits, chunk, samples, QUERY: tl.constexpr, LEARN: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, G: tl.constexpr, L: tl.constexpr, P: tl.constexpr, FAST: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Of routers, and of the keys' sum, from a part of the tokens: (splits, b, lines, d)."""
    column = tl.program_id(0) * C + tl.arange(0, C)
    part = tl.program_id(1).to(tl.int64)
    sample = part // splits
    split = part % splits
    start = split * chunk
    stop = tl.minimum(start + chunk, n)
    dtype: tl.constexpr = z1.dtype.element_ty
    width: tl.constexpr = 2 * G + (2 * L if QUERY else 0)
    g = tl.arange(0, G)[:, None]
    lam = tl.arange(0, L)[:, None]
    gamma1 = tl.zeros((G, C), tl.float32)
    gamma2 = tl.zeros((G, C), tl.float32)
    lambda1 = tl.zeros((L, C), tl.float32)
    lambda2 = tl.zeros((L, C), tl.float32)
    for first in range(start, stop, R):
        inside = first + tl.arange(0, R)
        is_row = inside < stop
        row = sample * n + inside
        line = grad_logits + row[None, :] * width
        x = _tile(z1 + row[:, None] * z1_row, column, is_row, d, EVEN)
        if LEARN:
            gg = tl.load(line + g, mask=is_row[None, :], other=0.0)
            gamma1 = _add_dot(gamma1, gg, x, P)
        if QUERY:
            gl = tl.load(line + 2 * G + lam, mask=is_row[None, :], other=0.0)
            y = _restored(x, row, stats, shifts, is_row, FAST)
            lambda1 = _add_dot(lambda1, gl, y.to(dtype), P)
        x = _tile(z2 + row[:, None] * z2_row, column, is_row, d, EVEN)
        if LEARN:
            gg = tl.load(line + G + g, mask=is_row[None, :], other=0.0)
            gamma2 = _add_dot(gamma2, gg, x, P)
        if QUERY:
            gl = tl.load(line + 2 * G + L + lam, mask=is_row[None, :], other=0.0)
            y = _restored(x, row, stats + 5 * rows, shifts + rows, is_row, FAST)
            lambda2 = _add_dot(lambda2, gl, y.to(dtype), P)
    is_column = (column < d)[None, :]
    lines = (2 * n_gamma if LEARN else 0) + (2 * n_lambda * LEARN + 2 if QUERY else 0)
    out += (split * samples + sample) * lines * d + column[None, :]
    if LEARN:
        is_g = (g < n_gamma) & is_column
        tl.store(out + g * d, gamma1, mask=is_g)
        tl.store(out + (n_gamma + g) * d, gamma2, mask=is_g)
    if QUERY:  # both halves of a lambda's line side by side, then the sums'
        is_l = (lam <= n_lambda) & is_column
        if LEARN:
            out += (2 * n_gamma + 2 * lam) * d
        else:
            is_l &= lam == n_lambda
        tl.store(out + tl.zeros((L, 1), tl.int32), lambda1, mask=is_l)
        tl.store(out + d + tl.zeros((L, 1), tl.int32), lambda2, mask=is_l)


class _Gradients(NamedTuple):
    """Of queries or keys: (b, n, d); of routers and sums, (b, lines, d)."""

    first: Tensor
    lines: Tensor


def _side(
    p: Operands, grad: Tensor, vector: Tensor, z1: Tensor, z2: Tensor, r1: Tensor, r2: Tensor,
    saved: tuple[Tensor, ...], grad_z2: Tensor, grad_gate: Tensor, tables: Tensor, is_query: bool,
) -> _Gradients:  # fmt: skip
    b, n, d = z1.shape
    (z1, spacing1), (z2, spacing2) = _rows(z1), _rows(z2)
    tiles = Tiles.of(d, z1)
    rows, n_gamma, n_lambda = b * n, len(p.gammas), len(p.lambdas)
    # A line more than lambdas; see the kernel.
    gammas_width, lambdas_width = _width(n_gamma), _width(n_lambda + 1)
    blocks, (router_rows, columns) = _ceil(n, ROWS.value), ROUTER_TILE

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=z1.device)

    grad_z1, shifts = new(b, n, d, dtype=z1.dtype), new(2, rows)
    logits = new(rows, 2 * gammas_width + 2 * is_query * lambdas_width, dtype=z1.dtype)
    there = max(1, b) * _ceil(d, columns)
    splits = max(1, min(_ceil(n, 4 * router_rows), _ceil(ROUTER_PROGRAMS, there)))
    chunk = max(1, _ceil(_ceil(n, splits), router_rows)) * router_rows
    splits = _ceil(n, chunk)
    lines = 2 * n_gamma * p.learn + (2 * n_lambda * p.learn + 2) * is_query
    parts = new(splits, b, lines, d)
    shared = gammas_width, lambdas_width, _precision(r1.dtype), _is_fast()
    if rows:
        launch_kernel(_map_gradient_kernel, (b * blocks,),
            grad, vector, z1, z2, r1.contiguous(), r2.contiguous(), p.gammas, p.rd.contiguous(),
            p.lambdas, *saved, grad_z1, grad_z2, grad_gate, shifts, logits, tables, n, rows, d,
            spacing1, spacing2, vector.stride(0), n_gamma, n_lambda, p.eps, blocks, is_query,
            p.learn, tiles.count, tiles.warps, *shared, d % tiles.columns == 0,
            num_warps=tiles.warps, **_limit(GRADIENT_REGISTERS, z1),
        )  # fmt: skip
        if lines:
            launch_kernel(_map_router_kernel, (_ceil(d, columns), b * splits),
                z1, z2, saved[0], shifts, logits, parts, n, rows, d, spacing1, spacing2, n_gamma,
                n_lambda, splits, chunk, b, is_query, p.learn, router_rows, columns, *shared,
                d % columns == 0, num_warps=4, num_stages=2,
            )  # fmt: skip
    return _Gradients(grad_z1, column_sum(parts))


def _of_samples(lines: Tensor) -> Tensor:
    return lines[0] if len(lines) == 1 else lines.sum(0)


@launched(
    "map_attention_backward",
    f"(Tensor grad, {', '.join(f'Tensor saved{i}' for i in range(10))}, {SCHEMA}) "
    f"-> ({', '.join(['Tensor'] * 8)})",
)
def map_backward(grad: Tensor, *saved: Any) -> tuple[Tensor, ...]:
    """Gradients of ``map_forward``, whose other results are the first ten of ``saved``.

    Returns:
        Of query, key and value (b, n, d), primes (2, b, n, d) and gates (2, b, n); of the
        routers that read queries, and of those that read keys, lines of d, 0 where ``learn`` is
        off; of gammas and lambdas, (gammas + lambdas,).
    """
    query, key, between, key_sum, *others = saved[:10]
    p = Operands(*saved[10:])
    value = p.value
    if is_quadratic_cheaper(query.shape[1], key.shape[1], value.shape[2], value.shape[2]):
        of_map = wide_bmm(grad, value.mT, False)
        of_value = wide_bmm(between.mT, grad, False)
        of_query, of_key = wide_bmm(of_map, key, False), wide_bmm(of_map.mT, query, False)
    else:
        of_state = wide_bmm(query.mT, grad, True).to(grad.dtype)
        of_query, of_key = wide_bmm(grad, between.mT, False), wide_bmm(value, of_state.mT, False)
        of_value = wide_bmm(key, of_state, False)
    b, n, d = p.query.shape
    primes = torch.empty(2, b, n, d, dtype=grad.dtype, device=grad.device)
    gates = torch.empty(2, b, n, dtype=torch.float32, device=grad.device)
    programs, scalars = b * _ceil(n, ROWS.value), len(p.gammas) + len(p.lambdas)
    tables = torch.empty(2, programs, scalars, dtype=torch.float32, device=grad.device)
    queries = _side(
        p, of_query, key_sum, p.query, p.primes[0], p.query_router, p.prime_query_router,
        tuple(others[:3]), primes[0], gates[0], tables[0], True,
    )  # fmt: skip
    sums = queries.lines[:, -2:].flatten(1).to(grad.dtype)
    keys = _side(
        p, of_key, sums, p.key, p.primes[1], p.key_router, p.prime_key_router,
        tuple(others[3:]), primes[1], gates[1], tables[1], False,
    )  # fmt: skip
    return (
        queries.first, keys.first, of_value, primes, gates, _of_samples(queries.lines[:, :-2]),
        _of_samples(keys.lines), column_sum(tables.flatten(0, 1)),
    )  # fmt: skip


@map_backward.register_fake
def _(grad: Tensor, *saved: Any) -> tuple[Tensor, ...]:
    p = Operands(*saved[10:])
    n_gamma, n_lambda = len(p.gammas) * p.learn, len(p.lambdas) * p.learn
    wide, (_, _, d) = p.gammas.new_empty, p.query.shape
    return (
        *(z.new_empty(z.shape) for z in (p.query, p.key, p.value, p.primes)),
        wide(p.primes.shape[:-1]), wide(2 * n_gamma + 2 * n_lambda, d), wide(2 * n_gamma, d),
        wide(len(p.gammas) + len(p.lambdas)),
    )  # fmt: skip
