"""MHLA's attention as it is written, with its n x n map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.block_core.token_blocks import TokenBlocks
from attnzoo.ops.depthwise_conv.reference import depthwise_conv
from attnzoo.ops.precision import in_float32


@in_float32
def block_map(
    query: Tensor, key: Tensor, mixing: Tensor, block: Tensor, place: Tensor | None, eps: float
) -> Tensor:
    """The n x n map, of every token's block and, for the official normalizer, place in it."""
    similarity = torch.einsum("bhnd,bhmd->bhnm", query, key)
    weight = mixing[block][:, block]
    terms = similarity * weight
    if place is None:
        return terms / (terms.sum(-1, keepdim=True) + eps)
    own = (similarity * (block[:, None] == block)).sum(-1)
    norm = torch.einsum("nm,bhm->bhn", weight * (place[:, None] == place), own)
    return terms / (norm.unsqueeze(-1) + eps)


@in_float32
def block_core(
    qkv: Tensor, mixing: Tensor, weight: Tensor | None, bias: Tensor | None, heads: int,
    blocks: TokenBlocks, eps: float,
) -> Tensor:  # fmt: skip
    """See ``attnzoo.ops.block_core``."""
    query, key, value = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    query, key = F.relu(query) + 1e-6, F.relu(key) + 1e-6
    block, _ = blocks.places(qkv.device)
    out = block_map(query, key, mixing, block, None, eps) @ value
    out, value = out.transpose(1, 2).flatten(2), qkv.chunk(3, dim=-1)[2]
    return out if weight is None else depthwise_conv(value, blocks.grid, weight, bias, out)
