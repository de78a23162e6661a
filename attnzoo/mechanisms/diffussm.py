"""DiffuSSM (arXiv 2311.18257): a bidirectional state space between dense layers on fewer tokens.

U = SiLU(W_0 x), Y = RMSNorm([scan(U), reverse(scan'(reverse(U)))]), and
out = W_3 (SiLU(W_2 Y) * SiLU(W_1 x)), where each W is an hourglass over the sequence: it acts on
the means of groups of M tokens, and what tokens differ by from their group's mean passes by it.
Cost per sample: 5 d^2 n / M + d^2 n / 4 + 128 d n. After the paper; there is no official code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attnzoo.contract import Attention, AttentionContext
from attnzoo.layers.linear import xavier_linear
from attnzoo.layers.state_space import SelectiveScan, _beside, rms_norm, sum_of
from attnzoo.layers.streaming import StreamConfig
from attnzoo.ops.dispatch import linear
from attnzoo.ops.hourglass import group_means, hourglass
from attnzoo.registry import register_attention


@dataclass(frozen=True, kw_only=True)
class Config(StreamConfig):
    """Options of DiffuSSM."""

    reduction: int = 2  # M, tokens of a group; 1 is no hourglass
    impl: Literal["auto", "reference", "torch", "triton", "mamba"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "reduction")


@register_attention("diffussm")
class DiffuSSMAttention(Attention):
    """State space in two directions, with an hourglass over the sequence."""

    Config = Config
    config: Config
    paper = "DiffuSSM, 2311.18257"
    complexity = "O(n d)"
    plot_style = ("#C5B0D5", "*")
    tensors_crossed = 14.0  # two scans of x, steps and results; gate, concatenation
    scans: Any

    def __init__(self, context: AttentionContext, config: Config) -> None:
        super().__init__(context, config)
        dim = self.dim
        self.before = xavier_linear(dim, dim, bias=True)
        self.gate = xavier_linear(dim, dim, bias=True)
        # Ours, from Mamba-2: a scan grows with the third power of its tokens.
        self.norm_weight = nn.Parameter(torch.ones(2 * dim))
        self.after = xavier_linear(2 * dim, dim, bias=True)
        self.proj = xavier_linear(dim, dim, bias=True)
        rank = math.ceil(dim / 16)
        self.scans = nn.ModuleList(SelectiveScan(dim, rank, has_conv=False) for _ in range(2))

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.forward``."""
        self.check_tokens(x, grid)
        if (block := self.config.block(self.training)) is not None:
            return self._stream(x, block)
        impl, forth, back = self.config.impl, *self.scans
        means = self._means(x)
        u = self._hourglass(self.before, x, means, True)
        return self._finish(x, means, forth(u, impl), back(u, impl, reverse=True))

    def _finish(self, x: Tensor, means: Tensor, forth: Tensor, back: Tensor) -> Tensor:
        y = rms_norm(torch.cat([forth, back], dim=-1), self.norm_weight).to(x.dtype)
        mixed = self._hourglass(self.after, y, self._means(y), True)
        mixed = self._hourglass(self.gate, x, means, True, mixed)
        return self._hourglass(self.proj, mixed, self._means(mixed))

    def _means(self, x: Tensor) -> Tensor:
        impl = _beside(self.config.impl, "group_means")
        return (
            x if self.config.reduction == 1 else group_means(x, self.config.reduction, impl=impl)
        )

    def _hourglass(self, dense: nn.Module, x: Tensor, means: Tensor, *options: Any) -> Tensor:
        """(b, n, d or 2 d) -> (b, n, d): ``dense`` of each group's mean, and the deviations."""
        impl = _beside(self.config.impl, "hourglass")
        rows = linear(dense, means)
        return hourglass(x, means, rows, self.config.reduction, *options, impl=impl)

    @torch.no_grad()
    def _stream(self, x: Tensor, block: int) -> Tensor:
        """``forward`` block by block, of whole groups: back, then forth, which finishes."""
        size, (forth, back) = self.config.reduction, self.scans
        step = max(1, block // size) * size
        blocks = [slice(start, start + step) for start in range(0, x.shape[1], step)]
        cached, carried = None, None
        for span in reversed(blocks):
            u = self._hourglass(self.before, x[:, span], self._means(x[:, span]), True)
            out, carried = back.advance(u.flip(1), carried)
            cached = out.new_empty(x.shape) if cached is None else cached
            cached[:, span] = out.flip(1)
        assert cached is not None
        carried, dtype = None, x.dtype
        for span in blocks:
            means = self._means(x[:, span])
            u = self._hourglass(self.before, x[:, span], means, True)
            out, carried = forth.advance(u, carried)
            cached[:, span] = out = self._finish(x[:, span], means, out, cached[:, span])
            dtype = out.dtype
        return cached.to(dtype)

    def macs_parts(self, grid: tuple[int, int]) -> dict[str, int]:
        """See ``Attention.macs_parts``; the core is counted as the recurrence does it."""
        n = grid[0] * grid[1]
        dense = (self.before, self.gate, self.after, self.proj)
        weights = sum(layer.weight.numel() for layer in dense)
        groups = -(-n // self.config.reduction)
        scans = [scan.macs_parts(n) for scan in self.scans]
        return sum_of({"projections": groups * weights}, *scans)
