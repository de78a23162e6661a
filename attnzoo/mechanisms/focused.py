"""Focused linear attention (FLatten, arXiv 2308.00442).

O = f(Q) (f(K)^T V) / (f(Q) sum_j f(K_j)^T) + DWC(V) per head, with the norm-preserving power map
f(x) = x^p / |x^p| * |x| of x = (ReLU(.) + 1e-6) / softplus(scale), taken over the whole token.
Cost per sample: 4 d^2 n + 2 n d d_head + 25 n d.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from attnzoo.contract import Attention, AttentionContext, heads_of_width
from attnzoo.errors import InvalidValue
from attnzoo.layers.depthwise_conv import ConvKind
from attnzoo.layers.key_position import KeyPosition
from attnzoo.layers.linear import xavier_linear
from attnzoo.layers.value_conv import ValueConv
from attnzoo.ops.linear_core import linear_attention, linear_attention_macs
from attnzoo.ops.linear_core.reference import linear_attention as naive_linear_attention
from attnzoo.ops.linear_core.reference import linear_map as naive_linear_map
from attnzoo.ops.power_map import power_map
from attnzoo.ops.precision import in_wide_range
from attnzoo.ops.streaming import StreamConfig, linear_parts, stream_linear_attention
from attnzoo.registry import register_attention


@dataclass(frozen=True, kw_only=True)
class Config(StreamConfig):
    """Options of focused linear attention."""

    focusing_factor: float = 3.0  # p of the power map; FLatten
    softplus_scale: bool = True  # FLatten: learned per channel, starts at softplus(0) = 0.693
    # Grid (height, width) of a learned position added to the keys. FLatten has one, always; off
    # here, because it ties a layer to the one grid it was built for.
    key_position: tuple[int, int] | None = None
    conv: ConvKind = "5x5"  # FLatten
    conv_scope: Literal["head", "token"] = "head"  # FLatten: all heads share their kernels
    norm_scope: Literal["token", "head"] = "token"  # FLatten: norms before the head split
    relu_offset: float = 1e-6  # FLatten
    eps: float = 1e-6  # FLatten; added to the mean over keys, not to the sum
    qkv_bias: bool = True  # FLatten's model factories
    impl: Literal["auto", "naive"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(0, "relu_offset", "eps")
        if not 0 < self.focusing_factor < math.inf:
            raise InvalidValue(
                f"focusing_factor must be positive and finite, got {self.focusing_factor}"
            )


@register_attention("focused")
class FocusedAttention(Attention):
    """Focused linear attention."""

    Config = Config
    config: Config
    paper = "FLatten, 2308.00442"
    complexity = "O(n d d_head)"

    def __init__(self, context: AttentionContext, config: Config) -> None:
        super().__init__(context, config)
        dim = self.dim
        self.qkv = xavier_linear(dim, 3 * dim, bias=config.qkv_bias)
        self.scale = nn.Parameter(torch.zeros(dim)) if config.softplus_scale else None
        self.key_position = None
        if config.key_position is not None:
            self.key_position = KeyPosition(config.key_position, dim)
        self.conv = None
        if config.conv != "none":
            self.conv = ValueConv(dim, self.num_heads, config.conv, config.conv_scope)
        self.proj = xavier_linear(dim, dim, bias=True)

    @classmethod
    def default_num_heads(cls, dim: int) -> int:
        """Heads of 32, as Sana's; FLatten keeps the heads of the model it is put into."""
        return heads_of_width(dim, 32)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.forward``."""
        self.check_tokens(x, grid)
        config, eps = self.config, self._sum_eps(grid)
        if (block := config.block(self.training)) is not None:
            offset = self._offset(grid)
            return stream_linear_attention(
                x, grid, block, self.qkv, self.proj, self.num_heads,
                query_kernel=self._focus,
                key_kernel=lambda key, span: self._focus(
                    key if offset is None else key + offset[span]
                ),
                eps=eps, conv=self.conv, halo=0 if self.conv is None else self.conv.conv.reach,
            )  # fmt: skip
        query, key, value = self._query_key_value(x, grid)
        attend = naive_linear_attention if config.impl == "naive" else linear_attention
        out = attend(query, key, self._heads(value), eps=eps)
        out = rearrange(out, "b h n d -> b n (h d)").to(value.dtype)
        if self.conv is not None:
            out = out + self.conv(value, grid).to(out.dtype)
        return self.proj(out)

    def _sum_eps(self, grid: tuple[int, int]) -> float:
        """FLatten divides by q . mean_j k_j + eps, which is (q . sum_j k_j + n eps) / n."""
        return self.config.eps * grid[0] * grid[1]

    def _offset(self, grid: tuple[int, int]) -> Tensor | None:
        """The position that is added to the keys, (n, dim), or None."""
        if self.key_position is None:
            return None
        return self.key_position(self.key_position.offset.new_zeros(()), grid)

    def _query_key_value(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Focused queries and keys by head, values by token."""
        self.check_tokens(x, grid)
        query, key, value = linear_parts(self.qkv, x, self.dim)
        if self.key_position is not None:
            key = self.key_position(key, grid)
        return self._heads(self._focus(query)), self._heads(self._focus(key)), value

    def _focus(self, z: Tensor) -> Tensor:
        activated = F.relu(in_wide_range(z)) + self.config.relu_offset
        if self.scale is not None:
            activated = activated / F.softplus(self.scale)
        power = torch.full((1,), self.config.focusing_factor, device=z.device)
        if self.config.norm_scope == "token":
            return power_map(activated, power, impl=self.config.impl)
        per_head = rearrange(activated, "b n (h d) -> b n h d", h=self.num_heads)
        return rearrange(power_map(per_head, power, impl=self.config.impl), "b n h d -> b n (h d)")

    def _heads(self, z: Tensor) -> Tensor:
        return rearrange(z, "b n (h d) -> b h n d", h=self.num_heads)

    def attention_map(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.attention_map``."""
        query, key, _ = self._query_key_value(x, grid)
        return naive_linear_map(query, key, self._sum_eps(grid))

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
