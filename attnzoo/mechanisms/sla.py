"""Sparse-linear attention (SLA, arXiv 2509.24006): softmax where it matters, linear elsewhere.

Blocks of 64 tokens. A block of queries keeps the share of the blocks of keys whose means it is
most similar to, by mean(Q) mean(K - mean K)^T; O = softmax(Q K^T / sqrt(d_head)) V over these keys
+ L W_l + b_l, L = phi(Q) sum_j phi(K_j)^T V_j / (phi(Q) sum_j phi(K_j)^T + eps) over the others,
phi the softmax over channels, W_l and b_l of all heads and 0 at first. Cost per sample, B blocks:
4 d^2 n + 2 share n^2 d + 3 n d d_head + n d + B^2 d (d_head + 2).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from attnzoo.contract import (
    LEAST_DIVISOR,
    Attention,
    AttentionConfig,
    AttentionContext,
    heads_of_width,
)
from attnzoo.errors import InvalidValue
from attnzoo.layers.linear import query_key_value, xavier_linear
from attnzoo.ops.dispatch import is_bare, linear
from attnzoo.ops.sparse_linear import (
    can_join,
    joined,
    sparse_linear_attention,
    sparse_linear_macs,
    sparse_linear_tokens,
)
from attnzoo.ops.sparse_linear.reference import sparse_map
from attnzoo.registry import register_attention


@dataclass(frozen=True, kw_only=True)
class Config(AttentionConfig):
    """Options of sparse-linear attention."""

    share: float = 0.2  # of the blocks of keys, by softmax; the released code's examples
    block: int = 64  # tokens; SLA's, of queries and keys
    linear: Literal["rest", "all"] = "rest"  # the paper's; its newer code sees all keys
    eps: float = 1e-5  # SLA
    impl: Literal["auto", "reference", "torch", "triton"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "block")
        self.at_least(LEAST_DIVISOR, "eps")
        if not 0 < self.share <= 1:
            raise InvalidValue(f"share must lie in (0, 1], got {self.share}")


@register_attention("sla")
class SparseLinearAttention(Attention):
    """Softmax attention to the blocks that matter most, linear attention to the rest."""

    Config = Config
    config: Config
    paper = "SLA, 2509.24006"
    complexity = "O(share n² d)"
    plot_style = ("#D62728", "X")

    def __init__(self, context: AttentionContext, config: Config) -> None:
        super().__init__(context, config)
        self.qkv = xavier_linear(self.dim, 3 * self.dim, bias=True)  # as the DiT that SLA tunes
        self.linear_proj = nn.Linear(self.dim // self.num_heads, self.dim // self.num_heads)
        # A pretrained softmax model starts as its sparse self, and learns the rest.
        nn.init.zeros_(self.linear_proj.weight)
        nn.init.zeros_(self.linear_proj.bias)
        self.proj = xavier_linear(self.dim, self.dim, bias=True)

    @classmethod
    def default_num_heads(cls, dim: int) -> int:
        """Heads of 64, as every DiT has them."""
        return heads_of_width(dim, 64)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.forward``."""
        config = self.config
        options = config.block, config.share, config.linear == "rest", config.eps
        operands = self._query_key_value(x, grid)
        if can_join(operands[0]) and is_bare(self.linear_proj):
            learned = self.linear_proj.weight, self.linear_proj.bias
            out = sparse_linear_tokens(*operands, *learned, *options, impl=config.impl)
        else:
            parts = sparse_linear_attention(*operands, *options, impl=config.impl)
            out = joined(parts, functools.partial(linear, self.linear_proj))
        return linear(self.proj, out)

    def _query_key_value(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        self.check_tokens(x, grid)
        return query_key_value(self.qkv, x, self.num_heads)

    def attention_map(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.attention_map``: the softmax part; a projection mixes the other's."""
        query, key, _ = self._query_key_value(x, grid)
        return sparse_map(query, key, self.config.block, self.config.share)[0].to(x.dtype)

    def macs_parts(self, grid: tuple[int, int]) -> dict[str, int]:
        """See ``Attention.macs_parts``; the last block counts as full."""
        n, config = grid[0] * grid[1], self.config
        options = config.block, config.share, config.linear == "rest"
        return {
            "projections": n * self.dim * (4 * self.dim + self.dim // self.num_heads),
            "core": sparse_linear_macs(n, self.dim, self.num_heads, *options),
        }
