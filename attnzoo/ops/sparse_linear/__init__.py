"""Softmax attention to a few blocks of keys, linear attention to the rest (SLA, 2509.24006)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, float32

from attnzoo.ops.dispatch import MACS, Impl, operator
from attnzoo.ops.precision import operand_dtype
from attnzoo.ops.softmax import softmax_macs
from attnzoo.ops.sparse_linear.torch import (
    block_size,
    blocks_kept,
    features,
    joined,
    kept_blocks,
)

__all__ = [
    "block_size",
    "blocks_kept",
    "can_join",
    "features",
    "joined",
    "kept_blocks",
    "sparse_linear_attention",
    "sparse_linear_macs",
    "sparse_linear_tokens",
]


# What the kernels serve: channels of a head, in float32 and in half precision, and with the
# projection; tokens of a block, and blocks.
WIDEST, WIDEST_HALF, WIDEST_JOINED, SIZES, MOST_BLOCKS = 64, 128, 64, (16, 32, 64), 1024


def unserved(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> str | None:
    """What the Triton kernels do not serve."""
    (n, width), is_joined = query.shape[2:], isinstance(others[0], Tensor)
    block = others[2 if is_joined else 0]
    if width > (WIDEST if operand_dtype(query) == float32 else WIDEST_HALF):
        return f"heads of width {width}"
    if is_joined and not can_join(query):
        return "the projection of float32 or of wide heads"
    if block not in SIZES:
        return f"blocks of {block} tokens"
    return f"{-(-n // block)} blocks" if n > MOST_BLOCKS * block else None


def can_join(query: Tensor) -> bool:
    """Whether ``sparse_linear_tokens`` has kernels, which have registers for so much only."""
    return query.shape[-1] <= WIDEST_JOINED and operand_dtype(query) != float32


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
        impl: See ``attnzoo.ops.dispatch``. "reference" materializes both n x n maps.

    Returns:
        The softmax part and the linear part, (b, h, n, d), in the dtype of ``value``.
    """
    ...


@operator
def sparse_linear_tokens(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    bias: Tensor,
    block: int,
    share: float,
    is_rest_only: bool,
    eps: float,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """The softmax part plus W times the linear part plus b, as tokens.

    Args:
        query: (b, h, n, d).
        key: (b, h, n, d).
        value: (b, h, n, d).
        weight: W, (d, d), of all heads.
        bias: b, (d,).
        block: As in ``sparse_linear_attention``, like ``share``, ``is_rest_only`` and ``eps``.
        impl: Likewise.

    Returns:
        (b, n, h * d), in the dtype of ``value``.
    """
    ...


def sparse_linear_macs(
    tokens: int, dim: int, heads: int, block: int, share: float, is_rest_only: bool
) -> int:
    """Multiply-accumulates of all heads: the choice of blocks, the softmax and the linear part.

    The last block is filled up to the length of the others.
    """
    count = blocks_kept(-(-tokens // block_size(tokens, block)), share)
    return sum(_parts(tokens, dim, heads, block, count, is_rest_only))


def _parts(
    tokens: int, dim: int, heads: int, block: int, count: int, is_rest_only: bool
) -> tuple[int, int, int]:
    """Of the choice of ``count`` blocks, the softmax and the linear part."""
    size, head_dim = block_size(tokens, block), dim // heads
    blocks = -(-tokens // size)
    filled = blocks * size
    chosen = softmax_macs(filled, count * size, dim, dim)
    linear = 2 * filled * dim * head_dim + filled * dim
    if is_rest_only:
        linear += blocks**2 * dim * (head_dim + 1)
    return blocks**2 * dim, chosen, linear


def _macs(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None, bias: Any, heads: int,
    *sizes: Any, **_: Any,
) -> int:  # fmt: skip
    b, n, c = query.shape
    projected = 0 if weight is None else n * heads * weight.numel()
    return b * (sum(_parts(n, c, heads, *sizes[:3])) + projected)


def _backward_macs(*operands: Any, **__: Any) -> int:
    (b, n, c), sizes = operands[7].shape, operands[12:16]
    choice, chosen, _ = _parts(n, c, *sizes)
    return 2 * _macs(*operands[7:]) + b * (chosen // 2 - 2 * choice)


MACS |= {"sparse_linear": _macs, "sparse_linear_backward": _backward_macs}
