"""The gated delta rule by kernels: a chunk is a matrix times the state, plus what it adds.

Three launches, for both directions of an order of the tokens: of every chunk, the inverse of its
triangular system, and what it keeps and adds; the states that enter each chunk, by a recurrence
with one product a chunk; the outputs. The gradients of the states follow the same recurrence the
other way round, from what ``triton_backward.py`` finds in each chunk; so do the gradients of the
operands, which read what the forward has kept of every chunk.

Of bfloat16 operands products are of bfloat16, with float32 sums. Where the rounding of one operand
would be all of a result's error, it is a sum of two (``_fine_product``).
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

from attnzoo.ops.delta_rule import MOST_CHANNELS
from attnzoo.ops.delta_rule.triton_backward import (
    _delta_adjoint_kernel,
    _delta_key_gradient_kernel,
    _delta_query_gradient_kernel,
    _put,
)
from attnzoo.ops.delta_rule.triton_common import (
    _decays,
    _fine_product,
    _gates,
    _half,
    _inverse,
    _is_later,
    _keep,
    _kept,
    _mapped,
    _product,
    _raw,
    _sums,
    _tiles,
)
from attnzoo.ops.gated_scan.triton import _BITS, _Order, _orders
from attnzoo.ops.gated_scan.triton_common import _exp2
from attnzoo.ops.triton_common import (
    _ceil,
    _is_fast,
    _precision,
    _shared_memory,
    _width,
    launch_kernel,
    launched,
)


@triton.jit
def _delta_update_kernel(
    key, value, log_decay, strength, inverses, keeps, updates, totals,
    n, heads, dk, dv, rows, chunks, height, width,
    k_image, k_token, k_head, v_image, v_token, v_head,
    first, directions, is_reversed, levels,
    MAPPED: tl.constexpr, COLUMNS: tl.constexpr, CARRIED: tl.constexpr,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    # The state after a chunk is (total - keeps) times that before it, plus updates; of inverses,
    # whose diagonal is 1, what is beside it is left, so that rounding does not touch the rest.
    slot = tl.program_id(1)
    chunk = tl.program_id(0) % chunks
    image_head = tl.program_id(0) // chunks
    image, head = (image_head // heads).to(tl.int64), image_head % heads
    row, column, wide, token, is_token, mask_k, mask_v = _tiles(
        chunk, n, dk, dv, height, width, 0, C, K, V, COLUMNS
    )
    is_up = (slot == 1) | (is_reversed != 0)
    k = _raw(key, image, head, token, column, mask_k, k_image, k_token, k_head)
    k = _mapped(k, MAPPED, True, HALF)
    gate, beta = _gates(
        log_decay, strength, image, head, token, is_token, first + slot, n, heads, directions
    )
    start, end = _sums(gate, row, is_up, EXACT)
    system = _product(k, tl.trans(k), P, HALF) * beta[:, None]
    system *= _decays(gate, start, row, is_up, False, P, EXACT)
    system = tl.where(_is_later(row, is_up), system, 0.0)
    inverse = _inverse(system, row, levels, C, P, HALF)
    at = ((first + slot) * rows + image_head).to(tl.int64) * chunks + chunk
    beside = tl.where(row[:, None] == row[None, :], 0.0, inverse)
    _keep(inverses, at, C, C, row, row, beside)
    if CARRIED:
        v = _raw(value, image, head, token, wide, mask_v, v_image, v_token, v_head)
        v = _mapped(v, MAPPED, False, HALF)
        inverse *= _exp2(end)[:, None] * beta[None, :]
        left = _product(tl.trans(k), inverse, P, HALF)
        update = _product(tl.trans(v), tl.trans(left), P, HALF)
        keep = _product(left, k * _exp2(start)[:, None], P, HALF)
        _keep(updates, at, dv, dk, wide, column, update)
        _keep(keeps, at, dk, dk, column, column, keep)
        tl.store(totals + at, tl.sum(gate, 0))


@triton.jit
def _delta_carry_kernel(
    keeps, updates, totals, states, rows, chunks, dk, dv, first, is_reversed,
    ADJOINT: tl.constexpr, K: tl.constexpr, V: tl.constexpr, STAGES: tl.constexpr,
    P: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    # States are (dv, dk), so that one is the left operand of the product that makes the next.
    # ADJOINT: of the states' gradients, from the end to the start.
    slot, image_head = tl.program_id(0) // rows, (tl.program_id(0) % rows).to(tl.int64)
    is_up = ((slot == 1) | (is_reversed != 0)) != ADJOINT
    column, wide = tl.arange(0, K), tl.program_id(1) * V + tl.arange(0, V)
    square = column[:, None] * dk + tl.arange(0, K)[None, :]
    mask = (column < dk)[:, None] & (tl.arange(0, K) < dk)[None, :]
    spot = wide[:, None] * dk + column[None, :]
    mask_s = (wide < dv)[:, None] & (column < dk)[None, :]
    at = ((first + slot) * rows + image_head) * chunks + tl.where(is_up, chunks - 1, 0)
    step = tl.where(is_up, -1, 1)
    keeps += at * dk * dk
    updates += at * dk * dv
    states += at * dk * dv
    totals += at
    state = tl.zeros((V, K), tl.float32)
    for _ in tl.range(0, chunks, num_stages=STAGES):
        keep = tl.load(keeps + square, mask=mask, other=0.0)
        update = tl.load(updates + spot, mask=mask_s, other=0.0).to(tl.float32)
        total = tl.load(totals)
        left = _half(state) if HALF else state
        tl.store(states + spot, left, mask=mask_s)
        lost = _product(left, keep if ADJOINT else tl.trans(keep), P, HALF)
        state = state * tl.exp2(total) + update - lost
        keeps += step * dk * dk
        updates += step * dk * dv
        states += step * dk * dv
        totals += step


@triton.jit
def _delta_output_kernel(
    query, key, value, log_decay, strength, inverses, states, written, out, added,
    n, heads, dk, dv, rows, chunks, height, width,
    q_image, q_token, q_head, k_image, k_token, k_head, v_image, v_token, v_head,
    o_image, o_token, o_head, scale, first, directions, slots, nothing, is_reversed,
    MAPPED: tl.constexpr, COLUMNS: tl.constexpr, CARRIED: tl.constexpr, ADD: tl.constexpr,
    SAVE: tl.constexpr, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, P: tl.constexpr,
    HALF: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0) % chunks
    image_head = tl.program_id(0) // chunks
    image, head = (image_head // heads).to(tl.int64), image_head % heads
    row, column, wide, token, is_token, mask_k, mask_v = _tiles(
        chunk, n, dk, dv, height, width, 0, C, K, V, COLUMNS
    )
    k = _raw(key, image, head, token, column, mask_k, k_image, k_token, k_head)
    k = _mapped(k, MAPPED, True, HALF)
    v = _raw(value, image, head, token, wide, mask_v, v_image, v_token, v_head)
    v = _mapped(v, MAPPED, False, HALF)
    q = _raw(query, image, head, token, column, mask_k, q_image, q_token, q_head)
    q = _mapped(q, MAPPED, True, HALF)
    result = tl.zeros((C, V), tl.float32)
    for slot in range(slots):
        row, column, wide, token, is_token, _, _ = _tiles(
            chunk, n, dk, dv, height, width, slot * nothing, C, K, V, COLUMNS
        )
        is_up = (slot == 1) | (is_reversed != 0)
        at = ((first + slot) * rows + image_head).to(tl.int64) * chunks + chunk
        gate, beta = _gates(
            log_decay, strength, image, head, token, is_token, first + slot, n, heads, directions
        )
        start, _ = _sums(gate, row, is_up, EXACT)
        given = v.to(tl.float32)
        if CARRIED:
            state = tl.trans(_kept(states, at, dv, dk, wide, column))
            given -= _exp2(start)[:, None] * _product(k, state, P, HALF)
            result += _exp2(start)[:, None] * _product(q, state, P, HALF)
        given *= beta[:, None]
        given += _product(_kept(inverses, at, C, C, row, row), given, P, HALF)
        if SAVE:
            _keep(written, at, C, dv, row, wide, given)
        weights = _product(q, tl.trans(k), P, HALF)
        weights *= _decays(gate, start, row, is_up, False, P, EXACT)
        result += _fine_product(weights, given, P, HALF)
    row, column, wide, token, is_token, mask_k, mask_v = _tiles(
        chunk, n, dk, dv, height, width, 0, C, K, V, COLUMNS
    )
    _put(out, added, image, head, token, wide, mask_v, scale * result, o_image, o_token, o_head,
         ADD)  # fmt: skip


class Blocks(NamedTuple):
    """Sizes of the kernels for one type of operands."""

    chunk: int  # tokens, at most
    # Warps of kernels, stages of their loops, and registers of a thread where they are limited: of
    # chunks, of outputs, of chunks' gradients, of all gradients.
    update: tuple[int, int, int | None]
    output: tuple[int, int, int | None]
    adjoint: tuple[int, int, int | None]
    gradient: tuple[int, int, int | None]
    carry: tuple[int, int, int]  # columns of a state, warps, stages
    is_half: bool  # whether products are of bfloat16, and what one kernel leaves to the next


_FOUR, _AHEAD, _EIGHT = (4, 1, None), (4, 2, None), (8, 1, None)
BLOCKS = {
    torch.bfloat16: Blocks(64, (4, 1, 168), _AHEAD, (4, 1, 168), _AHEAD, (16, 4, 4), True),
    torch.float32: Blocks(32, _FOUR, _EIGHT, _EIGHT, _EIGHT, (16, 4, 3), False),
}
# Where products read no operand from shared memory, larger tiles would not fit into registers; and
# of narrow heads such products got wrong addresses from ptxas 12.8.
_SMALL = Blocks(32, _FOUR, _FOUR, _FOUR, _FOUR, (16, 4, 4), True)
_HOPPER_ROOM = 200 * 2**10  # bytes of shared memory that only such devices have


def _blocks(query: Tensor, value: Tensor) -> Blocks:
    room = _shared_memory(query.device)
    is_small = room is not None and room < _HOPPER_ROOM
    is_small = is_small or min(_width(z.shape[-1]) for z in (query, value)) < MOST_CHANNELS
    is_small = is_small and query.dtype == torch.bfloat16
    return _SMALL if is_small else BLOCKS[query.dtype]


def _limits(of_kernel: tuple[int, int, int | None]) -> dict[str, int]:
    warps, stages, registers = of_kernel
    limit = {"maxnreg": registers} if _is_fast() and registers else {}
    return {"num_warps": warps, "num_stages": stages} | limit


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
        return _blocks(self.query, self.value)

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
        """What kernels leave of every chunk."""
        dtype = torch.bfloat16 if self.blocks.is_half else torch.float32
        tail = self.log_decay.shape[2], *self.sizes[4:6]
        return torch.empty(*tail, *shape, dtype=dtype, device=self.query.device)


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
    call: _Call, order: _Order, first: int, keeps: Tensor, updates: Tensor, totals: Tensor,
    states: Tensor, is_adjoint: bool,
) -> None:  # fmt: skip
    """From what chunks keep and add, the states that enter them; or the gradients that leave."""
    dk, dv, rows, chunks = call.sizes[2:6]
    columns, warps, stages = call.blocks.carry
    columns = min(columns, _width(dv))
    launch_kernel(_delta_carry_kernel, (order.count * rows, _ceil(dv, columns)),
        keeps, updates, totals, states, rows, chunks, dk, dv, first, int(not order.is_forward),
        is_adjoint, _width(dk), columns, stages, *call.options[3:5], num_warps=warps,
    )  # fmt: skip


_OPERANDS = (
    "Tensor query, Tensor? key, Tensor? value, Tensor log_decay, Tensor strength, int heads, "
    "float scale, int height, int width, int bits"
)


@launched(
    "delta_scans", f"({_OPERANDS}, bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def delta_scans_forward(
    query: Tensor, key: Tensor | None, value: Tensor | None, log_decay: Tensor, strength: Tensor,
    heads: int, scale: float, height: int, width: int, bits: int, save: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
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
        save: Whether a backward needs what chunks leave.

    Returns:
        (b, n, h, dv) in the dtype of ``query``; and of every chunk, if saved, the inverse, what it
        keeps of the state, its decay, the state before it, and what its tokens write.
    """
    call = _call(query, key, value, log_decay, strength, heads, scale, height, width)
    rows, chunks = call.sizes[4:6]
    out = torch.empty(call.value.shape, dtype=query.dtype, device=query.device)
    saved, partial, first = _saved(call), None, 0
    inverses, keeps, totals, states, written = saved
    updates = torch.empty_like(states)
    orders = _orders(bits) if out.numel() else []
    for order in orders:
        is_reversed = int(not order.is_forward)
        launch_kernel(_delta_update_kernel, (rows * chunks, order.count),
            call.key, call.value, call.log_decay, call.strength, inverses, keeps, updates, totals,
            *call.sizes, *_strides(call.key, call.value), first, log_decay.shape[2], is_reversed,
            call.chunk.bit_length() - 1, call.is_mapped, order.is_columns, chunks > 1,
            *call.options, **_limits(call.blocks.update),
        )  # fmt: skip
        if chunks > 1:
            _carry(call, order, first, keeps, updates, totals, states, False)
        to = out if order is orders[-1] else torch.empty_like(out, dtype=torch.float32)
        launch_kernel(_delta_output_kernel, (rows * chunks,),
            call.query, call.key, call.value, call.log_decay, call.strength, inverses, states,
            written, to, to if partial is None else partial, *call.sizes,
            *_strides(call.query, call.key, call.value, to), call.scale, first,
            log_decay.shape[2], order.count, 0, is_reversed, call.is_mapped, order.is_columns,
            chunks > 1, partial is not None, save, *call.options, **_limits(call.blocks.output),
        )  # fmt: skip
        partial, first = to, first + order.count
    return out, *(saved if save else [z.new_empty(0) for z in saved])


def _saved(call: _Call) -> list[Tensor]:
    dk, dv = call.sizes[2:4]
    shapes = (call.chunk, call.chunk), (dk, dk), (), (dv, dk), (call.chunk, dv)
    saved = [call.new(*shape) for shape in shapes]
    saved[2] = torch.empty_like(saved[2], dtype=torch.float32)
    return saved


@delta_scans_forward.register_fake
def _(query: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    *_, save = operands
    call = _call(query, *operands[:-2])
    saved = _saved(call)
    out = query.new_empty(call.value.shape)
    return out, *(saved if save else [z.new_empty(0) for z in saved])


@launched(
    "delta_scans_backward",
    f"(Tensor grad, Tensor inverses, Tensor keeps, Tensor totals, Tensor states, Tensor written, "
    f"{_OPERANDS}) -> Tensor[]",
)
def delta_scans_backward(
    grad: Tensor, inverses: Tensor, keeps: Tensor, totals: Tensor, states: Tensor,
    written: Tensor, query: Tensor, key: Tensor | None, value: Tensor | None, log_decay: Tensor,
    strength: Tensor, heads: int, scale: float, height: int, width: int, bits: int,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the operands that there are, in their dtypes."""
    call = _call(query, key, value, log_decay, strength, heads, scale, height, width)
    rows, chunks = call.sizes[4:6]
    grad = grad if grad.stride(-1) == 1 or grad.shape[-1] == 1 else grad.contiguous()
    operands = [query] if key is None else [query, key, value]
    outs = [torch.empty(z.shape, dtype=z.dtype, device=z.device) for z in operands]
    gates = [torch.empty_like(z) for z in (call.log_decay, call.strength)]
    updates, state_grads = torch.empty_like(states), torch.empty_like(states)
    wanted_grads = torch.empty_like(written)
    partial, first = None, 0
    orders = _orders(bits) if call.value.numel() else []
    for order in orders:
        to = outs
        if order is not orders[-1]:
            to = [torch.empty_like(z, dtype=torch.float32) for z in outs]
        places = _parts(to[0], heads) if key is None else to
        before = places
        if partial is not None:
            before = _parts(partial[0], heads) if key is None else partial
        is_reversed = int(not order.is_forward)
        launch_kernel(_delta_adjoint_kernel, (rows * chunks, order.count),
            call.query, call.key, grad, call.log_decay, call.strength, inverses, wanted_grads,
            updates, *call.sizes, *_strides(call.query, call.key, grad), call.scale, first,
            log_decay.shape[2], is_reversed, call.is_mapped, order.is_columns, chunks > 1,
            *call.options, **_limits(call.blocks.adjoint),
        )  # fmt: skip
        if chunks > 1:
            _carry(call, order, first, keeps, updates, totals, state_grads, True)
        sides = is_reversed, call.is_mapped, order.is_columns, chunks > 1, partial is not None
        launch_kernel(_delta_query_gradient_kernel, (rows * chunks,),
            call.query, call.key, call.value, call.log_decay, call.strength, grad, inverses,
            written, wanted_grads, states, state_grads, *places[::2], *before[::2], *gates,
            *call.sizes, *_strides(call.query, call.key, call.value, grad, *places[::2]),
            call.scale, first, log_decay.shape[2], order.count, 0, *sides, *call.options,
            **_limits(call.blocks.gradient),
        )  # fmt: skip
        added = before[1]
        for parts in ((True, True),) if call.blocks.is_half else ((True, False), (False, True)):
            launch_kernel(_delta_key_gradient_kernel, (rows * chunks,),
                call.query, call.key, call.log_decay, call.strength, grad, written, wanted_grads,
                states, state_grads, places[1], added, *gates, *call.sizes,
                *_strides(call.query, call.key, grad, places[1]), call.scale, first,
                log_decay.shape[2], order.count, 0, *sides, *call.options, *parts,
                **_limits(call.blocks.gradient),
            )  # fmt: skip
            added, sides = places[1], (*sides[:-1], True)
        partial, first = to, first + order.count
    return outs + [z.to(like.dtype) for z, like in zip(gates, (log_decay, strength), strict=True)]


@delta_scans_backward.register_fake
def _(grad: Tensor, *operands: Any) -> list[Tensor]:
    return [z.new_empty(z.shape) for z in operands[5:10] if z is not None]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    *operands, heads, scale, height, width, bits, _ = inputs
    ctx.options = heads, scale, height, width, bits
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], *operands)


def _gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 11
    operands = ctx.saved_tensors
    found = iter(delta_scans_backward(grad, *operands, *ctx.options))
    return *(None if z is None else next(found) for z in operands[5:]), *[None] * 6


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
