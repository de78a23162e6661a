"""What a decision is, and routing as it is written."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from attnzoo.ops.precision import autocast_operands

RouterGradient = Literal["ste", "none"]


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
        return None if self.logits is None else softmax_of(self.logits)


def softmax_of(logits: Tensor) -> Tensor:
    # On CPU a softmax over a few contiguous entries costs ten times one over strided columns.
    return logits.movedim(-1, 0).contiguous().softmax(0).movedim(0, -1)


def gated(x: Tensor, routed: Route, gradient: RouterGradient) -> Tensor:
    """See ``attnzoo.ops.routed_linear``."""
    if gradient == "none" or routed.logits is None:
        return x
    chosen = routed.logits.softmax(-1).gather(-1, routed.index.unsqueeze(-1))
    return x * (chosen / chosen.detach()).to(x.dtype)


def routed_scalar(routed: Route, scalars: Tensor, gradient: RouterGradient) -> Tensor:
    """See ``attnzoo.ops.routed_linear``."""
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
