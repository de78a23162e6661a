"""The power map as one Triton kernel, forward and backward."""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportReturnType=false

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

_TURNS = 4  # tiles of rows of a program whose sums over rows leave together


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
    """(unnormalised power, pivot, norm of the power, factor that restores the norm)."""
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
def _scaled(z, row, z_row, column, scale, offset, mask):
    """(ReLU(z) + offset) over the scale of its column."""
    x = tl.load(z + row[:, None] * z_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
    x = (tl.where(x <= 0, 0.0, x) + offset) / scale[None, :]
    return tl.where(mask, x, 0.0)


@triton.jit
def _scaled_power_map_kernel(
    z, scale, out, stats, rows, d, z_row, gamma, offset, R: tl.constexpr, D: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.arange(0, D)
    is_row = row < rows
    mask = is_row[:, None] & (column < d)[None, :]
    divisor = tl.load(scale + column, mask=column < d, other=1.0).to(tl.float32)
    x = _scaled(z, row, z_row, column, divisor, offset, mask)
    power, pivot, norm, factor = _power(x, tl.zeros((R,), tl.float32) + gamma, FAST)
    result = (power * factor[:, None]).to(out.dtype.element_ty)
    tl.store(out + row[:, None] * d + column[None, :], result, mask=mask)
    tl.store(stats + row, pivot, mask=is_row)
    tl.store(stats + rows + row, norm, mask=is_row)
    tl.store(stats + 2 * rows + row, factor, mask=is_row)


@triton.jit
def _scaled_power_map_backward_kernel(
    grad, z, scale, stats, grad_z, partial, rows, d, g_row, z_row, gamma, offset,
    TURNS: tl.constexpr, R: tl.constexpr, D: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, D)
    is_column = column < d
    divisor = tl.load(scale + column, mask=is_column, other=1.0).to(tl.float32)
    total = tl.zeros((R, D), tl.float32)
    for turn in range(TURNS):
        row = (tl.program_id(0).to(tl.int64) * TURNS + turn) * R + tl.arange(0, R)
        is_row = row < rows
        mask = is_row[:, None] & is_column[None, :]
        x = _scaled(z, row, z_row, column, divisor, offset, mask)
        g = tl.load(grad + row[:, None] * g_row + column[None, :], mask=mask, other=0.0)
        pivot = tl.load(stats + row, mask=is_row, other=1.0)
        norm = tl.load(stats + rows + row, mask=is_row, other=1.0)
        factor = tl.load(stats + 2 * rows + row, mask=is_row, other=0.0)
        power = tl.zeros((R,), tl.float32) + gamma
        slope, _ = _power_backward(g.to(tl.float32), x, power, pivot, norm, factor, FAST)
        slope = tl.where(x == 0, 0.0, slope) / divisor[None, :]
        total += tl.where(mask, slope * x, 0.0)
        line = z + row[:, None] * z_row + column[None, :]
        slope = tl.where(tl.load(line, mask=mask, other=0.0) <= 0, 0.0, slope)
        here = grad_z + row[:, None] * d + column[None, :]
        tl.store(here, slope.to(grad_z.dtype.element_ty), mask=mask)
    tl.store(partial + tl.program_id(0) * d + column, -tl.sum(total, 0), mask=is_column)


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


@launched(
    "scaled_power_map", "(Tensor z, Tensor scale, float gamma, float offset) -> (Tensor, Tensor)"
)
def _scaled_forward(
    z: Tensor, scale: Tensor, gamma: float, offset: float
) -> tuple[Tensor, Tensor]:
    """Power map of (ReLU(z) + offset) / scale: (t, d), (d,) -> (t, d) and statistics, (3, t)."""
    z, spacing = _rows(z)
    rows, d = z.shape
    out = torch.empty(rows, d, dtype=z.dtype, device=z.device)
    stats = torch.empty(3, rows, dtype=torch.float32, device=z.device)
    block, warps = _row_block(d)
    if rows:
        launch_kernel(_scaled_power_map_kernel, (_ceil(rows, block),),
            z, scale, out, stats, rows, d, spacing, gamma, offset, block,
            _power_of_2(d), _is_fast(), num_warps=warps,
        )  # fmt: skip
    return out, stats


@launched(
    "scaled_power_map_backward",
    "(Tensor grad, Tensor z, Tensor scale, Tensor stats, float gamma, float offset) "
    "-> (Tensor, Tensor)",
)
def _scaled_backward(
    grad: Tensor, z: Tensor, scale: Tensor, stats: Tensor, gamma: float, offset: float
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to z, (t, d), and scale, (d,)."""
    (z, spacing), (grad, grad_spacing) = _rows(z), _rows(grad)
    rows, d = z.shape
    grad_z = torch.empty(rows, d, dtype=z.dtype, device=z.device)
    block, warps = _row_block(d)
    programs = _ceil(rows, block * _TURNS)
    partial = torch.empty(programs, d, dtype=torch.float32, device=z.device)
    if rows:
        launch_kernel(_scaled_power_map_backward_kernel, (programs,),
            grad, z, scale, stats, grad_z, partial, rows, d, grad_spacing, spacing, gamma, offset,
            _TURNS, block, _power_of_2(d), _is_fast(), num_warps=warps,
        )  # fmt: skip
    return grad_z, partial.sum(0).to(scale.dtype)


@_scaled_forward.register_fake
def _(z: Tensor, scale: Tensor, gamma: float, offset: float) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), z.new_empty(3, z.shape[0], dtype=torch.float32)


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
    return _scaled_forward(rows, scale.contiguous(), gamma, offset)[0].view(z.shape)


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
