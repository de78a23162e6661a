"""What the kernels of gated linear attention share: tiles of a scan, and the decays in a chunk.

A scan is cut into chunks of C tokens, a power of two. Decays are summed as log2, each over the
very gates that it spans: nothing is a difference of two sums, so that no gate is too strong.
"""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _places(chunk, n, height, width, C: tl.constexpr, COLUMNS: tl.constexpr):
    """The tokens of a chunk in the order of the rows or of the columns, and which there are."""
    place = chunk * C + tl.arange(0, C)
    token = (place % height) * width + place // height if COLUMNS else place
    return token.to(tl.int64), place < n


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
def _join(before, after, total, row, level):
    """From blocks of 2^level tokens to blocks twice as long.

    ``before`` and ``after`` hold the gates of a block before and after each token, without its
    own; ``total`` all of the block.
    """
    shift = 1 << level
    is_second = ((row & shift) != 0)[:, None]
    other = tl.gather(total, (row ^ shift)[:, None] + tl.zeros_like(total).to(tl.int32), 0)
    before += tl.where(is_second, other, 0.0)
    after += tl.where(is_second, 0.0, other)
    return before, after, total + other


@triton.jit
def _scaled(query, key, before, after, row, level):
    """Queries, with their own gate, and keys for the products between the two halves of pairs.

    Each decays to the border between two blocks of 2^level tokens: forward for a query of the
    second block and a key of the first, backward for the others. One product serves both.
    """
    is_second = ((row & (1 << level)) != 0)[:, None]
    factor = tl.exp2(tl.where(is_second, before, after))
    return query * factor, key * factor, factor, is_second


@triton.jit
def _are_pairs(row, level, FORWARD: tl.constexpr, BACKWARD: tl.constexpr):
    """Which (query, key) are in two halves of a pair, in a direction that is scanned."""
    are_pairs = ((row[:, None] ^ row[None, :]) >> level) == 1
    if not BACKWARD:
        are_pairs = are_pairs & (row[:, None] > row[None, :])
    if not FORWARD:
        are_pairs = are_pairs & (row[:, None] < row[None, :])
    return are_pairs
