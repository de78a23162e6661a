"""Softmax attention by PyTorch's fused operator."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.dispatch import can_look, transforms

_STEEP = 1e6  # a score whose rounding error changes its exponential by a tenth


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None
) -> Tensor:
    """See ``attnzoo.ops.softmax``; ``bias`` is added to the scores, (..., n, m)."""
    if "jvp" not in transforms():
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):  # the only one whose jvp PyTorch has
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


def is_steep(query: Tensor, key: Tensor) -> bool:
    """Whether scores may be so large that torch's fused attention has no finite gradient.

    Its backward computes exp(score - log of the sum) anew: a rounding error of a score beyond
    1e9 is an exponent beyond 88. Looks at the data where that is free of waiting, on a CPU, and
    only if there will be a backward.
    """
    if not can_look(query) or not query.numel():
        return False
    if not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)):
        return False
    norms = (torch.linalg.vector_norm(z.detach(), dim=-1).amax().item() for z in (query, key))
    return math.prod(norms) * query.shape[-1] ** -0.5 > _STEEP
