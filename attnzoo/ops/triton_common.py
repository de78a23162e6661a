"""Launching, sizes, precisions and products that several kernels share.

Importing this, or any ``triton.py``, needs Triton; nothing imports them unasked. Every kernel
computes in float32 and runs under Triton's interpreter on a CPU. No launch waits for the device:
sizes that depend on the data (how many tokens chose an expert) stay there.
"""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportReturnType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.ops.dispatch import custom_op

_IS_INTERPRETED = triton.knobs.runtime.interpret  # fixed when kernels are declared
_NORMAL = tl.constexpr(1.1754943508222875e-38)
_LARGEST = tl.constexpr(3.4028234663852886e38)
_LN2 = tl.constexpr(0.6931471805599453)


def launched(name: str, schema: str | None = None) -> Callable[[Callable[..., Any]], Any]:
    """``custom_op`` on the device of its first tensor: Triton launches on the current one."""

    def register(function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def on_its_device(first: Tensor, *args: Any) -> Any:
            if not first.is_cuda or first.device.index == torch.cuda.current_device():
                return function(first, *args)
            with torch.cuda.device_of(first):
                return function(first, *args)

        return custom_op(name, schema=schema)(on_its_device)

    return register


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _width(n: int) -> int:
    """The next power of two a dot product accepts."""
    return max(16, triton.next_power_of_2(n))


def _precision(dtype: torch.dtype) -> str:
    """float32 operands stay float32-accurate unless the user has allowed TF32."""
    if _IS_INTERPRETED:
        return "ieee"
    is_exact = dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    return "tf32x3" if is_exact else "tf32"


def _is_fast() -> bool:
    return not _IS_INTERPRETED and torch.version.hip is None


def _rows(z: Tensor) -> tuple[Tensor, int]:
    """(b, n, d) or (t, d) with equally spaced rows of unit stride, and their spacing."""
    spacing = z.stride(-2)
    is_regular = z.stride(-1) == 1 and (z.dim() == 2 or z.stride(0) == z.shape[1] * spacing)
    z = z if is_regular or z.numel() == 0 else z.contiguous()
    return z, z.stride(-2)


@functools.cache
def _shared_memory(device: torch.device) -> int | None:
    """Bytes that one program may take; None if nothing limits them."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", None)


@triton.jit
def _column_sum_kernel(parts, out, n, size, R: tl.constexpr, C: tl.constexpr):
    column = tl.program_id(0) * C + tl.arange(0, C)
    is_column = (column < size)[None, :]
    total = tl.zeros((R, C), tl.float32)
    row = tl.arange(0, R)
    place = parts + row.to(tl.int64)[:, None] * size + column[None, :]
    for first in range(0, n, R):
        mask = (first + row < n)[:, None] & is_column
        total += tl.load(place, mask=mask, other=0.0)
        place += R * size
    tl.store(out + column, tl.sum(total, 0), mask=column < size)


def column_sum(parts: Tensor) -> Tensor:
    """The sum over the first dimension of what programs left behind, in float32.

    PyTorch's takes several times as long for hundreds of parts.
    """
    out = torch.empty(parts.shape[1:], dtype=torch.float32, device=parts.device)
    size = out.numel()
    if parts.numel() == 0:
        return out.zero_()
    # Enough programs to fill a GPU, of columns that lie in one line of memory at least.
    columns = 32 if size >= 1 << 12 else 16
    _column_sum_kernel[(_ceil(size, columns),)](
        parts, out, parts.shape[0], size, 2048 // columns, columns
    )
    return out


@triton.jit
def _dot(a, b, P: tl.constexpr):
    if P == "ieee":
        # The interpreter would multiply the bits of bfloat16 operands as integers.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=P)


@triton.jit
def _add_dot(total, a, b, P: tl.constexpr):
    if P == "ieee":
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=P)
