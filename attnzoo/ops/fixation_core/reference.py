"""Feature fixation as it is written, with its n x n maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.fixation_core.torch import shifted
from attnzoo.ops.precision import in_float32


@in_float32
def fixation_core(
    qkv: Tensor, weight: Tensor, bias: Tensor, heads: int, grid: tuple[int, int],
    is_shifted: bool, eps: float,
) -> Tensor:  # fmt: skip
    """See ``attnzoo.ops.fixation_core``."""
    parts = qkv.unflatten(-1, (3, -1)).movedim(-2, 0)
    parts = shifted(parts, grid, first=1) if is_shifted else parts
    q, k, v = parts.unflatten(-1, (heads, -1)).transpose(2, 3)
    q, k, d = F.relu(q) + q.shape[-1] ** -0.5, F.relu(k) + k.shape[-1] ** -0.5, v.shape[-1]
    gate = 1 / (1 + (-torch.cat([q, k, v], -1) @ weight.mT - bias).exp())
    similarity = (gate[..., :d] * q) @ (gate[..., -d:] * k).mT
    out = similarity @ v / (similarity.sum(-1, keepdim=True) + eps)
    return out.transpose(1, 2).flatten(2)
