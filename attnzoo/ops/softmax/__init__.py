"""Scaled dot-product attention and the packages that compute it."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, float32, zeros
from torch.types import Device

from attnzoo.ops.dispatch import choose
from attnzoo.ops.optional import failure
from attnzoo.ops.softmax import flash, reference
from attnzoo.ops.softmax.libraries import library_attention
from attnzoo.ops.softmax.torch import is_steep
from attnzoo.ops.softmax.torch import softmax_attention as fused_attention

SoftmaxImpl = Literal["auto", "reference", "torch", "flash", "xformers"]

__all__ = [
    "SoftmaxImpl",
    "fused_attention",
    "is_steep",
    "softmax_attention",
    "softmax_macs",
    "why_unavailable",
]


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, impl: SoftmaxImpl = "auto"
) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V.

    Args:
        query: (batch, heads, n, d).
        key: (batch, heads, m, d).
        value: (batch, heads, m, e).
        impl: "torch" is its fused attention, "flash" flash-attn (2, or else 4), "xformers"
            memory-efficient attention; "auto" is "torch", but for scores too steep for its
            gradient (``is_steep``) the reference, and for forwards of 8,192 tokens and more in
            half precision flash-attn 4, where it is installed and the GPU is a Hopper or later.

    Returns:
        (batch, heads, n, e).

    Raises:
        InvalidValue: There is no such backend; or, as a RuntimeError too, it is missing or cannot
            take these tensors. Nothing else is used in its place.
    """
    chosen = choose("softmax_attention", impl, query)
    if chosen == "reference" or (impl == "auto" and is_steep(query, key)):
        return reference.softmax_attention(query, key, value)
    if impl == "auto" and flash.is_faster(query, key, value):
        return flash.softmax_attention(query, key, value)
    if chosen == "torch":
        return fused_attention(query, key, value)
    return library_attention(query, key, value, chosen)


def softmax_macs(queries: int, keys: int, key_dim: int, value_dim: int) -> int:
    """Multiply-accumulates of ``softmax_attention``; heads add up as their widths do."""
    return queries * keys * (key_dim + value_dim)


def why_unavailable(impl: SoftmaxImpl, device: Device = "cpu", dtype: Any = float32) -> str | None:
    """Calls a backend once on a few tokens; returns None if it works, or else the reason.

    A package that imports may still have no kernel for the device, so only a call tells.
    """

    def call() -> Tensor:
        probe = zeros(1, 1, 16, 32, device=device, dtype=dtype)
        return softmax_attention(probe, probe, probe, impl)

    return failure(call)
