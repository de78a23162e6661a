"""Softmax attention as it is written, with its n x n map."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.ops.precision import in_float32


@in_float32
def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None
) -> Tensor:
    """See ``attnzoo.ops.softmax``; materializes the attention map."""
    return softmax_map(query, key, bias) @ value


@in_float32
def softmax_map(query: Tensor, key: Tensor, bias: Tensor | None = None) -> Tensor:
    """The map of ``softmax_attention``: (..., n, d), (..., m, d) -> (..., n, m)."""
    scores = torch.einsum("...nd,...md->...nm", query, key) * query.shape[-1] ** -0.5
    return (scores if bias is None else scores + bias).softmax(-1)
