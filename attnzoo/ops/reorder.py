"""Tokens in another order, whose gradient is put back in order instead of added up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.ops.dispatch import loses_gradients


class _Reordered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.dim = dim
        return x.index_select(dim, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(ctx.dim, inverse), None, None, None


def reordered(x: Tensor, dim: int, order: Tensor, inverse: Tensor) -> Tensor:
    """``x.index_select(dim, order)``; autograd does not know that no place is read twice.

    Args:
        x: Any tensor.
        dim: The dimension along which it is read.
        order: Which place of ``x`` comes at each place: a permutation. It may repeat places, if
            what comes of the repetitions has no gradient.
        inverse: Where in ``order`` each place of ``x`` is.

    Returns:
        As ``x``, with the length of ``order`` along ``dim``.
    """
    if not torch.is_grad_enabled() or loses_gradients():
        return x.index_select(dim, order)
    return _Reordered.apply(x, order, inverse, dim)
