"""The gradients of the gated delta rule's operands, chunk by chunk. See ``triton.py``."""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo.ops.delta_rule.triton_common import (
    _before_map,
    _decays,
    _gates,
    _is_later,
    _mapped,
    _product,
    _raw,
)
from attnzoo.ops.gated_scan.triton_common import _places
from attnzoo.ops.triton_common import _dot


@triton.jit
def _put(out, added, image, head, token, column, mask, value, of_image, of_token, of_head,
         ADD: tl.constexpr):  # fmt: skip
    first = image * of_image + head.to(tl.int64) * of_head
    place = token[:, None] * of_token + column[None, :]
    if ADD:
        value += tl.load(added + first + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + first + place, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _delta_gradient_kernel(
    query, key, value, log_decay, strength, grad, inverses, states, state_grads,
    grad_query, grad_key, grad_value, added_query, added_key, added_value, grad_decay,
    grad_strength, n, heads, dk, dv, rows, chunks, height, width,
    q_image, q_token, q_head, k_image, k_token, k_head, v_image, v_token, v_head,
    d_image, d_token, d_head, to_q_image, to_q_token, to_q_head, to_k_image, to_k_token, to_k_head,
    to_v_image, to_v_token, to_v_head, scale, first, directions, slots, is_reversed,
    MAPPED: tl.constexpr, COLUMNS: tl.constexpr, CARRIED: tl.constexpr, ADD: tl.constexpr,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    # states enter the chunk; state_grads are gradients of the states that leave it.
    chunk = tl.program_id(0) % chunks
    image_head = tl.program_id(0) // chunks
    image, head = (image_head // heads).to(tl.int64), image_head % heads
    token, is_token = _places(chunk, n, height, width, C, COLUMNS)
    row, column, wide = tl.arange(0, C), tl.arange(0, K), tl.arange(0, V)
    mask_k = is_token[:, None] & (column < dk)[None, :]
    mask_v = is_token[:, None] & (wide < dv)[None, :]
    q = _raw(query, image, head, token, column, mask_k, q_image, q_token, q_head)
    k = _raw(key, image, head, token, column, mask_k, k_image, k_token, k_head)
    v = _raw(value, image, head, token, wide, mask_v, v_image, v_token, v_head)
    d = _raw(grad, image, head, token, wide, mask_v, d_image, d_token, d_head) * scale
    q, k = _mapped(q, MAPPED, True), _mapped(k, MAPPED, True)
    v = _mapped(v, MAPPED, False)
    dq, dk_tile = tl.zeros((C, K), tl.float32), tl.zeros((C, K), tl.float32)
    dv_tile = tl.zeros((C, V), tl.float32)
    square = tl.arange(0, C)[:, None] * C + tl.arange(0, C)[None, :]
    for slot in range(slots):
        is_up = (slot == 1) | (is_reversed != 0)
        at = (slot * rows + image_head).to(tl.int64) * chunks + chunk
        gate, beta = _gates(
            log_decay, strength, image, head, token, is_token, first + slot, n, heads, directions
        )
        decay, start, end = _decays(gate, row, is_up, P, EXACT)
        is_later = _is_later(row, is_up)
        inverse = tl.load(inverses + at * C * C + square).to(tl.float32)
        weights = _product(q, tl.trans(k), P, HALF)
        wanted = v
        from_start = tl.zeros((C,), tl.float32)
        to_end = tl.zeros((C,), tl.float32)
        passing = 0.0
        of_written = _product(tl.trans(weights * decay), d, P, HALF)
        if CARRIED:
            mask_s = (column < dk)[:, None] & (wide < dv)[None, :]
            spot = at * dk * dv + column[:, None] * dv + wide[None, :]
            state = tl.load(states + spot, mask=mask_s, other=0.0).to(tl.float32)
            wanted -= start[:, None] * _product(k, state, P, HALF)
            state_grad = tl.load(state_grads + spot, mask=mask_s, other=0.0).to(tl.float32)
            of_written += end[:, None] * _product(k, state_grad, P, HALF)
            passing = tl.sum(tl.sum(state * state_grad, 1), 0) * tl.exp2(tl.sum(gate, 0))
        written = _product(inverse, beta[:, None] * wanted, P, HALF)
        of_wanted = _product(tl.trans(inverse), of_written, P, HALF)
        of_beta = tl.sum(of_wanted * wanted, 1)
        of_system = _product(of_wanted, tl.trans(written), P, HALF)
        of_wanted *= beta[:, None]
        dv_tile += of_wanted
        if CARRIED:
            found = start[:, None] * _product(d, tl.trans(state), P, HALF)
            dq += found
            from_start += tl.sum(found * q, 1)
            found = -start[:, None] * _product(of_wanted, tl.trans(state), P, HALF)
            from_start += tl.sum(found * k, 1)
            later = end[:, None] * _product(written, tl.trans(state_grad), P, HALF)
            to_end += tl.sum(later * k, 1)
            dk_tile += found + later
        # Within the chunk: weights of queries, and the system of keys.
        of_weights = _product(d, tl.trans(written), P, HALF) * decay
        through = of_weights * weights
        dq += _product(of_weights, k, P, HALF)
        dk_tile += _product(tl.trans(of_weights), q, P, HALF)
        alike = _product(k, tl.trans(k), P, HALF)
        of_system = tl.where(is_later, -of_system * decay, 0.0)
        of_beta += tl.sum(of_system * alike, 1)
        of_system *= beta[:, None]
        through += of_system * alike
        dk_tile += _product(of_system + tl.trans(of_system), k, P, HALF)
        # A gate at r takes part in all that leads from before it to it or past it.
        spans = _dot(through, tl.where(_is_later(row, is_up == 0), 1.0, 0.0), P)
        spans = tl.where(is_later | (row[:, None] == row[None, :]), spans + from_start[:, None], 0)
        of_gate = tl.sum(spans, 0) + passing
        of_gate += tl.sum(tl.where(is_later, to_end[None, :], 0.0), 1)
        place = image * n * directions * heads + (first + slot) * heads + head
        place += token * (directions * heads)
        tl.store(grad_decay + place, of_gate, mask=is_token)
        tl.store(grad_strength + place, of_beta, mask=is_token)
    q = _raw(query, image, head, token, column, mask_k, q_image, q_token, q_head)
    _put(grad_query, added_query, image, head, token, column, mask_k,
         _before_map(q, dq, MAPPED, True), to_q_image, to_q_token, to_q_head, ADD)  # fmt: skip
    k = _raw(key, image, head, token, column, mask_k, k_image, k_token, k_head)
    _put(grad_key, added_key, image, head, token, column, mask_k,
         _before_map(k, dk_tile, MAPPED, True), to_k_image, to_k_token, to_k_head, ADD)  # fmt: skip
    v = _raw(value, image, head, token, wide, mask_v, v_image, v_token, v_head)
    _put(grad_value, added_value, image, head, token, wide, mask_v,
         _before_map(v, dv_tile, MAPPED, False), to_v_image, to_v_token, to_v_head, ADD)  # fmt: skip
