"""What the kernels of gated linear attention share: tiles of a scan, and the decays in a chunk.

A scan is cut into chunks of C tokens, a power of two. Gates are log2 of decays here.
"""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo.ops.triton_common import _LOG2E, _add_dot, _dot, _is_fast

# The least log2 of a chunk's decay for which its half, as an exponent, is left to bfloat16.
_MILD = tl.constexpr(-80.0)
# What is less is 0 as a power of 2, and this stays finite where gates are shut.
_LEAST = tl.constexpr(-160.0)


if _is_fast():

    @triton.jit
    def _exp2(x):
        """2^x, 0 where that is below the normal numbers, on which exp2 spends instructions."""
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )

else:

    @triton.jit
    def _exp2(x):
        return tl.exp2(x)


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
        # log(1 + e) / e to 5e-9, so that nothing is lost where e is small and the memory long.
        e = _exp2(tl.abs(gate) * -_LOG2E)
        series = 0.106036169 + e * (-0.0569591591 + e * (0.0198512627 - e * 0.00324398087))
        series = -0.249541321 + e * (0.196759315 + e * (-0.153055701 + e * series))
        series = 0.999999995 + e * (-0.499999024 + e * (0.333299623 + e * series))
        gate = tl.minimum(gate, 0.0) - e * series
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
def _is_mild(totals, at, dk, WIDE: tl.constexpr):
    """Whether a chunk forgets so little that a factor each, of both signs, is exact enough."""
    column = tl.arange(0, WIDE)
    return tl.min(tl.load(totals + at * dk + column, mask=column < dk, other=0.0), 0) > _MILD


@triton.jit
def _are_mild(totals, first, count, dk, WIDE: tl.constexpr, TURNS: tl.constexpr):
    """Whether ``TURNS`` chunks from the first on are."""
    turn, column = first + tl.arange(0, TURNS)[:, None], tl.arange(0, WIDE)[None, :]
    mask = (turn < count) & (column < dk)
    total = tl.load(totals + turn.to(tl.int64) * dk + column, mask=mask, other=0.0)
    return tl.min(tl.min(total, 1), 0) > _MILD


@triton.jit
def _half(total):
    """log2 of what the states of a chunk are multiplied by: half of its decay, if that is mild.

    So they meet the factors that the chunk's own pairs have, which lead to its middle.
    """
    return 0.5 * tl.maximum(total, _MILD)


@triton.jit
def _sums_between(total, is_later, dtype: tl.constexpr, P: tl.constexpr):
    """(i, j): the sum of the totals after j and before i. None is less than ``_LEAST``."""
    if dtype == tl.float32:
        later = tl.where(is_later, total[:, None], 0.0)
        return _dot(tl.where(is_later, 1.0, 0.0), later, P)
    until = tl.cumsum(total, 0)  # a difference, which is exact enough for bfloat16
    return (until - total)[:, None] - until[None, :]


@triton.jit
def _signs(C: tl.constexpr, OWN: tl.constexpr):
    """(i, j): half, negative where token j comes after i, and, but for OWN, is i."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return tl.where(i >= j if OWN else i > j, 0.5, -0.5).to(tl.bfloat16)


@triton.jit
def _summed(signs, x, P: tl.constexpr):
    """Their product, in two halves that are exact enough; it sums faster than a scan."""
    high = x.to(tl.bfloat16)
    low = (x - high.to(tl.float32)).to(tl.bfloat16)
    return _add_dot(_dot(signs, high, P), signs, low, P)


@triton.jit
def _leads(gate, C: tl.constexpr, P: tl.constexpr):
    """Of a mild chunk: sums of gates before, and up to, each token, less half of the chunk's."""
    return _summed(_signs(C, False), gate, P), _summed(_signs(C, True), gate, P)


@triton.jit
def _level_factor(before, after, row, level):
    """Decays to the border between two blocks of 2^level tokens, and who is in the second.

    They lead forward for a query of the second block and a key of the first, and backward for the
    others, so that one product serves both directions. Queries have their own gate on top.
    """
    is_second = ((row & (1 << level)) != 0)[:, None]
    return _exp2(tl.where(is_second, before, after)), is_second


@triton.jit
def _are_pairs(row, level, FORWARD: tl.constexpr, BACKWARD: tl.constexpr):
    """Which (query, key) are in two halves of a pair, in a direction that is scanned."""
    are_pairs = ((row[:, None] ^ row[None, :]) >> level) == 1
    if not BACKWARD:
        are_pairs = are_pairs & (row[:, None] > row[None, :])
    if not FORWARD:
        are_pairs = are_pairs & (row[:, None] < row[None, :])
    return are_pairs
