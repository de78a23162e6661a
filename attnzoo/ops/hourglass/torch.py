"""The hourglass by PyTorch's operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.silu_gate.torch import silu_gate


def group_means(x: Tensor, size: int) -> Tensor:
    """See ``attnzoo.ops.hourglass``."""
    whole = x.shape[1] // size * size
    groups = x[:, :whole].unflatten(1, (-1, size))
    if size == 2:  # in half the time of a reduction
        first, second = groups.unbind(2)
        means = first.lerp(second, 0.5)
    else:
        means = groups.mean(2)
    if whole == x.shape[1]:
        return means
    return torch.cat([means, x[:, whole:].mean(1, keepdim=True)], dim=1)


def hourglass(
    x: Tensor, means: Tensor, rows: Tensor, size: int, is_active: bool = False,
    factor: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See ``attnzoo.ops.hourglass``; adds a row to each token without a copy of it for each."""
    if x.shape[-1] > rows.shape[-1]:
        x, means = (torch.add(*z.chunk(2, dim=-1)) for z in (x, means))
    more = rows - means
    if size == 1:
        out = rows
    elif x.shape[1] % size == 0:
        out = (x.unflatten(1, (-1, size)) + more.unsqueeze(2)).flatten(1, 2)
    else:
        out = x + more.unsqueeze(2).expand(-1, -1, size, -1).flatten(1, 2)[:, : x.shape[1]]
    out = out.to(rows.dtype)
    if not is_active:
        return out
    return F.silu(out) if factor is None else silu_gate(factor, out)
