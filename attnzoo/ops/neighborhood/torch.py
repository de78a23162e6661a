"""Neighborhood attention by dense products of tiles: n x (tile + window)^2 weights at most."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnzoo.ops.dispatch import custom_op
from attnzoo.ops.neighborhood.window import Grid, Window, limit_of, tiles_of
from attnzoo.ops.precision import in_float32

# Weights that are stored at once, where a row of tiles has not more: what a core's cache holds,
# or what keeps a GPU busy.
_WEIGHTS = {"cpu": 1 << 20, "cuda": 1 << 25}


def neighborhood_attention(
    query: Tensor, key: Tensor, value: Tensor, grid: Grid, window: Window
) -> Tensor:
    """See ``attnzoo.ops.neighborhood``."""
    return _attention(query, key, value, *grid, *window)


class _Plan(NamedTuple):
    queries: Tensor  # tokens, (rows of tiles, tiles, queries)
    keys: Tensor  # (rows of tiles, tiles, keys)
    rows: Tensor  # costs: (rows of tiles, 1, side, 1, reach, 1)
    columns: Tensor  # (1, tiles, 1, side, 1, reach)
    place: Tensor  # of every token among all queries, (n,)
    limit: int

    def bias(self, part: slice, dtype: torch.dtype) -> Tensor:
        """0 where a query sees a key, else minus infinity: (tiles, queries, keys)."""
        hidden = (self.rows[part] + self.columns >= self.limit).flatten(4).flatten(2, 3)
        bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        return bias.masked_fill_(hidden, float("-inf")).flatten(0, 1)


@functools.cache  # for good: a recorded CUDA graph goes on reading it
def _plan(grid: Grid, window: Window, device: torch.device) -> _Plan:
    height, width = grid
    rows, columns = tiles_of(height, width, window), tiles_of(width, height, window)

    def tokens(row: Tensor, column: Tensor) -> Tensor:
        return (row[:, None, :, None] * width + column[None, :, None]).flatten(2)

    side = columns.queries.shape[1]
    count = len(columns.queries)
    # By row of tiles, tile, row in it, column in it.
    of_rows, of_columns = rows.place[:, None], columns.place
    tile = of_rows // rows.queries.shape[1] * count + of_columns // side
    place = (tile * rows.queries.shape[1] + of_rows % rows.queries.shape[1]) * side
    tables = (
        tokens(rows.queries, columns.queries),
        tokens(rows.keys, columns.keys),
        rows.cost[:, None, :, None, :, None],
        columns.cost[None, :, None, :, None, :],
        (place + of_columns % side).flatten(),
    )
    queries, keys, *costs, place = (z.to(device) for z in tables)
    return _Plan(queries, keys, costs[0], costs[1], place, limit_of(window))


def _parts(plan: _Plan, query: Tensor) -> list[slice]:
    """Rows of tiles that are computed at once."""
    weights = query.shape[0] * query.shape[1] * plan.queries[0].numel() * plan.keys.shape[2]
    step = max(1, _WEIGHTS.get(query.device.type, 1 << 20) // max(weights, 1))
    return [slice(i, i + step) for i in range(0, len(plan.queries), step)]


def _take(z: Tensor, index: Tensor) -> Tensor:
    """(b, h, n, d) -> (b, h, tiles, queries or keys, d)."""
    return z.index_select(2, index.flatten()).unflatten(2, (-1, index.shape[-1]))


@in_float32
def _weights(query: Tensor, key: Tensor, bias: Tensor) -> Tensor:
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    return scores.add_(bias).softmax(-1)


@in_float32
def _read(value: Tensor, query: Tensor, key: Tensor, bias: Tensor) -> Tensor:
    return _weights(query, key, bias) @ value


@in_float32
def _gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor
) -> list[Tensor]:
    weights = _weights(query, key, bias)
    grad_value = weights.transpose(-2, -1) @ grad
    scores = grad @ value.transpose(-2, -1)
    scores -= (scores * weights).sum(-1, keepdim=True)
    scores *= weights.mul_(query.shape[-1] ** -0.5)
    return [scores @ key, scores.transpose(-2, -1) @ query, grad_value]


@custom_op("neighborhood")
def _attention(
    query: Tensor, key: Tensor, value: Tensor,
    height: int, width: int, side: int, dilation: int, radius: int,
) -> Tensor:  # fmt: skip
    plan = _plan((height, width), Window(side, dilation, radius), query.device)
    dtype = torch.promote_types(query.dtype, torch.float32)
    out = []
    for part in _parts(plan, query):
        keys = plan.keys[part]
        operands = _take(query, plan.queries[part]), _take(key, keys), plan.bias(part, dtype)
        out.append(_read(_take(value, keys), *operands).flatten(2, 3))
    return torch.cat(out, 2).index_select(2, plan.place)


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return query.new_empty(value.shape)


@custom_op("neighborhood_backward")
def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor,
    height: int, width: int, side: int, dilation: int, radius: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    plan = _plan((height, width), Window(side, dilation, radius), query.device)
    dtype = torch.promote_types(query.dtype, torch.float32)
    # A query that fills a tile up is another's copy, and what comes out of it is not read.
    filled = grad.new_zeros(*grad.shape[:2], plan.queries.numel(), grad.shape[3])
    filled.index_copy_(2, plan.place, grad)
    queries, sums = [], [torch.zeros_like(z, dtype=dtype) for z in (key, value)]
    start = 0
    for part in _parts(plan, query):
        index, keys = plan.queries[part], plan.keys[part]
        grads = filled[:, :, start : start + index.numel()].unflatten(2, (-1, index.shape[-1]))
        start += index.numel()
        operands = _take(query, index), _take(key, keys), _take(value, keys)
        of_query, *rest = _gradients(grads, *operands, plan.bias(part, dtype))
        queries.append(of_query.flatten(2, 3))
        for total, one in zip(sums, rest, strict=True):
            total.index_add_(2, keys.flatten(), one.flatten(2, 3))
    of_query = torch.cat(queries, 2).index_select(2, plan.place)
    return of_query.to(query.dtype), sums[0].to(key.dtype), sums[1].to(value.dtype)


@_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(z, memory_format=torch.contiguous_format) for z in (query, key, value)
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.place = inputs[3:]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(grad, *ctx.saved_tensors, *ctx.place), *(None for _ in ctx.place)


_attention.register_autograd(_differentiate, setup_context=_setup)
