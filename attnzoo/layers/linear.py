"""Linear layers as diffusion transformers initialise them, and functions behind them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as of_modules

from attnzoo.ops.dispatch import has_fused_gelu
from attnzoo.ops.precision import autocast_operands


def xavier_linear(in_features: int, out_features: int, bias: bool) -> nn.Linear:
    """A linear layer with Xavier-uniform weight and zero bias (DiT, arXiv 2212.09748)."""
    layer = nn.Linear(in_features, out_features, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def is_bare(layer: nn.Module) -> bool:
    """Whether a call of a layer is ``F.linear``: no hook, adapter or other forward."""
    if type(layer) is not nn.Linear:
        return False
    own = layer.__dict__
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or "forward" in own
        or "_compiled_call_impl" in own
        or of_modules._global_forward_hooks
        or of_modules._global_forward_pre_hooks
    )


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
