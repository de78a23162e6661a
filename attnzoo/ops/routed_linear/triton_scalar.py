"""A router's choice and the scalar that it picks, by Triton kernels: map-wise DyDiLA's lambda."""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.ops.routed_linear.reference import Route
from attnzoo.ops.routed_linear.triton import _decide
from attnzoo.ops.triton_common import (
    _add_dot,
    _ceil,
    _dot,
    _precision,
    _rows,
    _width,
    column_sum,
    launch_kernel,
    launched,
)


@triton.jit
def _part_logits(
    logits, x, row, is_row, x_row, router, line, choice, experts, d, K: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    for first in range(0, d, K):
        k = first + tl.arange(0, K)
        tile = x + row[:, None] * x_row + k[None, :]
        token = tl.load(tile, mask=is_row[:, None] & (k < d)[None, :], other=0.0)
        place = router + choice[None, :] * line + k[:, None]
        w = tl.load(place, mask=(choice < experts)[None, :] & (k < d)[:, None], other=0.0)
        logits = _add_dot(logits, token.to(w.dtype), w, P)
    return logits


@triton.jit
def _scalar_kernel(
    x, y, router, scalars, chosen, index, logits, rows, d, x_row, y_row, experts,
    PARTS: tl.constexpr, LEARN: tl.constexpr, R: tl.constexpr, K: tl.constexpr, E: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    is_row = row < rows
    choice = tl.arange(0, E)
    line = PARTS * d
    found = tl.zeros((R, E), tl.float32)
    found = _part_logits(found, x, row, is_row, x_row, router, line, choice, experts, d, K, P)
    if PARTS == 2:
        found = _part_logits(
            found, y, row, is_row, y_row, router + d, line, choice, experts, d, K, P
        )
    dtype: tl.constexpr = x.dtype.element_ty
    value, _, best = _decide(found, scalars, experts, dtype, E)
    tl.store(chosen + row, value, mask=is_row)
    tl.store(index + row, tl.minimum(best, experts - 1).to(tl.int64), mask=is_row)
    if LEARN:
        place = logits + row[:, None] * experts + choice[None, :]
        mask = is_row[:, None] & (choice < experts)[None, :]
        tl.store(place, found.to(dtype).to(tl.float32), mask=mask)


@triton.jit
def _scalar_gradient_kernel(
    x, router, scalars, grad, index, logits, grad_x, partial, rows, d, x_row, experts, line, start,
    rows_each, LEARN: tl.constexpr, R: tl.constexpr, K: tl.constexpr, E: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0) * K + tl.arange(0, K)
    part = tl.program_id(1).to(tl.int64)
    choice = tl.arange(0, E)
    is_choice = choice < experts
    dtype: tl.constexpr = router.dtype.element_ty
    own = partial + part * experts * (line + 1)
    mask = is_choice[:, None] & (k < d)[None, :]
    place = choice[:, None] * line + start + k[None, :]
    table = tl.load(scalars + choice, mask=is_choice, other=0.0).to(tl.float32)
    of_scalars = tl.zeros((E,), tl.float32)
    of_router = tl.zeros((E, K), tl.float32)
    if LEARN:
        w = tl.load(router + place, mask=mask, other=0.0)
    for first in range(0, rows_each, R):
        row = part * rows_each + first + tl.arange(0, R)
        is_row = (row < rows) & (first + tl.arange(0, R) < rows_each)
        g = tl.load(grad + row, mask=is_row, other=0.0).to(tl.float32)
        best = tl.load(index + row, mask=is_row, other=0).to(tl.int32)
        of_scalars += tl.sum(tl.where(choice[None, :] == best[:, None], g[:, None], 0.0), 0)
        if LEARN:
            z = logits + row[:, None] * experts + choice[None, :]
            z = tl.load(z, mask=is_row[:, None] & is_choice[None, :], other=0.0)
            z = tl.where(is_choice[None, :], z, -float("inf"))
            p = tl.exp(z - tl.max(z, 1)[:, None])
            p = p / tl.sum(p, 1)[:, None]
            mean = tl.sum(p * table[None, :], 1)
            slope = (p * (table[None, :] - mean[:, None]) * g[:, None]).to(dtype)
            spot = is_row[:, None] & (k < d)[None, :]
            tl.store(grad_x + row[:, None] * d + k[None, :], _dot(slope, w, P), mask=spot)
            token = tl.load(x + row[:, None] * x_row + k[None, :], mask=spot, other=0.0)
            of_router = _add_dot(of_router, tl.trans(slope), token.to(dtype), P)
    if LEARN:
        tl.store(own + place, of_router, mask=mask)
    if tl.program_id(0) == 0:
        tl.store(own + experts * line + choice, of_scalars, mask=is_choice)


@launched("routed_scalar")
def _routed_scalar(
    x: Tensor, y: Tensor | None, router: Tensor, scalars: Tensor, learn: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The scalars that rows choose, in float32; the choices; and the logits, if asked for."""
    (x, spacing), (y, y_spacing) = _rows(x), _rows(x if y is None else y)
    (rows, d), experts = x.shape, router.shape[0]
    chosen = torch.empty(rows, dtype=torch.float32, device=x.device)
    index = torch.empty(rows, dtype=torch.int64, device=x.device)
    logits = torch.empty(rows if learn else 0, experts, dtype=torch.float32, device=x.device)
    if rows:
        launch_kernel(_scalar_kernel, (_ceil(rows, 32),),
            x, y, router.contiguous(), scalars.contiguous(), chosen, index, logits, rows, d,
            spacing, y_spacing, experts, router.shape[1] // d, learn, 32, 128, _width(experts),
            _precision(router.dtype), num_warps=4,
        )  # fmt: skip
    return chosen, index, logits


@_routed_scalar.register_fake
def _(
    x: Tensor, y: Tensor | None, router: Tensor, scalars: Tensor, learn: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[0]
    return (
        x.new_empty(rows, dtype=torch.float32),
        x.new_empty(rows, dtype=torch.int64),
        x.new_empty(rows if learn else 0, router.shape[0], dtype=torch.float32),
    )


@launched("routed_scalar_backward")
def _routed_scalar_backward(
    grad: Tensor, x: Tensor, y: Tensor | None, router: Tensor, scalars: Tensor, index: Tensor,
    logits: Tensor, learn: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the parts, the router, the scalars; without ``learn`` the first are empty."""
    (rows, d), (experts, line) = x.shape, router.shape
    line = line if learn else 0
    router, scalars, grad = router.contiguous(), scalars.contiguous(), grad.contiguous()
    columns = _ceil(d, 64) if learn else 1
    each = _ceil(_ceil(rows, max(1, 512 // columns)), 64) * 64
    programs = max(1, _ceil(rows, max(1, each)))
    partial = torch.empty(programs, experts * (line + 1), dtype=torch.float32, device=x.device)
    grads = []
    for i, z in enumerate([x] if y is None else [x, y]):
        z, spacing = _rows(z)
        grads.append(torch.empty(rows if learn else 0, d, dtype=z.dtype, device=z.device))
        if rows and (learn or i == 0):
            launch_kernel(_scalar_gradient_kernel, (columns, programs),
                z, router, scalars, grad, index, logits, grads[-1], partial, rows, d, spacing,
                experts, line, i * d, each, learn, 64, 64, _width(experts),
                _precision(router.dtype), num_warps=4,
            )  # fmt: skip
    of_router, of_scalars = column_sum(partial if rows else partial.zero_()).split(
        [experts * line, experts]
    )
    return (
        grads[0],
        x.new_empty(0) if y is None else grads[1],
        # Copies: an operator's results may not share memory.
        of_router.view(experts, line).to(router.dtype, copy=True),
        of_scalars.to(scalars.dtype, copy=True),
    )


@_routed_scalar_backward.register_fake
def _(
    grad: Tensor, x: Tensor, y: Tensor | None, router: Tensor, scalars: Tensor, index: Tensor,
    logits: Tensor, learn: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shape = x.shape if learn else (0, x.shape[1])
    return (
        x.new_empty(shape),
        x.new_empty(0) if y is None else y.new_empty(shape),
        router.new_empty(router.shape[0], router.shape[1] if learn else 0),
        scalars.new_empty(scalars.shape),
    )


def _scalar_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    *operands, ctx.learn = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*operands, *output[1:])


def _scalar_gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    saved = ctx.saved_tensors
    found = _routed_scalar_backward(grad, *saved, ctx.learn)
    grad_x, grad_y, grad_router, grad_scalars = found
    if not ctx.learn:
        return None, None, None, grad_scalars, None
    return grad_x, None if saved[1] is None else grad_y, grad_router, grad_scalars, None


_routed_scalar.register_autograd(_scalar_gradients, setup_context=_scalar_setup)


def routed_scalar(
    weight: Tensor, parts: Sequence[Tensor], scalars: Tensor, learn: bool
) -> tuple[Tensor, Route]:
    """See ``pick``; the scalars come in float32, and the logits have no gradient of their own."""
    shape = parts[0].shape[:-1]
    x, *others = (z.reshape(-1, z.shape[-1]) for z in parts)
    y = others[0] if others else None
    chosen, index, logits = _routed_scalar(x, y, weight, scalars, learn)
    seen = logits.detach().view(*shape, weight.shape[0]) if learn else None
    route = Route(index.view(shape), seen)
    return chosen.view(*shape, 1), route
