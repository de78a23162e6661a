"""DiG (arXiv 2405.18428): gated linear attention with one scan direction per layer.

The layer is that of "gated"; layer l scans the grid by rows, by rows reversed, by columns, by
columns reversed for l mod 4 = 0, 1, 2, 3. A 3x3 depthwise convolution of the residual stream,
the identity at the start, ends each block. Cost per sample:
(4 d^2 + 24 d + 9 d) n + n d^2 / heads.

DiG itself flips and transposes the tokens after its blocks and leaves them so: the order is the
image's again only after every fourth block, and only on square grids. Here each layer puts its
tokens in order and back, so that every depth and every grid is right; the scans are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from attnzoo.contract import Attention, AttentionContext, heads_of_width, removed_in
from attnzoo.layers.depthwise_conv import DepthwiseConv
from attnzoo.layers.gated_linear import GatedLinear, GatedLinearConfig
from attnzoo.ops.gated_scan import Direction
from attnzoo.registry import register_attention

# What DiG's steps do: a flip after every block, and a transpose after each odd one on top.
_SCHEDULES: dict[str, tuple[Direction, ...]] = {
    "four": ("forward", "backward", "columns-forward", "columns-backward"),
    "two": ("forward", "backward"),
    "forward": ("forward",),
}


@dataclass(frozen=True, kw_only=True)
class Config(GatedLinearConfig):
    """Options of DiG."""

    schedule: Literal["four", "two", "forward"] = "four"  # DiG; "two": its code without transposes
    enhancement: bool = True  # DiG: the depthwise convolution that ends each block

    removed = removed_in("0.2.0", gate_rank=16, norm_eps=1e-6)


@register_attention("dig")
class DiGAttention(Attention):
    """Gated linear attention, one direction per layer, with a convolution of the stream."""

    Config = Config
    config: Config
    paper = "DiG, 2405.18428"
    complexity = "O(n d d_head)"
    plot_style = ("#882255", ">")
    tensors_crossed = 7.0  # two gates; queries, keys and the forget gate are half as wide

    def __init__(self, context: AttentionContext, config: Config) -> None:
        super().__init__(context, config)
        schedule = _SCHEDULES[config.schedule]
        self.direction: Direction = schedule[context.layer_index % len(schedule)]
        self.layer = GatedLinear(self.dim, self.num_heads, config, norm_eps=1e-6)  # DiG
        self.enhancement = None
        if config.enhancement:
            self.enhancement = DepthwiseConv(self.dim, "3x3")
            conv = self.enhancement.branches[0]
            nn.init.dirac_(conv.weight, groups=self.dim)
            nn.init.zeros_(conv.bias)

    @classmethod
    def default_num_heads(cls, dim: int) -> int:
        """Heads of 64 value channels (32 key channels): 6, 12, 16, 18 for DiG-S, B, L, XL."""
        return heads_of_width(dim, 64)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.forward``."""
        self.check_tokens(x, grid)
        return self.layer(x, grid, (self.direction,))

    def after_block(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.after_block``: the convolution, without a residual around it."""
        return x if self.enhancement is None else self.enhancement(x, grid)

    def attention_map(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.attention_map``: the weights before the norm."""
        self.check_tokens(x, grid)
        return self.layer.attention_map(x, grid, (self.direction,))

    def macs_parts(self, grid: tuple[int, int]) -> dict[str, int]:
        """See ``Attention.macs_parts``; the core is counted as the recurrence does it."""
        conv = 0 if self.enhancement is None else self.enhancement.macs(grid)
        return self.layer.macs_parts(grid, 1) | {"conv": conv}
