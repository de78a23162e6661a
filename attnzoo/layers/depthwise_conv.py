"""Depthwise convolution of tokens on their grid, plain or re-parameterised (ACNet, 1908.03930)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ConvKind = Literal["acnet", "acnet-plain", "3x3", "5x5", "none"]


def to_image(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens (b, h * w, c) as a channels-last image (b, c, h, w), without a copy."""
    # On CPU a depthwise convolution of this view is an order of magnitude faster than of a
    # contiguous (b, c, h, w) copy.
    return x.unflatten(1, grid).permute(0, 3, 1, 2)


def to_tokens(image: Tensor) -> Tensor:
    """Inverse of ``to_image``: (b, c, h, w) -> (b, h * w, c)."""
    return image.permute(0, 2, 3, 1).flatten(1, 2)


class DepthwiseConv(nn.Module):
    """Depthwise convolution with zero padding that keeps the grid.

    Args:
        dim: Channels.
        kind: "acnet" sums a 3x3, a 3x1 and a 1x3 branch, each with its own batch norm, and folds
            them into one 3x3 kernel by ``fuse``; "acnet-plain" is the same without batch norm;
            "3x3" and "5x5" are one kernel with bias.
    """

    def __init__(self, dim: int, kind: ConvKind) -> None:
        super().__init__()
        self.dim = dim
        self.kind = kind
        sizes = {"3x3": [(3, 3)], "5x5": [(5, 5)]}.get(kind, [(3, 3), (3, 1), (1, 3)])
        is_single = kind in ("3x3", "5x5")
        self.branches = nn.ModuleList(
            nn.Conv2d(
                dim, dim, size, padding=(size[0] // 2, size[1] // 2), groups=dim, bias=is_single
            )
            for size in sizes
        )
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(dim) if kind == "acnet" else nn.Identity() for _ in sizes
        )

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(b, h * w, dim) -> (b, h * w, dim)."""
        image = to_image(x, grid)
        out = self.norms[0](self.branches[0](image))
        for norm, branch in zip(self.norms[1:], self.branches[1:], strict=True):
            out = out + norm(branch(image))
        return to_tokens(out)

    def macs(self, grid: tuple[int, int]) -> int:
        """Multiply-accumulates per sample, of the branches as they stand."""
        taps = sum(branch.weight[0].numel() for branch in self.branches)
        return taps * self.dim * grid[0] * grid[1]

    @torch.no_grad()
    def fuse(self) -> None:
        """Folds all branches into one kernel with bias; the eval-mode output stays the same."""
        weight: Tensor | float = 0.0
        bias: Tensor | float = 0.0
        for norm, branch in zip(self.norms, self.branches, strict=True):
            kernel, offset = branch.weight, branch.bias
            if isinstance(norm, nn.BatchNorm2d):
                scale = norm.weight / (norm.running_var + norm.eps).sqrt()
                kernel = kernel * scale[:, None, None, None]
                offset = norm.bias - norm.running_mean * scale
            side, edge = (max(self.branches[0].kernel_size) - size for size in kernel.shape[2:])
            weight = weight + F.pad(kernel, (edge // 2, edge // 2, side // 2, side // 2))
            bias = bias + (0.0 if offset is None else offset)
        size = weight.shape[-1]
        fused = nn.Conv2d(self.dim, self.dim, size, padding=size // 2, groups=self.dim)
        fused = fused.to(weight)
        fused.weight.copy_(weight)
        fused.bias.copy_(torch.as_tensor(bias).expand(self.dim))
        self.branches, self.norms = nn.ModuleList([fused]), nn.ModuleList([nn.Identity()])
