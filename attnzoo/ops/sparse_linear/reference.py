"""SLA as it is written, with both n x n maps."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.ops.precision import in_float32
from attnzoo.ops.sparse_linear.torch import block_size, features, kept_blocks


@in_float32
def sparse_map(query: Tensor, key: Tensor, block: int, share: float) -> tuple[Tensor, Tensor]:
    """The softmax over the keys of the blocks that are kept, and which keys those are."""
    n, size = query.shape[2], block_size(query.shape[2], block)
    kept = kept_blocks(query, key, size, share)
    chosen = (kept.unsqueeze(-1) == torch.arange(-(-n // size), device=query.device)).any(-2)
    chosen = chosen.repeat_interleave(size, -2).repeat_interleave(size, -1)[..., :n, :n]
    scores = torch.einsum("bhnd,bhmd->bhnm", query, key) * query.shape[-1] ** -0.5
    return scores.masked_fill(~chosen, -torch.inf).softmax(-1), chosen


def sparse_linear_attention(
    query: Tensor, key: Tensor, value: Tensor, block: int, share: float, is_rest_only: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See ``attnzoo.ops.sparse_linear``."""
    sparse, rest = _in_float32(query, key, value, block, share, is_rest_only, eps)
    return sparse.to(value.dtype), rest.to(value.dtype)


@in_float32
def _in_float32(
    query: Tensor, key: Tensor, value: Tensor, block: int, share: float, is_rest_only: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    weights, chosen = sparse_map(query, key, block, share)
    similar = torch.einsum("bhnd,bhmd->bhnm", features(query), features(key))
    if is_rest_only:
        similar = similar.masked_fill(chosen, 0)
    return weights @ value, similar @ value / (similar.sum(-1, keepdim=True) + eps)


@in_float32
def sparse_linear_tokens(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor, block: int,
    share: float, is_rest_only: bool, eps: float,
) -> Tensor:  # fmt: skip
    """Likewise."""
    near, far = _in_float32(query, key, value, block, share, is_rest_only, eps)
    return (near + far @ weight.T + bias).transpose(1, 2).flatten(2)
