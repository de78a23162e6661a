"""LiT's simple linear attention (arXiv 2501.12976), after secondary sources.

O = ReLU(Q) (ReLU(K)^T V) / (ReLU(Q) sum_j ReLU(K_j)^T) + DWC(V) per head, with few heads: wider
heads mean a larger state K^T V. Cost per sample: 4 d^2 n + 2 n d d_head + 25 n d. Its training
recipe (weights and distillation from a softmax DiT) is recipes/convert.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attnzoo.contract import AttentionContext, removed_in
from attnzoo.layers.depthwise_conv import ConvKind, ValueConv
from attnzoo.layers.linear import xavier_linear
from attnzoo.layers.linear_attention import LinearAttention, LinearConfig
from attnzoo.registry import register_attention


@dataclass(frozen=True, kw_only=True)
class Config(LinearConfig):
    """Options of LiT's attention; what no source at hand states is marked "unstated"."""

    # LiT: one depthwise convolution, kernel 5; that heads share it is unstated, and FLatten's.
    conv: ConvKind = "5x5"
    eps: float = 1e-8  # unstated; Sana's

    removed = removed_in(
        "0.2.0", conv_scope="head", qkv_bias=True,
        values={"conv": ("acnet-plain",)},
    )  # fmt: skip


@register_attention("lit")
class LiTAttention(LinearAttention):
    """ReLU linear attention with few heads and a depthwise convolution of the values."""

    Config = Config
    paper = "LiT, 2501.12976"
    activation = "relu"
    plot_style = ("#44AA99", "h")

    def __init__(self, context: AttentionContext, config: Config) -> None:
        super().__init__(context, config)
        # Biased, which no source states: LiT keeps all of DiT but the attention, and DiT has it.
        self.qkv = xavier_linear(self.dim, 3 * self.dim, bias=True)
        if config.conv != "none":
            self.conv = ValueConv(self.dim, self.num_heads, config.conv)
        self.proj = xavier_linear(self.dim, self.dim, bias=True)
        self.is_packed = True

    @classmethod
    def default_num_heads(cls, dim: int) -> int:
        """2 heads, LiT-S/2's best (its XL/2 has 4); 1 where the width is odd."""
        return 1 if dim % 2 else 2

    def query_kernel(self, query: Tensor) -> Tensor:
        """Q, of which the base takes the ReLU."""
        return query

    def key_kernel(self, key: Tensor) -> Tensor:
        """K, of which the base takes the ReLU."""
        return key
