"""Scaled dot-product attention and the backends that compute it."""

from __future__ import annotations

import importlib
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.precision import in_float32

SoftmaxImpl = Literal["auto", "naive", "sdpa", "flash", "xformers"]


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
    if impl == "naive":
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
def naive_softmax_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Twin of ``softmax_attention`` that materialises the attention map."""
    return naive_softmax_map(query, key) @ value


@in_float32
def naive_softmax_map(query: Tensor, key: Tensor) -> Tensor:
    """The map of ``softmax_attention``: (..., n, d), (..., m, d) -> (..., n, m)."""
    scores = torch.einsum("...nd,...md->...nm", query, key) * query.shape[-1] ** -0.5
    return scores.softmax(-1)


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
