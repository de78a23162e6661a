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
    _edges,
    _gates,
    _is_later,
    _mapped,
    _product,
    _raw,
    _state,
    _tiles,
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
def _written(z, at, dv, row, wide):
    """A chunk's tile of what ``_delta_written_kernel`` leaves."""
    place = z + at * row.shape[0] * dv + row[:, None] * dv + wide[None, :]
    mask = (row >= 0)[:, None] & (wide < dv)[None, :]
    return tl.load(place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _delta_written_kernel(
    query, key, value, log_decay, strength, grad, inverses, states, state_grads,
    written, wanted_grads, grad_decay, grad_strength,
    n, heads, dk, dv, rows, chunks, height, width,
    q_image, q_token, q_head, k_image, k_token, k_head, v_image, v_token, v_head,
    d_image, d_token, d_head, scale, first, directions, is_reversed,
    MAPPED: tl.constexpr, COLUMNS: tl.constexpr, CARRIED: tl.constexpr,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    # What tokens write, and the gradients of what the system is solved for, of strengths there,
    # and of decays through states. states enter the chunk; state_grads are of those that leave.
    slot = tl.program_id(1)
    is_up = (slot == 1) | (is_reversed != 0)
    chunk = tl.program_id(0) % chunks
    image_head = tl.program_id(0) // chunks
    image, head = (image_head // heads).to(tl.int64), image_head % heads
    token, is_token = _places(chunk, n, height, width, C, COLUMNS)
    row, column, wide = tl.arange(0, C), tl.arange(0, K), tl.arange(0, V)
    mask_k = is_token[:, None] & (column < dk)[None, :]
    mask_v = is_token[:, None] & (wide < dv)[None, :]
    at = (slot * rows + image_head).to(tl.int64) * chunks + chunk
    gate, beta = _gates(
        log_decay, strength, image, head, token, is_token, first + slot, n, heads, directions
    )
    decay = _decays(gate, row, is_up, P, EXACT)
    start, end = _edges(gate, row, is_up)
    q = _raw(query, image, head, token, column, mask_k, q_image, q_token, q_head)
    k = _raw(key, image, head, token, column, mask_k, k_image, k_token, k_head)
    q, k = _mapped(q, MAPPED, True), _mapped(k, MAPPED, True)
    d = _raw(grad, image, head, token, wide, mask_v, d_image, d_token, d_head) * scale
    weights = _product(k, tl.trans(q), P, HALF) * tl.trans(decay)
    of_written = _product(weights, d, P, HALF)
    wanted = _raw(value, image, head, token, wide, mask_v, v_image, v_token, v_head)
    wanted = _mapped(wanted, MAPPED, False)
    of_start, of_end = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    through = 0.0
    later = tl.zeros((C, V), tl.float32)
    known = tl.zeros((C, V), tl.float32)
    if CARRIED:
        state = _state(states, at, dk, dv, column, wide)
        of_start += start * tl.sum(_product(q, state, P, HALF) * d, 1)
        known = start[:, None] * _product(k, state, P, HALF)
        wanted -= known
        state_grad = _state(state_grads, at, dk, dv, column, wide)
        through = tl.sum(tl.sum(state * state_grad, 1), 0) * tl.exp2(tl.sum(gate, 0))
        later = end[:, None] * _product(k, state_grad, P, HALF)
        of_written += later
    square = row[:, None] * C + tl.arange(0, C)[None, :]
    inverse = tl.load(inverses + at * C * C + square).to(tl.float32)
    given = _product(inverse, beta[:, None] * wanted, P, HALF)
    of_wanted = _product(tl.trans(inverse), of_written, P, HALF)
    spot = at * C * dv + row[:, None] * dv + wide[None, :]
    mask = (row >= 0)[:, None] & (wide < dv)[None, :]
    tl.store(written + spot, given.to(written.dtype.element_ty), mask=mask)
    tl.store(wanted_grads + spot, of_wanted.to(wanted_grads.dtype.element_ty), mask=mask)
    if CARRIED:
        of_start -= beta * tl.sum(of_wanted * known, 1)
        of_end += tl.sum(later * given, 1)
    # A gate takes part in all that leads from the start past it, or from before it to the end.
    is_later = _is_later(row, is_up)
    reaches = is_later | (row[:, None] == row[None, :])
    of_gate = through + tl.sum(tl.where(reaches, of_start[:, None], 0.0), 0)
    of_gate += tl.sum(tl.where(is_later, of_end[None, :], 0.0), 1)
    place = image * n * directions * heads + (first + slot) * heads + head
    place += token * (directions * heads)
    tl.store(grad_decay + place, of_gate, mask=is_token)
    tl.store(grad_strength + place, tl.sum(of_wanted * wanted, 1), mask=is_token)


@triton.jit
def _delta_gradient_kernel(
    query, key, value, log_decay, strength, grad, written, wanted_grads, states, state_grads,
    grad_query, grad_key, grad_value, added_query, added_key, added_value, grad_decay,
    grad_strength, n, heads, dk, dv, rows, chunks, height, width,
    q_image, q_token, q_head, k_image, k_token, k_head, v_image, v_token, v_head,
    d_image, d_token, d_head, to_q_image, to_q_token, to_q_head, to_k_image, to_k_token, to_k_head,
    to_v_image, to_v_token, to_v_head, scale, first, directions, slots, nothing, is_reversed,
    MAPPED: tl.constexpr, COLUMNS: tl.constexpr, CARRIED: tl.constexpr, ADD: tl.constexpr,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr,
    EXACT: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    # Parts: gates by queries and by keys, queries and values, keys. In one kernel they would take
    # each other's registers.
    chunk = tl.program_id(0) % chunks
    image_head = tl.program_id(0) // chunks
    image, head = (image_head // heads).to(tl.int64), image_head % heads
    if PART < 2:
        for slot in range(slots):
            row, column, wide, token, is_token, mask_k, mask_v = _tiles(
                chunk, n, dk, dv, height, width, slot * nothing, C, K, V, COLUMNS
            )
            is_up = (slot == 1) | (is_reversed != 0)
            at = (slot * rows + image_head).to(tl.int64) * chunks + chunk
            gate, beta = _gates(
                log_decay, strength, image, head, token, is_token, first + slot, n, heads,
                directions,
            )  # fmt: skip
            given = _written(written, at, dv, row, wide)
            k = _raw(key, image, head, token, column, mask_k, k_image, k_token, k_head)
            k = _mapped(k, MAPPED, True)
            if PART == 0:
                d = _raw(grad, image, head, token, wide, mask_v, d_image, d_token, d_head) * scale
                through = _product(d, tl.trans(given), P, HALF)
                q = _raw(query, image, head, token, column, mask_k, q_image, q_token, q_head)
                through *= _product(_mapped(q, MAPPED, True), tl.trans(k), P, HALF)
            else:
                of_wanted = _written(wanted_grads, at, dv, row, wide)
                through = -_product(of_wanted, tl.trans(given), P, HALF)
                through *= _product(k, tl.trans(k), P, HALF)
            through *= _decays(gate, row, is_up, P, EXACT)
            through = tl.where(_is_later(row, is_up), through, 0.0)
            of_beta = tl.sum(through, 1)
            if PART == 1:
                through *= beta[:, None]
            # A gate takes part in all that leads from before it to it or past it.
            spans = _dot(through, tl.where(_is_later(row, is_up == 0), 1.0, 0.0), P)
            reaches = _is_later(row, is_up) | (row[:, None] == row[None, :])
            of_gate = tl.sum(tl.where(reaches, spans, 0.0), 0)
            place = image * n * directions * heads + (first + slot) * heads + head
            place += token * (directions * heads)
            of_gate += tl.load(grad_decay + place, mask=is_token, other=0.0)
            tl.store(grad_decay + place, of_gate, mask=is_token)
            if PART == 1:
                of_beta += tl.load(grad_strength + place, mask=is_token, other=0.0)
                tl.store(grad_strength + place, of_beta, mask=is_token)
    elif PART == 2:
        of_query, of_value = tl.zeros((C, K), tl.float32), tl.zeros((C, V), tl.float32)
        for slot in range(slots):
            row, column, wide, token, is_token, mask_k, mask_v = _tiles(
                chunk, n, dk, dv, height, width, slot * nothing, C, K, V, COLUMNS
            )
            is_up = (slot == 1) | (is_reversed != 0)
            at = (slot * rows + image_head).to(tl.int64) * chunks + chunk
            gate, beta = _gates(
                log_decay, strength, image, head, token, is_token, first + slot, n, heads,
                directions,
            )  # fmt: skip
            of_value += beta[:, None] * _written(wanted_grads, at, dv, row, wide)
            d = _raw(grad, image, head, token, wide, mask_v, d_image, d_token, d_head) * scale
            if CARRIED:
                state = _state(states, at, dk, dv, column, wide)
                start, _ = _edges(gate, row, is_up)
                of_query += _product(d * start[:, None], tl.trans(state), P, HALF)
            given = _written(written, at, dv, row, wide)
            of_weights = _product(d, tl.trans(given), P, HALF)
            of_weights *= _decays(gate, row, is_up, P, EXACT)
            k = _raw(key, image, head, token, column, mask_k, k_image, k_token, k_head)
            of_query += _product(of_weights, _mapped(k, MAPPED, True), P, HALF)
        row, column, wide, token, is_token, mask_k, mask_v = _tiles(
            chunk, n, dk, dv, height, width, 0, C, K, V, COLUMNS
        )
        v = _raw(value, image, head, token, wide, mask_v, v_image, v_token, v_head)
        of_value = _before_map(v, of_value, MAPPED, False)
        _put(grad_value, added_value, image, head, token, wide, mask_v, of_value, to_v_image,
             to_v_token, to_v_head, ADD)  # fmt: skip
        q = _raw(query, image, head, token, column, mask_k, q_image, q_token, q_head)
        of_query = _before_map(q, of_query, MAPPED, True)
        _put(grad_query, added_query, image, head, token, column, mask_k, of_query, to_q_image,
             to_q_token, to_q_head, ADD)  # fmt: skip
    else:
        of_key = tl.zeros((C, K), tl.float32)
        for slot in range(slots):
            row, column, wide, token, is_token, mask_k, mask_v = _tiles(
                chunk, n, dk, dv, height, width, slot * nothing, C, K, V, COLUMNS
            )
            is_up = (slot == 1) | (is_reversed != 0)
            at = (slot * rows + image_head).to(tl.int64) * chunks + chunk
            gate, beta = _gates(
                log_decay, strength, image, head, token, is_token, first + slot, n, heads,
                directions,
            )  # fmt: skip
            given = _written(written, at, dv, row, wide)
            of_wanted = _written(wanted_grads, at, dv, row, wide) * beta[:, None]
            if CARRIED:
                start, end = _edges(gate, row, is_up)
                state = _state(states, at, dk, dv, column, wide)
                of_key -= _product(of_wanted * start[:, None], tl.trans(state), P, HALF)
                state = _state(state_grads, at, dk, dv, column, wide)
                of_key += _product(given * end[:, None], tl.trans(state), P, HALF)
            decay = _decays(gate, row, is_up, P, EXACT)
            of_system = _product(of_wanted, tl.trans(given), P, HALF) * decay
            of_system = tl.where(_is_later(row, is_up), -of_system, 0.0)
            k = _raw(key, image, head, token, column, mask_k, k_image, k_token, k_head)
            k = _mapped(k, MAPPED, True)
            of_key += _product(of_system + tl.trans(of_system), k, P, HALF)
            d = _raw(grad, image, head, token, wide, mask_v, d_image, d_token, d_head) * scale
            of_weights = _product(given, tl.trans(d), P, HALF) * tl.trans(decay)
            q = _raw(query, image, head, token, column, mask_k, q_image, q_token, q_head)
            of_key += _product(of_weights, _mapped(q, MAPPED, True), P, HALF)
        row, column, wide, token, is_token, mask_k, mask_v = _tiles(
            chunk, n, dk, dv, height, width, 0, C, K, V, COLUMNS
        )
        k = _raw(key, image, head, token, column, mask_k, k_image, k_token, k_head)
        of_key = _before_map(k, of_key, MAPPED, True)
        _put(grad_key, added_key, image, head, token, column, mask_k, of_key, to_k_image,
             to_k_token, to_k_head, ADD)  # fmt: skip
