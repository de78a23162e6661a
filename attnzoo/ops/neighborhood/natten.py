"""Neighborhood attention by the library NATTEN."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.errors import Unavailable
from attnzoo.ops.neighborhood.window import Grid, Window
from attnzoo.ops.optional import ANYTHING, load, reason


def neighborhood_attention(
    query: Tensor, key: Tensor, value: Tensor, grid: Grid, window: Window
) -> Tensor:
    """See ``attnzoo.ops.neighborhood``."""
    if window.radius:
        raise Unavailable("impl='natten' has no discs; leave impl='auto', or set shape='square'")
    if window.side * window.dilation > min(grid):
        raise Unavailable(
            f"impl='natten' needs a map of at least {window.side * window.dilation} tokens a "
            f"side, got {grid[0]}x{grid[1]}; leave impl='auto'"
        )
    # (b, heads, n, d) -> (b, h, w, heads, d).
    operands = [z.transpose(1, 2).unflatten(1, grid) for z in (query, key, value)]
    try:
        attend = load("natten.functional", "na2d")
        out = attend(*operands, kernel_size=window.side, dilation=window.dilation)
    except torch.OutOfMemoryError:
        raise
    except ANYTHING as error:
        raise Unavailable(
            f"impl='natten' cannot run on {query.device.type} with {query.dtype}: "
            f"{reason(error)} (see https://natten.org for a build; or leave impl='auto')"
        ) from error
    return out.flatten(1, 2).transpose(1, 2)
