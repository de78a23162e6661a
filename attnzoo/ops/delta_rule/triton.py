"""The gated delta rule by kernels: a chunk is a matrix times the state, plus what it adds.

Three launches, for both directions of an order of the tokens: of every chunk, the inverse of its
triangular system, and what it keeps and adds; the states that enter each chunk, by a recurrence
with one product a chunk; the outputs. The gradients of the states follow the same recurrence the
other way round, so that the first two kernels serve the backward too; the gradients of the
operands are in ``triton_backward.py``.
"""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.ops.delta_rule.triton_backward import (
    _delta_gradient_kernel,
    _delta_written_kernel,
    _put,
)
from attnzoo.ops.delta_rule.triton_common import (
    _decays,
    _edges,
    _gates,
    _inverse,
    _is_later,
    _mapped,
    _product,
    _raw,
    _state,
    _tiles,
)
from attnzoo.ops.gated_scan.triton import _BITS, _Order, _orders
from attnzoo.ops.gated_scan.triton_common import _places
from attnzoo.ops.triton_common import (
    _ceil,
    _dot,
    _precision,
    _shared_memory,
    _width,
    launch_kernel,
    launched,
)


@triton.jit
def _delta_update_kernel(
    query, key, value, log_decay, strength, inverses, keeps, updates, totals,
    n, heads, dk, dv, rows, chunks, height, width,
    q_image, q_token, q_head, k_image, k_token, k_head, v_image, v_token, v_head,
    scale, first, directions, is_reversed, levels,
    MAPPED: tl.constexpr, COLUMNS: tl.constexpr, CARRIED: tl.constexpr, ADJOINT: tl.constexpr,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    # The state after a chunk is (total - keeps) times that before it, plus updates. ADJOINT: of
    # the states' gradients, from the end to the start, where value is the outputs' gradient.
    slot = tl.program_id(1)
    chunk = tl.program_id(0) % chunks
    image_head = tl.program_id(0) // chunks
    image, head = (image_head // heads).to(tl.int64), image_head % heads
    token, is_token = _places(chunk, n, height, width, C, COLUMNS)
    is_up = (slot == 1) | (is_reversed != 0)
    row, column, wide = tl.arange(0, C), tl.arange(0, K), tl.arange(0, V)
    mask_k = is_token[:, None] & (column < dk)[None, :]
    mask_v = is_token[:, None] & (wide < dv)[None, :]
    k = _raw(key, image, head, token, column, mask_k, k_image, k_token, k_head)
    k = _mapped(k, MAPPED, True)
    gate, beta = _gates(
        log_decay, strength, image, head, token, is_token, first + slot, n, heads, directions
    )
    decay = _decays(gate, row, is_up, P, EXACT)
    system = _product(k, tl.trans(k), P, HALF) * decay * beta[:, None]
    inverse = _inverse(tl.where(_is_later(row, is_up), system, 0.0), row, levels, P)
    at = (slot * rows + image_head).to(tl.int64) * chunks + chunk
    tl.store(inverses + at * C * C + row[:, None] * C + tl.arange(0, C)[None, :],
             inverse.to(inverses.dtype.element_ty))  # fmt: skip
    if CARRIED:
        start, end = _edges(gate, row, is_up)
        v = _raw(value, image, head, token, wide, mask_v, v_image, v_token, v_head)
        if ADJOINT:
            v *= scale
            q = _raw(query, image, head, token, column, mask_k, q_image, q_token, q_head)
            q = _mapped(q, MAPPED, True)
            weights = _product(q, tl.trans(k), P, HALF) * decay
            of_written = _product(tl.trans(weights), v, P, HALF)
            left = _product(tl.trans(k * (start * beta)[:, None]), tl.trans(inverse), P, HALF)
            update = _product(tl.trans(q * start[:, None]), v, P, HALF)
            update -= _product(left, of_written, P, HALF)
            keep = _product(left, k * end[:, None], P, HALF)
        else:
            v = _mapped(v, MAPPED, False)
            left = _product(tl.trans(k * end[:, None]), inverse, P, HALF) * beta[None, :]
            update = _product(left, v, P, HALF)
            keep = _product(left, k * start[:, None], P, HALF)
        is_key = column < dk
        spot = at * dk * dv + column[:, None] * dv + wide[None, :]
        mask = is_key[:, None] & (wide < dv)[None, :]
        tl.store(updates + spot, update.to(updates.dtype.element_ty), mask=mask)
        spot = at * dk * dk + column[:, None] * dk + tl.arange(0, K)[None, :]
        mask = is_key[:, None] & (tl.arange(0, K) < dk)[None, :]
        tl.store(keeps + spot, keep.to(keeps.dtype.element_ty), mask=mask)
        tl.store(totals + at, tl.sum(gate, 0))


@triton.jit
def _delta_carry_kernel(
    keeps, updates, totals, states, rows, chunks, dk, dv, is_reversed, ADJOINT: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, STAGES: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    slot, image_head = tl.program_id(0) // rows, (tl.program_id(0) % rows).to(tl.int64)
    is_up = ((slot == 1) | (is_reversed != 0)) != ADJOINT
    column, wide = tl.arange(0, K), tl.program_id(1) * V + tl.arange(0, V)
    square = column[:, None] * dk + tl.arange(0, K)[None, :]
    mask = (column < dk)[:, None] & (tl.arange(0, K) < dk)[None, :]
    spot = column[:, None] * dv + wide[None, :]
    mask_s = (column < dk)[:, None] & (wide < dv)[None, :]
    at = (slot * rows + image_head) * chunks + tl.where(is_up, chunks - 1, 0)
    step = tl.where(is_up, -1, 1)
    keeps += at * dk * dk
    updates += at * dk * dv
    states += at * dk * dv
    totals += at
    state = tl.zeros((K, V), tl.float32)
    for _ in tl.range(0, chunks, num_stages=STAGES):
        keep = tl.load(keeps + square, mask=mask, other=0.0).to(tl.float32)
        update = tl.load(updates + spot, mask=mask_s, other=0.0).to(tl.float32)
        total = tl.load(totals)
        tl.store(states + spot, state.to(states.dtype.element_ty), mask=mask_s)
        state = state * tl.exp2(total) + update - _dot(keep, state, P)
        keeps += step * dk * dk
        updates += step * dk * dv
        states += step * dk * dv
        totals += step


@triton.jit
def _delta_output_kernel(
    query, key, value, log_decay, strength, inverses, states, out, added,
    n, heads, dk, dv, rows, chunks, height, width,
    q_image, q_token, q_head, k_image, k_token, k_head, v_image, v_token, v_head,
    o_image, o_token, o_head, scale, first, directions, slots, nothing, is_reversed,
    MAPPED: tl.constexpr, COLUMNS: tl.constexpr, CARRIED: tl.constexpr, ADD: tl.constexpr,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0) % chunks
    image_head = tl.program_id(0) // chunks
    image, head = (image_head // heads).to(tl.int64), image_head % heads
    result = tl.zeros((C, V), tl.float32)
    for slot in range(slots):
        row, column, wide, token, is_token, mask_k, mask_v = _tiles(
            chunk, n, dk, dv, height, width, slot * nothing, C, K, V, COLUMNS
        )
        is_up = (slot == 1) | (is_reversed != 0)
        at = (slot * rows + image_head).to(tl.int64) * chunks + chunk
        gate, beta = _gates(
            log_decay, strength, image, head, token, is_token, first + slot, n, heads, directions
        )
        k = _raw(key, image, head, token, column, mask_k, k_image, k_token, k_head)
        k = _mapped(k, MAPPED, True)
        wanted = _raw(value, image, head, token, wide, mask_v, v_image, v_token, v_head)
        wanted = _mapped(wanted, MAPPED, False)
        q = _raw(query, image, head, token, column, mask_k, q_image, q_token, q_head)
        q = _mapped(q, MAPPED, True)
        if CARRIED:
            start, _ = _edges(gate, row, is_up)
            state = _state(states, at, dk, dv, column, wide)
            wanted -= start[:, None] * _product(k, state, P, HALF)
            result += start[:, None] * _product(q, state, P, HALF)
        weights = _product(q, tl.trans(k), P, HALF) * _decays(gate, row, is_up, P, EXACT)
        square = inverses + at * C * C + row[:, None] * C + row[None, :]
        inverse = tl.load(square).to(tl.float32)
        written = _product(inverse, beta[:, None] * wanted, P, HALF)
        result += _product(weights, written, P, HALF)
    row, column, wide, token, is_token, mask_k, mask_v = _tiles(
        chunk, n, dk, dv, height, width, 0, C, K, V, COLUMNS
    )
    _put(out, added, image, head, token, wide, mask_v, scale * result, o_image, o_token, o_head,
         ADD)  # fmt: skip


class Blocks(NamedTuple):
    """Sizes of the kernels for one type of operands."""

    chunk: int  # tokens, at most
    # Warps of the kernels: of chunks, of outputs, of what is written, of gradients.
    update: int
    output: int
    written: int
    gradient: int
    carry: tuple[int, int, int]  # columns of a state, warps, stages
    is_half: bool  # whether products, but for the inverse and the states, are of bfloat16
    cached: torch.dtype  # of what one kernel leaves to the next


BLOCKS = {
    torch.bfloat16: Blocks(64, 4, 4, 8, 4, (16, 4, 3), False, torch.float32),
    torch.float32: Blocks(32, 4, 8, 8, 8, (16, 4, 3), False, torch.float32),
}
# Where products read no operand from shared memory, larger tiles would not fit into registers.
_SMALL = Blocks(32, 4, 4, 4, 4, (16, 4, 3), False, torch.float32)
_HOPPER_ROOM = 200 * 2**10  # bytes of shared memory that only such devices have


def _blocks(x: Tensor) -> Blocks:
    room = _shared_memory(x.device)
    is_small = room is not None and room < _HOPPER_ROOM and x.dtype == torch.bfloat16
    return _SMALL if is_small else BLOCKS[x.dtype]


class _Call(NamedTuple):
    """What the launches of one call share. Operands are (images, n, heads, channels)."""

    query: Tensor
    key: Tensor
    value: Tensor
    log_decay: Tensor  # (images, n, directions, heads), like the strength in float32
    strength: Tensor
    is_mapped: bool
    grid: tuple[int, int]
    scale: float

    @property
    def blocks(self) -> Blocks:
        return _blocks(self.query)

    @property
    def chunk(self) -> int:
        return min(self.blocks.chunk, _width(self.query.shape[1]))

    @property
    def sizes(self) -> tuple[int, ...]:
        images, n, heads, dk = self.query.shape
        rows, chunks = images * heads, _ceil(n, self.chunk)
        return n, heads, dk, self.value.shape[-1], rows, chunks, *self.grid

    @property
    def options(self) -> tuple[Any, ...]:
        """The constants at the end of most kernels."""
        dk, dv, dtype = self.query.shape[-1], self.value.shape[-1], self.query.dtype
        is_exact = dtype == torch.float32
        precision = _precision(dtype)
        return self.chunk, _width(dk), _width(dv), precision, self.blocks.is_half, is_exact

    def new(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=self.blocks.cached, device=self.query.device)


def _call(
    query: Tensor, key: Tensor | None, value: Tensor | None, log_decay: Tensor, strength: Tensor,
    heads: int, scale: float, height: int, width: int,
) -> _Call:  # fmt: skip
    gates = log_decay.float().contiguous(), strength.float().contiguous()
    parts: Any = _parts(query, heads) if key is None else (query, key, value)
    parts = [z if z.stride(-1) == 1 or z.shape[-1] == 1 else z.contiguous() for z in parts]
    return _Call(*parts, *gates, key is None, (height, width), scale / log_decay.shape[2])


def _parts(packed: Tensor, heads: int) -> tuple[Tensor, ...]:
    return packed.unflatten(-1, (3, heads, -1)).unbind(2)


def _strides(*operands: Tensor) -> tuple[int, ...]:
    return tuple(stride for z in operands for stride in z.stride()[:3])


def _carry(
    call: _Call, order: _Order, first: int, grad: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The inverses of all chunks of an order, and the states that enter them.

    With the gradient of the outputs, those of the states that leave them.
    """
    dk, dv, rows, chunks = call.sizes[2:6]
    is_adjoint, is_alone, blocks = grad is not None, chunks == 1, call.blocks
    value = call.value if grad is None else grad
    tail = order.count, rows, chunks
    inverses = call.new(*tail, call.chunk, call.chunk)
    keeps = inverses if is_alone else call.new(*tail, dk, dk)
    updates = inverses if is_alone else call.new(*tail, dk, dv)
    totals = torch.empty(tail, dtype=torch.float32, device=value.device)
    is_reversed = int(not order.is_forward)
    launch_kernel(_delta_update_kernel, (rows * chunks, order.count),
        call.query, call.key, value, call.log_decay, call.strength, inverses, keeps, updates,
        totals, *call.sizes, *_strides(call.query, call.key, value), call.scale, first,
        call.log_decay.shape[2], is_reversed, call.chunk.bit_length() - 1, call.is_mapped,
        order.is_columns, not is_alone, is_adjoint, *call.options, num_warps=blocks.update,
    )  # fmt: skip
    if is_alone:
        return inverses, call.new(order.count, rows, 0, dk, dv)
    states = call.new(*tail, dk, dv)
    columns, warps, stages = blocks.carry
    columns = min(columns, _width(dv))
    launch_kernel(_delta_carry_kernel, (order.count * rows, _ceil(dv, columns)),
        keeps, updates, totals, states, rows, chunks, dk, dv, is_reversed, is_adjoint,
        _width(dk), columns, stages, _precision(call.query.dtype), num_warps=warps,
    )  # fmt: skip
    return inverses, states


_OPERANDS = (
    "Tensor query, Tensor? key, Tensor? value, Tensor log_decay, Tensor strength, int heads, "
    "float scale, int height, int width, int bits"
)


@launched("delta_scans", f"({_OPERANDS}, bool save) -> (Tensor, Tensor)")
def delta_scans_forward(
    query: Tensor, key: Tensor | None, value: Tensor | None, log_decay: Tensor, strength: Tensor,
    heads: int, scale: float, height: int, width: int, bits: int, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``scale`` times the mean of scans.

    Args:
        query: (b, n, h, dk), float32 or bfloat16; or, without ``key`` and ``value``, what queries,
            keys and values of one width are made of, side by side, (b, n, 3 h d): they are SiLU
            of it, and queries and keys are divided by their length.
        key: (b, n, h, dk); like ``value`` in the dtype of ``query``.
        value: (b, n, h, dv).
        log_decay: (b, n, directions, h), in the order of ``bits``.
        strength: (b, n, directions, h).
        heads: h.
        scale: Multiplies the result.
        height: Of the grid of tokens.
        width: Of the grid of tokens.
        bits: 1, 2, 4, 8 for rows forward, backward, columns forward, backward.
        save: Whether the states are needed for a backward.

    Returns:
        (b, n, h, dv) in the dtype of ``query``, and the states before each chunk.
    """
    call = _call(query, key, value, log_decay, strength, heads, scale, height, width)
    dk, dv, rows, chunks = call.sizes[2:6]
    out = torch.empty(call.value.shape, dtype=query.dtype, device=query.device)
    cached, partial, first = [], None, 0
    orders = _orders(bits) if out.numel() else []
    for order in orders:
        inverses, states = _carry(call, order, first)
        cached.append(states)
        to = out if order is orders[-1] else torch.empty_like(out, dtype=torch.float32)
        launch_kernel(_delta_output_kernel, (rows * chunks,),
            call.query, call.key, call.value, call.log_decay, call.strength, inverses, states, to,
            to if partial is None else partial, *call.sizes,
            *_strides(call.query, call.key, call.value, to), call.scale, first,
            log_decay.shape[2], order.count, 0, int(not order.is_forward), call.is_mapped,
            order.is_columns, chunks > 1, partial is not None, *call.options,
            num_warps=call.blocks.output, num_stages=1,
        )  # fmt: skip
        partial, first = to, first + order.count
    if not (save and chunks > 1 and cached):
        return out, call.new(0, rows, chunks, dk, dv)
    return out, cached[0] if len(cached) == 1 else torch.cat(cached)


@delta_scans_forward.register_fake
def _(query: Tensor, *operands: Any) -> tuple[Tensor, Tensor]:
    *_, bits, save = operands
    call = _call(query, *operands[:-2])
    dk, dv, rows, chunks = call.sizes[2:6]
    is_cached = save and chunks > 1 and call.value.numel() > 0
    count = bits.bit_count() if is_cached else 0
    return query.new_empty(call.value.shape), call.new(count, rows, chunks, dk, dv)


@launched("delta_scans_backward", f"(Tensor grad, Tensor states, {_OPERANDS}) -> Tensor[]")
def delta_scans_backward(
    grad: Tensor, states: Tensor, query: Tensor, key: Tensor | None, value: Tensor | None,
    log_decay: Tensor, strength: Tensor, heads: int, scale: float, height: int, width: int,
    bits: int,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the operands that there are, in their dtypes."""
    call = _call(query, key, value, log_decay, strength, heads, scale, height, width)
    dv, rows, chunks = call.sizes[3:6]
    grad = grad if grad.stride(-1) == 1 or grad.shape[-1] == 1 else grad.contiguous()
    operands = [query] if key is None else [query, key, value]
    outs = [torch.empty(z.shape, dtype=z.dtype, device=z.device) for z in operands]
    gates = [torch.empty_like(z) for z in (call.log_decay, call.strength)]
    partial, first = None, 0
    orders = _orders(bits) if call.value.numel() else []
    for order in orders:
        inverses, state_grads = _carry(call, order, first, grad)
        to = outs
        if order is not orders[-1]:
            to = [torch.empty_like(z, dtype=torch.float32) for z in outs]
        places = _parts(to[0], heads) if key is None else to
        before = places
        if partial is not None:
            before = _parts(partial[0], heads) if key is None else partial
        entering = states[first : first + order.count] if chunks > 1 else state_grads
        written, wanted_grads = call.new(2, order.count, rows, chunks, call.chunk, dv)
        launch_kernel(_delta_written_kernel, (rows * chunks, order.count),
            call.query, call.key, call.value, call.log_decay, call.strength, grad, inverses,
            entering, state_grads, written, wanted_grads, *gates, *call.sizes,
            *_strides(call.query, call.key, call.value, grad), call.scale, first,
            log_decay.shape[2], int(not order.is_forward), call.is_mapped,
            order.is_columns, chunks > 1, *call.options, num_warps=call.blocks.written,
        )  # fmt: skip
        for part in range(4):
            launch_kernel(_delta_gradient_kernel, (rows * chunks,),
                call.query, call.key, call.value, call.log_decay, call.strength, grad, written,
                wanted_grads, entering, state_grads, *places, *before, *gates, *call.sizes,
                *_strides(call.query, call.key, call.value, grad, *places), call.scale, first,
                log_decay.shape[2], order.count, 0, int(not order.is_forward), call.is_mapped,
                order.is_columns, chunks > 1, partial is not None, *call.options, part,
                num_warps=call.blocks.gradient, num_stages=1,
            )  # fmt: skip
        partial, first = to, first + order.count
    return outs + [z.to(like.dtype) for z, like in zip(gates, (log_decay, strength), strict=True)]


@delta_scans_backward.register_fake
def _(grad: Tensor, states: Tensor, *operands: Any) -> list[Tensor]:
    return [z.new_empty(z.shape) for z in operands[:5] if z is not None]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    *operands, heads, scale, height, width, bits, _ = inputs
    ctx.options = heads, scale, height, width, bits
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *operands)


def _gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 11
    states, *operands = ctx.saved_tensors
    found = iter(delta_scans_backward(grad, states, *operands, *ctx.options))
    return *(None if z is None else next(found) for z in operands), *[None] * 6


delta_scans_forward.register_autograd(_gradients, setup_context=_setup)


def delta_scans(
    query: Tensor, key: Tensor | None, value: Tensor | None, log_decay: Tensor, strength: Tensor,
    heads: int, grid: tuple[int, int], directions: Sequence[str], scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """See ``delta_scans_forward``; the directions are in the order of their bits."""
    operands = query, key, value, log_decay, strength
    save = torch.is_grad_enabled() and any(z is not None and z.requires_grad for z in operands)
    bits = sum(_BITS[direction] for direction in directions)
    return delta_scans_forward(*operands, heads, scale, *grid, bits, save)[0]


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, strength: Tensor
) -> Tensor:
    """See ``attnzoo.ops.delta_rule``; on a GPU."""
    dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
    dtype = torch.float32 if dtype == torch.float16 else dtype  # which overflows
    by_token = (z.to(dtype).transpose(1, 2) for z in (query, key, value))
    gates = (z.transpose(1, 2).unsqueeze(2) for z in (log_decay, strength))
    heads, n = query.shape[1:3]
    out = delta_scans(*by_token, *gates, heads, (n, 1), ("forward",))
    return out.transpose(1, 2).to(query.dtype)
