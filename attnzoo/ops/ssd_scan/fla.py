"""The scan of Mamba-2 by flash-linear-attention's kernel for one decay per head, for GPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.errors import Unavailable
from attnzoo.ops.optional import ANYTHING, load, reason


def ssd_scan(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """See ``attnzoo.ops.ssd_scan``; on a GPU.

    Products take the dtype of ``x``; of float32 the library makes TF32.
    """
    try:
        kernel = load("fla.ops.simple_gla", "chunk_simple_gla")
    except ImportError as error:
        raise Unavailable(
            f"impl='fla' needs flash-linear-attention, which cannot be imported ({error}); "
            f"pip install 'attnzoo[fla]', or leave impl='auto'"
        ) from error
    if not x.is_cuda:
        raise Unavailable(f"impl='fla' runs on a GPU, not on {x.device.type!r}; leave impl='auto'")
    if x.numel() == 0:  # an empty grid of programs cannot be launched
        return x.clone()
    b, c = (z.to(x.dtype).unsqueeze(2).expand(-1, -1, x.shape[2], -1) for z in (b, c))
    operands = c.contiguous(), b.contiguous(), x.contiguous(), log_decay.float().contiguous()
    try:
        out, _ = kernel(*operands, scale=1.0)
    except torch.OutOfMemoryError:
        raise
    except ANYTHING as error:
        raise Unavailable(
            f"impl='fla' cannot run: {reason(error)}; mend or update flash-linear-attention, or "
            f"leave impl='auto'"
        ) from error
    return out.to(x.dtype)
