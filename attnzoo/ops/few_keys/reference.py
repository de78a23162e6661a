"""Softmax attention as it is written, of tokens."""

from __future__ import annotations

from torch import Tensor

from attnzoo.ops.softmax import reference


def few_keys(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """See ``attnzoo.ops.few_keys``."""
    q, k, v = (by_head(z, heads) for z in (query, key, value))
    return reference.softmax_attention(q, k, v).transpose(1, 2).flatten(2)


def by_head(z: Tensor, heads: int) -> Tensor:
    """(b, n, heads * d) -> (b, heads, n, d)."""
    return z.unflatten(-1, (heads, -1)).transpose(1, 2)
