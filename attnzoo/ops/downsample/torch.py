"""The strided depthwise convolution by PyTorch's."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.depthwise_conv.torch import to_image, to_tokens


def downsample(
    x: Tensor, grid: tuple[int, int], weight: Tensor, bias: Tensor, stride: int, padding: int
) -> Tensor:
    """See ``attnzoo.ops.downsample``."""
    image, parts = to_image(x, grid), x.shape[2] // len(weight)
    if parts > 1:
        weight, bias = weight.repeat(parts, 1, 1, 1), bias.repeat(parts)
    missing = [0 if padding else -side % stride for side in grid]
    if not any(missing):
        return to_tokens(F.conv2d(image, weight, bias, stride, padding, groups=len(weight)))
    image = F.pad(image, (0, missing[1], 0, missing[0]))
    out = F.conv2d(image, weight, stride=stride, groups=len(weight))
    for side, gap in zip((2, 3), missing, strict=True):
        scale = out.new_ones(out.shape[side])
        scale[-1] = stride / (stride - gap)
        out = out * (scale[:, None] if side == 2 else scale)
    return to_tokens(out + bias[:, None, None].to(out.dtype))
