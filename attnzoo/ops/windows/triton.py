"""Tokens to windows and back: what one writes side by side the other reads."""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.ops.triton_common import _ceil, _power_of_2, _rows, launch_kernel, launched


@triton.jit
def _windows_kernel(
    x, out, count, width, c, spacing, BACK: tl.constexpr, P: tl.constexpr,
    Q: tl.constexpr, T: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Some windows' tokens to windows, or BACK; ``spacing`` is of the rows that are read."""
    row = tl.arange(0, N * T)
    window, tap = tl.program_id(0) * N + row // T, row % T
    wide = width // Q
    token = (window // wide).to(tl.int64) * P + tap // Q  # the row, counted through all images
    token = token * width + window % wide * Q + tap % Q
    channel = tl.program_id(1) * C + tl.arange(0, C)
    of_tokens = ((window < count) & (tap < P * Q))[:, None] & (channel < c)[None, :]
    tokens = token[:, None] * (c if BACK else spacing) + channel[None, :]
    window = (tl.program_id(0) * N + tl.arange(0, N))[:, None, None]
    channel, tap = channel[None, :, None], tl.arange(0, T)[None, None, :]
    of_windows = (window < count) & (channel < c) & (tap < P * Q)
    windows = window.to(tl.int64) * (spacing if BACK else c * P * Q) + (channel * (P * Q) + tap)
    if BACK:
        z = tl.load(x + windows, mask=of_windows, other=0.0)
        z = tl.reshape(tl.permute(z, (0, 2, 1)), (N * T, C))
        tl.store(out + tokens, z, mask=of_tokens)
    else:
        z = tl.load(x + tokens, mask=of_tokens, other=0.0)
        z = tl.permute(tl.reshape(z, (N, T, C)), (0, 2, 1))
        tl.store(out + windows, z, mask=of_windows)


_TILE = 4096  # numbers
_SIZES = "int height, int width, int p, int q"


def _launch(
    x: Tensor, out: Tensor, c: int, height: int, width: int, p: int, q: int, is_back: bool
) -> Tensor:
    if out.numel():
        x, spacing = _rows(x)
        count, taps = x.shape[0] * height * width // (p * q), _power_of_2(p * q)
        columns = min(128, max(16, _TILE // taps))
        windows = max(1, _TILE // (taps * columns))
        launch_kernel(_windows_kernel, (_ceil(count, windows), _ceil(c, columns)),
            x, out, count, width, c, spacing, is_back, p, q, taps, windows, columns,
            num_warps=4,
        )  # fmt: skip
    return out


@launched("to_windows", f"(Tensor x, {_SIZES}) -> Tensor")
def _to_windows(x: Tensor, height: int, width: int, p: int, q: int) -> Tensor:
    b, n, c = x.shape
    out = torch.empty(b, n // (p * q), c * p * q, dtype=x.dtype, device=x.device)
    return _launch(x, out, c, height, width, p, q, False)


@launched("from_windows", f"(Tensor x, {_SIZES}) -> Tensor")
def _from_windows(x: Tensor, height: int, width: int, p: int, q: int) -> Tensor:
    c = x.shape[2] // (p * q)
    out = torch.empty(len(x), height * width, c, dtype=x.dtype, device=x.device)
    return _launch(x, out, c, height, width, p, q, True)


@_to_windows.register_fake
def _(x: Tensor, height: int, width: int, p: int, q: int) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // (p * q), x.shape[2] * p * q)


@_from_windows.register_fake
def _(x: Tensor, height: int, width: int, p: int, q: int) -> Tensor:
    return x.new_empty(x.shape[0], height * width, x.shape[2] // (p * q))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.sizes = inputs[1:]


def _of_tokens(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _from_windows(grad, *ctx.sizes), None, None, None, None


def _of_windows(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _to_windows(grad, *ctx.sizes), None, None, None, None


_to_windows.register_autograd(_of_tokens, setup_context=_setup)
_from_windows.register_autograd(_of_windows, setup_context=_setup)


def to_windows(x: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """See ``attnzoo.ops.windows``."""
    return _to_windows(x, *grid, *size)


def from_windows(x: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """See ``attnzoo.ops.windows``."""
    return _from_windows(x, *grid, *size)
