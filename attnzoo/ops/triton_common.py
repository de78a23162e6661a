"""Launching, sizes, precisions and products that several kernels share.

Importing this, or any ``triton.py``, needs Triton; nothing imports them unasked. Every kernel
computes in float32 and runs under Triton's interpreter on a CPU. No launch waits for the device:
sizes that depend on the data (how many tokens chose an expert) stay there.
"""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportReturnType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import copy
import functools
import threading
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
_LOG2E = tl.constexpr(1.4426950408889634)


def on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Calls it on the device of its first tensor: Triton launches on the current one."""

    @functools.wraps(function)
    def call(first: Tensor, *args: Any) -> Any:
        if not first.is_cuda or first.get_device() == torch._C._cuda_getDevice():
            return function(first, *args)
        with torch.cuda.device_of(first):
            return function(first, *args)

    return call


def launched(name: str, schema: str | None = None) -> Callable[[Callable[..., Any]], Any]:
    """``custom_op`` on the device of its first tensor."""
    return lambda function: custom_op(name, schema=schema)(on_its_device(function))


# What was compiled, by all that its choice depends on; see ``launch_kernel``.
_COMPILED: dict[tuple[Any, ...], tuple[Any, ...]] = {}
_MOST_COMPILED = 4096  # sizes that change with each call would add keys without end
_CAN_SKIP = not _IS_INTERPRETED and torch.version.hip is None
notes: Any = None  # of a call that ``triton_replay`` watches


def launch_kernel(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """``kernel[grid](*args, **options)``, which Triton prepares anew for every launch.

    That takes a slow host as long as several products of PyTorch. What it finds depends on the
    device, on the numbers, on every tensor's type, and on whether 16 divides its address: who
    comes with the same again starts what was compiled. Triton itself launches whatever else there
    is: the first of its kind, tensors on the host, profilers' hooks, the interpreter.

    Args:
        kernel: Of ``triton.jit``.
        grid: One to three numbers.
        *args: Tensors on the current device, then what else the kernel takes.
        **options: Of Triton, such as ``num_warps``.
    """
    watching = notes if notes is not None and notes.thread == threading.get_ident() else None
    if not _CAN_SKIP or not args[0].is_cuda:
        kernel[grid](*args, **options)
        if watching is not None:
            watching.has_fault = True
        return
    device, count = args[0].get_device(), 1
    while isinstance(args[count], Tensor):
        count += 1
    tensors, numbers = args[:count], args[count:]
    pointers = [z.data_ptr() for z in tensors]
    places = [z.get_device() for z in tensors]
    aligned = [not pointer & 15 for pointer in pointers]
    # 1, 1.0 and True are equal, and compiled apart.
    kinds = *[z.dtype for z in tensors], *map(type, numbers)
    key = id(kernel), *places, *aligned, *kinds, *numbers, *options.items()
    found = _COMPILED.get(key)
    hook = triton.knobs.runtime.launch_enter_hook
    if found is None or getattr(hook, "calls", hook):
        compiled = kernel[grid](*args, **options)
        if compiled is not None and places.count(device) == count:
            if len(_COMPILED) >= _MOST_COMPILED:
                _COMPILED.clear()
            # With the kernel, whose number no other gets while it is held.
            found = *_in_c(compiled.run, compiled.function, compiled.packed_metadata), kernel
            _COMPILED[key] = found
        if watching is not None:
            watching.launch(found, grid, tensors, numbers)
        return
    if watching is not None:
        watching.launch(found, grid, tensors, numbers)
    run, middle, is_flat, _ = found
    stream, operands = torch._C._cuda_getCurrentRawStream(device), (*pointers, *numbers)
    run(*(*grid, 1, 1)[:3], stream, *middle, *(operands if is_flat else (operands,)))


def _in_c(launcher: Any, function: Any, metadata: Any) -> tuple[Any, tuple[Any, ...], bool]:
    """What Triton's launcher calls in C for a kernel, without the Python that leads there.

    That asks for scratch memory, and else gives the same each time: it is seen once.

    Returns:
        What to call with grid and stream, then these, then the kernel's operands; whether one by
        one or as a tuple. Of a launcher of another kind it is the launcher itself.
    """
    start, marks, seen = (1, 1, 1, object()), (object(), object()), []
    middle = function, metadata, None, None, None
    sizes = [getattr(launcher, f"{z}_scratch_size", None) for z in ("global", "profile")]
    if sizes == [0, 0] and callable(getattr(launcher, "launch", None)):
        watched = copy.copy(launcher)
        watched.launch = lambda *operands: seen.append(operands)
        watched(*start, *middle, *marks)
        for is_flat, tail in ((True, marks), (False, (marks,))):
            if seen[0][:4] == start and seen[0][-len(tail) :] == tail:
                return launcher.launch, seen[0][4 : -len(tail)], is_flat
    return launcher, middle, True


@functools.lru_cache(maxsize=4096)  # cheaper than a call
def _ceil(a: int, b: int) -> int:
    return -(-a // b)


@functools.lru_cache(maxsize=4096)
def _power_of_2(n: int) -> int:
    """The next one; Triton's own function takes a host ten times as long."""
    return 1 << max(0, n - 1).bit_length()


@functools.lru_cache(maxsize=4096)
def _width(n: int) -> int:
    """The next power of two a dot product accepts."""
    return max(16, _power_of_2(n))


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
    *between, spacing, step = z.stride()
    if (step == 1 and (not between or between[0] == z.shape[1] * spacing)) or z.numel() == 0:
        return z, spacing
    # ``contiguous`` alone leaves a single row the spacing that it has.
    z = z.contiguous().view(-1).view(z.shape)
    return z, z.stride(-2)


@functools.cache
def _shared_memory(device: torch.device) -> int | None:
    """Bytes that one program may take; None if nothing limits them."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", None)


@triton.jit
def _column_sum_kernel(
    parts, out, n, size, chunk, R: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """Of every ``chunk`` rows their sum; with FULL tiles have no row or column too many."""
    column = tl.program_id(0) * C + tl.arange(0, C)
    is_column = (column < size)[None, :]
    total = tl.zeros((R, C), tl.float32)
    row = tl.arange(0, R)
    begin = tl.program_id(1) * chunk
    stop = tl.minimum(begin + chunk, n)
    place = parts + (begin + row).to(tl.int64)[:, None] * size + column[None, :]
    for first in range(begin, stop, K * R):
        for i in tl.static_range(K):  # loads that wait for no other
            if FULL:
                total += tl.load(place)
            else:
                mask = (first + i * R + row < stop)[:, None] & is_column
                total += tl.load(place, mask=mask, other=0.0)
            place += R * size
    line = out + tl.program_id(1).to(tl.int64) * size + column
    tl.store(line, tl.sum(total, 0).to(out.dtype.element_ty), mask=column < size)


def column_sum(parts: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The sum over the first dimension, in float32, as ``dtype``: what programs left, or tokens.

    PyTorch's takes several times as long for hundreds of parts.
    """
    if len(parts) >= SUM_MANY and parts.numel():
        # First in parts: one program of a whole column takes 1 or 2 us for every 1024 lines.
        rows = parts.contiguous().flatten(1)
        rows = _chunk_sums(rows, torch.float32, *_many_rows(*rows.shape, rows.element_size()))
        return sample_sum(rows[None], dtype).view(parts.shape[1:])
    return sample_sum(parts[None], dtype)[0]


def sample_sum(parts: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``column_sum`` of every sample: (b, n, ...) -> (b, ...)."""
    if not parts.numel():
        return torch.zeros(parts.shape[0], *parts.shape[2:], dtype=dtype, device=parts.device)
    n, rows = parts.shape[1], parts.contiguous().flatten(0, 1).flatten(1)
    tile = _few_rows(n, rows.shape[1], rows.element_size())
    return _chunk_sums(rows, dtype, n, *tile).view(parts.shape[0], *parts.shape[2:])


SUM_MANY = 4097  # rows for which two launches take less than programs of whole columns
# Columns and warps of a program of a sum over many rows; its loads of a thread, of 32 bytes, that
# wait for no other. Parts at most, of many columns and of few.
SUM_TILE = (64, 4, 4)
SUM_PARTS = 32, 512


@functools.lru_cache(maxsize=4096)
def _many_rows(n: int, width: int, size: int) -> tuple[int, ...]:
    """Rows of a part, of numbers of ``size`` bytes; then as ``_few_rows``."""
    columns, warps, loads = SUM_TILE
    columns = min(columns, _width(width))
    rows = warps * 1024 // (columns * size)
    parts = min(max(SUM_PARTS[0], 1056 // _ceil(width, columns)), SUM_PARTS[1])
    chunk = rows * loads * _ceil(n, rows * loads * parts)
    return chunk, rows, columns, loads, warps


@functools.lru_cache(maxsize=4096)
def _few_rows(n: int, width: int, size: int) -> tuple[int, ...]:
    """Rows and columns of a tile, tiles that are loaded at once, warps."""
    # Few programs have more threads each.
    together = min(max(8, _power_of_2(n)), 1024 if width >= 2048 else 2048)
    # Enough programs to fill a GPU, of columns that lie in one line of memory at least.
    columns = min(_width(width // 264), max(16, 2048 // together))
    warps = min(max(1, together * columns * size >> 12), 16)
    rows = min(warps * 512 // (columns * size), together)
    return rows, columns, together // rows, warps


def _chunk_sums(
    rows: Tensor, dtype: torch.dtype, chunk: int, size: int, columns: int, loads: int, warps: int
) -> Tensor:
    """The sums of every ``chunk`` rows, (n, c) -> (parts, c), by tiles of (size, columns)."""
    n, width = rows.shape
    out = torch.empty(_ceil(n, chunk), width, dtype=dtype, device=rows.device)
    is_full = not (n % chunk or chunk % (size * loads) or width % columns)
    launch_kernel(_column_sum_kernel, (_ceil(width, columns), len(out)),
        rows, out, n, width, chunk, size, columns, loads, is_full, num_warps=warps,
    )  # fmt: skip
    return out


@triton.jit
def _nothing(z):
    """-0.0, which compilers leave out of sums, as they must not 0.0."""
    return tl.zeros_like(z) * -1.0


@triton.jit
def _row(z, k: tl.constexpr, T: tl.constexpr):
    """The k-th of T rows: of registers of one thread, which costs nothing."""
    row = tl.arange(0, T)[:, None]
    return tl.sum(tl.where(row == k, z, _nothing(z)), 0)


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


@triton.jit
def _laid_out(x, like, FAST: tl.constexpr):
    """``x``, made once and in the layout of ``like``, not anew in each that it is read in."""
    if FAST:  # the compiler does not see through this
        pack: tl.constexpr = 32 // x.dtype.primitive_bitwidth
        x = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r,r", [x, like], dtype=x.dtype, is_pure=False, pack=pack
        )
    return x
