"""Linear layers as diffusion transformers initialise them."""

from __future__ import annotations

from torch import nn


def xavier_linear(in_features: int, out_features: int, bias: bool) -> nn.Linear:
    """A linear layer with Xavier-uniform weight and zero bias (DiT, arXiv 2212.09748)."""
    layer = nn.Linear(in_features, out_features, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
