"""The selective scan by kernels: chunks of tokens side by side, states in float32.

Three launches: the state that each chunk would leave if it began with none; the states that enter
the chunks, by a recurrence over them; and the outputs. The gradients of the states are states of
the scan the other way round, so that the first two serve the backward as well. A thread walks over
the tokens of its channels with their states in registers: each number has a chain of its own, and
what binds is one exponential for each of them and each token. Only the gradients take the numbers
one after the other, each with a tile's tokens in registers. No decay is a quotient, no exponent
positive, and the sums over a state stay in registers.
"""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.ops.selective_scan.triton_backward import _selective_gradient_kernel
from attnzoo.ops.selective_scan.triton_common import (
    _channels,
    _chunk,
    _log2_rate,
    _steps,
    _tile,
)
from attnzoo.ops.triton_common import (
    _ceil,
    _power_of_2,
    _row,
    column_sum,
    launch_kernel,
    launched,
)

__all__ = ["scan_by_kernels", "selective_scan"]


@triton.jit
def _selective_lay_kernel(
    b, c, rows, lines, n, length, b_image, b_row, c_image, c_row, LINES: tl.constexpr,
    N: tl.constexpr, S: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    # b and c in float32, first as tokens have them and then, LINES, as numbers have them.
    tiles = tl.cdiv(length, T)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    token, number = tl.program_id(0) % tiles * T + tl.arange(0, T), tl.arange(0, S)
    is_number = (number < N)[None, :]
    mask = (token < n)[:, None] & is_number
    place, images = (image * n + token[:, None]) * N + number[None, :], tl.num_programs(0) // tiles
    line = (image * N + number[None, :]) * length + token[:, None]
    z = b + image * b_image + token.to(tl.int64)[:, None] * b_row + number[None, :]
    of_c = c + image * c_image + token.to(tl.int64)[:, None] * c_row + number[None, :]
    z = tl.load(z, mask=mask, other=0.0).to(tl.float32)
    of_c = tl.load(of_c, mask=mask, other=0.0).to(tl.float32)
    tl.store(rows + place, z, mask=mask)
    tl.store(rows + images.to(tl.int64) * n * N + place, of_c, mask=mask)
    if LINES:
        mask = (token < length)[:, None] & is_number
        tl.store(lines + line, z, mask=mask)
        tl.store(lines + images.to(tl.int64) * N * length + line, of_c, mask=mask)


@triton.jit
def _numbers(z, token, n, number, N: tl.constexpr):
    """Of one token, what each number of a state has; steps after the last token are 0."""
    place = z + tl.minimum(token, n - 1) * N + number
    return tl.load(place, mask=number < N, other=0.0)


@triton.jit
def _selective_end_kernel(
    x, step, bias, rates, taken, ends, totals, n, d, chunks, tiles, x_image, x_row, step_image,
    step_row, ADJOINT: tl.constexpr, UPWARD: tl.constexpr, MAPPED: tl.constexpr,
    N: tl.constexpr, S: tl.constexpr, R: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    # What a chunk leaves if nothing enters it; UPWARD: the last token comes first. ADJOINT: what
    # tokens want of the state before the chunk, x the gradient of the output and taken c.
    image, chunk, count = _chunk(n, chunks, tiles, R * T)
    channel, is_channel = _channels(d, D)
    TURN: tl.constexpr = -1 if UPWARD else 1
    row, number = tl.arange(0, T), tl.arange(0, S)
    place = number[:, None] * d + channel[None, :]
    is_state = (number < N)[:, None] & is_channel[None, :]
    rate = _log2_rate(tl.load(rates + place, mask=is_state, other=0.0))
    taken += image * n * N
    state, total = tl.zeros((S, D), tl.float32), tl.zeros((D,), tl.float32)
    for turn in range(0, count * R):
        first = (chunk * R + (count * R - 1 - turn if UPWARD else turn)).to(tl.int64) * T
        mask = (first + row < n)[:, None] & is_channel[None, :]
        z = _tile(step, image, first, row, channel, mask, step_image, step_row)
        dt = _steps(z, bias, channel, is_channel, mask, MAPPED)
        given = _tile(x, image, first, row, channel, mask, x_image, x_row)
        if not ADJOINT:
            given *= dt
        total += tl.sum(dt, 0)
        for k in tl.static_range(T - 1 if UPWARD else 0, -1 if UPWARD else T, TURN):
            decay = tl.exp2(_row(dt, k, T)[None, :] * rate)
            fed = _row(given, k, T)[None, :] * _numbers(taken, first + k, n, number, N)[:, None]
            state = decay * (state + fed) if ADJOINT else decay * state + fed
    at = tl.program_id(0).to(tl.int64)
    tl.store(ends + at * N * d + place, state, mask=is_state)
    tl.store(totals + at * d + channel, total, mask=is_channel)


@triton.jit
def _selective_carry_kernel(
    states, totals, rates, chunks, size, d, UPWARD: tl.constexpr, E: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    # What the chunks leave becomes what enters them.
    image = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1) * E + tl.arange(0, E)
    mask = entry < size
    rate = _log2_rate(tl.load(rates + entry, mask=mask, other=0.0))
    first = chunks - 1 if UPWARD else 0
    turn: tl.constexpr = -1 if UPWARD else 1
    states += (image * chunks + first) * size
    totals += (image * chunks + first) * d
    state = tl.zeros((E,), tl.float32)
    for _ in tl.range(0, chunks, num_stages=STAGES):
        update = tl.load(states + entry, mask=mask, other=0.0)
        total = tl.load(totals + entry % d, mask=mask, other=0.0)
        tl.store(states + entry, state, mask=mask)
        state = state * tl.exp2(total * rate) + update
        states += turn * size
        totals += turn * d


@triton.jit
def _selective_output_kernel(
    x, step, bias, rates, b, c, skip, entering, starts, out, n, d, chunks, tiles, x_image, x_row,
    step_image, step_row, CARRIED: tl.constexpr, SAVED: tl.constexpr, UPWARD: tl.constexpr,
    MAPPED: tl.constexpr, SKIPS: tl.constexpr, N: tl.constexpr, S: tl.constexpr,
    R: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    # entering: the states that enter the chunks; starts: those that enter each R tiles.
    image, chunk, count = _chunk(n, chunks, tiles, R * T)
    channel, is_channel = _channels(d, D)
    TURN: tl.constexpr = -1 if UPWARD else 1
    row, number = tl.arange(0, T), tl.arange(0, S)
    place = number[:, None] * d + channel[None, :]
    is_state = (number < N)[:, None] & is_channel[None, :]
    rate = _log2_rate(tl.load(rates + place, mask=is_state, other=0.0))
    state = tl.zeros((S, D), tl.float32)
    if CARRIED:
        entering += tl.program_id(0).to(tl.int64) * N * d
        state += tl.load(entering + place, mask=is_state, other=0.0)
    starts += image * tl.cdiv(n, R * T) * N * d
    b += image * n * N
    c += image * n * N
    for turn in range(0, count * R):
        tile = (chunk * R + (count * R - 1 - turn if UPWARD else turn)).to(tl.int64)
        first = tile * T
        mask = (first + row < n)[:, None] & is_channel[None, :]
        if SAVED and turn % R == 0:
            tl.store(starts + tile // R * N * d + place, state, mask=is_state)
        z = _tile(step, image, first, row, channel, mask, step_image, step_row)
        dt = _steps(z, bias, channel, is_channel, mask, MAPPED)
        result = _tile(x, image, first, row, channel, mask, x_image, x_row)
        given = result * dt
        if SKIPS:
            result *= tl.load(skip + channel, mask=is_channel, other=0.0).to(tl.float32)
        for k in tl.static_range(T - 1 if UPWARD else 0, -1 if UPWARD else T, TURN):
            decay = tl.exp2(_row(dt, k, T)[None, :] * rate)
            fed = _row(given, k, T)[None, :] * _numbers(b, first + k, n, number, N)[:, None]
            state = decay * state + fed
            read = tl.sum(state * _numbers(c, first + k, n, number, N)[:, None], 0)[None, :]
            if SKIPS:
                read += result
            result = tl.where(row[:, None] == k, read, result)
        place_out = (
            out + (image * n + first) * d + row.to(tl.int64)[:, None] * d + channel[None, :]
        )
        tl.store(place_out, result.to(out.dtype.element_ty), mask=mask)


class Blocks(NamedTuple):
    """Sizes of a kernel."""

    tokens: int  # of a tile; chunks have several
    channels: int
    num_warps: int
    maxnreg: int | None = None  # registers of a thread

    @property
    def launch(self) -> dict[str, int | None]:
        return {"num_warps": self.num_warps, "maxnreg": self.maxnreg}


# Two channels a thread share what is read of b and c.
END = OUTPUT = GRADIENT = Blocks(8, 64, 1, 168)
STAGES = 2  # of its loop over the numbers of a state
LAID = 64  # tokens
CARRY = (128, 2, 8)  # entries of a state, warps, stages
PROGRAMS = 3072  # of 32 channels, about as many as a GPU runs at a time


class _Call(NamedTuple):
    """What the launches of one call share."""

    x: Tensor
    step: Tensor
    bias: Tensor | None
    rates: Tensor  # (s, d), float32
    reverse: bool

    @property
    def chunks(self) -> tuple[int, int]:
        """Chunks of an image, and tiles of a chunk, of as many tokens as the gradients'."""
        images, n, d = self.x.shape
        total, parts = _ceil(n, GRADIENT.tokens), _ceil(d, 32)
        tiles = min(total, max(1, images * total * parts // PROGRAMS))
        return _ceil(total, tiles), tiles

    def grid(self, blocks: Blocks) -> tuple[int, int]:
        return self.x.shape[0] * self.chunks[0], _ceil(self.x.shape[2], blocks.channels)

    def sizes(self, blocks: Blocks) -> tuple[int, ...]:
        """Of what walks over tokens: numbers of a state, tiles of one of the gradients', tiles."""
        states, tiles = self.rates.shape[0], GRADIENT.tokens // blocks.tokens
        return states, _power_of_2(states), tiles, *blocks[:2]

    def new(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float32, device=self.x.device)


def _strides(*operands: Tensor) -> tuple[int, ...]:
    return tuple(stride for z in operands for stride in z.stride()[:2])


def _strided(z: Tensor) -> Tensor:
    return z if z.stride(-1) == 1 or z.shape[-1] == 1 else z.contiguous()


def _call(x: Tensor, step: Tensor, bias: Tensor | None, rates: Tensor, reverse: bool) -> _Call:
    return _Call(_strided(x), _strided(step), bias, rates.t().contiguous().float(), reverse)


def _laid(call: _Call, b: Tensor, c: Tensor, has_lines: bool) -> tuple[Tensor, Tensor]:
    """Both in float32: (2, images, n, s) and, where asked for, (2, images, s, tiles of n)."""
    (images, n, states), tile = b.shape, GRADIENT.tokens
    b, c, length = _strided(b), _strided(c), _ceil(n, tile) * tile
    rows = call.new(2, images, n, states)
    lines = call.new(2, images, states, length if has_lines else 0)
    launch_kernel(_selective_lay_kernel, (images * _ceil(length, LAID),),
        b, c, rows, lines, n, length, *_strides(b, c), has_lines, states, _power_of_2(states),
        LAID, num_warps=4,
    )  # fmt: skip
    return rows, lines


def _states(call: _Call, x: Tensor, taken: Tensor, adjoint: bool) -> Tensor:
    """The states that enter each chunk, (images, chunks, s, d), which kernels may change."""
    images, n, d = call.x.shape
    states, (chunks, tiles) = call.rates.shape[0], call.chunks
    found = call.new(images, chunks, states, d)
    if chunks == 1:
        return found.zero_() if tiles > 1 else found  # which nothing reads
    is_upward, totals = call.reverse != adjoint, call.new(images, chunks, d)
    launch_kernel(_selective_end_kernel, call.grid(END),
        x, call.step, x if call.bias is None else call.bias, call.rates, taken, found, totals,
        n, d, chunks, tiles, *_strides(x, call.step), adjoint, is_upward, call.bias is not None,
        *call.sizes(END), **END.launch,
    )  # fmt: skip
    entries, warps, stages = CARRY
    launch_kernel(_selective_carry_kernel, (images, _ceil(states * d, entries)),
        found, totals, call.rates, chunks, states * d, d, is_upward, entries, stages,
        num_warps=warps,
    )  # fmt: skip
    return found


def _tiles(n: int) -> int:
    """The tiles of an image whose states before them are stored: none of a single one."""
    tiles = _ceil(n, GRADIENT.tokens)
    return tiles if tiles > 1 else 0


_OPERANDS = "Tensor x, Tensor step, Tensor rates, Tensor b, Tensor c, Tensor? bias, Tensor? skip"


@launched("selective_scan_kernels", f"({_OPERANDS}, bool reverse, bool save) -> (Tensor, Tensor)")
def scan_forward(
    x: Tensor, step: Tensor, rates: Tensor, b: Tensor, c: Tensor, bias: Tensor | None,
    skip: Tensor | None, reverse: bool, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The scan, with what may surround it.

    Args:
        x: (b, n, d), like the others in float32 or half precision.
        step: (b, n, d): the step sizes, or, with ``bias``, softplus(step + bias) are.
        rates: (d, s).
        b: (b, n, s).
        c: (b, n, s).
        bias: (d,), or None.
        skip: (d,), by which ``x`` is added to the outputs, or None.
        reverse: Whether the last token is scanned first.
        save: Whether the states are needed for a backward.

    Returns:
        (b, n, d) in the dtype of ``x``, and the states before each tile.
    """
    bias, skip = (z if z is None else z.contiguous() for z in (bias, skip))
    call = _call(x, step, bias, rates, reverse)
    (images, n, d), states = x.shape, rates.shape[1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    starts = call.new(images, _tiles(n) if save else 0, states, d)
    if out.numel() == 0:
        return out, starts
    b, c = _laid(call, b, c, False)[0]
    entering, (chunks, tiles) = _states(call, call.x, b, False), call.chunks
    launch_kernel(_selective_output_kernel, call.grid(OUTPUT),
        call.x, call.step, x if bias is None else bias, call.rates, b, c,
        x if skip is None else skip, entering, starts, out, n, d, chunks, tiles,
        *_strides(call.x, call.step), chunks > 1, save and chunks * tiles > 1, reverse,
        bias is not None, skip is not None, *call.sizes(OUTPUT), **OUTPUT.launch,
    )  # fmt: skip
    return out, starts


@scan_forward.register_fake
def _(x: Tensor, step: Tensor, rates: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    images, n, d = x.shape
    shape = images, _tiles(n) if options[-1] else 0, rates.shape[1], d
    return x.new_empty(x.shape), x.new_empty(shape, dtype=torch.float32)


@launched(
    "selective_scan_kernels_backward",
    f"(Tensor grad, Tensor starts, {_OPERANDS}, bool reverse) -> Tensor[]",
)
def scan_backward(
    grad: Tensor, starts: Tensor, x: Tensor, step: Tensor, rates: Tensor, b: Tensor, c: Tensor,
    bias: Tensor | None, skip: Tensor | None, reverse: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the operands that there are, in their dtypes."""
    bias, skip = (z if z is None else z.contiguous() for z in (bias, skip))
    call = _call(x, step, bias, rates, reverse)
    (_, n, d), states, grad = x.shape, rates.shape[1], _strided(grad)
    outs = [torch.empty(z.shape, dtype=z.dtype, device=z.device) for z in (x, step)]
    if x.numel() == 0:
        return outs + [torch.zeros_like(z) for z in (rates, b, c, bias, skip) if z is not None]
    laid, lines = _laid(call, b, c, True)
    later, (chunks, tiles), (rows, parts) = (
        _states(call, grad, laid[1], True), call.chunks, call.grid(GRADIENT),
    )  # fmt: skip
    of_rates, shared = call.new(rows, states + 2, d), call.new(parts, *lines.shape)
    launch_kernel(_selective_gradient_kernel, (rows, parts),
        grad, call.x, call.step, x if bias is None else bias, call.rates, *lines,
        x if skip is None else skip, starts, later, *outs, of_rates, shared,
        n, d, states, chunks, tiles, lines[0].numel(), *_strides(grad, call.x, call.step),
        chunks * tiles > 1, reverse, bias is not None, skip is not None, STAGES, *GRADIENT[:2],
        **GRADIENT.launch,
    )  # fmt: skip
    of_rates, of_bias, of_skip = column_sum(of_rates).split([states, 1, 1])
    outs.append(of_rates.t().to(rates.dtype).contiguous())
    for z, like in zip(column_sum(shared), (b, c), strict=True):
        outs.append(torch.empty(like.shape, dtype=like.dtype, device=z.device))
        outs[-1].copy_(z.transpose(1, 2)[:, :n])
    for z, like in ((of_bias, bias), (of_skip, skip)):
        if like is not None:
            outs.append(z[0].to(like.dtype, copy=True))
    return outs


@scan_backward.register_fake
def _(grad: Tensor, starts: Tensor, *operands: Any) -> list[Tensor]:
    return [z.new_empty(z.shape) for z in operands[:-1] if z is not None]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    *operands, ctx.reverse, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *operands)


def _gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    starts, *operands = ctx.saved_tensors
    found = iter(scan_backward(grad, starts, *operands, ctx.reverse))
    return *(None if z is None else next(found) for z in operands), None, None


scan_forward.register_autograd(_gradients, setup_context=_setup)


def selective_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """See ``attnzoo.ops.selective_scan``; on a GPU."""
    return scan_by_kernels(x, dt, a, b, c, None, None, False)


def scan_by_kernels(
    x: Tensor, step: Tensor, rates: Tensor, b: Tensor, c: Tensor, bias: Tensor | None,
    skip: Tensor | None, reverse: bool,
) -> Tensor:  # fmt: skip
    """See ``scan_forward``."""
    operands = x, step, rates, b, c, bias, skip
    save = torch.is_grad_enabled() and any(z is not None and z.requires_grad for z in operands)
    return scan_forward(*operands, reverse, save)[0]
