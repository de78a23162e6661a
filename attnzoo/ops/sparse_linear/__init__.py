"""Softmax attention to a few blocks of keys, linear attention to the rest (SLA, 2509.24006)."""

from __future__ import annotations

from torch import Tensor

from attnzoo.ops.dispatch import Impl, operator
from attnzoo.ops.softmax import softmax_macs
from attnzoo.ops.sparse_linear.torch import block_size, blocks_kept, features, kept_blocks

__all__ = [
    "block_size",
    "blocks_kept",
    "features",
    "kept_blocks",
    "sparse_linear_attention",
    "sparse_linear_macs",
]


@operator
def sparse_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: int,
    share: float,
    is_rest_only: bool,
    eps: float,
    *,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Both parts of SLA. Tokens are cut into blocks in their order; the last may be shorter.

    Args:
        query: (b, h, n, d).
        key: (b, h, n, d).
        value: (b, h, n, d).
        block: Tokens of a block.
        share: Of the blocks of keys that a block of queries attends to by softmax; rounded down,
            but one at least.
        is_rest_only: Whether the linear part sees the other blocks only, or all.
        eps: Added to its normalizer; the linear part of queries that have no other blocks is 0.
        impl: "reference" materialises both n x n maps.

    Returns:
        The softmax part and the linear part, (b, h, n, d), in the dtype of ``value``.
    """
    ...


def sparse_linear_macs(
    tokens: int, dim: int, heads: int, block: int, share: float, is_rest_only: bool
) -> int:
    """Multiply-accumulates of all heads: the choice of blocks, the softmax and the linear part.

    The last block is filled up to the length of the others.
    """
    size, head_dim = block_size(tokens, block), dim // heads
    blocks = -(-tokens // size)
    filled = blocks * size
    chosen = softmax_macs(filled, blocks_kept(blocks, share) * size, dim, dim)
    linear = 2 * filled * dim * head_dim + filled * dim
    if is_rest_only:
        linear += blocks**2 * dim * (head_dim + 1)
    return blocks**2 * dim + chosen + linear
