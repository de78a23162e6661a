"""Gated linear attention by flash-linear-attention's Triton kernels, for GPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.errors import Unavailable
from attnzoo.ops.optional import ANYTHING, failure, load, reason


def require_fla() -> Any:
    """The library's kernel; raises Unavailable, naming the extra, where it cannot be imported."""
    try:
        return load("fla.ops.gla", "chunk_gla")
    except ImportError as error:
        raise Unavailable(
            f"impl='fla' needs flash-linear-attention, which cannot be imported ({error}); "
            f"pip install 'attnzoo[fla]', or leave impl='auto'"
        ) from error


def why_unavailable(device: str | torch.device) -> str | None:
    """Calls the kernel once on a few tokens; returns None if it works, or else the reason."""

    def call() -> Tensor:
        probe = torch.zeros(1, 1, 16, 32, device=device, dtype=torch.bfloat16)
        return gated_linear_attention(probe, probe, probe, probe)

    return failure(call)


def gated_linear_attention(query: Tensor, key: Tensor, value: Tensor, log_gate: Tensor) -> Tensor:
    """See ``attnzoo.ops.gated_scan``; on a GPU.

    Args:
        query: (b, h, n, dk), scaled by the caller. Products take the dtype of queries, keys and
            values, which should be half precision: of float32 the library makes TF32.
        key: (b, h, n, dk).
        value: (b, h, n, dv).
        log_gate: (b, h, n, dk), not positive; taken in float32.

    Returns:
        (b, h, n, dv), in the dtype of ``query``.

    Raises:
        Unavailable: flash-linear-attention cannot be imported or fails, or the tensors are not
            on a GPU.
    """
    chunk_gla = require_fla()
    if not query.is_cuda:
        raise Unavailable(
            f"impl='fla' runs on a GPU, not on {query.device.type!r}; leave impl='auto'"
        )
    if value.numel() == 0:  # an empty grid of programs cannot be launched
        return value.clone()
    # The library has heads after tokens.
    operands = (z.transpose(1, 2).contiguous() for z in (query, key, value, log_gate.float()))
    try:
        out, _ = chunk_gla(*operands, scale=1.0)
    except torch.OutOfMemoryError:
        raise
    except ANYTHING as error:
        raise Unavailable(
            f"impl='fla' cannot run: {reason(error)}; mend or update flash-linear-attention, or "
            f"leave impl='auto'"
        ) from error
    return out.transpose(1, 2).to(query.dtype)
