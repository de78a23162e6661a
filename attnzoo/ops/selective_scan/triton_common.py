"""What the kernels of the selective scan share: tiles of a chunk, steps, decays, the scan."""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo.ops.triton_common import _LOG2E, _nothing

_IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_STRONGEST = tl.constexpr(-2e38)  # times log2(e) it is finite, and times a step of 0 it is 0


@triton.jit
def _chunk(n, chunks, tiles, T: tl.constexpr):
    """The image, the chunk's first tile of tokens, and how many tiles it has."""
    first = tl.program_id(0) % chunks * tiles
    image = (tl.program_id(0) // chunks).to(tl.int64)
    return image, first, tl.minimum(tiles, tl.cdiv(n, T) - first)


@triton.jit
def _channels(d, D: tl.constexpr):
    """The channels of a program, a thread each, and which there are.

    A compiler that knew of their alignment would give a thread neighboring channels and share out
    the tokens: scans would go through exchanges between threads, in ten times the time.
    """
    channel = tl.multiple_of(tl.program_id(1) * D + tl.arange(0, D), 1)
    return channel, channel < d


@triton.jit
def _tile(z, image, first, row, channel, mask, of_image, of_token):
    place = z + image * of_image + first * of_token
    place += row.to(tl.int64)[:, None] * of_token + channel[None, :]
    return tl.load(place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _softplus(z):
    # log(1 + e) / e as a polynomial, to 5e-9: nothing is lost where e is small and the step short.
    e = tl.exp(-tl.abs(z))
    series = 0.10603653639554977 + e * (
        -0.05695951730012894 + e * (0.019851453602313995 + e * -0.0032440233044326305)
    )
    series = 0.1967593878507614 + e * (-0.15305592119693756 + e * series)
    series = 0.3332996368408203 + e * (-0.24954134225845337 + e * series)
    return tl.maximum(z, 0.0) + e * (1.0 + e * (-0.4999990165233612 + e * series))


@triton.jit
def _steps(z, bias, channel, is_channel, mask, MAPPED: tl.constexpr):
    """The step sizes, 0 outside: z themselves or, where MAPPED, softplus(z + bias)."""
    if MAPPED:
        shift = tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32)
        z = tl.where(mask, _softplus(z + shift[None, :]), 0.0)
    return z


@triton.jit
def _log2_rate(rate):
    return tl.where(rate < _STRONGEST, _STRONGEST, rate) * _LOG2E


@triton.jit
def _after(decay, state, past, before, later_decay, later_state, later_past, later):
    # past: the decay of all rows but the last; before: the state before the last.
    return (
        decay * later_decay, later_decay * state + later_state, decay * later_past,
        later_past * state + later,
    )  # fmt: skip


@triton.jit
def _moved(z, count: tl.constexpr, outside, T: tl.constexpr, UPWARD: tl.constexpr):
    """What stands ``count`` rows before each."""
    row = tl.arange(0, T)[:, None] + (count if UPWARD else -count)
    is_here = (row >= 0) & (row < T)
    place = tl.where(is_here, row, 0) + tl.zeros_like(z).to(tl.int32)
    return tl.where(is_here, tl.gather(z, place, 0), outside)


@triton.jit
def _join(decay, fed, T: tl.constexpr, UPWARD: tl.constexpr):
    """The states after each of T rows, decay * the one before + fed, and those before it, from 0.

    UPWARD: from the last row to the first.
    """
    if _IS_INTERPRETED:  # which would scan, flip and exchange number by number
        state = fed
        for k in tl.static_range(5):
            if 1 << k < T:
                state += decay * _moved(state, 1 << k, 0.0, T, UPWARD)
                decay *= _moved(decay, 1 << k, 1.0, T, UPWARD)
        return state, _moved(state, 1, 0.0, T, UPWARD)
    # Within a thread flips only rename registers, which a reverse scan does not know.
    if UPWARD:
        decay, fed = tl.flip(decay, 0), tl.flip(fed, 0)
    none = _nothing(fed)
    _, state, _, before = tl.associative_scan((decay, fed, none + 1.0, none), 0, _after)
    if UPWARD:
        state, before = tl.flip(state, 0), tl.flip(before, 0)
    return state, before


@triton.jit
def _after_wanted(past, decay, wanted, later_past, later_decay, later_wanted):
    # decay: of the last row; past: of all others.
    passed = decay * wanted
    return later_past * decay * past, later_decay, later_past * passed + later_wanted


@triton.jit
def _descend(decay, wanted, T: tl.constexpr, UPWARD: tl.constexpr):
    """What is wanted of the states after each of T rows, decay * wanted of the ones before."""
    if _IS_INTERPRETED:
        return wanted + _join(decay, decay * wanted, T, UPWARD)[1]
    if UPWARD:
        decay, wanted = tl.flip(decay, 0), tl.flip(wanted, 0)
    past = tl.zeros_like(decay) + 1.0
    _, _, wanted = tl.associative_scan((past, decay, wanted), 0, _after_wanted)
    if UPWARD:
        wanted = tl.flip(wanted, 0)
    return wanted


@triton.jit
def _halve(z, H: tl.constexpr, W: tl.constexpr):
    """(2 H, W) -> (H, W): channels exchange the half of the rows that is not theirs, and add."""
    low, high = tl.split(tl.permute(tl.reshape(z, (2, H, W)), (1, 2, 0)))
    is_high = (tl.arange(0, W) // H % 2 == 1)[None, :]
    other = tl.where(is_high, low, high)
    other = tl.flip(tl.reshape(other, (H, W // (2 * H), 2, H)), 2)
    return tl.where(is_high, high, low) + tl.reshape(other, (H, W))


@triton.jit
def _sum_over_channels(z, T: tl.constexpr, D: tl.constexpr):
    """(T, D) -> (W,), W = min(D, 32): the sum over channels of row t in every place t + T i.

    Halves of the rows go to halves of the channels, until each channel has one row's sum: a fifth
    of the exchanges of a sum for every row.
    """
    W: tl.constexpr = min(D, 32)
    if _IS_INTERPRETED:
        is_here = tl.arange(0, T)[:, None] == (tl.arange(0, W) % T)[None, :]
        return tl.sum(tl.where(is_here, tl.sum(z, 1)[:, None], 0.0), 0)
    if D > W:
        z = tl.sum(tl.reshape(z, (T, D // W, W)), 1)
    for k in tl.static_range(5):
        if T >> (k + 1) > 0:
            z = _halve(z, T >> (k + 1), W)
    z = tl.reshape(z, (W,))
    if W > T:
        z = tl.sum(tl.reshape(z, (W // T, T)), 0)
        z = tl.reshape(tl.broadcast_to(z[None, :], (W // T, T)), (W,))
    return z
