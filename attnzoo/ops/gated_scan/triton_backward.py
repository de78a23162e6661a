"""The gradients of queries, keys and gates, chunk by chunk. See ``triton.py``."""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo.ops.gated_scan.triton_common import (
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
from attnzoo.ops.triton_common import _add_dot, _dot


@triton.jit
def _put(out, added, image, head, token, column, mask, value, n, heads, d, ADD: tl.constexpr):
    first = (image * n * heads + head) * d
    out, added = out + first, added + first
    place = token[:, None] * (heads * d) + column[None, :]
    if ADD:
        value += tl.load(added + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _of_states(
    state, state_grad, value_rows, grad_rows, is_token, at, column, dk, dv, C: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, TILES: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Gradients of queries and keys, not yet decayed, and of the gate of what only passes by."""
    from_state, from_grad = tl.zeros((C, K), tl.float32), tl.zeros((C, K), tl.float32)
    through = tl.zeros((K,), tl.float32)
    for part in range(TILES):
        wide = part * V + tl.arange(0, V)
        mask = is_token[:, None] & (wide < dv)[None, :]
        v = tl.load(value_rows + wide[None, :], mask=mask, other=0.0)
        d = tl.load(grad_rows + wide[None, :], mask=mask, other=0.0).to(v.dtype)
        mask = (column < dk)[:, None] & (wide < dv)[None, :]
        spot = at * dk * dv + column[:, None] * dv + wide[None, :]
        s = tl.load(state + spot, mask=mask, other=0.0)
        s_grad = tl.load(state_grad + spot, mask=mask, other=0.0)
        through += tl.sum(s.to(tl.float32) * s_grad.to(tl.float32), 1)
        from_state = _add_dot(from_state, d, tl.trans(s), P)
        from_grad = _add_dot(from_grad, v, tl.trans(s_grad), P)
    return from_state, from_grad, through


@triton.jit
def _gated_gradient_kernel(
    query, key, value, gate, grad, left, right, grad_left, grad_right, totals,
    grad_query, grad_key, grad_gate, added_query, added_key, added_gate,
    n, heads, dk, dv, chunks, height, width,
    q_image, q_token, q_head, k_image, k_token, k_head, v_image, v_token, v_head,
    g_image, g_token, g_head, d_image, d_token, d_head, per_gate, scale, levels,
    MAPPED: tl.constexpr, COLUMNS: tl.constexpr, FORWARD: tl.constexpr, BACKWARD: tl.constexpr,
    CARRIED: tl.constexpr, ADD: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, TILES: tl.constexpr, WIDE: tl.constexpr, MILD: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    # left and right are the states that enter the chunk; grad_left and grad_right the gradients
    # of those that leave it there: of what the forward scan takes on, grad_right.
    dtype: tl.constexpr = query.dtype.element_ty
    chunk = tl.program_id(0) % chunks
    image_head = tl.program_id(0) // chunks
    at = image_head.to(tl.int64) * chunks + chunk
    if WIDE and not _is_mine(totals + at * dk, dk, WIDE, MILD):
        return
    image, head = (image_head // heads).to(tl.int64), image_head % heads
    token, is_token = _places(chunk, n, height, width, C, COLUMNS)
    row = tl.arange(0, C)
    value_rows = value + image * v_image + head.to(tl.int64) * v_head + token[:, None] * v_token
    grad_rows = grad + image * d_image + head.to(tl.int64) * d_head + token[:, None] * d_token
    weight_grad, own_grad = tl.zeros((C, C), tl.float32), tl.zeros((C,), tl.float32)
    for part in range(TILES):
        wide = part * V + tl.arange(0, V)
        mask = is_token[:, None] & (wide < dv)[None, :]
        v = tl.load(value_rows + wide[None, :], mask=mask, other=0.0)
        d = tl.load(grad_rows + wide[None, :], mask=mask, other=0.0).to(dtype)
        weight_grad = _add_dot(weight_grad, d, tl.trans(v), P)
        own_grad += tl.sum(d.to(tl.float32) * v.to(tl.float32), 1)

    column = tl.program_id(1) * K + tl.arange(0, K)
    mask = is_token[:, None] & (column < dk)[None, :]
    q = _tile(query, image, head, token, column, mask, q_image, q_token, q_head)
    k = _tile(key, image, head, token, column, mask, k_image, k_token, k_head)
    raw = _tile(gate, image, head, token, column, mask, g_image, g_token, g_head)
    g = _log2_gate(raw, mask, per_gate, MAPPED)
    gated = q.to(tl.float32) * tl.exp2(g)
    k = k.to(tl.float32)
    dq, dk_tile = tl.zeros((C, K), tl.float32), tl.zeros((C, K), tl.float32)
    # A span of gates gets a part of q dq at one end and takes it back as k dk at the other: until
    # and since are summed from each token on and up to it, own is what it takes back itself. With
    # the operands as they were multiplied, what is taken back is exact.
    until, since, own = tl.zeros_like(dq), tl.zeros_like(dq), tl.zeros_like(dq)
    if MILD:
        before, after = _mild_sums(g)
        down, up = _mild_factors(before, after, g)
        if FORWARD:
            pair_grad = tl.where(row[:, None] > row[None, :], weight_grad, 0.0).to(dtype)
            gated_there, k_there = (gated * down).to(dtype), (k * up).to(dtype)
            found = _dot(pair_grad, k_there, P)
            dq += found * down
            until += gated_there.to(tl.float32) * found
            found = _dot(tl.trans(pair_grad), gated_there, P)
            dk_tile += found * up
            until -= k_there.to(tl.float32) * found
        if BACKWARD:
            pair_grad = tl.where(row[:, None] < row[None, :], weight_grad, 0.0).to(dtype)
            gated_there, k_there = (gated * up).to(dtype), (k * down).to(dtype)
            found = _dot(pair_grad, k_there, P)
            dq += found * up
            own -= gated_there.to(tl.float32) * found
            found = _dot(tl.trans(pair_grad), gated_there, P)
            dk_tile += found * down
            own += k_there.to(tl.float32) * found
            until += own
    else:
        before, after = tl.zeros_like(dq), tl.zeros_like(dq)
        for level in range(0, levels):
            factor, is_second = _level_factor(before, after, row, level)
            are_pairs = _are_pairs(row, level, FORWARD, BACKWARD)
            pair_grad = tl.where(are_pairs, weight_grad, 0.0).to(dtype)
            gated_there, k_there = (gated * factor).to(dtype), (k * factor).to(dtype)
            found = _dot(pair_grad, k_there, P)
            dq += found * factor
            given = gated_there.to(tl.float32) * found
            found = _dot(tl.trans(pair_grad), gated_there, P)
            dk_tile += found * factor
            taken = k_there.to(tl.float32) * found
            until += tl.where(is_second, given + taken, -given - taken)
            own += tl.where(is_second, taken, -given)
            before, after = _join(before, after, g, row, level)
    if CARRIED:
        to_end, to_start = tl.exp2(after), tl.exp2(before)
        through = tl.zeros((K,), tl.float32)
        if FORWARD:
            from_state, from_grad, passing = _of_states(
                left, grad_right, value_rows, grad_rows, is_token, at, column, dk, dv, C, K, V,
                TILES, P,
            )  # fmt: skip
            from_state *= to_start
            from_grad *= to_end
            dq += from_state
            dk_tile += from_grad
            until += gated * from_state
            since += k * from_grad
            own += k * from_grad
            through += passing
        if BACKWARD:
            from_state, from_grad, passing = _of_states(
                right, grad_left, value_rows, grad_rows, is_token, at, column, dk, dv, C, K, V,
                TILES, P,
            )  # fmt: skip
            from_state *= to_end
            from_grad *= to_start
            dq += from_state
            dk_tile += from_grad
            since += gated * from_state
            until += k * from_grad
            own += k * from_grad
            through += passing
        own -= tl.exp2(before + after + g) * through[None, :]
    dg = tl.cumsum(until, 0, reverse=True) - own
    if CARRIED:
        dg += tl.cumsum(since, 0)
    if MAPPED:
        dg *= 1.0 / (1.0 + tl.exp(raw.to(tl.float32)))
    both: tl.constexpr = 2.0 if FORWARD and BACKWARD else 1.0
    own_grad = both * own_grad
    dq = dq * tl.exp2(g) + own_grad[:, None] * k
    dk_tile += own_grad[:, None] * q.to(tl.float32)
    dq *= scale
    _put(grad_query, added_query, image, head, token, column, mask, dq, n, heads, dk, ADD)
    dk_tile *= scale
    _put(grad_key, added_key, image, head, token, column, mask, dk_tile, n, heads, dk, ADD)
    dg *= scale * per_gate
    _put(grad_gate, added_gate, image, head, token, column, mask, dg, n, heads, dk, ADD)
