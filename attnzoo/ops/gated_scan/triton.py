"""The mean of scans by kernels: both directions of an order of the tokens from one read.

Four kernels: what each chunk adds to the states of both directions; the states that enter each
chunk, by a recurrence over chunks; the outputs; and, in ``triton_backward.py``, the gradients. The
gradients of the states are states of scans the other way round, with queries for keys and the
gradient of the output for values, so that the first two kernels serve the backward as well.

Inside a chunk the weights of both directions make one full matrix. Blocks of 1, 2, 4, ... tokens
are joined pairwise: between two halves of a pair all decays lead to the border between them, so
that one product gives the weights of both directions and no exponent is positive.
"""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.ops.gated_scan.triton_backward import _gated_gradient_kernel, _put
from attnzoo.ops.gated_scan.triton_common import (
    _are_pairs,
    _join,
    _log2_gate,
    _places,
    _scaled,
    _tile,
)
from attnzoo.ops.triton_common import _add_dot, _ceil, _dot, _precision, _width, launched


@triton.jit
def _gated_update_kernel(
    x, y, gate, left, right, totals, n, heads, dk, dv, chunks, height, width,
    x_image, x_token, x_head, y_image, y_token, y_head, g_image, g_token, g_head, per_gate,
    QUERY: tl.constexpr, MAPPED: tl.constexpr, COLUMNS: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, LEVELS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    # left: x^T y with x decayed until the end of the chunk, for what comes from the left of the
    # next; right: until its start. QUERY: x decays by its own gate as well.
    C: tl.constexpr = 1 << LEVELS
    chunk = tl.program_id(0) % chunks
    image_head = tl.program_id(0) // chunks
    image, head = (image_head // heads).to(tl.int64), image_head % heads
    token, is_token = _places(chunk, n, height, width, C, COLUMNS)
    row, wide = tl.arange(0, C), tl.program_id(2) * V + tl.arange(0, V)
    column = tl.program_id(1) * K + tl.arange(0, K)
    mask = is_token[:, None] & (column < dk)[None, :]
    a = _tile(x, image, head, token, column, mask, x_image, x_token, x_head).to(tl.float32)
    g = _tile(gate, image, head, token, column, mask, g_image, g_token, g_head)
    mask_v = is_token[:, None] & (wide < dv)[None, :]
    b = _tile(y, image, head, token, wide, mask_v, y_image, y_token, y_head)
    b = b.to(x.dtype.element_ty)
    total = _log2_gate(g, mask, per_gate, MAPPED)
    if QUERY:
        a *= tl.exp2(total)
    before, after = tl.zeros((C, K), tl.float32), tl.zeros((C, K), tl.float32)
    for level in range(LEVELS):
        before, after, total = _join(before, after, total, row, level)
    at = image_head.to(tl.int64) * chunks + chunk
    spot = at * dk * dv + column[:, None] * dv + wide[None, :]
    mask_s = (column < dk)[:, None] & (wide < dv)[None, :]
    if LEFT:
        update = _dot(tl.trans((a * tl.exp2(after)).to(b.dtype)), b, P)
        tl.store(left + spot, update, mask=mask_s)
    if RIGHT:
        update = _dot(tl.trans((a * tl.exp2(before)).to(b.dtype)), b, P)
        tl.store(right + spot, update, mask=mask_s)
    if tl.program_id(2) == 0:
        everything = tl.max(total, 0)  # the same in every row
        tl.store(totals + at * dk + column, everything, mask=column < dk)


@triton.jit
def _gated_carry_kernel(
    updates, totals, states, rows, chunks, dk, dv, LEFT: tl.constexpr, E: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    # Slot 0 is carried from the left if there is a LEFT, every other from the right.
    slot, image_head = tl.program_id(0) // rows, (tl.program_id(0) % rows).to(tl.int64)
    entry = tl.program_id(1) * E + tl.arange(0, E)
    mask = entry < dk * dv
    from_left = (slot == 0) & LEFT
    first = tl.where(from_left, 0, chunks - 1)
    step = tl.where(from_left, 1, -1)
    base = (slot * rows + image_head) * chunks
    state = tl.zeros((E,), tl.float32)
    for turn in tl.range(0, chunks, num_stages=STAGES):
        chunk = first + turn * step
        spot = (base + chunk) * dk * dv + entry
        update = tl.load(updates + spot, mask=mask, other=0.0)
        total = tl.load(
            totals + (image_head * chunks + chunk) * dk + entry // dv, mask=mask, other=0.0
        )
        tl.store(states + spot, state.to(states.dtype.element_ty), mask=mask)
        state = state * tl.exp2(total) + update


@triton.jit
def _gated_output_kernel(
    query, key, value, gate, left, right, out, added, n, heads, dk, dv, chunks, height, width,
    q_image, q_token, q_head, k_image, k_token, k_head, v_image, v_token, v_head,
    g_image, g_token, g_head, per_gate, scale,
    MAPPED: tl.constexpr, COLUMNS: tl.constexpr, FORWARD: tl.constexpr, BACKWARD: tl.constexpr,
    CARRIED: tl.constexpr, ADD: tl.constexpr, LEVELS: tl.constexpr, K: tl.constexpr,
    TILES: tl.constexpr, V: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = 1 << LEVELS
    dtype: tl.constexpr = query.dtype.element_ty
    chunk = tl.program_id(0) % chunks
    image_head = tl.program_id(0) // chunks
    image, head = (image_head // heads).to(tl.int64), image_head % heads
    token, is_token = _places(chunk, n, height, width, C, COLUMNS)
    row, wide = tl.arange(0, C), tl.arange(0, V)
    both: tl.constexpr = 2.0 if FORWARD and BACKWARD else 1.0
    weights = tl.zeros((C, C), tl.float32)
    result = tl.zeros((C, V), tl.float32)
    for tile in range(TILES):
        column = tile * K + tl.arange(0, K)
        mask = is_token[:, None] & (column < dk)[None, :]
        q = _tile(query, image, head, token, column, mask, q_image, q_token, q_head)
        k = _tile(key, image, head, token, column, mask, k_image, k_token, k_head)
        g = _tile(gate, image, head, token, column, mask, g_image, g_token, g_head)
        q, k = q.to(tl.float32), k.to(tl.float32)
        total = _log2_gate(g, mask, per_gate, MAPPED)
        own = both * tl.sum(q * k, 1)[:, None]
        weights += tl.where(row[:, None] == row[None, :], own, 0.0)
        q *= tl.exp2(total)
        before, after = tl.zeros((C, K), tl.float32), tl.zeros((C, K), tl.float32)
        for level in range(LEVELS):
            ql, kl, _, _ = _scaled(q, k, before, after, row, level)
            product = _dot(ql.to(dtype), tl.trans(kl.to(dtype)), P)
            are_pairs = _are_pairs(row, level, FORWARD, BACKWARD)
            weights += tl.where(are_pairs, product, 0.0)
            before, after, total = _join(before, after, total, row, level)
        if CARRIED:
            mask_s = (column < dk)[:, None] & (wide < dv)[None, :]
            spot = (image_head.to(tl.int64) * chunks + chunk) * dk * dv
            spot += column[:, None] * dv + wide[None, :]
            if FORWARD:
                state = tl.load(left + spot, mask=mask_s, other=0.0)
                result = _add_dot(result, (q * tl.exp2(before)).to(dtype), state, P)
            if BACKWARD:
                state = tl.load(right + spot, mask=mask_s, other=0.0)
                result = _add_dot(result, (q * tl.exp2(after)).to(dtype), state, P)
    mask_v = is_token[:, None] & (wide < dv)[None, :]
    v = _tile(value, image, head, token, wide, mask_v, v_image, v_token, v_head)
    result = _add_dot(result, weights.to(dtype), v, P)
    place = ((image * n + token) * heads + head)[:, None] * dv + wide[None, :]
    _put(out, added, place, mask_v, scale * result, ADD)


CHUNK = 64  # tokens, at most
KEYS = 32  # channels of a tile of keys, at most
# Warps and stages.
UPDATE_BLOCK = (4, 1)
OUTPUT_BLOCK = (4, 1)
GRADIENT_BLOCK = (8, 1)
CARRY_BLOCK = (256, 2, 4)  # entries of a state, warps, stages


class _Order(NamedTuple):
    """The rows' or the columns' order, and which of its two directions are scanned."""

    is_columns: bool
    is_forward: bool
    is_backward: bool

    @property
    def count(self) -> int:
        return self.is_forward + self.is_backward


def _orders(directions: int) -> list[_Order]:
    """From a bit for each of rows forward and backward, columns forward and backward."""
    return [
        _Order(shift > 0, bool(bits & 1), bool(bits & 2))
        for shift in (0, 2)
        if (bits := directions >> shift & 3)
    ]


class _Sizes(NamedTuple):
    images: int
    n: int
    heads: int
    dk: int
    dv: int
    levels: int
    chunks: int

    @property
    def rows(self) -> int:
        return self.images * self.heads

    @property
    def tail(self) -> tuple[int, ...]:
        """Of the states of one direction."""
        return (self.rows, self.chunks, self.dk, self.dv)


def _sizes(query: Tensor, value: Tensor) -> _Sizes:
    images, n, heads, dk = query.shape
    chunk = min(CHUNK, _width(n))
    sizes = images, n, heads, dk, value.shape[-1]
    return _Sizes(*sizes, chunk.bit_length() - 1, _ceil(n, chunk))


def _strided(z: Tensor) -> Tensor:
    return z if z.stride(-1) == 1 or z.shape[-1] == 1 else z.contiguous()


def _strides(*operands: Tensor) -> tuple[int, ...]:
    return tuple(stride for z in operands for stride in z.stride()[:3])


def _per_gate(normalizer: float) -> float:
    return 1.0 / normalizer if normalizer else 1.0


def _states(
    x: Tensor, y: Tensor, gate: Tensor, normalizer: float, order: _Order, sizes: _Sizes,
    grid: tuple[int, int], is_query: bool,
) -> Tensor:  # fmt: skip
    """What enters each chunk from the left, then from the right, (directions, rows, chunks, ...).

    Of the forward scan and the backward scan; with queries and the gradient of the output, the
    gradients of what leaves the chunk in the backward scan and the forward scan.
    """
    is_left, is_right = order.is_forward, order.is_backward
    if is_query:
        is_left, is_right = is_right, is_left
    updates = torch.empty(order.count, *sizes.tail, dtype=torch.float32, device=x.device)
    states = torch.empty_like(updates, dtype=x.dtype)
    totals = torch.empty(*sizes.tail[:3], dtype=torch.float32, device=x.device)
    _, n, heads, dk, dv, levels, chunks = sizes
    keys, values = min(KEYS, _width(dk)), min(64, _width(dv))
    warps, stages = UPDATE_BLOCK
    _gated_update_kernel[(sizes.rows * chunks, _ceil(dk, keys), _ceil(dv, values))](
        x, y, gate, updates[0], updates[-1], totals, n, heads, dk, dv, chunks, *grid,
        *_strides(x, y, gate), _per_gate(normalizer), is_query, normalizer != 0,
        order.is_columns, is_left, is_right, levels, keys, values, _precision(x.dtype),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    entries, warps, stages = CARRY_BLOCK
    _gated_carry_kernel[(order.count * sizes.rows, _ceil(dk * dv, entries))](
        updates, totals, states, sizes.rows, chunks, dk, dv, is_left, entries, stages,
        num_warps=warps,
    )
    return states


@launched(
    "gated_scans",
    "(Tensor query, Tensor key, Tensor value, Tensor gate, float normalizer, float scale, "
    "int height, int width, int directions, bool save) -> (Tensor, Tensor)",
)
def gated_scans_forward(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor, normalizer: float, scale: float,
    height: int, width: int, directions: int, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``scale`` times the mean of scans.

    Args:
        query: (b, n, h, dk), float32 or bfloat16.
        key: (b, n, h, dk); like ``value`` in the dtype of ``query``.
        value: (b, n, h, dv).
        gate: (b, n, h, dk), float32 or bfloat16: x of log_gate = logsigmoid(x) / normalizer.
        normalizer: See ``gate``; 0 if ``gate`` is log_gate itself.
        scale: Multiplies the result.
        height: Of the grid of tokens.
        width: Of the grid of tokens.
        directions: Bits 1, 2, 4, 8: rows forward, backward, columns forward, backward.
        save: Whether the states are needed for a backward.

    Returns:
        (b, n, h, dv) in the dtype of ``query``, and what the backward needs of the states.
    """
    query, key, value, gate = map(_strided, (query, key, value, gate))
    sizes = _sizes(query, value)
    images, n, heads, dk, dv, levels, chunks = sizes
    orders = _orders(directions)
    out = torch.empty(images, n, heads, dv, dtype=query.dtype, device=query.device)
    is_carried, kept = chunks > 1, []
    partial = out if len(orders) == 1 else torch.empty_like(out, dtype=torch.float32)
    scale /= sum(order.count for order in orders)
    warps, stages = OUTPUT_BLOCK
    for order in orders if out.numel() else ():
        states = partial
        if is_carried:
            states = _states(
                key, value, gate, normalizer, order, sizes, (height, width), is_query=False
            )
            kept.append(states)
        is_last = order is orders[-1]
        keys = min(KEYS, _width(dk))
        _gated_output_kernel[(sizes.rows * chunks,)](
            query, key, value, gate, states[0], states[-1], out if is_last else partial, partial,
            n, heads, dk, dv, chunks, height, width, *_strides(query, key, value, gate),
            _per_gate(normalizer), scale, normalizer != 0, *order, is_carried,
            order is not orders[0], levels, keys, _ceil(dk, keys), _width(dv),
            _precision(query.dtype), num_warps=warps, num_stages=stages,
        )  # fmt: skip
    if not (save and kept):
        return out, query.new_empty(0, *sizes.tail)
    return out, kept[0] if len(kept) == 1 else torch.cat(kept)


@gated_scans_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, gate: Tensor, *options: Any) -> Any:
    directions, save = options[-2:]
    sizes = _sizes(query, value)
    count = bin(directions).count("1") if save and sizes.chunks > 1 and value.numel() else 0
    shape = *query.shape[:3], value.shape[-1]
    return query.new_empty(shape), query.new_empty(count, *sizes.tail)


@launched(
    "gated_scans_backward",
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor gate, Tensor states, "
    "float normalizer, float scale, int height, int width, int directions) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def gated_scans_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, gate: Tensor, states: Tensor,
    normalizer: float, scale: float, height: int, width: int, directions: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of queries, keys, values and gates, in their dtypes."""
    grad, *operands = map(_strided, (grad, query, key, value, gate))
    sizes = _sizes(query, value)
    _, n, heads, dk, dv, levels, chunks = sizes
    orders = _orders(directions)
    scale /= sum(order.count for order in orders)
    outs = [torch.empty(z.shape, dtype=z.dtype, device=z.device) for z in operands]
    partials = outs
    if len(orders) > 1:
        partials = [torch.empty_like(z, dtype=torch.float32) for z in outs]
    warps, stages = GRADIENT_BLOCK
    keys, done = min(KEYS, _width(dk)), 0
    for order in orders if value.numel() else ():
        entering = leaving = states
        if chunks > 1:
            entering = states[done : done + order.count]
            leaving = _states(
                operands[0], grad, operands[3], normalizer, order, sizes, (height, width), True
            )
        done += order.count
        first, last = (
            (z[0], z[-1]) if chunks > 1 else (z, z) for z in (entering, leaving)
        )
        _gated_gradient_kernel[(sizes.rows * chunks,)](
            *operands, grad, *first, *last, *(outs if order is orders[-1] else partials),
            *partials, n, heads, dk, dv, chunks, height, width, *_strides(*operands, grad),
            _per_gate(normalizer), scale, normalizer != 0, *order, chunks > 1,
            order is not orders[0], levels, keys, _ceil(dk, keys), _width(dv),
            _precision(query.dtype), num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return tuple(outs)


@gated_scans_backward.register_fake
def _(grad: Tensor, *operands: Any) -> Any:
    return tuple(z.new_empty(z.shape) for z in operands[:4])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    *operands, normalizer, scale, height, width, directions, _ = inputs
    ctx.options = normalizer, scale, height, width, directions
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*operands, output[1])


def _gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    return *gated_scans_backward(grad, *ctx.saved_tensors, *ctx.options), *[None] * 6


gated_scans_forward.register_autograd(_gradients, setup_context=_setup)

_BITS = {"forward": 1, "backward": 2, "columns-forward": 4, "columns-backward": 8}


def gated_scans(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor, grid: tuple[int, int],
    directions: Any, scale: float = 1.0, normalizer: float = 0.0,
) -> Tensor:  # fmt: skip
    """See ``gated_scans_forward``; operands of any of the types that the layers have."""
    operands = (query, key, value, gate)
    save = torch.is_grad_enabled() and any(z.requires_grad for z in operands)
    bits = sum(_BITS[direction] for direction in directions)
    dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
    dtype = torch.float32 if dtype == torch.float16 else dtype  # which overflows
    query, key, value = (z.to(dtype) for z in (query, key, value))
    gate = gate.float() if gate.dtype == torch.float16 else gate
    return gated_scans_forward(
        query, key, value, gate, normalizer, scale, *grid, bits, save
    )[0]  # fmt: skip
