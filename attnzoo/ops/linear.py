"""Kernelised attention, multiplied in whichever order costs less."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.ops import fused
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


def fold(key: Tensor, value: Tensor, queries: int | None) -> tuple[Tensor, ...]:
    """What ``read`` needs to know of keys and values: the factors of K^T V, multiplied or not.

    Args:
        key: (..., m, d), after the kernel function.
        value: (..., m, e).
        queries: How many will read; for few of them (K^T, V) is cheaper than K^T V. None
            always multiplies, so that the results of several blocks of keys can be added.

    Returns:
        Matrices whose product is (..., d, e), in float32 or better.
    """
    keys, key_dim = key.shape[-2:]
    if queries and is_quadratic_cheaper(queries, keys, key_dim, value.shape[-1]):
        return key.transpose(-2, -1), value
    if fused.has_half_sums(key, value):
        return (fused.half_matmul(key.transpose(-2, -1), value),)
    return _fold(key, value)


@in_float32
def _fold(key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    return (key.transpose(-2, -1) @ value,)


def wide_read(query: Tensor, state: tuple[Tensor, ...]) -> Tensor:
    """``read`` whose result stays in float32 or better."""
    if fused.has_half_sums(query):
        return fused.half_read(query, state)
    return _wide_read(query, state)[0]


@in_float32
def _wide_read(query: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor]:
    for factor in state:
        query = query @ factor
    return (query,)


def read(query: Tensor, state: tuple[Tensor, ...]) -> Tensor:
    """Q K^T V without a normaliser, of what ``fold`` returned: (..., n, d) -> (..., n, e)."""
    return wide_read(query, state).to(query.dtype)


def kernel_product(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Q K^T V without a normaliser: (..., n, d), (..., m, d), (..., m, e) -> (..., n, e)."""
    return read(query, fold(key, value, query.shape[-2]))


def key_sum(key: Tensor) -> tuple[Tensor, ...]:
    """The sum of all keys, as one factor for ``read``: (..., m, d) -> ((..., d, 1),)."""
    if fused.has_half_sums(key):
        return (key.sum(-2, dtype=torch.float32).unsqueeze(-1),)
    return _key_sum(key)


@in_float32
def _key_sum(key: Tensor) -> tuple[Tensor, ...]:
    return (key.sum(-2).unsqueeze(-1),)


class _Quotient(torch.autograd.Function):
    """x / norm, which keeps the result; autograd would keep x and make three tensors more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor) -> Tensor:
        out = x / norm
        ctx.save_for_backward(out, norm)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        out, norm = ctx.saved_tensors
        grad = grad / norm
        return grad, -(grad * out).sum(-1, keepdim=True)


def quotient(x: Tensor, norm: Tensor) -> Tensor:
    """x / norm; without a gradient x itself is overwritten: (..., n, e), (..., n, 1)."""
    return _Quotient.apply(x, norm) if torch.is_grad_enabled() else x.div_(norm)


def normalized_read(
    query: Tensor, state: tuple[Tensor, ...], sums: tuple[Tensor, ...], eps: float
) -> Tensor:
    """Q (K^T V) / (Q sum_j K_j^T + eps), of what ``fold`` and ``key_sum`` returned."""
    return quotient(wide_read(query, state), wide_read(query, sums) + eps).to(query.dtype)


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
    return normalized_read(query, fold(key, value, query.shape[-2]), key_sum(key), eps)


@in_float32
def projected_linear_attention(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> Tensor:
    """``linear_attention`` of all heads and the output projection, folded into the heads' states.

    The small products of every head with its state and the projection become one large product.

    Args:
        query: (b, h, n, d), after a non-negative kernel function.
        key: (b, h, m, d), likewise.
        value: (b, h, m, e).
        weight: Of the projection, (out, h * e).
        bias: (out,).
        eps: See ``linear_attention``.

    Returns:
        (b, n, out).
    """
    heads = weight.unflatten(1, (key.shape[1], -1)).permute(1, 2, 0)  # (h, e, out)
    state = (key.transpose(-2, -1) @ value @ heads).flatten(1, 2)  # (b, h * d, out)
    query = query / (read(query, key_sum(key)) + eps)
    out = query.transpose(1, 2).flatten(2) @ state
    return out if bias is None else out + bias


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
