"""What the gates of the delta rule are made of, in one launch, and its gradients in another."""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.ops.delta_rule.triton_common import _sigmoid
from attnzoo.ops.gated_scan.triton_common import _log2_gate
from attnzoo.ops.triton_common import (
    _LN2,
    _ceil,
    _power_of_2,
    column_sum,
    launch_kernel,
    launched,
)

GATES_TILE = (32, 4)  # rows, warps


@triton.jit
def _gates_tile(gates, rate, bias, n, heads, size, R: tl.constexpr, E: tl.constexpr):
    """Steps, strengths before their sigmoid, rates, and where the results have their place."""
    row, column = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, E)
    is_column = column < size
    mask = (row < n)[:, None] & is_column[None, :]
    place = row.to(tl.int64)[:, None] * size + column[None, :]
    first = row.to(tl.int64)[:, None] * (2 * size) + (column + column // heads * heads)[None, :]
    step = tl.load(gates + first, mask=mask, other=0.0).to(tl.float32)
    step += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    raw = tl.load(gates + first + heads, mask=mask, other=0.0).to(tl.float32)
    speed = tl.exp(tl.load(rate + column, mask=is_column, other=0.0).to(tl.float32))[None, :]
    return step, raw, speed, mask, place, first


@triton.jit
def _delta_gates_kernel(
    gates, rate, bias, decay, strength, n, heads, size, R: tl.constexpr, E: tl.constexpr
):
    step, raw, speed, mask, place, _ = _gates_tile(gates, rate, bias, n, heads, size, R, E)
    tl.store(decay + place, _log2_gate(-step, mask, speed * _LN2, True), mask=mask)
    tl.store(strength + place, _sigmoid(raw), mask=mask)


@triton.jit
def _delta_gates_gradient_kernel(
    grad_decay, grad_strength, gates, rate, bias, grad, partial, n, heads, size,
    R: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    step, raw, speed, mask, place, first = _gates_tile(gates, rate, bias, n, heads, size, R, E)
    of_decay = tl.load(grad_decay + place, mask=mask, other=0.0)
    of_rate = tl.sum(of_decay * _log2_gate(-step, mask, speed * _LN2, True), 0)
    of_step = -of_decay * speed * _sigmoid(step)
    share = _sigmoid(raw)
    of_raw = tl.load(grad_strength + place, mask=mask, other=0.0) * share * (1.0 - share)
    tl.store(grad + first, of_step.to(grad.dtype.element_ty), mask=mask)
    tl.store(grad + first + heads, of_raw.to(grad.dtype.element_ty), mask=mask)
    column = tl.arange(0, E)
    partial += tl.program_id(0) * 2 * size + column
    tl.store(partial, of_rate, mask=column < size)
    tl.store(partial + size, tl.sum(of_step, 0), mask=column < size)


def _sizes(gates: Tensor, rate: Tensor) -> tuple[int, ...]:
    rows, warps = GATES_TILE
    n, size = gates.shape[:-1].numel(), rate.numel()
    return _ceil(n, rows), n, rate.shape[1], size, rows, _power_of_2(size), warps


@launched("delta_gates", "(Tensor gates, Tensor rate, Tensor bias) -> (Tensor, Tensor)")
def _forward(gates: Tensor, rate: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    gates = gates.contiguous()
    shape = *gates.shape[:-1], *rate.shape
    decay, strength = (gates.new_empty(shape, dtype=torch.float32) for _ in range(2))
    programs, *sizes, warps = _sizes(gates, rate)
    if programs:
        launch_kernel(_delta_gates_kernel, (programs,),
            gates, rate.contiguous(), bias.contiguous(), decay, strength, *sizes,
            num_warps=warps,
        )  # fmt: skip
    return decay, strength


@_forward.register_fake
def _(gates: Tensor, rate: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    shape = *gates.shape[:-1], *rate.shape
    decay, strength = (gates.new_empty(shape, dtype=torch.float32) for _ in range(2))
    return decay, strength


@launched(
    "delta_gates_backward",
    "(Tensor grad_decay, Tensor grad_strength, Tensor gates, Tensor rate, Tensor bias) "
    "-> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad_decay: Tensor, grad_strength: Tensor, gates: Tensor, rate: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    gates = gates.contiguous()
    grad = torch.empty_like(gates)
    programs, *sizes, warps = _sizes(gates, rate)
    partial = gates.new_empty(programs, 2, *rate.shape, dtype=torch.float32)
    if programs:
        launch_kernel(_delta_gates_gradient_kernel, (programs,),
            grad_decay.contiguous(), grad_strength.contiguous(), gates, rate.contiguous(),
            bias.contiguous(), grad, partial, *sizes, num_warps=warps,
        )  # fmt: skip
    of_rate, of_bias = column_sum(partial)
    # Copies, as results of operators share no memory.
    return grad, of_rate.to(rate.dtype, copy=True), of_bias.to(bias.dtype, copy=True)


@_backward.register_fake
def _(_: Tensor, __: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
    gates, rate, bias = (z.new_empty(z.shape) for z in operands)
    return gates, rate, bias


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
    return _backward(*grads, *ctx.saved_tensors)


_forward.register_autograd(_gradients, setup_context=_setup)


def delta_gates(gates: Tensor, rate: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Log decays -exp(rate) softplus(step + bias), and strengths, which are sigmoids.

    Args:
        gates: Steps and strengths, (b, n, directions * 2 * h), as a projection leaves them.
        rate: (directions, h).
        bias: Likewise.

    Returns:
        Both (b, n, directions, h), in float32.
    """
    return _forward(gates, rate, bias)
