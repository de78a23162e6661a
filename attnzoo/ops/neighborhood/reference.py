"""Neighborhood attention as it is written: an n x n map, masked."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.ops.neighborhood.window import Grid, Window, axis_of
from attnzoo.ops.softmax import reference


def neighborhood_mask(grid: Grid, window: Window) -> Tensor:
    """Whether a query sees a key: (n, n)."""
    places = [torch.arange(length, device="cpu") for length in grid]
    if window.radius:
        rows, columns = ((z[:, None] - z) ** 2 for z in places)
        return _spread(rows, columns).sum(0) < window.radius**2
    seen = []
    for length, place in zip(grid, places, strict=True):
        order, first, stop = axis_of(length, window)
        by_place = (place >= first[:, None]) & (place < stop[:, None])
        where = order.argsort()
        seen.append(by_place[where][:, where])
    return _spread(*seen).all(0)


def _spread(rows: Tensor, columns: Tensor) -> Tensor:
    """(h, h) and (w, w) -> both of every pair of tokens: (2, n, n)."""
    h, w = len(rows), len(columns)
    rows, columns = rows[:, None, :, None], columns[None, :, None, :]
    return torch.stack([z.expand(h, w, h, w).reshape(h * w, h * w) for z in (rows, columns)])


def neighborhood_attention(
    query: Tensor, key: Tensor, value: Tensor, grid: Grid, window: Window
) -> Tensor:
    """See ``attnzoo.ops.neighborhood``; materializes the map."""
    return reference.softmax_attention(query, key, value, bias_of(query, grid, window))


def bias_of(query: Tensor, grid: Grid, window: Window) -> Tensor:
    """0 where a query sees a key, else minus infinity: (n, n)."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    hidden = ~neighborhood_mask(grid, window).to(query.device)
    return torch.zeros(hidden.shape, dtype=dtype, device=query.device).masked_fill(
        hidden, float("-inf")
    )
