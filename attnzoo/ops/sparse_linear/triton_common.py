"""Tiles, features and states, which kernels of both directions read. See ``triton.py``."""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _here(n, heads, d, S: tl.constexpr, R: tl.constexpr, D: tl.constexpr):
    """Image, head, the two together, block of S; R of its tokens, which there are; channels."""
    part, column = tl.program_id(1).to(tl.int64), tl.arange(0, D)
    token = tl.program_id(0) * R + tl.arange(0, R)
    block = tl.program_id(0) // (S // R)
    return part // heads, part % heads, part, block, token, token < n, column


@triton.jit
def _tile(z, token, spacing, column, is_real, d):
    mask = is_real[:, None] & (column < d)[None, :]
    return tl.load(z + token[:, None] * spacing + column[None, :], mask=mask, other=0.0)


@triton.jit
def _put(z, token, spacing, column, is_real, d, x):
    mask = is_real[:, None] & (column < d)[None, :]
    place = z + token[:, None] * spacing + column[None, :]
    tl.store(place, x.to(z.dtype.element_ty), mask=mask)


@triton.jit
def _features(z, is_real, column, d):
    """phi of a tile, in float32; 0 of tokens that are not there."""
    z = tl.where((column < d)[None, :], z.to(tl.float32), -float("inf"))
    z = tl.exp(z - tl.max(z, 1)[:, None])
    return tl.where(is_real[:, None], z / tl.sum(z, 1)[:, None], 0.0)


@triton.jit
def _matrix(z, column, d):
    row, is_column = tl.arange(0, column.shape[0]), column < d
    mask = is_column[:, None] & is_column[None, :]
    return tl.load(z + row[:, None] * d + column[None, :], mask=mask, other=0.0)


@triton.jit
def _state_of(state, column, d):
    """Rows of a state, (d, d), and its last one."""
    last = tl.load(state + d * d + column, mask=column < d, other=0.0)
    return _matrix(state, column, d), last.to(tl.float32)


@triton.jit
def _put_state(state, column, d, rows, last):
    row, is_column = tl.arange(0, column.shape[0]), column < d
    kind = state.dtype.element_ty
    mask = is_column[:, None] & is_column[None, :]
    tl.store(state + row[:, None] * d + column[None, :], rows.to(kind), mask=mask)
    tl.store(state + d * d + column, last.to(kind), mask=is_column)


@triton.jit
def _listed(blocks, i, S: tl.constexpr, K: tl.constexpr):
    """The tokens of the i-th piece of K tokens, of the blocks in a list."""
    return tl.load(blocks + i // (S // K)) * S + i % (S // K) * K + tl.arange(0, K)
