"""The strided depthwise convolution as a sum over the tokens of each window."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.depthwise_conv.torch import to_image


def downsample(
    x: Tensor, grid: tuple[int, int], weight: Tensor, bias: Tensor, stride: int, padding: int
) -> Tensor:
    """See ``attnzoo.ops.downsample``."""
    parts, size = x.shape[2] // len(weight), weight.shape[-1]
    # Of the full windows; tokens that are not there count 0 of 1.
    missing = [0 if padding else -side % stride for side in grid]
    edges = padding, padding + missing[1], padding, padding + missing[0]
    image, there = (
        F.pad(to_image(z, grid), edges).unfold(2, size, stride).unfold(3, size, stride)
        for z in (x, x.new_ones(1, x.shape[1], 1))
    )
    out = (image * weight.repeat(parts, 1, 1, 1).unsqueeze(2)).sum((-2, -1))
    if not padding:
        out = out / there.mean((-2, -1))
    return (out.flatten(2) + bias.repeat(parts)[:, None]).transpose(1, 2)
