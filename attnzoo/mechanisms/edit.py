"""Linear compressed attention (EDiT, arXiv 2503.16726), after secondary sources.

Queries see their surroundings through convolutions, Q = ReLU(W_Q (X + C_2(LeakyReLU(GN(C_1(X)))))
with a 3x3 C_1 and a 1x1 C_2 ("ConvFusion"); a depthwise 3x3 convolution with stride 2 leaves a
quarter of the keys and values, K = ReLU(S_K(W_K X)), V = S_V(W_V X) ("spatial compressor").
O = Q (K^T V) / (Q sum_j K_j^T) per head. Cost per sample, c = bottleneck: (4 + 10 / c) d^2 n
+ 4.5 n d + 1.25 n d d_head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from attnzoo.contract import Attention, AttentionContext, heads_of_width
from attnzoo.errors import InvalidValue
from attnzoo.layers.downsample import DepthwiseDownsample
from attnzoo.layers.linear import xavier_linear
from attnzoo.ops.depthwise_conv import to_image, to_tokens
from attnzoo.ops.linear_core import (
    fold,
    key_sum,
    linear_attention,
    linear_attention_macs,
    normalized_read,
)
from attnzoo.ops.linear_core.reference import linear_attention as naive_linear_attention
from attnzoo.ops.linear_core.reference import linear_map as naive_linear_map
from attnzoo.ops.precision import in_float32
from attnzoo.ops.streaming import State, StreamConfig, first_pass, second_pass, spans_of
from attnzoo.registry import register_attention


@dataclass(frozen=True, kw_only=True)
class Config(StreamConfig):
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
        InvalidValue: ``groups`` does not divide the bottleneck's channels.
    """

    def __init__(self, dim: int, config: Config) -> None:
        super().__init__()
        width = max(1, dim // config.bottleneck)
        divisors = [g for g in range(1, width + 1) if width % g == 0]
        groups = config.groups
        if groups is None:
            groups = max(g for g in divisors if g <= max(1, min(32, width // 2)))
        if groups not in divisors:
            raise InvalidValue(
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

    def expanded(self, x: Tensor, squeezed: Tensor, moments: tuple[Tensor, ...]) -> Tensor:
        """The rest, of any tokens and their C_1(X), with the means of ``_moments`` over all."""
        norm = self.norm
        hidden = _normed(squeezed, moments, norm.weight, norm.bias, norm.eps)
        hidden = F.leaky_relu(hidden, self.negative_slope, inplace=True)
        return x + to_tokens(self.expand(to_image(hidden, (1, x.shape[1]))))

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
        if (block := self.config.block(self.training)) is not None:
            return self._stream(x, grid, block)
        attend = naive_linear_attention if self.config.impl == "naive" else linear_attention
        out = attend(*self._query_key_value(x, grid), eps=self.config.eps)
        return self.proj(rearrange(out, "b h n d -> b n (h d)"))

    def _stream(self, x: Tensor, grid: tuple[int, int], block: int) -> Tensor:
        self.check_tokens(x, grid)
        width, stride, fusion = grid[1], self.config.stride, self.fusion
        spans = spans_of(grid, block, stride)

        def encode(tokens: Tensor, span: slice) -> tuple[Tensor, State]:
            first, stop = span.start // width, span.stop // width
            squeezed = _rows(fusion.squeeze, x, grid, first, stop)
            coarse = (first // stride, -(-stop // stride))
            windows = _rows(self.compress.conv, x, grid, *coarse, before=self.key_value)
            key, value = map(self._heads, windows.chunk(2, dim=-1))
            key = F.relu(key)
            moments = tuple(z / x.shape[1] for z in _moments(squeezed, fusion.norm.num_groups))
            return squeezed, [fold(key, value, None), key_sum(key), moments]

        def decode(span: slice) -> Tensor:
            assert kept is not None
            squeezed = kept[:, span, : fusion.squeeze.out_channels]
            query = self.query(fusion.expanded(x[:, span], squeezed, moments))
            query = self._heads(F.relu(query))
            out = normalized_read(query, *state, eps=self.config.eps)
            return self.proj(rearrange(out, "b h n d -> b n (h d)"))

        kept, [*state, moments] = first_pass(x, spans, encode)
        return second_pass(kept, spans, decode)

    def _query_key_value(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of every token, keys and values of every window."""
        self.check_tokens(x, grid)
        query = F.relu(self.query(self.fusion(x, grid)))
        key, value = self.compress(self.key_value(x), grid).chunk(2, dim=-1)
        return self._heads(query), self._heads(F.relu(key)), self._heads(value)

    def _heads(self, z: Tensor) -> Tensor:
        return rearrange(z, "b n (h d) -> b h n d", h=self.num_heads)

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


def _rows(
    conv: nn.Conv2d,
    x: Tensor,
    grid: tuple[int, int],
    first: int,
    stop: int,
    before: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Rows ``first`` to ``stop`` of ``conv(before(x))``, of tokens on their grid: (b, m, c)."""
    (height, width), stride, reach = grid, conv.stride[0], conv.kernel_size[0] // 2
    top, bottom = first * stride - reach, (stop - 1) * stride + reach + 1
    near = x[:, max(0, top) * width : bottom * width]
    image = to_image(near if before is None else before(near), (near.shape[1] // width, width))
    if top < 0 or bottom > height:  # zeros around the image, not around a block inside it
        image = F.pad(image, (0, 0, max(0, -top), max(0, bottom - height)))
    out = F.conv2d(
        image, conv.weight, conv.bias, conv.stride, padding=(0, reach), groups=conv.groups
    )
    return to_tokens(out)


@in_float32
def _moments(x: Tensor, groups: int) -> tuple[Tensor, ...]:
    """Sums over tokens of each group's mean and mean square, both (b, groups), in float64."""
    mean = x.mean(1, keepdim=True)
    # Squares of what is left of the mean, so that the variance is no difference of large numbers.
    rest = (x - mean).square_().mean(1, keepdim=True)
    mean, rest = mean.double(), rest.double()
    return tuple(
        z.unflatten(-1, (groups, -1)).mean((1, 3)) * x.shape[1] for z in (mean, rest + mean**2)
    )


@in_float32
def _normed(
    x: Tensor, moments: tuple[Tensor, ...], weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """GroupNorm of tokens, (b, n, c), by the mean and mean square of all, (b, groups) each."""
    mean, square = moments
    deviation = (square - mean.square()).clamp_min(0).add(eps).sqrt()
    channels = weight.shape[0] // mean.shape[1]
    mean, deviation = (z.repeat_interleave(channels, -1) for z in (mean, deviation))
    scale, shift = weight / deviation, bias - weight * mean / deviation
    return torch.addcmul(shift.unsqueeze(1).to(x.dtype), x, scale.unsqueeze(1).to(x.dtype))
