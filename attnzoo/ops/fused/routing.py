"""Operators that route tokens and project each by the matrix it chose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.fused.products import wide_bmm
from attnzoo.ops.fused.support import kernels, on_its_device, operator


@operator("routed_gates")
def _routed_gates(x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    index, probability = kernels().top1(x, first, second)
    return x.new_ones(2, x.shape[0], dtype=torch.float32), index, probability


@_routed_gates.register_fake
def _(x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    padded = -(-first.shape[0] // 8) * 8
    return (
        x.new_empty(2, x.shape[0], dtype=torch.float32),
        x.new_empty(2 * x.shape[0], dtype=torch.int32),
        x.new_empty(x.shape[0], 2, padded, dtype=torch.float32),
    )


def _gates_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output[1:])


@operator("routed_gates_backward")
def _routed_gates_backward(
    grad: Tensor, x: Tensor, first: Tensor, second: Tensor, index: Tensor, probability: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient that each token's chosen probability, over itself, hands its router."""
    rows, _, padded = probability.shape
    experts = first.shape[0]
    offset = torch.arange(2, device=x.device)[:, None] * experts
    chosen = (index.view(2, rows) - offset).t().unsqueeze(-1)
    mine = chosen == torch.arange(padded, device=x.device)
    grad_logits = (grad.t().unsqueeze(-1) * (mine.float() - probability)).to(x.dtype)
    grad_logits = grad_logits.flatten(1)
    pad = (0, 0, 0, padded - experts)
    routers = torch.cat([F.pad(first, pad), F.pad(second, pad)]).to(x.dtype)
    grad_routers = wide_bmm(grad_logits.t()[None], x[None], is_wide=True)[0]
    grad_first, grad_second = grad_routers.unflatten(0, (2, padded))[:, :experts]
    return (
        grad_logits @ routers,
        # Copies: an operator's results may not share memory.
        grad_first.to(first.dtype, copy=True),
        grad_second.to(second.dtype, copy=True),
    )


@_routed_gates_backward.register_fake
def _(
    grad: Tensor, x: Tensor, first: Tensor, second: Tensor, index: Tensor, probability: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), first.new_empty(first.shape), second.new_empty(second.shape)


def _gates_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    return (None,) * 3 if grad is None else _routed_gates_backward(grad, *ctx.saved_tensors)


_routed_gates.register_autograd(_gates_backward, setup_context=_gates_setup)


@operator("grouped_projection")
def _grouped_projection(
    x: Tensor, first: Tensor, second: Tensor, index: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    launch = kernels()
    order, ends = launch.sort_by_expert(index, 2 * first.shape[0])
    out = launch.grouped_product(x, first.contiguous(), order, ends, second.contiguous())
    return out, order, ends


@_grouped_projection.register_fake
def _(x: Tensor, first: Tensor, second: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(index.shape[0], first.shape[2]),
        torch.empty_like(index, dtype=torch.int32),
        index.new_empty(2 * first.shape[0], dtype=torch.int32),
    )


@operator("grouped_projection_backward")
def _grouped_projection_backward(
    grad: Tensor, x: Tensor, first: Tensor, second: Tensor, order: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    launch = kernels()
    first, second = first.contiguous(), second.contiguous()
    both = launch.grouped_product(grad, first.mT, order, ends, second.mT)
    grad_weight = launch.grouped_weight_gradient(x, grad, order, ends, 2 * first.shape[0])
    first_grad, second_grad = both.view(2, *x.shape).unbind(0)
    return first_grad + second_grad, grad_weight


@_grouped_projection_backward.register_fake
def _(
    grad: Tensor, x: Tensor, first: Tensor, second: Tensor, order: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(2 * first.shape[0], *first.shape[1:])


def _grouped_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.save_for_backward(*inputs[:3], *output[1:])
    ctx.set_materialize_grads(False)


def _grouped_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, first, second, order, ends = ctx.saved_tensors
    grad_x, grad_weight = _grouped_projection_backward(
        grad.contiguous(), x, first, second, order, ends
    )
    experts = first.shape[0]
    return grad_x, grad_weight[:experts], grad_weight[experts:], None


_grouped_projection.register_autograd(_grouped_backward, setup_context=_grouped_setup)


def grouped_projection(x: Tensor, first: Tensor, second: Tensor, index: Tensor) -> Tensor:
    """Two routed projections of the same tokens as one grouped product, with its sort.

    Args:
        x: (t, d).
        first: Projectors, (experts, d, e).
        second: Likewise.
        index: Choices of the first, then those of the second plus ``experts``, (2 t,) int32.

    Returns:
        (2, t, e).
    """
    return _grouped_projection(x, first, second, index)[0].unflatten(0, (2, x.shape[0]))


def routed_pair(
    x: Tensor,
    routers: Sequence[Tensor],
    projectors: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Two routed projections of the same tokens: decisions, sorting and both products.

    Args:
        x: (b, n, d).
        routers: Two of (experts, d).
        projectors: Two of (experts, d, e).

    Returns:
        Projected tokens (2, b, n, e); choices (2, b, n), those of the second plus ``experts``;
        and gates (2, b, n) of value 1, by which the tokens count as multiplied: whoever uses the
        tokens must return the gates' gradients, and the routers learn from those.
    """
    tokens = x.flatten(0, 1)
    gates, index, _ = _routed_gates(tokens, *routers)
    out = grouped_projection(tokens, *projectors, index)
    shape = (2, *x.shape[:2])
    return out.unflatten(1, x.shape[:2]), index.view(shape), gates.view(shape)


@on_its_device
def device_routed_projection(x: Tensor, weight: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """``attnzoo::routed_projection`` on a GPU: (t, k), (experts, k, n), (t,) -> (t, n) and a plan.

    The plan, (2 t + experts,) int64, holds the order, t entries that nothing needs here, and
    where each expert's segment ends.
    """
    launch, rows = kernels(), x.shape[0]
    plan = torch.empty(2 * rows + weight.shape[0], dtype=torch.int64, device=x.device)
    order, ends = launch.sort_by_expert(index, weight.shape[0], plan[:rows], plan[2 * rows :])
    return launch.grouped_product(x, weight, order, ends), plan


@on_its_device
def device_routed_projection_backward(
    grad: Tensor, x: Tensor, weight: Tensor, plan: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of ``device_routed_projection`` with respect to x and weight."""
    launch, rows = kernels(), x.shape[0]
    order, ends = plan[:rows], plan[2 * rows :]
    grad_x = launch.grouped_product(grad, weight.mT, order, ends)
    return grad_x, launch.grouped_weight_gradient(x, grad, order, ends, weight.shape[0])
