"""Magnitude-aware linear attention (MALA, arXiv 2507.00698).

With phi = ELU + 1, s = 1 / sqrt(d_head) and z_i = s phi(Q_i) mean_j phi(K_j)^T, key j weighs
(s / n) phi(Q_i) phi(K_j)^T (1 + 1 / z_i) - z_i / n: a longer query makes a row steeper, as under a
softmax, and rows still sum to 1. O = (weights V + DWC(V)) * W_G X per head; rotary positions turn
the product of Q and K, not z. Cost per sample: 5 d^2 n + 2 n d d_head + n d + 25 n d.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.layers.gated_elu import GatedEluAttention, GatedEluConfig
from attnzoo.layers.linear_attention import Features
from attnzoo.layers.streaming import State
from attnzoo.ops.precision import in_float32
from attnzoo.ops.rotary_core.torch import magnitude_read, token_sum
from attnzoo.registry import register_attention


@dataclass(frozen=True, kw_only=True)
class Config(GatedEluConfig):
    """Options of MALA."""

    eps: float = 1e-6  # added to z; MALA divides by z itself, which is 0 for dead queries


@register_attention("mala")
class MALAttention(GatedEluAttention):
    """Linear attention whose weights grow steeper with the query's length, as softmax's do."""

    Config = Config
    config: Config
    paper = "MALA, 2507.00698"
    plot_style = ("#17BECF", "^")
    is_weighed = False
    tensors_crossed = 7.0  # also the gate

    def fold(
        self,
        keys: Features,
        value: Tensor,
        grid: tuple[int, int],
        span: slice = slice(None),
        queries: int | None = None,
    ) -> State:
        """See ``LinearAttention.fold``; last comes the sum of all values."""
        total = token_sum(self._by_head(value))
        return [*super().fold(keys, value, grid, span, queries), (total,)]

    def attended(
        self, queries: Features, state: State, grid: tuple[int, int], span: slice = slice(None)
    ) -> Tensor:
        """See ``LinearAttention.attended``."""
        products, sums, (total,) = state
        turned, query, tokens = queries.terms[0], queries.norms[0], grid[0] * grid[1]
        return magnitude_read(turned, query, products, sums, total, tokens, self.config.eps)

    def weights(self, queries: Features, keys: Features, grid: tuple[int, int]) -> Tensor:
        """See ``LinearAttention.weights``."""
        return magnitude_aware_map(queries, keys, self.config.eps)


@in_float32
def magnitude_aware_map(queries: Features, keys: Features, eps: float) -> Tensor:
    """The n x n map, (b, h, n, n), as it is written."""
    turned, plain = (
        torch.einsum("bhnd,bhmd->bhnm", query, key) * query.shape[-1] ** -0.5
        for query, key in ((queries.terms[0], keys.terms[0]), (queries.norms[0], keys.norms[0]))
    )
    tokens, z = plain.shape[-1], plain.mean(-1, keepdim=True)
    return turned / tokens * (1 + 1 / (z + eps)) - z / tokens
