"""A grid of tokens as rectangular blocks, a fixed number of them along each side."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from attnzoo.ops.rotary_core.rotary import rows_of


class TokenBlocks(NamedTuple):
    """The blocks of a grid; the last ones have fewer tokens where a side does not divide.

    Attributes:
        rows: Blocks down; fewer than asked for where the grid is shorter.
        columns: Blocks across, likewise.
        height: Tokens of a block down.
        width: Tokens of a block across.
        grid: (height, width) in tokens.
    """

    rows: int
    columns: int
    height: int
    width: int
    grid: tuple[int, int]

    @classmethod
    def of(cls, grid: tuple[int, int], side: int) -> TokenBlocks:
        """Cuts a grid into at most ``side`` blocks along each side."""
        return cls.of_size(grid, (-(-grid[0] // side), -(-grid[1] // side)))

    @classmethod
    def of_size(cls, grid: tuple[int, int], size: tuple[int, int]) -> TokenBlocks:
        """Cuts a grid into blocks of ``size``."""
        return cls(-(-grid[0] // size[0]), -(-grid[1] // size[1]), *size, grid)

    @property
    def count(self) -> int:
        """Number of blocks."""
        return self.rows * self.columns

    def rows_of(self, span: slice) -> tuple[int, int]:
        """First row of the grid and the one after the last, of a part that is whole rows."""
        return rows_of(span, self.grid)

    def blocks_of(self, span: slice) -> slice:
        """The blocks that a part touches."""
        first, stop = self.rows_of(span)
        return slice(first // self.height * self.columns, -(-stop // self.height) * self.columns)

    def cut(self, z: Tensor, span: slice) -> Tensor:
        """A part, (..., m, e), as blocks, (..., blocks, tokens, e), filled up with zeros."""
        first, stop = self.rows_of(span)
        image = z.unflatten(-2, (stop - first, self.grid[1]))
        top, right, bottom = first % self.height, -self.grid[1] % self.width, -stop % self.height
        if top or right or bottom:
            image = F.pad(image, (0, 0, 0, right, top, bottom))
        pattern = "... (a p) (c q) e -> ... (a c) (p q) e"
        return rearrange(image, pattern, p=self.height, q=self.width)

    def join(self, z: Tensor, span: slice) -> Tensor:
        """Undoes ``cut``, of (b, h, blocks, tokens, e)."""
        pattern = "b h (a c) (p q) e -> b h (a p) (c q) e"
        image = rearrange(z, pattern, c=self.columns, p=self.height, q=self.width)
        first, stop = self.rows_of(span)
        image = image.narrow(2, first % self.height, stop - first)
        return image.narrow(3, 0, self.grid[1]).flatten(2, 3)

    def places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Every token's block, and its place in it, (n,) each."""
        token = torch.arange(self.grid[0] * self.grid[1], device=device)
        row, column = token // self.grid[1], token % self.grid[1]
        block = row // self.height * self.columns + column // self.width
        return block, row % self.height * self.width + column % self.width
