"""Scaled dot-product attention and the backends that compute it."""

from __future__ import annotations

import importlib
import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.precision import in_float32

SoftmaxImpl = Literal["auto", "naive", "sdpa", "flash", "xformers"]
_STEEP = 1e6  # a score whose rounding error changes its exponential by a tenth


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, impl: SoftmaxImpl = "auto"
) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V.

    Args:
        query: (batch, heads, n, d).
        key: (batch, heads, m, d).
        value: (batch, heads, m, e).
        impl: "sdpa" is torch's fused attention, "flash" the flash-attn package, "xformers"
            memory-efficient attention, "naive" the twin below; "auto" is "sdpa".

    Returns:
        (batch, heads, n, e).

    Raises:
        RuntimeError: The named backend is missing or cannot take these tensors; nothing else is
            used in its place.
    """
    if impl == "naive" or (impl in ("auto", "sdpa") and is_steep(query, key)):
        return naive_softmax_attention(query, key, value)
    if impl in ("auto", "sdpa"):
        return F.scaled_dot_product_attention(query, key, value)
    package, function, remedy = {
        "flash": ("flash_attn", "flash_attn_func", "pip install flash-attn"),
        "xformers": ("xformers.ops", "memory_efficient_attention", "pip install xformers"),
    }[impl]
    # Both packages want (batch, n, heads, d).
    operands = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    try:
        out = getattr(importlib.import_module(package), function)(*operands)
    except (ImportError, NotImplementedError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RuntimeError(
            f"impl={impl!r} cannot run on {query.device.type} with {query.dtype}: {reason} "
            f"({remedy}, on a CUDA device with float16 or bfloat16; or choose impl='sdpa')"
        ) from error
    return out.transpose(1, 2)


@in_float32
def naive_softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Reference of ``softmax_attention`` that materialises the attention map."""
    return naive_softmax_map(query, key, bias) @ value


def is_steep(query: Tensor, key: Tensor) -> bool:
    """Whether scores may be so large that torch's fused attention has no finite gradient.

    Its backward computes exp(score - log of the sum) anew: a rounding error of a score beyond
    1e9 is an exponent beyond 88. Looks at the data where that is free of waiting, on a CPU, and
    only if there will be a backward.
    """
    if query.device.type != "cpu" or torch.compiler.is_compiling() or not query.numel():
        return False
    if not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)):
        return False
    norms = (torch.linalg.vector_norm(z.detach(), dim=-1).amax().item() for z in (query, key))
    return math.prod(norms) * query.shape[-1] ** -0.5 > _STEEP


@in_float32
def naive_softmax_map(query: Tensor, key: Tensor, bias: Tensor | None = None) -> Tensor:
    """The map of ``softmax_attention``: (..., n, d), (..., m, d) -> (..., n, m)."""
    scores = torch.einsum("...nd,...md->...nm", query, key) * query.shape[-1] ** -0.5
    return (scores if bias is None else scores + bias).softmax(-1)


def why_unavailable(
    impl: SoftmaxImpl, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> str | None:
    """Calls a backend once on a few tokens; returns None if it works, or else the reason.

    A package that imports may still have no kernel for the device, so only a call tells.
    """
    probe = torch.zeros(1, 1, 16, 32, device=device, dtype=dtype)
    try:
        softmax_attention(probe, probe, probe, impl)
    except RuntimeError as error:
        return str(error)
    return None
