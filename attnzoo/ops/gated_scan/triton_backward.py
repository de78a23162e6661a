"""The gradients of the mean of scans, chunk by chunk. See ``triton.py``."""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo.ops.gated_scan.triton_common import (
    _are_pairs,
    _join,
    _log2_gate,
    _places,
    _scaled,
    _tile,
)
from attnzoo.ops.triton_common import _add_dot, _dot


@triton.jit
def _put(out, added, place, mask, value, ADD: tl.constexpr):
    if ADD:
        value += tl.load(added + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _gated_gradient_kernel(
    query, key, value, gate, grad, left, right, grad_left, grad_right,
    grad_query, grad_key, grad_value, grad_gate,
    added_query, added_key, added_value, added_gate,
    n, heads, dk, dv, chunks, height, width,
    q_image, q_token, q_head, k_image, k_token, k_head, v_image, v_token, v_head,
    g_image, g_token, g_head, d_image, d_token, d_head, per_gate, scale,
    MAPPED: tl.constexpr, COLUMNS: tl.constexpr, FORWARD: tl.constexpr, BACKWARD: tl.constexpr,
    CARRIED: tl.constexpr, ADD: tl.constexpr, LEVELS: tl.constexpr, K: tl.constexpr,
    TILES: tl.constexpr, V: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    # left and right are the states that enter the chunk; grad_left and grad_right the gradients
    # of those that leave it there: of what the forward scan takes on, grad_right.
    C: tl.constexpr = 1 << LEVELS
    dtype: tl.constexpr = query.dtype.element_ty
    chunk = tl.program_id(0) % chunks
    image_head = tl.program_id(0) // chunks
    image, head = (image_head // heads).to(tl.int64), image_head % heads
    token, is_token = _places(chunk, n, height, width, C, COLUMNS)
    row, wide = tl.arange(0, C), tl.arange(0, V)
    mask_v = is_token[:, None] & (wide < dv)[None, :]
    v = _tile(value, image, head, token, wide, mask_v, v_image, v_token, v_head)
    d = _tile(grad, image, head, token, wide, mask_v, d_image, d_token, d_head)
    d = d.to(dtype)
    weight_grad = _dot(d, tl.trans(v), P)
    both: tl.constexpr = 2.0 if FORWARD and BACKWARD else 1.0
    own_grad = both * tl.sum(d.to(tl.float32) * v.to(tl.float32), 1)[:, None]
    is_own = row[:, None] == row[None, :]

    weights = tl.zeros((C, C), tl.float32)
    dv_tile = tl.zeros((C, V), tl.float32)
    for tile in range(TILES):
        column = tile * K + tl.arange(0, K)
        mask = is_token[:, None] & (column < dk)[None, :]
        q = _tile(query, image, head, token, column, mask, q_image, q_token, q_head)
        k = _tile(key, image, head, token, column, mask, k_image, k_token, k_head)
        g = _tile(gate, image, head, token, column, mask, g_image, g_token, g_head)
        q, k = q.to(tl.float32), k.to(tl.float32)
        total = _log2_gate(g, mask, per_gate, MAPPED)
        weights += tl.where(is_own, both * tl.sum(q * k, 1)[:, None], 0.0)
        gated = q * tl.exp2(total)
        before, after = tl.zeros((C, K), tl.float32), tl.zeros((C, K), tl.float32)
        dq, dk_tile = tl.zeros((C, K), tl.float32), tl.zeros((C, K), tl.float32)
        # What each token as an end of spans adds to the gates after it (or its own) and before.
        later, earlier = tl.zeros((C, K), tl.float32), tl.zeros((C, K), tl.float32)
        for level in range(LEVELS):
            ql, kl, factor, is_second = _scaled(gated, k, before, after, row, level)
            ql, kl = ql.to(dtype), kl.to(dtype)
            are_pairs = _are_pairs(row, level, FORWARD, BACKWARD)
            weights += tl.where(are_pairs, _dot(ql, tl.trans(kl), P), 0.0)
            pair_grad = tl.where(are_pairs, weight_grad, 0.0).to(dtype)
            from_keys = _dot(pair_grad, kl, P)
            from_queries = _dot(tl.trans(pair_grad), ql, P)
            dq += from_keys * factor
            dk_tile += from_queries * factor
            # With the operands as they were multiplied, the sums over a chunk cancel.
            x, y = ql.to(tl.float32) * from_keys, kl.to(tl.float32) * from_queries
            later += tl.where(is_second, x, -y)
            earlier += tl.where(is_second, y, -x)
            before, after, total = _join(before, after, total, row, level)
        until, since = later + earlier, tl.zeros((C, K), tl.float32)
        own = earlier
        if CARRIED:
            to_end, to_start = tl.exp2(after), tl.exp2(before)
            mask_s = (column < dk)[:, None] & (wide < dv)[None, :]
            spot = (image_head.to(tl.int64) * chunks + chunk) * dk * dv
            spot += column[:, None] * dv + wide[None, :]
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
                dv_tile = _add_dot(dv_tile, (k * to_end).to(dtype), state_grad, P)
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
                dv_tile = _add_dot(dv_tile, (k * to_start).to(dtype), state_grad, P)
            own -= tl.exp2(total) * through[None, :]
        dg = tl.cumsum(until, 0, reverse=True) - own
        if CARRIED:
            dg += tl.cumsum(since, 0)
        if MAPPED:
            dg *= 1.0 / (1.0 + tl.exp(g.to(tl.float32)))
        dq = dq * tl.exp2(_log2_gate(g, mask, per_gate, MAPPED)) + own_grad * k
        dk_tile += own_grad * q
        place = ((image * n + token) * heads + head)[:, None] * dk + column[None, :]
        _put(grad_query, added_query, place, mask, scale * dq, ADD)
        _put(grad_key, added_key, place, mask, scale * dk_tile, ADD)
        _put(grad_gate, added_gate, place, mask, scale * per_gate * dg, ADD)
    dv_tile = _add_dot(dv_tile, tl.trans(weights.to(dtype)), d, P)
    place = ((image * n + token) * heads + head)[:, None] * dv + wide[None, :]
    _put(grad_value, added_value, place, mask_v, scale * dv_tile, ADD)
