"""The gated norm as it is written."""

from __future__ import annotations

from torch import Tensor

from attnzoo.ops.precision import in_float32


@in_float32
def _gated_norm(gate: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    normed = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return (normed * gate / (1 + (-gate).exp())).flatten(2)


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ``attnzoo.ops.gated_norm``."""
    return _gated_norm(gate, x, weight, eps)
