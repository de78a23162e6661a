"""The depthwise convolution by PyTorch's operators."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def to_image(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens (b, h * w, c) as a channels-last image (b, c, h, w), without a copy."""
    # On CPU a depthwise convolution of this view is an order of magnitude faster than of a
    # contiguous (b, c, h, w) copy.
    return x.unflatten(1, grid).permute(0, 3, 1, 2)


def to_tokens(image: Tensor) -> Tensor:
    """Inverse of ``to_image``: (b, c, h, w) -> (b, h * w, c)."""
    return image.permute(0, 2, 3, 1).flatten(1, 2)


def widened(weight: Tensor, size: int) -> Tensor:
    """The same depthwise kernel with zeros around it: (c, 1, h, w) -> (c, 1, size, size)."""
    side, edge = (size - weight.shape[2]) // 2, (size - weight.shape[3]) // 2
    return F.pad(weight, (edge, edge, side, side)) if side or edge else weight


def depthwise_conv(
    x: Tensor,
    grid: tuple[int, int],
    weight: Tensor,
    bias: Tensor | None,
    added: Tensor | None = None,
) -> Tensor:
    """See ``attnzoo.ops.depthwise_conv``."""
    high, wide = weight.shape[2:]
    if (parts := x.shape[2] // len(weight)) > 1:
        # Repeating the kernels is several times cheaper than moving parts to the batch and back.
        weight, bias = weight.repeat(parts, 1, 1, 1), None if bias is None else bias.repeat(parts)
    image = x.contiguous().unflatten(1, grid).permute(0, 3, 1, 2)  # channels-last
    out = F.conv2d(image, weight, bias, padding=(high // 2, wide // 2), groups=len(weight))
    out = out.permute(0, 2, 3, 1).flatten(1, 2)
    return out if added is None else added + out.to(added.dtype)


def gated_depthwise_conv(
    packed: Tensor, grid: tuple[int, int], weight: Tensor, bias: Tensor | None
) -> Tensor:
    """See ``attnzoo.ops.depthwise_conv``."""
    gate, x = packed.chunk(2, dim=-1)
    return F.gelu(gate) * depthwise_conv(x, grid, weight, bias)
