"""Scaled dot-product attention and the backends that compute it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.errors import InvalidValue, Unavailable
from attnzoo.ops.optional import ANYTHING, load, reason
from attnzoo.ops.precision import in_float32

SoftmaxImpl = Literal["auto", "naive", "sdpa", "flash", "xformers"]
# Where the named libraries have their function, the first that can be imported, and the remedy.
_LIBRARIES = {
    "flash": (
        (("flash_attn", "flash_attn_func"), ("flash_attn.cute", "flash_attn_func")),
        "pip install flash-attn, or flash-attn-4",
    ),
    "xformers": (
        (("xformers.ops", "memory_efficient_attention"),),
        "pip install xformers",
    ),
}


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, impl: SoftmaxImpl = "auto"
) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V.

    Args:
        query: (batch, heads, n, d).
        key: (batch, heads, m, d).
        value: (batch, heads, m, e).
        impl: "sdpa" is torch's fused attention, "flash" flash-attn (2, or else 4), "xformers"
            memory-efficient attention, "naive" the twin below; "auto" is "sdpa".

    Returns:
        (batch, heads, n, e).

    Raises:
        InvalidValue: There is no such backend; or, as a RuntimeError too, it is missing or cannot
            take these tensors. Nothing else is used in its place.
    """
    if impl == "naive":
        return naive_softmax_attention(query, key, value)
    if impl in ("auto", "sdpa"):
        return F.scaled_dot_product_attention(query, key, value)
    if impl not in _LIBRARIES:
        raise InvalidValue(f"impl={impl!r} is not one of {get_args(SoftmaxImpl)}")
    places, remedy = _LIBRARIES[impl]
    # All want (batch, n, heads, d); flash-attn 4 also returns the logarithms of the sums.
    operands = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    try:
        out = _first_of(places)(*operands)
        out = out[0] if isinstance(out, tuple) else out
        return out.transpose(1, 2)
    except torch.OutOfMemoryError:
        raise
    except ANYTHING as error:
        raise Unavailable(
            f"impl={impl!r} cannot run on {query.device.type} with {query.dtype}: {reason(error)} "
            f"({remedy}, on a CUDA device with float16 or bfloat16; or choose impl='sdpa')"
        ) from error


def _first_of(places: tuple[tuple[str, str], ...]) -> Callable[..., Any]:
    reasons = []
    for module, function in places:
        try:
            return load(module, function)
        except ImportError as error:
            reasons.append(str(error))
    raise ImportError("; ".join(dict.fromkeys(reasons)))


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
    try:
        probe = torch.zeros(1, 1, 16, 32, device=device, dtype=dtype)
        softmax_attention(probe, probe, probe, impl)
    except Unavailable as error:
        return str(error)
    except ANYTHING as error:
        return reason(error)
    return None
