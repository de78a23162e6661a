"""The gated delta rule as the recurrence, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.ops.precision import in_float32


@in_float32
def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, strength: Tensor
) -> Tensor:
    """See ``attnzoo.ops.delta_rule``."""
    state = query.new_zeros(*query.shape[:2], query.shape[-1], value.shape[-1])
    outputs = []
    # Unbound once: a select per step would make the backward quadratic in n.
    tokens = [z.unbind(2) for z in (query, key, value, log_decay.exp(), strength)]
    for q, k, v, decay, b in zip(*tokens, strict=True):
        state = decay[..., None, None] * state
        error = v - (k.unsqueeze(-2) @ state).squeeze(-2)
        state = state + k.unsqueeze(-1) @ (b.unsqueeze(-1) * error).unsqueeze(-2)
        outputs.append(q.unsqueeze(-2) @ state)
    return torch.cat(outputs, dim=2)
