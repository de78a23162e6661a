"""The gradients of the selective scan, chunk by chunk. See ``triton.py``."""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo.ops.selective_scan.triton_common import (
    _channels,
    _chunk,
    _descend,
    _join,
    _log2_rate,
    _steps,
    _sum_over_channels,
    _tile,
)


@triton.jit
def _selective_gradient_kernel(
    grad, x, step, bias, rates, b, c, skip, starts, later, grad_x, grad_step, of_rates, shared,
    n, d, states, chunks, tiles, of_c, g_image, g_row, x_image, x_row, step_image,
    step_row, CARRIED: tl.constexpr, REVERSE: tl.constexpr, MAPPED: tl.constexpr,
    SKIPS: tl.constexpr, STAGES: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    # later: what later chunks want of the state that this one leaves, and then its tiles of those
    # that each leaves. of_rates: parts of the gradients of the rates, of bias and of skip. shared:
    # of b and, of_c on, of c.
    image, chunk, count = _chunk(n, chunks, tiles, T)
    channel, is_channel = _channels(d, D)
    row = tl.arange(0, T)
    is_first = (row == (T - 1 if REVERSE else 0))[:, None]  # in the order of the scan
    is_last = (row == (0 if REVERSE else T - 1))[:, None]
    at = tl.program_id(0).to(tl.int64)
    later += at * states * d
    of_rates += at * (states + 2) * d
    starts += image * tl.cdiv(n, T) * states * d
    length = tl.cdiv(n, T) * T  # of the lines of b and c, with zeros at the end
    b += image * states * length
    c += image * states * length
    shared += tl.program_id(1).to(tl.int64) * 2 * of_c + image * states * length
    W: tl.constexpr = min(D, 32)
    place = tl.arange(0, W) % T + tl.where(tl.arange(0, W) < T, 0, of_c)
    is_place = tl.arange(0, W) < 2 * T
    of_bias, of_skip = tl.zeros((D,), tl.float32), tl.zeros((D,), tl.float32)
    for turn in range(0, count):
        tile = (chunk + (turn if REVERSE else count - 1 - turn)).to(tl.int64)
        first = tile * T
        mask = (first + row < n)[:, None] & is_channel[None, :]
        z = _tile(step, image, first, row, channel, mask, step_image, step_row)
        dt = _steps(z, bias, channel, is_channel, mask, MAPPED)
        given = dt * _tile(x, image, first, row, channel, mask, x_image, x_row)
        dy = _tile(grad, image, first, row, channel, mask, g_image, g_row)
        of_given, of_step = tl.zeros((T, D), tl.float32), tl.zeros((T, D), tl.float32)
        for s in tl.range(0, states, num_stages=STAGES):
            rate = tl.load(rates + s * d + channel, mask=is_channel, other=0.0)
            decay = tl.exp2(dt * _log2_rate(rate)[None, :])
            line = s * length + first
            b_row, c_row = tl.load(b + line + row)[:, None], tl.load(c + line + row)[:, None]
            fed, wanted = given * b_row, dy * c_row
            spot = later + s * d + channel
            if CARRIED:
                start = tl.load(
                    starts + (tile * states + s) * d + channel, mask=is_channel, other=0.0
                )[None, :]
                fed = tl.where(is_first, fed + decay * start, fed)
                end = tl.load(spot, mask=is_channel, other=0.0)[None, :]
                wanted = tl.where(is_last, wanted + end, wanted)
            state, before = _join(decay, fed, T, REVERSE)
            if CARRIED:
                before = tl.where(is_first, start, before)
            wanted = _descend(decay, wanted, T, not REVERSE)  # the gradient of the state
            passed = decay * wanted
            if CARRIED:
                spots = spot[None, :] + tl.zeros_like(row)[:, None]
                tl.store(spots, passed, mask=is_first & is_channel[None, :])
            of_given += wanted * b_row
            of_exponent = passed * before
            of_step += of_exponent * rate[None, :]
            spot = of_rates + s * d + channel
            part = tl.load(spot, mask=is_channel & (turn > 0), other=0.0)
            tl.store(spot, part + tl.sum(of_exponent * dt, 0), mask=is_channel)
            both = tl.permute(tl.join(wanted * given, dy * state), (2, 0, 1))
            sums = _sum_over_channels(tl.reshape(both, (2 * T, D)), 2 * T, D)
            tl.store(shared + line + place, sums, mask=is_place)
        x_tile = _tile(x, image, first, row, channel, mask, x_image, x_row)
        of_step += of_given * x_tile
        of_x = of_given * dt
        if MAPPED:
            z = _tile(step, image, first, row, channel, mask, step_image, step_row)
            z += tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
            of_step = tl.where(mask, of_step / (1.0 + tl.exp(-z)), 0.0)
            of_bias += tl.sum(of_step, 0)
        if SKIPS:
            of_x += (
                dy * tl.load(skip + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
            )
            of_skip += tl.sum(dy * x_tile, 0)
        spot = (image * n + first) * d + row[:, None] * d + channel[None, :]
        tl.store(grad_x + spot, of_x.to(grad_x.dtype.element_ty), mask=mask)
        tl.store(grad_step + spot, of_step.to(grad_step.dtype.element_ty), mask=mask)
        tl.debug_barrier()  # the next tile reads what this one wrote
    of_rates += states * d + channel
    tl.store(of_rates, of_bias, mask=is_channel)
    tl.store(of_rates + d, of_skip, mask=is_channel)
