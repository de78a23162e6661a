"""ZigMa (arXiv 2403.13802): Mamba along one of eight zigzag paths through the grid per layer.

Layer l puts the tokens in the order of path l mod 8, of which each step goes to a neighbor, scans
them once, and puts them back; the layer is Mamba's: x, z = in W_1, x = SiLU(conv4(x)),
(dt, B, C) = x W_2, H_t = exp(dt_t A) H_{t-1} + dt_t x_t B_t^T, y_t = H_t C_t + D x_t,
out = (y * SiLU(z)) W_3. Cost per sample: 6.25 d^2 n + 136 d n.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attnzoo.contract import Attention, AttentionContext, heads_of_width
from attnzoo.errors import InvalidValue
from attnzoo.layers.state_space import Carried, Mamba, Mamba2
from attnzoo.layers.streaming import StreamConfig, stream_orders
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
        order = zigzag(grid, self.path, x.device)
        if (block := self.config.block(self.training)) is not None:
            return stream_orders(x, [order], block, self._advance)
        out = self.layer(x.index_select(1, order), self.config.impl)
        # A sort of the order would take a GPU as long as a projection.
        places = torch.arange(len(order), device=x.device)
        return out.index_select(1, places.scatter(0, order, places))

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
    height, width = grid
    lines = torch.arange(height * width, device=device).view(height, width)
    from_below, from_right = path // 4 == 1, path // 2 % 2 == 1
    lines = lines.flip([axis for axis, is_far in enumerate((from_below, from_right)) if is_far])
    lines = lines.T if path % 2 else lines
    is_back = torch.arange(lines.shape[0], device=device).unsqueeze(1) % 2 == 1
    return torch.where(is_back, lines.flip(1), lines).reshape(-1)
