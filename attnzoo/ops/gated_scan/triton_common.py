"""What the kernels of gated linear attention share: tiles of a scan, and the decays in a chunk.

A scan is cut into chunks of C tokens, a power of two. Gates are log2 of decays here.
"""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo.ops.triton_common import _LOG2E

# The least log2 of a chunk's decay for which its half, as an exponent, is left to bfloat16.
_MILD = tl.constexpr(-80.0)


@triton.jit
def _places(chunk, n, height, width, C: tl.constexpr, COLUMNS: tl.constexpr):
    """The tokens of a chunk in the order of the rows or of the columns, and which there are."""
    place = chunk * C + tl.arange(0, C)
    token = (place % height) * width + place // height if COLUMNS else place
    return token, place < n


@triton.jit
def _tile(z, image, head, token, column, mask, of_image, of_token, of_head):
    place = z + image * of_image + head.to(tl.int64) * of_head
    return tl.load(place + token[:, None] * of_token + column[None, :], mask=mask, other=0.0)


@triton.jit
def _log2_gate(gate, mask, per_gate, MAPPED: tl.constexpr):
    """log2 of the decay at each token; 0, which is no decay, outside.

    The gate is log_gate, or, where MAPPED, the x of logsigmoid(x); ``per_gate`` is its factor.
    """
    gate = gate.to(tl.float32)
    if MAPPED:
        # log(1 + e) = 2 artanh(e / (2 + e)) loses nothing where e is small and the memory long.
        e = tl.exp(-tl.abs(gate))
        s = e / (2.0 + e)
        z = s * s
        series = 1 / 11 + z * (1 / 13 + z * (1 / 15))
        series = 1 / 3 + z * (1 / 5 + z * (1 / 7 + z * (1 / 9 + z * series)))
        gate = tl.minimum(gate, 0.0) - 2.0 * s * (1.0 + z * series)
    return tl.where(mask, gate * per_gate * _LOG2E, 0.0)


@triton.jit
def _join(before, after, gate, row, level):
    """From blocks of 2^level tokens to blocks twice as long.

    ``before`` and ``after`` are the sums of the gates of a block before and after each token,
    without its own. Nothing is a difference of two sums, so that no gate is too strong.
    """
    shift = 1 << level
    is_second = ((row & shift) != 0)[:, None]
    place = (row ^ shift)[:, None] + tl.zeros_like(gate).to(tl.int32)
    other = tl.gather(before + gate + after, place, 0)
    return before + tl.where(is_second, other, 0.0), after + tl.where(is_second, 0.0, other)


@triton.jit
def _is_mine(total, dk, WIDE: tl.constexpr, MILD: tl.constexpr):
    """Whether a chunk is for the kernels of mild gates, or for the others.

    Mild: it forgets so little that a factor each, of both signs, is exact enough. In one kernel
    the two forms would take each other's registers.
    """
    column = tl.arange(0, WIDE)
    is_mild = tl.min(tl.load(total + column, mask=column < dk, other=0.0), 0) > _MILD
    return is_mild if MILD else is_mild == 0


@triton.jit
def _mild_sums(gate):
    """``before`` and ``after`` of a whole chunk, as differences."""
    until = tl.cumsum(gate, 0)
    return until - gate, tl.sum(gate, 0)[None, :] - until


@triton.jit
def _mild_factors(before, after, gate):
    """2^(sum before - c) and 2^(c - sum up to the token), with c half of the chunk's decay."""
    lead = 0.5 * (before - after - gate)
    return tl.exp2(lead), tl.exp2(-lead - gate)


@triton.jit
def _level_factor(before, after, row, level):
    """Decays to the border between two blocks of 2^level tokens, and who is in the second.

    They lead forward for a query of the second block and a key of the first, and backward for the
    others, so that one product serves both directions. Queries have their own gate on top.
    """
    is_second = ((row & (1 << level)) != 0)[:, None]
    return tl.exp2(tl.where(is_second, before, after)), is_second


@triton.jit
def _are_pairs(row, level, FORWARD: tl.constexpr, BACKWARD: tl.constexpr):
    """Which (query, key) are in two halves of a pair, in a direction that is scanned."""
    are_pairs = ((row[:, None] ^ row[None, :]) >> level) == 1
    if not BACKWARD:
        are_pairs = are_pairs & (row[:, None] > row[None, :])
    if not FORWARD:
        are_pairs = are_pairs & (row[:, None] < row[None, :])
    return are_pairs
