"""Agent attention between its projections: few agents read the keys, queries read the agents."""

from __future__ import annotations

from typing import Any

from torch import Tensor, float32

from attnzoo.ops.dispatch import MACS, Impl, operator
from attnzoo.ops.precision import operand_dtype

MOST = 128  # agents, and channels of a head, in the kernels
# Agents times channels of a head, each padded to a power of two, that fit into shared memory.
MOST_HALF, MOST_FLOAT32 = 8192, 2048


def unserved(
    qkv: Tensor, weight: Tensor | None, bias: Any, heads: int, grid: tuple[int, int],
    pooled: tuple[int, int],
) -> str | None:  # fmt: skip
    """What the Triton kernels do not serve."""
    agents, width = pooled[0] * pooled[1], int(qkv.shape[-1]) // (3 * heads)  # traced: a tensor
    padded = [max(16, 1 << (size - 1).bit_length()) for size in (agents, width)]
    most = MOST_FLOAT32 if operand_dtype(qkv) == float32 else MOST_HALF
    if max(padded) > MOST or padded[0] * padded[1] > most:
        return f"{agents} agents with heads of {width} channels"
    if grid[0] % pooled[0] or grid[1] % pooled[1]:
        return f"a {grid} grid in cells of unequal sizes"
    if weight is not None and weight.shape[-1] != 3:
        return f"kernels of {tuple(weight.shape[2:])}"
    return None


@operator
def agent_core(
    qkv: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    heads: int,
    grid: tuple[int, int],
    pooled: tuple[int, int],
    *,
    impl: Impl = "auto",
) -> Tensor:
    """softmax(Q A^T) softmax(A K^T) V per head, plus a depthwise convolution of V.

    A are the means of Q over the cells of a grid; scores are divided by sqrt(d_head).

    Args:
        qkv: (b, h * w, 3 * c), queries, keys and values side by side.
        weight: (c, 1, 3, 3) of the convolution, or None if there is none.
        bias: (c,) of the convolution, or None.
        heads: They divide c.
        grid: (h, w).
        pooled: (rows, columns) of cells.
        impl: See ``attnzoo.ops.dispatch``.

    Returns:
        (b, h * w, c).
    """
    ...


def _macs(
    qkv: Tensor, weight: Tensor | None, _: Any, heads: int, height: int, width: int, rows: int,
    columns: int, *__: Any, **___: Any,
) -> int:  # fmt: skip
    taps = 0 if weight is None else 9
    return qkv.numel() // 3 * (4 * rows * columns + taps)


MACS |= {
    "agent_core": _macs,
    "agent_core_backward": lambda *operands, **_: 2 * _macs(*operands[4:]),
}
