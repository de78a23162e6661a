"""Differential attention (Differential Transformer, arXiv 2410.05258), without a causal mask.

Two maps are subtracted, so that what both attend to by mistake cancels: per head
H = (softmax(Q_1 K_1^T / sqrt(d_q)) - lambda softmax(Q_2 K_2^T / sqrt(d_q))) V with
d_q = d_head / 2 and lambda = exp(lq_1 . lk_1) - exp(lq_2 . lk_2) + lambda_init;
O = (1 - lambda_init) RMSNorm(H) W^O, the norm over each head.

Cost per sample: 4 d^2 n + 3 n^2 d, as outputs are subtracted; 2 n^2 d if maps are ("reference").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from attnzoo.contract import (
    Attention,
    AttentionConfig,
    AttentionContext,
    heads_of_width,
    removed_in,
)
from attnzoo.errors import InvalidValue
from attnzoo.layers.linear import xavier_linear
from attnzoo.ops.normed_difference import normed_difference
from attnzoo.ops.precision import in_float32
from attnzoo.ops.softmax import softmax_attention, softmax_macs
from attnzoo.ops.softmax.reference import softmax_map
from attnzoo.registry import register_attention


@dataclass(frozen=True, kw_only=True)
class Config(AttentionConfig):
    """Options of differential attention."""

    # "increasing": 0.8 - 0.6 exp(-0.3 layer_index), from 0.2 to 0.8, the paper's.
    lambda_init: float | Literal["increasing"] = "increasing"
    # Values are twice as wide as keys, which flash-attn does not take.
    impl: Literal["auto", "reference", "torch", "xformers"] = "auto"

    removed = removed_in("0.2.0", eps=1e-5, qkv_bias=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.lambda_init, str) and not 0 <= self.lambda_init < 1:
            raise InvalidValue(
                f"lambda_init={self.lambda_init} must lie in [0, 1), because 1 - lambda_init "
                f"scales the output; or set lambda_init='increasing'"
            )


@register_attention("differential")
class DifferentialAttention(Attention):
    """Difference of two softmax maps.

    Attributes:
        lambda_init: The constant part of lambda in this layer.
    """

    Config = Config
    config: Config
    paper = "Differential Transformer, 2410.05258"
    complexity = "O(n² d)"
    plot_style = ("#DDCC77", "<")

    def __init__(self, context: AttentionContext, config: Config) -> None:
        super().__init__(context, config)
        width = self.dim // self.num_heads
        if width % 2:
            fits = [h for h in range(1, self.dim + 1) if self.dim % (2 * h) == 0][:12]
            remedy = f"choose num_heads from {fits}" if fits else "choose an even dim"
            raise InvalidValue(
                f"num_heads={self.num_heads} makes heads of width {width} out of dim={self.dim}; "
                f"the two maps halve a head, so that its width must be even: {remedy}"
            )
        self.qkv = xavier_linear(self.dim, 3 * self.dim, bias=False)  # the paper's code
        self.proj = xavier_linear(self.dim, self.dim, bias=False)
        self.norm = nn.RMSNorm(width, eps=1e-5)  # the paper's code
        # By map, then query and key.
        self.lambda_vectors = nn.Parameter(torch.empty(2, 2, width // 2).normal_(std=0.1))
        self.lambda_init = (
            0.8 - 0.6 * math.exp(-0.3 * context.layer_index)
            if isinstance(config.lambda_init, str)
            else config.lambda_init
        )

    @classmethod
    def default_num_heads(cls, dim: int) -> int:
        """Heads of 128, half as many as a DiT has; of even width where ``dim`` is even."""
        return heads_of_width(dim, 128) if dim % 2 else heads_of_width(dim // 2, 64)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.forward``."""
        query, key, value = self._query_key_value(x, grid)
        norm = self.norm.weight, 1e-5, 1 - self.lambda_init
        if self.config.impl == "reference":
            out = _reference(value, query, key, self.lambda_vectors, self.lambda_init)
            return self.proj(rearrange(_scaled_norm(out, *norm), "b h n d -> b n (h d)"))
        first, second = (
            softmax_attention(q, k, value, impl=self.config.impl)
            for q, k in zip(query, key, strict=True)
        )
        impl = "torch" if self.config.impl == "torch" else "auto"
        vectors = self.lambda_vectors
        wide = torch.promote_types(vectors.dtype, torch.float32)  # no factor is rounded to half
        factor = _factor(vectors.to(wide), self.lambda_init)
        return self.proj(normed_difference(first, second, factor, *norm, impl=impl))

    def _query_key_value(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Q and K, (2, b, h, n, d / 2), the first dimension by map; V, (b, h, n, d)."""
        self.check_tokens(x, grid)
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        query, key = (
            rearrange(z, "b n (h two d) -> two b h n d", two=2, h=self.num_heads)
            for z in (query, key)
        )
        return query, key, rearrange(value, "b n (h d) -> b h n d", h=self.num_heads)

    def factor(self) -> Tensor:
        """The layer's lambda, a scalar."""
        return _factor(self.lambda_vectors, self.lambda_init)

    def attention_map(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.attention_map``: the difference of both maps, before the norm."""
        query, key, _ = self._query_key_value(x, grid)
        return _map(query, key, self.lambda_vectors, self.lambda_init)

    def macs_parts(self, grid: tuple[int, int]) -> dict[str, int]:
        """See ``Attention.macs_parts``; "reference" multiplies V once, the others twice."""
        n = grid[0] * grid[1]
        values = self.dim * (1 if self.config.impl == "reference" else 2)
        core = softmax_macs(n, n, self.dim, values)
        return {"projections": 4 * self.dim**2 * n, "core": core}


@in_float32
def _factor(lambda_vectors: Tensor, lambda_init: float) -> Tensor:
    first, second = (lambda_vectors[:, 0] * lambda_vectors[:, 1]).sum(-1).exp()
    return first - second + lambda_init


@in_float32
def _reference(
    value: Tensor, query: Tensor, key: Tensor, lambda_vectors: Tensor, lambda_init: float
) -> Tensor:
    """Reference of the above: subtracts the materialized maps, then takes V."""
    return _map(query, key, lambda_vectors, lambda_init) @ value


@in_float32
def _map(query: Tensor, key: Tensor, lambda_vectors: Tensor, lambda_init: float) -> Tensor:
    first, second = softmax_map(query, key)
    return first - _factor(lambda_vectors, lambda_init) * second


@in_float32
def _scaled_norm(x: Tensor, weight: Tensor, eps: float, scale: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps) * scale
