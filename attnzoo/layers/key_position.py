"""A learned position added to the keys (FLatten, arXiv 2308.00442), for one grid only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnzoo.errors import InvalidValue


class KeyPosition(nn.Module):
    """Adds a learned vector per grid cell, which starts at 0.

    Args:
        grid: (height, width) in tokens, the only grid the layer then takes.
        dim: Channels.

    Raises:
        InvalidValue: a side of ``grid`` is not positive.
    """

    def __init__(self, grid: tuple[int, int], dim: int) -> None:
        super().__init__()
        if min(grid) < 1:
            raise InvalidValue(f"key_position must be a grid (height, width) or None, got {grid}")
        self.grid = tuple(grid)
        self.offset = nn.Parameter(torch.zeros(grid[0] * grid[1], dim))

    def forward(self, key: Tensor, grid: tuple[int, int], span: slice = slice(None)) -> Tensor:
        """Adds the position to keys in one part of the grid, (b, m, dim).

        Raises:
            InvalidValue: ``grid`` is another than its own.
        """
        if tuple(grid) != self.grid:
            raise InvalidValue(
                f"key_position was built for grid={self.grid[0]}x{self.grid[1]} and cannot take "
                f"grid={grid[0]}x{grid[1]}; set key_position=None for layers of any grid"
            )
        return key + self.offset[span]
