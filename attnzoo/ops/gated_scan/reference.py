"""Gated linear attention as the recurrence, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.ops.precision import in_float32


@in_float32
def gated_linear_attention(query: Tensor, key: Tensor, value: Tensor, log_gate: Tensor) -> Tensor:
    """See ``attnzoo.ops.gated_scan``."""
    state = query.new_zeros(*query.shape[:2], query.shape[-1], value.shape[-1])
    outputs = []
    # Unbound once: a select per step would make the backward quadratic in n.
    tokens = [z.unbind(2) for z in (query, key, value, log_gate.exp())]
    for q, k, v, decay in zip(*tokens, strict=True):
        state = decay.unsqueeze(-1) * state + k.unsqueeze(-1) @ v.unsqueeze(-2)
        outputs.append(q.unsqueeze(-2) @ state)
    return torch.cat(outputs, dim=2)
