"""ZigMa (arXiv 2403.13802): Mamba along one of eight zigzag paths through the grid per layer.

Layer l puts the tokens in the order of path l mod 8, of which each step goes to a neighbor, scans
them once, and puts them back; the layer is Mamba's: x, z = in W_1, x = SiLU(conv4(x)),
(dt, B, C) = x W_2, H_t = exp(dt_t A) H_{t-1} + dt_t x_t B_t^T, y_t = H_t C_t + D x_t,
out = (y * SiLU(z)) W_3. Cost per sample: 6.25 d^2 n + 136 d n.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attnzoo.contract import Attention, AttentionContext, heads_of_width
from attnzoo.errors import InvalidValue
from attnzoo.layers.state_space import Carried, Mamba, Mamba2
from attnzoo.layers.streaming import StreamConfig, stream_orders
from attnzoo.ops.dispatch import is_transformed, is_watched
from attnzoo.ops.reorder import reordered
from attnzoo.registry import register_attention


@dataclass(frozen=True, kw_only=True)
class Config(StreamConfig):
    """Options of ZigMa."""

    paths: int = 8  # ZigMa's zigzagN8: the first so many, one layer after the other
    state: Literal["mamba", "ssd"] = "mamba"  # ZigMa; "ssd" is Mamba-2's, one decay per head
    impl: Literal["auto", "reference", "torch", "triton", "mamba", "fla"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.paths <= 8:
            raise InvalidValue(f"paths must lie in [1, 8], got {self.paths}")
        others = {"mamba": "ssd", "ssd": "mamba"}
        if self.impl in {"mamba": ("fla",), "ssd": ("mamba", "triton")}[self.state]:
            raise InvalidValue(
                f"impl={self.impl!r} computes state={others[self.state]!r}, not "
                f"state={self.state!r}; leave impl='auto'"
            )


@register_attention("zigma")
class ZigMaAttention(Attention):
    """Mamba along zigzag paths, one per layer."""

    Config = Config
    config: Config
    paper = "ZigMa, 2403.13802"
    complexity = "O(n d)"
    plot_style = ("#2CA02C", "<")
    tensors_crossed = 14.0  # inside a layer, tokens are twice as wide

    def __init__(self, context: AttentionContext, config: Config) -> None:
        super().__init__(context, config)
        self.path = context.layer_index % config.paths
        is_ssd = config.state == "ssd"
        self.layer = Mamba2(self.dim, self.num_heads) if is_ssd else Mamba(self.dim)

    @classmethod
    def default_num_heads(cls, dim: int) -> int:
        """Of Mamba-2: heads of 64 inner channels. Mamba's states have a channel each."""
        return heads_of_width(dim, 32)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.forward``."""
        self.check_tokens(x, grid)
        order, places = _path((grid[0], grid[1]), self.path, x.device)
        if (block := self.config.block(self.training)) is not None:
            return stream_orders(x, [order], block, self._advance)
        out = self.layer(reordered(x, 1, order, places), self.config.impl)
        return reordered(out, 1, places, order)

    def _advance(self, x: Tensor, carried: Carried | None, _: int) -> tuple[Tensor, Carried]:
        return self.layer.advance(x, carried)

    def macs_parts(self, grid: tuple[int, int]) -> dict[str, int]:
        """See ``Attention.macs_parts``; the core is counted as the recurrence does it."""
        return self.layer.macs_parts(grid[0] * grid[1])


def zigzag(grid: tuple[int, int], path: int, device: torch.device | str | None = None) -> Tensor:
    """Indices of the tokens in the order of a path.

    Paths 0 and 1 start top left, 2 and 3 top right, 4 and 5 bottom left, 6 and 7 bottom right.
    The even ones run along rows, the odd ones along columns; each line runs back where the one
    before ran forth.

    Returns:
        (height * width,), of row-by-row indices.
    """
    tokens = torch.arange(grid[0] * grid[1], device=device).view(grid).flip(_far_axes(path))
    return _back_and_forth(tokens.T if path % 2 else tokens).reshape(-1)


def _places(grid: tuple[int, int], path: int, device: torch.device) -> Tensor:
    """Where on a path each token is, (height * width,): the inverse of ``zigzag``."""
    places = torch.arange(grid[0] * grid[1], device=device)
    lines = _back_and_forth(places.view(grid[::-1] if path % 2 else grid))
    return (lines.T if path % 2 else lines).flip(_far_axes(path)).reshape(-1)


def _far_axes(path: int) -> list[int]:
    """The axes of the grid at whose far end a path starts."""
    return [axis for axis, is_far in enumerate((path // 4 == 1, path // 2 % 2 == 1)) if is_far]


def _back_and_forth(lines: Tensor) -> Tensor:
    is_back = torch.arange(lines.shape[0], device=lines.device).unsqueeze(1) % 2 == 1
    return torch.where(is_back, lines.flip(1), lines)


def _path(grid: tuple[int, int], path: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``zigzag`` and its inverse, which take a GPU longer to make than tokens to reorder."""
    if torch.compiler.is_compiling() or is_transformed() or is_watched():
        # A compiler makes arithmetic of them; nothing else's tensors may outlive it.
        return zigzag(grid, path, device), _places(grid, path, device)
    return _cached_path(grid, path, device)


@functools.cache  # for good: a recorded CUDA graph goes on reading it
def _cached_path(grid: tuple[int, int], path: int, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # or else no gradient could read them later
        return zigzag(grid, path, device), _places(grid, path, device)
