"""EDiT's ConvFusion (arXiv 2503.16726): tokens see their surroundings through convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.layers.downsample import rows_of
from attnzoo.layers.linear import rows_linear
from attnzoo.ops.depthwise_conv import to_image, to_tokens
from attnzoo.ops.dispatch import Impl, is_without_kernels
from attnzoo.ops.group_norm import group_norm
from attnzoo.ops.precision import in_float32
from attnzoo.ops.windows import from_windows

SLOPE = 0.01  # of the leaky ReLU below 0; PyTorch's


class ConvFusion(nn.Module):
    """X + C_2(LeakyReLU(GN(C_1(X)))): a bottleneck of convolutions around each token.

    C_1 is 3x3, C_2 1x1. Groups of the norm are as many as divide the bottleneck's channels, at
    most 32, with two channels or more each: one channel of one token has no variance.

    Args:
        dim: Channels.
        bottleneck: ``dim`` over the channels between the convolutions.
    """

    def __init__(self, dim: int, bottleneck: int) -> None:
        super().__init__()
        width = max(1, dim // bottleneck)
        most = max(1, min(32, width // 2))
        groups = max(g for g in range(1, most + 1) if width % g == 0)
        self.squeeze = nn.Conv2d(dim, width, 3, padding=1)
        self.norm = nn.GroupNorm(groups, width)
        self.expand = nn.Conv2d(width, dim, 1)

    def forward(self, x: Tensor, grid: tuple[int, int], impl: Impl = "auto") -> Tensor:
        """(b, h * w, dim) -> (b, h * w, dim)."""
        norm, squeeze, bias = self.norm, self.squeeze.weight, self.squeeze.bias
        assert bias is not None
        # The bias comes with the norm: after a convolution on a GPU it would be a pass of its own.
        hidden = to_tokens(F.conv2d(to_image(x, grid), _laid_out(squeeze, x, impl), padding=1))
        options = norm.num_groups, norm.weight, norm.bias, norm.eps, SLOPE
        hidden = group_norm(hidden, bias, *options, impl=impl)
        return x + self._expanded(hidden)

    def _expanded(self, hidden: Tensor) -> Tensor:
        return rows_linear(self.expand, hidden)

    @torch.no_grad()
    def lay_out(self) -> None:
        """Puts the channels of C_1's kernels side by side, as a GPU would in every call."""
        weight = self.squeeze.weight
        weight.data = weight.data.contiguous(memory_format=torch.channels_last)

    def squeezed(
        self, x: Tensor, grid: tuple[int, int], first: int, stop: int
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """C_1 of some rows of the grid, (b, m, width), and their part of all tokens' moments."""
        squeezed = rows_of(self.squeeze, x, grid, first, stop)
        return squeezed, tuple(z / x.shape[1] for z in _moments(squeezed, self.norm.num_groups))

    def expanded(self, x: Tensor, squeezed: Tensor, moments: tuple[Tensor, ...]) -> Tensor:
        """The rest, of any tokens and their C_1(X), with the sum of all rows' moments."""
        norm = self.norm
        hidden = _normed(squeezed, moments, norm.weight, norm.bias, norm.eps)
        hidden = F.leaky_relu(hidden, SLOPE, inplace=True)
        return x + self._expanded(hidden)

    def macs(self, grid: tuple[int, int]) -> int:
        """Multiply-accumulates of C_1 per sample; C_2 is a product of each token."""
        return self.squeeze.weight.numel() * grid[0] * grid[1]


def _laid_out(weight: Tensor, x: Tensor, impl: Impl) -> Tensor:
    """Kernels with channels side by side, once for all three products that cuDNN lays them for."""
    is_left = is_without_kernels(x) or torch.compiler.is_dynamo_compiling()
    if is_left or type(weight) not in (Tensor, nn.Parameter):  # it may keep its numbers elsewhere
        return weight
    if weight.is_contiguous(memory_format=torch.channels_last):
        return weight
    size = weight.shape[2], weight.shape[3]
    return to_image(from_windows(weight.flatten(1).unsqueeze(1), size, size, impl=impl), size)


@in_float32
def _moments(x: Tensor, groups: int) -> tuple[Tensor, ...]:
    """Sums over tokens of each group's mean and mean square, both (b, groups), in float64."""
    mean = x.mean(1, keepdim=True)
    # Squares of what is left of the mean, so that the variance is no difference of large numbers.
    rest = (x - mean).square_().mean(1, keepdim=True)
    mean, rest = mean.double(), rest.double()
    return tuple(
        z.unflatten(-1, (groups, -1)).mean((1, 3)) * x.shape[1] for z in (mean, rest + mean**2)
    )


@in_float32
def _normed(
    x: Tensor, moments: tuple[Tensor, ...], weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """GroupNorm of tokens, (b, n, c), by the mean and mean square of all, (b, groups) each."""
    mean, square = moments
    deviation = (square - mean.square()).clamp_min(0).add(eps).sqrt()
    channels = weight.shape[0] // mean.shape[1]
    mean, deviation = (z.repeat_interleave(channels, -1) for z in (mean, deviation))
    scale, shift = weight / deviation, bias - weight * mean / deviation
    return torch.addcmul(shift.unsqueeze(1).to(x.dtype), x, scale.unsqueeze(1).to(x.dtype))
