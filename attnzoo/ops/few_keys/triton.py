"""Attention over few keys and its gradient: a program keeps a head's keys and values.

A row of scores is whole in registers, so that nothing is rescaled, the forward saves nothing but
its operands, and the backward computes scores once more and writes each gradient once.
"""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.ops.few_keys import MOST_HALF
from attnzoo.ops.precision import operand_dtype
from attnzoo.ops.triton_common import (
    _LOG2E,
    _add_dot,
    _ceil,
    _dot,
    _power_of_2,
    _precision,
    _rows,
    _width,
    launch_kernel,
    launched,
)
from attnzoo.ops.triton_replay import replayed


@triton.jit
def _tile(z, first, spacing, head, d, row, column, mask):
    """Rows of a head from one on; the wide part of their addresses is one number of them all."""
    z += first.to(tl.int64) * spacing + head * d
    return tl.load(z + row[:, None] * spacing + column[None, :], mask=mask, other=0.0)


@triton.jit
def _weights(q, k, m, keys, scale, P: tl.constexpr):
    """softmax over the keys, (rows, keys)."""
    s = _dot(q, tl.trans(k), P) * (scale * _LOG2E)
    s = tl.where((m < keys)[None, :], s, -float("inf"))
    p = tl.exp2(s - tl.max(s, 1)[:, None])
    return p * (1 / tl.sum(p, 1))[:, None]


@triton.jit
def _few_keys_kernel(
    query, key, value, out, n, keys, heads, d, q_row, k_row, v_row, splits, chunk, scale,
    M: tl.constexpr, D: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    split, image_head = tl.program_id(0) % splits, tl.program_id(0) // splits
    image, head = image_head // heads, image_head % heads
    row, m, column = tl.arange(0, R), tl.arange(0, M), tl.arange(0, D)
    is_column = (column < d)[None, :]
    mask_m = (m < keys)[:, None] & is_column
    k = _tile(key, image * keys, k_row, head, d, m, column, mask_m)
    v = _tile(value, image * keys, v_row, head, d, m, column, mask_m)
    for start in range(split * chunk, tl.minimum((split + 1) * chunk, n), R):
        mask = (row < n - start)[:, None] & is_column
        q = _tile(query, image * n + start, q_row, head, d, row, column, mask)
        z = _dot(_weights(q, k, m, keys, scale, P).to(v.dtype), v, P)
        place = out + (image * n + start).to(tl.int64) * (heads * d) + head * d
        place += row[:, None] * (heads * d) + column[None, :]
        tl.store(place, z.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _few_keys_gradient_kernel(
    grad, query, key, value, grad_q, partial, n, keys, heads, d, g_row, q_row, k_row, v_row,
    splits, chunk, scale, M: tl.constexpr, D: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Of queries, and a part of those of keys and values."""
    split, image_head = tl.program_id(0) % splits, tl.program_id(0) // splits
    image, head = image_head // heads, image_head % heads
    row, m, column = tl.arange(0, R), tl.arange(0, M), tl.arange(0, D)
    is_column = (column < d)[None, :]
    mask_m = (m < keys)[:, None] & is_column
    k = _tile(key, image * keys, k_row, head, d, m, column, mask_m)
    v = _tile(value, image * keys, v_row, head, d, m, column, mask_m)
    of_key = tl.zeros((M, D), tl.float32)
    of_value = tl.zeros((M, D), tl.float32)
    for start in range(split * chunk, tl.minimum((split + 1) * chunk, n), R):
        mask = (row < n - start)[:, None] & is_column
        q = _tile(query, image * n + start, q_row, head, d, row, column, mask)
        g = _tile(grad, image * n + start, g_row, head, d, row, column, mask)
        p = _weights(q, k, m, keys, scale, P)
        of_value = _add_dot(of_value, tl.trans(p.to(g.dtype)), g, P)
        slope = _dot(g, tl.trans(v), P)
        slope = (p * (slope - tl.sum(p * slope, 1)[:, None]) * scale).to(q.dtype)
        of_key = _add_dot(of_key, tl.trans(slope), q, P)
        place = grad_q + (image * n + start).to(tl.int64) * (heads * d) + head * d
        place += row[:, None] * (heads * d) + column[None, :]
        tl.store(place, _dot(slope, k, P).to(grad_q.dtype.element_ty), mask=mask)
    place = (tl.program_id(0).to(tl.int64) * 2 * keys + m)[:, None] * d + column[None, :]
    tl.store(partial + place, of_key, mask=mask_m)
    tl.store(partial + place + keys * d, of_value, mask=mask_m)


@triton.jit
def _few_keys_sum_kernel(
    partial, grad_k, grad_v, keys, heads, d, splits, S: tl.constexpr, D: tl.constexpr
):
    """The parts of a key's gradient and of its value's, one below the other."""
    image_head, m = tl.program_id(0) // keys, tl.program_id(0) % keys
    split, column = tl.arange(0, S), tl.arange(0, D)
    is_column = column < d
    mask = (split < splits)[:, None] & is_column[None, :]
    place = ((image_head * splits + split).to(tl.int64) * 2 * keys + m)[:, None] * d
    place += partial + column[None, :]
    row = ((image_head // heads).to(tl.int64) * keys + m) * heads * d
    row += image_head % heads * d + column
    total = tl.sum(tl.load(place, mask=mask, other=0.0), 0)
    tl.store(grad_k + row, total.to(grad_k.dtype.element_ty), mask=is_column)
    total = tl.sum(tl.load(place + keys * d, mask=mask, other=0.0), 0)
    tl.store(grad_v + row, total.to(grad_v.dtype.element_ty), mask=is_column)


PROGRAMS = 264
# Tokens of a tile and warps, in half precision, by keys times channels of a head at most.
FORWARD = {4096: (64, 4), MOST_HALF: (64, 4)}
BACKWARD = {4096: (64, 4), MOST_HALF: (64, 8)}
FEW_ROWS = 16  # in float32


def _launch(
    blocks: dict[int, tuple[int, int]], query: Tensor, keys: int, heads: int
) -> tuple[Any, ...]:
    """Parts of the tokens, tokens of a part; what the kernel is told; what Triton is told."""
    b, n, c = query.shape
    sides = _width(keys), _width(c // heads)
    rows, warps = next(blocks[most] for most in blocks if sides[0] * sides[1] <= most)
    stages = 2
    if query.dtype == torch.float32:
        rows, stages = FEW_ROWS, 1
    splits = max(1, min(_ceil(n, rows), _ceil(PROGRAMS, max(1, b * heads))))
    chunk = _ceil(_ceil(n, splits), rows) * rows
    constants = *sides, rows, _precision(query.dtype)
    return _ceil(n, chunk), chunk, constants, {"num_warps": warps, "num_stages": stages}


@launched("few_keys", "(Tensor query, Tensor key, Tensor value, int heads) -> Tensor")
def _forward(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    (query, q_row), (key, k_row), (value, v_row) = _rows(query), _rows(key), _rows(value)
    (b, n, c), keys, d = query.shape, key.shape[1], query.shape[2] // heads
    out = torch.empty(b, n, c, dtype=query.dtype, device=query.device)
    if out.numel():
        splits, chunk, constants, options = _launch(FORWARD, query, keys, heads)
        launch_kernel(
            _few_keys_kernel, (b * heads * splits,), query, key, value, out, n, keys, heads, d,
            q_row, k_row, v_row, splits, chunk, d**-0.5, *constants, **options,
        )  # fmt: skip
    return out


@launched(
    "few_keys_backward",
    "(Tensor grad, Tensor query, Tensor key, Tensor value, int heads) -> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    (query, q_row), (key, k_row), (value, v_row) = _rows(query), _rows(key), _rows(value)
    grad, g_row = _rows(grad)
    (b, n, c), keys, d = query.shape, key.shape[1], query.shape[2] // heads

    def new(*shape: int, dtype: torch.dtype = query.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=query.device)

    grad_q, grad_k, grad_v = new(b, n, c), new(b, keys, c), new(b, keys, c)
    if not grad_q.numel():
        return grad_q, grad_k.zero_(), grad_v.zero_()
    splits, chunk, constants, options = _launch(BACKWARD, query, keys, heads)
    partial = new(b * heads * splits, 2, keys, d, dtype=torch.float32)
    launch_kernel(
        _few_keys_gradient_kernel, (b * heads * splits,), grad, query, key, value, grad_q, partial,
        n, keys, heads, d, g_row, q_row, k_row, v_row, splits, chunk, d**-0.5, *constants,
        **options,
    )  # fmt: skip
    launch_kernel(
        _few_keys_sum_kernel, (b * heads * keys,), partial, grad_k, grad_v, keys, heads, d, splits,
        _power_of_2(splits), _width(d), num_warps=1,
    )  # fmt: skip
    return grad_q, grad_k, grad_v


@_forward.register_fake
def _(query: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape)


@_backward.register_fake
def _(_: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    return tuple(z.new_empty(z.shape) for z in operands[:3])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *operands, ctx.heads = inputs
    ctx.save_for_backward(*operands)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(grad, *ctx.saved_tensors, ctx.heads), None


_forward.register_autograd(_gradients, setup_context=_setup)
_forward.register_inference(replayed(_forward.function))


def few_keys(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """See ``attnzoo.ops.few_keys``; scores and sums in float32."""
    dtype = operand_dtype(query)
    return _forward(query.to(dtype), key.to(dtype), value.to(dtype), heads)
