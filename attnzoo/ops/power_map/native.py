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

from attnzoo.ops.custom_op import custom_op
from attnzoo.ops.power_map.build import library

# Elements that are worth a thread of their own.
_BLOCK = 1 << 16
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def _forward(z: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The map of rows (rows, d), each row's largest entry and each row's norm after ReLU."""
    z = z if z.stride(-1) == 1 else z.contiguous()
    out = torch.empty(z.shape, dtype=z.dtype)
    peak, norm = torch.empty(gamma.shape), torch.empty(gamma.shape)
    _run("forward", [z], [gamma, out, peak, norm])
    return out, peak, norm


def _backward(
    grad: Tensor, z: Tensor, gamma: Tensor, out: Tensor, peak: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of ``_forward``'s first result by z and gamma."""
    z = z if z.stride(-1) == 1 else z.contiguous()
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    grad_z, grad_gamma = torch.empty_like(out), torch.empty_like(gamma)
    _run("backward", [grad, z], [gamma, out, peak, norm, grad_z, grad_gamma])
    return grad_z, grad_gamma


_forward_op = custom_op("power_map_native", device_types="cpu")(_forward)
_backward_op = custom_op("power_map_native_backward", device_types="cpu")(_backward)


@_forward_op.register_fake
def _(z: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return z.new_empty(z.shape), torch.empty_like(gamma), torch.empty_like(gamma)


@_backward_op.register_fake
def _(grad: Tensor, z: Tensor, gamma: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), torch.empty_like(gamma)


def _run(kernel: str, strided: list[Tensor], packed: list[Tensor]) -> None:
    """Calls the C kernel on each thread's rows; ctypes lets go of the interpreter's lock."""
    (rows, width), dtype = strided[0].shape, _DTYPES[strided[0].dtype]
    function = getattr(library(), f"power_map_{kernel}_{dtype}")
    # Address of the first row, bytes from one row to the next, and what C is told of the latter.
    tensors = [(x.data_ptr(), x.stride(0) * x.itemsize) for x in [*strided, *packed]]
    strides = [x.stride(0) for x in strided]

    def call(start: int, stop: int) -> None:
        arguments: list[Any] = []
        for i, (first, spacing) in enumerate(tensors):
            arguments.append(ctypes.c_void_p(first + start * spacing))
            if i < len(strides):
                arguments.append(ctypes.c_long(strides[i]))
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
    """Keeps its input, its output and three numbers per row."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, gamma: Tensor) -> Tensor:
        run = _forward_op if torch.compiler.is_compiling() else _forward
        out, peak, norm = run(z, gamma)
        ctx.save_for_backward(z, gamma, out, peak, norm)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        run = _backward_op if torch.compiler.is_compiling() else _backward
        return run(grad, *ctx.saved_tensors)


def power_map(z: Tensor, gamma: Tensor) -> Tensor:
    """See ``attnzoo.ops.power_map``."""
    gamma = gamma.float().expand(*z.shape[:-1], 1).reshape(-1, 1)
    return _PowerMap.apply(z.reshape(-1, z.shape[-1]), gamma.contiguous()).view(z.shape)
