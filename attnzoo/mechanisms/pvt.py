"""Spatial-reduction attention (PVT, arXiv 2102.12122; PVTv2, arXiv 2106.13797).

O = softmax(Q K^T / sqrt(d_head)) V per head, where keys and values are projected from fewer
tokens: K, V = R(X) W with R(X) = LayerNorm(Conv_RxR, stride R (X)) for "conv" (PVT), a full
convolution, or R(X) = GELU(LayerNorm(Conv_1x1(AvgPool to P x P (X)))) for "pool" (PVTv2's linear
form). Cost per sample: "conv" 3 d^2 n + 2 d^2 n / R^2 + 2 n^2 d / R^2, "pool" 2 d^2 n + 3 P^2 d^2
+ 2 P^2 n d.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.contract import Attention, AttentionConfig, AttentionContext, heads_of_width
from attnzoo.layers.linear import linear_beside, windows_linear, xavier_linear
from attnzoo.ops.depthwise_conv import to_image, to_tokens
from attnzoo.ops.dispatch import Impl, linear
from attnzoo.ops.few_keys import attend_tokens, by_head
from attnzoo.ops.softmax import SoftmaxImpl, softmax_macs
from attnzoo.ops.softmax.reference import softmax_map
from attnzoo.registry import register_attention


@dataclass(frozen=True, kw_only=True)
class Config(AttentionConfig):
    """Options of spatial-reduction attention."""

    kind: Literal["conv", "pool"] = "conv"  # PVT's, or PVTv2's linear form
    ratio: int = 2  # R of "conv"; PVT's where a token is 16 pixels; elsewhere 8, 4 and 1
    pool: int = 7  # P of "pool"; PVTv2
    impl: SoftmaxImpl = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "ratio", "pool")


@register_attention("pvt")
class PVTAttention(Attention):
    """Softmax attention to keys and values of fewer tokens, convolved or pooled."""

    Config = Config
    config: Config
    paper = "PVT, 2102.12122"
    complexity = "O(n² d / ratio²)"
    plot_style = ("#AA7744", "H")

    def __init__(self, context: AttentionContext, config: Config) -> None:
        super().__init__(context, config)
        side = config.ratio if config.kind == "conv" else 1
        self.query = xavier_linear(self.dim, self.dim, bias=True)  # PVT's models
        self.key_value = xavier_linear(self.dim, 2 * self.dim, bias=True)
        self.reduce: nn.Conv2d | None = None
        if config.kind == "pool" or side > 1:
            self.reduce = nn.Conv2d(self.dim, self.dim, side, stride=side)
            nn.init.normal_(self.reduce.weight, std=(2 / (side**2 * self.dim)) ** 0.5)  # PVT
            assert self.reduce.bias is not None
            nn.init.zeros_(self.reduce.bias)
            self.norm = nn.LayerNorm(self.dim)
        self.proj = xavier_linear(self.dim, self.dim, bias=True)

    @classmethod
    def default_num_heads(cls, dim: int) -> int:
        """Heads of 64, as PVT's and every DiT's."""
        return heads_of_width(dim, 64)

    def coarse_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the keys."""
        if self.config.kind == "pool":
            return min(grid[0], self.config.pool), min(grid[1], self.config.pool)
        return -(-grid[0] // self.config.ratio), -(-grid[1] // self.config.ratio)

    def reduced(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """R(X): (b, h * w, d) -> (b, m, d)."""
        if self.reduce is None:
            return x
        if self.config.kind == "pool":
            coarse = self.coarse_grid(grid)
            means = to_tokens(F.adaptive_avg_pool2d(to_image(x, grid), coarse))
            return F.gelu(self.norm(windows_linear(self.reduce, means, coarse)))
        missing = [-side % self.config.ratio for side in grid]
        if any(missing):  # the last windows' sums count as those of full ones
            image = F.pad(to_image(x, grid), (0, missing[1], 0, missing[0]))
            scales = []
            for side, gap in zip(grid, missing, strict=True):
                scale = image.new_ones(side + gap)
                scale[side + gap - self.config.ratio :] = self.config.ratio / (
                    self.config.ratio - gap
                )
                scales.append(scale)
            x = to_tokens(image * (scales[0][:, None] * scales[1]))
            grid = grid[0] + missing[0], grid[1] + missing[1]
        impl = self.config.impl  # other libraries have attention alone
        windows: Impl = impl if impl in ("reference", "torch") else "auto"
        return self.norm(windows_linear(self.reduce, x, grid, windows))

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.forward``."""
        self.check_tokens(x, grid)
        query, x = linear_beside(self.query, x)
        key, value = linear(self.key_value, self.reduced(x, grid)).chunk(2, dim=-1)
        attended = attend_tokens(query, key, value, self.num_heads, self.config.impl)
        return linear(self.proj, attended)

    def attention_map(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.attention_map``.

        A key's weight is shared evenly by the tokens of its window.
        """
        self.check_tokens(x, grid)
        key, _ = linear(self.key_value, self.reduced(x, grid)).chunk(2, dim=-1)
        weights = softmax_map(*(by_head(z, self.num_heads) for z in (linear(self.query, x), key)))
        if self.reduce is None:
            return weights
        n = grid[0] * grid[1]
        each = torch.eye(n, dtype=weights.dtype, device=weights.device).unflatten(1, (1, *grid))
        if self.config.kind == "pool":
            share = F.adaptive_avg_pool2d(each, self.coarse_grid(grid))
        else:
            share = F.avg_pool2d(each, self.config.ratio, ceil_mode=True)
        return weights @ share.flatten(1).t()

    def macs_parts(self, grid: tuple[int, int]) -> dict[str, int]:
        """See ``Attention.macs_parts``."""
        n, (height, width) = grid[0] * grid[1], self.coarse_grid(grid)
        keys = height * width
        return {
            "projections": 2 * self.dim**2 * (n + keys),
            "core": softmax_macs(n, keys, self.dim, self.dim),
            "conv": 0 if self.reduce is None else self.reduce.weight.numel() * keys,
        }
