"""DiS (arXiv 2402.05608): Mamba in both directions along the rows of the grid.

The layer is Mamba's, see "zigma", with a second scan of the reversed tokens that has convolution,
steps, rates and inputs of its own: out = ((scan(x) + reverse(scan'(reverse(x)))) * SiLU(z)) W_3.
Cost per sample: 6.5 d^2 n + 272 d n.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attnzoo.contract import Attention, AttentionContext
from attnzoo.layers.state_space import Mamba
from attnzoo.layers.streaming import StreamConfig, stream_orders
from attnzoo.registry import register_attention


@dataclass(frozen=True, kw_only=True)
class Config(StreamConfig):
    """Options of DiS."""

    impl: Literal["auto", "reference", "torch", "triton", "mamba"] = "auto"


@register_attention("dis")
class DiSAttention(Attention):
    """Mamba in two directions, summed."""

    Config = Config
    config: Config
    paper = "DiS, 2402.05608"
    complexity = "O(n d)"
    plot_style = ("#98DF8A", "d")
    tensors_crossed = 20.0  # inside a layer, tokens are twice as wide

    def __init__(self, context: AttentionContext, config: Config) -> None:
        super().__init__(context, config)
        self.layer = Mamba(self.dim, directions=2)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.forward``."""
        self.check_tokens(x, grid)
        if (block := self.config.block(self.training)) is not None:
            order = torch.arange(x.shape[1], device=x.device)
            return stream_orders(x, [order, order.flip(0)], block, self.layer.advance)
        return self.layer(x, self.config.impl)

    def macs_parts(self, grid: tuple[int, int]) -> dict[str, int]:
        """See ``Attention.macs_parts``; the core is counted as the recurrence does it."""
        return self.layer.macs_parts(grid[0] * grid[1])
