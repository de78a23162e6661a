"""Sana's ReLU linear attention (arXiv 2410.10629; EfficientViT, arXiv 2205.14756).

O = ReLU(Q) (ReLU(K)^T V) / (ReLU(Q) sum_j ReLU(K_j)^T) per head, all sums in float32.
Cost per sample: 4 d^2 n + 2 n d d_head.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from attnzoo.contract import AttentionContext, heads_of_width
from attnzoo.layers.linear import xavier_linear
from attnzoo.layers.linear_attention import LinearAttention, LinearConfig
from attnzoo.registry import register_attention


@dataclass(frozen=True, kw_only=True)
class Config(LinearConfig):
    """Options of Sana's attention."""

    qkv_bias: bool = False  # Sana
    # RMSNorm over the full width, before the head split, eps 1e-5: off in Sana, on in Sana 1.5.
    qk_norm: bool = False
    eps: float = 1e-8  # what Sana's block passes; its class and diffusers default to 1e-15


@register_attention("sana")
class SanaAttention(LinearAttention):
    """ReLU linear attention."""

    Config = Config
    paper = "Sana, 2410.10629"
    activation = "relu"
    plot_style = ("#0072B2", "s")

    def __init__(self, context: AttentionContext, config: Config) -> None:
        super().__init__(context, config)
        self.qkv = xavier_linear(self.dim, 3 * self.dim, bias=config.qkv_bias)
        self.query_norm = nn.RMSNorm(self.dim, eps=1e-5) if config.qk_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(self.dim, eps=1e-5) if config.qk_norm else nn.Identity()
        self.proj = xavier_linear(self.dim, self.dim, bias=True)
        self.is_packed = not config.qk_norm

    @classmethod
    def default_num_heads(cls, dim: int) -> int:
        """Heads of 32, as released Sana has them."""
        return heads_of_width(dim, 32)

    def query_kernel(self, query: Tensor) -> Tensor:
        """Q, of which the base takes the ReLU."""
        return self.query_norm(query)

    def key_kernel(self, key: Tensor) -> Tensor:
        """K, of which the base takes the ReLU."""
        return self.key_norm(key)
