"""Depthwise convolution of the values that a linear attention adds to its output (FLatten)."""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from attnzoo.layers.depthwise_conv import ConvKind, DepthwiseConv
from attnzoo.ops.depthwise_conv import to_image, to_tokens


class ValueConv(nn.Module):
    """``DepthwiseConv`` with one kernel per channel of a token, or of a head.

    Args:
        dim: Channels of a token.
        num_heads: Number of heads.
        kind: See ``DepthwiseConv``; not "none".
        scope: "head" shares dim / num_heads kernels among all heads, as FLatten does; "token"
            gives every channel its own.
    """

    def __init__(
        self, dim: int, num_heads: int, kind: ConvKind, scope: Literal["head", "token"]
    ) -> None:
        super().__init__()
        self.parts = num_heads if scope == "head" else 1
        self.conv = DepthwiseConv(dim // self.parts, kind)

    def forward(self, value: Tensor, grid: tuple[int, int]) -> Tensor:
        """(b, h * w, dim) -> (b, h * w, dim)."""
        if any(isinstance(norm, nn.BatchNorm2d) for norm in self.conv.norms):
            # The statistics are those of all heads.
            parts = rearrange(value, "b n (p c) -> (b p) n c", p=self.parts)
            return rearrange(self.conv(parts, grid), "(b p) n c -> b n (p c)", p=self.parts)
        # Repeating the kernels is several times cheaper than moving heads to the batch and back.
        image = to_image(value, grid)
        first, *others = (self._repeated(image, branch) for branch in self.conv.branches)
        return to_tokens(sum(others, first))

    def _repeated(self, image: Tensor, branch: Any) -> Tensor:
        weight = branch.weight.repeat(self.parts, 1, 1, 1)
        bias = None if branch.bias is None else branch.bias.repeat(self.parts)
        return F.conv2d(image, weight, bias, padding=branch.padding, groups=image.shape[1])

    def macs(self, grid: tuple[int, int]) -> int:
        """Multiply-accumulates per sample, of the branches as they stand."""
        return self.parts * self.conv.macs(grid)

    def fuse(self) -> ConvKind:
        """Folds all branches into one kernel; returns the kind that describes the result."""
        self.conv.fuse()
        return "5x5" if self.conv.kind == "5x5" else "3x3"
