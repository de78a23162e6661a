"""The causal convolution by PyTorch's, on the channels before the tokens."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool = False) -> Tensor:
    """See ``attnzoo.ops.causal_conv``."""
    before = weight.shape[-1] - 1
    x = F.pad(x, (0, 0, 0, before) if reverse else (0, 0, before, 0)).transpose(1, 2)
    weight = weight.flip(-1) if reverse else weight
    return F.silu(F.conv1d(x, weight, bias, groups=weight.shape[0]).transpose(1, 2))
