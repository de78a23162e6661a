"""Multi-head linear attention over blocks of tokens (MHLA, arXiv 2601.07832).

The grid is cut into M blocks, each with a state S_c = phi(K_c)^T V_c, phi = ReLU + 1e-6; a learned
matrix W mixes them, so that every block of queries reads a state of its own:
O = phi(Q_b) sum_c W_bc S_c / (phi(Q_b) sum_c W_bc sum_j phi(K_cj)^T + eps) + DWC(V) per head.
Cost per sample: 4 d^2 n + 2 n d d_head + n d + M^2 d (d_head + 1) + 9 n d.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.contract import AttentionContext, heads_of_width
from attnzoo.errors import InvalidValue
from attnzoo.layers.depthwise_conv import DepthwiseConv
from attnzoo.layers.linear import xavier_linear
from attnzoo.layers.linear_attention import Features, LinearAttention, LinearConfig
from attnzoo.layers.streaming import State
from attnzoo.ops.block_core import (
    TokenBlocks,
    block_core,
    block_features,
    block_map,
    mixed,
    read_blocks,
    unserved_sizes,
)
from attnzoo.ops.dispatch import linear
from attnzoo.ops.linear_core import fold, key_sum, quotient, wide_read
from attnzoo.ops.routed_linear import Route
from attnzoo.registry import register_attention

Mixing = Literal["linear", "cosine", "exponential", "local"]


@dataclass(frozen=True, kw_only=True)
class Config(LinearConfig):
    """Options of MHLA."""

    # M, of any grid: MHLA's 16 at 256 px. Its code fixes 16 tokens a block, and M^2 grows as n^2.
    n_blocks: int = 16
    mixing: Mixing = "linear"  # where W starts, by the distance of blocks; MHLA's DiT
    # "official": the released code divides by other queries' similarities, see the page.
    normalizer: Literal["exact", "official"] = "exact"
    conv: Literal["3x3", "5x5", "none"] = "3x3"  # MHLA's DiT; its classifiers have 5x5
    eps: float = 1e-6  # MHLA

    def __post_init__(self) -> None:
        super().__post_init__()
        side = math.isqrt(max(self.n_blocks, 1))
        if self.n_blocks < 1 or side**2 != self.n_blocks:
            raise InvalidValue(
                f"n_blocks={self.n_blocks} must be a square number; choose {side**2} or "
                f"{(side + 1) ** 2}"
            )
        if self.stream is not None and self.normalizer == "official":
            raise InvalidValue(
                "normalizer='official' reads the queries of all blocks at once; set stream=None "
                "or normalizer='exact'"
            )


@register_attention("mhla")
class MHLAttention(LinearAttention):
    """Linear attention over blocks of tokens, whose states a learned matrix mixes."""

    Config = Config
    config: Config
    paper = "MHLA, 2601.07832"
    plot_style = ("#BCBD22", "8")
    core = "block_core"

    def __init__(self, context: AttentionContext, config: Config) -> None:
        super().__init__(context, config)
        self.qkv = xavier_linear(self.dim, 3 * self.dim, bias=True)  # DiT's
        self.mixing = nn.Parameter(start_of_mixing(math.isqrt(config.n_blocks), config.mixing))
        if config.conv != "none":
            self.conv = DepthwiseConv(self.dim, config.conv)
        self.proj = xavier_linear(self.dim, self.dim, bias=True)

    @classmethod
    def default_num_heads(cls, dim: int) -> int:
        """Heads of 64, as every DiT has them."""
        return heads_of_width(dim, 64)

    def query_kernel(self, query: Tensor) -> Tensor:
        """phi(Q)."""
        return block_features(query)

    def key_kernel(self, key: Tensor) -> Tensor:
        """phi(K)."""
        return block_features(key)

    def blocks(self, grid: tuple[int, int]) -> tuple[TokenBlocks, Tensor]:
        """The blocks that a grid has, and W of these.

        Raises:
            InvalidValue: The official normalizer pairs up tokens, and blocks are not of one size.
        """
        side = math.isqrt(self.config.n_blocks)
        if self.config.normalizer == "official" and (grid[0] % side or grid[1] % side):
            raise InvalidValue(
                f"normalizer='official' needs a grid with sides that {side} divides, got "
                f"{grid[0]}x{grid[1]}; set normalizer='exact', or n_blocks"
            )
        blocks = TokenBlocks.of(grid, side)
        rows, columns = blocks.rows, blocks.columns
        if blocks.count == self.config.n_blocks:
            return blocks, self.mixing
        corner = self.mixing.view(side, side, side, side)[:rows, :columns, :rows, :columns]
        # A copy, also where the corner lies in one piece: counters tell it from a parameter.
        return blocks, corner.clone().view(blocks.count, blocks.count)

    def unserved_option(self) -> str | None:
        """See ``LinearAttention.unserved_option``."""
        width = self.dim // self.num_heads
        if self.config.normalizer != "exact":
            return f"normalizer={self.config.normalizer!r}"
        if self.is_rotated or self.key_position is not None:
            return "positions"
        return unserved_sizes(width, self.config.n_blocks)

    def fused(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``LinearAttention.fused``."""
        kernel = None if self.conv is None else self.conv.kernel
        qkv = linear(self.qkv, x)
        out = self._core(qkv, *(kernel or (None, None)), grid, "triton")
        if self.conv is not None and kernel is None:
            out = self.conv(qkv.chunk(3, dim=-1)[2], grid, out, impl=self.config.impl)
        return self.finish(out, x)

    def attend(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Mapping[str, Route]]:
        """See ``LinearAttention.attend``; queries and keys are cut by one copy."""
        has_core = self.config.normalizer == "exact" and not self._is_altered
        has_core = has_core and not self.is_rotated and self.key_position is None
        if self.config.impl == "reference" or not has_core:
            return super().attend(x, grid)
        qkv = linear(self.qkv, x)
        out = self._core(qkv, None, None, grid, "torch")
        if self.conv is not None:
            out = self.conv(qkv.chunk(3, dim=-1)[2], grid, out, impl=self.config.impl)
        return self.finish(out, x), {}

    def _core(
        self,
        qkv: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        grid: tuple[int, int],
        impl: Literal["torch", "triton"],
    ) -> Tensor:
        blocks, mixing = self.blocks(grid)
        options = self.num_heads, blocks, self.config.eps
        return block_core(qkv, mixing, weight, bias, *options, impl=impl)

    def fold(
        self,
        keys: Features,
        value: Tensor,
        grid: tuple[int, int],
        span: slice = slice(None),
        queries: int | None = None,
    ) -> State:
        """See ``LinearAttention.fold``: every block's state, of those in another part zero."""
        blocks, _ = self.blocks(grid)
        here = blocks.blocks_of(span)
        key, values = blocks.cut(keys.terms[0], span), blocks.cut(self._by_head(value), span)
        pad = (0, 0, 0, 0, here.start, blocks.count - here.stop)
        return [(F.pad(z, pad),) for z in (fold(key, values, None)[0], key_sum(key)[0])]

    def attended(
        self, queries: Features, state: State, grid: tuple[int, int], span: slice = slice(None)
    ) -> Tensor:
        """See ``LinearAttention.attended``."""
        blocks, _ = self.blocks(grid)
        query = blocks.cut(queries.terms[0], span)
        return blocks.join(self._read_blocks(query, state, grid, span).to(query.dtype), span)

    def _read_blocks(
        self, query: Tensor, state: State, grid: tuple[int, int], span: slice
    ) -> Tensor:
        """What the blocks of a part read, in float32 or better: (b, h, blocks, tokens, d)."""
        blocks, weight = self.blocks(grid)
        (products,), (sums,) = state
        here = blocks.blocks_of(span)
        if self.config.normalizer == "exact":
            return read_blocks(query, products, sums, weight[here], self.config.eps)
        norm = mixed(wide_read(query, (sums,)), weight) + self.config.eps
        return quotient(wide_read(query, (mixed(products, weight),)), norm)

    def weights(self, queries: Features, keys: Features, grid: tuple[int, int]) -> Tensor:
        """See ``LinearAttention.weights``."""
        blocks, weight = self.blocks(grid)
        block, place = blocks.places(weight.device)
        own = None if self.config.normalizer == "exact" else place
        return block_map(queries.terms[0], keys.terms[0], weight, block, own, self.config.eps)

    def macs_parts(self, grid: tuple[int, int]) -> dict[str, int]:
        """See ``Attention.macs_parts``; tokens that fill up the last blocks count."""
        blocks, parts = self.blocks(grid)[0], super().macs_parts(grid)
        head_dim, n = self.dim // self.num_heads, blocks.count * blocks.height * blocks.width
        is_exact = self.config.normalizer == "exact"
        normalizers = self.dim if is_exact else n // blocks.count * self.num_heads
        mixing = blocks.count**2 * (self.dim * head_dim + normalizers)
        parts["core"] = n * self.dim * (2 * head_dim + 1)
        # Products with a parameter; of a small grid, with a copy of its corner.
        parts["projections" if blocks.count == self.config.n_blocks else "core"] += mixing
        return parts


def start_of_mixing(side: int, kind: Mixing) -> Tensor:
    """W of side * side blocks by their distance; each column, of one block's keys, sums to 1."""
    places = torch.arange(side, dtype=torch.float32)
    centers = torch.stack(torch.meshgrid(places, places, indexing="ij"), -1).flatten(0, 1)
    distance = (centers[:, None] - centers).norm(dim=-1)
    relative = distance / max(1.0, math.hypot(side - 1, side - 1))
    start = {
        "linear": 1 - relative,
        "cosine": (math.pi / 4 * relative).cos(),
        "exponential": (-distance / 3).exp(),
        "local": (distance <= 1.5).float(),
    }[kind]
    return (start / start.sum(0, keepdim=True)).to(torch.get_default_dtype())
