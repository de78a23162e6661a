"""Softmax attention by PyTorch's fused operator, of tokens."""

from __future__ import annotations

from torch import Tensor

from attnzoo.ops.few_keys.reference import by_head
from attnzoo.ops.softmax import softmax_attention


def few_keys(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """See ``attnzoo.ops.few_keys``."""
    q, k, v = (by_head(z, heads) for z in (query, key, value))
    return softmax_attention(q, k, v).transpose(1, 2).flatten(2)
