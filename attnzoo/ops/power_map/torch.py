"""The power map by PyTorch's operators."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from attnzoo.ops.dispatch import custom_op, loses_gradients
from attnzoo.ops.power_map import reference

_LN_2 = 0.6931471805599453
# Elements that a CPU's second-level cache holds a few times over.
_BLOCK = 1 << 16


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _blocks(z: Tensor) -> Iterator[slice]:
    """Rows to work on at a time: an accelerator wants few large kernels, a CPU its cache."""
    rows, width = z.shape
    step = rows if z.device.type != "cpu" else _BLOCK // max(1, width)
    for start in range(0, rows, max(1, step)):
        yield slice(start, start + max(1, step))


def _forward(z: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The map of rows (rows, d), each row's largest entry and each row's norm after ReLU."""
    dtype = _working_dtype(z.dtype)
    tiny = torch.finfo(dtype).tiny
    out = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    # The direction of x^gamma does not depend on the scale of x, so dividing by the largest
    # entry first changes nothing but keeps the power from over- and underflowing.
    peak = z.amax(-1, keepdim=True).to(dtype).clamp_min(tiny)
    norm = torch.empty_like(peak)
    exponent = gamma / _LN_2
    # Looking at an accelerator's data would wait for it.
    is_blind = z.device.type != "cpu"
    may_fall = is_blind or bool((gamma < 0).any())
    # From this exponent on the power of the floor underflows to 0 by itself.
    may_show_floor = is_blind or bool((gamma < 1.25).any())
    for rows in _blocks(z):
        x = z[rows].to(dtype)
        # A floor, because log(0) is slow; what is not positive becomes an exact 0.
        power = x.div(peak[rows]).clamp_min_(tiny)
        norm[rows] = torch.linalg.vector_norm(power, dim=-1, keepdim=True) * peak[rows]
        power.log_().mul_(exponent[rows])
        if may_fall:  # a negative exponent makes the smallest entry the largest power
            top = torch.where(x > tiny, power, 0).amax(-1, keepdim=True)
            power.sub_(top.clamp_min_(0))
        power.exp2_()
        if may_show_floor:
            power = torch.ops.aten.threshold_backward(power, x, tiny)
        # The largest power is 1 unless the whole row is 0, and then the row stays 0.
        width = torch.linalg.vector_norm(power, dim=-1, keepdim=True).clamp_min_(tiny)
        out[rows] = power.mul_(norm[rows] / width)
    return out, peak, norm


def _backward(
    grad: Tensor, z: Tensor, gamma: Tensor, out: Tensor, peak: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of ``_forward``'s first result by z and gamma."""
    dtype = _working_dtype(z.dtype)
    grad_z, grad_gamma = torch.empty_like(out), torch.empty_like(gamma)
    tiny, most = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    norm = norm.clamp_min(tiny)
    slope = (gamma / peak).clamp(-most, most)
    for rows in _blocks(z):
        x, y, g = z[rows].to(dtype), out[rows].to(dtype), grad[rows].to(dtype)
        unit = x.div(peak[rows]).clamp_min_(tiny)
        along = (g * y).sum(-1, keepdim=True) / norm[rows] / norm[rows]
        # d out / d power, times power: what both gradients share, 0 where the power is.
        shared = torch.addcmul(g, y, along, value=-1).mul_(y)
        grad_gamma[rows] = (shared * unit.log()).sum(-1, keepdim=True)
        slant = shared.mul_(slope[rows]).div_(unit).addcmul_(x, along)
        grad_z[rows] = torch.ops.aten.threshold_backward(slant, x, tiny)
    return grad_z, grad_gamma


# On a CPU a compiler sees one node: it would unroll the loop over blocks. On other devices it may
# fuse the passes.
_cpu_forward = custom_op("power_map", device_types="cpu")(_forward)
_cpu_backward = custom_op("power_map_backward", device_types="cpu")(_backward)


@_cpu_forward.register_fake
def _(z: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return z.new_empty(z.shape), torch.empty_like(gamma), torch.empty_like(gamma)


@_cpu_backward.register_fake
def _(grad: Tensor, z: Tensor, gamma: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), torch.empty_like(gamma)


class _PowerMap(torch.autograd.Function):
    """Keeps its input, its output and three numbers per row; autograd would keep ten tensors."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, gamma: Tensor) -> Tensor:
        out, peak, norm = (_cpu_forward if z.device.type == "cpu" else _forward)(z, gamma)
        ctx.save_for_backward(z, gamma, out, peak, norm)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        # The operator refuses a second derivative, for which what is kept would be constants.
        is_twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        backward = _cpu_backward if is_twice or grad.device.type == "cpu" else _backward
        return backward(grad, *ctx.saved_tensors)


def power_map(z: Tensor, gamma: Tensor) -> Tensor:
    """See ``attnzoo.ops.power_map``."""
    if loses_gradients():
        return reference.power_map(z, gamma)
    gamma = gamma.to(_working_dtype(z.dtype)).expand(*z.shape[:-1], 1).reshape(-1, 1)
    return _PowerMap.apply(z.reshape(-1, z.shape[-1]), gamma.contiguous()).view(z.shape)


def scaled_power_map(z: Tensor, scale: Tensor, gamma: float, offset: float) -> Tensor:
    """See ``attnzoo.ops.power_map``."""
    power = torch.full((1,), gamma, dtype=torch.float32, device=z.device)
    return power_map((z.relu() + offset) / scale, power)
