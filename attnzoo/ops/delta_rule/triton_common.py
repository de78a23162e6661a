"""What the kernels of the gated delta rule share: tiles, decays within a chunk, its triangle.

A chunk is C tokens, a power of two, in the order of the rows or of the columns. Both directions
of an order have the same chunks: in one a token sees what stands before it, in the other what
stands after it, and nothing is read backwards.
"""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo.ops.gated_scan.triton_common import _places
from attnzoo.ops.triton_common import (
    _LOG2E,
    _dot,
)

_STRONGEST = tl.constexpr(-110.0)  # its exponential is 0, and finite sums of it stay exact


@triton.jit
def _product(a, b, P: tl.constexpr, HALF: tl.constexpr):
    """a b with float32 sums, of operands in bfloat16 where HALF."""
    if HALF:
        a = a.to(tl.bfloat16)
        b = b.to(tl.bfloat16)
    return _dot(a, b, P)


@triton.jit
def _tiles(
    chunk, n, dk, dv, height, width, shift, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rows of a chunk, channels of keys and of values, tokens, and which there are.

    In loops over directions ``shift`` is 0 in a way that no compiler knows: it would compute all
    addresses and masks before the loop, for which there are no registers.
    """
    token, is_token = _places(chunk, n, height, width, C, COLUMNS)
    row, column, wide = (
        tl.arange(0, C) + shift, tl.arange(0, K) + shift, tl.arange(0, V) + shift,
    )  # fmt: skip
    token += shift
    is_token = is_token & (token >= 0)
    mask_k = is_token[:, None] & (column < dk)[None, :]
    mask_v = is_token[:, None] & (wide < dv)[None, :]
    return row, column, wide, token, is_token, mask_k, mask_v


@triton.jit
def _state(states, at, dk, dv, column, wide):
    place = states + at * dk * dv + column[:, None] * dv + wide[None, :]
    mask = (column < dk)[:, None] & (wide < dv)[None, :]
    return tl.load(place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _raw(z, image, head, token, column, mask, of_image, of_token, of_head):
    place = z + image * of_image + head.to(tl.int64) * of_head
    place += token[:, None] * of_token + column[None, :]
    return tl.load(place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _mapped(z, MAPPED: tl.constexpr, UNIT: tl.constexpr):
    """z itself or, where MAPPED, SiLU(z), where UNIT divided by its length."""
    if MAPPED:
        z = z / (1.0 + tl.exp(-z))
        if UNIT:
            z = z * tl.rsqrt(tl.sum(z * z, 1) + 1e-6)[:, None]
    return z


@triton.jit
def _before_map(raw, grad, MAPPED: tl.constexpr, UNIT: tl.constexpr):
    """The gradient of ``raw`` from that of what ``_mapped`` made of it."""
    if MAPPED:
        share = 1.0 / (1.0 + tl.exp(-raw))
        if UNIT:
            z = raw * share
            inverse = tl.rsqrt(tl.sum(z * z, 1) + 1e-6)[:, None]
            z *= inverse
            grad = inverse * (grad - z * tl.sum(z * grad, 1)[:, None])
        grad *= share * (1.0 + raw * (1.0 - share))
    return grad


@triton.jit
def _gates(log_decay, strength, image, head, token, is_token, direction, n, heads, directions):
    """log2 of the decay at each token and its strength; 0, which leave no trace, outside."""
    place = image * n * directions * heads + direction * heads + head
    place += token * (directions * heads)
    gate = tl.load(log_decay + place, mask=is_token, other=0.0)
    gate = tl.where(gate < _STRONGEST, _STRONGEST, gate) * _LOG2E
    return gate, tl.load(strength + place, mask=is_token, other=0.0)


@triton.jit
def _is_later(row, is_up):
    """Which (t, s) have t scanned after s."""
    t, s = row[:, None], row[None, :]
    return tl.where(is_up, t < s, t > s)


@triton.jit
def _edges(gate, row, is_up):
    """Decays from the start of the chunk to each token, its own among them, and to the end."""
    is_later = _is_later(row, is_up)
    reaches = is_later | (row[:, None] == row[None, :])
    start = tl.sum(tl.where(reaches, gate[None, :], 0.0), 1)
    end = tl.sum(tl.where(is_later, gate[:, None], 0.0), 0)
    return tl.exp2(start), tl.exp2(end)


@triton.jit
def _decays(gate, row, is_up, P: tl.constexpr, EXACT: tl.constexpr):
    """Decays from s to t, (C, C), 0 unless t is s or later.

    EXACT: none is a difference of sums, which after a strong gate would have lost the weak.
    """
    is_later = _is_later(row, is_up)
    reaches = is_later | (row[:, None] == row[None, :])
    if EXACT:
        between = _dot(tl.where(reaches, 1.0, 0.0), tl.where(is_later, gate[:, None], 0.0), P)
    else:
        start = tl.sum(tl.where(reaches, gate[None, :], 0.0), 1)
        between = start[:, None] - start[None, :]
    decay = tl.exp2(tl.where(reaches, between, 0.0))
    return tl.where(reaches, decay, 0.0)


@triton.jit
def _inverse(system, row, levels, P: tl.constexpr):
    """(I + system)^-1 of a strictly triangular system.

    Blocks of 1, 2, 4, ... tokens are inverted and joined pairwise. All that appears is the
    inverse of a block; powers of the system, which others sum, are huge where keys are alike.
    """
    apart = row[:, None] ^ row[None, :]
    inverse = tl.where(apart == 0, 1.0, 0.0) - tl.where(apart == 1, system, 0.0)
    for level in range(1, levels):
        across = tl.where((apart >> level) == 1, system, 0.0)
        inverse -= _dot(inverse, _dot(across, inverse, P), P)
    return inverse
