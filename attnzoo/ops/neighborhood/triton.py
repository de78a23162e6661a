"""Neighborhood attention and its gradient, tile by tile of the map.

A program has 8 x 8 neighbors on the map, who together see few more keys than each of them does,
and goes over these in blocks of the map: a window of 7 x 7 costs 256 keys a query. Whoever is seen
by a tile of keys is such a window too, so that their gradient goes the same way.
"""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.ops.neighborhood.window import Grid, Window, axis_of
from attnzoo.ops.precision import operand_dtype
from attnzoo.ops.triton_common import (
    _LOG2E,
    _add_dot,
    _ceil,
    _dot,
    _precision,
    _rows,
    _width,
    launch_kernel,
    launched,
)


@triton.jit
def _places(first_y, first_x, height, width, order, H: tl.constexpr, W: tl.constexpr,
            MOVED: tl.constexpr):  # fmt: skip
    """A block of the map: its rows and columns, which of them exist, and their tokens."""
    i = tl.arange(0, H * W)
    y, x = first_y + i // W, first_x + i % W
    is_real = (y < height) & (x < width)
    row, column = y, x
    if MOVED:
        row = tl.load(order + y, mask=is_real, other=0)
        column = tl.load(order + height + x, mask=is_real, other=0)
    return y, x, is_real, row * width + column


@triton.jit
def _bounds(spans, y, x, is_real, height, width):
    """Whom each place of a tile sees: from and to of the rows, from and to of the columns."""
    top = tl.load(spans + y, mask=is_real, other=height)
    bottom = tl.load(spans + height + y, mask=is_real, other=0)
    left = tl.load(spans + 2 * height + x, mask=is_real, other=width)
    right = tl.load(spans + 2 * height + width + x, mask=is_real, other=0)
    return top, bottom, left, right


@triton.jit
def _tile_here(order, spans, height, width, tiles, S: tl.constexpr, KH: tl.constexpr,
               KW: tl.constexpr, MOVED: tl.constexpr):  # fmt: skip
    """A program's tile, whom its places see, and the blocks of the map that hold these."""
    y, x, is_real, token = _places(
        tl.program_id(0) // tiles * S, tl.program_id(0) % tiles * S, height, width, order, S, S,
        MOVED,
    )  # fmt: skip
    top, bottom, left, right = _bounds(spans, y, x, is_real, height, width)
    start_y, start_x = tl.min(top, 0), tl.min(left, 0)
    across = tl.cdiv(tl.max(right, 0) - start_x, KW)
    blocks = tl.cdiv(tl.max(bottom, 0) - start_y, KH) * across
    return y, x, is_real, token, top, bottom, left, right, start_y, start_x, across, blocks


@triton.jit
def _sees(y, x, top, bottom, left, right, other_y, other_x, limit, DISC: tl.constexpr):
    """(places, others)."""
    down, across = other_y[None, :], other_x[None, :]
    seen = (down >= top[:, None]) & (down < bottom[:, None])
    seen &= (across >= left[:, None]) & (across < right[:, None])
    if DISC:
        dy, dx = y[:, None] - down, x[:, None] - across
        seen &= dy * dy + dx * dx < limit
    return seen


@triton.jit
def _tile(z, token, spacing, column, is_real, d):
    mask = is_real[:, None] & (column < d)[None, :]
    return tl.load(z + token[:, None] * spacing + column[None, :], mask=mask, other=0.0)


@triton.jit
def _neighborhood_kernel(
    query, key, value, order, spans, out, logs, height, width, tiles, heads, d, q_row, k_row,
    v_row, scale, limit, MOVED: tl.constexpr, DISC: tl.constexpr, S: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    image, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    first = image.to(tl.int64) * height * width
    column = tl.arange(0, D)
    y, x, is_real, token, top, bottom, left, right, start_y, start_x, across, blocks = _tile_here(
        order, spans, height, width, tiles, S, KH, KW, MOVED
    )
    key += first * k_row + head * d
    value += first * v_row + head * d
    q = _tile(query + first * q_row + head * d, token, q_row, column, is_real, d)
    peak = tl.full((S * S,), -1e30, tl.float32)
    total = tl.zeros((S * S,), tl.float32)
    acc = tl.zeros((S * S, D), tl.float32)
    for step in range(blocks):
        other_y, other_x, is_key, other = _places(
            start_y + step // across * KH, start_x + step % across * KW, height, width, order,
            KH, KW, MOVED,
        )  # fmt: skip
        k = _tile(key, other, k_row, column, is_key, d)
        v = _tile(value, other, v_row, column, is_key, d)
        s = _dot(q, tl.trans(k), P) * (scale * _LOG2E)
        seen = _sees(y, x, top, bottom, left, right, other_y, other_x, limit, DISC)
        s = tl.where(seen, s, -float("inf"))
        higher = tl.maximum(peak, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        shrink = tl.exp2(peak - higher)
        total = total * shrink + tl.sum(p, 1)
        acc = _add_dot(acc * shrink[:, None], p.to(v.dtype), v, P)
        peak = higher
    total = tl.where(is_real, total, 1.0)
    mask = is_real[:, None] & (column < d)[None, :]
    place = out + first * (heads * d) + head * d + token[:, None] * (heads * d) + column[None, :]
    tl.store(place, (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)
    place = logs + tl.program_id(1).to(tl.int64) * height * width + token
    tl.store(place, peak + tl.log2(total), mask=is_real)


@triton.jit
def _neighborhood_query_kernel(
    grad, out, query, key, value, order, spans, logs, grad_q, along, height, width, tiles, heads,
    d, g_row, q_row, k_row, v_row, scale, limit, MOVED: tl.constexpr, DISC: tl.constexpr,
    S: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The gradient of queries, and the product of each output and its gradient."""
    image, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    first = image.to(tl.int64) * height * width
    column, row = tl.arange(0, D), heads * d
    y, x, is_real, token, top, bottom, left, right, start_y, start_x, across, blocks = _tile_here(
        order, spans, height, width, tiles, S, KH, KW, MOVED
    )
    key += first * k_row + head * d
    value += first * v_row + head * d
    q = _tile(query + first * q_row + head * d, token, q_row, column, is_real, d)
    g = _tile(grad + first * g_row + head * d, token, g_row, column, is_real, d)
    z = _tile(out + first * row + head * d, token, row, column, is_real, d)
    delta = tl.sum(z.to(tl.float32) * g.to(tl.float32), 1)
    place = tl.program_id(1).to(tl.int64) * height * width + token
    tl.store(along + place, delta, mask=is_real)
    log = tl.load(logs + place, mask=is_real, other=0.0)
    acc = tl.zeros((S * S, D), tl.float32)
    for step in range(blocks):
        other_y, other_x, is_key, other = _places(
            start_y + step // across * KH, start_x + step % across * KW, height, width, order,
            KH, KW, MOVED,
        )  # fmt: skip
        k = _tile(key, other, k_row, column, is_key, d)
        v = _tile(value, other, v_row, column, is_key, d)
        s = _dot(q, tl.trans(k), P) * (scale * _LOG2E)
        seen = _sees(y, x, top, bottom, left, right, other_y, other_x, limit, DISC)
        p = tl.where(seen, tl.exp2(s - log[:, None]), 0.0)
        slope = p * (_dot(g, tl.trans(v), P) - delta[:, None])
        acc = _add_dot(acc, slope.to(k.dtype), k, P)
    mask = is_real[:, None] & (column < d)[None, :]
    place = grad_q + first * row + head * d + token[:, None] * row + column[None, :]
    tl.store(place, (acc * scale).to(grad_q.dtype.element_ty), mask=mask)


@triton.jit
def _neighborhood_key_kernel(
    grad, query, key, value, order, spans, logs, along, grad_k, grad_v, height, width, tiles,
    heads, d, g_row, q_row, k_row, v_row, scale, limit, MOVED: tl.constexpr, DISC: tl.constexpr,
    S: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The gradients of keys and values; the spans are of the queries that see them."""
    image, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    first = image.to(tl.int64) * height * width
    column, row = tl.arange(0, D), heads * d
    y, x, is_real, token, top, bottom, left, right, start_y, start_x, across, blocks = _tile_here(
        order, spans, height, width, tiles, S, KH, KW, MOVED
    )
    query += first * q_row + head * d
    grad += first * g_row + head * d
    logs += tl.program_id(1).to(tl.int64) * height * width
    along += tl.program_id(1).to(tl.int64) * height * width
    k = _tile(key + first * k_row + head * d, token, k_row, column, is_real, d)
    v = _tile(value + first * v_row + head * d, token, v_row, column, is_real, d)
    of_key = tl.zeros((S * S, D), tl.float32)
    of_value = tl.zeros((S * S, D), tl.float32)
    for step in range(blocks):
        other_y, other_x, is_query, other = _places(
            start_y + step // across * KH, start_x + step % across * KW, height, width, order,
            KH, KW, MOVED,
        )  # fmt: skip
        q = _tile(query, other, q_row, column, is_query, d)
        g = _tile(grad, other, g_row, column, is_query, d)
        log = tl.load(logs + other, mask=is_query, other=0.0)
        delta = tl.load(along + other, mask=is_query, other=0.0)
        s = _dot(k, tl.trans(q), P) * (scale * _LOG2E)
        seen = _sees(y, x, top, bottom, left, right, other_y, other_x, limit, DISC)
        p = tl.where(seen, tl.exp2(s - log[None, :]), 0.0)
        of_value = _add_dot(of_value, p.to(g.dtype), g, P)
        slope = p * (_dot(v, tl.trans(g), P) - delta[None, :])
        of_key = _add_dot(of_key, slope.to(q.dtype), q, P)
    mask = is_real[:, None] & (column < d)[None, :]
    place = first * row + head * d + token[:, None] * row + column[None, :]
    tl.store(grad_k + place, (of_key * scale).to(grad_k.dtype.element_ty), mask=mask)
    tl.store(grad_v + place, of_value.to(grad_v.dtype.element_ty), mask=mask)


SIDE = 8  # of a tile
# Rows and columns of a block of the others, warps and stages, in half precision.
BLOCKS = {"forward": (4, 16, 4, 2), "query": (4, 16, 4, 2), "key": (4, 16, 4, 2)}


@functools.cache  # for good: a recorded CUDA graph goes on reading it
def _tables(grid: Grid, window: Window, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The order of rows and columns; spans of keys that are seen; spans of queries that see."""
    axes = [axis_of(length, window) for length in grid]
    seen, seeing = [], []
    for axis in axes:
        place = torch.arange(len(axis.order))
        seen += axis.first, axis.stop
        # From the first query whose window stops behind a key to the last that starts before.
        seeing += [(axis.stop[None] <= place[:, None]).sum(1)]
        seeing += [(axis.first[None] <= place[:, None]).sum(1)]
    parts = [axis.order for axis in axes], seen, seeing
    with torch.inference_mode(False):  # or else no gradient could read it later
        order, seen, seeing = (torch.cat(z).to(device, torch.int32) for z in parts)
    return order, seen, seeing


def _launch(
    kernel: str, query: Tensor, height: int, width: int, window: Window, heads: int
) -> tuple[Any, ...]:
    """The grid; what the kernel is told behind its tensors; what Triton is told."""
    b, d = len(query), query.shape[2] // heads
    high, wide, warps, stages = BLOCKS[kernel]
    side = SIDE
    if query.dtype == torch.float32:
        side, high, wide, stages = SIDE if d <= 64 else 4, 2, 8, 1
    tiles = _ceil(width, side)
    constants = (
        window.dilation > 1 and not window.radius, window.radius > 0, side, high, wide, _width(d),
        _precision(query.dtype),
    )  # fmt: skip
    options = {"num_warps": warps, "num_stages": stages}
    return (_ceil(height, side) * tiles, b * heads), tiles, constants, options


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
    (b, n, c), shape = query.shape, Window(*window)
    out = torch.empty(b, n, c, dtype=query.dtype, device=query.device)
    logs = torch.empty(b, heads, n, dtype=torch.float32, device=query.device)
    if not out.numel():
        return out, logs
    order, seen, _ = _tables((height, width), shape, query.device)
    grid, tiles, constants, options = _launch("forward", query, height, width, shape, heads)
    d = c // heads
    launch_kernel(
        _neighborhood_kernel, grid, query, key, value, order, seen, out, logs, height, width,
        tiles, heads, d, q_row, k_row, v_row, d**-0.5, shape.radius**2, *constants, **options,
    )  # fmt: skip
    return out, logs


@launched(
    "neighborhood_tokens_backward",
    f"(Tensor grad, Tensor out, Tensor logs, {SCHEMA}) -> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor, out: Tensor, logs: Tensor, query: Tensor, key: Tensor, value: Tensor, heads: int,
    height: int, width: int, *window: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (query, q_row), (key, k_row), (value, v_row) = _rows(query), _rows(key), _rows(value)
    grad, g_row = _rows(grad)
    (b, n, c), shape = query.shape, Window(*window)
    grad_q, grad_k, grad_v = (
        torch.empty(b, n, c, dtype=query.dtype, device=query.device) for _ in range(3)
    )
    if not grad_q.numel():
        return grad_q, grad_k, grad_v
    along = torch.empty(b, heads, n, dtype=torch.float32, device=query.device)
    order, seen, seeing = _tables((height, width), shape, query.device)
    d = c // heads
    grid, tiles, constants, options = _launch("query", query, height, width, shape, heads)
    numbers = (
        height, width, tiles, heads, d, g_row, q_row, k_row, v_row, d**-0.5, shape.radius**2,
    )  # fmt: skip
    launch_kernel(
        _neighborhood_query_kernel, grid, grad, out, query, key, value, order, seen, logs, grad_q,
        along, *numbers, *constants, **options,
    )  # fmt: skip
    constants, options = _launch("key", query, height, width, shape, heads)[2:]
    launch_kernel(
        _neighborhood_key_kernel, grid, grad, query, key, value, order, seeing, logs, along,
        grad_k, grad_v, *numbers, *constants, **options,
    )  # fmt: skip
    return grad_q, grad_k, grad_v


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, heads: int, *_: Any) -> tuple[Tensor, Tensor]:
    b, n = query.shape[:2]
    return query.new_empty(query.shape), query.new_empty(b, heads, n, dtype=torch.float32)


@_backward.register_fake
def _(*operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (z.new_empty(z.shape) for z in operands[3:6])
    return query, key, value


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *operands, ctx.heads, ctx.height, ctx.width, ctx.side, ctx.dilation, ctx.radius = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *operands)


def _gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    sizes = ctx.heads, ctx.height, ctx.width, ctx.side, ctx.dilation, ctx.radius
    return *_backward(grad, *ctx.saved_tensors, *sizes), *(None,) * 6


_forward.register_autograd(_gradients, setup_context=_setup)


def neighborhood_attention(
    query: Tensor, key: Tensor, value: Tensor, grid: Grid, window: Window
) -> Tensor:
    """See ``attnzoo.ops.neighborhood``; scores and sums in float32."""
    dtype, heads = operand_dtype(query), query.shape[1]
    operands = (z.to(dtype).transpose(1, 2).flatten(2) for z in (query, key, value))
    out = _forward(*operands, heads, *grid, *window)[0]
    return out.unflatten(-1, (heads, -1)).transpose(1, 2)
