"""Depthwise convolution with a stride, which leaves fewer tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.ops.depthwise_conv import to_image, to_tokens
from attnzoo.ops.dispatch import Impl
from attnzoo.ops.downsample import coarse_grid, downsample


class DepthwiseDownsample(nn.Module):
    """Turns h x w tokens into ceil(h / stride) x ceil(w / stride); any grid works.

    Without padding, windows that hang over the edge sum only the tokens that are there, and the
    sum is scaled up to a full window's, so that a mean stays a mean.

    Args:
        dim: Channels.
        kernel_size: Side of the window, at least ``stride``.
        stride: Distance between windows.
        padding: Zeros around the image: 0 with ``kernel_size == stride``, else
            ``kernel_size // 2`` of an odd ``kernel_size``.
    """

    def __init__(self, dim: int, kernel_size: int, stride: int, padding: int = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel_size, stride=stride, padding=padding, groups=dim)
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding

    def coarse_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of what comes out."""
        return coarse_grid(grid, self.stride)

    def forward(self, x: Tensor, grid: tuple[int, int], impl: Impl = "auto") -> Tensor:
        """(b, h * w, parts * dim) -> (b, ceil(h / stride) * ceil(w / stride), parts * dim).

        All parts share the kernels.
        """
        assert self.conv.bias is not None
        operands = x, grid, self.conv.weight, self.conv.bias, self.stride, self.padding
        return downsample(*operands, impl=impl)

    def spread(self, weights: Tensor, grid: tuple[int, int]) -> Tensor:
        """Shares what falls on a window evenly among its tokens: (..., m) -> (..., h * w)."""
        identity = torch.eye(grid[0] * grid[1], dtype=weights.dtype, device=weights.device)
        share = F.avg_pool2d(
            identity.unflatten(1, (1, *grid)), self.kernel_size, self.stride, self.padding,
            ceil_mode=not self.padding, count_include_pad=False,
        )  # fmt: skip
        return weights @ share.flatten(1).t()

    def macs(self, grid: tuple[int, int]) -> int:
        """Multiply-accumulates per sample."""
        height, width = self.coarse_grid(grid)
        return self.conv.weight.numel() * height * width


def rows_of(
    conv: nn.Conv2d,
    x: Tensor,
    grid: tuple[int, int],
    first: int,
    stop: int,
    before: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Rows ``first`` to ``stop`` of ``conv(before(x))``, of tokens on their grid: (b, m, c)."""
    (height, width), stride, reach = grid, conv.stride[0], conv.kernel_size[0] // 2
    top, bottom = first * stride - reach, (stop - 1) * stride + reach + 1
    near = x[:, max(0, top) * width : bottom * width]
    image = to_image(near if before is None else before(near), (near.shape[1] // width, width))
    if top < 0 or bottom > height:  # zeros around the image, not around a block inside it
        image = F.pad(image, (0, 0, max(0, -top), max(0, bottom - height)))
    out = F.conv2d(
        image, conv.weight, conv.bias, conv.stride, padding=(0, reach), groups=conv.groups
    )
    return to_tokens(out)
