"""The normalized difference by PyTorch's operators."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.precision import in_float32


@in_float32
def _difference(first: Tensor, second: Tensor, factor: Tensor) -> Tensor:
    return first - factor * second


@in_float32
def _scaled_norm(x: Tensor, weight: Tensor, eps: float, scale: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps) * scale


def normed_difference(
    first: Tensor, second: Tensor, factor: Tensor, weight: Tensor, eps: float, scale: float
) -> Tensor:
    """See ``attnzoo.ops.normed_difference``."""
    out = _scaled_norm(_difference(first, second, factor), weight, eps, scale)
    return out.transpose(1, 2).flatten(2)
