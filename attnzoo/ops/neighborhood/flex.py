"""Neighborhood attention by PyTorch's FlexAttention, compiled for each grid; for GPUs.

Tokens are brought into the order of small tiles, so that a block of queries meets few blocks of
keys. Blocks are chosen from the tiles' windows: no n x n mask is made on the way.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from attnzoo.ops.neighborhood.window import Grid, Window, axis_of
from attnzoo.ops.reorder import reordered

# Tokens of a tile, which is a block of the kernels. The backward has none for less than 128.
_FEW, _MANY = 64, 128


class Plan:
    """How a grid is computed; no tuple, of which the compiler makes something else.

    Attributes:
        order: The tokens tile by tile, some repeated to fill tiles up: (m,).
        place: Where among them each token is: (n,).
        fills: Which of them fill tiles up: (m, 1); None where none does.
        blocks: How many blocks of keys each block of queries meets, which these come first of
            all, and both the other way round.
        bounds: y, x, first y, y to stop at, first x, x to stop at, each (m,).
    """

    def __init__(
        self, order: Tensor, place: Tensor, fills: Tensor | None, blocks: Any, bounds: Any
    ) -> None:
        self.order, self.place, self.fills = order, place, fills
        self.blocks, self.bounds = blocks, bounds


def neighborhood_attention(
    query: Tensor, key: Tensor, value: Tensor, grid: Grid, window: Window
) -> Tensor:
    """See ``attnzoo.ops.neighborhood``."""
    if not query.numel():
        return value.clone()
    is_trained = torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad
    )
    # Small blocks hold fewer keys in vain, but wide heads leave no room to have several in flight.
    is_wide = query.shape[-1] * query.dtype.itemsize > 128
    block = _MANY if is_trained or is_wide else _FEW
    plan = plan_of(grid, tuple(window), block, query.device)
    order = plan.order, plan.place, plan.fills
    operands = query, key, value, *order, *plan.blocks, *plan.bounds
    limit = window.radius**2
    if torch.compiler.is_compiling() or not query.is_cuda:
        return _attend(limit, *operands)
    shapes = query.shape, query.dtype, is_trained
    return _compiled(grid, window, query.device, *shapes)(limit, *operands)


def _attend(
    limit: int, query: Tensor, key: Tensor, value: Tensor, order: Tensor, place: Tensor,
    fills: Tensor | None, *plan: Tensor,
) -> Tensor:  # fmt: skip
    # Read and written as (b, n, heads, d), in which projections and their gradients are stored.
    query, key, value = (
        reordered(z.transpose(1, 2), 1, order, place).transpose(1, 2).contiguous()
        for z in (query, key, value)
    )
    mask = mask_of(limit, *plan)
    sides: Any = None if mask.BLOCK_SIZE[0] == _MANY else {"BLOCK_M": _FEW, "BLOCK_N": _FEW}
    out = flex_attention(query, key, value, block_mask=mask, kernel_options=sides)
    assert isinstance(out, Tensor)
    if fills is not None:  # or else the backward would give them the gradient of what they repeat
        out = out.masked_fill(fills, 0)
    return reordered(out.transpose(1, 2), 1, place, order).transpose(1, 2)


def mask_of(limit: int, *plan: Tensor) -> BlockMask:
    """The mask of blocks and of tokens, of a plan's blocks and bounds."""
    keys_met, keys_of, queries_met, queries_of, y, x, top, bottom, left, right = plan
    block = len(y) // keys_met.shape[-1]

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        inside = (y[k] >= top[q]) & (y[k] < bottom[q]) & (x[k] >= left[q]) & (x[k] < right[q])
        if limit:
            dy, dx = y[q] - y[k], x[q] - x[k]
            inside = inside & (dy * dy + dx * dx < limit)
        return inside

    return BlockMask(
        seq_lengths=(len(y), len(y)),
        kv_num_blocks=keys_met,
        kv_indices=keys_of,
        full_kv_num_blocks=None,
        full_kv_indices=None,
        q_num_blocks=queries_met,
        q_indices=queries_of,
        full_q_num_blocks=None,
        full_q_indices=None,
        BLOCK_SIZE=(block, block),
        mask_mod=sees,
    )


def plan_of(grid: Grid, window: tuple[int, ...], block: int, device: torch.device) -> Plan:
    """The order of the tokens and who meets whom, of tiles of ``block`` tokens."""
    with torch.inference_mode(False):  # or else no gradient could read it later
        return _plan(grid, Window(*window), block, device)


plan_of._dynamo_marked_constant = True  # type: ignore[attr-defined] # see dispatch


@functools.cache  # for good: a recorded CUDA graph goes on reading it
def _plan(grid: Grid, window: Window, block: int, device: torch.device) -> Plan:
    # Of all shapes of a tile, the one of which a query meets the fewest keys.
    shapes = [(block // width, width) for width in (8, 16, 32, 64, 128) if width <= block]
    cut = [[_Side(*z, window) for z in zip(grid, shape, strict=True)] for shape in shapes]
    rows, columns = min(cut, key=lambda sides: sides[0].met() * sides[1].met())
    tile = rows.side, columns.side
    order = _tiled(rows.order[:, None] * grid[1] + columns.order, tile)
    is_real = _tiled(rows.is_real[:, None] & columns.is_real, tile)
    place = torch.empty_like(order[is_real])
    place[order[is_real]] = torch.arange(len(order), device="cpu")[is_real]
    meets = (rows.meets[:, None, :, None] & columns.meets[None, :, None]).flatten(2).flatten(0, 1)
    blocks = [z for seen in (meets, meets.t()) for z in (seen.sum(-1), _first(seen))]
    # A token that fills a tile up sees what the one it repeats sees, and is seen by none.
    nowhere = -1 - 2 * max(window.radius, 1)
    across = [_tiled(z[:, None].expand(len(z), len(columns.order)), tile) for z in rows.bounds]
    down = [_tiled(z.expand(len(rows.order), len(z)), tile) for z in columns.bounds]
    y, x = (z[0].masked_fill(~is_real, nowhere) for z in (across, down))
    bounds = [y, x, *across[1:], *down[1:]]
    return Plan(
        order.to(device),
        place.to(device),
        None if is_real.all() else ~is_real[:, None].to(device),
        [z[None, None].to(device, torch.int32).contiguous() for z in blocks],
        [z.to(device, torch.int32) for z in bounds],
    )


class _Side:
    """An axis cut into tiles: of each place its row, its bounds; which tiles see which."""

    def __init__(self, length: int, side: int, window: Window) -> None:
        axis, tiles = axis_of(length, window), -(-length // side)
        self.side = side
        place = torch.arange(tiles * side, device="cpu")
        self.is_real = place < length
        place = place.clamp(max=length - 1)
        first, stop = axis.first[place], axis.stop[place]
        self.order, self.bounds = axis.order[place], (place, first, stop)
        first, stop = first.view(-1, side).amin(1), stop.view(-1, side).amax(1)
        tile = torch.arange(tiles, device="cpu")
        self.meets = (first[:, None] // side <= tile) & (tile <= (stop[:, None] - 1) // side)

    def met(self) -> int:
        """Pairs of tiles that see each other, of as many tokens each."""
        return int(self.meets.sum()) * self.side


def _tiled(z: Tensor, tile: Grid) -> Tensor:
    """Rows and columns, row by row, tile by tile: (tiled h, tiled w) -> (m,)."""
    return z.unflatten(1, (-1, tile[1])).unflatten(0, (-1, tile[0])).transpose(1, 2).flatten()


def _first(seen: Tensor) -> Tensor:
    """Indices of each row, those that are seen before the others."""
    return seen.int().argsort(dim=-1, descending=True, stable=True)


@functools.lru_cache(maxsize=64)
def _compiled(*_: Any) -> Callable[..., Any]:
    """``_attend`` for one grid, shape and type, with a code object that no other shares.

    The compiler counts its variants by code object, and beyond eight it would fall back to
    n x n scores.
    """
    code = _attend.__code__.replace()
    own = types.FunctionType(code, _attend.__globals__, _attend.__name__)
    return torch.compile(own, dynamic=False, fullgraph=True)
