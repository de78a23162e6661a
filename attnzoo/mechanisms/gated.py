"""Gated linear attention (GLA, arXiv 2312.06635) over an image, in one or several directions.

Per head and direction S_t = diag(a_t) S_{t-1} + k_t^T v_t and o_t = q_t S_t / sqrt(d_k), with
a_t = sigmoid(x_t W_1 W_2 + b)^(1/16) per key channel; then out = (RMSNorm(mean of o) * SiLU(g)) W.
No normalizer, no feature map. Cost per sample: (4 d^2 + 24 d) n + directions * n d^2 / heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from attnzoo.contract import Attention, AttentionContext, heads_of_width, removed_in
from attnzoo.layers.gated_linear import GatedLinear, GatedLinearConfig
from attnzoo.ops.gated_scan import DIRECTIONS
from attnzoo.registry import register_attention


@dataclass(frozen=True, kw_only=True)
class Config(GatedLinearConfig):
    """Options of gated linear attention."""

    # GLA is causal; an image has no first pixel. Several directions are averaged before the norm.
    direction: Literal[
        "forward", "backward", "both", "columns-forward", "columns-backward", "four"
    ] = "both"

    removed = removed_in("0.2.0", gate_rank=16, norm_eps=1e-5)


@register_attention("gated")
class GatedAttention(Attention):
    """Gated linear attention, scanned in any directions."""

    Config = Config
    config: Config
    paper = "GLA, 2312.06635"
    complexity = "O(n d d_head)"
    plot_style = ("#E69F00", "P")
    tensors_crossed = 7.0  # two gates; queries, keys and the forget gate are half as wide

    def __init__(self, context: AttentionContext, config: Config) -> None:
        super().__init__(context, config)
        self.directions = DIRECTIONS[config.direction]
        self.layer = GatedLinear(self.dim, self.num_heads, config)

    @classmethod
    def default_num_heads(cls, dim: int) -> int:
        """Heads of 64 value channels (32 key channels), as DiG has them at every size."""
        return heads_of_width(dim, 64)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.forward``."""
        self.check_tokens(x, grid)
        return self.layer(x, grid, self.directions)

    def attention_map(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.attention_map``: the weights before the norm, mean over directions."""
        self.check_tokens(x, grid)
        return self.layer.attention_map(x, grid, self.directions)

    def macs_parts(self, grid: tuple[int, int]) -> dict[str, int]:
        """See ``Attention.macs_parts``; the core is counted as the recurrence does it."""
        return self.layer.macs_parts(grid, len(self.directions))
