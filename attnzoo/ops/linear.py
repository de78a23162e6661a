"""Kernelised attention, multiplied in whichever order costs less."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.ops.precision import in_float32


def is_quadratic_cheaper(queries: int, keys: int, key_dim: int, value_dim: int) -> bool:
    """Whether (Q K^T) V takes fewer multiply-accumulates than Q (K^T V)."""
    return queries * keys * (key_dim + value_dim) < (queries + keys) * key_dim * value_dim


def linear_attention_macs(
    queries: int, keys: int, key_dim: int, value_dim: int, normalized: bool = True
) -> int:
    """Multiply-accumulates of one head of ``linear_attention``."""
    product = min(queries * keys * (key_dim + value_dim), (queries + keys) * key_dim * value_dim)
    return product + (queries * key_dim if normalized else 0)


@in_float32
def kernel_product(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Q K^T V without a normaliser.

    Args:
        query: (..., n, d), after the kernel function.
        key: (..., m, d), after the kernel function.
        value: (..., m, e).

    Returns:
        (..., n, e), accumulated in float32 or better, in the dtype of ``query``.
    """
    shape = (query.shape[-2], key.shape[-2], key.shape[-1], value.shape[-1])
    if is_quadratic_cheaper(*shape):
        return (query @ key.transpose(-2, -1)) @ value
    return query @ (key.transpose(-2, -1) @ value)


@in_float32
def key_sums(query: Tensor, key: Tensor) -> Tensor:
    """For every query, the sum of its similarity to all keys: Q sum_j K_j^T.

    Args:
        query: (..., n, d).
        key: (..., m, d).

    Returns:
        (..., n, 1).
    """
    return query @ key.sum(-2).unsqueeze(-1)


@in_float32
def linear_attention(query: Tensor, key: Tensor, value: Tensor, eps: float = 1e-15) -> Tensor:
    """Normalised kernel attention: Q (K^T V) / (Q sum_j K_j^T + eps).

    Args:
        query: (..., n, d), after a non-negative kernel function.
        key: (..., m, d), likewise.
        value: (..., m, e).
        eps: Added to the normaliser; a query similar to no key gives 0.

    Returns:
        (..., n, e).
    """
    return kernel_product(query, key, value) / (key_sums(query, key) + eps)


@in_float32
def naive_linear_attention(
    query: Tensor, key: Tensor, value: Tensor, eps: float = 1e-15
) -> Tensor:
    """Twin of ``linear_attention`` that materialises the attention map."""
    return naive_linear_map(query, key, eps) @ value


@in_float32
def naive_linear_map(query: Tensor, key: Tensor, eps: float = 1e-15) -> Tensor:
    """The map of ``linear_attention``: (..., n, d), (..., m, d) -> (..., n, m)."""
    similarity = torch.einsum("...nd,...md->...nm", query, key)
    return similarity / (similarity.sum(-1, keepdim=True) + eps)
