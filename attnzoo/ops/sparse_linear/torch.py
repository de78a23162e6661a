"""SLA by PyTorch's operators: blocks of queries meet the keys they keep; nothing is n x n."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.precision import in_float32
from attnzoo.ops.softmax import fused_attention, is_steep, reference


def block_size(tokens: int, block: int) -> int:
    """Tokens of a block: fewer tokens than one holds are a block of their own."""
    return min(tokens, block)


def blocks_kept(blocks: int, share: float) -> int:
    """How many blocks of keys a block of queries keeps."""
    return max(1, int(share * blocks + 1e-9))  # 0.29 * 100 is less than 29


def features(z: Tensor) -> Tensor:
    """SLA's kernel of the linear part: positive, and of sum 1."""
    return z.softmax(-1)


def _means(z: Tensor, size: int) -> Tensor:
    """Means of the blocks, (b, h, blocks, d); of the last one over its own tokens."""
    sums, n = _blocks(z, size).sum(3), z.shape[2]
    counts = (n - size * torch.arange(sums.shape[2], device=z.device)).clamp(max=size)
    return sums / counts.unsqueeze(-1)


def _blocks(z: Tensor, size: int) -> Tensor:
    """(b, h, n, d) -> (b, h, blocks, size, d), filled with zeros."""
    return F.pad(z, (0, 0, 0, -z.shape[2] % size)).unflatten(2, (-1, size))


def kept_blocks(query: Tensor, key: Tensor, size: int, share: float) -> Tensor:
    """The blocks of keys that every block of queries keeps, (b, h, blocks, kept); no gradient."""
    with torch.no_grad():
        [scores] = _block_scores(query, key, size)
        return scores.topk(blocks_kept(scores.shape[-1], share), sorted=False).indices


@in_float32
def _block_scores(query: Tensor, key: Tensor, size: int) -> tuple[Tensor]:
    """Products of the blocks' means, (b, h, blocks, blocks), in float32 or better.

    Without the mean of all keys, which adds as much to every block of a row, they lose less to
    rounding.
    """
    return (_means(query, size) @ _means(key - key.mean(2, keepdim=True), size).mT,)


def sparse_linear_attention(
    query: Tensor, key: Tensor, value: Tensor, block: int, share: float, is_rest_only: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See ``attnzoo.ops.sparse_linear``."""
    n, size = query.shape[2], block_size(query.shape[2], block)
    kept = kept_blocks(query, key, size, share)
    query, key, value = (_blocks(z, size) for z in (query, key, value))
    near = _softmax_part(query, key, value, kept, n)[:, :, :n]
    far = _linear_part(query, key, value, kept, n, is_rest_only, eps)[:, :, :n]
    return near, far.to(near.dtype)


def sparse_linear_tokens(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor, block: int,
    share: float, is_rest_only: bool, eps: float,
) -> Tensor:  # fmt: skip
    """Likewise."""
    parts = sparse_linear_attention(query, key, value, block, share, is_rest_only, eps)
    return joined(parts, functools.partial(F.linear, weight=weight, bias=bias))


def joined(parts: tuple[Tensor, Tensor], project: Callable[[Tensor], Tensor]) -> Tensor:
    """The softmax part plus the projected linear one, (b, h, n, d) -> (b, n, h * d)."""
    near, far = (z.transpose(1, 2) for z in parts)  # as kernels write them
    return (project(far).to(near.dtype) + near).flatten(2)


def _softmax_part(query: Tensor, key: Tensor, value: Tensor, kept: Tensor, n: int) -> Tensor:
    """Blocks of queries attend to the keys gathered for them: (b, h, filled n, d)."""
    size, dim = query.shape[3:]
    index = kept.flatten(2)[..., None, None].expand(-1, -1, -1, size, dim)
    near = (z.gather(2, index).unflatten(2, kept.shape[2:]).flatten(3, 4) for z in (key, value))
    # Images and heads together: torch's fused attention takes four dimensions.
    query, key, value = (z.flatten(0, 1) for z in (query, *near))
    bias = None
    if n % size:
        place = kept.unsqueeze(-1) * size + torch.arange(size, device=kept.device)
        bias = torch.zeros_like(place, dtype=query.dtype).masked_fill(place >= n, -torch.inf)
        bias = bias.flatten(3).flatten(0, 1).unsqueeze(-2)
    if is_steep(query, key):
        out = reference.softmax_attention(query, key, value, bias)
    else:
        out = fused_attention(query, key, value, bias)
    return out.unflatten(0, kept.shape[:2]).flatten(2, 3)


@in_float32
def _linear_part(
    query: Tensor, key: Tensor, value: Tensor, kept: Tensor, n: int, is_rest_only: bool, eps: float
) -> Tensor:
    """Linear attention to the blocks that are not kept, or to all: (b, h, filled n, d)."""
    query, key = features(query), features(key)
    if n % key.shape[3]:  # what fills the last block has features too
        place = torch.arange(key.shape[2] * key.shape[3], device=key.device)
        key = key * (place < n).view(*key.shape[2:4], 1)
    if is_rest_only:
        state, sums = key.mT @ value, key.sum(3)
        # Summed over the other blocks, not subtracted from the sum of all: of nothing left over,
        # the subtraction would leave rounding errors, and the quotient make numbers of them.
        rest = key.new_ones(*kept.shape[:3], kept.shape[2]).scatter(-1, kept, 0)
        state, sums = (rest @ state.flatten(3)).view_as(state), rest @ sums
    else:
        state = (key.flatten(2, 3).mT @ value.flatten(2, 3)).unsqueeze(2)
        sums = key.sum((2, 3)).unsqueeze(2)
    out = query @ state / (query @ sums.unsqueeze(-1) + eps)
    return out.flatten(2, 3)
