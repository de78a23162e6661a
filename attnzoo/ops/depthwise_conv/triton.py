"""The 3x3, 5x5 and 7x7 depthwise convolutions on tokens, forward and backward."""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.ops.depthwise_conv.torch import widened
from attnzoo.ops.precision import operand_dtype
from attnzoo.ops.triton_common import _ceil, _rows, launch_kernel, launched
from attnzoo.ops.triton_replay import replayed


@triton.jit
def _shifted(image, h, w, column, height, width, c, row_stride, is_column):
    """Rows ``h`` of the image at columns w - 1, w, w + 1; 0 outside."""
    here = h + tl.zeros_like(w)  # the interpreter loses the type of a scalar mask
    is_h = (here >= 0) & (here < height)
    line = image + h.to(tl.int64) * width * row_stride + column[None, :]
    left = tl.load(
        line + (w - 1)[:, None] * row_stride,
        mask=((w > 0) & (w <= width) & is_h)[:, None] & is_column,
        other=0.0,
    )
    middle = tl.load(
        line + w[:, None] * row_stride, mask=((w < width) & is_h)[:, None] & is_column, other=0.0
    )
    right = tl.load(
        line + (w + 1)[:, None] * row_stride,
        mask=((w + 1 < width) & is_h)[:, None] & is_column,
        other=0.0,
    )
    return left.to(tl.float32), middle.to(tl.float32), right.to(tl.float32)


@triton.jit
def _stencil_kernel(
    x, weight, bias, added, out, height, width, c, kernels, x_row, strips, ROWS: tl.constexpr,
    W: tl.constexpr, C: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    FLIP: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // strips).to(tl.int64)
    first = (tl.program_id(0) % strips) * ROWS
    w = tl.program_id(1) * W + tl.arange(0, W)
    column = tl.program_id(2) * C + tl.arange(0, C)
    is_column = (column < c)[None, :]
    tap = weight + column % kernels * 9
    is_tap = column < c
    # The transposed stencil is the stencil turned by half a turn.
    o: tl.constexpr = 8 if FLIP else 0
    s: tl.constexpr = -1 if FLIP else 1
    k00 = tl.load(tap + o, mask=is_tap, other=0.0).to(tl.float32)[None, :]
    k01 = tl.load(tap + o + s, mask=is_tap, other=0.0).to(tl.float32)[None, :]
    k02 = tl.load(tap + o + 2 * s, mask=is_tap, other=0.0).to(tl.float32)[None, :]
    k10 = tl.load(tap + o + 3 * s, mask=is_tap, other=0.0).to(tl.float32)[None, :]
    k11 = tl.load(tap + 4, mask=is_tap, other=0.0).to(tl.float32)[None, :]
    k12 = tl.load(tap + o + 5 * s, mask=is_tap, other=0.0).to(tl.float32)[None, :]
    k20 = tl.load(tap + o + 6 * s, mask=is_tap, other=0.0).to(tl.float32)[None, :]
    k21 = tl.load(tap + o + 7 * s, mask=is_tap, other=0.0).to(tl.float32)[None, :]
    k22 = tl.load(tap + o + 8 * s, mask=is_tap, other=0.0).to(tl.float32)[None, :]
    image = x + sample * height * width * x_row
    a0, a1, a2 = _shifted(image, first - 1, w, column, height, width, c, x_row, is_column)
    b0, b1, b2 = _shifted(image, first, w, column, height, width, c, x_row, is_column)
    for turn in range(ROWS):
        h = first + turn
        c0, c1, c2 = _shifted(image, h + 1, w, column, height, width, c, x_row, is_column)
        total = a0 * k00 + a1 * k01 + a2 * k02 + b0 * k10 + b1 * k11 + b2 * k12
        total += c0 * k20 + c1 * k21 + c2 * k22
        if BIAS:
            here = bias + column % kernels
            total += tl.load(here, mask=is_tap, other=0.0).to(tl.float32)[None, :]
        place = ((sample * height + h) * width + w)[:, None] * c + column[None, :]
        here = h + tl.zeros_like(w)
        mask = ((w < width) & (here < height))[:, None] & is_column
        if ADD:
            total += tl.load(added + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)
        a0, a1, a2 = b0, b1, b2
        b0, b1, b2 = c0, c1, c2


@triton.jit
def _stencil_weight_kernel(
    x, grad, partial, height, width, c, x_row, g_row, strips, blocks_w, ROWS: tl.constexpr,
    W: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // strips).to(tl.int64)
    first = (tl.program_id(0) % strips) * ROWS
    w = tl.program_id(1) * W + tl.arange(0, W)
    column = tl.program_id(2) * C + tl.arange(0, C)
    is_column = (column < c)[None, :]
    image = x + sample * height * width * x_row
    a0, a1, a2 = _shifted(image, first - 1, w, column, height, width, c, x_row, is_column)
    b0, b1, b2 = _shifted(image, first, w, column, height, width, c, x_row, is_column)
    t00 = tl.zeros((W, C), tl.float32)
    t01 = tl.zeros((W, C), tl.float32)
    t02 = tl.zeros((W, C), tl.float32)
    t10 = tl.zeros((W, C), tl.float32)
    t11 = tl.zeros((W, C), tl.float32)
    t12 = tl.zeros((W, C), tl.float32)
    t20 = tl.zeros((W, C), tl.float32)
    t21 = tl.zeros((W, C), tl.float32)
    t22 = tl.zeros((W, C), tl.float32)
    tb = tl.zeros((W, C), tl.float32)
    for turn in range(ROWS):
        h = first + turn
        c0, c1, c2 = _shifted(image, h + 1, w, column, height, width, c, x_row, is_column)
        place = ((sample * height + h) * width + w)[:, None] * g_row + column[None, :]
        here = h + tl.zeros_like(w)
        mask = ((w < width) & (here < height))[:, None] & is_column
        g = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
        t00 += g * a0
        t01 += g * a1
        t02 += g * a2
        t10 += g * b0
        t11 += g * b1
        t12 += g * b2
        t20 += g * c0
        t21 += g * c1
        t22 += g * c2
        tb += g
        a0, a1, a2 = b0, b1, b2
        b0, b1, b2 = c0, c1, c2
    line = partial + (tl.program_id(0).to(tl.int64) * blocks_w + tl.program_id(1)) * 10 * c
    line += column
    is_c = column < c
    tl.store(line, tl.sum(t00, 0), mask=is_c)
    tl.store(line + c, tl.sum(t01, 0), mask=is_c)
    tl.store(line + 2 * c, tl.sum(t02, 0), mask=is_c)
    tl.store(line + 3 * c, tl.sum(t10, 0), mask=is_c)
    tl.store(line + 4 * c, tl.sum(t11, 0), mask=is_c)
    tl.store(line + 5 * c, tl.sum(t12, 0), mask=is_c)
    tl.store(line + 6 * c, tl.sum(t20, 0), mask=is_c)
    tl.store(line + 7 * c, tl.sum(t21, 0), mask=is_c)
    tl.store(line + 8 * c, tl.sum(t22, 0), mask=is_c)
    tl.store(line + 9 * c, tl.sum(tb, 0), mask=is_c)


@triton.jit
def _gelu(z):
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def _run(
    image, h, w, column, height, width, row_stride, is_column, first: tl.constexpr,
    stop: tl.constexpr,
):  # fmt: skip
    """Row ``h`` of the image at columns w + first to w + stop - 1, each by itself; 0 outside."""
    line = image + h.to(tl.int64) * width * row_stride
    here = h + tl.zeros_like(column)  # the interpreter loses the type of a scalar mask
    is_h = (here >= 0) & (here < height) & is_column
    found = ()
    for i in tl.static_range(first, stop):
        at = w + i + tl.zeros_like(column)
        mask = is_h & (at >= 0) & (at < width)
        z = tl.load(line + (w + i) * row_stride + column, mask=mask, other=0.0)
        found += (z.to(tl.float32),)
    return found


@triton.jit
def _wide_stencil_kernel(
    x, taps, bias, added, gate, out, raw, height, width, c, kernels, x_row, gate_row, out_row,
    strips, ROWS: tl.constexpr, W: tl.constexpr, C: tl.constexpr, BIAS: tl.constexpr,
    ADD: tl.constexpr, GATE: tl.constexpr, SAVE: tl.constexpr, FLIP: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """SIZE x SIZE, of ``taps``, (SIZE ** 2, c) in float32.

    A thread has one channel and walks down W columns: of a pixel that it loads it makes SIZE ** 2
    products. Each row of pixels adds to the SIZE rows of outputs around it.
    """
    R: tl.constexpr = SIZE // 2
    sample = (tl.program_id(0) // strips).to(tl.int64)
    first = (tl.program_id(0) % strips) * ROWS
    w = tl.program_id(1) * W
    column = tl.program_id(2) * C + tl.arange(0, C)
    is_column = column < c
    # The transposed stencil is the stencil turned by half a turn.
    o: tl.constexpr = SIZE * SIZE - 1 if FLIP else 0
    s: tl.constexpr = -1 if FLIP else 1
    k = ()
    for i in tl.static_range(SIZE * SIZE):
        k += (tl.load(taps + (o + s * i) * c + column, mask=is_column, other=0.0),)
    start = tl.zeros((C,), tl.float32)
    if BIAS:
        start += tl.load(bias + column % kernels, mask=is_column, other=0.0).to(tl.float32)
    sums = ()
    for _ in tl.static_range((SIZE - 1) * W):
        sums += (start,)
    image = x + sample * height * width * x_row
    for turn in range(ROWS + SIZE - 1):
        h = first + turn - R
        near = _run(image, h, w, column, height, width, x_row, is_column, -R, W + R)
        # Of the outputs above, which this row completes, down to those below, which it begins.
        met = ()
        for i in tl.static_range(SIZE):
            for j in tl.static_range(W):
                total = start
                if i < SIZE - 1:
                    total = sums[i * W + j]
                for t in tl.static_range(SIZE):
                    total += near[j + t] * k[SIZE * (SIZE - 1 - i) + t]
                met += (total,)
        done = h - R
        here = done + tl.zeros_like(column)
        is_done = (here >= first) & (here < height) & is_column
        for j in tl.static_range(W):
            mask = is_done & (w + j + tl.zeros_like(column) < width)
            place = (sample * height + done) * width + w + j
            total = met[j]
            if GATE:
                if SAVE:
                    tl.store(raw + place * c + column, total.to(raw.dtype.element_ty), mask=mask)
                z = tl.load(gate + place * gate_row + column, mask=mask, other=0.0)
                total *= _gelu(z.to(tl.float32))
            if ADD:
                total += tl.load(added + place * c + column, mask=mask, other=0.0).to(tl.float32)
            tl.store(out + place * out_row + column, total.to(out.dtype.element_ty), mask=mask)
        sums = met[W:]


@triton.jit
def _wide_stencil_weight_kernel(
    x, grad, partial, height, width, c, x_row, g_row, strips, blocks_w, ROWS: tl.constexpr,
    W: tl.constexpr, C: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """SIZE x SIZE. Each row of pixels meets the SIZE rows of gradients around it."""
    R: tl.constexpr = SIZE // 2
    sample = (tl.program_id(0) // strips).to(tl.int64)
    first = (tl.program_id(0) % strips) * ROWS
    last = tl.minimum(first + ROWS, height)
    w = tl.program_id(1) * W
    column = tl.program_id(2) * C + tl.arange(0, C)
    is_column = column < c
    image = x + sample * height * width * x_row
    slopes = grad + sample * height * width * g_row
    zero = tl.zeros((C,), tl.float32)
    above = ()
    for _ in tl.static_range((SIZE - 1) * W):
        above += (zero,)
    sums = ()
    for _ in tl.static_range(SIZE * SIZE + 1):
        sums += (zero,)
    for turn in range(ROWS + SIZE - 1):
        h = first + turn - R
        near = _run(image, h, w, column, height, width, x_row, is_column, -R, W + R)
        g = _run(slopes, h + R, w, column, last, width, g_row, is_column, 0, W) + above
        found = ()
        for i in tl.static_range(SIZE * SIZE + 1):
            total = sums[i]
            for j in tl.static_range(W):
                if i < SIZE * SIZE:
                    total += g[i // SIZE * W + j] * near[i % SIZE + j]
                else:
                    total += g[j]
            found += (total,)
        sums = found
        above = g[: (SIZE - 1) * W]
    part = tl.program_id(0).to(tl.int64) * blocks_w + tl.program_id(1)
    place = partial + part * (SIZE * SIZE + 1) * c + column
    for i in tl.static_range(SIZE * SIZE + 1):
        tl.store(place + i * c, sums[i], mask=is_column)


@triton.jit
def _gate_gradient_kernel(
    grad, raw, gate, of_raw, of_gate, rows, c, grad_row, gate_row, of_row, R: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """Of raw * GELU(gate)."""
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    column = (tl.program_id(1) * C + tl.arange(0, C))[None, :]
    mask = (row < rows) & (column < c)
    g = tl.load(grad + row * grad_row + column, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(raw + row * c + column, mask=mask, other=0.0).to(tl.float32)
    z = tl.load(gate + row * gate_row + column, mask=mask, other=0.0).to(tl.float32)
    share = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
    tl.store(of_raw + row * c + column, (g * z * share).to(of_raw.dtype.element_ty), mask=mask)
    g *= y * (share + z * 0.3989422804014327 * tl.exp(-0.5 * z * z))
    tl.store(of_gate + row * of_row + column, g.to(of_gate.dtype.element_ty), mask=mask)


@triton.jit
def _tap_sums_kernel(
    partial, weight, bias, rows, c, kernels, shared, taps, R: tl.constexpr, K: tl.constexpr
):
    """Adds up the parts of one tap, or, behind the last, of the bias, over all that share it."""
    tap, kernel = tl.program_id(0), tl.program_id(1) * K + tl.arange(0, K)
    mask = kernel < kernels
    total = tl.zeros((R, K), tl.float32)
    for start in range(0, rows, R):
        row = start + tl.arange(0, R)
        place = ((row // shared).to(tl.int64) * (taps + 1) + tap) * c + row % shared * kernels
        place = partial + place[:, None] + kernel[None, :]
        total += tl.load(place, mask=(row < rows)[:, None] & mask[None, :], other=0.0)
    total = tl.sum(total, 0)
    place = weight + kernel * taps + tap
    tl.store(place, total.to(weight.dtype.element_ty), mask=mask & (tap < taps))
    tl.store(bias + kernel, total.to(bias.dtype.element_ty), mask=mask & (tap == taps))


def tap_sums(partial: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a depthwise convolution's weight, ``like``, and bias, in its type.

    Args:
        partial: (parts, taps + 1, c), the last of the bias; c a multiple of ``like``'s channels.
        like: (kernels, 1, rows, columns).
    """
    parts, taps, c = partial.shape
    kernels = len(like)
    weight = torch.empty(like.shape, dtype=like.dtype, device=partial.device)
    bias = torch.empty(kernels, dtype=like.dtype, device=partial.device)
    if kernels:
        launch_kernel(_tap_sums_kernel, (taps, _ceil(kernels, 8)),
            partial, weight, bias, parts * (c // kernels), c, kernels, c // kernels, taps - 1, 256,
            8, num_warps=4,
        )  # fmt: skip
    return weight, bias


# Rows a program walks down, pixels and channels of its tile, warps; wide ones by their size.
STENCIL_BLOCK = (8, 32, 64, 4)
STENCIL_WEIGHT_BLOCK = (16, 4, 32, 1)
WIDE_STENCIL_BLOCK = {3: (8, 4, 64, 1), 5: (8, 4, 64, 1), 7: (16, 4, 32, 1)}
WIDE_STENCIL_WEIGHT_BLOCK = (16, 8, 32, 1)
GATE_BLOCK = (8, 256)  # tokens and channels


def stencil(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: tuple[int, int],
    added: Tensor | None = None,
    is_transposed: bool = False,
) -> Tensor:
    """Square depthwise convolution of tokens, with zero padding.

    Args:
        x: (b, h * w, c).
        weight: (kernels, 1, 3, 3) to (kernels, 1, 7, 7), as in ``depthwise_conv``.
        bias: (kernels,) or None.
        grid: (h, w).
        added: (b, h * w, c), added to the result, or None.
        is_transposed: Applies the adjoint, for the gradient of x.

    Returns:
        (b, h * w, c).
    """
    if weight.shape[-1] > 3:
        return wide_stencil(x, weight, bias, grid, added, is_transposed)
    x, spacing = _rows(x)
    b, n, c = x.shape
    out = torch.empty(b, n, c, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    added = out if added is None else added.contiguous()
    rows, w, channels, warps = STENCIL_BLOCK
    strips, weight = _ceil(grid[0], rows), weight.contiguous()
    launch_kernel(_stencil_kernel, (b * strips, _ceil(grid[1], w), _ceil(c, channels)),
        x, weight, weight if bias is None else bias, added, out, *grid, c, len(weight), spacing,
        strips, rows, w, channels, bias is not None, added is not out, is_transposed,
        num_warps=warps,
    )  # fmt: skip
    return out


def wide_stencil(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: tuple[int, int],
    added: Tensor | None = None,
    is_transposed: bool = False,
    gate: Tensor | None = None,
    raw: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``stencil`` of 3x3, 5x5 and 7x7 by one kernel.

    Args:
        x: As there, like ``weight``, ``bias``, ``grid``, ``added`` and ``is_transposed``.
        gate: (b, h * w, c), whose GELU multiplies the convolution, or None.
        raw: Where the convolution itself is to be written, (b, h * w, c), contiguous; or None.
        out: Where the result is to be written, with equally spaced rows; or None.
    """
    x, spacing = _rows(x)
    b, n, c = x.shape
    out = torch.empty(b, n, c, dtype=x.dtype, device=x.device) if out is None else out
    if not out.numel():
        return out
    kernels, size = len(weight), weight.shape[-1]
    # Of neighboring channels together.
    taps = weight.flatten(1).t().unsqueeze(1).expand(size**2, c // kernels, kernels)
    taps = taps.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    other = out if added is None else added.contiguous()
    factor, gate_spacing = (out, 0) if gate is None else _rows(gate)
    rows, w, channels, warps = WIDE_STENCIL_BLOCK[size]
    strips = _ceil(grid[0], rows)
    launch_kernel(_wide_stencil_kernel, (b * strips, _ceil(grid[1], w), _ceil(c, channels)),
        x, taps, taps if bias is None else bias, other, factor, out, out if raw is None else raw,
        *grid, c, kernels, spacing, gate_spacing, out.stride(1), strips, rows, w, channels,
        bias is not None, added is not None, gate is not None, raw is not None, is_transposed,
        size, num_warps=warps,
    )  # fmt: skip
    return out


def stencil_weight_gradient(
    x: Tensor, grad: Tensor, grid: tuple[int, int], weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of ``weight`` of ``stencil`` and of the bias, in its type."""
    size = weight.shape[-1]
    (x, spacing), (grad, grad_spacing) = _rows(x), _rows(grad)
    b, _, c = x.shape
    kernel, sizes = _stencil_weight_kernel, ()
    rows, w, channels, warps = STENCIL_WEIGHT_BLOCK
    if size > 3:
        kernel, sizes = _wide_stencil_weight_kernel, (size,)
        rows, w, channels, warps = WIDE_STENCIL_WEIGHT_BLOCK
    strips, blocks = _ceil(grid[0], rows), _ceil(grid[1], w)
    shape = b * strips * blocks, size**2 + 1, c
    partial = torch.empty(shape, dtype=torch.float32, device=x.device)
    if partial.numel():
        launch_kernel(kernel, (b * strips, blocks, _ceil(c, channels)),
            x, grad, partial, *grid, c, spacing, grad_spacing, strips, blocks, rows, w, channels,
            *sizes, num_warps=warps,
        )  # fmt: skip
    return tap_sums(partial, weight)


@launched("stencil")
def _stencil(
    x: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None, height: int, width: int
) -> Tensor:
    return stencil(x, weight, bias, (height, width), added)


@_stencil.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None, height: int, width: int
) -> Tensor:
    return x.new_empty(x.shape)


@launched("stencil_backward")
def _stencil_backward(
    grad: Tensor, x: Tensor, weight: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    grid = height, width
    grad_x = stencil(grad, weight, None, grid, is_transposed=True)
    return grad_x, *stencil_weight_gradient(x, grad, grid, weight)


@_stencil_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(len(weight))


def _stencil_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, added, *grid = inputs
    ctx.grid, ctx.has_bias, ctx.has_added = grid, bias is not None, added is not None
    ctx.save_for_backward(x, weight)


def _stencil_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = _stencil_backward(grad, x, weight, *ctx.grid)
    return (
        grad_x,
        grad_weight,
        grad_bias if ctx.has_bias else None,
        grad if ctx.has_added else None,
        None,
        None,
    )


_stencil.register_inference(replayed(_stencil.function))
_stencil.register_autograd(_stencil_gradients, setup_context=_stencil_setup)


@launched(
    "gated_stencil",
    "(Tensor packed, Tensor weight, Tensor? bias, int height, int width, bool save)"
    " -> (Tensor, Tensor)",
)
def _gated_stencil(
    packed: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int, save: bool
) -> tuple[Tensor, Tensor]:
    """What ``gated_depthwise_conv`` gives, and, for a backward, the convolution itself."""
    gate, x = packed.chunk(2, dim=-1)
    raw = torch.empty(x.shape if save else 0, dtype=x.dtype, device=x.device)
    out = wide_stencil(x, weight, bias, (height, width), gate=gate, raw=raw if save else None)
    return out, raw


@_gated_stencil.register_fake
def _(
    packed: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int, save: bool
) -> tuple[Tensor, Tensor]:
    shape = *packed.shape[:2], packed.shape[2] // 2
    return packed.new_empty(shape), packed.new_empty(shape if save else 0)


@launched("gated_stencil_backward")
def _gated_stencil_backward(
    grad: Tensor, raw: Tensor, packed: Tensor, weight: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    gate, x = packed.chunk(2, dim=-1)
    grads = torch.empty(packed.shape, dtype=packed.dtype, device=packed.device)
    of_gate, of_x = grads.chunk(2, dim=-1)
    of_raw = torch.empty(raw.shape, dtype=raw.dtype, device=raw.device)
    (grad, grad_row), (gate, gate_row) = _rows(grad), _rows(gate)
    b, n, c = raw.shape
    if raw.numel():
        rows, channels = GATE_BLOCK
        launch_kernel(_gate_gradient_kernel, (_ceil(b * n, rows), _ceil(c, channels)),
            grad, raw, gate, of_raw, of_gate, b * n, c, grad_row, gate_row, 2 * c, rows, channels,
            num_warps=4,
        )  # fmt: skip
    wide_stencil(of_raw, weight, None, (height, width), is_transposed=True, out=of_x)
    return grads, *stencil_weight_gradient(x, of_raw, (height, width), weight)


@_gated_stencil_backward.register_fake
def _(
    grad: Tensor, raw: Tensor, packed: Tensor, weight: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    grads = packed.new_empty(packed.shape)
    return grads, weight.new_empty(weight.shape), weight.new_empty(len(weight))


def _gated_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    packed, weight, bias, *ctx.grid, _ = inputs
    ctx.has_bias = bias is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], packed, weight)


def _gated_gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    found = _gated_stencil_backward(grad, *ctx.saved_tensors, *ctx.grid)
    return *found[:2], found[2] if ctx.has_bias else None, None, None, None


_gated_stencil.register_inference(replayed(_gated_stencil.function, 1))
_gated_stencil.register_autograd(_gated_gradients, setup_context=_gated_setup)


def depthwise_conv(
    x: Tensor, grid: tuple[int, int], weight: Tensor, bias: Tensor | None,
    added: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See ``attnzoo.ops.depthwise_conv``."""
    dtype, weight = operand_dtype(x), widened(weight, max(weight.shape[2:]))
    return _stencil(x if x.dtype is dtype else x.to(dtype), weight, bias, added, *grid)


def gated_depthwise_conv(
    packed: Tensor, grid: tuple[int, int], weight: Tensor, bias: Tensor | None
) -> Tensor:
    """See ``attnzoo.ops.depthwise_conv``."""
    dtype, weight = operand_dtype(packed), widened(weight, max(weight.shape[2:]))
    packed = packed if packed.dtype is dtype else packed.to(dtype)
    operands = packed, weight, bias
    save = torch.is_grad_enabled() and any(z is not None and z.requires_grad for z in operands)
    return _gated_stencil(*operands, *grid, save)[0]
