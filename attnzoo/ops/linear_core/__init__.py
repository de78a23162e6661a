"""Kernelised attention, multiplied in whichever order costs less."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from attnzoo.ops.dispatch import MACS, Impl, operator
from attnzoo.ops.linear_core.torch import (
    activated,
    elu_plus_one,
    fold,
    half_matmul,
    key_softmax,
    key_sum,
    normalized_read,
    query_softmax,
    quotient,
    read,
    wide_read,
)

FASTER_UP_TO = 384  # width of a head
PLAIN_FASTER_UP_TO = 128  # without a normalizer, which leaves PyTorch two products

# "elu" is ELU + 1; "softmax" is that of queries over a head's channels, of keys over all tokens.
Activation = Literal["relu", "elu", "softmax", "none"]

__all__ = [
    "Activation",
    "activated",
    "elu_plus_one",
    "fold",
    "half_matmul",
    "key_softmax",
    "key_sum",
    "linear_attention",
    "linear_attention_macs",
    "linear_tokens",
    "normalized_read",
    "query_softmax",
    "quotient",
    "read",
    "slower",
    "wide_read",
]


@operator
def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, eps: float = 1e-15, *, impl: Impl = "auto"
) -> Tensor:
    """Normalized kernel attention: Q (K^T V) / (Q sum_j K_j^T + eps).

    Args:
        query: (..., n, d), after a non-negative kernel function.
        key: (..., m, d), likewise.
        value: (..., m, e).
        eps: Added to the normalizer; a query similar to no key gives 0.

    Returns:
        (..., n, e).
    """
    ...


@operator
def linear_tokens(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    heads: int,
    activation: Activation = "none",
    is_normalized: bool = True,
    eps: float = 1e-15,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """``linear_attention`` of tokens whose heads lie side by side, as projections leave them.

    Args:
        query: (b, n, h * d), or queries, keys and values side by side, (b, n, 3 * h * d).
        key: (b, m, h * d), or None if they come with the queries.
        value: Likewise.
        heads: h.
        activation: The kernel function that is still to be applied to queries and keys, a ReLU,
            ELU + 1, or softmaxes of queries over a head's channels and of keys over all tokens;
            with "none" they come after theirs.
        is_normalized: Whether to divide by the normalizer.
        eps: Added to the normalizer.
        impl: See ``attnzoo.ops.dispatch``.

    Returns:
        (b, n, h * d), in the dtype of the values.

    Raises:
        InvalidValue: The activation has another name, or is "softmax" with a normalizer.
    """
    ...


def slower(width: int, is_normalized: bool = True) -> str | None:
    """Heads for which the Triton kernels, which serve any, lose to PyTorch's products."""
    most = FASTER_UP_TO if is_normalized else PLAIN_FASTER_UP_TO
    return f"heads of width {width} faster than PyTorch" if width > most else None


def linear_attention_macs(
    queries: int, keys: int, key_dim: int, value_dim: int, normalized: bool = True
) -> int:
    """Multiply-accumulates of one head of ``linear_attention``."""
    product = min(queries * keys * (key_dim + value_dim), (queries + keys) * key_dim * value_dim)
    return product + (queries * key_dim if normalized else 0)


def _matmul_macs(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return a.numel() * b.shape[-1]


def _core_macs(
    query: Tensor, key: Tensor | None, value: Any, heads: int, activation: Any, divide: bool,
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    b, n, width = query.shape
    keys, width = (n, width // 3) if key is None else (key.shape[1], width)
    width //= heads
    return b * heads * linear_attention_macs(n, keys, width, width, divide)


MACS |= {
    "half_matmul": _matmul_macs,
    "linear_core": _core_macs,
    "linear_core_backward": lambda *operands, **_: 2 * _core_macs(*operands[4:]),
}
