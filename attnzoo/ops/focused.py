"""The norm-preserving power map of focused linear attention (FLatten, arXiv 2308.00442)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.ops.precision import in_float32

# Entries this far below the largest count as 0: log2(0) is slow, and 0 * inf would be NaN.
_TINY = 1e-30


class _PowerMap(torch.autograd.Function):
    """Power map with the backward written out: autograd's keeps six more tensors alive."""

    @staticmethod
    def forward(x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # The direction of x^gamma does not depend on the scale of x, so dividing by the largest
        # entry first changes nothing but keeps the power from over- and underflowing.
        tiny = torch.finfo(x.dtype).tiny
        peak = x.amax(-1, keepdim=True).clamp_min(tiny)
        power = torch.exp2(gamma * torch.log2((x / peak).clamp_min(_TINY)))
        # The largest power is 1 unless the whole row is 0, and then the row stays 0.
        power_norm = torch.linalg.vector_norm(power, dim=-1, keepdim=True).clamp_min(tiny)
        scale = peak * torch.linalg.vector_norm(x / peak, dim=-1, keepdim=True) / power_norm
        return power * scale, peak, scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, gamma = inputs
        _, peak, scale = output
        ctx.mark_non_differentiable(peak, scale)
        ctx.save_for_backward(x, gamma, peak, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, Tensor | None]:
        x, gamma, peak, scale = ctx.saved_tensors
        tiny = torch.finfo(x.dtype).tiny
        unit = (x / peak).clamp_min(_TINY)
        log_unit = torch.log2(unit)
        power = torch.exp2(gamma * log_unit)
        power_norm = torch.linalg.vector_norm(power, dim=-1, keepdim=True).clamp_min(tiny)
        along = (grad * power).sum(-1, keepdim=True) / power_norm
        # d out / d power, times power: what both gradients share.
        shared = (grad - power / power_norm * along) * power * scale
        grad_x = grad_gamma = None
        if ctx.needs_input_grad[0]:
            live = (unit > _TINY).to(x.dtype)
            x_norm = (scale * power_norm).clamp_min(tiny)
            grad_x = shared * gamma * live / (unit * peak).clamp_min(tiny) + along * (x / x_norm)
        if ctx.needs_input_grad[1]:
            grad_gamma = (shared * log_unit * 0.6931471805599453).sum(-1, keepdim=True)
            grad_gamma = grad_gamma.sum_to_size(gamma.shape)
        return grad_x, grad_gamma


@in_float32
def power_map(x: Tensor, gamma: Tensor) -> Tensor:
    """x^gamma / |x^gamma| * |x| over the last dimension: sharpens a token, keeps its norm.

    Finite with finite gradients for rows of any scale, and for rows that are all 0, which stay 0.

    Args:
        x: Non-negative, (..., d).
        gamma: Exponents, broadcastable to (..., 1).

    Returns:
        (..., d).
    """
    return _PowerMap.apply(x, gamma)[0]


@in_float32
def naive_power_map(x: Tensor, gamma: Tensor) -> Tensor:
    """Twin of ``power_map``: the formula as it is written, in float64."""
    wide = x.double()
    dead = wide.sum(-1, keepdim=True) == 0
    powered = torch.where(dead, torch.ones_like(wide), wide).pow(gamma.double())
    direction = powered / powered.norm(dim=-1, keepdim=True)
    norm = torch.where(dead, torch.ones_like(wide), wide).norm(dim=-1, keepdim=True)
    return torch.where(dead, torch.zeros_like(wide), direction * norm).to(x.dtype)
