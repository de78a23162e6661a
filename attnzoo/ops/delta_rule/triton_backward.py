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
    _fine_product,
    _gates,
    _is_later,
    _keep,
    _kept,
    _mapped,
    _product,
    _raw,
    _reaches,
    _sums,
    _tiles,
)
from attnzoo.ops.gated_scan.triton_common import _exp2
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
def _across(pairs, row, is_up, P: tl.constexpr):
    """The sums of the pairs (t, s) that have a token after s and not after t."""
    pairs = tl.where(_is_later(row, is_up), pairs, 0.0)
    spans = _dot(pairs, tl.where(_is_later(row, is_up == 0), 1.0, 0.0), P)
    return tl.sum(tl.where(_reaches(row, is_up), spans, 0.0), 0)


@triton.jit
def _delta_adjoint_kernel(
    query, key, grad, log_decay, strength, inverses, wanted_grads, updates,
    n, heads, dk, dv, rows, chunks, height, width,
    q_image, q_token, q_head, k_image, k_token, k_head, d_image, d_token, d_head,
    scale, first, directions, is_reversed,
    MAPPED: tl.constexpr, COLUMNS: tl.constexpr, CARRIED: tl.constexpr,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    # What the outputs of a chunk alone give: the gradients of what its system is solved for, and
    # of the state that enters it.
    slot = tl.program_id(1)
    chunk = tl.program_id(0) % chunks
    image_head = tl.program_id(0) // chunks
    image, head = (image_head // heads).to(tl.int64), image_head % heads
    row, column, wide, token, is_token, mask_k, mask_v = _tiles(
        chunk, n, dk, dv, height, width, 0, C, K, V, COLUMNS
    )
    is_up = (slot == 1) | (is_reversed != 0)
    at = ((first + slot) * rows + image_head).to(tl.int64) * chunks + chunk
    gate, beta = _gates(
        log_decay, strength, image, head, token, is_token, first + slot, n, heads, directions
    )
    start, _ = _sums(gate, row, is_up, EXACT)
    q = _raw(query, image, head, token, column, mask_k, q_image, q_token, q_head)
    k = _raw(key, image, head, token, column, mask_k, k_image, k_token, k_head)
    q, k = _mapped(q, MAPPED, True, HALF), _mapped(k, MAPPED, True, HALF)
    d = _raw(grad, image, head, token, wide, mask_v, d_image, d_token, d_head) * scale
    weights = _product(k, tl.trans(q), P, HALF)
    weights *= _decays(gate, start, row, is_up, True, P, EXACT)
    of_wanted = _fine_product(weights, d, P, HALF)
    inverse = tl.trans(_kept(inverses, at, C, C, row, row))
    of_wanted += _product(inverse, of_wanted, P, HALF)
    _keep(wanted_grads, at, C, dv, row, wide, of_wanted)
    if CARRIED:
        update = _product(tl.trans(d), q * _exp2(start)[:, None], P, HALF)
        known = k * (beta * _exp2(start))[:, None]
        update -= _product(tl.trans(of_wanted), known, P, HALF)
        _keep(updates, at, dv, dk, wide, column, update)


@triton.jit
def _delta_query_gradient_kernel(
    query, key, value, log_decay, strength, grad, inverses, written, wanted_grads, states,
    state_grads, grad_query, grad_value, added_query, added_value, grad_decay, grad_strength,
    n, heads, dk, dv, rows, chunks, height, width,
    q_image, q_token, q_head, k_image, k_token, k_head, v_image, v_token, v_head,
    d_image, d_token, d_head, to_q_image, to_q_token, to_q_head, to_v_image, to_v_token, to_v_head,
    scale, first, directions, slots, nothing, is_reversed,
    MAPPED: tl.constexpr, COLUMNS: tl.constexpr, CARRIED: tl.constexpr, ADD: tl.constexpr,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    # Of queries and values, and of the gates what comes from there. states enter the chunk;
    # state_grads are of those that leave, and add to wanted_grads.
    chunk = tl.program_id(0) % chunks
    image_head = tl.program_id(0) // chunks
    image, head = (image_head // heads).to(tl.int64), image_head % heads
    row, column, wide, token, is_token, mask_k, mask_v = _tiles(
        chunk, n, dk, dv, height, width, 0, C, K, V, COLUMNS
    )
    k = _raw(key, image, head, token, column, mask_k, k_image, k_token, k_head)
    k = _mapped(k, MAPPED, True, HALF)
    d = _raw(grad, image, head, token, wide, mask_v, d_image, d_token, d_head) * scale
    d = _mapped(d, False, False, HALF)
    q = _raw(query, image, head, token, column, mask_k, q_image, q_token, q_head)
    q = _mapped(q, MAPPED, True, HALF)
    v = _raw(value, image, head, token, wide, mask_v, v_image, v_token, v_head)
    v = _mapped(v, MAPPED, False, HALF)
    of_query, of_value = tl.zeros((C, K), tl.float32), tl.zeros((C, V), tl.float32)
    for slot in range(slots):
        row, column, wide, token, is_token, _, _ = _tiles(
            chunk, n, dk, dv, height, width, slot * nothing, C, K, V, COLUMNS
        )
        is_up = (slot == 1) | (is_reversed != 0)
        at = ((first + slot) * rows + image_head).to(tl.int64) * chunks + chunk
        gate, beta = _gates(
            log_decay, strength, image, head, token, is_token, first + slot, n, heads, directions
        )
        start, end = _sums(gate, row, is_up, EXACT)
        of_wanted = _kept(wanted_grads, at, C, dv, row, wide).to(tl.float32)
        if CARRIED:
            state = tl.trans(_kept(state_grads, at, dv, dk, wide, column))
            later = _exp2(end)[:, None] * _product(k, state, P, HALF)
            inverse = tl.trans(_kept(inverses, at, C, C, row, row))
            of_wanted += later + _product(inverse, later, P, HALF)
            _keep(wanted_grads, at, C, dv, row, wide, of_wanted)
        of_strength = tl.sum(of_wanted * (v + slot * nothing), 1)
        of_value += beta[:, None] * of_wanted
        weights = _product(d, tl.trans(_kept(written, at, C, dv, row, wide)), P, HALF)
        weights *= _decays(gate, start, row, is_up, False, P, EXACT)
        asked = tl.zeros((C, K), tl.float32)
        if CARRIED:
            state = _kept(states, at, dv, dk, wide, column)
            asked += _exp2(start)[:, None] * _product(d, state, P, HALF)
        if EXACT:
            of_token = tl.sum(asked * q, 1)
            of_gate = _across(weights * _product(q, tl.trans(k), P, HALF), row, is_up, P)
            asked += _product(weights, k, P, HALF)
        else:
            of_gate = 0.0
            asked += _fine_product(weights, k, P, HALF)
            of_token = tl.sum(asked * (q + slot * nothing), 1)
        of_query += asked
        sums, _ = _sums(of_token, row, is_up == 0, EXACT)
        of_gate += sums
        place = image * n * directions * heads + (first + slot) * heads + head
        place += token * (directions * heads)
        tl.store(grad_decay + place, of_gate, mask=is_token)
        tl.store(grad_strength + place, of_strength, mask=is_token)
    row, column, wide, token, is_token, mask_k, mask_v = _tiles(
        chunk, n, dk, dv, height, width, 0, C, K, V, COLUMNS
    )
    q = _raw(query, image, head, token, column, mask_k, q_image, q_token, q_head)
    of_query = _before_map(q, of_query, MAPPED, True)
    _put(grad_query, added_query, image, head, token, column, mask_k, of_query, to_q_image,
         to_q_token, to_q_head, ADD)  # fmt: skip
    v = _raw(value, image, head, token, wide, mask_v, v_image, v_token, v_head)
    of_value = _before_map(v, of_value, MAPPED, False)
    _put(grad_value, added_value, image, head, token, wide, mask_v, of_value, to_v_image,
         to_v_token, to_v_head, ADD)  # fmt: skip


@triton.jit
def _delta_key_gradient_kernel(
    query, key, log_decay, strength, grad, written, wanted_grads, states, state_grads, grad_key,
    added_key, grad_decay, grad_strength, n, heads, dk, dv, rows, chunks, height, width,
    q_image, q_token, q_head, k_image, k_token, k_head, d_image, d_token, d_head,
    to_k_image, to_k_token, to_k_head, scale, first, directions, slots, nothing, is_reversed,
    MAPPED: tl.constexpr, COLUMNS: tl.constexpr, CARRIED: tl.constexpr, ADD: tl.constexpr,
    C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr,
    EXACT: tl.constexpr, READ: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    # Of keys that READ what the state holds, and that WRITE there: in one launch where their tiles
    # fit into registers.
    # A decay leads to whoever reads and from whoever writes, so that its gradient is what
    # operands times their gradients leave. Of pairs within the chunk most of that cancels, to the
    # last bit of a product; EXACT: pairs are summed by themselves.
    chunk = tl.program_id(0) % chunks
    image_head = tl.program_id(0) // chunks
    image, head = (image_head // heads).to(tl.int64), image_head % heads
    row, column, wide, token, is_token, mask_k, mask_v = _tiles(
        chunk, n, dk, dv, height, width, 0, C, K, V, COLUMNS
    )
    q = _raw(query, image, head, token, column, mask_k, q_image, q_token, q_head)
    k = _raw(key, image, head, token, column, mask_k, k_image, k_token, k_head)
    q, k = _mapped(q, MAPPED, True, HALF), _mapped(k, MAPPED, True, HALF)
    d = _raw(grad, image, head, token, wide, mask_v, d_image, d_token, d_head) * scale
    d = _mapped(d, False, False, HALF)
    of_key = tl.zeros((C, K), tl.float32)
    for slot in range(slots):
        row, column, wide, token, is_token, _, _ = _tiles(
            chunk, n, dk, dv, height, width, slot * nothing, C, K, V, COLUMNS
        )
        is_up = (slot == 1) | (is_reversed != 0)
        at = ((first + slot) * rows + image_head).to(tl.int64) * chunks + chunk
        gate, beta = _gates(
            log_decay, strength, image, head, token, is_token, first + slot, n, heads, directions
        )
        start, end = _sums(gate, row, is_up, EXACT)
        given = _kept(written, at, C, dv, row, wide)
        decay = _decays(gate, start, row, is_up, False, P, EXACT)
        of_read, of_written = tl.zeros((C, K), tl.float32), tl.zeros((C, K), tl.float32)
        of_gate, of_token = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
        place = image * n * directions * heads + (first + slot) * heads + head
        place += token * (directions * heads)
        if WRITE:
            if CARRIED:
                state_grad = _kept(state_grads, at, dv, dk, wide, column)
                of_written += _exp2(end)[:, None] * _product(given, state_grad, P, HALF)
                state = _kept(states, at, dv, dk, wide, column)
                through = tl.sum(tl.sum(state.to(tl.float32) * state_grad, 1), 0)
                by_token = tl.sum(of_written * k, 1)
                of_gate += through * tl.exp2(tl.sum(gate, 0)) + tl.sum(by_token, 0)
                if EXACT:
                    of_token -= by_token
            weights = tl.trans(_product(d, tl.trans(given), P, HALF) * decay)
            of_written += _fine_product(weights, q, P, HALF)
        if READ:
            # A token that writes nothing has a gradient of its strength.
            beta = tl.where(beta == 0.0, 2.0**-60, beta)
            of_wanted = _kept(wanted_grads, at, C, dv, row, wide)
            system = -_product(of_wanted, tl.trans(given), P, HALF) * decay
            system = tl.where(_is_later(row, is_up), system * beta[:, None], 0.0)
            if CARRIED:
                state = _kept(states, at, dv, dk, wide, column)
                of_read -= (beta * _exp2(start))[:, None] * _product(of_wanted, state, P, HALF)
            if EXACT:
                of_token += tl.sum(of_read * k, 1)
                of_gate += _across(system * _product(k, tl.trans(k), P, HALF), row, is_up, P)
            of_read += _product(system, k, P, HALF)
            of_written += _product(tl.trans(system), k, P, HALF)
            of_beta = tl.sum(of_read * k, 1) / beta
            of_beta += tl.load(grad_strength + place, mask=is_token, other=0.0)
            tl.store(grad_strength + place, of_beta, mask=is_token)
        if not EXACT:
            of_token += tl.sum((of_read - of_written) * k, 1)
        of_key += of_read + of_written
        sums, _ = _sums(of_token, row, is_up == 0, EXACT)
        of_gate += sums + tl.load(grad_decay + place, mask=is_token, other=0.0)
        tl.store(grad_decay + place, of_gate, mask=is_token)
    row, column, wide, token, is_token, mask_k, mask_v = _tiles(
        chunk, n, dk, dv, height, width, 0, C, K, V, COLUMNS
    )
    k = _raw(key, image, head, token, column, mask_k, k_image, k_token, k_head)
    of_key = _before_map(k, of_key, MAPPED, True)
    _put(grad_key, added_key, image, head, token, column, mask_k, of_key, to_k_image, to_k_token,
         to_k_head, ADD)  # fmt: skip
