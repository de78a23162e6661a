"""MHLA's attention by PyTorch's operators, on copies of the tokens in the order of the blocks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.block_core.token_blocks import TokenBlocks
from attnzoo.ops.depthwise_conv.torch import depthwise_conv
from attnzoo.ops.linear_core.torch import fold, key_sum, quotient, wide_read
from attnzoo.ops.precision import in_float32, in_wide_range

RELU_OFFSET = 1e-6  # MHLA


def block_features(z: Tensor) -> Tensor:
    """phi of queries or keys."""
    return F.relu(in_wide_range(z)) + RELU_OFFSET


@in_float32
def mixed(state: Tensor, weight: Tensor) -> Tensor:
    """sum_c W_bc of every block's (d, e): (b, h, c, d, e) and (b', c) -> (b, h, b', d, e)."""
    weights = weight.expand(*state.shape[:2], -1, -1)  # fvcore counts no other broadcast
    return (weights @ state.flatten(3)).unflatten(3, state.shape[3:])


def read_blocks(
    query: Tensor, products: Tensor, sums: Tensor, weight: Tensor, eps: float
) -> Tensor:
    """What blocks of queries read of all blocks' states, in float32 or better.

    Args:
        query: (b, h, some blocks, tokens, d), phi(Q).
        products: (b, h, blocks, d, d), sums of phi(K)^T V.
        sums: (b, h, blocks, d, 1), of phi(K)^T.
        weight: (some blocks, blocks), their rows of W.
        eps: Added to the normalizer.
    """
    read = wide_read(query, (mixed(products, weight),))
    return quotient(read, wide_read(query, (mixed(sums, weight),)) + eps)


def block_core(
    qkv: Tensor, mixing: Tensor, weight: Tensor | None, bias: Tensor | None, heads: int,
    blocks: TokenBlocks, eps: float,
) -> Tensor:  # fmt: skip
    """See ``attnzoo.ops.block_core``."""
    width, whole = qkv.shape[-1] // 3, slice(None)
    both, value = qkv.split([2 * width, width], dim=-1)
    # What fills up a block is to be zero after phi. Queries and keys are cut by one copy.
    by_head = block_features(both).unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)
    query, key = blocks.cut(by_head, whole)
    values = blocks.cut(value.unflatten(-1, (heads, -1)).transpose(1, 2), whole)
    (products,), (sums,) = fold(key, values, None), key_sum(key)
    out = blocks.join(read_blocks(query, products, sums, mixing, eps).to(value.dtype), whole)
    out = out.transpose(1, 2).flatten(2)
    return out if weight is None else depthwise_conv(value, blocks.grid, weight, bias, out)
