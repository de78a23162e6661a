"""Magnitude-aware linear attention (MALA, arXiv 2507.00698).

With phi = ELU + 1, s = 1 / sqrt(d_head) and z_i = s phi(Q_i) mean_j phi(K_j)^T, key j weighs
(s / n) phi(Q_i) phi(K_j)^T (1 + 1 / z_i) - z_i / n: a longer query makes a row steeper, as under a
softmax, and rows still sum to 1. O = (weights V + DWC(V)) * W_G X per head; rotary positions turn
the product of Q and K, not z. Cost per sample: 5 d^2 n + 2 n d d_head + n d + 25 n d.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attnzoo.contract import AttentionContext, heads_of_width
from attnzoo.layers.depthwise_conv import DepthwiseConv
from attnzoo.layers.linear import elu_plus_one, xavier_linear
from attnzoo.layers.linear_attention import Features, LinearAttention, LinearConfig
from attnzoo.layers.streaming import State
from attnzoo.ops.linear_core import wide_read
from attnzoo.ops.precision import in_float32
from attnzoo.registry import register_attention


@dataclass(frozen=True, kw_only=True)
class Config(LinearConfig):
    """Options of MALA."""

    rope: bool = True  # MALA; rows sum to 1 without it only
    conv: Literal["3x3", "5x5", "none"] = "5x5"  # MALA
    eps: float = 1e-6  # added to z; MALA divides by z itself, which is 0 for dead queries


@register_attention("mala")
class MALAttention(LinearAttention):
    """Linear attention whose weights grow steeper with the query's length, as softmax's do."""

    Config = Config
    config: Config
    paper = "MALA, 2507.00698"
    plot_style = ("#17BECF", "^")
    tensors_crossed = 7.0  # also the gate

    def __init__(self, context: AttentionContext, config: Config) -> None:
        super().__init__(context, config)
        self.is_rotated = config.rope
        self.qkv = xavier_linear(self.dim, 3 * self.dim, bias=True)
        self.gate = xavier_linear(self.dim, self.dim, bias=True)
        if config.conv != "none":
            self.conv = DepthwiseConv(self.dim, config.conv)
        self.proj = xavier_linear(self.dim, self.dim, bias=True)

    @classmethod
    def default_num_heads(cls, dim: int) -> int:
        """Heads of 32, as Sana's, which is MALA's order of width."""
        return heads_of_width(dim, 32)

    def query_kernel(self, query: Tensor) -> Tensor:
        """ELU(Q) + 1."""
        return elu_plus_one(query)

    def key_kernel(self, key: Tensor) -> Tensor:
        """ELU(K) + 1."""
        return elu_plus_one(key)

    def fold(
        self,
        keys: Features,
        value: Tensor,
        grid: tuple[int, int],
        span: slice = slice(None),
        queries: int | None = None,
    ) -> State:
        """See ``LinearAttention.fold``; last comes the sum of all values."""
        wide = torch.promote_types(value.dtype, torch.float32)
        total = self._by_head(value).sum(2, keepdim=True, dtype=wide)
        return [*super().fold(keys, value, grid, span, queries), (total,)]

    def attended(
        self, queries: Features, state: State, grid: tuple[int, int], span: slice = slice(None)
    ) -> Tensor:
        """See ``LinearAttention.attended``."""
        products, sums, (total,) = state
        tokens, query = grid[0] * grid[1], queries.terms[0]
        scale = query.shape[-1] ** -0.5 / tokens
        z = wide_read(queries.norms[0], sums) * scale
        read = wide_read(query, products) * (scale + scale / (z + self.config.eps))
        return torch.addcmul(read, z, total / tokens, value=-1).to(query.dtype)

    def weights(self, queries: Features, keys: Features, grid: tuple[int, int]) -> Tensor:
        """See ``LinearAttention.weights``."""
        return magnitude_aware_map(queries, keys, self.config.eps)

    def finish(self, out: Tensor, x: Tensor) -> Tensor:
        """See ``LinearAttention.finish``: the gate, which has no activation."""
        return self.proj(out * self.gate(x))

    def macs_parts(self, grid: tuple[int, int]) -> dict[str, int]:
        """See ``Attention.macs_parts``."""
        parts = super().macs_parts(grid)
        return parts | {"projections": 5 * self.dim**2 * grid[0] * grid[1]}


@in_float32
def magnitude_aware_map(queries: Features, keys: Features, eps: float) -> Tensor:
    """The n x n map, (b, h, n, n), as it is written."""
    turned, plain = (
        torch.einsum("bhnd,bhmd->bhnm", query, key) * query.shape[-1] ** -0.5
        for query, key in ((queries.terms[0], keys.terms[0]), (queries.norms[0], keys.norms[0]))
    )
    tokens, z = plain.shape[-1], plain.mean(-1, keepdim=True)
    return turned / tokens * (1 + 1 / (z + eps)) - z / tokens
