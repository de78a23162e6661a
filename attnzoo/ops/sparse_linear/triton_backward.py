"""The gradients of queries, and of keys and values, block by block. See ``triton.py``."""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo.ops.sparse_linear.triton_common import (
    _features,
    _here,
    _listed,
    _matrix,
    _put,
    _put_state,
    _state_of,
    _tile,
)
from attnzoo.ops.triton_common import _LN2, _add_dot, _dot


@triton.jit
def _sparse_turn_kernel(chosen, readers, counts, blocks, B: tl.constexpr):
    """The blocks of queries that have chosen a block of keys, as a list, and how many they are."""
    row, block = tl.arange(0, B), tl.program_id(0)
    line = tl.program_id(1).to(tl.int64) * blocks
    is_row = row < blocks
    flag = tl.load(chosen + (line + row) * blocks + block, mask=is_row, other=0).to(tl.int32)
    place = readers + (line + block) * blocks + tl.cumsum(flag, 0) - 1
    tl.store(place, row, mask=is_row & (flag > 0))
    tl.store(counts + line + block, tl.sum(flag, 0))


@triton.jit
def _slope(x, of_x):
    """The gradient of what a softmax over channels was taken of."""
    return x * (of_x - tl.sum(x * of_x, 1)[:, None])


@triton.jit
def _sparse_query_kernel(
    of_near, of_far, near, query, key, value, weight, kept, rest, logs, grads, of_rest, of_weight,
    along, n, blocks, count, heads, d, n_row, f_row, q_row, k_row, v_row, part_step, block_step,
    scale, eps, JOIN: tl.constexpr, S: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    FULL: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The gradients of queries and of the states they read; each output times its gradient."""
    image, head, part, block, token, is_real, column = _here(n, heads, d, S, S, D)
    row = heads * d
    q = _tile(query + image * n * q_row + head * d, token, q_row, column, is_real, d)
    g = _tile(of_near + image * n * n_row + head * d, token, n_row, column, is_real, d)
    z = _tile(near + image * n * row + head * d, token, row, column, is_real, d)
    delta = tl.sum(z.to(tl.float32) * g.to(tl.float32), 1)
    tl.store(along + part * n + token, delta, mask=is_real)
    log = tl.load(logs + part * n + token, mask=is_real, other=0.0)
    key += image * n * k_row + head * d
    value += image * n * v_row + head * d
    kept += (part * blocks + block) * count
    acc = tl.zeros((S, D), tl.float32)
    for i in range(count * (S // K)):
        other = _listed(kept, i, S, K)
        is_key = other < n
        k = _tile(key, other, k_row, column, is_key, d)
        v = _tile(value, other, v_row, column, is_key, d)
        # Rounding errors of steep scores would be exponents without a limit.
        p = tl.exp2(tl.minimum(_dot(q, tl.trans(k), P) * scale - log[:, None], 0.0))
        if not FULL:
            p = tl.where(is_key[None, :], p, 0.0)
        slope = p * (_dot(g, tl.trans(v), P) - delta[:, None])
        acc = _add_dot(acc, slope.to(k.dtype), k, P)
    x = _features(q, is_real, column, d)
    state, sums = _state_of(rest + part * part_step + block * block_step, column, d)
    kind = state.dtype
    norm = tl.sum(x * sums[None, :], 1) + eps
    line = (part * blocks + block) * ((d + 1) * d)
    if JOIN:
        far = _dot(x.to(kind), state, P) / norm[:, None]
        of_matrix = _dot(tl.trans(g), far.to(g.dtype), P)
        _put_state(of_weight + line, column, d, of_matrix, tl.sum(g.to(tl.float32), 0))
        g = _dot(g, _matrix(weight, column, d), P)
    else:
        g = _tile(of_far + image * n * f_row + head * d, token, f_row, column, is_real, d)
    g = g.to(tl.float32) / norm[:, None]
    of_x = _dot(g.to(kind), tl.trans(state), P)
    of_norm = -tl.sum(x * of_x, 1) / norm
    of_x += of_norm[:, None] * sums[None, :]
    acc = acc * (scale * _LN2) + _slope(x, of_x)
    _put(grads + image * n * (3 * row) + head * d, token, 3 * row, column, is_real, d, acc)
    product = _dot(tl.trans(x.to(kind)), g.to(kind), P)
    _put_state(of_rest + line, column, d, product, tl.sum(x * of_norm[:, None], 0))


@triton.jit
def _sparse_key_kernel(
    of_near, query, key, value, readers, counts, of_state, logs, along, grads, n, blocks, heads, d,
    n_row, q_row, k_row, v_row, part_step, block_step, scale, S: tl.constexpr, R: tl.constexpr,
    K: tl.constexpr, D: tl.constexpr,    P: tl.constexpr,
):  # fmt: skip
    """The gradients of keys and values."""
    image, head, part, block, token, is_real, column = _here(n, heads, d, S, R, D)
    row = heads * d
    k = _tile(key + image * n * k_row + head * d, token, k_row, column, is_real, d)
    v = _tile(value + image * n * v_row + head * d, token, v_row, column, is_real, d)
    query += image * n * q_row + head * d
    of_near += image * n * n_row + head * d
    logs += part * n
    along += part * n
    line = part * blocks + block
    readers += line * blocks
    x = _features(k, is_real, column, d)
    of_rows, of_sums = _state_of(of_state + part * part_step + block * block_step, column, d)
    kind = of_rows.dtype
    of_x = _dot(v.to(kind), tl.trans(of_rows), P) + of_sums[None, :]
    of_key = _slope(x, of_x) / (scale * _LN2)
    of_value = _dot(x.to(kind), of_rows, P)
    for i in range(tl.load(counts + line) * (S // K)):
        other = _listed(readers, i, S, K)
        is_query = other < n
        q = _tile(query, other, q_row, column, is_query, d)
        g = _tile(of_near, other, n_row, column, is_query, d)
        log = tl.load(logs + other, mask=is_query, other=0.0)
        delta = tl.load(along + other, mask=is_query, other=0.0)
        p = tl.exp2(tl.minimum(_dot(k, tl.trans(q), P) * scale - log[None, :], 0.0))
        of_value = _add_dot(of_value, p.to(g.dtype), g, P)
        slope = p * (_dot(v, tl.trans(g), P) - delta[None, :])
        of_key = _add_dot(of_key, slope.to(q.dtype), q, P)
    grads += image * n * (3 * row) + head * d
    _put(grads + row, token, 3 * row, column, is_real, d, of_key * (scale * _LN2))
    _put(grads + 2 * row, token, 3 * row, column, is_real, d, of_value)
