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
from attnzoo.layers.linear_attention import (
    Features,
    LinearAttention,
    LinearConfig,
    linear,
)
from attnzoo.layers.streaming import State
from attnzoo.layers.token_blocks import TokenBlocks
from attnzoo.ops.linear_core import fold, key_sum, quotient, wide_read
from attnzoo.ops.precision import in_float32, in_wide_range
from attnzoo.ops.routed_linear import Route
from attnzoo.registry import register_attention

RELU_OFFSET = 1e-6  # MHLA
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
        return F.relu(in_wide_range(query)) + RELU_OFFSET

    def key_kernel(self, key: Tensor) -> Tensor:
        """phi(K)."""
        return F.relu(in_wide_range(key)) + RELU_OFFSET

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

    def attend(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Mapping[str, Route]]:
        """See ``LinearAttention.attend``; queries and keys are cut by one copy."""
        blocks, _ = self.blocks(grid)
        # What fills up a block is to be zero after the kernels, not before.
        if self.config.impl == "reference" or not blocks.is_whole:
            return super().attend(x, grid)
        both, value = linear(self.qkv, x).split([2 * self.dim, self.dim], dim=-1)
        by_head = both.unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = self.query_kernel(blocks.cut(by_head, slice(None)))  # that of keys, too
        values = blocks.cut(self._by_head(value), slice(None))
        state: State = [fold(key, values, None), key_sum(key)]
        out = self._read_blocks(query, state, grid, slice(None)).to(value.dtype)
        out = blocks.join(out, slice(None)).transpose(1, 2).flatten(2)
        if self.conv is not None:
            out = self.conv(value, grid, out, impl=self.config.impl)
        return self.finish(out, x), {}

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
        read = wide_read(query, (mixed(products, weight[here]),))
        if self.config.normalizer == "exact":
            norm = wide_read(query, (mixed(sums, weight[here]),))
        else:
            norm = mixed(wide_read(query, (sums,)), weight)
        return quotient(read, norm + self.config.eps)

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
    return start / start.sum(0, keepdim=True)


@in_float32
def mixed(state: Tensor, weight: Tensor) -> Tensor:
    """sum_c W_bc of every block's (d, e): (b, h, c, d, e) and (b', c) -> (b, h, b', d, e)."""
    weights = weight.expand(*state.shape[:2], -1, -1)  # fvcore counts no other broadcast
    return (weights @ state.flatten(3)).unflatten(3, state.shape[3:])


@in_float32
def block_map(
    query: Tensor, key: Tensor, mixing: Tensor, block: Tensor, place: Tensor | None, eps: float
) -> Tensor:
    """The n x n map, of every token's block and, for the official normalizer, place in it."""
    similarity = torch.einsum("bhnd,bhmd->bhnm", query, key)
    weight = mixing[block][:, block]
    terms = similarity * weight
    if place is None:
        return terms / (terms.sum(-1, keepdim=True) + eps)
    own = (similarity * (block[:, None] == block)).sum(-1)
    norm = torch.einsum("nm,bhm->bhn", weight * (place[:, None] == place), own)
    return terms / (norm.unsqueeze(-1) + eps)
