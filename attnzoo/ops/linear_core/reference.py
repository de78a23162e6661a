"""Linear attention as it is written, with its n x n map."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.ops.precision import in_float32


@in_float32
def linear_attention(query: Tensor, key: Tensor, value: Tensor, eps: float = 1e-15) -> Tensor:
    """See ``attnzoo.ops.linear_core``; materialises the attention map."""
    return linear_map(query, key, eps) @ value


@in_float32
def linear_map(query: Tensor, key: Tensor, eps: float = 1e-15) -> Tensor:
    """The map of ``linear_attention``: (..., n, d), (..., m, d) -> (..., n, m)."""
    similarity = torch.einsum("...nd,...md->...nm", query, key)
    return similarity / (similarity.sum(-1, keepdim=True) + eps)
