"""Routers of DyDiLA (arXiv 2601.13683), and what a training log wants to know of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.ops.routed_linear import Route, usage_of


class Router(nn.Module):
    """A bias-free linear router; ``attnzoo.ops.routed_linear`` takes its weight.

    Args:
        dim: Width of what it reads.
        choices: How many there are.
    """

    def __init__(self, dim: int, choices: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(choices, dim))
        nn.init.xavier_uniform_(self.weight)

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
