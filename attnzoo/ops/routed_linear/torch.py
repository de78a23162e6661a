"""Routing by PyTorch's operators: decisions, gates that carry a gradient, sorted products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.dispatch import (
    Impl,
    choose,
    custom_op,
    has_half_sums,
    is_plain,
    is_without_kernels,
    loses_gradients,
)
from attnzoo.ops.linear_core.torch import half_matmul
from attnzoo.ops.precision import autocast_operands, in_float32, in_wide_range
from attnzoo.ops.routed_linear import reference
from attnzoo.ops.routed_linear.reference import Route, RouterGradient, softmax_of

# Multiply-accumulates that cost less than sorting tokens.
_FEW = 1 << 20
_MOST_CHOICES = 64  # of a router that a kernel holds in registers


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """Logits of a linear router in float32: (..., d), (experts, d) -> (..., experts)."""
    if is_plain(x, weight):
        return F.linear(x, weight)
    if has_half_sums(x, weight):  # products of bfloat16 are exact in float32, into which they go
        rows = x.reshape(1, -1, x.shape[-1])
        return half_matmul(rows, weight.t()[None]).to(x.dtype).view(*x.shape[:-1], -1)
    return _guarded_logits(x, weight)


@in_float32
def _guarded_logits(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


def decide(weight: Tensor, parts: Sequence[Tensor], gradient: RouterGradient) -> Route:
    """The expert of the largest logit of a linear router (DyDiLA, arXiv 2601.13683, Eqs. 1, 6, 7).

    Args:
        weight: (experts, d).
        parts: Tokens in parts that lie side by side, together (..., d).
        gradient: How the router learns, see ``gated`` and ``routed_scalar``.

    Returns:
        One decision per token.
    """
    logits_of = F.linear if is_plain(weight, *parts) else router_logits
    first, *others = parts
    start = first.shape[-1]
    logits = logits_of(first, weight[:, :start] if others else weight)
    for part in others:
        stop = start + part.shape[-1]
        logits, start = logits + logits_of(part, weight[:, start:stop]), stop
    needs_logits = gradient != "none" and torch.is_grad_enabled() and logits.requires_grad
    # On CPU several times faster than argmax, and as sure of the first among equals.
    return Route(logits.detach().max(-1).indices, logits if needs_logits else None)


def pick(
    weight: Tensor,
    parts: Sequence[Tensor],
    scalars: Tensor,
    gradient: RouterGradient,
    impl: Impl = "auto",
) -> tuple[Tensor, Route]:
    """The scalar of (experts,) that each token chooses, (..., 1), and its choice: see ``decide``.

    With "ste" the router receives the gradient of sum_j p_j scalars_j, so that it learns once the
    scalars differ.

    Args:
        weight: See ``decide``.
        parts: Likewise.
        scalars: (experts,).
        gradient: See above.
        impl: "auto" takes Triton's kernel on a GPU, which gives the scalars in float32, and
            logits that have no gradient of their own.
    """
    if impl == "auto" and _is_by_kernel(weight, parts):
        from attnzoo.ops.routed_linear import triton_scalar

        is_learned = weight.requires_grad or any(z.requires_grad for z in parts)
        learn = gradient != "none" and torch.is_grad_enabled() and is_learned
        return triton_scalar.routed_scalar(weight, parts, scalars, learn)
    routed = decide(weight, parts, gradient)
    if impl == "reference" or loses_gradients():
        return reference.routed_scalar(routed, scalars, gradient), routed
    scalars = in_wide_range(scalars)
    if routed.logits is None:
        return scalars.take(routed.index.unsqueeze(-1)), routed
    return _StraightThroughScalar.apply(routed.logits, scalars, routed.index), routed


def _is_by_kernel(weight: Tensor, parts: Sequence[Tensor]) -> bool:
    x = parts[0]
    if is_without_kernels(x) or (
        choose("routed_scalar", "auto", x, x.dtype, lambda: _unserved(weight, parts)) != "triton"
    ):
        return False
    return all(z.dtype is x.dtype and z.shape == x.shape for z in parts)


def _unserved(weight: Tensor, parts: Sequence[Tensor]) -> str | None:
    if weight.shape[0] > _MOST_CHOICES:
        return f"{weight.shape[0]} choices of a router, more than {_MOST_CHOICES}"
    if weight.dtype not in (parts[0].dtype, torch.float32) or len(parts) > 2:
        return "a router in less than its tokens' precision, or tokens in more than two parts"
    return None


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
        grad_logits = (softmax_of(logits) * -along).scatter_add(-1, index.unsqueeze(-1), along)
        return grad, grad_logits, None


def gated(x: Tensor, routed: Route, gradient: RouterGradient, *, impl: Impl = "auto") -> Tensor:
    """Multiplies the chosen expert's output, (..., d), by a gate through which its router learns.

    "ste" gates by p / stop_gradient(p): exactly 1 in the forward, the gradient of p in the
    backward. "none" gates by nothing.
    """
    if impl == "reference" or loses_gradients():
        return reference.gated(x, routed, gradient)
    if gradient == "none" or routed.logits is None:
        return x
    return _StraightThroughGate.apply(x, routed.logits, routed.index)


class _Gate(torch.autograd.Function):
    """x * gate for gates of value 1: x itself, but for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (x,) = ctx.saved_tensors
        return grad, (grad * x).sum(-1, dtype=torch.float32)


def by_ones(x: Tensor, gate: Tensor) -> Tensor:
    """x, (..., d), times gates of value 1, (...,) in float32, through which routers learn."""
    if not torch.is_grad_enabled():
        return x
    return x * gate.unsqueeze(-1).to(x.dtype) if loses_gradients() else _Gate.apply(x, gate)


class _StraightThroughScalar(torch.autograd.Function):
    """The chosen scalar, whose router receives the gradient of sum_j p_j scalars_j."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, scalars: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(logits, scalars, index)
        return scalars.take(index.unsqueeze(-1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        logits, scalars, index = ctx.saved_tensors
        probability = softmax_of(logits)
        mean = (probability * scalars).sum(-1, keepdim=True)
        grad_logits = probability * (scalars - mean) * grad
        return grad_logits, _chosen_sums(grad, index, len(scalars)).to(scalars.dtype), None


def _chosen_sums(grad: Tensor, index: Tensor, experts: int) -> Tensor:
    """The sum over all tokens that chose each expert: (..., 1), (...,) -> (experts,)."""
    index, grad = index.flatten(), grad.flatten()
    if grad.is_cpu:
        return grad.new_zeros(experts).index_add(0, index, grad)
    # A GPU would add up by index one after the other, and round each sum.
    mine = grad.new_zeros(experts, index.numel()).scatter(0, index[None], grad[None])
    return mine.sum(1, dtype=torch.promote_types(grad.dtype, torch.float32))


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


def _segments(counts: Tensor) -> list[tuple[int, slice]]:
    """The experts that tokens chose, and where each one's tokens are."""
    start, found = 0, []
    for expert, count in enumerate(counts.tolist()):
        if count:
            found.append((expert, slice(start, start + count)))
        start += count
    return found


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


@_routed_linear.register_inference
def _(x: Tensor, weight: Tensor, index: Tensor) -> tuple[Tensor, Tensor | None]:
    experts, n = weight.shape[0], x.shape[0]
    if n * weight.numel() > _FEW or not x.is_cpu:
        return _routed_linear.function(x, weight, index)
    everything = torch.bmm(x.expand(experts, -1, -1), weight).flatten(0, 1)
    place = torch.arange(n, device=x.device).add_(index, alpha=n)
    return everything.index_select(0, place), None


@custom_op("routed_linear_backward")
def _routed_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, plan: Tensor
) -> tuple[Tensor, Tensor]:
    n = x.shape[0]
    segments = _segments(plan[2 * n :])
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


def _gradients(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor, None]:
    return *_routed_linear_backward(grad, *ctx.saved_tensors), None


_routed_linear.register_autograd(_gradients, setup_context=_setup_context)


def routed_linear(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """See ``attnzoo.ops.routed_linear``."""
    if not is_plain(x, weight):
        x, weight = autocast_operands(x, weight)
    tokens = x.reshape(-1, x.shape[-1])
    out, _ = _routed_linear(tokens, weight, index.reshape(-1))
    return out.unflatten(0, x.shape[:-1])
