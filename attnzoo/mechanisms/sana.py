"""Sana's ReLU linear attention (arXiv 2410.10629; EfficientViT, arXiv 2205.14756).

O = ReLU(Q) (ReLU(K)^T V) / (ReLU(Q) sum_j ReLU(K_j)^T) per head, all sums in float32.
Cost per sample: 4 d^2 n + 2 n d d_head. ``gated`` is Sana-Video 2's form, with normed Q and K:
O = sigmoid(X W^G) * RMSNorm(Q (b K^T V) / (ReLU(Q) sum_j ReLU(K_j)^T)), b = sigmoid(X W^B), whose
numerator has no ReLU; d^2 n + h d n more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.contract import AttentionContext, heads_of_width
from attnzoo.layers.linear import xavier_linear
from attnzoo.layers.linear_attention import Features, LinearAttention, LinearConfig
from attnzoo.ops.dispatch import is_bare, linear
from attnzoo.ops.precision import in_wide_range
from attnzoo.registry import register_attention

_NO_NORM = (nn.Identity,)


@dataclass(frozen=True, kw_only=True)
class Config(LinearConfig):
    """Options of Sana's attention."""

    qkv_bias: bool = False  # Sana
    # RMSNorm over the full width, before the head split, eps 1e-5: off in Sana, on in Sana 1.5.
    qk_norm: bool = False
    gated: bool = False  # Sana-Video 2's, whose Q and K are always normed
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
        is_normed = config.qk_norm or config.gated
        self.query_norm = nn.RMSNorm(self.dim, eps=1e-5) if is_normed else nn.Identity()
        self.key_norm = nn.RMSNorm(self.dim, eps=1e-5) if is_normed else nn.Identity()
        self.is_wide = config.gated  # its numerator has any size over the normalizer
        if config.gated:
            self.beta = xavier_linear(self.dim, self.num_heads, bias=True)
            self.head_norm = nn.RMSNorm(self.dim // self.num_heads, eps=1e-5)
            self.gate = xavier_linear(self.dim, self.dim, bias=True)
        self.proj = xavier_linear(self.dim, self.dim, bias=True)
        self.is_packed = not is_normed

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

    def queries(
        self, query: Tensor, x: Tensor, grid: tuple[int, int], span: slice = slice(None)
    ) -> Features:
        """See ``LinearAttention.queries``; where it is gated, the terms keep their signs."""
        query = self.query_kernel(query)
        query = in_wide_range(query) if self.config.gated else query
        features = [self._by_head(F.relu(query))]
        return Features([self._by_head(query)] if self.config.gated else features, features)

    def keys(
        self, key: Tensor, x: Tensor, grid: tuple[int, int], span: slice = slice(None)
    ) -> Features:
        """See ``LinearAttention.keys``; where it is gated, each term is weighed, in each head."""
        if self.key_position is not None:
            key = self.key_position(key, grid, span)
        key = self.key_kernel(key)
        key = in_wide_range(key) if self.config.gated else key
        features = [self._by_head(F.relu(key))]
        if not self.config.gated:
            return Features(features, features)
        beta = linear(self.beta, x).sigmoid().transpose(1, 2)[..., None]
        return Features([self._by_head(key) * beta], features)

    def _is_packed(self) -> bool:
        if not self.is_packed or self.key_position is not None:
            return False
        norms: Any = self._modules  # of a derived class, or with a hook
        return is_bare(norms["query_norm"], _NO_NORM) and is_bare(norms["key_norm"], _NO_NORM)

    def finish(self, out: Tensor, x: Tensor) -> Tensor:
        """See ``LinearAttention.finish``; where it is gated, a norm and the gate come before."""
        if self.config.gated:
            out = self.head_norm(out.unflatten(-1, (self.num_heads, -1))).flatten(-2)
            gate = linear(self.gate, x).sigmoid()
            out = out.to(gate.dtype) * gate
        return linear(self.proj, out)

    def unserved_option(self) -> str | None:
        """See ``LinearAttention.unserved_option``."""
        return "gated=True" if self.config.gated else None

    def macs_parts(self, grid: tuple[int, int]) -> dict[str, int]:
        """See ``Attention.macs_parts``."""
        parts = super().macs_parts(grid)
        if self.config.gated:
            parts["projections"] += self.dim * (self.dim + self.num_heads) * grid[0] * grid[1]
        return parts
