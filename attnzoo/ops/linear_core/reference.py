"""Linear attention as it is written, with its n x n map."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.ops.linear_core.torch import features
from attnzoo.ops.precision import in_float32


@in_float32
def linear_attention(query: Tensor, key: Tensor, value: Tensor, eps: float = 1e-15) -> Tensor:
    """See ``attnzoo.ops.linear_core``; materializes the attention map."""
    return linear_map(query, key, eps) @ value


@in_float32
def linear_map(query: Tensor, key: Tensor, eps: float = 1e-15) -> Tensor:
    """The map of ``linear_attention``: (..., n, d), (..., m, d) -> (..., n, m)."""
    similarity = torch.einsum("...nd,...md->...nm", query, key)
    return similarity / (similarity.sum(-1, keepdim=True) + eps)


@in_float32
def linear_tokens(
    query: Tensor, key: Tensor | None, value: Tensor | None, heads: int, activation: str = "none",
    is_normalized: bool = True, eps: float = 1e-15,
) -> Tensor:  # fmt: skip
    """See ``attnzoo.ops.linear_core``."""
    if key is None or value is None:
        query, key, value = query.chunk(3, dim=-1)
    query, key = features(query, key, heads, activation, is_normalized)
    query, key, value = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in (query, key, value))
    weights = linear_map(query, key, eps) if is_normalized else query @ key.mT
    return (weights @ value).transpose(1, 2).flatten(2)
