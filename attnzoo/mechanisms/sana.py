"""Sana's ReLU linear attention (arXiv 2410.10629; EfficientViT, arXiv 2205.14756).

O = ReLU(Q) (ReLU(K)^T V) / (ReLU(Q) sum_j ReLU(K_j)^T) per head, all sums in float32.
Cost per sample: 4 d^2 n + 2 n d d_head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from attnzoo.contract import Attention, AttentionContext, heads_of_width
from attnzoo.layers.linear import xavier_linear
from attnzoo.ops.linear_core import (
    linear_attention,
    linear_attention_macs,
    projected_linear_attention,
)
from attnzoo.ops.linear_core.reference import linear_attention as naive_linear_attention
from attnzoo.ops.linear_core.reference import linear_map as naive_linear_map
from attnzoo.ops.streaming import StreamConfig, stream_linear_attention
from attnzoo.registry import register_attention


@dataclass(frozen=True, kw_only=True)
class Config(StreamConfig):
    """Options of Sana's attention."""

    qkv_bias: bool = False  # Sana
    # RMSNorm over the full width, before the head split, eps 1e-5: off in Sana, on in Sana 1.5.
    qk_norm: bool = False
    eps: float = 1e-8  # what Sana's block passes; its class and diffusers default to 1e-15
    # "folded" multiplies the output projection into the heads' states: for float32 and large n.
    impl: Literal["auto", "folded", "naive"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(0, "eps")


@register_attention("sana")
class SanaAttention(Attention):
    """ReLU linear attention."""

    Config = Config
    config: Config
    paper = "Sana, 2410.10629"
    complexity = "O(n d d_head)"

    def __init__(self, context: AttentionContext, config: Config) -> None:
        super().__init__(context, config)
        self.qkv = xavier_linear(self.dim, 3 * self.dim, bias=config.qkv_bias)
        self.query_norm = nn.RMSNorm(self.dim, eps=1e-5) if config.qk_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(self.dim, eps=1e-5) if config.qk_norm else nn.Identity()
        self.proj = xavier_linear(self.dim, self.dim, bias=True)

    @classmethod
    def default_num_heads(cls, dim: int) -> int:
        """Heads of 32, as released Sana has them."""
        return heads_of_width(dim, 32)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.forward``."""
        self.check_tokens(x, grid)
        impl, eps = self.config.impl, self.config.eps
        if (block := self.config.block(self.training)) is not None:
            return stream_linear_attention(
                x, grid, block, self.qkv, self.proj, self.num_heads,
                query_kernel=lambda query: F.relu(self.query_norm(query)),
                key_kernel=lambda key, _: F.relu(self.key_norm(key)), eps=eps,
            )  # fmt: skip
        heads = self._query_key_value(x)
        if impl == "folded":
            return projected_linear_attention(*heads, self.proj.weight, self.proj.bias, eps)
        attend = naive_linear_attention if impl == "naive" else linear_attention
        return self.proj(rearrange(attend(*heads, eps=eps), "b h n d -> b n (h d)"))

    def _query_key_value(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        query, key = F.relu(self.query_norm(query)), F.relu(self.key_norm(key))
        return self._heads(query), self._heads(key), self._heads(value)

    def _heads(self, z: Tensor) -> Tensor:
        return rearrange(z, "b n (h d) -> b h n d", h=self.num_heads)

    def attention_map(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.attention_map``."""
        self.check_tokens(x, grid)
        query, key, _ = self._query_key_value(x)
        return naive_linear_map(query, key, self.config.eps)

    def macs_parts(self, grid: tuple[int, int]) -> dict[str, int]:
        """See ``Attention.macs_parts``."""
        n, head_dim = grid[0] * grid[1], self.dim // self.num_heads
        core = linear_attention_macs(n, n, head_dim, head_dim)
        if self.config.impl == "folded":
            core = n * head_dim * (head_dim + 1) + head_dim**2 * self.dim
        return {"projections": 4 * self.dim**2 * n, "core": self.num_heads * core}
