"""Top-1 routing: decisions, gates that carry a gradient, and projections of routed tokens."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.precision import autocast_operands, in_float32

RouterGradient = Literal["ste", "none", "softgate", "gumbel"]


class Route(NamedTuple):
    """One decision per token.

    Attributes:
        index: The chosen expert, (...,), int64; ties go to the first.
        probability: Softmax of the router's logits, (..., experts), or None where nothing
            needs it.
    """

    index: Tensor
    probability: Tensor | None


@in_float32
def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """Logits of a linear router in float32: (..., d), (experts, d) -> (..., experts)."""
    return F.linear(x, weight)


def route(logits: Tensor, gradient: RouterGradient, training: bool = False) -> Route:
    """Chooses the expert of the largest logit (DyDiLA, arXiv 2601.13683, Eqs. 1, 6, 7).

    Args:
        logits: (..., experts).
        gradient: How the router learns, see ``gate`` and ``routed_scalar``. "gumbel" adds
            Gumbel noise to the logits in training.
        training: Whether noise may be added.

    Returns:
        The decisions.
    """
    if gradient == "gumbel" and training:
        exponential = torch.empty_like(logits).exponential_()
        logits = logits - exponential.clamp_min(torch.finfo(logits.dtype).tiny).log()
    needs_probability = gradient == "softgate" or (
        gradient != "none" and torch.is_grad_enabled() and logits.requires_grad
    )
    return Route(logits.argmax(-1), logits.softmax(-1) if needs_probability else None)


def gate(routed: Route, gradient: RouterGradient) -> Tensor | None:
    """Factor of the chosen expert's output, (..., 1), through which its router learns.

    "ste" and "gumbel" give p / stop_gradient(p): exactly 1 in the forward, the gradient of p in
    the backward. "softgate" gives p itself. "none" gives None.
    """
    if gradient == "none" or routed.probability is None:
        return None
    chosen = routed.probability.gather(-1, routed.index.unsqueeze(-1))
    return chosen if gradient == "softgate" else chosen / chosen.detach()


def routed_scalar(routed: Route, scalars: Tensor, gradient: RouterGradient) -> Tensor:
    """The scalar that each token chose: (experts,) -> (..., 1).

    "ste" and "gumbel" add sum_j (p_j - stop_gradient(p_j)) s_j, which is exactly 0, so that the
    router receives a gradient once the scalars differ. "softgate" mixes all scalars by p.
    """
    if gradient == "softgate":
        assert routed.probability is not None
        return (routed.probability * scalars).sum(-1, keepdim=True)
    chosen = scalars[routed.index].unsqueeze(-1)
    if gradient == "none" or routed.probability is None:
        return chosen
    surrogate = routed.probability - routed.probability.detach()
    return chosen + (surrogate * scalars.detach()).sum(-1, keepdim=True)


def balance_loss(routed: Route) -> Tensor:
    """Switch-style load balancing: experts * sum_e usage_e * mean probability_e; 1 if uniform."""
    assert routed.probability is not None
    experts = routed.probability.shape[-1]
    usage = F.one_hot(routed.index, experts).to(routed.probability).flatten(0, -2).mean(0)
    return experts * (usage * routed.probability.flatten(0, -2).mean(0)).sum()


def _sort(index: Tensor, experts: int) -> tuple[Tensor, list[int]]:
    """Order that puts each expert's tokens side by side, and the segments' lengths."""
    return index.argsort(stable=True), torch.bincount(index, minlength=experts).tolist()


def _inverse(order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return inverse


# A custom operator, because the segments' lengths depend on data: the compiler then sees one
# node of known shape, and a change of routing neither breaks the graph nor recompiles it.
@torch.library.custom_op("attnzoo::routed_projection", mutates_args=())
def _routed_projection(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    order, counts = _sort(index, weight.shape[0])
    tokens = x.index_select(0, order)
    out = x.new_empty(x.shape[0], weight.shape[2])
    start = 0
    for expert, count in enumerate(counts):
        if count:
            torch.mm(tokens[start : start + count], weight[expert], out=out[start : start + count])
        start += count
    # Gathering by the inverse order is several times cheaper than scattering by the order.
    return out.index_select(0, _inverse(order))


@_routed_projection.register_fake
def _(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@torch.library.custom_op("attnzoo::routed_projection_backward", mutates_args=())
def _routed_projection_backward(
    grad: Tensor, x: Tensor, weight: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    order, counts = _sort(index, weight.shape[0])
    grad, tokens = grad.index_select(0, order), x.index_select(0, order)
    grad_x = torch.empty_like(tokens)
    grad_weight = torch.zeros_like(weight)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            segment = slice(start, start + count)
            torch.mm(grad[segment], weight[expert].t(), out=grad_x[segment])
            torch.mm(tokens[segment].t(), grad[segment], out=grad_weight[expert])
        start += count
    return grad_x.index_select(0, _inverse(order)), grad_weight


@_routed_projection_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, index = ctx.saved_tensors
    return *_routed_projection_backward(grad.contiguous(), x, weight, index), None


_routed_projection.register_autograd(_backward, setup_context=_setup_context)


def routed_projection(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """Projects each token by its own projector: out_i = x_i W_{index_i} (DyDiLA, Eq. 2).

    Each token meets one projector only: tokens are sorted into one segment per projector.

    Args:
        x: (..., d_in).
        weight: (projectors, d_in, d_out).
        index: (...,), int64.

    Returns:
        (..., d_out), in the dtype a matmul would give.
    """
    x, weight = autocast_operands(x, weight)
    tokens = x.reshape(-1, x.shape[-1])
    out = _routed_projection(tokens, weight, index.reshape(-1))
    return out.unflatten(0, x.shape[:-1])


def naive_routed_projection(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """Twin of ``routed_projection``: every token meets every projector, then one is kept."""
    x, weight = autocast_operands(x, weight)
    everything = torch.einsum("...i,eio->...eo", x, weight)
    chosen = index[..., None, None].expand(*index.shape, 1, weight.shape[2])
    return everything.gather(-2, chosen).squeeze(-2)
