"""Agent attention by PyTorch's fused attention, twice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.depthwise_conv.torch import depthwise_conv, to_image, to_tokens
from attnzoo.ops.softmax import softmax_attention


def pool(x: Tensor, grid: tuple[int, int], pooled: tuple[int, int]) -> Tensor:
    """Means of tokens over the cells of a grid: (b, h * w, c) -> (b, rows * columns, c)."""
    (height, width), (rows, columns) = grid, pooled
    is_open = isinstance(height, torch.SymInt) or isinstance(width, torch.SymInt)  # in an export
    if is_open or height % rows or width % columns:
        return to_tokens(F.adaptive_avg_pool2d(to_image(x, grid), pooled))
    # On a GPU the general operator above takes as long as the rest of a layer.
    size = height // rows, width // columns
    return to_tokens(F.avg_pool2d(to_image(x, grid), size))


def agent_core(
    qkv: Tensor, weight: Tensor | None, bias: Tensor | None, heads: int, grid: tuple[int, int],
    pooled: tuple[int, int],
) -> Tensor:  # fmt: skip
    """See ``attnzoo.ops.agent_core``."""
    query, key, value = qkv.chunk(3, dim=-1)
    agent = pool(query, grid, pooled)
    q, a, k, v = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in (query, agent, key, value))
    out = softmax_attention(q, a, softmax_attention(a, k, v)).transpose(1, 2).flatten(2)
    return out if weight is None else depthwise_conv(value, grid, weight, bias, out)
