"""Softmax attention of many queries over few keys, which stay on the chip while queries stream."""

from __future__ import annotations

from typing import Any

from torch import Tensor, float32

from attnzoo.ops.dispatch import MACS, Impl, operator
from attnzoo.ops.few_keys.reference import by_head
from attnzoo.ops.precision import operand_dtype
from attnzoo.ops.softmax import SoftmaxImpl, softmax_attention

__all__ = ["attend_tokens", "by_head", "few_keys"]

MOST = 128  # keys, and channels of a head, in the kernels
# Keys times channels of a head, each padded to a power of two, that fit on the chip.
MOST_HALF, MOST_FLOAT32 = 8192, 2048


def unserved(query: Tensor, key: Tensor, value: Tensor, heads: int) -> str | None:
    """What the Triton kernels do not serve."""
    keys, width = int(key.shape[1]), int(query.shape[-1]) // heads  # traced: a tensor
    padded = [max(16, 1 << (size - 1).bit_length()) for size in (keys, width)]
    most = MOST_FLOAT32 if operand_dtype(query) == float32 else MOST_HALF
    if not keys or max(padded) > MOST or padded[0] * padded[1] > most:
        return f"{keys} keys with heads of {width} channels"
    return None


@operator
def few_keys(
    query: Tensor, key: Tensor, value: Tensor, heads: int, *, impl: Impl = "auto"
) -> Tensor:
    """softmax(Q K^T / sqrt(d_head)) V per head, from tokens to tokens.

    Args:
        query: (b, n, c), a part of a wider projection as it lies.
        key: (b, m, c), likewise.
        value: (b, m, c), likewise.
        heads: They divide c.
        impl: See ``attnzoo.ops.dispatch``.

    Returns:
        (b, n, c).
    """
    ...


def attend_tokens(
    query: Tensor, key: Tensor, value: Tensor, heads: int, impl: SoftmaxImpl = "auto"
) -> Tensor:
    """``softmax_attention`` from tokens to tokens; "auto" is ``few_keys``, see there."""
    if impl == "auto":
        return few_keys(query, key, value, heads)
    q, k, v = (by_head(z, heads) for z in (query, key, value))
    return softmax_attention(q, k, v, impl).transpose(1, 2).flatten(2)


def _macs(query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    return 2 * query.numel() * key.shape[1]


MACS |= {
    "few_keys": _macs,
    "few_keys_backward": lambda _, *operands, **__: 5 * _macs(*operands) // 2,
}
