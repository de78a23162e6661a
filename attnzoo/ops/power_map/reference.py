"""The power map as it is written."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.ops.precision import in_float32


@in_float32
def power_map(z: Tensor, gamma: Tensor) -> Tensor:
    """See ``attnzoo.ops.power_map``; the formula, in float64."""
    wide = z.double().relu()
    # What divides a row changes its norm and nothing else, but keeps powers from 0 and infinity.
    peak = wide.detach().amax(-1, keepdim=True)
    # Not ``wide > 0``, which would take a NaN for an entry that is 0.
    is_dead = wide <= 0
    is_empty = is_dead.all(-1, keepdim=True)
    # 1 stands in where there is no power, so that no gradient sees log(0) or 0 / 0.
    unit = (wide / peak).masked_fill(is_dead, 1)
    powered = unit.pow(gamma.double()).masked_fill(is_dead & ~is_empty, 0)
    direction = powered / powered.norm(dim=-1, keepdim=True)
    norm = wide.masked_fill(is_empty, 1).norm(dim=-1, keepdim=True)
    return (direction * norm).masked_fill(is_empty, 0).to(z.dtype)


def scaled_power_map(z: Tensor, scale: Tensor, gamma: float, offset: float) -> Tensor:
    """See ``attnzoo.ops.power_map``."""
    power = torch.full((1,), gamma, dtype=torch.float32, device=z.device)
    return power_map((z.relu() + offset) / scale, power)
