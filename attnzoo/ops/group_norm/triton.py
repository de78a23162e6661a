"""The group norm of tokens: what tokens add up to by channel, by group, and the result.

Sums over tokens are split among programs, whose parts a second launch joins, by group.
"""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.ops.triton_common import _ceil, _rows, column_sum, launched


@triton.jit
def _part(z, sample, start, n, spacing, turn, column, mask, R: tl.constexpr):
    """A tile of a sample's tokens, its rows, and which numbers of it there are."""
    row = start + turn * R + tl.arange(0, R)
    is_here = (row < n)[:, None] & mask[None, :]
    place = (sample.to(tl.int64) * n + row)[:, None] * spacing + column[None, :]
    return tl.load(z + place, mask=is_here, other=0.0).to(tl.float32), row, is_here


@triton.jit
def _moments_kernel(
    x, shift, partial, n, c, spacing, splits, turns, R: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """Mean of each channel over a part of the tokens, and the sum of the squares around it."""
    sample, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    column = tl.program_id(1) * C + tl.arange(0, C)
    mask = column < c
    start = split * turns * R
    count = tl.minimum(turns * R, n - start)
    total = tl.zeros((R, C), tl.float32)
    for turn in range(turns):
        z, _, _ = _part(x, sample, start, n, spacing, turn, column, mask, R)
        total += z
    mean = tl.sum(total, 0) / count  # without the shift, which their differences do not see
    total = tl.zeros((R, C), tl.float32)
    for turn in range(turns):
        z, _, is_here = _part(x, sample, start, n, spacing, turn, column, mask, R)
        z = tl.where(is_here, z - mean[None, :], 0.0)
        total += z * z
    place = partial + tl.program_id(0).to(tl.int64) * 2 * c + column
    mean += tl.load(shift + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(place, mean, mask=mask)
    tl.store(place + c, tl.sum(total, 0), mask=mask)


@triton.jit
def _statistics_kernel(
    partial, stats, n, c, groups, splits, size, eps, S: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    """Mean and inverse deviation of a group, from the moments of its channels' parts."""
    sample, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    width = c // groups
    split, column = tl.arange(0, S), tl.arange(0, W)
    mask = (split < splits)[:, None] & (column < width)[None, :]
    place = (sample.to(tl.int64) * splits + split)[:, None] * 2 * c + group * width
    place = partial + place + column[None, :]
    count = tl.minimum(size, n - split * size).to(tl.float32)[:, None]
    mean = tl.load(place, mask=mask, other=0.0)
    number = n * 1.0 * width  # n may be a constant 1
    center = tl.sum(tl.sum(tl.where(mask, mean * count, 0.0), 1), 0) / number
    rest = tl.load(place + c, mask=mask, other=0.0)
    rest += tl.where(mask, (mean - center) * (mean - center) * count, 0.0)
    variance = tl.sum(tl.sum(rest, 1), 0) / number
    tl.store(stats + 2 * tl.program_id(0), center)
    tl.store(stats + 2 * tl.program_id(0) + 1, tl.rsqrt(variance + eps))


@triton.jit
def _normed(z, shift, stats, weight, bias, sample, groups, c, column, mask):
    """Tokens by their group's statistics, and scaled; the latter's scale and the inverse."""
    move = tl.load(shift + column, mask=mask, other=0.0).to(tl.float32)
    place = stats + 2 * (sample * groups + column // (c // groups))
    center = tl.load(place, mask=mask, other=0.0)
    inverse = tl.load(place + 1, mask=mask, other=0.0)
    w = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    z = (z + (move - center)[None, :]) * inverse[None, :]
    shifted = z * w[None, :] + tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)[None, :]
    return z, shifted, w, inverse


@triton.jit
def _group_norm_kernel(
    x, shift, stats, weight, bias, out, n, c, spacing, groups, splits, turns, slope,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    sample, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    column = tl.program_id(1) * C + tl.arange(0, C)
    mask = column < c
    for turn in range(turns):
        start = split * turns * R
        z, row, is_here = _part(x, sample, start, n, spacing, turn, column, mask, R)
        _, z, _, _ = _normed(z, shift, stats, weight, bias, sample, groups, c, column, mask)
        z = tl.where(z > 0, z, slope * z).to(out.dtype.element_ty)
        place = (sample.to(tl.int64) * n + row)[:, None] * c + column[None, :]
        tl.store(out + place, z, mask=is_here)


@triton.jit
def _sums_kernel(
    grad, x, shift, stats, weight, bias, partial, n, c, g_row, spacing, groups, splits, turns,
    slope, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Sums of the gradient of the norm's result, alone and times normed tokens; and of those."""
    sample, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    column = tl.program_id(1) * C + tl.arange(0, C)
    mask = column < c
    alone = tl.zeros((R, C), tl.float32)
    along = tl.zeros((R, C), tl.float32)
    count = tl.zeros((R, C), tl.float32)
    for turn in range(turns):
        start = split * turns * R
        g, _, is_here = _part(grad, sample, start, n, g_row, turn, column, mask, R)
        z, _, _ = _part(x, sample, start, n, spacing, turn, column, mask, R)
        z, shifted, _, _ = _normed(z, shift, stats, weight, bias, sample, groups, c, column, mask)
        g = tl.where(shifted > 0, g, slope * g)
        alone += g
        along += g * z
        count += tl.where(is_here, z, 0.0)
    place = partial + tl.program_id(0).to(tl.int64) * 3 * c + column
    tl.store(place, tl.sum(alone, 0), mask=mask)
    tl.store(place + c, tl.sum(along, 0), mask=mask)
    tl.store(place + 2 * c, tl.sum(count, 0), mask=mask)


@triton.jit
def _means_kernel(
    partial, stats, weight, of_bias, of_weight, of_shift, means, n, c, groups, splits,
    S: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Gradients of a group's bias, weight and shift, and what that of each token is less by."""
    sample, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    width = c // groups
    split, column = tl.arange(0, S), tl.arange(0, W)
    is_column = column < width
    mask = (split < splits)[:, None] & is_column[None, :]
    place = (sample.to(tl.int64) * splits + split)[:, None] * 3 * c + group * width
    place = partial + place + column[None, :]
    w = tl.load(weight + group * width + column, mask=is_column, other=0.0).to(tl.float32)
    number = n * 1.0 * width  # n may be a constant 1
    alone = tl.sum(tl.load(place, mask=mask, other=0.0), 0)
    along = tl.sum(tl.load(place + c, mask=mask, other=0.0), 0)
    count = tl.sum(tl.load(place + 2 * c, mask=mask, other=0.0), 0)
    less, less_along = tl.sum(alone * w, 0) / number, tl.sum(along * w, 0) / number
    inverse = tl.load(stats + 2 * tl.program_id(0) + 1)
    here = sample * c + group * width + column
    tl.store(of_bias + here, alone.to(of_bias.dtype.element_ty), mask=is_column)
    tl.store(of_weight + here, along.to(of_weight.dtype.element_ty), mask=is_column)
    moved = (w * alone - n * 1.0 * less - less_along * count) * inverse
    tl.store(of_shift + here, moved.to(of_shift.dtype.element_ty), mask=is_column)
    tl.store(means + 2 * tl.program_id(0), less)
    tl.store(means + 2 * tl.program_id(0) + 1, less_along)


@triton.jit
def _group_norm_backward_kernel(
    grad, x, shift, stats, means, weight, bias, out, n, c, g_row, spacing, groups, splits, turns,
    slope, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    sample, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    column = tl.program_id(1) * C + tl.arange(0, C)
    mask = column < c
    mean = means + 2 * (sample * groups + column // (c // groups))
    alone = tl.load(mean, mask=mask, other=0.0)[None, :]
    along = tl.load(mean + 1, mask=mask, other=0.0)[None, :]
    for turn in range(turns):
        start = split * turns * R
        g, row, is_here = _part(grad, sample, start, n, g_row, turn, column, mask, R)
        z, _, _ = _part(x, sample, start, n, spacing, turn, column, mask, R)
        z, shifted, w, inverse = _normed(
            z, shift, stats, weight, bias, sample, groups, c, column, mask
        )
        g = tl.where(shifted > 0, g, slope * g) * w[None, :]
        g = (g - alone - z * along) * inverse[None, :]
        place = (sample.to(tl.int64) * n + row)[:, None] * c + column[None, :]
        tl.store(out + place, g.to(out.dtype.element_ty), mask=is_here)


_TILE = 64, 64  # tokens and channels
_PROGRAMS = 528
_SPLITS = 128  # at most: one program joins them


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """Parts of the tokens, tiles of a part, tiles of the channels."""
    b, n, c = x.shape
    (rows, columns), most = _TILE, _ceil(x.shape[1], _TILE[0])
    tiles = _ceil(c, columns)
    splits = min(most, _SPLITS, max(1, _ceil(_PROGRAMS, max(1, b * tiles))))
    turns = max(1, _ceil(most, max(1, splits)))
    return _ceil(n, rows * turns), turns, tiles


@launched(
    "group_norm",
    "(Tensor x, Tensor shift, int groups, Tensor weight, Tensor bias, float eps, float slope) "
    "-> (Tensor, Tensor)",
)
def _forward(
    x: Tensor, shift: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, slope: float
) -> tuple[Tensor, Tensor]:
    """The result, and of each image's groups mean and inverse deviation, (b, groups, 2)."""
    x, spacing = _rows(x)
    shift, weight, bias = (z.contiguous() for z in (shift, weight, bias))
    b, n, c = x.shape
    out = torch.empty(b, n, c, dtype=x.dtype, device=x.device)
    stats = torch.empty(b, groups, 2, dtype=torch.float32, device=x.device)
    if out.numel():
        splits, turns, tiles = _sizes(x)
        partial = torch.empty(b, splits, 2, c, dtype=torch.float32, device=x.device)
        grid, tile = (b * splits, tiles), _TILE
        _moments_kernel[grid](x, shift, partial, n, c, spacing, splits, turns, *tile, num_warps=4)
        _statistics_kernel[(b * groups,)](
            partial, stats, n, c, groups, splits, turns * tile[0], eps,
            triton.next_power_of_2(splits), triton.next_power_of_2(c // groups), num_warps=4,
        )  # fmt: skip
        _group_norm_kernel[grid](
            x, shift, stats, weight, bias, out, n, c, spacing, groups, splits, turns, slope, *tile,
            num_warps=4,
        )  # fmt: skip
    return out, stats


@launched(
    "group_norm_backward",
    "(Tensor grad, Tensor stats, Tensor x, Tensor shift, Tensor weight, Tensor bias, int groups, "
    "float slope) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor, stats: Tensor, x: Tensor, shift: Tensor, weight: Tensor, bias: Tensor,
    groups: int, slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (x, spacing), (grad, g_row) = _rows(x), _rows(grad)
    shift, weight, bias = (z.contiguous() for z in (shift, weight, bias))
    b, n, c = x.shape
    out = torch.empty(b, n, c, dtype=x.dtype, device=x.device)
    # Of one image they are the sums over all: rounded once, and none of them a view of another.
    dtype = weight.dtype if b == 1 else torch.float32
    totals = [torch.empty(b, c, dtype=dtype, device=x.device) for _ in range(3)]
    if out.numel():
        splits, turns, tiles = _sizes(x)
        partial = torch.empty(b, splits, 3, c, dtype=torch.float32, device=x.device)
        means = torch.empty_like(stats)
        grid, tile = (b * splits, tiles), _TILE
        sizes = n, c, g_row, spacing, groups, splits, turns, slope, *tile
        _sums_kernel[grid](grad, x, shift, stats, weight, bias, partial, *sizes, num_warps=4)
        _means_kernel[(b * groups,)](
            partial, stats, weight, *totals, means, n, c, groups, splits,
            triton.next_power_of_2(splits), triton.next_power_of_2(c // groups), num_warps=4,
        )  # fmt: skip
        _group_norm_backward_kernel[grid](
            grad, x, shift, stats, means, weight, bias, out, *sizes, num_warps=4
        )
    else:
        totals = [z.zero_() for z in totals]
    of_bias, of_weight, of_shift = (
        z.view(c) if b == 1 else column_sum(z, weight.dtype) for z in totals
    )
    return out, of_shift, of_weight, of_bias


@_forward.register_fake
def _(x: Tensor, shift: Tensor, groups: int, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], groups, 2, dtype=torch.float32)


@_backward.register_fake
def _(
    grad: Tensor, stats: Tensor, x: Tensor, *parameters: Tensor, **_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shift, weight, bias = (z.new_empty(z.shape) for z in parameters[:3])
    return x.new_empty(x.shape), shift, weight, bias


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, shift, ctx.groups, weight, bias, _, ctx.slope = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], x, shift, weight, bias)


def _gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    of_x, of_shift, *rest = _backward(grad, *ctx.saved_tensors, ctx.groups, ctx.slope)
    return of_x, of_shift, None, *rest, None, None


_forward.register_autograd(_gradients, setup_context=_setup)


def group_norm(
    x: Tensor, shift: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float,
    slope: float = 1.0,
) -> Tensor:  # fmt: skip
    """See ``attnzoo.ops.group_norm``; computed in float32, rounded once."""
    return _forward(x, shift, groups, weight, bias, eps, slope)[0]
