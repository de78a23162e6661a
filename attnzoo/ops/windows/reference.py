"""Both as permutations."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor


def to_windows(x: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """See ``attnzoo.ops.windows``."""
    (height, width), (p, q) = grid, size
    pattern = "b (h p w q) c -> b (h w) (c p q)"
    return rearrange(x, pattern, h=height // p, w=width // q, p=p, q=q)


def from_windows(x: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """See ``attnzoo.ops.windows``."""
    (height, width), (p, q) = grid, size
    pattern = "b (h w) (c p q) -> b (h p w q) c"
    return rearrange(x, pattern, h=height // p, w=width // q, p=p, q=q)
