"""Routers of DyDiLA (arXiv 2601.13683): what a token chooses, and what it gets for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.ops.routed_linear import (
    Route,
    RouterGradient,
    gated,
    route,
    routed_linear,
    routed_scalar,
    router_logits,
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
        weights = self.weight.split([part.shape[-1] for part in parts], dim=-1)
        logits = [router_logits(x, w) for x, w in zip(parts, weights, strict=True)]
        return route(sum(logits[1:], logits[0]), self.gradient, self.training)

    def project(self, x: Tensor, projectors: Tensor, is_naive: bool) -> tuple[Tensor, Route]:
        """Each token by the projector it chooses (Eqs. 1-2), and the decisions.

        Args:
            x: (..., dim).
            projectors: (choices, dim, d_out).
            is_naive: Whether every token meets every projector.

        Returns:
            (..., d_out), and one decision per token.
        """
        routed = self(x)
        impl = "reference" if is_naive else "auto"
        out = routed_linear(x, projectors, routed.index, impl=impl)
        return gated(out, routed, self.gradient, impl=impl), routed

    def pick(self, *parts: Tensor, scalars: Tensor, is_naive: bool) -> tuple[Tensor, Route]:
        """The scalar that each token chooses (Eqs. 6-7), and the decisions.

        Args:
            parts: See ``forward``.
            scalars: (choices,).
            is_naive: Whether the straight-through gradient is written out.

        Returns:
            (..., 1), and one decision per token.
        """
        routed = self(*parts)
        impl = "reference" if is_naive else "auto"
        return routed_scalar(routed, scalars, self.gradient, impl=impl), routed

    def describe(self, routed: Route) -> dict[str, Tensor]:
        """The share of tokens that each choice received, and the softmax's mean entropy in nats.

        The entropy is left out where the decisions kept no logits.
        """
        said = {"usage": usage_of(routed.index, self.weight.shape[0])}
        if routed.probability is not None:
            said["entropy"] = torch.special.entr(routed.probability.float()).sum(-1).mean()
        return said


def as_numbers(said: dict[str, Any]) -> dict[str, Any]:
    """Tensors, in dictionaries, as numbers and lists, fetched from the device all at once."""
    groups = [z.values() if isinstance(z, dict) else [z] for z in said.values()]
    answers = [z for group in groups for z in group]
    if not answers:
        return {}
    fetched = torch.cat([z.detach().float().flatten() for z in answers]).cpu()
    parts = iter(fetched.split([z.numel() for z in answers]))

    def number(z: Any) -> Any:
        if isinstance(z, dict):
            return {name: number(part) for name, part in z.items()}
        return next(parts).view(z.shape).tolist()

    return number(said)
