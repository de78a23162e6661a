"""Softmax attention over compressed keys and values (PixArt-Sigma, arXiv 2403.04692).

O = softmax(Q C(K)^T / sqrt(d_head)) C(V) per head, where C is one depthwise R x R convolution with
stride R, starting as mean pooling, and one LayerNorm, both shared by K and V. Q keeps all tokens.
Cost per sample: 4 d^2 n + 2 n (n / R^2) d + 2 n d; only some layers compress, the others are plain
softmax attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from attnzoo.contract import (
    Attention,
    AttentionConfig,
    AttentionContext,
    heads_of_width,
    removed_in,
)
from attnzoo.errors import InvalidValue
from attnzoo.layers.downsample import DepthwiseDownsample
from attnzoo.layers.linear import xavier_linear
from attnzoo.ops.dispatch import linear
from attnzoo.ops.few_keys import attend_tokens, by_head
from attnzoo.ops.softmax import SoftmaxImpl, softmax_macs
from attnzoo.ops.softmax.reference import softmax_map
from attnzoo.registry import register_attention


@dataclass(frozen=True, kw_only=True)
class Config(AttentionConfig):
    """Options of compressed softmax attention."""

    ratio: int = 2  # R; PixArt-Sigma. 1 compresses nothing
    # Blocks that compress, by half or by index; PixArt-Sigma: 14 to 27 of 28. The middle block
    # of an odd depth is in both halves.
    layers: Literal["second-half", "first-half", "all"] | tuple[int, ...] = "second-half"
    impl: SoftmaxImpl = "auto"

    removed = removed_in("0.2.0", qk_norm=False, qkv_bias=True, remainder="pad")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "ratio")


@register_attention("compressed")
class CompressedAttention(Attention):
    """Softmax attention over compressed keys and values."""

    Config = Config
    config: Config
    paper = "PixArt-Sigma, 2403.04692"
    complexity = "O(n² d / ratio²)"
    plot_style = ("#009E73", "*")

    def __init__(self, context: AttentionContext, config: Config) -> None:
        super().__init__(context, config)
        self.qkv = xavier_linear(self.dim, 3 * self.dim, bias=True)
        self.compress: DepthwiseDownsample | None = None
        if self._is_compressing():
            self.compress = DepthwiseDownsample(self.dim, config.ratio, config.ratio)
            weight, bias = self.compress.conv.parameters()
            nn.init.constant_(weight, config.ratio**-2)
            nn.init.zeros_(bias)
            self.compress_norm = nn.LayerNorm(self.dim)
        self.proj = xavier_linear(self.dim, self.dim, bias=True)

    @classmethod
    def default_num_heads(cls, dim: int) -> int:
        """Heads of 64, as every DiT has them; PixArt-Sigma has heads of 72."""
        return heads_of_width(dim, 64)

    def _is_compressing(self) -> bool:
        index, depth, layers = self.context.layer_index, self.context.depth, self.config.layers
        if isinstance(layers, tuple):
            outside = [i for i in layers if not 0 <= i < depth]
            if outside:
                raise InvalidValue(
                    f"layers={layers} names blocks {outside}, but depth={depth}; "
                    f"choose indices from 0 to {depth - 1}"
                )
            is_chosen = index in layers
        elif layers == "first-half":
            is_chosen = index < (depth + 1) // 2
        else:
            is_chosen = layers == "all" or index >= depth // 2
        return is_chosen and self.config.ratio > 1

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.forward``."""
        operands = self._query_key_value(x, grid)
        return linear(self.proj, attend_tokens(*operands, self.num_heads, self.config.impl))

    def _query_key_value(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        self.check_tokens(x, grid)
        if self.compress is None:
            query, key, value = linear(self.qkv, x).chunk(3, dim=-1)
        else:
            query, both = linear(self.qkv, x).split([self.dim, 2 * self.dim], dim=-1)
            # Libraries of attention have no convolution.
            impl = self.config.impl if self.config.impl in ("reference", "torch") else "auto"
            both = self.compress(both, grid, impl).unflatten(-1, (2, self.dim))
            # Autocast norms in float32, which fused attention does not mix with half precision.
            key, value = self.compress_norm(both).to(query.dtype).unbind(2)
        return query, key, value

    def attention_map(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.attention_map``.

        A compressed key's weight is shared evenly by the tokens of its window, which is what
        the mean pooling it starts from does.
        """
        query, key, _ = (by_head(z, self.num_heads) for z in self._query_key_value(x, grid))
        weights = softmax_map(query, key)
        return weights if self.compress is None else self.compress.spread(weights, grid)

    def macs_parts(self, grid: tuple[int, int]) -> dict[str, int]:
        """See ``Attention.macs_parts``."""
        n = keys = grid[0] * grid[1]
        conv = 0
        if self.compress is not None:
            height, width = self.compress.coarse_grid(grid)
            keys, conv = height * width, 2 * self.compress.macs(grid)
        return {
            "projections": 4 * self.dim**2 * n,
            "core": softmax_macs(n, keys, self.dim, self.dim),
            "conv": conv,
        }
