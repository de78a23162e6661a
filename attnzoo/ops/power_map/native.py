"""The power map as one pass in C, for CPUs.

Written with PyTorch's operators the map is a dozen passes over memory, and on a CPU memory is what
they cost.
"""

from __future__ import annotations

import ctypes
import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from attnzoo.ops.dispatch import custom_op
from attnzoo.ops.native_build import library

# Elements that are worth a thread of their own.
_BLOCK = 1 << 16
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@custom_op("power_map_native", device_types="cpu")
def _forward(z: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The map of rows (rows, d), each row's largest entry and each row's norm after ReLU."""
    z = z if z.stride(-1) == 1 else z.contiguous()
    # Of no default device or type, for whose numbers C would write beyond them.
    out = z.new_empty(z.shape)
    peak, norm = gamma.new_empty(gamma.shape), gamma.new_empty(gamma.shape)
    _run("forward", [z], [gamma, out, peak, norm])
    return out, peak, norm


@custom_op("power_map_native_backward", device_types="cpu")
def _backward(
    grad: Tensor, z: Tensor, gamma: Tensor, out: Tensor, peak: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of ``_forward``'s first result by z and gamma."""
    z = z if z.stride(-1) == 1 else z.contiguous()
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    grad_z, grad_gamma = torch.empty_like(out), torch.empty_like(gamma)
    _run("backward", [grad, z], [gamma, out, peak, norm, grad_z, grad_gamma])
    return grad_z, grad_gamma


@_forward.register_fake
def _(z: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return z.new_empty(z.shape), torch.empty_like(gamma), torch.empty_like(gamma)


@_backward.register_fake
def _(grad: Tensor, z: Tensor, gamma: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), torch.empty_like(gamma)


def _run(kernel: str, strided: list[Tensor], packed: list[Tensor]) -> None:
    """Calls the C kernel on each thread's rows; ctypes lets go of the interpreter's lock."""
    (rows, width), function = strided[0].shape, _function(kernel, strided[0].dtype)
    threads = max(1, min(torch.get_num_threads(), rows, rows * width // _BLOCK))
    calls, start = [], 0
    for thread in range(1, threads + 1):
        stop, arguments = rows * thread // threads, []
        for x in strided:
            spacing = x.stride(0)
            arguments += [x.data_ptr() + start * spacing * x.itemsize, spacing]
        for x in packed:
            arguments.append(x.data_ptr() + start * x.stride(0) * x.itemsize)
        calls.append([*arguments, stop - start, width])
        start = stop
    if threads == 1:
        function(*calls[0])
    else:
        list(_pool(os.getpid(), threads).map(lambda call: function(*call), calls))


@functools.cache
def _function(kernel: str, dtype: torch.dtype) -> Any:
    function = getattr(library(), f"power_map_{kernel}_{_DTYPES[dtype]}")
    pointer, number = ctypes.c_void_p, ctypes.c_long
    strided, packed = {"forward": (1, 4), "backward": (2, 6)}[kernel]
    function.argtypes = [*[pointer, number] * strided, *[pointer] * packed, number, number]
    return function


@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)  # threads do not survive a fork: one pool per process


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)


def _gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _backward(grad, *ctx.saved_tensors)


_forward.register_autograd(_gradients, setup_context=_setup)


def power_map(z: Tensor, gamma: Tensor) -> Tensor:
    """See ``attnzoo.ops.power_map``."""
    rows = z.reshape(-1, z.shape[-1])
    if gamma.numel() != rows.shape[0]:
        gamma = gamma.expand(*z.shape[:-1], 1)
    gamma = gamma.float().reshape(-1, 1).contiguous()
    return _forward(rows, gamma)[0].view(z.shape)


def scaled_power_map(z: Tensor, scale: Tensor, gamma: float, offset: float) -> Tensor:
    """See ``attnzoo.ops.power_map``."""
    power = torch.full((1,), gamma, dtype=torch.float32, device=z.device)
    return power_map((z.relu() + offset) / scale, power)
