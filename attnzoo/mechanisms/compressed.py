"""Softmax attention over compressed keys and values (PixArt-Sigma, arXiv 2403.04692).

O = softmax(Q C(K)^T / sqrt(d_head)) C(V) per head, where C is one depthwise R x R convolution with
stride R, starting as mean pooling, and one LayerNorm, both shared by K and V. Q keeps all tokens.
Cost per sample: 4 d^2 n + 2 n (n / R^2) d + 2 n d; only some layers compress, the others are plain
softmax attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from einops import rearrange
from torch import Tensor, nn

from attnzoo.contract import Attention, AttentionConfig, AttentionContext, heads_of_width
from attnzoo.errors import InvalidType, InvalidValue
from attnzoo.layers.downsample import DepthwiseDownsample
from attnzoo.layers.linear import xavier_linear
from attnzoo.ops.softmax import SoftmaxImpl, softmax_attention
from attnzoo.ops.softmax.reference import softmax_map as naive_softmax_map
from attnzoo.registry import register_attention


@dataclass(frozen=True, kw_only=True)
class Config(AttentionConfig):
    """Options of compressed softmax attention."""

    ratio: int = 2  # R; PixArt-Sigma. 1 compresses nothing
    # Blocks that compress, by half or by index; PixArt-Sigma: 14 to 27 of 28. The middle block
    # of an odd depth is in both halves.
    layers: Literal["second-half", "first-half", "all"] | tuple[int, ...] = "second-half"
    # Grids that the ratio does not divide: "pad" lets the last windows average the tokens they
    # have; "raise" is PixArt-Sigma, whose grids are all even.
    remainder: Literal["pad", "raise"] = "pad"
    qkv_bias: bool = True  # PixArt-Sigma
    qk_norm: bool = False  # RMSNorm per head, before the compression; off in PixArt-Sigma
    impl: SoftmaxImpl = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "ratio")
        if isinstance(self.layers, tuple) and not all(isinstance(i, int) for i in self.layers):
            raise InvalidType(f"layers must hold the indices of blocks, got {self.layers!r}")


@register_attention("compressed")
class CompressedAttention(Attention):
    """Softmax attention over compressed keys and values."""

    Config = Config
    config: Config
    paper = "PixArt-Sigma, 2403.04692"
    complexity = "O(n² d / ratio²)"

    def __init__(self, context: AttentionContext, config: Config) -> None:
        super().__init__(context, config)
        self.qkv = xavier_linear(self.dim, 3 * self.dim, bias=config.qkv_bias)
        head_dim = self.dim // self.num_heads
        self.query_norm = nn.RMSNorm(head_dim, eps=1e-6) if config.qk_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(head_dim, eps=1e-6) if config.qk_norm else nn.Identity()
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
        """See ``Attention.forward``.

        Raises:
            InvalidValue: ``remainder="raise"`` and the ratio does not divide the grid.
        """
        out = softmax_attention(*self._query_key_value(x, grid), impl=self.config.impl)
        return self.proj(rearrange(out, "b h n d -> b n (h d)"))

    def _query_key_value(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        self.check_tokens(x, grid)
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        dtype = value.dtype
        if self.config.qk_norm:
            query = self.query_norm(self._heads(query, "b n h d")).flatten(2)
            key = self.key_norm(self._heads(key, "b n h d")).flatten(2)
        if self.compress is not None:
            self._check_grid(grid)
            key = self.compress_norm(self.compress(key, grid))
            value = self.compress_norm(self.compress(value, grid))
        # Autocast norms in float32, which the fused backends do not mix with half precision.
        split = [self._heads(z.to(dtype), "b h n d") for z in (query, key, value)]
        return split[0], split[1], split[2]

    def _heads(self, z: Tensor, order: str) -> Tensor:
        return rearrange(z, f"b n (h d) -> {order}", h=self.num_heads)

    def _check_grid(self, grid: tuple[int, int]) -> None:
        ratio = self.config.ratio
        if self.config.remainder == "raise" and any(side % ratio for side in grid):
            divisors = [r for r in range(1, min(grid) + 1) if not any(side % r for side in grid)]
            raise InvalidValue(
                f"ratio={ratio} does not divide grid={grid[0]}x{grid[1]}; choose a ratio of "
                f"{divisors}, or set remainder='pad'"
            )

    def attention_map(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.attention_map``.

        A compressed key's weight is shared evenly by the tokens of its window, which is what
        the mean pooling it starts from does.
        """
        query, key, _ = self._query_key_value(x, grid)
        weights = naive_softmax_map(query, key)
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
            "core": 2 * n * keys * self.dim,
            "conv": conv,
        }
