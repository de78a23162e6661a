"""Depthwise convolution of tokens on their grid, plain or re-parameterised (ACNet, 1908.03930)."""

from __future__ import annotations

from typing import Any, Literal

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


def _convolve(image: Tensor, branch: nn.Conv2d, norm: nn.Module) -> Tensor:
    """norm(branch(image)). What a batch norm in training keeps is convolved again in the backward.

    Three branches would keep three tensors of the image's size, and a depthwise convolution is
    cheap.
    """
    out = branch(image)
    is_kept = isinstance(norm, nn.BatchNorm2d) and torch.is_grad_enabled()
    if not is_kept or torch.compiler.is_compiling():
        return norm(out)
    dtype, storage = out.dtype, out.untyped_storage()._cdata

    def drop(kept: Tensor) -> Tensor | None:
        return None if kept.untyped_storage()._cdata == storage else kept

    def restore(kept: Tensor | None) -> Tensor:
        if kept is not None:
            return kept
        with torch.no_grad():
            return F.conv2d(
                image.to(dtype), branch.weight.to(dtype),
                None if branch.bias is None else branch.bias.to(dtype),
                padding=branch.padding, groups=branch.groups,
            )  # fmt: skip

    with torch.autograd.graph.saved_tensors_hooks(drop, restore):
        return norm(out)


class DepthwiseConv(nn.Module):
    """Depthwise convolution with zero padding that keeps the grid.

    Args:
        dim: Channels.
        kind: "acnet" sums a 3x3, a 3x1 and a 1x3 branch, each with its own batch norm, and folds
            them into one 3x3 kernel by ``fuse``; "acnet-plain" is the same without batch norm;
            "3x3" and "5x5" are one kernel with bias.
    """

    branches: Any
    norms: Any

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
        image = to_image(x.contiguous(), grid)
        parts = zip(self.branches, self.norms, strict=True)
        first, *others = (_convolve(image, branch, norm) for branch, norm in parts)
        return to_tokens(sum(others, first))

    @property
    def reach(self) -> int:
        """Rows up and down that an output depends on."""
        return self.branches[0].kernel_size[0] // 2

    def macs(self, grid: tuple[int, int]) -> int:
        """Multiply-accumulates per sample, of the branches as they stand."""
        taps = sum(branch.weight[0].numel() for branch in self.branches)
        return taps * self.dim * grid[0] * grid[1]

    @torch.no_grad()
    def fuse(self) -> None:
        """Folds all branches into one kernel with bias; the eval-mode output stays the same."""
        weight: Any = 0.0
        bias: Any = 0.0
        for norm, branch in zip(self.norms, self.branches, strict=True):
            kernel, offset = branch.weight, branch.bias
            if isinstance(norm, nn.BatchNorm2d):
                mean, variance = norm.running_mean, norm.running_var
                assert mean is not None and variance is not None
                scale = norm.weight / (variance + norm.eps).sqrt()
                kernel = kernel * scale[:, None, None, None]
                offset = norm.bias - mean * scale
            side, edge = (max(self.branches[0].kernel_size) - size for size in kernel.shape[2:])
            weight = weight + F.pad(kernel, (edge // 2, edge // 2, side // 2, side // 2))
            bias = bias + (0.0 if offset is None else offset)
        size = weight.shape[-1]
        fused = nn.Conv2d(self.dim, self.dim, size, padding=size // 2, groups=self.dim)
        fused = fused.to(weight)
        fused.weight.copy_(weight)
        assert fused.bias is not None
        fused.bias.copy_(torch.as_tensor(bias).expand(self.dim))
        self.branches, self.norms = nn.ModuleList([fused]), nn.ModuleList([nn.Identity()])
