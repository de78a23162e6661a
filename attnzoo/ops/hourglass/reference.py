"""The hourglass as it is written."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.ops.precision import in_float32


@in_float32
def group_means(x: Tensor, size: int) -> Tensor:
    """See ``attnzoo.ops.hourglass``."""
    return torch.stack([part.mean(1) for part in x.split(size, dim=1)], dim=1)


def hourglass(
    x: Tensor, means: Tensor, rows: Tensor, size: int, is_active: bool = False,
    factor: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See ``attnzoo.ops.hourglass``."""
    return _hourglass(rows, x, means, size, is_active, factor)


@in_float32
def _hourglass(
    rows: Tensor, x: Tensor, means: Tensor, size: int, is_active: bool, factor: Tensor | None
) -> Tensor:
    deviations = x - means.repeat_interleave(size, dim=1)[:, : x.shape[1]]
    out = deviations.unflatten(-1, (-1, rows.shape[-1])).sum(2)
    out = out + rows.repeat_interleave(size, dim=1)[:, : x.shape[1]]
    if not is_active:
        return out
    return out * out.sigmoid() * (1.0 if factor is None else factor)
