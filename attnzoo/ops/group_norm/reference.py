"""The group norm as it is written."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.ops.precision import in_float32


@in_float32
def group_norm(
    x: Tensor, shift: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float,
    slope: float = 1.0,
) -> Tensor:  # fmt: skip
    """See ``attnzoo.ops.group_norm``."""
    parts = (x + shift).unflatten(-1, (groups, -1))
    parts = parts - parts.mean((1, 3), keepdim=True)
    normed = (parts / (parts.square().mean((1, 3), keepdim=True) + eps).sqrt()).flatten(2)
    out = normed * weight + bias
    return torch.where(out > 0, out, slope * out)
