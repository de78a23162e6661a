"""Feature fixation, from the packed projection and back into it.

A program reads a part of one head's tokens; each channel of keys and values is loaded from the
neighbor that it comes from. Gates and features are made in registers, and made again for the
gradient. A shifted gradient goes back by gathering, so that no two programs write one place.
"""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAssignmentType=false

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.ops.fixation_core.torch import NEIGHBORS
from attnzoo.ops.linear_core.triton import _read, _sum, query_gradient
from attnzoo.ops.precision import operand_dtype
from attnzoo.ops.triton_common import (
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
from attnzoo.ops.triton_replay import replayed

# Two bits for each kind of channel, one more than its neighbor's distance; the last kind stays.
_DOWN, _RIGHT = (
    tl.constexpr(sum((z + 1) << 2 * i for i, z in enumerate((*steps, 0))))
    for steps in zip(*NEIGHBORS, strict=True)
)
_STRAIGHT = tl.constexpr(4)  # the first kinds, which are zero beyond the border


@triton.jit
def _steps(channel, F: tl.constexpr):
    """Of channels, (1, C), their kind and how far down and to the right they come from."""
    kind = tl.minimum(channel // F, 8)
    zero = tl.zeros_like(kind)
    down, right = (zero + _DOWN) >> (2 * kind), (zero + _RIGHT) >> (2 * kind)
    return kind, (down & 3) - 1, (right & 3) - 1


@triton.jit
def _is_inside(y, x, height, width):
    return (y >= 0) & (y < height) & (x >= 0) & (x < width)


@triton.jit
def _near(z, row, spacing, first, column, height, width, mask, F: tl.constexpr):
    """A tile of tokens, each channel from its neighbor.

    Args:
        first: The head's first channel.
        F: Channels of each neighbor; 0 where none is shifted. The compiler knows it, so that it
            sees which channels are loaded together.
    """
    token = row[:, None]
    if F > 0:
        kind, down, right = _steps((first + column)[None, :], F)
        y, x = (row // width)[:, None], (row % width)[:, None]
        is_there = _is_inside(y + down, x + right, height, width)
        mask = mask & (is_there | (kind >= _STRAIGHT))
        token += tl.where(is_there, down * width + right, 0)
    return tl.load(z + first + token * spacing + column[None, :], mask=mask, other=0.0)


@triton.jit
def _features(z, scale):
    """ReLU and what is added to it, rounded; like torch's ReLU it keeps a NaN."""
    wide = z.to(tl.float32)
    return (tl.where(wide <= 0, 0.0, wide) + scale).to(z.dtype)


@triton.jit
def _part(n, heads, d, splits, chunk, W: tl.constexpr):
    """Image and the head's first channel; first token and the one behind the last; channels."""
    part = tl.program_id(0) // heads
    start = part % splits * chunk
    column = tl.arange(0, W)
    image, first = (part // splits).to(tl.int64), tl.program_id(0) % heads * d
    return image, first, start, tl.minimum(start + chunk, n), column, column < d


@triton.jit
def _gate_weight(weight, bias, d, column, is_column, dtype: tl.constexpr):
    """Its parts of query, key and value, (outputs, inputs) each, and the bias, (1, W)."""
    mask = is_column[:, None] & is_column[None, :]
    place = weight + column[:, None] * (3 * d) + column[None, :]
    query = tl.load(place, mask=mask, other=0.0).to(dtype)
    key = tl.load(place + d, mask=mask, other=0.0).to(dtype)
    value = tl.load(place + 2 * d, mask=mask, other=0.0).to(dtype)
    return query, key, value, tl.load(bias + column, mask=is_column, other=0.0)[None, :]


@triton.jit
def _gated(
    query, key, value, row, spacing, first, column, height, width, mask, scale, w_query, w_key,
    w_value, b, F: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Of a tile of tokens the features of queries and keys, the values, and the gate, (R, W)."""
    q = _near(query, row, spacing, first, column, height, width, mask, 0)
    k = _near(key, row, spacing, first, column, height, width, mask, F)
    v = _near(value, row, spacing, first, column, height, width, mask, F)
    q, k = _features(q, scale), _features(k, scale)
    logit = _dot(q, tl.trans(w_query), P)
    logit = _add_dot(logit, k, tl.trans(w_key), P)
    logit = _add_dot(logit, v, tl.trans(w_value), P) + b.to(tl.float32)
    return q, k, v, 1.0 / (1.0 + tl.exp(-logit))


@triton.jit
def _fixation_fold_kernel(
    query, key, value, weight, bias, features, partial, n, heads, d, spacing, height, width, scale,
    splits, chunk, F: tl.constexpr, R: tl.constexpr, W: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Gated queries, and a part of the state of gated keys and of values."""
    image, first, start, stop, column, is_column = _part(n, heads, d, splits, chunk, W)
    query += image * n * spacing
    key += image * n * spacing
    value += image * n * spacing
    features += image * n * heads * d + first
    dtype: tl.constexpr = query.dtype.element_ty
    w_query, w_key, w_value, b = _gate_weight(weight, bias, d, column, is_column, dtype)
    acc = tl.zeros((W, W), tl.float32)
    total = tl.zeros((W,), tl.float32)
    for begin in range(start, stop, R):
        row = begin + tl.arange(0, R)
        mask = (row < stop)[:, None] & is_column[None, :]
        q, k, v, gate = _gated(
            query, key, value, row, spacing, first, column, height, width, mask, scale, w_query,
            w_key, w_value, b, F, P,
        )  # fmt: skip
        place = features + row[:, None] * (heads * d) + column[None, :]
        tl.store(place, (gate * q).to(dtype), mask=mask)
        k = tl.where((row < stop)[:, None], gate * k, 0.0)
        total += tl.sum(k, 0)
        acc = _add_dot(acc, tl.trans(k.to(dtype)), v, P)
    state = partial + tl.program_id(0).to(tl.int64) * (d + 1) * d + column
    is_pair = is_column[:, None] & is_column[None, :]
    tl.store(state[None, :] + column[:, None] * d, acc, mask=is_pair)
    tl.store(state + d * d, total, mask=is_column)


@triton.jit
def _fixation_gradient_kernel(
    query, key, value, weight, bias, of_features, of_state, grads, moved, partial, n, heads, d,
    spacing, height, width, scale, splits, chunk, F: tl.constexpr, R: tl.constexpr,
    W: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Of tokens, and a part of the gate's; of channels that are shifted into ``moved``."""
    image, first, start, stop, column, is_column = _part(n, heads, d, splits, chunk, W)
    c = heads * d
    query += image * n * spacing
    key += image * n * spacing
    value += image * n * spacing
    grads += image * n * 3 * c + first
    moved += image * n * (16 * F) + first
    of_features += image * n * c + first
    dtype: tl.constexpr = query.dtype.element_ty
    w_query, w_key, w_value, b = _gate_weight(weight, bias, d, column, is_column, dtype)
    of_state += (image * heads + tl.program_id(0) % heads) * (d + 1) * d + column
    is_pair = is_column[:, None] & is_column[None, :]
    products = tl.load(of_state[None, :] + column[:, None] * d, mask=is_pair, other=0.0).to(dtype)
    sums = tl.load(of_state + d * d, mask=is_column, other=0.0)[None, :]
    of_query_weight = tl.zeros((W, W), tl.float32)
    of_key_weight = tl.zeros((W, W), tl.float32)
    of_value_weight = tl.zeros((W, W), tl.float32)
    of_bias = tl.zeros((W,), tl.float32)
    for begin in range(start, stop, R):
        row = begin + tl.arange(0, R)
        mask = (row < stop)[:, None] & is_column[None, :]
        of_q = tl.load(of_features + row[:, None] * c + column[None, :], mask=mask, other=0.0)
        q, k, v, gate = _gated(
            query, key, value, row, spacing, first, column, height, width, mask, scale, w_query,
            w_key, w_value, b, F, P,
        )  # fmt: skip
        # Each is rounded, stored and forgotten as soon as may be: registers are few.
        of_k = (_dot(v, tl.trans(products), P) + sums).to(dtype)
        of_logit = (of_q.to(tl.float32) * q + of_k.to(tl.float32) * k) * gate * (1.0 - gate)
        of_logit = tl.where((row < stop)[:, None], of_logit, 0.0)
        of_bias += tl.sum(of_logit, 0)
        slope = of_logit.to(dtype)
        turned = tl.trans(slope)
        of_query_weight = _add_dot(of_query_weight, turned, q, P)
        of_key_weight = _add_dot(of_key_weight, turned, k, P)
        of_value_weight = _add_dot(of_value_weight, turned, v, P)
        place = grads + row[:, None] * (3 * c) + column[None, :]
        of_q = _dot(slope, w_query, P) + of_q * gate
        z = _near(query, row, spacing, first, column, height, width, mask, 0)
        tl.store(place, tl.where(z <= 0, 0.0, of_q).to(dtype), mask=mask)
        of_k = _dot(slope, w_key, P) + of_k * gate
        z = _near(key, row, spacing, first, column, height, width, mask, F)
        of_k = tl.where(z <= 0, 0.0, of_k).to(dtype)
        of_v = _dot((gate * k).to(dtype), products, P)
        of_v = _add_dot(of_v, slope, w_value, P).to(dtype)
        if F > 0:
            is_moved = (first + column < 8 * F)[None, :]
            there = moved + row[:, None] * (16 * F) + column[None, :]
            tl.store(there, of_k, mask=mask & is_moved)
            tl.store(there + 8 * F, of_v, mask=mask & is_moved)
            mask = mask & (is_moved == 0)
        tl.store(place + c, of_k, mask=mask)
        tl.store(place + 2 * c, of_v, mask=mask)
    partial += tl.program_id(0).to(tl.int64) * (3 * d + 1) * d + column
    place = partial[None, :] + column[:, None] * (3 * d)
    tl.store(place, of_query_weight, mask=is_pair)
    tl.store(place + d, of_key_weight, mask=is_pair)
    tl.store(place + 2 * d, of_value_weight, mask=is_pair)
    tl.store(partial + 3 * d * d, of_bias, mask=is_column)


@triton.jit
def _shift_back_kernel(
    moved, grads, rows, height, width, c, F: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    """Gradients of channels of keys, or of values, where these came from."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.program_id(1) * C + tl.arange(0, C)
    kind, down, right = _steps(column[None, :], F)
    mask = (row < rows)[:, None] & (column < 8 * F)[None, :]
    token = row % (height * width)
    y, x = (token // width)[:, None], (token % width)[:, None]
    is_read = _is_inside(y - down, x - right, height, width)
    is_kept = (kind >= _STRAIGHT) & (_is_inside(y + down, x + right, height, width) == 0)
    moved += tl.program_id(2) * 8 * F + row.to(tl.int64)[:, None] * (16 * F)
    moved += column[None, :]
    z = tl.load(moved - (down * width + right) * (16 * F), mask=mask & is_read, other=0.0)
    own = tl.load(moved, mask=mask & is_kept, other=0.0)
    z = (z.to(tl.float32) + own.to(tl.float32)).to(grads.dtype.element_ty)
    grads += (1 + tl.program_id(2)) * c + row.to(tl.int64)[:, None] * (3 * c) + column[None, :]
    tl.store(grads, z, mask=mask)


class Block(NamedTuple):
    """How a kernel is launched: tokens of a tile, programs at least, warps, stages, registers."""

    rows: int
    programs: int
    warps: int
    stages: int
    registers: int


# In half precision; in float32 registers hold fewer tokens.
FOLD, GRADIENT = Block(64, 264, 4, 2, 255), Block(32, 264, 8, 1, 128)
FLOAT32_ROWS = 16
SHIFT_TILE = 32, 128  # tokens and channels


def _launch(
    block: Block, qkv: Tensor, heads: int, grid: tuple[int, int], fold: int
) -> tuple[int, tuple[Any, ...], dict[str, int]]:
    """Parts of an image's tokens; what the kernel is told last; what Triton is told."""
    b, n, c = qkv.shape
    d = c // (3 * heads)
    rows = block.rows if qkv.dtype != torch.float32 else FLOAT32_ROWS
    splits = max(1, min(_ceil(n, rows), _ceil(block.programs, max(1, b * heads))))
    chunk = max(1, _ceil(_ceil(n, splits), rows)) * rows
    splits = _ceil(n, chunk)
    sizes = *grid, d**-0.5, splits, chunk
    tile = fold, rows, _width(d), _precision(qkv.dtype)
    options = {"num_warps": block.warps, "num_stages": block.stages}
    return splits, (*sizes, *tile), options | ({"maxnreg": block.registers} if _is_fast() else {})


SCHEMA = (
    "Tensor qkv, Tensor weight, Tensor bias, int heads, int height, int width, bool shift, "
    "float eps"
)


@launched("fixation_core", f"({SCHEMA}) -> (Tensor, Tensor, Tensor)")
def _forward(
    qkv: Tensor, weight: Tensor, bias: Tensor, heads: int, height: int, width: int, shift: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The result; gated queries; the state, (b, h, d + 1, d)."""
    qkv, spacing = _rows(qkv)
    query, key, value = qkv.chunk(3, dim=-1)
    b, n, c = query.shape
    d, fold = c // heads, c // 16 if shift else 0
    out, features = (torch.empty(b, n, c, dtype=qkv.dtype, device=qkv.device) for _ in range(2))
    splits, sizes, options = _launch(FOLD, qkv, heads, (height, width), fold)
    partial = torch.empty(b, splits, heads, d + 1, d, dtype=torch.float32, device=qkv.device)
    if out.numel():
        launch_kernel(_fixation_fold_kernel, (b * splits * heads,),
            query, key, value, weight.contiguous(), bias, features, partial, n, heads, d, spacing,
            *sizes, **options,
        )  # fmt: skip
    state, *_ = _sum(partial)
    if out.numel():
        _read(features, state, out, heads, "none", True, eps, qkv.dtype, state)
    return out, features, state


@launched(
    "fixation_core_backward",
    f"(Tensor grad, Tensor features, Tensor state, {SCHEMA}) -> (Tensor, Tensor)",
)
def _backward(
    grad: Tensor, features: Tensor, state: Tensor, qkv: Tensor, weight: Tensor, bias: Tensor,
    heads: int, height: int, width: int, shift: bool, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Of tokens, and of the gate: its weight, then its bias."""
    qkv, spacing = _rows(qkv)
    query, key, value = qkv.chunk(3, dim=-1)
    b, n, c = query.shape
    d, fold = c // heads, c // 16 if shift else 0
    grads = torch.empty(b, n, 3 * c, dtype=qkv.dtype, device=qkv.device)
    splits, sizes, options = _launch(GRADIENT, qkv, heads, (height, width), fold)
    partial = torch.empty(
        b * splits * heads, (3 * d + 1) * d, dtype=torch.float32, device=qkv.device
    )
    if grads.numel():
        of_features = torch.empty(features.shape, dtype=qkv.dtype, device=qkv.device)
        of_state = query_gradient(
            features, grad, state, of_features, heads, "none", True, eps, qkv.dtype
        )
        moved = torch.empty(b, n, 16 * fold, dtype=qkv.dtype, device=qkv.device)
        launch_kernel(_fixation_gradient_kernel, (b * splits * heads,),
            query, key, value, weight.contiguous(), bias, of_features, of_state, grads, moved,
            partial, n, heads, d, spacing, *sizes, **options,
        )  # fmt: skip
        if fold:
            rows, columns = SHIFT_TILE
            launch_kernel(_shift_back_kernel, (_ceil(b * n, rows), _ceil(8 * fold, columns), 2),
                moved, grads, b * n, height, width, c, fold, rows, columns, num_warps=4,
            )  # fmt: skip
    return grads, column_sum(partial, weight.dtype)


@_forward.register_fake
def _(qkv: Tensor, weight: Any, bias: Any, heads: int, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    b, n, c = qkv.shape
    c //= 3
    state = qkv.new_empty(b, heads, c // heads + 1, c // heads, dtype=torch.float32)
    return qkv.new_empty(b, n, c), qkv.new_empty(b, n, c), state


@_backward.register_fake
def _(
    grad: Tensor, features: Any, state: Any, qkv: Tensor, weight: Tensor, bias: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), weight.new_empty(weight.numel() + bias.numel())


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *operands, ctx.heads, ctx.height, ctx.width, ctx.shift, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], *operands)


def _gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    sizes = ctx.heads, ctx.height, ctx.width, ctx.shift, ctx.eps
    *_, weight, bias = saved = ctx.saved_tensors
    of_qkv, of_gate = _backward(grad, *saved, *sizes)
    of_weight, of_bias = of_gate.split([weight.numel(), bias.numel()])
    return of_qkv, of_weight.view(weight.shape), of_bias.to(bias.dtype), *(None,) * 5


_forward.register_inference(replayed(_forward.function, 1))
_forward.register_autograd(_gradients, setup_context=_setup)


def fixation_core(
    qkv: Tensor, weight: Tensor, bias: Tensor, heads: int, grid: tuple[int, int],
    is_shifted: bool, eps: float,
) -> Tensor:  # fmt: skip
    """See ``attnzoo.ops.fixation_core``; gates, sums and the state in float32."""
    options = heads, *grid, is_shifted, eps
    return _forward(qkv.to(operand_dtype(qkv)), weight, bias, *options)[0]
