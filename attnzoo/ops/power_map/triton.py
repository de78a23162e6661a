"""The power map as one Triton kernel, forward and backward."""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportReturnType=false, reportAssignmentType=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.ops.dispatch import is_inference
from attnzoo.ops.triton_common import (
    _LARGEST,
    _LN2,
    _NORMAL,
    _ceil,
    _is_fast,
    _power_of_2,
    _rows,
    launch_kernel,
    launched,
)
from attnzoo.ops.triton_replay import replayed


@triton.jit
def _log2(x, FAST: tl.constexpr):
    if FAST:  # the unit's own instruction; the library's function spends ten on the last digit
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.log2(x)


@triton.jit
def _exp2(x, FAST: tl.constexpr):
    if FAST:  # without the steps for results below 1e-38
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.exp2(x)


@triton.jit
def _raised(x, gamma, pivot, FAST: tl.constexpr):
    """(x over the pivot, power) of ``_unit_power``, where nothing reads the logarithm."""
    unit = x * (1.0 / pivot)[:, None]
    # An exponent below 0 makes 0 of an infinite unit.
    log_unit = _log2(tl.maximum(unit, _NORMAL, propagate_nan=tl.PropagateNan.ALL), FAST)
    return unit, tl.where(x <= _NORMAL, 0.0, _exp2(gamma[:, None] * log_unit, FAST))


@triton.jit
def _unit_power(x, gamma, pivot, FAST: tl.constexpr):
    """(x over the pivot, its logarithm, power); x is ReLU(z), and powers of 0 are 0."""
    # One division a row; what its rounding adds to all entries alike, their norm takes away.
    unit = x * (1.0 / pivot)[:, None]
    # Not tl.maximum and tl.minimum, which would hide a NaN.
    bounded = tl.where(unit < _NORMAL, _NORMAL, tl.where(unit > _LARGEST, _LARGEST, unit))
    log_unit = _log2(bounded, FAST)
    power = tl.where(x <= _NORMAL, 0.0, _exp2(gamma[:, None] * log_unit, FAST))
    return unit, log_unit, power


@triton.jit
def _pivot(gamma, low, peak):
    """The entry of the largest power, by which a row is divided so that no power overflows.

    ``low`` is the smallest entry above 0, ``peak`` the largest, at least the smallest normal.
    """
    return tl.where(gamma < 0.0, low, peak)


@triton.jit
def _power(x, gamma, FAST: tl.constexpr):
    """(unnormalized power, pivot, norm of the power, factor that restores the norm)."""
    peak = tl.maximum(tl.max(x, 1), _NORMAL)
    pivot = _pivot(gamma, tl.min(tl.where(x > _NORMAL, x, _LARGEST), 1), peak)
    _, power = _raised(x, gamma, pivot, FAST)
    norm = tl.maximum(tl.sqrt(tl.sum(power * power, 1)), _NORMAL)
    ratio = x * (1.0 / peak)[:, None]
    return power, pivot, norm, peak * tl.sqrt(tl.sum(ratio * ratio, 1)) / norm


@triton.jit
def _power_backward(grad, x, gamma, pivot, norm, scale, FAST: tl.constexpr):
    """Gradients of x^gamma / |x^gamma| * |x| with respect to x, tile, and gamma, row."""
    unit, log_unit, power = _unit_power(x, gamma, pivot, FAST)
    along = tl.sum(grad * power, 1) / norm
    shared = (grad - power * (along / norm)[:, None]) * power * scale[:, None]
    grad_gamma = tl.sum(shared * log_unit, 1) * _LN2
    slope = tl.where(unit >= _NORMAL, shared * gamma[:, None] / (unit * pivot[:, None]), 0.0)
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
    power, pivot, norm, scale = _power(x, tl.load(gamma + row, mask=is_row, other=1.0), FAST)
    result = (power * scale[:, None]).to(out.dtype.element_ty)
    tl.store(out + row[:, None] * d + column[None, :], result, mask=mask)
    tl.store(stats + row, pivot, mask=is_row)
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
    pivot = tl.load(stats + row, mask=is_row, other=1.0)
    norm = tl.load(stats + rows + row, mask=is_row, other=1.0)
    scale = tl.load(stats + 2 * rows + row, mask=is_row, other=0.0)
    power = tl.load(gamma + row, mask=is_row, other=1.0)
    slope, gamma_slope = _power_backward(g.to(tl.float32), x, power, pivot, norm, scale, FAST)
    slope = tl.where(x == 0, 0.0, slope).to(grad_z.dtype.element_ty)
    tl.store(grad_z + row[:, None] * d + column[None, :], slope, mask=mask)
    tl.store(grad_gamma + row, gamma_slope, mask=is_row)


@triton.jit
def _softplus(z):
    small = tl.exp(-tl.abs(z))
    # log(1 + small) by its series in y of at most 1/3: 1 + small would round a small divisor.
    y = small / (2 + small)
    square, log = y * y, 1 / 13
    for i in tl.static_range(6):
        log = log * square + 1 / (11 - 2 * i)
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL) + 2 * y * log


@triton.jit
def _divisors(scale, SOFT: tl.constexpr, D: tl.constexpr, B: tl.constexpr):
    """1 over the scale of each column, by blocks of columns."""
    found = ()
    for first in tl.static_range(0, D, B):
        column = first + tl.arange(0, B)
        s = tl.load(scale + column, mask=column < D, other=1.0).to(tl.float32)
        found += (1.0 / (_softplus(s) if SOFT else s),)
    return found


@triton.jit
def _load(z, row, spacing, is_row, first: tl.constexpr, D: tl.constexpr, B: tl.constexpr):
    """A block of columns of rows; 0 outside."""
    column = first + tl.arange(0, B)
    mask = is_row[:, None] & (column < D)[None, :] if first + B > D else is_row[:, None]
    place = z + row[:, None] * spacing + column[None, :]
    return tl.load(place, mask=mask, other=0.0)


@triton.jit
def _store(out, x, row, spacing, is_row, first: tl.constexpr, D: tl.constexpr, B: tl.constexpr):
    column = first + tl.arange(0, B)
    mask = is_row[:, None] & (column < D)[None, :] if first + B > D else is_row[:, None]
    place = out + row[:, None] * spacing + column[None, :]
    tl.store(place, x.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _scaled(z, inverse, offset, first: tl.constexpr, D: tl.constexpr, B: tl.constexpr):
    """(ReLU(z) + offset) over the scale of its column; 0 outside."""
    x = (tl.where(z <= 0, 0.0, z) + offset) * inverse[None, :]
    if first + B > D:
        x = tl.where((first + tl.arange(0, B) < D)[None, :], x, 0.0)
    return x


@triton.jit
def _same_power(unit, x, gamma, POWER: tl.constexpr, FAST: tl.constexpr):
    """(unit to the power of gamma, that over unit); POWER is gamma if that is a small integer."""
    if POWER > 0:  # products, without a logarithm or an exponential
        lower = tl.zeros_like(unit) + 1.0
        for _ in tl.static_range(POWER - 1):
            lower *= unit
        return lower * unit, lower
    bounded = tl.where(unit < _NORMAL, _NORMAL, tl.where(unit > _LARGEST, _LARGEST, unit))
    power = tl.where(x <= _NORMAL, 0.0, _exp2(gamma * _log2(bounded, FAST), FAST))
    return power, tl.where(unit < _NORMAL, 0.0, power / bounded)


@triton.jit
def _scaled_power_map_kernel(
    z, scale, out, stats, rows, z_row, out_row, gamma, offset, turns, POWER: tl.constexpr,
    SOFT: tl.constexpr, R: tl.constexpr, D: tl.constexpr, B: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Of one part of each row, D columns; a second axis of programs goes through the parts."""
    part = tl.program_id(1)
    z += part * D
    out += part * D
    stats += part * rows
    total = tl.num_programs(1) * rows
    inverse = _divisors(scale, SOFT, D, B)
    for turn in range(turns):
        row = (tl.program_id(0).to(tl.int64) * turns + turn) * R + tl.arange(0, R)
        is_row = row < rows
        xs = ()
        for i in tl.static_range(len(inverse)):
            x = _load(z, row, z_row, is_row, i * B, D, B).to(tl.float32)
            xs += (_scaled(x, inverse[i], offset, i * B, D, B),)
        highest = xs[0]
        for i in tl.static_range(1, len(xs)):
            highest = tl.maximum(highest, xs[i])
        peak = tl.maximum(tl.max(highest, 1), _NORMAL)
        pivot = peak
        if POWER == 0:
            lowest = tl.where(xs[0] > _NORMAL, xs[0], _LARGEST)
            for i in tl.static_range(1, len(xs)):
                lowest = tl.minimum(lowest, tl.where(xs[i] > _NORMAL, xs[i], _LARGEST))
            pivot = _pivot(gamma, tl.min(lowest, 1), peak)
        squares = tl.zeros((R, B), tl.float32)
        of_powers = tl.zeros((R, B), tl.float32)
        powers = ()
        for i in tl.static_range(len(xs)):
            power, _ = _same_power(xs[i] * (1.0 / pivot)[:, None], xs[i], gamma, POWER, FAST)
            ratio = xs[i] * (1.0 / peak)[:, None]
            squares += ratio * ratio
            of_powers += power * power
            powers += (power,)
        norm = tl.maximum(tl.sqrt(tl.sum(of_powers, 1)), _NORMAL)
        factor = peak * tl.sqrt(tl.sum(squares, 1)) / norm
        for i in tl.static_range(len(powers)):
            _store(out, powers[i] * factor[:, None], row, out_row, is_row, i * B, D, B)
        tl.store(stats + row, pivot, mask=is_row)
        tl.store(stats + total + row, norm, mask=is_row)
        tl.store(stats + 2 * total + row, factor, mask=is_row)


@triton.jit
def _scaled_power_map_backward_kernel(
    grad, z, scale, stats, grad_z, partial, rows, g_row, z_row, out_row, gamma, offset, turns,
    POWER: tl.constexpr, SOFT: tl.constexpr, R: tl.constexpr, D: tl.constexpr, B: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """``grad_z`` may be ``grad``; ``partial`` gets sums over rows of x times its gradient."""
    part = tl.program_id(1)
    z += part * D
    grad += part * D
    grad_z += part * D
    stats += part * rows
    total = tl.num_programs(1) * rows
    inverse = _divisors(scale, SOFT, D, B)
    zero = tl.zeros((R, B), tl.float32)
    sums = (zero,) * len(inverse)
    for turn in range(turns):
        row = (tl.program_id(0).to(tl.int64) * turns + turn) * R + tl.arange(0, R)
        is_row = row < rows
        pivot = tl.load(stats + row, mask=is_row, other=1.0)
        norm = tl.load(stats + total + row, mask=is_row, other=1.0)
        factor = tl.load(stats + 2 * total + row, mask=is_row, other=0.0)
        zs, slopes = (), ()
        for i in tl.static_range(len(inverse)):
            zs += (_load(z, row, z_row, is_row, i * B, D, B),)
            slopes += (_load(grad, row, g_row, is_row, i * B, D, B),)
        along = tl.zeros((R, B), tl.float32)
        for i in tl.static_range(len(inverse)):
            x = _scaled(zs[i].to(tl.float32), inverse[i], offset, i * B, D, B)
            power, _ = _same_power(x * (1.0 / pivot)[:, None], x, gamma, POWER, FAST)
            along += slopes[i].to(tl.float32) * power
        along = tl.sum(along, 1) / norm
        of_power = along / norm
        of_x = along / tl.maximum(factor * norm, _NORMAL)
        steep = gamma * factor / pivot
        found = ()
        for i in tl.static_range(len(inverse)):  # anew, for registers are few
            raw, slope = zs[i].to(tl.float32), slopes[i].to(tl.float32)
            x = _scaled(raw, inverse[i], offset, i * B, D, B)
            power, lower = _same_power(x * (1.0 / pivot)[:, None], x, gamma, POWER, FAST)
            slope = (slope - power * of_power[:, None]) * lower * steep[:, None]
            slope += x * of_x[:, None]
            found += (sums[i] + slope * x,)
            slope = tl.where(raw <= 0, 0.0, slope * inverse[i][None, :])
            _store(grad_z, slope, row, out_row, is_row, i * B, D, B)
        sums = found
    partial += (tl.program_id(0) * tl.num_programs(1) + part) * D
    for i in tl.static_range(len(sums)):
        column = i * B + tl.arange(0, B)
        tl.store(partial + column, tl.sum(sums[i], 0), mask=column < D)


@triton.jit
def _scale_gradient_kernel(
    partial, scale, out, parts, D: tl.constexpr, SOFT: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """Of what divides x, from the parts of the sums of x times its gradient."""
    column = tl.program_id(0) * C + tl.arange(0, C)
    is_column = column < D
    total = tl.zeros((R, C), tl.float32)
    for first in range(0, parts, R):
        row = first + tl.arange(0, R)
        mask = (row < parts)[:, None] & is_column[None, :]
        total += tl.load(partial + row[:, None] * D + column[None, :], mask=mask, other=0.0)
    s = tl.load(scale + column, mask=is_column, other=1.0).to(tl.float32)
    slope = -1.0 / s
    if SOFT:
        slope = -1.0 / (_softplus(s) * (1.0 + tl.exp(-s)))
    slope *= tl.sum(total, 0)
    tl.store(out + column, slope.to(out.dtype.element_ty), mask=is_column)


def _row_block(d: int) -> tuple[int, int]:
    """Rows and warps of a program that holds whole rows."""
    width = _power_of_2(d)
    return max(1, 2048 // width), 2


@launched("power_map_triton")
def power_map_forward(z: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Power map of ReLU(z): (t, d), (t,) float32 -> (t, d) and (3, t) statistics of the rows."""
    z, spacing = _rows(z)
    rows, d = z.shape
    out = torch.empty(rows, d, dtype=z.dtype, device=z.device)
    stats = torch.empty(3, rows, dtype=torch.float32, device=z.device)
    block, warps = _row_block(d)
    if rows:
        launch_kernel(_power_map_kernel, (_ceil(rows, block),),
            z, gamma, out, stats, rows, d, spacing, block, _power_of_2(d),
            _is_fast(), num_warps=warps,
        )  # fmt: skip
    return out, stats


@launched("power_map_triton_backward")
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
        launch_kernel(_power_map_backward_kernel, (_ceil(rows, block),),
            grad, z, gamma, stats, grad_z, grad_gamma, rows, d, grad_spacing, spacing, block,
            _power_of_2(d), _is_fast(), num_warps=warps,
        )  # fmt: skip
    return grad_z, grad_gamma


@power_map_forward.register_fake
def _(z: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), z.new_empty(3, z.shape[0], dtype=torch.float32)


@power_map_backward.register_fake
def _(grad: Tensor, z: Tensor, gamma: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), torch.empty_like(gamma)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[1])


def _gradients(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor]:
    return power_map_backward(grad, *ctx.saved_tensors)


power_map_forward.register_autograd(_gradients, setup_context=_setup)


# Rows of a tile of 256 columns, warps, programs at most, and most registers: as many as run at
# once, for each begins with the divisors of all columns.
FOCUS_BLOCK, FOCUS_GRADIENT_BLOCK = (4, 4, 528, 128), (2, 2, 792, 168)
_MOST_PRODUCTS = 8  # up to this power


def _focus_tile(
    block: tuple[int, ...], rows: int, parts: int, d: int, gamma: float, is_soft: bool
) -> tuple[int, tuple[Any, ...], dict[str, int]]:
    """Programs, what a kernel is told behind its numbers, and what Triton is told."""
    high, warps, programs, registers = block
    columns = min(256, _power_of_2(d))
    while d > 8 * columns:
        columns *= 2
    high = max(1, high * 256 // columns)
    turns = max(1, _ceil(_ceil(rows, high), max(1, programs // parts)))
    power = int(gamma) if 1 <= gamma <= _MOST_PRODUCTS and gamma == int(gamma) else 0
    constants = turns, power, is_soft, high, d, columns, _is_fast()
    options = {"num_warps": warps} | ({"maxnreg": registers} if _is_fast() else {})
    return _ceil(rows, high * turns), constants, options


def focus(
    z: Tensor, scale: Tensor, gamma: float, offset: float, parts: int, is_soft: bool
) -> tuple[Tensor, Tensor]:
    """``scaled_power_map`` of each of the first parts of rows, which share the scale.

    Args:
        z: (..., n, at least parts * d), with equally spaced rows.
        scale: (d,).
        gamma: As there, like ``offset``.
        parts: How many.
        is_soft: Whether the scale is yet to go through softplus.

    Returns:
        (..., n, parts * d), and statistics of the rows, (3, parts, rows).
    """
    (z, spacing), scale = _rows(z), scale.contiguous()
    *sizes, width = z.shape
    d = len(scale)
    rows = z.numel() // max(1, width)
    out = torch.empty(*sizes, parts * d, dtype=z.dtype, device=z.device)
    stats = torch.empty(3, parts, rows, dtype=torch.float32, device=z.device)
    programs, constants, options = _focus_tile(FOCUS_BLOCK, rows, parts, d, gamma, is_soft)
    if rows:
        launch_kernel(_scaled_power_map_kernel, (programs, parts),
            z, scale, out, stats, rows, spacing, parts * d, gamma, offset, *constants, **options
        )  # fmt: skip
    return out, stats


def focus_gradient(
    grad: Tensor, z: Tensor, scale: Tensor, stats: Tensor, gamma: float, offset: float,
    is_soft: bool, out: Tensor,
) -> Tensor:  # fmt: skip
    """Writes the gradient of ``focus`` into the first parts of ``out``, and returns the scale's.

    ``out`` may be ``grad``; both have equally spaced rows.
    """
    (z, spacing), (grad, grad_spacing), scale = _rows(z), _rows(grad), scale.contiguous()
    d, (_, parts, rows) = len(scale), stats.shape
    tile = _focus_tile(FOCUS_GRADIENT_BLOCK, rows, parts, d, gamma, is_soft)
    programs, constants, options = tile
    partial = torch.empty(programs * parts, d, dtype=torch.float32, device=z.device)
    of_scale = torch.empty(d, dtype=scale.dtype, device=z.device)
    if rows:
        launch_kernel(_scaled_power_map_backward_kernel, (programs, parts),
            grad, z, scale, stats, out, partial, rows, grad_spacing, spacing, out.stride(-2),
            gamma, offset, *constants, **options,
        )  # fmt: skip
    if d:
        launch_kernel(_scale_gradient_kernel, (_ceil(d, 16),),
            partial, scale, of_scale, len(partial), d, is_soft, 512, 16, num_warps=8,
        )  # fmt: skip
    return of_scale


@launched(
    "scaled_power_map", "(Tensor z, Tensor scale, float gamma, float offset) -> (Tensor, Tensor)"
)
def _scaled_forward(
    z: Tensor, scale: Tensor, gamma: float, offset: float
) -> tuple[Tensor, Tensor]:
    """Power map of (ReLU(z) + offset) / scale: (t, d), (d,) -> (t, d) and its statistics."""
    return focus(z, scale, gamma, offset, 1, False)


@launched(
    "scaled_power_map_backward",
    "(Tensor grad, Tensor z, Tensor scale, Tensor stats, float gamma, float offset) "
    "-> (Tensor, Tensor)",
)
def _scaled_backward(
    grad: Tensor, z: Tensor, scale: Tensor, stats: Tensor, gamma: float, offset: float
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to z, (t, d), and scale, (d,)."""
    out = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    return out, focus_gradient(grad, z, scale, stats, gamma, offset, False, out)


@_scaled_forward.register_fake
def _(z: Tensor, scale: Tensor, gamma: float, offset: float) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), z.new_empty(3, 1, z.shape[0], dtype=torch.float32)


@_scaled_backward.register_fake
def _(
    grad: Tensor, z: Tensor, scale: Tensor, stats: Tensor, gamma: float, offset: float
) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), scale.new_empty(scale.shape)


def _scaled_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    z, scale, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(z, scale, output[1])


def _scaled_gradients(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 4
    return *_scaled_backward(grad, *ctx.saved_tensors, *ctx.options), None, None


_scaled_forward.register_autograd(_scaled_gradients, setup_context=_scaled_setup)


def scaled_power_map(z: Tensor, scale: Tensor, gamma: float, offset: float) -> Tensor:
    """See ``attnzoo.ops.power_map``; computed in float32, the result in the dtype of z."""
    if is_inference():
        return _replayed_scaled(z, scale, gamma, offset)
    return _scaled_power_map(z, scale, gamma, offset)


def _scaled_power_map(z: Tensor, scale: Tensor, gamma: float, offset: float) -> Tensor:
    rows = z.reshape(-1, z.shape[-1])
    return _scaled_forward(rows, scale, gamma, offset)[0].view(z.shape)


_replayed_scaled = replayed(_scaled_power_map)


def power_map(z: Tensor, gamma: Tensor) -> Tensor:
    """See ``attnzoo.ops.power_map``; computed in float32."""
    return (_replayed_map if is_inference() else _power_map)(z, gamma)


def _power_map(z: Tensor, gamma: Tensor) -> Tensor:
    powers = gamma.float().expand(*z.shape[:-1], 1).reshape(-1)
    # Expanding may leave all rows one address, which a kernel would not see.
    powers = powers.contiguous()
    return power_map_forward(z.reshape(-1, z.shape[-1]), powers)[0].view(z.shape)


_replayed_map = replayed(_power_map)
