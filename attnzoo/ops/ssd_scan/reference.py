"""The scan of Mamba-2 as the recurrence, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.ops.precision import in_float32


@in_float32
def ssd_scan(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """See ``attnzoo.ops.ssd_scan``."""
    state = x.new_zeros(x.shape[0], x.shape[2], b.shape[-1], x.shape[3])
    outputs = []
    tokens = (z.unbind(1) for z in (x, log_decay.exp(), b, c))
    for x_t, decay, b_t, c_t in zip(*tokens, strict=True):
        taken = b_t[:, None, :, None] * x_t.unsqueeze(-2)
        state = decay[..., None, None] * state + taken
        outputs.append(c_t[:, None, None] @ state)
    return torch.stack(outputs, dim=1).squeeze(-2)
