"""What all processes of a run exchange: small tensors, without a wait for the host."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from attnzoo.ops.dispatch import custom_op


def count() -> int:
    """Processes of the default group; 1 without one."""
    is_one = not (dist.is_available() and dist.is_initialized())
    return 1 if is_one else dist.get_world_size()


# As in ``dispatch``: a compiler takes the number for a constant.
count._dynamo_marked_constant = True  # type: ignore[attr-defined]


@custom_op("gathered", schema="(Tensor x, int processes) -> Tensor")
def gathered(x: Tensor, processes: int) -> Tensor:
    """The tensors of all processes: (...) -> (processes, ...)."""
    out = torch.empty(processes, *x.shape, dtype=x.dtype, device=x.device)
    dist.all_gather_into_tensor(out.view(-1), x.reshape(-1))
    return out


@gathered.register_fake
def _(x: Tensor, processes: int) -> Tensor:
    return x.new_empty(processes, *x.shape)


@custom_op("summed", schema="(Tensor x) -> Tensor")
def summed(x: Tensor) -> Tensor:
    """The sum of the tensors of all processes."""
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out)
    return out


@summed.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
