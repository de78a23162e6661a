"""One linear attention map or two, normalised and subtracted (DyDiLA, 2601.13683, Eqs. 8, 10)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from attnzoo.ops.linear_core import fold, key_sum, quotient, wide_read
from attnzoo.ops.precision import in_float32
from attnzoo.ops.streaming import State

Normalizer = Literal["base", "diff", "mean", "none"]


class Side(NamedTuple):
    """Queries or keys as the core multiplies them, (b, h, n, d_head).

    Attributes:
        terms: One of every attention map.
        norms: What normalises each, if anything does.
        factor: The second map's, of queries of two maps.
    """

    terms: list[Tensor]
    norms: list[Tensor]
    factor: Tensor | None


def fold_side(key: Side, value: Tensor, queries: int | None) -> State:
    """Everything the queries read of keys and values: K^T V of each term, then the sums."""
    return [fold(term, value, queries) for term in key.terms] + [key_sum(z) for z in key.norms]


def read_side(query: Side, state: State, keys: int, normalizer: Normalizer, eps: float) -> Tensor:
    """The output, (b, h, n, d_head), of what ``fold_side`` made of ``keys`` tokens."""
    products = [wide_read(q, s) for q, s in zip(query.terms, state, strict=False)]
    sums = [wide_read(q, s) for q, s in zip(query.norms, state[len(products) :], strict=True)]
    out = _combine(products, sums, query.factor, keys, normalizer, eps)
    return out.to(query.terms[0].dtype)


@in_float32
def naive_read(
    query: Side, key: Side, value: Tensor, normalizer: Normalizer, eps: float
) -> Tensor:
    """Twin of ``fold_side`` and ``read_side``: the n x n weights of Eqs. 8, 10, times V."""
    return naive_map(query, key, normalizer, eps) @ value


@in_float32
def naive_map(query: Side, key: Side, normalizer: Normalizer, eps: float) -> Tensor:
    """The weight of every key in every query's output, (b, h, n, m)."""

    def products(queries: list[Tensor], keys: list[Tensor]) -> list[Tensor]:
        pairs = zip(queries, keys, strict=True)
        return [torch.einsum("bhnd,bhmd->bhnm", q, k) for q, k in pairs]

    sums = [weights.sum(-1, keepdim=True) for weights in products(query.norms, key.norms)]
    keys = key.terms[0].shape[-2]
    return _combine(products(query.terms, key.terms), sums, query.factor, keys, normalizer, eps)


def _combine(
    terms: list[Tensor],
    sums: list[Tensor],
    factor: Tensor | None,
    keys: int,
    normalizer: Normalizer,
    eps: float,
) -> Tensor:
    """Normalises the one map, or both and subtracts the second times ``factor`` (Eq. 10)."""
    factor = None if factor is None else factor.to(terms[0].dtype)
    if normalizer == "diff":
        total, norm = terms[0], sums[0]
        if factor is not None:
            total, norm = total - factor * terms[1], norm - factor * sums[1]
        # A differenced sum can come near 0 or below it, where the quotient explodes.
        return total / norm.clamp_min(max(eps, 1e-6))
    if normalizer == "base":
        terms = [quotient(x, norm + eps) for x, norm in zip(terms, sums, strict=True)]
    elif normalizer == "mean":
        terms = [term / keys for term in terms]
    return terms[0] if factor is None else terms[0] - factor * terms[1]
