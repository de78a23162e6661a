"""Linear layers as diffusion transformers initialise them, and functions behind them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.ops.dispatch import has_fused_gelu, is_bare
from attnzoo.ops.linear_core import elu_plus_one as elu_plus_one  # for mechanisms of your own
from attnzoo.ops.precision import autocast_operands


def xavier_linear(in_features: int, out_features: int, bias: bool) -> nn.Linear:
    """A linear layer with Xavier-uniform weight and zero bias (DiT, arXiv 2212.09748)."""
    layer = nn.Linear(in_features, out_features, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def linear_gelu(layer: nn.Module, x: Tensor) -> Tensor:
    """GELU(layer(x)) by the tanh approximation, (..., in) -> (..., out), in one kernel if it can.

    That kernel rounds once, after the activation.
    """
    # The layer is looked at last, so that where there is no such kernel a compiler guards nothing.
    if type(layer) is nn.Linear and has_fused_gelu(x, layer) and is_bare(layer):
        rows = x.reshape(-1, x.shape[-1])
        rows, weight, bias = autocast_operands(rows, layer.weight, layer.bias)
        fused = torch._addmm_activation  # pyright: ignore[reportPrivateImportUsage]
        out = fused(bias, rows, weight.t(), use_gelu=True)
        return out.view(*x.shape[:-1], layer.out_features)
    return F.gelu(layer(x), approximate="tanh")
