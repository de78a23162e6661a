"""Depthwise convolution of tokens on their grid, plain or re-parameterised (ACNet, 1908.03930)."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.ops.depthwise_conv import depthwise_conv, to_image, to_tokens, widened
from attnzoo.ops.dispatch import choose

ConvKind = Literal["acnet", "acnet-plain", "3x3", "5x5", "none"]


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    """norm(x); one value of a channel has no variance and takes the running statistics."""
    if isinstance(norm, nn.BatchNorm2d) and norm.training and x.numel() == x.shape[1]:
        mean, variance = norm.running_mean, norm.running_var
        return F.batch_norm(x, mean, variance, norm.weight, norm.bias, eps=norm.eps)
    return norm(x)


def _convolve(x: Tensor, grid: tuple[int, int], branch: nn.Conv2d, norm: nn.Module) -> Tensor:
    """norm(branch(x)). What a batch norm in training keeps is convolved again in the backward.

    Three branches would keep three tensors of the image's size, and a depthwise convolution is
    cheap.
    """
    out = to_image(depthwise_conv(x, grid, branch.weight, branch.bias), grid)
    is_kept = isinstance(norm, nn.BatchNorm2d) and torch.is_grad_enabled()
    if not is_kept or torch.compiler.is_compiling():
        return _normed(norm, out)
    dtype, storage = out.dtype, out.untyped_storage()._cdata

    def drop(kept: Tensor) -> Tensor | None:
        return None if kept.untyped_storage()._cdata == storage else kept

    def restore(kept: Tensor | None) -> Tensor:
        if kept is not None:
            return kept
        bias = None if branch.bias is None else branch.bias.to(dtype)
        with torch.no_grad():
            out = depthwise_conv(x.to(dtype), grid, branch.weight.to(dtype), bias)
            return to_image(out, grid)

    with torch.autograd.graph.saved_tensors_hooks(drop, restore):
        return _normed(norm, out)


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

    def forward(self, x: Tensor, grid: tuple[int, int], added: Tensor | None = None) -> Tensor:
        """Convolves tokens on their grid.

        Args:
            x: (b, h * w, dim).
            grid: (h, w).
            added: (b, h * w, dim), to which the result is added, or None.

        Returns:
            (b, h * w, dim).
        """
        if len(self.branches) == 1:
            [branch] = self.branches
            return depthwise_conv(x, grid, branch.weight, branch.bias, added)
        if choose("depthwise_conv", "auto", x) != "triton":
            x = x.contiguous()  # once for all branches
        parts = zip(self.branches, self.norms, strict=True)
        first, *others = (_convolve(x, grid, branch, norm) for branch, norm in parts)
        out = to_tokens(sum(others, first))
        return out if added is None else added + out.to(added.dtype)

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
            weight = weight + widened(kernel, max(self.branches[0].kernel_size))
            bias = bias + (0.0 if offset is None else offset)
        size = weight.shape[-1]
        fused = nn.Conv2d(self.dim, self.dim, size, padding=size // 2, groups=self.dim)
        fused = fused.to(weight)
        fused.weight.copy_(weight)
        assert fused.bias is not None
        fused.bias.copy_(torch.as_tensor(bias).expand(self.dim))
        self.branches, self.norms = nn.ModuleList([fused]), nn.ModuleList([nn.Identity()])
