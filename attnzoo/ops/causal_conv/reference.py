"""The causal convolution, tap by tap."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.precision import in_float32


@in_float32
def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool = False) -> Tensor:
    """See ``attnzoo.ops.causal_conv``."""
    n, taps = x.shape[1], weight.shape[-1]
    out = bias
    for tap in range(taps):
        back = taps - 1 - tap
        shifted = F.pad(x, (0, 0, 0, back))[:, back:] if reverse else F.pad(x, (0, 0, back, 0))
        out = out + weight[:, 0, tap] * shifted[:, :n]
    return out * out.sigmoid()
