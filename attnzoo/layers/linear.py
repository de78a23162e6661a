"""Linear layers as diffusion transformers initialise them, and a kernel function of several."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as of_modules

from attnzoo.ops.precision import in_wide_range


def xavier_linear(in_features: int, out_features: int, bias: bool) -> nn.Linear:
    """A linear layer with Xavier-uniform weight and zero bias (DiT, arXiv 2212.09748)."""
    layer = nn.Linear(in_features, out_features, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x), without the module's call, which takes a host as long as the product does.

    Not so where a gradient, a compiler, a hook, an adapter or another forward is at work.
    """
    if type(layer) is nn.Linear and not torch.is_grad_enabled():
        own = layer.__dict__
        is_own = not (
            torch.compiler.is_dynamo_compiling()
            or own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or "forward" in own
            or "_compiled_call_impl" in own
            or of_modules._global_forward_hooks
            or of_modules._global_forward_pre_hooks
        )
        if is_own:
            return F.linear(x, own["_parameters"]["weight"], own["_parameters"]["bias"])
    return layer(x)


def elu_plus_one(z: Tensor) -> Tensor:
    """ELU(z) + 1, the positive kernel function of Linear Transformers (arXiv 2006.16236).

    As ReLU(z) + exp(min(z, 0)): -1 + 1 would leave nothing of a small exponential.
    """
    z = in_wide_range(z)
    return F.relu(z) + z.clamp_max(0).exp()
