"""Neighborhood attention and its gradient, tile by tile of the map.

A program has 8 x 8 neighbors on the map, who together see few more keys than each of them does,
and goes over these in blocks of the map: a window of 7 x 7 costs 224 keys a query. Whoever is seen
by a tile of keys is nearly such a window too, so that their gradient goes the same way.
"""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.ops.neighborhood.window import Grid, Window
from attnzoo.ops.precision import operand_dtype
from attnzoo.ops.triton_common import (
    _LN2,
    _LOG2E,
    _add_dot,
    _ceil,
    _dot,
    _is_fast,
    _precision,
    _rows,
    _width,
    launch_kernel,
    launched,
)


@triton.jit
def _places(first_y, first_x, stop_y, stop_x, row, column, width, step, H: tl.constexpr,
            W: tl.constexpr):  # fmt: skip
    """A block of a part of the map: rows and columns there, which of them count, their tokens."""
    i = tl.arange(0, H * W)
    y, x = first_y + i // W, first_x + i % W
    is_real = (y < stop_y) & (x < stop_x)
    return y, x, is_real, (row + y * step) * width + column + x * step


@triton.jit
def _tile_here(height, width, step, S: tl.constexpr):
    """Where a program's tile begins, in which part of the map; where that begins; its sides.

    A part has every ``step``-th row and column, among which a dilated window is a plain one.
    """
    across = tl.cdiv(tl.cdiv(width, step), S)
    tiles = tl.cdiv(tl.cdiv(height, step), S) * across
    part, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    row, column = part // step, part % step
    high, wide = tl.cdiv(height - row, step), tl.cdiv(width - column, step)
    return tile // across * S, tile % across * S, row, column, high, wide


@triton.jit
def _first(place, side, length):
    """The first key of a query's window along an axis; squares are moved into the map."""
    return tl.maximum(tl.minimum(place - side // 2, length - side), 0)


@triton.jit
def _span(first, side, length, S: tl.constexpr, DISC: tl.constexpr, OF_KEYS: tl.constexpr):
    """Along an axis, from where to where a tile's queries see, or its keys are seen."""
    last, half = tl.minimum(first + S, length) - 1, side // 2
    if DISC:
        start, stop = tl.maximum(first - half, 0), tl.minimum(last + half + 1, length)
    elif OF_KEYS:
        start = tl.where(first < side, 0, first - side + 1 + half)
        stop = tl.where(last < length - side, last + half + 1, length)
    else:
        start = _first(first, side, length)
        stop = tl.minimum(_first(last, side, length) + side, length)
    return start, stop


@triton.jit
def _sees(y, x, key_y, key_x, side, limit, high, wide, DISC: tl.constexpr):
    """Whether queries see keys."""
    if DISC:
        dy, dx = key_y - y, key_x - x
        return (dy * dy + dx * dx < limit) & (key_y < high) & (key_x < wide)
    # Of unsigned numbers, those before the window are the largest.
    down = (key_y - _first(y, side, high)).to(tl.uint32)
    across = (key_x - _first(x, side, wide)).to(tl.uint32)
    is_within = down < tl.minimum(side, high).to(tl.uint32)
    return is_within & (across < tl.minimum(side, wide).to(tl.uint32))


@triton.jit
def _tile(z, token, spacing, column, is_real, d):
    mask = is_real[:, None] & (column < d)[None, :]
    return tl.load(z + token[:, None] * spacing + column[None, :], mask=mask, other=0.0)


@triton.jit
def _neighborhood_kernel(
    query, key, value, out, logs, height, width, step, heads, d, q_row, k_row, v_row, scale, side,
    limit, DISC: tl.constexpr, S: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    D: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    image, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    first, channel = image.to(tl.int64) * height * width, tl.arange(0, D)
    y, x, row, column, high, wide = _tile_here(height, width, step, S)
    top, bottom = _span(y, side, high, S, DISC, False)
    left, right = _span(x, side, wide, S, DISC, False)
    y, x, is_real, token = _places(y, x, high, wide, row, column, width, step, S, S)
    key += first * k_row + head * d
    value += first * v_row + head * d
    q = _tile(query + first * q_row + head * d, token, q_row, channel, is_real, d)
    peak = tl.full((S * S,), -1e30, tl.float32)
    total = tl.zeros((S * S,), tl.float32)
    acc = tl.zeros((S * S, D), tl.float32)
    across = tl.cdiv(right - left, KW)
    for i in range(tl.cdiv(bottom - top, KH) * across):
        key_y, key_x, is_key, other = _places(
            top + i // across * KH, left + i % across * KW, bottom, right, row, column, width,
            step, KH, KW,
        )  # fmt: skip
        k = _tile(key, other, k_row, channel, is_key, d)
        v = _tile(value, other, v_row, channel, is_key, d)
        seen = _sees(y[:, None], x[:, None], key_y[None, :], key_x[None, :], side, limit, high,
                     wide, DISC)  # fmt: skip
        s = tl.where(seen, _dot(q, tl.trans(k), P), -float("inf"))
        higher = tl.maximum(peak, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - higher[:, None])
        shrink = tl.exp2(peak - higher)
        total = total * shrink + tl.sum(p, 1)
        acc = _add_dot(acc * shrink[:, None], p.to(v.dtype), v, P)
        peak = higher
    total = tl.where(is_real, total, 1.0)
    mask = is_real[:, None] & (channel < d)[None, :]
    place = out + (first + token)[:, None] * (heads * d) + head * d + channel[None, :]
    tl.store(place, (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)
    place = logs + tl.program_id(1).to(tl.int64) * height * width + token
    tl.store(place, peak + tl.log2(total), mask=is_real)


@triton.jit
def _neighborhood_query_kernel(
    grad, out, query, key, value, logs, grads, along, height, width, step, heads, d, g_row, q_row,
    k_row, v_row, scale, side, limit, DISC: tl.constexpr, S: tl.constexpr, KH: tl.constexpr,
    KW: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The gradient of queries, and the product of each output and its gradient."""
    image, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    first, channel, o_row = image.to(tl.int64) * height * width, tl.arange(0, D), heads * d
    y, x, row, column, high, wide = _tile_here(height, width, step, S)
    top, bottom = _span(y, side, high, S, DISC, False)
    left, right = _span(x, side, wide, S, DISC, False)
    y, x, is_real, token = _places(y, x, high, wide, row, column, width, step, S, S)
    key += first * k_row + head * d
    value += first * v_row + head * d
    q = _tile(query + first * q_row + head * d, token, q_row, channel, is_real, d)
    g = _tile(grad + first * g_row + head * d, token, g_row, channel, is_real, d)
    z = _tile(out + first * o_row + head * d, token, o_row, channel, is_real, d)
    delta = tl.sum(z.to(tl.float32) * g.to(tl.float32), 1)
    place = tl.program_id(1).to(tl.int64) * height * width + token
    tl.store(along + place, delta, mask=is_real)
    log = tl.load(logs + place, mask=is_real, other=0.0)
    acc = tl.zeros((S * S, D), tl.float32)
    across = tl.cdiv(right - left, KW)
    for i in range(tl.cdiv(bottom - top, KH) * across):
        key_y, key_x, is_key, other = _places(
            top + i // across * KH, left + i % across * KW, bottom, right, row, column, width,
            step, KH, KW,
        )  # fmt: skip
        k = _tile(key, other, k_row, channel, is_key, d)
        v = _tile(value, other, v_row, channel, is_key, d)
        seen = _sees(y[:, None], x[:, None], key_y[None, :], key_x[None, :], side, limit, high,
                     wide, DISC)  # fmt: skip
        p = tl.where(seen, tl.exp2(_dot(q, tl.trans(k), P) * scale - log[:, None]), 0.0)
        slope = p * (_dot(g, tl.trans(v), P) - delta[:, None])
        acc = _add_dot(acc, slope.to(k.dtype), k, P)
    mask = is_real[:, None] & (channel < d)[None, :]
    place = (
        grads + first * (3 * o_row) + head * d + token[:, None] * (3 * o_row) + channel[None, :]
    )
    tl.store(place, (acc * (scale * _LN2)).to(grads.dtype.element_ty), mask=mask)


@triton.jit
def _neighborhood_key_kernel(
    grad, query, key, value, logs, along, grads, height, width, step, heads, d, g_row, q_row,
    k_row, v_row, scale, side, limit, DISC: tl.constexpr, S: tl.constexpr, KH: tl.constexpr,
    KW: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The gradients of keys and values."""
    image, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    first, channel, o_row = image.to(tl.int64) * height * width, tl.arange(0, D), heads * d
    y, x, row, column, high, wide = _tile_here(height, width, step, S)
    top, bottom = _span(y, side, high, S, DISC, True)
    left, right = _span(x, side, wide, S, DISC, True)
    y, x, is_real, token = _places(y, x, high, wide, row, column, width, step, S, S)
    query += first * q_row + head * d
    grad += first * g_row + head * d
    logs += tl.program_id(1).to(tl.int64) * height * width
    along += tl.program_id(1).to(tl.int64) * height * width
    k = _tile(key + first * k_row + head * d, token, k_row, channel, is_real, d)
    v = _tile(value + first * v_row + head * d, token, v_row, channel, is_real, d)
    of_key = tl.zeros((S * S, D), tl.float32)
    of_value = tl.zeros((S * S, D), tl.float32)
    across = tl.cdiv(right - left, KW)
    for i in range(tl.cdiv(bottom - top, KH) * across):
        query_y, query_x, is_query, other = _places(
            top + i // across * KH, left + i % across * KW, bottom, right, row, column, width,
            step, KH, KW,
        )  # fmt: skip
        q = _tile(query, other, q_row, channel, is_query, d)
        g = _tile(grad, other, g_row, channel, is_query, d)
        log = tl.load(logs + other, mask=is_query, other=0.0)
        delta = tl.load(along + other, mask=is_query, other=0.0)
        seen = _sees(query_y[None, :], query_x[None, :], y[:, None], x[:, None], side, limit, high,
                     wide, DISC)  # fmt: skip
        p = tl.where(seen, tl.exp2(_dot(k, tl.trans(q), P) * scale - log[None, :]), 0.0)
        of_value = _add_dot(of_value, p.to(g.dtype), g, P)
        slope = p * (_dot(v, tl.trans(g), P) - delta[None, :])
        of_key = _add_dot(of_key, slope.to(q.dtype), q, P)
    mask = is_real[:, None] & (channel < d)[None, :]
    place = (
        grads + first * (3 * o_row) + head * d + token[:, None] * (3 * o_row) + channel[None, :]
    )
    tl.store(place + o_row, (of_key * (scale * _LN2)).to(grads.dtype.element_ty), mask=mask)
    tl.store(place + 2 * o_row, of_value.to(grads.dtype.element_ty), mask=mask)


SIDE = 8  # of a tile
# Rows and columns of a block of the others, warps, stages, and registers of a thread for heads of
# at most 64, in half precision: 17, 20 and 26 us for 12 heads of 64 x 64 tokens on an H200.
BLOCKS = {"forward": (2, 16, 4, 3, 96), "query": (2, 16, 4, 3, 96), "key": (2, 16, 4, 3, 168)}


def _launch(kernel: Any, name: str, tensors: tuple[Tensor, ...], spacings: tuple[int, ...],
            like: Tensor, heads: int, height: int, width: int, shape: Window) -> None:  # fmt: skip
    b, d = len(like), like.shape[2] // heads
    side, (high, wide, warps, stages, registers) = SIDE, BLOCKS[name]
    if is_wide := like.dtype == torch.float32:
        side, high, wide, stages = SIDE if d <= 64 else 4, 2, 8, 1
    limit = {"maxnreg": registers} if _is_fast() and d <= 64 and not is_wide else {}
    # Beyond the map's sides, every row and column is a part of its own.
    step = 1 if shape.radius else min(shape.dilation, max(height, width))
    tiles = step * step * _ceil(_ceil(height, step), side) * _ceil(_ceil(width, step), side)
    reach = 2 * shape.radius - 1 if shape.radius else shape.side
    launch_kernel(
        kernel, (tiles, b * heads), *tensors, height, width, step, heads, d, *spacings,
        d**-0.5 * _LOG2E.value, reach, shape.radius**2, shape.radius > 0, side, high, wide,
        _width(d), _precision(like.dtype), num_warps=warps, num_stages=stages, **limit,
    )  # fmt: skip


SCHEMA = (
    "Tensor query, Tensor key, Tensor value, int heads, int height, int width, int side, "
    "int dilation, int radius"
)


@launched("neighborhood_tokens", f"({SCHEMA}) -> (Tensor, Tensor)")
def _forward(
    query: Tensor, key: Tensor, value: Tensor, heads: int, height: int, width: int, *window: int
) -> tuple[Tensor, Tensor]:
    """The result, (b, n, c), and log2 of the sums of exponentials, (b, heads, n)."""
    (query, q_row), (key, k_row), (value, v_row) = _rows(query), _rows(key), _rows(value)
    b, n, c = query.shape
    out = torch.empty(b, n, c, dtype=query.dtype, device=query.device)
    logs = torch.empty(b, heads, n, dtype=torch.float32, device=query.device)
    if out.numel():
        _launch(
            _neighborhood_kernel, "forward", (query, key, value, out, logs), (q_row, k_row, v_row),
            query, heads, height, width, Window(*window),
        )  # fmt: skip
    return out, logs


@launched(
    "neighborhood_tokens_backward", f"(Tensor grad, Tensor out, Tensor logs, {SCHEMA}) -> Tensor"
)
def _backward(
    grad: Tensor, out: Tensor, logs: Tensor, query: Tensor, key: Tensor, value: Tensor, heads: int,
    height: int, width: int, *window: int,
) -> Tensor:  # fmt: skip
    """The gradients side by side, (b, n, 3 c), as a projection to all three wants them."""
    (query, q_row), (key, k_row), (value, v_row) = _rows(query), _rows(key), _rows(value)
    grad, g_row = _rows(grad)
    b, n, c = query.shape
    grads = torch.empty(b, n, 3 * c, dtype=query.dtype, device=query.device)
    if grads.numel():
        along, sizes = torch.empty_like(logs), (heads, height, width, Window(*window))
        spacings, read = (g_row, q_row, k_row, v_row), (query, key, value, logs)
        tensors = grad, out, *read, grads, along
        _launch(_neighborhood_query_kernel, "query", tensors, spacings, query, *sizes)
        tensors = grad, *read, along, grads
        _launch(_neighborhood_key_kernel, "key", tensors, spacings, query, *sizes)
    return grads


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, heads: int, *_: Any) -> tuple[Tensor, Tensor]:
    b, n = query.shape[:2]
    return query.new_empty(query.shape), query.new_empty(b, heads, n, dtype=torch.float32)


@_backward.register_fake
def _(*operands: Any) -> Tensor:
    b, n, c = operands[3].shape
    return operands[3].new_empty(b, n, 3 * c)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *operands, ctx.heads, ctx.height, ctx.width, ctx.side, ctx.dilation, ctx.radius = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *operands)


def _gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    sizes = ctx.heads, ctx.height, ctx.width, ctx.side, ctx.dilation, ctx.radius
    return *_backward(grad, *ctx.saved_tensors, *sizes).chunk(3, -1), *(None,) * 6


_forward.register_autograd(_gradients, setup_context=_setup)


def neighborhood_attention(
    query: Tensor, key: Tensor, value: Tensor, grid: Grid, window: Window
) -> Tensor:
    """See ``attnzoo.ops.neighborhood``; scores and sums in float32."""
    dtype, heads = operand_dtype(query), query.shape[1]
    operands = (z.to(dtype).transpose(1, 2).flatten(2) for z in (query, key, value))
    out = _forward(*operands, heads, *grid, *window)[0]
    return out.unflatten(-1, (heads, -1)).transpose(1, 2)
