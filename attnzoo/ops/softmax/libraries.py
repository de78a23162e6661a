"""Softmax attention by the packages flash-attn and xformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnzoo.errors import Unavailable
from attnzoo.ops.optional import ANYTHING, load, reason

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


def library_attention(query: Tensor, key: Tensor, value: Tensor, impl: str) -> Tensor:
    """See ``attnzoo.ops.softmax``; by the package that ``impl`` names."""
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
            f"({remedy}, on a CUDA device with float16 or bfloat16; or choose impl='torch')"
        ) from error


def _first_of(places: tuple[tuple[str, str], ...]) -> Callable[..., Any]:
    reasons = []
    for module, function in places:
        try:
            return load(module, function)
        except ImportError as error:
            reasons.append(str(error))
    raise ImportError("; ".join(dict.fromkeys(reasons)))
