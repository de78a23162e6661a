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

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.ops.gated_scan.triton_backward import _gated_gradient_kernel, _put
from attnzoo.ops.gated_scan.triton_common import (
    _MILD,
    _are_pairs,
    _is_mine,
    _join,
    _level_factor,
    _log2_gate,
    _mild_factors,
    _mild_sums,
    _places,
    _tile,
)
from attnzoo.ops.triton_common import (
    _add_dot,
    _ceil,
    _dot,
    _precision,
    _width,
    launch_kernel,
    launched,
)


@triton.jit
def _gated_update_kernel(
    x, y, gate, left, right, totals, n, heads, dk, dv, chunks, height, width,
    x_image, x_token, x_head, y_image, y_token, y_head, g_image, g_token, g_head, per_gate,
    levels, QUERY: tl.constexpr, MAPPED: tl.constexpr, COLUMNS: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    FAST: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    # left: x^T y with x decayed until the end of the chunk, for what comes from the left of the
    # next; right: until its start. QUERY: x decays by its own gate as well.
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
    g = _log2_gate(g, mask, per_gate, MAPPED)
    if QUERY:
        a *= tl.exp2(g)
    total = tl.sum(g, 0)
    if tl.min(total, 0) > _MILD if FAST else False:
        before, after = _mild_sums(g)
    else:
        before, after = tl.zeros_like(g), tl.zeros_like(g)
        for level in range(0, levels):
            before, after = _join(before, after, g, row, level)
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
        tl.store(totals + at * dk + column, total, mask=column < dk)


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
    spot = ((slot * rows + image_head) * chunks + first) * dk * dv
    updates += spot
    states += spot
    totals += (image_head * chunks + first) * dk
    state = tl.zeros((E,), tl.float32)
    for _ in tl.range(0, chunks, num_stages=STAGES):
        update = tl.load(updates + entry, mask=mask, other=0.0)
        total = tl.load(totals + entry // dv, mask=mask, other=0.0)
        tl.store(states + entry, state.to(states.dtype.element_ty), mask=mask)
        state = state * tl.exp2(total) + update
        updates += step * dk * dv
        states += step * dk * dv
        totals += step * dk


@triton.jit
def _gated_output_kernel(
    query, key, value, gate, left, right, totals, out, added,
    n, heads, dk, dv, chunks, height, width,
    q_image, q_token, q_head, k_image, k_token, k_head, v_image, v_token, v_head,
    g_image, g_token, g_head, per_gate, scale, levels,
    MAPPED: tl.constexpr, COLUMNS: tl.constexpr, FORWARD: tl.constexpr, BACKWARD: tl.constexpr,
    CARRIED: tl.constexpr, ADD: tl.constexpr, TURNED: tl.constexpr, C: tl.constexpr,
    K: tl.constexpr, TILES: tl.constexpr, V: tl.constexpr, WIDE: tl.constexpr,
    MILD: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    # TURNED: queries are keys and keys queries, so that the transposed weights are taken.
    dtype: tl.constexpr = query.dtype.element_ty
    chunk = tl.program_id(0) % chunks
    image_head = tl.program_id(0) // chunks
    at = image_head.to(tl.int64) * chunks + chunk
    if WIDE and not _is_mine(totals + at * dk, dk, WIDE, MILD):
        return
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
        g = _log2_gate(g, mask, per_gate, MAPPED)
        own = both * tl.sum(q * k, 1)[:, None]
        weights += tl.where(row[:, None] == row[None, :], own, 0.0)
        if TURNED:
            k *= tl.exp2(g)
        else:
            q *= tl.exp2(g)
        if MILD:
            before, after = _mild_sums(g)
            down, up = _mild_factors(before, after, g)
            if FORWARD:
                product = _dot((q * down).to(dtype), tl.trans((k * up).to(dtype)), P)
                weights += tl.where(row[:, None] > row[None, :], product, 0.0)
            if BACKWARD:
                product = _dot((q * up).to(dtype), tl.trans((k * down).to(dtype)), P)
                weights += tl.where(row[:, None] < row[None, :], product, 0.0)
        else:
            before, after = tl.zeros((C, K), tl.float32), tl.zeros((C, K), tl.float32)
            for level in range(0, levels):
                factor, _ = _level_factor(before, after, row, level)
                product = _dot((q * factor).to(dtype), tl.trans((k * factor).to(dtype)), P)
                are_pairs = _are_pairs(row, level, FORWARD, BACKWARD)
                weights += tl.where(are_pairs, product, 0.0)
                before, after = _join(before, after, g, row, level)
        if CARRIED:
            mask_s = (column < dk)[:, None] & (wide < dv)[None, :]
            spot = at * dk * dv + column[:, None] * dv + wide[None, :]
            if FORWARD:
                state = tl.load(left + spot, mask=mask_s, other=0.0)
                result = _add_dot(result, (q * tl.exp2(before)).to(dtype), state, P)
            if BACKWARD:
                state = tl.load(right + spot, mask=mask_s, other=0.0)
                result = _add_dot(result, (q * tl.exp2(after)).to(dtype), state, P)
    mask_v = is_token[:, None] & (wide < dv)[None, :]
    v = _tile(value, image, head, token, wide, mask_v, v_image, v_token, v_head)
    result = _add_dot(result, weights.to(dtype), v.to(dtype), P)
    _put(out, added, image, head, token, wide, mask_v, scale * result, n, heads, dv, ADD)


class _Launch(NamedTuple):
    num_warps: int
    num_stages: int = 1
    maxnreg: int | None = None  # registers of a thread


class Blocks(NamedTuple):
    """Sizes of the kernels for one type of operands."""

    chunk: int  # tokens, at most
    # Channels of a tile of keys (and of values), at most.
    update: tuple[int, int, _Launch]
    # Of mild gates, where they have a kernel of their own, and of any gates; the gradient's with
    # those of a tile of values, and its launches with one such tile and with several.
    output: dict[bool, tuple[int, _Launch]]
    gradient: dict[bool, tuple[int, int, _Launch, _Launch]]
    carry: tuple[int, int, int]  # entries of a state, warps, stages


BLOCKS = {
    torch.bfloat16: Blocks(
        64,
        (32, 64, _Launch(4)),
        {True: (32, _Launch(4, 1, 168)), False: (32, _Launch(8))},
        # With several tiles, 4 warps spill up to 1.6 KB a thread on an A100, 8 less than 0.5 KB.
        {True: (32, 64, _Launch(4), _Launch(8)), False: (16, 64, _Launch(8), _Launch(8))},
        (128, 2, 8),
    ),
    torch.float32: Blocks(
        32,
        (32, 64, _Launch(4)),
        {False: (32, _Launch(4))},
        {False: (16, 32, _Launch(4), _Launch(4))},
        (256, 2, 4),
    ),
}


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
    chunk = min(BLOCKS[query.dtype].chunk, _width(n))
    sizes = images, n, heads, dk, value.shape[-1]
    return _Sizes(*sizes, chunk.bit_length() - 1, _ceil(n, chunk))


def _strided(z: Tensor) -> Tensor:
    return z if z.stride(-1) == 1 or z.shape[-1] == 1 else z.contiguous()


def _strides(*operands: Tensor) -> tuple[int, ...]:
    return tuple(stride for z in operands for stride in z.stride()[:3])


class _Call(NamedTuple):
    """What the launches of one call share."""

    sizes: _Sizes
    grid: tuple[int, int]
    normalizer: float
    scale: float
    dtype: torch.dtype

    @property
    def per_gate(self) -> float:
        return 1.0 / self.normalizer if self.normalizer else 1.0

    @property
    def forms(self) -> tuple[tuple[bool, int], ...]:
        """The kernels by which chunks are computed, each its own: MILD and WIDE."""
        # What two factors of both signs lose is more than float32 may.
        if self.dtype == torch.float32:
            return ((False, 0),)
        wide = _width(self.sizes.dk)
        return ((True, wide), (False, wide))

    def new(self, like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=like.device)


class _Carried(NamedTuple):
    """What chunks have from others: states, (directions, rows, chunks, dk, dv); and their gates.

    States are there if there are several chunks, first those that enter a chunk from the left,
    then those from the right. Gates are sums over each chunk, (rows, chunks, dk).
    """

    states: Tensor | None
    totals: Tensor | None

    def or_else(self, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """States from the left and from the right and totals, for a launch."""
        states = (other, other) if self.states is None else (self.states[0], self.states[-1])
        return *states, other if self.totals is None else self.totals


def _carry(
    call: _Call, order: _Order, is_query: bool, x: Tensor, y: Tensor, gate: Tensor
) -> _Carried:
    """Of the forward scan from the left, and of the backward scan from the right.

    With queries and the gradient of the output, the gradients of the states that leave a chunk:
    those of the backward scan from the left, and those of the forward scan from the right.
    """
    sizes, blocks = call.sizes, BLOCKS[call.dtype]
    _, n, heads, dk, dv, levels, chunks = sizes
    is_alone, is_checked = chunks == 1, call.forms[0][1] > 0
    if is_alone and not is_checked:
        return _Carried(None, None)
    is_left, is_right = order.is_forward, order.is_backward
    if is_query:
        is_left, is_right = is_right, is_left
    totals = call.new(x, *sizes.tail[:3])
    updates = totals if is_alone else call.new(x, order.count, *sizes.tail)
    keys, values, launch = blocks.update
    keys, values = min(keys, _width(dk)), min(values, _width(dv))
    launch_kernel(_gated_update_kernel, (sizes.rows * chunks, _ceil(dk, keys), _ceil(dv, values)),
        x, y, gate, updates[0], updates[-1], totals, n, heads, dk, dv, chunks, *call.grid,
        *_strides(x, y, gate), call.per_gate, levels, is_query, call.normalizer != 0,
        order.is_columns, is_left and not is_alone, is_right and not is_alone, 1 << levels, keys,
        values, is_checked, _precision(call.dtype), **launch._asdict(),
    )  # fmt: skip
    if is_alone:
        return _Carried(None, totals)
    states = call.new(x, order.count, *sizes.tail, dtype=call.dtype)
    entries, warps, stages = blocks.carry
    launch_kernel(_gated_carry_kernel, (order.count * sizes.rows, _ceil(dk * dv, entries)),
        updates, totals, states, sizes.rows, chunks, dk, dv, is_left, entries, stages,
        num_warps=warps,
    )  # fmt: skip
    return _Carried(states, totals)


def _output(
    call: _Call, order: _Order, is_turned: bool, operands: Sequence[Tensor], carried: _Carried,
    out: Tensor, added: Tensor | None,
) -> None:  # fmt: skip
    """Outputs of queries, keys, values and gates; turned, gradients of values.

    Those are outputs of keys, queries and the gradient of the output, with the scans turned.
    """
    if is_turned:
        order = order._replace(is_forward=order.is_backward, is_backward=order.is_forward)
    _, n, heads, dk, dv, levels, chunks = call.sizes
    for is_mild, wide in call.forms:
        keys, launch = BLOCKS[call.dtype].output[is_mild]
        keys = min(keys, _width(dk))
        launch_kernel(_gated_output_kernel, (call.sizes.rows * chunks,),
            *operands, *carried.or_else(out), out, out if added is None else added,
            n, heads, dk, dv, chunks, *call.grid, *_strides(*operands), call.per_gate, call.scale,
            levels, call.normalizer != 0, *order, carried.states is not None, added is not None,
            is_turned, 1 << levels, keys, _ceil(dk, keys), _width(dv), wide, is_mild,
            _precision(call.dtype), **launch._asdict(),
        )  # fmt: skip


def _gradient(
    call: _Call, order: _Order, operands: Sequence[Tensor], entering: _Carried, leaving: _Carried,
    outs: Sequence[Tensor], added: Sequence[Tensor] | None,
) -> None:  # fmt: skip
    """Gradients of queries, keys and gates; the operands end with that of the output."""
    _, n, heads, dk, dv, levels, chunks = call.sizes
    for is_mild, wide in call.forms:
        keys, values, single, several = BLOCKS[call.dtype].gradient[is_mild]
        keys, values = min(keys, _width(dk)), min(values, _width(dv))
        tiles = _ceil(dv, values)
        launch = single if tiles == 1 else several
        launch_kernel(_gated_gradient_kernel, (call.sizes.rows * chunks, _ceil(dk, keys)),
            *operands, *entering.or_else(outs[0])[:2], *leaving.or_else(outs[0]), *outs,
            *(outs if added is None else added), n, heads, dk, dv, chunks, *call.grid,
            *_strides(*operands), call.per_gate, call.scale, levels, call.normalizer != 0, *order,
            leaving.states is not None, added is not None, 1 << levels, keys, values, tiles, wide,
            is_mild, _precision(call.dtype), **launch._asdict(),
        )  # fmt: skip


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
    operands = query, key, value, gate = [_strided(z) for z in (query, key, value, gate)]
    orders, sizes = _orders(directions), _sizes(query, value)
    scale /= sum(order.count for order in orders)
    call = _Call(sizes, (height, width), normalizer, scale, query.dtype)
    out = torch.empty(value.shape, dtype=query.dtype, device=query.device)
    kept, partial = [], None
    for order in orders if out.numel() else ():
        carried = _carry(call, order, False, key, value, gate)
        if carried.states is not None:
            kept.append(carried.states)
        to = out if order is orders[-1] else torch.empty_like(out, dtype=torch.float32)
        _output(call, order, False, operands, carried, to, partial)
        partial = to
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
    grad, query, key, value, gate = map(_strided, (grad, query, key, value, gate))
    orders, sizes = _orders(directions), _sizes(query, value)
    scale /= sum(order.count for order in orders)
    call = _Call(sizes, (height, width), normalizer, scale, query.dtype)
    outs = [
        torch.empty(z.shape, dtype=z.dtype, device=z.device) for z in (query, key, gate, value)
    ]
    partial, done = None, 0
    for order in orders if value.numel() else ():
        part = states[done : done + order.count]
        entering = _Carried(part if sizes.chunks > 1 else None, None)
        leaving = _carry(call, order, True, query, grad, gate)
        done += order.count
        to = outs
        if order is not orders[-1]:
            to = [torch.empty_like(z, dtype=torch.float32) for z in outs]
        operands = query, key, value, gate, grad
        added = None if partial is None else partial[:3]
        _gradient(call, order, operands, entering, leaving, to[:3], added)
        added = None if partial is None else partial[3]
        _output(call, order, True, (key, query, grad, gate), leaving, to[3], added)
        partial = to
    grad_query, grad_key, grad_gate, grad_value = outs
    return grad_query, grad_key, grad_value, grad_gate


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
