"""LiT's simple linear attention (arXiv 2501.12976), after secondary sources.

O = ReLU(Q) (ReLU(K)^T V) / (ReLU(Q) sum_j ReLU(K_j)^T) + DWC(V) per head, with few heads: wider
heads mean a larger state K^T V. Cost per sample: 4 d^2 n + 2 n d d_head + 25 n d. Its training
recipe (weights and distillation from a softmax DiT) is not part of the mechanism.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from attnzoo.contract import Attention, AttentionContext
from attnzoo.layers.depthwise_conv import ConvKind
from attnzoo.layers.linear import xavier_linear
from attnzoo.layers.value_conv import ValueConv
from attnzoo.ops.linear_core import linear_attention, linear_attention_macs
from attnzoo.ops.linear_core.reference import linear_attention as naive_linear_attention
from attnzoo.ops.linear_core.reference import linear_map as naive_linear_map
from attnzoo.ops.streaming import StreamConfig, stream_linear_attention
from attnzoo.registry import register_attention


@dataclass(frozen=True, kw_only=True)
class Config(StreamConfig):
    """Options of LiT's attention; what no source at hand states is marked "unstated"."""

    conv: ConvKind = "5x5"  # LiT: one depthwise convolution, kernel 5
    conv_scope: Literal["head", "token"] = "head"  # unstated; FLatten's, the form LiT compares
    qkv_bias: bool = True  # unstated; LiT keeps all of DiT but the attention, and DiT has it
    eps: float = 1e-8  # unstated; Sana's
    impl: Literal["auto", "naive"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(0, "eps")


@register_attention("lit")
class LiTAttention(Attention):
    """ReLU linear attention with few heads and a depthwise convolution of the values."""

    Config = Config
    config: Config
    paper = "LiT, 2501.12976"
    complexity = "O(n d d_head)"

    def __init__(self, context: AttentionContext, config: Config) -> None:
        super().__init__(context, config)
        self.qkv = xavier_linear(self.dim, 3 * self.dim, bias=config.qkv_bias)
        self.conv = None
        if config.conv != "none":
            self.conv = ValueConv(self.dim, self.num_heads, config.conv, config.conv_scope)
        self.proj = xavier_linear(self.dim, self.dim, bias=True)

    @classmethod
    def default_num_heads(cls, dim: int) -> int:
        """2 heads, LiT-S/2's best (its XL/2 has 4); 1 where the width is odd."""
        return 1 if dim % 2 else 2

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.forward``."""
        self.check_tokens(x, grid)
        if (block := self.config.block(self.training)) is not None:
            return stream_linear_attention(
                x, grid, block, self.qkv, self.proj, self.num_heads,
                query_kernel=F.relu, key_kernel=lambda key, _: F.relu(key), eps=self.config.eps,
                conv=self.conv, halo=0 if self.conv is None else self.conv.conv.reach,
            )  # fmt: skip
        query, key, value = self._query_key_value(x, grid)
        attend = naive_linear_attention if self.config.impl == "naive" else linear_attention
        out = attend(query, key, self._heads(value), eps=self.config.eps)
        out = rearrange(out, "b h n d -> b n (h d)")
        if self.conv is not None:
            out = out + self.conv(value, grid).to(out.dtype)
        return self.proj(out)

    def _query_key_value(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Activated queries and keys by head, values by token."""
        self.check_tokens(x, grid)
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        return self._heads(F.relu(query)), self._heads(F.relu(key)), value

    def _heads(self, z: Tensor) -> Tensor:
        return rearrange(z, "b n (h d) -> b h n d", h=self.num_heads)

    def attention_map(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.attention_map``."""
        query, key, _ = self._query_key_value(x, grid)
        return naive_linear_map(query, key, self.config.eps)

    def fuse(self) -> dict[str, Any]:
        """See ``Attention.fuse``: the convolution's branches become one kernel."""
        if self.conv is None:
            return {}
        changed = {"conv": self.conv.fuse()}
        self.config = replace(self.config, **changed)
        return changed

    def macs_parts(self, grid: tuple[int, int]) -> dict[str, int]:
        """See ``Attention.macs_parts``."""
        n, head_dim = grid[0] * grid[1], self.dim // self.num_heads
        core = linear_attention_macs(n, n, head_dim, head_dim)
        return {
            "projections": 4 * self.dim**2 * n,
            "core": self.num_heads * core,
            "conv": self.conv.macs(grid) if self.conv is not None else 0,
        }
