"""The gradients of the selective scan, chunk by chunk. See ``triton.py``."""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo.ops.selective_scan.triton_common import (
    _chunk,
    _join,
    _log2_rate,
    _steps,
    _sum_over_channels,
    _tile,
)


@triton.jit
def _selective_gradient_kernel(
    grad, x, step, bias, rates, b, c, skip, starts, later, grad_x, grad_step, shared, surround,
    n, d, states, chunks, of_c, g_image, g_row, x_image, x_row, step_image, step_row,
    CARRIED: tl.constexpr, REVERSE: tl.constexpr, MAPPED: tl.constexpr, SKIPS: tl.constexpr,
    T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    # later: what later chunks want of the state that this one leaves; the gradient of the rates
    # by this chunk takes its place. shared: parts of the gradients of b and, of_c on, of c.
    # surround: parts of those of bias and skip.
    image, first, row, is_token = _chunk(n, chunks, T)
    channel = tl.max_contiguous(tl.program_id(1) * D + tl.arange(0, D), 1)
    is_channel = channel < d
    mask = is_token[:, None] & is_channel[None, :]
    z = _tile(step, image, first, row, channel, mask, step_image, step_row)
    dt = _steps(z, bias, channel, is_channel, mask, MAPPED)
    given = dt * _tile(x, image, first, row, channel, mask, x_image, x_row)
    dy = _tile(grad, image, first, row, channel, mask, g_image, g_row)
    of_given, of_step = tl.zeros((T, D), tl.float32), tl.zeros((T, D), tl.float32)
    at = tl.program_id(0).to(tl.int64)
    starts += at * states * d
    later += at * states * d
    lines = image * states * n + first
    b += lines
    c += lines
    shared += tl.program_id(1).to(tl.int64) * 2 * of_c + lines
    is_first = (row == (T - 1 if REVERSE else 0))[:, None]  # in the order of the scan
    is_last = (row == (0 if REVERSE else T - 1))[:, None]
    W: tl.constexpr = min(D, 32)
    place = tl.arange(0, W) % T
    is_place = (tl.arange(0, W) < T) & (first + place < n)
    for s in range(0, states):
        rate = tl.load(rates + s * d + channel, mask=is_channel, other=0.0)
        decay = tl.exp2(dt * _log2_rate(rate)[None, :])
        b_row = tl.load(b + row, mask=is_token, other=0.0)[:, None]
        c_row = tl.load(c + row, mask=is_token, other=0.0)[:, None]
        fed, wanted = given * b_row, dy * c_row
        if CARRIED:
            start = tl.load(starts + channel, mask=is_channel, other=0.0)[None, :]
            fed = tl.where(is_first, fed + decay * start, fed)
            state, before = _join(decay, fed, T, REVERSE)
            before = tl.where(is_first, start, before)
            end = tl.load(later + channel, mask=is_channel, other=0.0)[None, :]
            wanted = tl.where(is_last, wanted + end, wanted)
        else:
            state, before = _join(decay, fed, T, REVERSE)
        passed, after = _join(decay, decay * wanted, T, not REVERSE)
        wanted += after  # the gradient of the state
        of_given += wanted * b_row
        of_exponent = passed * before
        of_step += of_exponent * rate[None, :]
        tl.store(later + channel, tl.sum(of_exponent * dt, 0), mask=is_channel)
        sums = _sum_over_channels(wanted * given, T, D)
        tl.store(shared + place, sums, mask=is_place)
        sums = _sum_over_channels(dy * state, T, D)
        tl.store(shared + of_c + place, sums, mask=is_place)
        starts += d
        later += d
        b += n
        c += n
        shared += n
    x_tile = _tile(x, image, first, row, channel, mask, x_image, x_row)
    of_step += of_given * x_tile
    of_x = of_given * dt
    surround += at * 2 * d + channel
    if MAPPED:
        z = _tile(step, image, first, row, channel, mask, step_image, step_row)
        z += tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
        of_step = tl.where(mask, of_step / (1.0 + tl.exp(-z)), 0.0)
        tl.store(surround, tl.sum(of_step, 0), mask=is_channel)
    if SKIPS:
        of_x += dy * tl.load(skip + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
        tl.store(surround + d, tl.sum(dy * x_tile, 0), mask=is_channel)
    spot = (image * n + first) * d + row[:, None] * d + channel[None, :]
    tl.store(grad_x + spot, of_x.to(grad_x.dtype.element_ty), mask=mask)
    tl.store(grad_step + spot, of_step.to(grad_step.dtype.element_ty), mask=mask)
