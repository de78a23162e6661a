"""The inner step as it is written: autograd finds the gradient of the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.dispatch import is_transformed
from attnzoo.ops.inner_loop.torch import reading
from attnzoo.ops.precision import in_float32


def _gradients(loss: Callable[..., Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    if is_transformed() or torch.is_inference_mode_enabled():  # which autograd records not
        return list(torch.func.grad(loss, tuple(range(len(weights))))(*weights))
    with torch.enable_grad():
        weights = [w if w.requires_grad else w.detach().requires_grad_() for w in weights]
        return list(torch.autograd.grad(loss(*weights), weights, create_graph=True))


@in_float32
def trained_unit(
    key: Tensor, value: Tensor, first: Tensor, second: Tensor, rate: float = 1.0
) -> tuple[Tensor, Tensor]:
    """See ``attnzoo.ops.inner_loop``."""
    weights = [w.repeat(len(key), 1, 1, 1) for w in (first, second)]

    def loss(w1: Tensor, w2: Tensor) -> Tensor:
        return -(key @ w1 * F.silu(key @ w2) * value).sum() / (3 * key.shape[2])

    found = _gradients(loss, weights)
    norms = [g.norm(dim=-2, keepdim=True) for g in found]
    w1, w2 = (w - rate * g / (r + 1) for w, g, r in zip(weights, found, norms, strict=True))
    return w1, w2


@in_float32
def trained_conv(key: Tensor, value: Tensor, weight: Tensor, rate: float = 1.0) -> Tensor:
    """See ``attnzoo.ops.inner_loop``."""
    weights = weight.squeeze(1).repeat(len(key), 1, 1, 1)

    def loss(w: Tensor) -> Tensor:
        windows = F.unfold(key, 3, padding=1).unflatten(1, (key.shape[1], 9))
        out = torch.einsum("bctn,bct->bcn", windows, w.flatten(2))
        return -(out * value.flatten(2)).sum() / (3 * value[0, 0].numel())

    [found] = _gradients(loss, [weights])
    return weights - rate * found / (found.norm(dim=(-2, -1), keepdim=True) + 1)


inner_tokens = reading(trained_unit, trained_conv)
