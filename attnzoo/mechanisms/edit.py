"""Linear compressed attention (EDiT, arXiv 2503.16726), after secondary sources.

Queries see their surroundings through convolutions, Q = ReLU(W_Q (X + C_2(LeakyReLU(GN(C_1(X)))))
with a 3x3 C_1 and a 1x1 C_2 ("ConvFusion"); a depthwise 3x3 convolution with stride 2 leaves a
quarter of the keys and values, K = ReLU(S_K(W_K X)), V = S_V(W_V X) ("spatial compressor").
O = Q (K^T V) / (Q sum_j K_j^T) per head. Cost per sample, c = bottleneck: (4 + 10 / c) d^2 n
+ 4.5 n d + 1.25 n d d_head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from attnzoo.contract import AttentionContext, heads_of_width, removed_in
from attnzoo.layers.conv_fusion import ConvFusion
from attnzoo.layers.downsample import DepthwiseDownsample, rows_of
from attnzoo.layers.linear import linear_beside, xavier_linear
from attnzoo.layers.linear_attention import LinearAttention, LinearConfig
from attnzoo.layers.streaming import State
from attnzoo.ops.dispatch import linear
from attnzoo.ops.linear_core import linear_attention_macs
from attnzoo.registry import register_attention


@dataclass(frozen=True, kw_only=True)
class Config(LinearConfig):
    """Options of EDiT's attention; what no source at hand states is marked "unstated"."""

    bottleneck: int = 2  # c; unstated, but 2 reproduces the printed operation counts
    stride: Literal[1, 2, 3] = 2  # EDiT
    eps: float = 1e-8  # unstated; Sana's

    removed = removed_in("0.2.0", conv_bias=True, groups=None, negative_slope=0.01, qkv_bias=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "bottleneck")


@register_attention("edit")
class EDiTAttention(LinearAttention):
    """Linear attention with convolved queries, and compressed keys and values."""

    Config = Config
    paper = "EDiT, 2503.16726"
    activation = "relu"
    plot_style = ("#999933", "p")

    def __init__(self, context: AttentionContext, config: Config) -> None:
        super().__init__(context, config)
        dim = self.dim
        self.fusion = ConvFusion(dim, config.bottleneck)
        # Biases are unstated; PixArt-Sigma, which EDiT is distilled from, has them.
        self.query = xavier_linear(dim, dim, bias=True)
        self.key_value = xavier_linear(dim, 2 * dim, bias=True)
        # Keys and values in one call: the first dim channels are S_K, the others S_V.
        self.compress = DepthwiseDownsample(2 * dim, 3, config.stride, padding=1)
        self.proj = xavier_linear(dim, dim, bias=True)

    @classmethod
    def default_num_heads(cls, dim: int) -> int:
        """Heads of 32, as Sana's; no source at hand states EDiT's."""
        return heads_of_width(dim, 32)

    def project(self, x: Tensor, grid: tuple[int, int]) -> Sequence[Tensor]:
        """Q of every token, K and V of every window."""
        both, x = linear_beside(self.key_value, x)
        both = self.compress(both, grid, self.config.impl)
        query = linear(self.query, self.fusion(x, grid, self.config.impl))
        return query, *both.chunk(2, dim=-1)

    def query_kernel(self, query: Tensor) -> Tensor:
        """Q, of which the base takes the ReLU."""
        return query

    def key_kernel(self, key: Tensor) -> Tensor:
        """K, of which the base takes the ReLU."""
        return key

    @property
    def rows_together(self) -> int:
        """Rows of a window."""
        return self.config.stride

    def encode(self, x: Tensor, grid: tuple[int, int], span: slice) -> tuple[Tensor | None, State]:
        """See ``LinearAttention.encode``: C_1(X), and moments for the group norm of its sum."""
        stride, first, stop = self.config.stride, span.start // grid[1], span.stop // grid[1]
        squeezed, moments = self.fusion.squeezed(x, grid, first, stop)
        coarse = first // stride, -(-stop // stride)
        windows = rows_of(self.compress.conv, x, grid, *coarse, before=self.key_value)
        key, value = windows.chunk(2, dim=-1)
        return squeezed, [*self.fold(self.keys(key, x, grid), value, grid), moments]

    def decode(
        self, x: Tensor, grid: tuple[int, int], span: slice, cached: Tensor | None, state: State
    ) -> Tensor:
        """See ``LinearAttention.decode``."""
        assert cached is not None
        *state, moments = state
        squeezed = cached[:, span, : self.fusion.squeeze.out_channels]
        query = linear(self.query, self.fusion.expanded(x[:, span], squeezed, moments))
        queries = self.queries(query, x, grid, span)
        return linear(self.proj, self.read(queries, state, x, grid, span))

    def attention_map(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.attention_map``.

        A compressed key's weight is shared evenly by the tokens of its 3x3 window.
        """
        return self.compress.spread(super().attention_map(x, grid), grid)

    def fuse(self) -> dict[str, Any]:
        """See ``Attention.fuse``: kernels come to lie as their convolution reads them."""
        self.fusion.lay_out()
        return super().fuse()

    def macs_parts(self, grid: tuple[int, int]) -> dict[str, int]:
        """See ``Attention.macs_parts``."""
        n, head_dim = grid[0] * grid[1], self.dim // self.num_heads
        height, width = self.compress.coarse_grid(grid)
        core = linear_attention_macs(n, height * width, head_dim, head_dim)
        return super().macs_parts(grid) | {
            "projections": (4 * self.dim**2 + self.fusion.expand.weight.numel()) * n,
            "core": self.num_heads * core,
            "conv": self.fusion.macs(grid) + self.compress.macs(grid),
        }
