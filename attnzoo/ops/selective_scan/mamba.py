"""The selective scan by mamba_ssm's kernel, for GPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.errors import Unavailable
from attnzoo.ops.optional import ANYTHING, failure, load, reason
from attnzoo.ops.precision import in_float32


def _require() -> Any:
    try:
        return load("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
    except ImportError as error:
        raise Unavailable(
            f"impl='mamba' needs mamba_ssm, which cannot be imported ({error}); "
            f"pip install mamba-ssm, or leave impl='auto'"
        ) from error


def why_unavailable(device: str | torch.device) -> str | None:
    """Calls the kernel once on a few tokens; returns None if it works, or else the reason."""

    def call() -> Tensor:
        probe = torch.zeros(1, 16, 32, device=device)
        return selective_scan(probe, probe, probe.new_zeros(32, 16), *probe.chunk(2, -1))

    return failure(call)


@in_float32
def selective_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """See ``attnzoo.ops.selective_scan``; on a GPU.

    The kernel wants steps in the tokens' dtype, and steps want float32.
    """
    kernel = _require()
    if not x.is_cuda:
        raise Unavailable(
            f"impl='mamba' runs on a GPU, not on {x.device.type!r}; leave impl='auto'"
        )
    if x.numel() == 0:  # an empty grid of programs cannot be launched
        return x.clone()
    x, dt, b, c = (z.transpose(1, 2).contiguous() for z in (x, dt, b, c))
    try:
        return kernel(x, dt, a, b, c).transpose(1, 2)
    except torch.OutOfMemoryError:
        raise
    except ANYTHING as error:
        raise Unavailable(
            f"impl='mamba' cannot run: {reason(error)}; mend or update mamba-ssm, or leave "
            f"impl='auto'"
        ) from error
