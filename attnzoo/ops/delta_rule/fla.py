"""The gated delta rule by flash-linear-attention's Triton kernels, for GPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.errors import Unavailable
from attnzoo.ops.optional import ANYTHING, load, reason


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, strength: Tensor
) -> Tensor:
    """See ``attnzoo.ops.delta_rule``; on a GPU, best in bfloat16.

    Raises:
        Unavailable: flash-linear-attention cannot be imported or fails, or the tensors are not
            on a GPU.
    """
    try:
        chunk = load("fla.ops.gated_delta_rule", "chunk_gated_delta_rule")
    except ImportError as error:
        raise Unavailable(
            f"impl='fla' needs flash-linear-attention, which cannot be imported ({error}); "
            f"pip install 'attnzoo[fla]', or leave impl='auto'"
        ) from error
    if not query.is_cuda:
        raise Unavailable(
            f"impl='fla' runs on a GPU, not on {query.device.type!r}; leave impl='auto'"
        )
    if value.numel() == 0:  # an empty grid of programs cannot be launched
        return value.clone()
    # The library has heads after tokens.
    operands = query, key, value, log_decay.float(), strength.to(query.dtype)
    try:
        out, _ = chunk(*(z.transpose(1, 2).contiguous() for z in operands), scale=1.0)
    except torch.OutOfMemoryError:
        raise
    except ANYTHING as error:
        raise Unavailable(
            f"impl='fla' cannot run: {reason(error)}; mend or update flash-linear-attention, or "
            f"leave impl='auto'"
        ) from error
    return out.transpose(1, 2).to(query.dtype)
