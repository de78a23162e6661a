"""Softmax attention over learned landmarks (Linformer, arXiv 2006.04768).

O = softmax(Q (E K)^T / sqrt(d_head)) (F V) per head, where the r rows of E and of F weigh all
tokens, and all heads share them. Each row is a map on the grid, and is resized for other grids
with its sum kept. Cost per sample: 4 d^2 n + 4 r n d; resizing is next to nothing.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from attnzoo.contract import Attention, AttentionConfig, AttentionContext, heads_of_width
from attnzoo.errors import InvalidValue
from attnzoo.layers.linear import xavier_linear
from attnzoo.ops.dispatch import is_seen_through, linear
from attnzoo.ops.few_keys import attend_tokens, by_head
from attnzoo.ops.precision import in_float32
from attnzoo.ops.softmax import SoftmaxImpl, softmax_macs
from attnzoo.ops.softmax.reference import softmax_map
from attnzoo.registry import register_attention


@dataclass(frozen=True, kw_only=True)
class Config(AttentionConfig):
    """Options of Linformer's attention."""

    landmarks: int = 64  # r; a quarter of 256 tokens, as the paper's 256 of 1024
    map_grid: tuple[int, ...] = (16, 16)  # of E and F: 256 px at patch 2 of a latent
    shares_maps: bool = False  # E = F, the paper's key-value sharing
    impl: SoftmaxImpl = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "landmarks")
        if len(self.map_grid) != 2 or min(self.map_grid) < 1:
            raise InvalidValue(f"map_grid must be (height, width), got {self.map_grid}")


@register_attention("linformer")
class LinformerAttention(Attention):
    """Softmax attention over learned weighted sums of all keys and values."""

    Config = Config
    config: Config
    paper = "Linformer, 2006.04768"
    complexity = "O(n landmarks d)"
    plot_style = ("#661100", ">")

    def __init__(self, context: AttentionContext, config: Config) -> None:
        super().__init__(context, config)
        self.qkv = xavier_linear(self.dim, 3 * self.dim, bias=False)
        shape, bound = (config.landmarks, *config.map_grid), config.landmarks**-0.5
        self.key_maps = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        if not config.shares_maps:
            self.value_maps = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.proj = xavier_linear(self.dim, self.dim, bias=True)

    @classmethod
    def default_num_heads(cls, dim: int) -> int:
        """Heads of 64, as every DiT has them."""
        return heads_of_width(dim, 64)

    def maps(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """E and F for a grid: (landmarks, height * width)."""
        is_one = self.config.shares_maps
        each = (self.key_maps,) if is_one else (self.key_maps, self.value_maps)
        resized = _resized(torch.cat(each), (grid[0], grid[1])).chunk(len(each))
        return resized[0], resized[-1]

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.forward``."""
        self.check_tokens(x, grid)
        query, *sources = self.qkv(x).chunk(3, dim=-1)
        maps = self.maps(grid)
        if self.config.impl == "reference":
            query, key, value = (by_head(z, self.num_heads) for z in (query, *sources))
            out = _weights(query, key, *maps).to(value.dtype) @ value
            return linear(self.proj, rearrange(out, "b h n d -> b n (h d)"))
        # A product of any type with maps in its own type, as autocast would make them, for all
        # heads together: their tokens need no copy, and nor do the gradients.
        key, value = (
            of_tokens.to(z.dtype).expand(z.shape[0], -1, -1) @ z
            for of_tokens, z in zip(maps, sources, strict=True)
        )
        out = attend_tokens(query, key, value, self.num_heads, self.config.impl)
        return linear(self.proj, out)

    def attention_map(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.attention_map``; its rows have any sum."""
        self.check_tokens(x, grid)
        query, key, _ = (by_head(z, self.num_heads) for z in self.qkv(x).chunk(3, dim=-1))
        return _weights(query, key, *self.maps(grid))

    def macs_parts(self, grid: tuple[int, int]) -> dict[str, int]:
        """See ``Attention.macs_parts``."""
        n, landmarks = grid[0] * grid[1], self.config.landmarks
        compress = 2 * landmarks * n * self.dim
        maps, (rows, columns) = landmarks * (2 - self.config.shares_maps), self.config.map_grid
        resize = 0
        if tuple(grid) != self.config.map_grid:  # rows, then columns
            resize = maps * grid[0] * columns * (rows + grid[1])
        return {
            "projections": 4 * self.dim**2 * n,
            "core": resize + compress + softmax_macs(n, landmarks, self.dim, self.dim),
        }


@in_float32
def _weights(query: Tensor, key: Tensor, of_keys: Tensor, of_values: Tensor) -> Tensor:
    """The weight of each value in each output, (b, h, n, n)."""
    return softmax_map(query, of_keys @ key) @ of_values


@in_float32
def _resized(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Maps for another grid, by linear interpolation: (r, h0, w0) -> (r, h * w).

    What one of their tokens had is shared by those that take it over, so that each map keeps its
    sum: more tokens are not more weight. In products, as PyTorch's interpolation takes a GPU, and
    its gradient still more, longer than the rest of a layer.
    """
    if maps.shape[1:] != grid:
        # Of ranges: numbers, where a compiler has symbols, of which it makes no constant.
        grid = len(range(grid[0])), len(range(grid[1]))
        before = int(maps.shape[1]), int(maps.shape[2])
        numbers = _shares(before, grid, maps.dtype, maps.device)
        rows, columns = numbers.split([grid[0] * before[0], grid[1] * before[1]])
        rows = rows.view(grid[0], -1).expand(len(maps), -1, -1)
        maps = rows @ maps @ columns.view(grid[1], -1).t()
    return maps.flatten(1)


def _shares(
    before: tuple[int, int], after: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """How much of each old place of an axis the new ones take over, (after, before), both flat."""
    if is_seen_through():  # what stands in for numbers must not be cached
        return _made_shares.__wrapped__(before, after, dtype, device)
    return _made_shares(before, after, dtype, device)


# Else a compiler traces the making. In one tensor, as it knows one such constant a graph.
_shares._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=64)
def _made_shares(
    before: tuple[int, int], after: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    numbers = [x for sides in zip(before, after, strict=True) for x in _numbers(*sides)]
    with torch.inference_mode(False):  # or else no gradient could read them later
        return torch.tensor(numbers, dtype=dtype, device=device)


@functools.lru_cache(maxsize=64)
def _numbers(before: int, after: int) -> list[float]:
    with _disable_current_modes():  # a tracer has no numbers
        each = torch.eye(before, dtype=torch.float64, device="cpu")[None, None]  # (1, 1, new, old)
        resized = F.interpolate(each, (after, before), mode="bilinear", antialias=True)[0, 0]
        return (resized / resized.sum(0)).flatten().tolist()
