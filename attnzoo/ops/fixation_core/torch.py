"""Feature fixation by PyTorch's operators, on shifted copies of keys and values."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.dispatch import loses_gradients
from attnzoo.ops.linear_core.torch import linear_tokens
from attnzoo.ops.precision import in_wide_range

# Where each sixteenth of the channels comes from: rows down, columns to the right.
NEIGHBORS = ((1, 0), (-1, 0), (0, 1), (0, -1), (-1, -1), (1, 1), (-1, 1), (1, -1))


def fixed(
    qkv: Tensor, gate: Callable[[Tensor], Tensor], heads: int, grid: tuple[int, int],
    is_shifted: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gated features of queries and keys, and the values, (b, n, c) each.

    Args:
        qkv: (b, h * w, 3 * c).
        gate: Gives the gate before its sigmoid, one or two, of queries, keys and values of a head.
        heads: They divide c.
        grid: (h, w).
        is_shifted: Whether keys and values come ``shifted``.
    """
    parts = qkv.unflatten(-1, (3, -1)).movedim(-2, 0)  # (3, b, n, c)
    if is_shifted:
        parts = shifted(parts, grid, first=1)
    both, value = parts.split([2, 1])
    value, sizes = value.squeeze(0), (heads, value.shape[-1] // heads)
    features, by_head = (in_wide_range(z).unflatten(-1, sizes) for z in (both, value))
    features = F.relu(features) + sizes[1] ** -0.5  # of queries and keys together
    gates = gate(torch.cat((*features.unbind(), by_head), -1).to(value.dtype)).sigmoid()
    features = gates.unflatten(-1, (-1, sizes[1])).movedim(-2, 0) * features
    return *features.flatten(-2).unbind(), value


def fixation_core(
    qkv: Tensor, weight: Tensor, bias: Tensor, heads: int, grid: tuple[int, int],
    is_shifted: bool, eps: float,
) -> Tensor:  # fmt: skip
    """See ``attnzoo.ops.fixation_core``."""
    gate = functools.partial(F.linear, weight=weight, bias=bias)
    query, key, value = fixed(qkv, gate, heads, grid, is_shifted)
    return linear_tokens(query, key, value, heads, eps=eps)


def shifted(z: Tensor, grid: tuple[int, int], first: int = 0) -> Tensor:
    """Takes half of the channels from the neighbors, a sixteenth from each.

    Beyond the border the four straight neighbors are zero and the four diagonal ones the token
    itself, as in the released code.

    Args:
        z: (parts, ..., h * w, c).
        grid: (h, w).
        first: Parts before it stay as they are.

    Returns:
        (parts, ..., h * w, c), contiguous.
    """
    image = z.unflatten(-2, grid)
    has_gradient = torch.is_grad_enabled() and z.requires_grad and not loses_gradients()
    out = _Moved.apply(image, first) if has_gradient else _moved(image, first)
    return out.flatten(-3, -2)


class _Moved(torch.autograd.Function):
    """``_moved``; autograd would fill a tensor with zeros for each of its slices."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, first: int) -> Tensor:
        ctx.first = first
        return _moved(image, first)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _moved(grad, ctx.first, is_adjoint=True), None


def _moved(image: Tensor, first: int, is_adjoint: bool = False) -> Tensor:
    """What ``shifted`` makes of (parts, ..., h, w, c), or the adjoint, for its gradient."""
    out = image.clone(memory_format=torch.contiguous_format)
    fold = image.shape[-1] // 16
    for place, (down, right) in enumerate(NEIGHBORS if fold else ()):
        channels = slice(place * fold, (place + 1) * fold)
        new, old = out[first:, ..., channels], image[first:, ..., channels]
        if is_adjoint:
            down, right = -down, -right
        inside = _overlap(image.shape[-3], down), _overlap(image.shape[-2], right)
        near = old[..., inside[0][1], inside[1][1], :]
        if not (down and right):
            new[..., inside[0][0], inside[1][0], :] = near
            border = new.select(-3, -(down > 0)) if down else new.select(-2, -(right > 0))
            border.zero_()
        elif is_adjoint:
            new[..., inside[0][1], inside[1][1], :] = 0  # those that went elsewhere
            new[..., inside[0][0], inside[1][0], :] += near
        else:
            new[..., inside[0][0], inside[1][0], :] = near
    return out


def _overlap(size: int, step: int) -> tuple[slice, slice]:
    """Places with a neighbor ``step`` further on, and those neighbors."""
    before, after = max(-step, 0), max(step, 0)
    return slice(before, size - after), slice(after, size - before)
