"""The selective scan as the recurrence, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.ops.precision import in_float32


@in_float32
def selective_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """See ``attnzoo.ops.selective_scan``."""
    state = x.new_zeros(x.shape[0], *a.shape)
    outputs = []
    for x_t, dt_t, b_t, c_t in zip(*(z.unbind(1) for z in (x, dt, b, c)), strict=True):
        taken = (dt_t * x_t).unsqueeze(-1) * b_t.unsqueeze(-2)
        state = (dt_t.unsqueeze(-1) * a).exp() * state + taken
        outputs.append(state @ c_t.unsqueeze(-1))
    return torch.stack(outputs, dim=1).squeeze(-1)
