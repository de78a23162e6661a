"""Kernelised attention, multiplied in whichever order costs less."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnzoo.ops.dispatch import MACS, Impl, operator
from attnzoo.ops.linear_core.torch import (
    fold,
    half_matmul,
    key_sum,
    normalized_read,
    quotient,
    read,
    wide_read,
)

__all__ = [
    "fold",
    "half_matmul",
    "key_sum",
    "linear_attention",
    "linear_attention_macs",
    "normalized_read",
    "quotient",
    "read",
    "wide_read",
]


@operator
def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, eps: float = 1e-15, *, impl: Impl = "auto"
) -> Tensor:
    """Normalised kernel attention: Q (K^T V) / (Q sum_j K_j^T + eps).

    Args:
        query: (..., n, d), after a non-negative kernel function.
        key: (..., m, d), likewise.
        value: (..., m, e).
        eps: Added to the normaliser; a query similar to no key gives 0.

    Returns:
        (..., n, e).
    """
    ...


def linear_attention_macs(
    queries: int, keys: int, key_dim: int, value_dim: int, normalized: bool = True
) -> int:
    """Multiply-accumulates of one head of ``linear_attention``."""
    product = min(queries * keys * (key_dim + value_dim), (queries + keys) * key_dim * value_dim)
    return product + (queries * key_dim if normalized else 0)


def _matmul_macs(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return a.numel() * b.shape[-1]


MACS |= {"half_matmul": _matmul_macs}
