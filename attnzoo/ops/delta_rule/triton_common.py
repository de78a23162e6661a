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

from attnzoo.ops.gated_scan.triton_common import _exp2, _places
from attnzoo.ops.triton_common import _LOG2E, _add_dot, _dot, _is_fast

_STRONGEST = tl.constexpr(-110.0)  # its exponential is 0, and finite sums of it stay exact


_FAST = tl.constexpr(_is_fast())

if _is_fast():

    @triton.jit
    def _sigmoid(x):
        """By the approximate reciprocal, whose error is that of the exponential."""
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + _exp2(x * -_LOG2E)], dtype=tl.float32,
            is_pure=True, pack=1,
        )  # fmt: skip

else:

    @triton.jit
    def _sigmoid(x):
        return 1.0 / (1.0 + _exp2(x * -_LOG2E))


@triton.jit
def _half(x):
    """As bfloat16, rounded: the interpreter alone would cut off."""
    if not _FAST:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits += tl.where(x == x, 0x7FFF + ((bits >> 16) & 1), 0)
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(tl.bfloat16)


@triton.jit
def _product(a, b, P: tl.constexpr, HALF: tl.constexpr):
    """a b with float32 sums, of operands in bfloat16 where HALF."""
    return _dot(_half(a), _half(b), P) if HALF else _dot(a, b, P)


@triton.jit
def _fine_product(a, b, P: tl.constexpr, HALF: tl.constexpr):
    """As exact as b in bfloat16 is: of a there are two halves."""
    if HALF:
        # Cut off and not rounded: going back to float32 costs nothing.
        high = (a.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)
        total = _add_dot(_product(high, b, P, HALF), _half(a - high), _half(b), P)
    else:
        total = _dot(a, b, P)
    return total


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
def _kept(z, at, rows, columns, row, column):
    """Tile ``at`` of what another kernel left, (rows, columns)."""
    place = z + at * rows * columns + row[:, None] * columns + column[None, :]
    return tl.load(place, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0)


@triton.jit
def _keep(z, at, rows, columns, row, column, tile):
    """Leaves it there."""
    place = z + at * rows * columns + row[:, None] * columns + column[None, :]
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    tile = _half(tile) if z.dtype.element_ty == tl.bfloat16 else tile
    tl.store(place, tile, mask=mask)


@triton.jit
def _raw(z, image, head, token, column, mask, of_image, of_token, of_head):
    place = z + image * of_image + head.to(tl.int64) * of_head
    place += token[:, None] * of_token + column[None, :]
    return tl.load(place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _mapped(z, MAPPED: tl.constexpr, UNIT: tl.constexpr, HALF: tl.constexpr):
    """z itself or, where MAPPED, SiLU(z), where UNIT divided by its length; for products."""
    if MAPPED:
        z = z * _sigmoid(z)
        if UNIT:
            z = z * tl.rsqrt(tl.sum(z * z, 1) + 1e-6)[:, None]
    return _half(z) if HALF else z


@triton.jit
def _before_map(raw, grad, MAPPED: tl.constexpr, UNIT: tl.constexpr):
    """The gradient of ``raw`` from that of what ``_mapped`` made of it."""
    if MAPPED:
        share = _sigmoid(raw)
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
    turn = tl.where(is_up, -row, row)
    return turn[:, None] > turn[None, :]


@triton.jit
def _reaches(row, is_up):
    """Which (t, s) have t scanned after s, or the same."""
    turn = tl.where(is_up, -row, row)
    return turn[:, None] >= turn[None, :]


@triton.jit
def _sums(gate, row, is_up, EXACT: tl.constexpr):
    """Sums from the start of the chunk to each token, its own among them, and to the end.

    EXACT: none is a difference, which after a strong gate would have lost the weak.
    """
    if EXACT:
        start = tl.sum(tl.where(_reaches(row, is_up), gate[None, :], 0.0), 1)
        end = tl.sum(tl.where(_is_later(row, is_up), gate[:, None], 0.0), 0)
    else:
        until, total = tl.cumsum(gate, 0), tl.sum(gate, 0)
        start = tl.where(is_up, total - until + gate, until)
        end = total - start
    return start, end


@triton.jit
def _decays(gate, start, row, is_up, TURNED: tl.constexpr, P: tl.constexpr, EXACT: tl.constexpr):
    """Decays from s to t, (C, C), 0 unless t is s or later; (s, t) where TURNED."""
    if EXACT:
        reaches = _reaches(row, is_up)
        between = tl.where(_is_later(row, is_up), gate[:, None], 0.0)
        between = _dot(tl.where(reaches, 1.0, 0.0), between, P)
    elif TURNED:
        reaches = _reaches(row, is_up == 0)
        between = start[None, :] - start[:, None]
    else:
        reaches = _reaches(row, is_up)
        between = start[:, None] - start[None, :]
    decay = _exp2(tl.where(reaches, between, float("-inf")))
    return tl.trans(decay) if EXACT and TURNED else decay


@triton.jit
def _near_inverse(system, C: tl.constexpr, P: tl.constexpr):
    """(I + system)^-1 of the blocks of 16 tokens on the diagonal alone, as the whole would have.

    Of each by itself: a product of the whole does four times as much, sixteen with its operands.
    """
    block, place = tl.arange(0, C // 16), tl.arange(0, 16)
    is_own = block[:, None, None, None] == block[None, None, :, None]
    system = tl.reshape(system, (C // 16, 16, C // 16, 16))
    system = tl.sum(tl.where(is_own, system, 0.0), 2)
    apart = place[None, :, None] ^ place[None, None, :]
    inverse = tl.where(apart == 0, 1.0, 0.0) - tl.where(apart == 1, system, 0.0)
    for level in tl.static_range(1, 4):
        across = tl.where((apart >> level) == 1, system, 0.0)
        inverse -= _dot(inverse, _dot(across, inverse, P), P)
    return tl.reshape(tl.where(is_own, inverse[:, :, None, :], 0.0), (C, C))


@triton.jit
def _inverse(system, row, levels, C: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr):
    """(I + system)^-1 of a strictly triangular system.

    Blocks of 1, 2, 4, ... tokens are inverted and joined pairwise. All that appears is the
    inverse of a block; powers of the system, which others sum, are huge where keys are alike.
    """
    apart = row[:, None] ^ row[None, :]
    if HALF and C > 16:
        inverse = _near_inverse(system, C, P)
    else:
        inverse = tl.where(apart == 0, 1.0, 0.0) - tl.where(apart == 1, system, 0.0)
    for level in range(4 if HALF and C > 16 else 1, levels):
        across = tl.where((apart >> level) == 1, system, 0.0)
        inverse -= _product(inverse, _product(across, inverse, P, HALF), P, HALF)
    return inverse
