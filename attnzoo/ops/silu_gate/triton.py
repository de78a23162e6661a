"""The gate in one pass, and its gradients in one."""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.ops.triton_common import _ceil, _rows, launch_kernel, launched


@triton.jit
def _place(rows, c, R: tl.constexpr, C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.program_id(1) * C + tl.arange(0, C)
    return row[:, None], column[None, :], (row < rows)[:, None] & (column < c)[None, :]


@triton.jit
def _silu_gate_kernel(
    x, gate, other, out, rows, c, x_row, gate_row, other_row, BOTH: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row, column, mask = _place(rows, c, R, C)
    total = tl.load(x + row * x_row + column, mask=mask, other=0.0).to(tl.float32)
    if BOTH:
        total += tl.load(other + row * other_row + column, mask=mask, other=0.0).to(tl.float32)
    z = tl.load(gate + row * gate_row + column, mask=mask, other=0.0).to(tl.float32)
    total *= z / (1.0 + tl.exp(-z))
    tl.store(out + row * c + column, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _silu_gate_gradient_kernel(
    grad, x, gate, other, grad_x, grad_gate, rows, c, grad_row, x_row, gate_row, other_row,
    BOTH: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row, column, mask = _place(rows, c, R, C)
    g = tl.load(grad + row * grad_row + column, mask=mask, other=0.0).to(tl.float32)
    total = tl.load(x + row * x_row + column, mask=mask, other=0.0).to(tl.float32)
    if BOTH:
        total += tl.load(other + row * other_row + column, mask=mask, other=0.0).to(tl.float32)
    z = tl.load(gate + row * gate_row + column, mask=mask, other=0.0).to(tl.float32)
    part = 1.0 / (1.0 + tl.exp(-z))
    tl.store(grad_x + row * c + column, (g * z * part).to(grad_x.dtype.element_ty), mask=mask)
    g *= total * part * (1.0 + z * (1.0 - part))
    tl.store(grad_gate + row * c + column, g.to(grad_gate.dtype.element_ty), mask=mask)


_TILE = 16, 128  # tokens and channels


def _grid(z: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    sizes = z.shape[0] * z.shape[1], z.shape[2]
    return (_ceil(sizes[0], _TILE[0]), _ceil(sizes[1], _TILE[1])), sizes


@launched("silu_gate", "(Tensor x, Tensor gate, Tensor? other) -> Tensor")
def _forward(x: Tensor, gate: Tensor, other: Tensor | None) -> Tensor:
    (x, x_row), (gate, gate_row) = _rows(x), _rows(gate)
    second, other_row = (x, x_row) if other is None else _rows(other)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if out.numel():
        grid, sizes = _grid(out)
        launch_kernel(_silu_gate_kernel, grid,
            x, gate, second, out, *sizes, x_row, gate_row, other_row, other is not None, *_TILE,
            num_warps=4,
        )  # fmt: skip
    return out


@launched(
    "silu_gate_backward",
    "(Tensor grad, Tensor x, Tensor gate, Tensor? other) -> (Tensor, Tensor)",
)
def _backward(
    grad: Tensor, x: Tensor, gate: Tensor, other: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x``, which is that of ``other``, and of ``gate``."""
    (grad, grad_row), (x, x_row), (gate, gate_row) = _rows(grad), _rows(x), _rows(gate)
    second, other_row = (x, x_row) if other is None else _rows(other)
    outs = [torch.empty(z.shape, dtype=z.dtype, device=z.device) for z in (x, gate)]
    if gate.numel():
        grid, sizes = _grid(gate)
        launch_kernel(_silu_gate_gradient_kernel, grid,
            grad, x, gate, second, *outs, *sizes, grad_row, x_row, gate_row, other_row,
            other is not None, *_TILE, num_warps=4,
        )  # fmt: skip
    return outs[0], outs[1]


@_forward.register_fake
def _(x: Tensor, gate: Tensor, other: Tensor | None) -> Tensor:
    return gate.new_empty(gate.shape)


@_backward.register_fake
def _(grad: Tensor, x: Tensor, gate: Tensor, other: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), gate.new_empty(gate.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, gate, other = ctx.saved_tensors
    of_x, of_gate = _backward(grad, x, gate, other)
    return of_x, of_gate, None if other is None else of_x.to(other.dtype)


_forward.register_autograd(_gradients, setup_context=_setup)


def silu_gate(x: Tensor, gate: Tensor, other: Tensor | None = None) -> Tensor:
    """See ``attnzoo.ops.silu_gate``."""
    return _forward(x, gate, other)
