"""Test-time training as attention: the inner loop of ViT3 (arXiv 2512.01643).

Keys and values train a small model, queries are read by it. Per head f(z) = (z W_1) * SiLU(z W_2)
takes one step on L = -sum_i f(k_i) v_i / (3 n), W <- W - eta g / (|g| + 1) by columns, and
o_i = f(q_i) with the new weights. A head more does likewise with a 3x3 depthwise convolution.
out = [o, o_conv] W_o. Cost per sample, e = d_head: (4 d^2 + 4 d e) n + 6 n d e + 18 n e.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from attnzoo.contract import Attention, AttentionContext, heads_of_width
from attnzoo.errors import InvalidValue
from attnzoo.layers.linear import linear_apart, xavier_linear
from attnzoo.layers.linear_attention import linear_parts
from attnzoo.layers.streaming import State, StreamConfig, first_pass, second_pass, spans_of
from attnzoo.ops.dispatch import choose_once, linear
from attnzoo.ops.inner_loop import inner_tokens, read_unit, stepped, unit_gradients, unserved
from attnzoo.registry import register_attention


@dataclass(frozen=True, kw_only=True)
class Config(StreamConfig):
    """Options of test-time training."""

    rate: float = 1.0  # eta; ViT3's best of 0.1 to 10
    conv: bool = True  # the head with the 3x3 depthwise convolution; ViT3
    impl: Literal["auto", "reference", "torch", "triton"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rate <= 0:
            raise InvalidValue(f"rate must be positive, got {self.rate}")


@register_attention("ttt")
class InnerLoop(Attention):
    """A small model that keys and values train by one step of descent, and queries are read by."""

    Config = Config
    config: Config
    paper = "ViT3, 2512.01643"
    complexity = "O(n d d_head)"
    plot_style = ("#FF7F0E", "h")

    def __init__(self, context: AttentionContext, config: Config) -> None:
        super().__init__(context, config)
        dim, self.head_dim = self.dim, self.dim // self.num_heads
        width = dim + (self.head_dim if config.conv else 0)
        # One product, as in ViT3's code: behind the heads' projections the convolution's.
        self.qkv = xavier_linear(dim, 3 * width, bias=True)
        for rows in self.qkv.weight.data.split([3 * dim, 3 * (width - dim)]):
            nn.init.xavier_uniform_(rows)
        self.first = nn.Parameter(torch.empty(self.num_heads, self.head_dim, self.head_dim))
        self.second = nn.Parameter(torch.empty_like(self.first))
        self.taps = nn.Parameter(torch.empty(self.head_dim, 1, 3, 3)) if config.conv else None
        for weight in (self.first, self.second, self.taps):
            if weight is not None:
                nn.init.trunc_normal_(weight, std=0.02)
        self.proj = xavier_linear(width, dim, bias=True)

    @classmethod
    def default_num_heads(cls, dim: int) -> int:
        """Heads of 64, as every DiT has them."""
        return heads_of_width(dim, 64)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.forward``."""
        self.check_tokens(x, grid)
        if not x.shape[0]:  # a convolution has no kernels of no images
            return x
        if (block := self.config.block(self.training)) is not None:
            return self._stream(x, grid, block)
        impl, bias = self.config.impl, None
        if impl == "auto":
            impl = choose_once(self, "inner_tokens", x, lambda: unserved(x, grid, self.first))
        if impl == "triton":  # whose kernels have the sum of the tokens' gradients
            tokens, bias = linear_apart(self.qkv, x)
        else:
            tokens = linear(self.qkv, x)
        weights = self.first, self.second, self.taps, self.config.rate, bias
        return linear(self.proj, inner_tokens(tokens, grid, *weights, impl=impl))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # As weights were before the convolution's rows came behind the heads'.
        for kind in ("weight", "bias"):
            whole, local = f"{prefix}qkv.{kind}", f"{prefix}local_qkv.{kind}"
            if whole in state_dict and local in state_dict:
                state_dict[whole] = torch.cat([state_dict[whole], state_dict.pop(local)])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _by_head(self, z: Tensor) -> Tensor:
        return rearrange(z, "b n (h d) -> b h n d", h=self.num_heads)

    def _parts(self, x: Tensor, which: slice) -> list[Tensor]:
        """Some of queries, keys and values, (b, n, d) each, and those of the convolution."""
        sizes = [self.dim] * 3 + [3 * self.head_dim] * self.config.conv
        return linear_parts(self.qkv, x, sizes, which)

    def _stream(self, x: Tensor, grid: tuple[int, int], block: int) -> Tensor:
        """As ``forward``; the gradients of blocks add up, and only then queries are made.

        The convolution, of one head, is computed at once.
        """
        rate, impl, local = self.config.rate, self.config.impl, None
        weights = self.first, self.second
        if self.config.conv:
            [tokens] = self._parts(x, slice(3, None))
            first, second = (w[:0] for w in weights)
            local = inner_tokens(tokens, grid, first, second, self.taps, rate, impl=impl)
        spans = spans_of(grid, block)

        def encode(span: slice) -> tuple[None, State]:
            key, value = (self._by_head(z) for z in self._parts(x[:, span], slice(1, 3)))
            return None, [unit_gradients(key, value, *weights, x.shape[1])]

        _, [gradients] = first_pass(x, spans, encode)
        first, second = (stepped(w, g, rate) for w, g in zip(weights, gradients, strict=True))

        def decode(span: slice) -> Tensor:
            [query] = self._parts(x[:, span], slice(1))
            own = None if local is None else local[:, span]
            return linear(self.proj, read_unit(self._by_head(query), first, second, own))

        return second_pass(None, spans, decode)

    def macs_parts(self, grid: tuple[int, int]) -> dict[str, int]:
        """See ``Attention.macs_parts``; k W_1 and k W_2 are products with parameters."""
        n, dim, head_dim = grid[0] * grid[1], self.dim, self.head_dim
        taps = 9 * head_dim * n if self.config.conv else 0
        local = 4 * head_dim * dim * n if self.config.conv else 0
        return {
            "projections": 4 * dim**2 * n + local + 2 * dim * head_dim * n,
            "core": 4 * dim * head_dim * n + taps,
            "conv": taps,
        }
