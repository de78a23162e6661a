"""The gradients of queries, keys and gates, chunk by chunk. See ``triton.py``."""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo.ops.gated_scan.triton_common import (
    _LOG2E,
    _are_mild,
    _are_pairs,
    _exp2,
    _half,
    _is_mild,
    _join,
    _leads,
    _level_factor,
    _log2_gate,
    _places,
    _tile,
)
from attnzoo.ops.triton_common import _add_dot, _dot


@triton.jit
def _rows_of(z, image, head, token, column, mask, n, heads, d):
    """A tile of (images, n, heads, d)."""
    place = image * n * heads * d + head * d + token[:, None] * (heads * d) + column[None, :]
    return tl.load(z + place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _put(
    out, added, image, head, token, column, mask, value, n, heads, d, o_token, ADD: tl.constexpr
):  # fmt: skip
    """Stores a tile in rows with any spacing, with what is ``added``; returns what it stores."""
    if ADD:
        value += _rows_of(added, image, head, token, column, mask, n, heads, d)
    place = image * n * o_token + head * d + token[:, None] * o_token + column[None, :]
    tl.store(out + place, value.to(out.dtype.element_ty), mask=mask)
    return value


@triton.jit
def _put_sum(parts, image, head, chunk, column, mask, value, chunks, heads, d):
    place = parts + ((image * chunks + chunk) * heads + head) * d + column
    tl.store(place, tl.sum(tl.where(mask, value, 0.0), 0), mask=column < d)


@triton.jit
def _mild_gradient_kernel(
    query, key, value, gate, grad, left, right, grad_left, grad_right, totals,
    grad_query, grad_key, grad_gate, grad_value,
    added_query, added_key, added_gate, added_value, parts,
    n, heads, dk, dv, chunks, height, width,
    q_image, q_token, q_head, k_image, k_token, k_head, v_image, v_token, v_head,
    g_image, g_token, g_head, d_image, d_token, d_head, oq_token, ok_token, og_token, ov_token,
    per_gate, scale,
    MAPPED: tl.constexpr, COLUMNS: tl.constexpr, FORWARD: tl.constexpr, BACKWARD: tl.constexpr,
    CARRIED: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr, VALUES: tl.constexpr,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, WIDE: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    # left and right are the states that enter the chunk; grad_left and grad_right the gradients
    # of those that leave it there: of what the forward scan takes on, grad_right.
    dtype: tl.constexpr = query.dtype.element_ty
    chunk = tl.program_id(0) % chunks
    image_head = tl.program_id(0) // chunks
    at = image_head.to(tl.int64) * chunks + chunk
    if _is_mild(totals, at, dk, WIDE) == 0:
        return
    image, head = (image_head // heads).to(tl.int64), image_head % heads
    token, is_token = _places(chunk, n, height, width, C, COLUMNS)
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    wide, column = tl.arange(0, V), tl.program_id(1) * K + tl.arange(0, K)
    mask_v = is_token[:, None] & (wide < dv)[None, :]
    mask = is_token[:, None] & (column < dk)[None, :]
    mask_s = (column < dk)[:, None] & (wide < dv)[None, :]
    spot = at * dk * dv + column[:, None] * dv + wide[None, :]
    raw = _tile(gate, image, head, token, column, mask, g_image, g_token, g_head)
    q = _tile(query, image, head, token, column, mask, q_image, q_token, q_head)
    k = _tile(key, image, head, token, column, mask, k_image, k_token, k_head)
    v = _tile(value, image, head, token, wide, mask_v, v_image, v_token, v_head)
    d = _tile(grad, image, head, token, wide, mask_v, d_image, d_token, d_head).to(dtype)
    q, k = q.to(tl.float32), k.to(tl.float32)
    before, until = _leads(_log2_gate(raw, mask, per_gate, MAPPED), C, P)
    q_on, k_on = (q * _exp2(until)).to(dtype), (k * _exp2(-until)).to(dtype)
    q_back, k_back = (q * _exp2(-before)).to(dtype), (k * _exp2(before)).to(dtype)
    through = tl.zeros((K,), tl.float32)
    if CARRIED and FORWARD:
        on = tl.load(left + spot, mask=mask_s, other=0.0)
        grad_on = tl.load(grad_right + spot, mask=mask_s, other=0.0)
        through += tl.sum(on.to(tl.float32) * grad_on.to(tl.float32), 1)
    if CARRIED and BACKWARD:
        back = tl.load(right + spot, mask=mask_s, other=0.0)
        grad_back = tl.load(grad_left + spot, mask=mask_s, other=0.0)
        through += tl.sum(back.to(tl.float32) * grad_back.to(tl.float32), 1)
    if VALUES:
        weights, result = tl.zeros((C, C), tl.float32), tl.zeros((C, V), tl.float32)
        if FORWARD:
            weights += tl.where(i <= j, _dot(k_on, tl.trans(q_on), P), 0.0)
        if BACKWARD:
            weights += tl.where(i >= j, _dot(k_back, tl.trans(q_back), P), 0.0)
        result = _dot(weights.to(dtype), d, P)
        if CARRIED and FORWARD:
            result = _add_dot(result, k_on, grad_on, P)
        if CARRIED and BACKWARD:
            result = _add_dot(result, k_back, grad_back, P)
        result *= scale
        _put(
            grad_value, added_value, image, head,
            token, wide, mask_v, result, n, heads, dv, ov_token, ADD,
        )  # fmt: skip
    # A span of gates gets a part of q dq at one end and takes it back as k dk at the other: with
    # the operands as they were multiplied, what is taken back is exact.
    dq, dk_tile = tl.zeros((C, K), tl.float32), tl.zeros((C, K), tl.float32)
    given, own, all_over = tl.zeros_like(dq), tl.zeros_like(dq), tl.zeros_like(dq)
    weight_grad = _dot(d, tl.trans(v), P)
    if FORWARD:
        found = tl.zeros_like(dq)
        if CARRIED:
            found = _dot(d, tl.trans(on), P)
            all_over += q_on.to(tl.float32) * found
        found = _add_dot(found, tl.where(i >= j, weight_grad, 0.0).to(dtype), k_on, P)
        dq += found * _exp2(until)
        given -= q_on.to(tl.float32) * found
    if BACKWARD:
        found = tl.zeros_like(dq)
        if CARRIED:
            found = _dot(d, tl.trans(back), P)
        found = _add_dot(found, tl.where(i <= j, weight_grad, 0.0).to(dtype), k_back, P)
        dq += found * _exp2(-before)
        own += q_back.to(tl.float32) * found
    dq *= scale
    _put(
        grad_query, added_query, image, head,
        token, column, mask, dq, n, heads, dk, oq_token, ADD,
    )  # fmt: skip
    weight_grad = _dot(v, tl.trans(d), P)
    if FORWARD:
        found = tl.zeros_like(dq)
        if CARRIED:
            found = _dot(v, tl.trans(grad_on), P)
        found = _add_dot(found, tl.where(i <= j, weight_grad, 0.0).to(dtype), q_on, P)
        dk_tile += found * _exp2(-until)
        given += k_on.to(tl.float32) * found
    if BACKWARD:
        found = tl.zeros_like(dq)
        if CARRIED:
            found = _dot(v, tl.trans(grad_back), P)
            all_over += k_back.to(tl.float32) * found
        found = _add_dot(found, tl.where(i >= j, weight_grad, 0.0).to(dtype), q_back, P)
        dk_tile += found * _exp2(before)
        own -= k_back.to(tl.float32) * found
    dk_tile *= scale
    _put(
        grad_key, added_key, image, head,
        token, column, mask, dk_tile, n, heads, dk, ok_token, ADD,
    )  # fmt: skip
    through += tl.sum(all_over, 0)
    # A product would sum faster, but ptxas 12.8 gave it a wrong address here on Hopper.
    dg = tl.cumsum(given + own, 0) - given + through[None, :]
    if MAPPED:
        dg *= 1.0 / (1.0 + _exp2(raw.to(tl.float32) * _LOG2E))
    dg *= scale * per_gate
    dg = _put(
        grad_gate, added_gate, image, head,
        token, column, mask, dg, n, heads, dk, og_token, ADD,
    )  # fmt: skip
    if BIAS:
        _put_sum(parts, image, head, chunk, column, mask, dg, chunks, heads, dk)


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
    grad_query, grad_key, grad_gate, added_query, added_key, added_gate, parts,
    n, heads, dk, dv, chunks, height, width,
    q_image, q_token, q_head, k_image, k_token, k_head, v_image, v_token, v_head,
    g_image, g_token, g_head, d_image, d_token, d_head, oq_token, ok_token, og_token, ov_token,
    per_gate, scale, count, levels,
    MAPPED: tl.constexpr, COLUMNS: tl.constexpr, FORWARD: tl.constexpr, BACKWARD: tl.constexpr,
    CARRIED: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr, C: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, TILES: tl.constexpr, WIDE: tl.constexpr, TURNS: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    # left and right are the states that enter the chunk; grad_left and grad_right the gradients
    # of those that leave it there: of what the forward scan takes on, grad_right.
    dtype: tl.constexpr = query.dtype.element_ty
    # The few chunks that are not mild are looked for TURNS at a time, so that few programs start.
    first = tl.program_id(0).to(tl.int64) * TURNS
    if _are_mild(totals, first, count, dk, WIDE, TURNS) if WIDE else False:
        return
    for at in range(first, tl.minimum(first + TURNS, count)):
        if _is_mild(totals, at, dk, WIDE) == 0 if WIDE else True:
            chunk, image_head = at % chunks, at // chunks
            image, head = (image_head // heads).to(tl.int64), image_head % heads
            token, is_token = _places(chunk, n, height, width, C, COLUMNS)
            row = tl.arange(0, C)
            head_at = head.to(tl.int64)
            value_rows = value + image * v_image + head_at * v_head + token[:, None] * v_token
            grad_rows = grad + image * d_image + head_at * d_head + token[:, None] * d_token
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
            gated = q.to(tl.float32) * _exp2(g)
            k = k.to(tl.float32)
            dq, dk_tile = tl.zeros((C, K), tl.float32), tl.zeros((C, K), tl.float32)
            # A span of gates gets a part of q dq at one end and takes it back as k dk at the
            # other: until and since are summed from each token on and up to it, own is what it
            # takes back itself. With the operands as they were multiplied, that is exact.
            until, since, own = tl.zeros_like(dq), tl.zeros_like(dq), tl.zeros_like(dq)
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
                # By which the states are multiplied already.
                decay = tl.load(totals + at * dk + column, mask=column < dk, other=0.0)
                half = _half(decay)[None, :]
                to_end, to_start = _exp2(after - half), _exp2(before - half)
                through = tl.zeros((K,), tl.float32)
                if FORWARD:
                    from_state, from_grad, passing = _of_states(
                        left, grad_right, value_rows, grad_rows, is_token, at, column, dk, dv, C,
                        K, V, TILES, P,
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
                        right, grad_left, value_rows, grad_rows, is_token, at, column, dk, dv, C,
                        K, V, TILES, P,
                    )  # fmt: skip
                    from_state *= to_end
                    from_grad *= to_start
                    dq += from_state
                    dk_tile += from_grad
                    since += gated * from_state
                    until += k * from_grad
                    own += k * from_grad
                    through += passing
                own -= _exp2(decay[None, :] - 2 * half) * through[None, :]
            dg = tl.cumsum(until, 0, reverse=True) - own
            if CARRIED:
                dg += tl.cumsum(since, 0)
            if MAPPED:
                dg *= 1.0 / (1.0 + tl.exp(raw.to(tl.float32)))
            both: tl.constexpr = 2.0 if FORWARD and BACKWARD else 1.0
            own_grad = both * own_grad
            dq = dq * _exp2(g) + own_grad[:, None] * k
            dk_tile += own_grad[:, None] * q.to(tl.float32)
            dq *= scale
            _put(
                grad_query, added_query, image, head,
                token, column, mask, dq, n, heads, dk, oq_token, ADD,
            )  # fmt: skip
            dk_tile *= scale
            _put(
                grad_key, added_key, image, head,
                token, column, mask, dk_tile, n, heads, dk, ok_token, ADD,
            )  # fmt: skip
            dg *= scale * per_gate
            dg = _put(
                grad_gate, added_gate, image, head,
                token, column, mask, dg, n, heads, dk, og_token, ADD,
            )  # fmt: skip
            if BIAS:
                _put_sum(parts, image, head, chunk, column, mask, dg, chunks, heads, dk)
