"""The depthwise convolution by PyTorch's convolution of a plain image."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def depthwise_conv(
    x: Tensor,
    grid: tuple[int, int],
    weight: Tensor,
    bias: Tensor | None,
    added: Tensor | None = None,
) -> Tensor:
    """See ``attnzoo.ops.depthwise_conv``."""
    parts = x.shape[2] // len(weight)
    weight, bias = weight.repeat(parts, 1, 1, 1), None if bias is None else bias.repeat(parts)
    image = x.unflatten(1, grid).movedim(3, 1).contiguous()  # (b, c, h, w)
    padding = weight.shape[2] // 2, weight.shape[3] // 2
    out = F.conv2d(image, weight, bias, padding=padding, groups=len(weight))
    out = out.flatten(2).transpose(1, 2)
    return out if added is None else added + out.to(added.dtype)


def gated_depthwise_conv(
    packed: Tensor, grid: tuple[int, int], weight: Tensor, bias: Tensor | None
) -> Tensor:
    """See ``attnzoo.ops.depthwise_conv``."""
    gate, x = packed.chunk(2, dim=-1)
    return F.gelu(gate) * depthwise_conv(x, grid, weight, bias)
