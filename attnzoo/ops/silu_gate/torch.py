"""The gate by PyTorch's operators."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.precision import in_float32


def silu_gate(x: Tensor, gate: Tensor, other: Tensor | None = None) -> Tensor:
    """See ``attnzoo.ops.silu_gate``."""
    return _product(x if other is None else x + other, gate).to(gate.dtype)


@in_float32
def _product(x: Tensor, gate: Tensor) -> Tensor:
    return x * F.silu(gate)
