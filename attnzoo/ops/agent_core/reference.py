"""Agent attention by the product of both stages' maps, as they are written."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.depthwise_conv.reference import depthwise_conv
from attnzoo.ops.depthwise_conv.torch import to_image, to_tokens
from attnzoo.ops.precision import in_float32
from attnzoo.ops.softmax.reference import softmax_map


@in_float32
def agent_core(
    qkv: Tensor, weight: Tensor | None, bias: Tensor | None, heads: int, grid: tuple[int, int],
    pooled: tuple[int, int],
) -> Tensor:  # fmt: skip
    """See ``attnzoo.ops.agent_core``."""
    query, key, value = qkv.chunk(3, dim=-1)
    agent = to_tokens(F.adaptive_avg_pool2d(to_image(query, grid), pooled))
    q, a, k, v = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in (query, agent, key, value))
    out = (softmax_map(q, a) @ softmax_map(a, k) @ v).transpose(1, 2).flatten(2)
    return out if weight is None else depthwise_conv(value, grid, weight, bias, out)
