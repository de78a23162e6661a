"""Linear compressed attention (EDiT, arXiv 2503.16726), after secondary sources.

Queries see their surroundings through convolutions, Q = ReLU(W_Q (X + C_2(LeakyReLU(GN(C_1(X)))))
with a 3x3 C_1 and a 1x1 C_2 ("ConvFusion"); a depthwise 3x3 convolution with stride 2 leaves a
quarter of the keys and values, K = ReLU(S_K(W_K X)), V = S_V(W_V X) ("spatial compressor").
O = Q (K^T V) / (Q sum_j K_j^T) per head. Cost per sample, c = bottleneck: (4 + 10 / c) d^2 n
+ 4.5 n d + 1.25 n d d_head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from attnzoo.contract import Attention, AttentionConfig, AttentionContext, heads_of_width
from attnzoo.layers.depthwise_conv import to_image, to_tokens
from attnzoo.layers.downsample import DepthwiseDownsample
from attnzoo.layers.linear import xavier_linear
from attnzoo.ops.linear import (
    linear_attention,
    linear_attention_macs,
    naive_linear_attention,
    naive_linear_map,
)
from attnzoo.registry import register_attention


@dataclass(frozen=True, kw_only=True)
class Config(AttentionConfig):
    """Options of EDiT's attention; what no source at hand states is marked "unstated"."""

    bottleneck: int = 2  # c; unstated, but 2 reproduces the printed operation counts
    groups: int | None = (
        None  # of GroupNorm; unstated. None: at most 32, two channels or more each
    )
    negative_slope: float = 0.01  # of LeakyReLU; unstated, torch's default
    stride: Literal[1, 2, 3] = 2  # EDiT
    conv_bias: bool = True  # of all four convolutions; unstated
    qkv_bias: bool = True  # unstated; PixArt-Sigma, which EDiT is distilled from, has it
    eps: float = 1e-8  # unstated; Sana's
    impl: Literal["auto", "naive"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "bottleneck")
        self.at_least(0, "negative_slope", "eps")
        if self.groups is not None:
            self.at_least(1, "groups")


class ConvFusion(nn.Module):
    """X + C_2(LeakyReLU(GN(C_1(X)))): a bottleneck of convolutions around each token.

    Args:
        dim: Channels.
        config: The mechanism's options.

    Raises:
        ValueError: ``groups`` does not divide the bottleneck's channels.
    """

    def __init__(self, dim: int, config: Config) -> None:
        super().__init__()
        width = max(1, dim // config.bottleneck)
        divisors = [g for g in range(1, width + 1) if width % g == 0]
        groups = config.groups
        if groups is None:
            groups = max(g for g in divisors if g <= max(1, min(32, width // 2)))
        if groups not in divisors:
            raise ValueError(
                f"groups={groups} does not divide the bottleneck's {width} channels "
                f"(dim={dim}, bottleneck={config.bottleneck}); choose one of {divisors}"
            )
        self.squeeze = nn.Conv2d(dim, width, 3, padding=1, bias=config.conv_bias)
        self.norm = nn.GroupNorm(groups, width)
        self.expand = nn.Conv2d(width, dim, 1, bias=config.conv_bias)
        self.negative_slope = config.negative_slope

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(b, h * w, dim) -> (b, h * w, dim)."""
        hidden = F.leaky_relu(self.norm(self.squeeze(to_image(x, grid))), self.negative_slope)
        return x + to_tokens(self.expand(hidden))

    def macs(self, grid: tuple[int, int]) -> int:
        """Multiply-accumulates per sample."""
        return (self.squeeze.weight.numel() + self.expand.weight.numel()) * grid[0] * grid[1]


@register_attention("edit")
class EDiTAttention(Attention):
    """EDiT's linear compressed attention."""

    Config = Config
    config: Config
    paper = "EDiT, 2503.16726"
    complexity = "O(n d d_head)"

    def __init__(self, context: AttentionContext, config: Config) -> None:
        super().__init__(context, config)
        dim = self.dim
        self.fusion = ConvFusion(dim, config)
        self.query = xavier_linear(dim, dim, bias=config.qkv_bias)
        self.key_value = xavier_linear(dim, 2 * dim, bias=config.qkv_bias)
        # Keys and values in one call: the first dim channels are S_K, the others S_V.
        self.compress = DepthwiseDownsample(
            2 * dim, 3, config.stride, padding=1, bias=config.conv_bias
        )
        self.proj = xavier_linear(dim, dim, bias=True)

    @classmethod
    def default_num_heads(cls, dim: int) -> int:
        """Heads of 32, as Sana's; no source at hand states EDiT's."""
        return heads_of_width(dim, 32)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.forward``."""
        attend = naive_linear_attention if self.config.impl == "naive" else linear_attention
        out = attend(*self._query_key_value(x, grid), eps=self.config.eps)
        return self.proj(rearrange(out, "b h n d -> b n (h d)"))

    def _query_key_value(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of every token, keys and values of every window."""
        self.check_tokens(x, grid)
        query = F.relu(self.query(self.fusion(x, grid)))
        key, value = self.compress(self.key_value(x), grid).chunk(2, dim=-1)
        split = [
            rearrange(z, "b n (h d) -> b h n d", h=self.num_heads)
            for z in (query, F.relu(key), value)
        ]
        return split[0], split[1], split[2]

    def attention_map(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.attention_map``.

        A compressed key's weight is shared evenly by the tokens of its 3x3 window.
        """
        query, key, _ = self._query_key_value(x, grid)
        return self.compress.spread(naive_linear_map(query, key, self.config.eps), grid)

    def macs_parts(self, grid: tuple[int, int]) -> dict[str, int]:
        """See ``Attention.macs_parts``."""
        n, head_dim = grid[0] * grid[1], self.dim // self.num_heads
        height, width = self.compress.coarse_grid(grid)
        core = linear_attention_macs(n, height * width, head_dim, head_dim)
        return {
            "projections": 4 * self.dim**2 * n,
            "core": self.num_heads * core,
            "conv": self.fusion.macs(grid) + self.compress.macs(grid),
        }
