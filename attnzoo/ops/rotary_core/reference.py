"""MALA's and RALA's attention as they are written, with their n x n maps."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.depthwise_conv.reference import depthwise_conv
from attnzoo.ops.precision import in_float32
from attnzoo.ops.rotary_core.rotary import rotated


@in_float32
def rotary_core(
    qkv: Tensor, gate: Tensor, weight: Tensor | None, bias: Tensor | None, heads: int,
    grid: tuple[int, int], is_rotated: bool, is_weighed: bool, eps: float,
) -> Tensor:  # fmt: skip
    """See ``attnzoo.ops.rotary_core``."""
    value = qkv.chunk(3, dim=-1)[2]
    q, k, v = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in qkv.chunk(3, dim=-1))
    q, k = (z.clamp_max(0).exp() + F.relu(z) for z in (q, k))
    tokens, scale = q.shape[2], q.shape[3] ** -0.5
    if is_weighed:
        k = k * (tokens * (scale * q.mean(2, keepdim=True) @ k.mT).softmax(-1)).mT
    plain = q @ k.mT
    turned = rotated(q, grid) @ rotated(k, grid).mT if is_rotated else plain
    if is_weighed:
        out = turned / (plain.mean(-1, keepdim=True) + eps) / tokens @ v
    else:
        z = scale * plain.mean(-1, keepdim=True)
        out = (scale * turned * (1 + 1 / (z + eps)) - z) / tokens @ v
    out = out.transpose(1, 2).flatten(2)
    if weight is not None:
        out = depthwise_conv(value, grid, weight, bias, out)
    return out * gate
