"""Routers of DyDiLA (arXiv 2601.13683): what a token chooses, and what it gets for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.ops.dispatch import Impl
from attnzoo.ops.routed_linear import (
    Route,
    RouterGradient,
    decide,
    gated,
    routed_linear,
    routed_scalar,
    usage_of,
)


class Router(nn.Module):
    """A bias-free linear router that chooses one of ``choices`` for every token.

    Args:
        dim: Width of what it reads.
        choices: How many there are.
        gradient: How it learns, see ``attnzoo.ops.routed_linear``.
    """

    def __init__(self, dim: int, choices: int, gradient: RouterGradient) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(choices, dim))
        nn.init.xavier_uniform_(self.weight)
        self.gradient: RouterGradient = gradient

    def forward(self, *parts: Tensor) -> Route:
        """Tokens, in parts that side by side are (..., dim) -> one decision per token."""
        return decide(self.weight, parts, self.gradient)

    def project(self, x: Tensor, projectors: Tensor, impl: Impl) -> tuple[Tensor, Route]:
        """Each token by the projector it chooses (Eqs. 1-2), and the decisions.

        Args:
            x: (..., dim).
            projectors: (choices, dim, d_out).
            impl: See ``attnzoo.ops.dispatch``.

        Returns:
            (..., d_out), and one decision per token.
        """
        routed = decide(self.weight, [x], self.gradient)
        projected = routed_linear(x, projectors, routed.index, impl=impl)
        return gated(projected, routed, self.gradient, impl=impl), routed

    def pick(self, *parts: Tensor, scalars: Tensor, impl: Impl) -> tuple[Tensor, Route]:
        """The scalar that each token chooses (Eqs. 6-7), and the decisions.

        Args:
            parts: See ``forward``.
            scalars: (choices,).
            impl: See ``attnzoo.ops.dispatch``.

        Returns:
            (..., 1), and one decision per token.
        """
        routed = decide(self.weight, parts, self.gradient)
        return routed_scalar(routed, scalars, self.gradient, impl=impl), routed

    def describe(self, routed: Route) -> dict[str, Tensor]:
        """The share of tokens that each choice received, and the softmax's mean entropy in nats.

        The entropy is left out where the decisions come without logits.
        """
        found = {"usage": usage_of(routed.index, self.weight.shape[0])}
        if routed.probability is not None:
            found["entropy"] = torch.special.entr(routed.probability.float()).sum(-1).mean()
        return found


def as_numbers(found: dict[str, Any]) -> dict[str, Any]:
    """Tensors, in dictionaries, as numbers and lists, fetched from the device all at once."""
    groups = [z.values() if isinstance(z, dict) else [z] for z in found.values()]
    answers = [z for group in groups for z in group]
    if not answers:
        return {}
    fetched = torch.cat([z.detach().float().flatten() for z in answers]).cpu()
    parts = iter(fetched.split([z.numel() for z in answers]))

    def number(z: Any) -> Any:
        if isinstance(z, dict):
            return {name: number(part) for name, part in z.items()}
        return next(parts).view(z.shape).tolist()

    return number(found)
