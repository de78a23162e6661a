"""Gated linear attention by flash-linear-attention's Triton kernels, for GPUs."""

from __future__ import annotations

import importlib.util

from torch import Tensor


def _is_installed() -> bool:
    try:
        return importlib.util.find_spec("fla.ops.gla") is not None
    except (ImportError, ValueError):  # a parent that is missing, or blocked on purpose
        return False


def require_fla() -> None:
    """Raises RuntimeError, naming the extra, where flash-linear-attention is not installed."""
    if not _is_installed():
        raise RuntimeError(
            "impl='fla' needs flash-linear-attention, which is not installed; "
            "pip install 'attnzoo[fla]', or leave impl='auto'"
        )


def fla_gated_linear_attention(
    query: Tensor, key: Tensor, value: Tensor, log_gate: Tensor
) -> Tensor:
    """``ops.gated.gated_linear_attention`` on a GPU; other directions are scans by the caller.

    Args:
        query: (b, h, n, dk), scaled by the caller. Products take the dtype of queries, keys and
            values, which should be half precision: of float32 the library makes TF32.
        key: (b, h, n, dk).
        value: (b, h, n, dv).
        log_gate: (b, h, n, dk), not positive; taken in float32.

    Returns:
        (b, h, n, dv), in the dtype of ``query``.

    Raises:
        RuntimeError: flash-linear-attention is not installed, or the tensors are not on a GPU.
    """
    require_fla()
    if not query.is_cuda:
        raise RuntimeError(f"impl='fla' runs on a GPU, not on {query.device.type!r}")
    from fla.ops.gla import chunk_gla

    if value.numel() == 0:  # an empty grid of programs cannot be launched
        return value.clone()
    # The library has heads after tokens.
    operands = (z.transpose(1, 2).contiguous() for z in (query, key, value, log_gate.float()))
    out, _ = chunk_gla(*operands, scale=1.0)
    return out.transpose(1, 2).to(query.dtype)
