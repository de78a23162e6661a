"""Local attention: each token sees its neighborhood on the grid (NATTEN, CLEAR).

O_i = softmax(Q_i K_N(i)^T / sqrt(d_head)) V_N(i) per head. N(i) is a square of K x K tokens,
every ``dilation``-th of its rows and columns, that is moved where it would leave the map, so that
border tokens keep K^2 keys (NAT, arXiv 2204.07143; DiNAT, arXiv 2209.15001); or the disc of keys
with dy^2 + dx^2 < r^2 (CLEAR, arXiv 2412.16112). Cost per sample: 4 d^2 n + 2 n K^2 d.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from einops import rearrange
from torch import Tensor

from attnzoo.contract import Attention, AttentionConfig, AttentionContext, heads_of_width
from attnzoo.errors import InvalidValue
from attnzoo.layers.linear import query_key_value, xavier_linear
from attnzoo.ops.dispatch import linear
from attnzoo.ops.neighborhood import Window, neighborhood_attention, neighborhood_macs
from attnzoo.ops.neighborhood.reference import bias_of
from attnzoo.ops.softmax.reference import softmax_map
from attnzoo.registry import register_attention


@dataclass(frozen=True, kw_only=True)
class Config(AttentionConfig):
    """Options of local attention."""

    shape: Literal["square", "disc"] = "square"  # NATTEN's, or CLEAR's
    window: int = 7  # K, side of the square; NAT's and DiNAT's
    dilation: int = 1  # of the square; NAT has none, DiNAT's are chosen by resolution
    radius: int = 8  # r, of the disc: 193 keys; CLEAR's smallest, beside 16 and 32
    # "flex": PyTorch's FlexAttention.
    impl: Literal["auto", "reference", "torch", "flex", "triton", "natten"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "window", "dilation", "radius")
        if self.window % 2 == 0:
            raise InvalidValue(
                f"window={self.window} has no middle; choose {self.window - 1} or "
                f"{self.window + 1}"
            )
        if self.shape == "disc" and self.dilation > 1:
            raise InvalidValue(
                f"dilation={self.dilation} is of squares; set dilation=1 or shape='square'"
            )
        if self.shape == "disc" and self.impl == "natten":
            raise InvalidValue("impl='natten' has no discs; set impl='auto' or shape='square'")


@register_attention("local")
class LocalAttention(Attention):
    """Softmax attention of each token to its neighborhood on the grid."""

    Config = Config
    config: Config
    paper = "NAT, 2204.07143"
    complexity = "O(n window² d)"
    plot_style = ("#6B8E23", "p")

    def __init__(self, context: AttentionContext, config: Config) -> None:
        super().__init__(context, config)
        self.qkv = xavier_linear(self.dim, 3 * self.dim, bias=True)
        self.proj = xavier_linear(self.dim, self.dim, bias=True)
        is_disc = config.shape == "disc"
        self.window = Window(config.window, config.dilation, config.radius if is_disc else 0)

    @classmethod
    def default_num_heads(cls, dim: int) -> int:
        """Heads of 64, as every DiT has them; NAT has heads of 32."""
        return heads_of_width(dim, 64)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.forward``."""
        operands = self._query_key_value(x, grid)
        out = neighborhood_attention(*operands, grid, self.window, impl=self.config.impl)
        return linear(self.proj, rearrange(out, "b h n d -> b n (h d)"))

    def _query_key_value(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        self.check_tokens(x, grid)
        return query_key_value(self.qkv, x, self.num_heads)

    def attention_map(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.attention_map``."""
        query, key, _ = self._query_key_value(x, grid)
        return softmax_map(query, key, bias_of(query, grid, self.window))

    def macs_parts(self, grid: tuple[int, int]) -> dict[str, int]:
        """See ``Attention.macs_parts``: pairs that see each other, whatever tiles multiply."""
        n = grid[0] * grid[1]
        core = neighborhood_macs(grid, self.window, self.dim)
        return {"projections": 4 * self.dim**2 * n, "core": core}
