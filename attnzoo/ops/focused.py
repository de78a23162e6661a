"""The norm-preserving power map of focused linear attention (FLatten, arXiv 2308.00442)."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from attnzoo.ops import fused
from attnzoo.ops.native import library
from attnzoo.ops.precision import in_float32

_LN_2 = 0.6931471805599453
# Elements that a CPU's second-level cache holds a few times over.
_BLOCK = 1 << 16
_NATIVE = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


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


# On CPU both directions are custom operators, so that a compiler sees one node: it would unroll
# the loop over blocks. On other devices it may fuse the passes.
@torch.library.custom_op("attnzoo::power_map", mutates_args=(), device_types="cpu")
def _cpu_forward(z: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if z.dtype not in _NATIVE or library() is None:
        return _forward(z, gamma)
    z = z if z.stride(-1) == 1 else z.contiguous()
    out = torch.empty(z.shape, dtype=z.dtype)
    peak, norm = torch.empty(gamma.shape), torch.empty(gamma.shape)
    _run("forward", [z], [gamma, out, peak, norm])
    return out, peak, norm


@torch.library.custom_op("attnzoo::power_map_backward", mutates_args=(), device_types="cpu")
def _cpu_backward(
    grad: Tensor, z: Tensor, gamma: Tensor, out: Tensor, peak: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor]:
    if z.dtype not in _NATIVE or library() is None:
        return _backward(grad, z, gamma, out, peak, norm)
    z, grad = (x if x.stride(-1) == 1 else x.contiguous() for x in (z, grad))
    grad_z, grad_gamma = torch.empty_like(out), torch.empty_like(gamma)
    _run("backward", [grad, z], [gamma, out, peak, norm, grad_z, grad_gamma])
    return grad_z, grad_gamma


@_cpu_forward.register_fake
def _(z: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return z.new_empty(z.shape), torch.empty_like(gamma), torch.empty_like(gamma)


@_cpu_backward.register_fake
def _(grad: Tensor, z: Tensor, gamma: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), torch.empty_like(gamma)


def _run(kernel: str, strided: list[Tensor], packed: list[Tensor]) -> None:
    """Calls the C kernel on each thread's rows; ctypes lets go of the interpreter's lock."""
    (rows, width), dtype = strided[0].shape, _NATIVE[strided[0].dtype]
    function = getattr(library(), f"power_map_{kernel}_{dtype}")

    def call(start: int, stop: int) -> None:
        def at(x: Tensor) -> ctypes.c_void_p:
            return ctypes.c_void_p(x.data_ptr() + start * x.stride(0) * x.itemsize)

        arguments = [v for x in strided for v in (at(x), ctypes.c_long(x.stride(0)))]
        arguments += [at(x) for x in packed]
        function(*arguments, ctypes.c_long(stop - start), ctypes.c_long(width))

    threads = max(1, min(torch.get_num_threads(), rows, rows * width // _BLOCK))
    if threads == 1:
        return call(0, rows)
    bounds = [rows * i // threads for i in range(threads + 1)]
    list(_pool(os.getpid(), threads).map(call, bounds[:-1], bounds[1:]))


@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)  # threads do not survive a fork: one pool per process


class _PowerMap(torch.autograd.Function):
    """Keeps its input, its output and three numbers per row; autograd would keep ten tensors."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, gamma: Tensor) -> Tensor:
        out, peak, norm = (_cpu_forward if z.device.type == "cpu" else _forward)(z, gamma)
        ctx.save_for_backward(z, gamma, out, peak, norm)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return (_cpu_backward if grad.device.type == "cpu" else _backward)(
            grad, *ctx.saved_tensors
        )


def power_map(z: Tensor, gamma: Tensor) -> Tensor:
    """x^gamma / |x^gamma| * |x| of x = ReLU(z), over the last dimension.

    Sharpens a token and keeps its norm. Powers are those of the positive entries: an entry that
    is not positive becomes 0 for every exponent, 0 and negative ones too, and adds nothing to any
    gradient. Finite with finite gradients for rows of any scale, and for rows without a positive
    entry, which become 0. Positive means above the smallest normal number, 1.2e-38 in float32; an
    entry further than that factor below the largest of its row counts as that far below it.

    Args:
        z: (..., d); entries below 0 count as 0.
        gamma: Exponents of any sign, broadcastable to (..., 1). Below 0 the smallest positive
            entries become the largest; at 0 all positive entries become equal.

    Returns:
        (..., d), computed in float32 or better.
    """
    if fused.runs_on(z):
        return fused.relu_power_map(z, gamma)
    gamma = gamma.to(_working_dtype(z.dtype)).expand(*z.shape[:-1], 1).reshape(-1, 1)
    return _PowerMap.apply(z.reshape(-1, z.shape[-1]), gamma.contiguous()).view(z.shape)


@in_float32
def naive_power_map(z: Tensor, gamma: Tensor) -> Tensor:
    """Reference of ``power_map``: the formula as it is written, in float64."""
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
