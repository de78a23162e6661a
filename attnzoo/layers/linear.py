"""Linear layers as diffusion transformers initialise them, and a kernel function of several."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.ops.precision import in_wide_range


def xavier_linear(in_features: int, out_features: int, bias: bool) -> nn.Linear:
    """A linear layer with Xavier-uniform weight and zero bias (DiT, arXiv 2212.09748)."""
    layer = nn.Linear(in_features, out_features, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def elu_plus_one(z: Tensor) -> Tensor:
    """ELU(z) + 1, the positive kernel function of Linear Transformers (arXiv 2006.16236).

    As ReLU(z) + exp(min(z, 0)): -1 + 1 would leave nothing of a small exponential.
    """
    z = in_wide_range(z)
    return F.relu(z) + z.clamp_max(0).exp()
