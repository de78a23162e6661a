"""Routing by PyTorch's operators: decisions, gates that carry a gradient, sorted products."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.custom_op import custom_op
from attnzoo.ops.precision import autocast_operands, in_float32

RouterGradient = Literal["ste", "none", "softgate", "gumbel"]


class Route(NamedTuple):
    """One decision per token.

    Attributes:
        index: The chosen expert, (...,), int64; ties go to the first.
        logits: The router's logits, (..., experts), or None where nothing needs them.
    """

    index: Tensor
    logits: Tensor | None

    @property
    def probability(self) -> Tensor | None:
        """Softmax of the logits, (..., experts)."""
        return None if self.logits is None else _softmax(self.logits)


def _softmax(logits: Tensor) -> Tensor:
    # On CPU a softmax over a few contiguous entries costs ten times one over strided columns.
    return logits.movedim(-1, 0).contiguous().softmax(0).movedim(0, -1)


@in_float32
def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """Logits of a linear router in float32: (..., d), (experts, d) -> (..., experts)."""
    return F.linear(x, weight)


def route(logits: Tensor, gradient: RouterGradient, training: bool = False) -> Route:
    """Chooses the expert of the largest logit (DyDiLA, arXiv 2601.13683, Eqs. 1, 6, 7).

    Args:
        logits: (..., experts).
        gradient: How the router learns, see ``gated`` and ``routed_scalar``. "gumbel" adds
            Gumbel noise to the logits in training.
        training: Whether noise may be added.

    Returns:
        The decisions.
    """
    if gradient == "gumbel" and training:
        exponential = torch.empty_like(logits).exponential_()
        logits = logits - exponential.clamp_min(torch.finfo(logits.dtype).tiny).log()
    needs_logits = gradient == "softgate" or (
        gradient != "none" and torch.is_grad_enabled() and logits.requires_grad
    )
    # On CPU several times faster than argmax, and as sure of the first among equals.
    return Route(logits.detach().max(-1).indices, logits if needs_logits else None)


class _StraightThroughGate(torch.autograd.Function):
    """x * p / stop_gradient(p), p the chosen probability: x itself, but for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, logits: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(x, logits, index)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, logits, index = ctx.saved_tensors
        # d p / d logits over p is the chosen expert's unit vector less p.
        along = (grad * x).sum(-1, keepdim=True, dtype=logits.dtype)
        grad_logits = (_softmax(logits) * -along).scatter_add(-1, index.unsqueeze(-1), along)
        return grad, grad_logits, None


def gated(x: Tensor, routed: Route, gradient: RouterGradient) -> Tensor:
    """See ``attnzoo.ops.routed_linear``."""
    if gradient == "none" or routed.logits is None:
        return x
    if gradient != "softgate":
        return _StraightThroughGate.apply(x, routed.logits, routed.index)
    return x * _softmax(routed.logits).gather(-1, routed.index.unsqueeze(-1)).to(x.dtype)


class _StraightThroughScalar(torch.autograd.Function):
    """The chosen scalar, whose router receives the gradient of sum_j p_j scalars_j."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, scalars: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(logits, scalars, index)
        return scalars.index_select(0, index.reshape(-1)).view(*index.shape, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        logits, scalars, index = ctx.saved_tensors
        probability = _softmax(logits)
        mean = (probability * scalars).sum(-1, keepdim=True)
        grad_logits = probability * (scalars - mean) * grad
        grad_scalars = torch.zeros_like(scalars).index_add(0, index.flatten(), grad.flatten())
        return grad_logits, grad_scalars, None


def routed_scalar(routed: Route, scalars: Tensor, gradient: RouterGradient) -> Tensor:
    """See ``attnzoo.ops.routed_linear``."""
    if gradient == "softgate":
        assert routed.logits is not None
        return (_softmax(routed.logits) * scalars).sum(-1, keepdim=True)
    if gradient == "none" or routed.logits is None:
        chosen = scalars.index_select(0, routed.index.reshape(-1))
        return chosen.view(*routed.index.shape, 1)
    return _StraightThroughScalar.apply(routed.logits, scalars, routed.index)


def usage_of(index: Tensor, experts: int) -> Tensor:
    """The share of tokens that each expert received, (experts,), without waiting for a device."""
    mine = index.flatten().unsqueeze(-1) == torch.arange(experts, device=index.device)
    return mine.float().mean(0)


def balance_loss(routed: Route) -> Tensor:
    """Switch-style load balancing: experts * sum_e usage_e * mean probability_e; 1 if uniform."""
    probability = routed.probability
    assert probability is not None
    experts = probability.shape[-1]
    usage = usage_of(routed.index, experts).to(probability)
    return experts * (usage * probability.flatten(0, -2).mean(0)).sum()


def _plan(index: Tensor, experts: int) -> Tensor:
    """The order that puts each expert's tokens side by side, its inverse, and their counts."""
    order = index.argsort(stable=True)
    places = torch.arange(order.numel(), device=order.device)
    inverse = torch.empty_like(order).scatter_(0, order, places)
    return torch.cat([order, inverse, torch.bincount(index, minlength=experts)])


def _segments(counts: Tensor) -> Iterator[tuple[int, slice]]:
    start = 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            yield expert, slice(start, start + count)
        start += count


# A custom operator, because the segments' lengths depend on data: the compiler then sees one
# node of known shape, and a change of routing neither breaks the graph nor recompiles it. The
# plan is a second output, so that the backward need not sort again.
@custom_op("routed_linear")
def _routed_linear(x: Tensor, weight: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    plan = _plan(index, weight.shape[0])
    n = x.shape[0]
    tokens = x.index_select(0, plan[:n])
    out = x.new_empty(n, weight.shape[2])
    for expert, segment in _segments(plan[2 * n :]):
        torch.mm(tokens[segment], weight[expert], out=out[segment])
    del tokens
    # Gathering by the inverse order is several times cheaper than scattering by the order.
    return out.index_select(0, plan[n : 2 * n]), plan


@_routed_linear.register_fake
def _(x: Tensor, weight: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    plan = index.new_empty(2 * x.shape[0] + weight.shape[0])
    return x.new_empty(x.shape[0], weight.shape[2]), plan


@custom_op("routed_linear_backward")
def _routed_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, plan: Tensor
) -> tuple[Tensor, Tensor]:
    n = x.shape[0]
    segments = list(_segments(plan[2 * n :]))
    grad, tokens = grad.index_select(0, plan[:n]), x.index_select(0, plan[:n])
    grad_weight = torch.zeros_like(weight)
    for expert, segment in segments:
        torch.mm(tokens[segment].t(), grad[segment], out=grad_weight[expert])
    grad_x = tokens  # its memory: the tokens are no longer needed
    for expert, segment in segments:
        torch.mm(grad[segment], weight[expert].t(), out=grad_x[segment])
    del grad
    return grad_x.index_select(0, plan[n : 2 * n]), grad_weight


@_routed_linear_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, plan: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor, None]:
    return *_routed_linear_backward(grad, *ctx.saved_tensors), None


_routed_linear.register_autograd(_backward, setup_context=_setup_context)


def routed_linear(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """See ``attnzoo.ops.routed_linear``."""
    x, weight = autocast_operands(x, weight)
    tokens = x.reshape(-1, x.shape[-1])
    out, _ = _routed_linear(tokens, weight, index.reshape(-1))
    return out.unflatten(0, x.shape[:-1])
