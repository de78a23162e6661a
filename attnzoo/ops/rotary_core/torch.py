"""MALA's and RALA's attention by PyTorch's operators."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.ops.depthwise_conv.torch import depthwise_conv
from attnzoo.ops.linear_core.torch import elu_plus_one, fold, key_sum, wide_read
from attnzoo.ops.precision import in_float32
from attnzoo.ops.rotary_core.rotary import rotated


def token_sum(z: Tensor) -> Tensor:
    """The sum of all tokens, (b, h, n, d) -> (b, h, 1, d), in float32 or better."""
    return z.sum(2, keepdim=True, dtype=torch.promote_types(z.dtype, torch.float32))


def magnitude_read(
    turned: Tensor, query: Tensor, state: tuple[Tensor, ...], sums: tuple[Tensor, ...],
    total: Tensor, tokens: int, eps: float,
) -> Tensor:  # fmt: skip
    """MALA's output of queries, turned and not, of the sums over ``tokens`` keys and values."""
    scale = query.shape[-1] ** -0.5 / tokens
    z = wide_read(query, sums) * scale
    read = wide_read(turned, state) * (scale + scale / (z + eps))
    return torch.addcmul(read, z, total / tokens, value=-1).to(query.dtype)


@in_float32
def key_scores(query: Tensor, key: Tensor) -> Tensor:
    """What a mean query sees in keys: (b, h, 1, d), (b, h, m, d) -> (b, h, 1, m)."""
    return (query * query.shape[-1] ** -0.5) @ key.mT


def rotary_core(
    qkv: Tensor, gate: Tensor, weight: Tensor | None, bias: Tensor | None, heads: int,
    grid: tuple[int, int], is_rotated: bool, is_weighed: bool, eps: float,
) -> Tensor:  # fmt: skip
    """See ``attnzoo.ops.rotary_core``."""
    tokens = qkv.shape[1]
    query, key, value = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = elu_plus_one(query), elu_plus_one(key)
    if is_weighed:
        shares = key_scores(token_sum(q) / tokens, k).softmax(-1) * tokens
        k = (k * shares.mT).to(k.dtype)
    turned, turned_key = (rotated(z, grid) if is_rotated else z for z in (q, k))
    state, sums = fold(turned_key, value, tokens), key_sum(k)
    if is_weighed:
        out = wide_read(turned, state) / (wide_read(q, sums) + tokens * eps)
    else:
        out = magnitude_read(turned, q, state, sums, token_sum(value), tokens, eps)
    out = out.transpose(1, 2).flatten(2).to(qkv.dtype)
    value = qkv.chunk(3, dim=-1)[2]
    if weight is not None:
        out = depthwise_conv(value, grid, weight, bias, out)
    return out * gate
