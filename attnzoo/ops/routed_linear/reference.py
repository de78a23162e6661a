"""Routing as it is written."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.ops.precision import autocast_operands
from attnzoo.ops.routed_linear.torch import Route, RouterGradient


def gated(x: Tensor, routed: Route, gradient: RouterGradient) -> Tensor:
    """See ``attnzoo.ops.routed_linear``."""
    if gradient == "none" or routed.logits is None:
        return x
    chosen = routed.logits.softmax(-1).gather(-1, routed.index.unsqueeze(-1))
    return x * (chosen if gradient == "softgate" else chosen / chosen.detach()).to(x.dtype)


def routed_scalar(routed: Route, scalars: Tensor, gradient: RouterGradient) -> Tensor:
    """See ``attnzoo.ops.routed_linear``."""
    if gradient == "softgate":
        assert routed.logits is not None
        return (routed.logits.softmax(-1) * scalars).sum(-1, keepdim=True)
    chosen = scalars[routed.index].unsqueeze(-1)
    if gradient == "none" or routed.logits is None:
        return chosen
    probability = routed.logits.softmax(-1)
    surrogate = probability - probability.detach()
    return chosen + (surrogate * scalars.detach()).sum(-1, keepdim=True)


def routed_linear(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """See ``attnzoo.ops.routed_linear``."""
    x, weight = autocast_operands(x, weight)
    everything = torch.einsum("...i,eio->...eo", x, weight)
    chosen = index[..., None, None].expand(*index.shape, 1, weight.shape[2])
    return everything.gather(-2, chosen).squeeze(-2)
