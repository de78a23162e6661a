"""Focused linear attention (FLatten, arXiv 2308.00442).

O = f(Q) (f(K)^T V) / (f(Q) sum_j f(K_j)^T) + DWC(V) per head, with the norm-preserving power map
f(x) = x^p / |x^p| * |x| of x = (ReLU(.) + 1e-6) / softplus(scale), taken over the whole token.
Cost per sample: 4 d^2 n + 2 n d d_head + 25 n d.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.contract import AttentionContext, heads_of_width, removed_in
from attnzoo.errors import InvalidValue
from attnzoo.layers.depthwise_conv import ConvKind, ValueConv
from attnzoo.layers.key_position import KeyPosition
from attnzoo.layers.linear import xavier_linear
from attnzoo.layers.linear_attention import LinearAttention, LinearConfig, linear_parts
from attnzoo.ops.dispatch import linear
from attnzoo.ops.power_map import scaled_power_map
from attnzoo.ops.precision import in_wide_range
from attnzoo.registry import register_attention

RELU_OFFSET = 1e-6  # FLatten


@dataclass(frozen=True, kw_only=True)
class Config(LinearConfig):
    """Options of focused linear attention."""

    focusing_factor: float = 3.0  # p of the power map; FLatten
    # Grid (height, width) of a learned position added to the keys. FLatten has one, always; off
    # here, because it ties a layer to the one grid it was built for.
    key_position: tuple[int, int] | None = None
    conv: ConvKind = "5x5"  # FLatten
    eps: float = 1e-6  # FLatten; added to the mean over keys, not to the sum

    removed = removed_in(
        "0.2.0", conv_scope="head", norm_scope="token", qkv_bias=True, relu_offset=RELU_OFFSET,
        softplus_scale=True,
        values={"conv": ("acnet-plain",)},
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.focusing_factor < math.inf:
            raise InvalidValue(
                f"focusing_factor must be positive and finite, got {self.focusing_factor}"
            )


@register_attention("focused")
class FocusedAttention(LinearAttention):
    """Linear attention with a norm-preserving power of queries and keys."""

    Config = Config
    paper = "FLatten, 2308.00442"
    divides_by_mean = True  # q . mean_j k_j + eps is (q . sum_j k_j + n eps) / n
    plot_style = ("#56B4E9", "v")

    def __init__(self, context: AttentionContext, config: Config) -> None:
        super().__init__(context, config)
        dim = self.dim
        self.qkv = xavier_linear(dim, 3 * dim, bias=True)  # as FLatten's model factories
        self.scale = nn.Parameter(torch.zeros(dim))  # FLatten: starts at softplus(0) = 0.693
        if config.key_position is not None:
            self.key_position = KeyPosition(config.key_position, dim)
        if config.conv != "none":
            self.conv = ValueConv(dim, self.num_heads, config.conv)
        self.proj = xavier_linear(dim, dim, bias=True)
        self.is_packed = config.key_position is None

    @classmethod
    def default_num_heads(cls, dim: int) -> int:
        """Heads of 32, as Sana's; FLatten keeps the heads of the model it is put into."""
        return heads_of_width(dim, 32)

    def project(self, x: Tensor, grid: tuple[int, int]) -> Sequence[Tensor]:
        """Q, K and V, (b, n, dim) each."""
        return linear_parts(self.qkv, x, self.dim)

    def project_together(self, x: Tensor, grid: tuple[int, int]) -> Sequence[Tensor]:
        """See ``LinearAttention``."""
        return linear(self.qkv, x).chunk(3, dim=-1)

    def packed_map(self) -> tuple[Tensor, float, float]:
        """See ``LinearAttention``."""
        return self.scale, self.config.focusing_factor, RELU_OFFSET

    def kernels(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """See ``LinearAttention``."""
        scale = F.softplus(self.scale)
        return self._focus(query, scale), self._focus(key, scale)

    def query_kernel(self, query: Tensor) -> Tensor:
        """f(Q)."""
        return self._focus(query, F.softplus(self.scale))

    def key_kernel(self, key: Tensor) -> Tensor:
        """f(K)."""
        return self._focus(key, F.softplus(self.scale))

    def _focus(self, z: Tensor, scale: Tensor) -> Tensor:
        factor, impl = self.config.focusing_factor, self.config.impl
        return scaled_power_map(in_wide_range(z), scale, factor, RELU_OFFSET, impl=impl)
