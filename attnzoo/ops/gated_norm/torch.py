"""The gated norm by PyTorch's operators."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.precision import in_float32


@in_float32
def _gated_norm(gate: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (F.rms_norm(x, x.shape[-1:], weight, eps) * F.silu(gate)).flatten(2)


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ``attnzoo.ops.gated_norm``."""
    return _gated_norm(gate, x, weight, eps)
