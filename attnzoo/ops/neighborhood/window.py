"""Which keys a query sees, axis by axis: what every implementation of the operator shares."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

Grid = tuple[int, int]


class Window(NamedTuple):
    """The keys of a query.

    Attributes:
        side: Keys along an axis of a square window, which is moved to stay inside the map.
        dilation: Steps between the keys of a square window.
        radius: If not 0, the keys are those with dy^2 + dx^2 < radius^2 instead.
    """

    side: int
    dilation: int = 1
    radius: int = 0


class Axis(NamedTuple):
    """Positions of one axis, in an order in which every window is a run of neighbors.

    Attributes:
        order: Which row (or column) is at each position: (length,).
        first: Of each position, the first of its window: (length,).
        stop: The one behind its last.
    """

    order: Tensor
    first: Tensor
    stop: Tensor


def axis_of(length: int, window: Window) -> Axis:
    """The windows along an axis; dilated ones are runs once rows are sorted by remainder."""
    order, first, stop = [], [], []
    if window.radius:
        reach = window.radius - 1
        order = list(range(length))
        first = [max(0, i - reach) for i in order]
        stop = [min(length, i + reach + 1) for i in order]
    else:
        for remainder in range(min(window.dilation, length)):
            rows = range(remainder, length, window.dilation)
            side, base = min(window.side, len(rows)), len(order)
            for place in range(len(rows)):
                start = min(max(place - window.side // 2, 0), len(rows) - side)
                first.append(base + start)
                stop.append(base + start + side)
            order += rows
    return Axis(*(torch.tensor(z, dtype=torch.int64, device="cpu") for z in (order, first, stop)))


def tile_side(length: int, other: int, window: Window) -> int:
    """Queries of a tile along an axis: more for wide windows, of which less is then overlap."""
    wanted = 8 if max(window.side, 2 * window.radius - 1) < 16 else 16
    wanted = max(wanted, wanted**2 // min(wanted, other))  # a flat map has long tiles
    return -(-length // -(-length // wanted))


class Tiles(NamedTuple):
    """The tiles of an axis, and the keys that each needs.

    Attributes:
        queries: Rows of each tile's queries, the last one's repeated to fill it: (tiles, side).
        keys: Rows of all keys that a tile's queries see, and others to fill up: (tiles, reach).
        cost: 0 where a query sees a key, for a disc the squared distance: (tiles, side, reach).
        place: Where in the flattened ``queries`` each row is: (length,).
    """

    queries: Tensor
    keys: Tensor
    cost: Tensor
    place: Tensor


def tiles_of(length: int, other: int, window: Window) -> Tiles:
    """Cuts an axis into tiles."""
    axis, side = axis_of(length, window), tile_side(length, other, window)
    count = -(-length // side)
    query = torch.arange(count * side, device="cpu").clamp(max=length - 1).view(count, side)
    first, stop = axis.first[query], axis.stop[query]
    start = first.amin(1)
    reach = int((stop.amax(1) - start).amax())
    key = start.clamp(max=length - reach)[:, None] + torch.arange(reach, device="cpu")
    if window.radius:
        cost = (query[:, :, None] - key[:, None]) ** 2
    else:
        is_seen = (key[:, None] >= first[:, :, None]) & (key[:, None] < stop[:, :, None])
        cost = (~is_seen).long()
    return Tiles(axis.order[query], axis.order[key], cost.int(), axis.order.argsort())


def limit_of(window: Window) -> int:
    """A query sees a key if the costs of both axes sum to less."""
    return max(window.radius**2, 1)


@functools.lru_cache(maxsize=256)
def pairs_of(grid: Grid, window: Window) -> int:
    """Pairs of a query and a key that it sees."""
    if not window.radius:
        sums = [int((a.stop - a.first).sum()) for a in (axis_of(side, window) for side in grid)]
        return sums[0] * sums[1]
    reach, pairs = window.radius - 1, 0
    for dy in range(-min(reach, grid[0] - 1), min(reach, grid[0] - 1) + 1):
        for dx in range(-min(reach, grid[1] - 1), min(reach, grid[1] - 1) + 1):
            if dy**2 + dx**2 < window.radius**2:
                pairs += (grid[0] - abs(dy)) * (grid[1] - abs(dx))
    return pairs
