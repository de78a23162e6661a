"""The measure kernel of DyDiLA (arXiv 2601.13683, Eqs. 5-6), and the forms of its power."""

from __future__ import annotations

import math
from typing import Literal

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from attnzoo.ops.power_map import power_map
from attnzoo.ops.precision import in_wide_range

GammaForm = Literal["raw", "clamp", "softplus"]


def gamma_start(init: float, form: GammaForm) -> float:
    """The parameter whose ``shaped_gamma`` is ``init``."""
    return init + math.log(-math.expm1(-init)) if form == "softplus" else init


def shaped_gamma(gamma: Tensor, form: GammaForm) -> Tensor:
    """The powers that parameters stand for."""
    if form == "softplus":
        return F.softplus(gamma)
    return gamma.clamp_min(1.0) if form == "clamp" else gamma


def measure_kernel(
    z: Tensor,
    gamma: Tensor,
    num_heads: int = 1,
    offset: float = 0.0,
    scale: Tensor | None = None,
    is_naive: bool = False,
) -> Tensor:
    """ReLU(Z)^gamma / |ReLU(Z)^gamma| * |ReLU(Z)|.

    Args:
        z: (b, n, d).
        gamma: Powers, broadcastable to (b, n, 1).
        num_heads: In how many parts of d the norms are taken.
        offset: Added after ReLU, as FLatten does.
        scale: (d,), divides what is sharpened; FLatten's.
        is_naive: Whether the formula is computed as it is written.

    Returns:
        (b, n, d), of float16 in float32.
    """
    z = in_wide_range(z)
    if offset:
        z = F.relu(z) + offset
    if scale is not None:
        z = z / scale
    impl = "reference" if is_naive else "auto"
    if num_heads == 1:
        return power_map(z, gamma, impl=impl)
    per_head = rearrange(z, "b n (h d) -> b n h d", h=num_heads)
    return rearrange(power_map(per_head, gamma.unsqueeze(-1), impl=impl), "b n h d -> b n (h d)")
