"""Rank-augmented linear attention (RALA, arXiv 2411.07635).

With phi = ELU + 1 and s = 1 / sqrt(d_head), keys are weighed by what the mean query sees in them,
k_j = n softmax_j(s mean_i phi(Q_i) phi(K_j)^T) phi(K_j), and so is the state that they add up to:
O = (phi(Q) (k^T V) / (phi(Q) sum_j k_j^T + n eps) + DWC(V)) * W_G X per head, a gate that raises
the rank of the output. Rotary positions turn the product of Q and k, not the normalizer.
Cost per sample: 5 d^2 n + 2 n d d_head + 2 n d + 25 n d.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.layers.gated_elu import GatedEluAttention, GatedEluConfig
from attnzoo.layers.linear_attention import Features
from attnzoo.layers.streaming import State, first_pass, second_pass, softmax_merge, spans_of
from attnzoo.ops.linear_core import fold, key_sum
from attnzoo.ops.rotary_core.rotary import rotated
from attnzoo.ops.rotary_core.torch import key_scores, token_sum
from attnzoo.registry import register_attention


@dataclass(frozen=True, kw_only=True)
class Config(GatedEluConfig):
    """Options of RALA."""

    eps: float = 1e-6  # RALA; added to the mean over the keys, not to their sum


@register_attention("rala")
class RALAttention(GatedEluAttention):
    """Linear attention with keys weighed by the mean query, and a gated output."""

    Config = Config
    config: Config
    paper = "RALA, 2411.07635"
    divides_by_mean = True
    is_weighed = True
    plot_style = ("#1F77B4", ">")
    tensors_crossed = 8.0  # also the gate, and the weighed keys

    def project(self, x: Tensor, grid: tuple[int, int]) -> Sequence[Any]:
        """Q; K and the mean query, (b, heads, 1, d_head); V."""
        query, key, value = super().project(x, grid)
        anchor = self._query_sum(query) / query.shape[1]
        return query, (key, anchor), value

    def _query_sum(self, query: Tensor) -> Tensor:
        return token_sum(self._by_head(self.query_kernel(query)))

    def keys(
        self, key: Any, x: Tensor, grid: tuple[int, int], span: slice = slice(None)
    ) -> Features:
        """Keys, weighed over all positions."""
        features, scores = self._scored(*key)
        return self._weighed(features, scores.softmax(-1) * scores.shape[-1], grid, span)

    def _scored(self, key: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        """Features of keys and what the mean query sees in them, (b, heads, 1, m)."""
        features = self._by_head(self.key_kernel(key))
        return features, key_scores(anchor, features)

    def _weighed(
        self, features: Tensor, weight: Tensor, grid: tuple[int, int], span: slice
    ) -> Features:
        keys = (features * weight.mT).to(features.dtype)
        return Features([rotated(keys, grid, span) if self.is_rotated else keys], [keys])

    def _stream(self, x: Tensor, grid: tuple[int, int], block: int) -> Tensor:
        spans = spans_of(grid, block, self.rows_together)
        tokens = x.shape[1]
        sums = [self._query_sum(self.project_query(x[:, span])) for span in spans]
        anchor = torch.stack(sums).sum(0) / tokens

        def encode(span: slice) -> tuple[Tensor | None, State]:
            key, value = self.project_key_value(x[:, span])
            features, scores = self._scored(key, anchor)
            top = scores.amax(-1, keepdim=True)
            weight = (scores - top).exp()
            keys = self._weighed(features, weight, grid, span)
            [product] = fold(keys.terms[0], self._by_head(value), None)
            state = top, weight.sum(-1, keepdim=True), product, *key_sum(keys.norms[0])
            return (None if self.conv is None else value), [state]

        cached, [(_, total, product, keys)] = first_pass(x, spans, encode, softmax_merge)
        state: State = [(product * (tokens / total),), (keys * (tokens / total),)]
        return second_pass(cached, spans, lambda span: self.decode(x, grid, span, cached, state))

    def macs_parts(self, grid: tuple[int, int]) -> dict[str, int]:
        """See ``Attention.macs_parts``."""
        parts = super().macs_parts(grid)
        scores = grid[0] * grid[1] * self.dim
        return parts | {"core": parts["core"] + scores}
