"""Efficient attention (arXiv 1812.01243): two softmaxes in place of the one over all pairs.

rho_q(Q) is a softmax over the channels of a query's head, rho_k(K) one over all positions, channel
by channel; O = rho_q(Q) (rho_k(K)^T V) per head. A row of the map sums to 1 without a normalizer.
Cost per sample: 4 d^2 n + 2 n d d_head.
"""

from __future__ import annotations

from torch import Tensor

from attnzoo.contract import AttentionContext, heads_of_width
from attnzoo.layers.linear import xavier_linear
from attnzoo.layers.linear_attention import LinearAttention, LinearConfig
from attnzoo.layers.streaming import State, softmax_merge, weighted
from attnzoo.ops.linear_core import key_softmax, query_softmax
from attnzoo.registry import register_attention


@register_attention("efficient")
class EfficientAttention(LinearAttention):
    """Linear attention of queries' softmax over channels and keys' softmax over positions."""

    paper = "Efficient attention, 1812.01243"
    activation = "softmax"
    plot_style = ("#E377C2", "s")

    def __init__(self, context: AttentionContext, config: LinearConfig) -> None:
        super().__init__(context, config)
        self.normalizer = "none"
        self.is_packed = True
        self.qkv = xavier_linear(self.dim, 3 * self.dim, bias=True)  # as the source
        self.proj = xavier_linear(self.dim, self.dim, bias=True)

    @classmethod
    def default_num_heads(cls, dim: int) -> int:
        """Heads of 32, as Sana's; the paper varies heads and widths and fixes none."""
        return heads_of_width(dim, 32)

    def query_kernel(self, query: Tensor) -> Tensor:
        """rho_q(Q)."""
        return query_softmax(query, self.num_heads)

    def key_kernel(self, key: Tensor) -> Tensor:
        """rho_k(K) of all tokens."""
        return key_softmax(key)

    def kernels(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Q and K, of which a fused core takes the softmax."""
        return query, key

    def encode(self, x: Tensor, grid: tuple[int, int], span: slice) -> tuple[Tensor | None, State]:
        """See ``LinearAttention.encode``: sums under the block's own largest keys."""
        key, value = self.project_key_value(x[:, span])
        return None, weighted(self._by_head(key).mT, self._by_head(value))

    def merge(self, whole: State, part: State) -> State:
        """See ``LinearAttention.merge``."""
        return softmax_merge(whole, part)

    def decode(
        self, x: Tensor, grid: tuple[int, int], span: slice, cached: Tensor | None, state: State
    ) -> Tensor:
        """See ``LinearAttention.decode``."""
        [(_, total, mixed)] = state
        return super().decode(x, grid, span, cached, [(mixed / total,)])
