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
from attnzoo.ops.triton_common import _dot


@triton.jit
def _put(out, added, image, head, token, column, mask, value, n, heads, d, ADD: tl.constexpr):
    first = (image * n * heads + head) * d
    out, added = out + first, added + first
    place = token[:, None] * (heads * d) + column[None, :]
    if ADD:
        value += tl.load(added + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _gated_gradient_kernel(
    query, key, value, gate, grad, left, right, grad_left, grad_right, totals,
    grad_query, grad_key, grad_gate, added_query, added_key, added_gate,
    n, heads, dk, dv, chunks, height, width,
    q_image, q_token, q_head, k_image, k_token, k_head, v_image, v_token, v_head,
    g_image, g_token, g_head, d_image, d_token, d_head, per_gate, scale, levels,
    MAPPED: tl.constexpr, COLUMNS: tl.constexpr, FORWARD: tl.constexpr, BACKWARD: tl.constexpr,
    CARRIED: tl.constexpr, ADD: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, WIDE: tl.constexpr, MILD: tl.constexpr, P: tl.constexpr,
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
    row, wide = tl.arange(0, C), tl.arange(0, V)
    mask_v = is_token[:, None] & (wide < dv)[None, :]
    v = _tile(value, image, head, token, wide, mask_v, v_image, v_token, v_head)
    d = _tile(grad, image, head, token, wide, mask_v, d_image, d_token, d_head)
    d = d.to(dtype)
    weight_grad = _dot(d, tl.trans(v), P)

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
        mask_s = (column < dk)[:, None] & (wide < dv)[None, :]
        spot = at * dk * dv + column[:, None] * dv + wide[None, :]
        through = tl.zeros((K,), tl.float32)
        if FORWARD:
            state = tl.load(left + spot, mask=mask_s, other=0.0)
            state_grad = tl.load(grad_right + spot, mask=mask_s, other=0.0)
            through += tl.sum(state.to(tl.float32) * state_grad.to(tl.float32), 1)
            found = _dot(d, tl.trans(state), P) * to_start
            dq += found
            until += gated * found
            found = _dot(v, tl.trans(state_grad), P) * to_end
            dk_tile += found
            since += k * found
            own += k * found
        if BACKWARD:
            state = tl.load(right + spot, mask=mask_s, other=0.0)
            state_grad = tl.load(grad_left + spot, mask=mask_s, other=0.0)
            through += tl.sum(state.to(tl.float32) * state_grad.to(tl.float32), 1)
            found = _dot(d, tl.trans(state), P) * to_end
            dq += found
            since += gated * found
            found = _dot(v, tl.trans(state_grad), P) * to_start
            dk_tile += found
            until += k * found
            own += k * found
        own -= tl.exp2(before + after + g) * through[None, :]
    dg = tl.cumsum(until, 0, reverse=True) - own
    if CARRIED:
        dg += tl.cumsum(since, 0)
    if MAPPED:
        dg *= 1.0 / (1.0 + tl.exp(raw.to(tl.float32)))
    both: tl.constexpr = 2.0 if FORWARD and BACKWARD else 1.0
    own_grad = both * tl.sum(d.to(tl.float32) * v.to(tl.float32), 1)[:, None]
    dq = dq * tl.exp2(g) + own_grad * k
    dk_tile += own_grad * q.to(tl.float32)
    dq *= scale
    _put(grad_query, added_query, image, head, token, column, mask, dq, n, heads, dk, ADD)
    dk_tile *= scale
    _put(grad_key, added_key, image, head, token, column, mask, dk_tile, n, heads, dk, ADD)
    dg *= scale * per_gate
    _put(grad_gate, added_gate, image, head, token, column, mask, dg, n, heads, dk, ADD)
