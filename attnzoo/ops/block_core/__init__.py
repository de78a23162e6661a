"""MHLA between its projections: states of blocks of tokens, mixed, and a convolution of V."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnzoo.ops.block_core.reference import block_map
from attnzoo.ops.block_core.token_blocks import TokenBlocks
from attnzoo.ops.block_core.torch import block_features, mixed, read_blocks
from attnzoo.ops.dispatch import MACS, Impl, operator

# Channels of a head, and blocks, in the kernels.
WIDEST, MOST_BLOCKS = 64, 64

__all__ = ["TokenBlocks", "block_core", "block_features", "block_map", "mixed", "read_blocks"]


def unserved(
    qkv: Tensor, mixing: Any, weight: Tensor | None, bias: Any, heads: int, blocks: TokenBlocks,
    *_: Any,
) -> str | None:  # fmt: skip
    """What the Triton kernels do not serve."""
    if weight is not None and weight.shape[-1] not in (3, 5):
        return f"kernels of {tuple(weight.shape[2:])}"
    return unserved_sizes(int(qkv.shape[-1]) // (3 * heads), blocks.count)


def unserved_sizes(width: int, blocks: int) -> str | None:
    """Heads, or numbers of blocks, that the Triton kernels do not serve."""
    if width > WIDEST:
        return f"heads of width {width}"
    return f"{blocks} blocks" if blocks > MOST_BLOCKS else None


@operator
def block_core(
    qkv: Tensor,
    mixing: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    heads: int,
    blocks: TokenBlocks,
    eps: float,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Linear attention of ReLU(Q) + 1e-6 and ReLU(K) + 1e-6, whose states of blocks are mixed.

    With S_c = sum_j phi(K_j)^T V_j and z_c = sum_j phi(K_j) over block c, a query of block b gives
    phi(Q) sum_c W_bc S_c / (phi(Q) sum_c W_bc z_c^T + eps), to which a depthwise convolution of V
    is added.

    Args:
        qkv: (b, h * w, 3 * c), queries, keys and values side by side.
        mixing: W, (blocks, blocks).
        weight: (c, 1, 3, 3) or (c, 1, 5, 5) of the convolution, or None if there is none.
        bias: (c,) of the convolution, or None.
        heads: They divide c.
        blocks: How the grid, (h, w), is cut.
        eps: Added to the normalizer.
        impl: See ``attnzoo.ops.dispatch``.

    Returns:
        (b, h * w, c).
    """
    ...


def _macs(
    qkv: Tensor, mixing: Tensor, weight: Tensor | None, _: Any, heads: int, *__: Any, **___: Any
) -> int:
    b, n, c = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    width, taps = c // heads, 0 if weight is None else weight.shape[-1] ** 2
    return b * (n * c * (2 * width + 1 + taps) + mixing.numel() * c * (width + 1))


# Of states; pairs of tokens, which kernels of few tokens take, are their choice.
MACS |= {
    "block_core": _macs,
    "block_core_backward": lambda *operands, **_: 2 * _macs(*operands[3:]),
    "block_core_pairs": _macs,
    "block_core_pairs_backward": lambda *operands, **_: 2 * _macs(*operands[2:]),
}
