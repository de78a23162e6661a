"""The 3x3, 5x5 and 7x7 depthwise convolutions on tokens, forward and backward."""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.errors import InvalidValue
from attnzoo.ops.depthwise_conv.torch import widened
from attnzoo.ops.precision import operand_dtype
from attnzoo.ops.triton_common import (
    _ceil,
    _is_fast,
    _power_of_2,
    _rows,
    launch_kernel,
    launched,
)
from attnzoo.ops.triton_replay import replayed


@triton.jit
def _place(c, strips, blocks_w, ROWS: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
    WARPS: tl.constexpr):  # fmt: skip
    """Which part, image and first row; the columns' first for each warp, (WARPS, 1); channels.

    Programs of a row of pixels are neighbors: they share what memory hands out at a time.
    """
    channels = tl.cdiv(c, C)
    part = tl.program_id(0) // channels
    block, strip = part % blocks_w, part // blocks_w
    w = (block * WARPS + tl.arange(0, WARPS)[:, None]) * W
    channel = (tl.program_id(0) % channels) * C + tl.arange(0, C)
    sample, first = (strip // strips).to(tl.int64), strip % strips * ROWS
    return part.to(tl.int64), sample, first, w, channel


@triton.jit
def _row(
    tile, h, w, height, width, is_column, STRIDE: tl.constexpr, FIRST: tl.constexpr,
    STOP: tl.constexpr, W: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Row ``h`` of the image at columns w + FIRST to w + STOP - 1, each by itself; 0 outside.

    Args:
        tile: Pointers to row 0 at columns w.
        EVEN: Whether columns w to w + W - 1 are all inside.
    """
    here = h + tl.zeros_like(w)  # the interpreter loses the type of a scalar mask
    is_h = (here >= 0) & (here < height) & is_column
    line = tile + h.to(tl.int64) * width * STRIDE
    found = ()
    for i in tl.static_range(FIRST, STOP):
        mask = is_h
        if i < 0:
            mask = is_h & (w + i >= 0) & (w + i < width)
        elif (i >= W) | (not EVEN):
            mask = is_h & (w + i < width)
        z = tl.load(line + i * STRIDE, mask=mask, other=0.0)
        found += (z.to(tl.float32),)
    return found


@triton.jit
def _put_row(
    tile, row, h, w, width, mask, STRIDE: tl.constexpr, W: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    line = tile + h.to(tl.int64) * width * STRIDE
    for j in tl.static_range(W):
        here = mask
        if not EVEN:
            here = mask & (w + j < width)
        tl.store(line + j * STRIDE, row[j].to(tile.dtype.element_ty), mask=here)


@triton.jit
def _put_sums(partial, sums, part, c, column, is_column, WARPS: tl.constexpr):
    """Sums of each warp of a part, (count, c): to add up those of warps here takes longer."""
    count: tl.constexpr = len(sums)
    warp = part * WARPS + tl.arange(0, WARPS)[:, None]
    line = partial + warp * count * c + column
    for i in tl.static_range(count):
        tl.store(line + i * c, sums[i], mask=is_column)


@triton.jit
def _first_rows(
    tile, h, w, height, width, is_column, STRIDE: tl.constexpr, COUNT: tl.constexpr,
    R: tl.constexpr, W: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """COUNT rows of the image from ``h`` on, with R columns on both sides."""
    found = ()
    for i in tl.static_range(COUNT):
        found += _row(tile, h + i, w, height, width, is_column, STRIDE, -R, W + R, W, EVEN)
    return found


@triton.jit
def _kernel_taps(
    weight, kernel, is_c, SIZE: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr
):  # fmt: skip
    """The taps of each channel's kernel, (1, C) each.

    A channel's taps lie side by side: loaded one by one, each would fetch all of their lines.
    """
    tap = tl.arange(0, 2**LEVELS)[None, :]
    place = weight + kernel[:, None] * (SIZE * SIZE) + tap
    z = tl.load(place, mask=is_c[:, None] & (tap < SIZE * SIZE), other=0.0)
    parts = (z.to(tl.float32),)
    for level in tl.static_range(LEVELS):
        halves = ()
        for i in tl.static_range(2**level):
            both = tl.reshape(parts[i], (C, 2, 2 ** (LEVELS - 1 - level)))
            a, b = tl.split(tl.permute(both, (0, 2, 1)))
            halves += (a, b)
        parts = halves
    taps = ()
    for i in tl.static_range(SIZE * SIZE):
        taps += (tl.reshape(parts[i], (1, C)),)
    return taps


@triton.jit
def _gelu(z):
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def _stencil_kernel(
    x, weight, bias, other, out, raw, height, width, c, kernels, strips, blocks_w,
    X_ROW: tl.constexpr, OTHER_ROW: tl.constexpr, OUT_ROW: tl.constexpr, BIAS: tl.constexpr,
    ADD: tl.constexpr, GATE: tl.constexpr, SAVE: tl.constexpr, FLIP: tl.constexpr,
    WHOLE: tl.constexpr, SIZE: tl.constexpr, LEVELS: tl.constexpr, ROWS: tl.constexpr,
    W: tl.constexpr, C: tl.constexpr, WARPS: tl.constexpr, AHEAD: tl.constexpr,
    UNROLL: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A thread walks down W columns of few channels, and keeps the rows that it needs again.

    WHOLE: Whether the number of kernels divides C, or C divides it.
    AHEAD: How many rows of the image, and of ``other``, are loaded before the row of their use.
    """
    R: tl.constexpr = SIZE // 2
    N: tl.constexpr = W + 2 * R
    _part, sample, first, w, channel = _place(c, strips, blocks_w, ROWS, W, C, WARPS)
    column = channel[None, :] + tl.zeros((WARPS, 1), tl.int32)
    is_column = (column < c) | EVEN
    pixels = sample * height * width
    image = x + pixels * X_ROW + (w * X_ROW + column)
    others = other + pixels * OTHER_ROW + (w * OTHER_ROW + column)
    place = pixels * OUT_ROW + (w * OUT_ROW + column)
    stop = tl.minimum(first + ROWS, height)
    end = tl.minimum(stop + R, height)
    rows = _first_rows(
        image, first - R, w, end, width, is_column, X_ROW, SIZE - 1 + AHEAD, R, W, EVEN
    )
    queue = ()
    if ADD | GATE:
        queue = _first_rows(others, first, w, stop, width, is_column, OTHER_ROW, AHEAD, 0, W, EVEN)
    kernel = channel % kernels
    if WHOLE:  # one division instead of one a channel
        kernel = tl.program_id(0) % tl.cdiv(c, C) * C % kernels
        kernel += tl.arange(0, C) & (tl.minimum(kernels, C) - 1)
    k = _kernel_taps(weight, kernel, (channel < c) | EVEN, SIZE, C, LEVELS)
    start = tl.zeros((WARPS, C), tl.float32)
    if BIAS:
        z = tl.load(bias + kernel, mask=(channel < c) | EVEN, other=0.0)
        start += z.to(tl.float32)[None, :]
    for turn in tl.range(0, stop - first, loop_unroll_factor=UNROLL):
        h = first + turn
        rows += _row(image, h + R + AHEAD, w, end, width, is_column, X_ROW, -R, W + R, W, EVEN)
        near = queue
        if ADD | GATE:
            near += _row(others, h + AHEAD, w, stop, width, is_column, OTHER_ROW, 0, W, W, EVEN)
        sums = ()
        for _ in tl.static_range(W):
            sums += (start,)
        for i in tl.static_range(SIZE * SIZE):
            # The transposed stencil is the stencil turned by half a turn.
            tap = k[SIZE * SIZE - 1 - i if FLIP else i]
            met = ()
            for j in tl.static_range(W):
                met += (sums[j] + rows[i // SIZE * N + i % SIZE + j] * tap,)
            sums = met
        if SAVE:
            _put_row(raw + place, sums, h, w, width, is_column, OUT_ROW, W, EVEN)
        found = ()
        for j in tl.static_range(W):
            total = sums[j]
            if GATE:
                total *= _gelu(near[j])
            if ADD:
                total += near[j]
            found += (total,)
        _put_row(out + place, found, h, w, width, is_column, OUT_ROW, W, EVEN)
        rows = rows[N:]
        if (ADD | GATE) & (AHEAD > 0):
            queue = near[W:]


@triton.jit
def _stencil_weight_kernel(
    x, grad, partial, height, width, c, strips, blocks_w, X_ROW: tl.constexpr,
    G_ROW: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, W: tl.constexpr,
    C: tl.constexpr, WARPS: tl.constexpr, AHEAD: tl.constexpr, UNROLL: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Each warp's sums of the gradient times each pixel around it, and of it, (SIZE ** 2 + 1, c).

    A thread walks down a strip of x and keeps the gradient's rows around: they are W columns, and
    x's would be R more on both sides.
    """
    R: tl.constexpr = SIZE // 2
    N: tl.constexpr = W + 2 * R
    part, sample, first, w, channel = _place(c, strips, blocks_w, ROWS, W, C, WARPS)
    column = channel[None, :] + tl.zeros((WARPS, 1), tl.int32)
    is_column = (column < c) | EVEN
    image = x + sample * height * width * X_ROW + (w * X_ROW + column)
    slopes = grad + sample * height * width * G_ROW + (w * G_ROW + column)
    stop = tl.minimum(first + ROWS, height)
    end = tl.minimum(stop + R, height)
    g = _first_rows(
        slopes, first - R, w, end, width, is_column, G_ROW, SIZE - 1 + AHEAD, 0, W, EVEN
    )
    queue = _first_rows(image, first, w, stop, width, is_column, X_ROW, AHEAD, R, W, EVEN)
    sums = ()
    for _ in tl.static_range(SIZE * SIZE + 1):
        sums += (tl.zeros((WARPS, C), tl.float32),)
    for turn in range(0, stop - first, UNROLL):
        for u in tl.static_range(UNROLL):  # of rows behind the image all is 0
            h = first + turn + u
            rows = queue
            rows += _row(image, h + AHEAD, w, stop, width, is_column, X_ROW, -R, W + R, W, EVEN)
            g += _row(slopes, h + R + AHEAD, w, end, width, is_column, G_ROW, 0, W, W, EVEN)
            found = ()
            for i in tl.static_range(SIZE * SIZE + 1):
                total = sums[i]
                for j in tl.static_range(W):
                    if i < SIZE * SIZE:
                        total += g[(SIZE - 1 - i // SIZE) * W + j] * rows[i % SIZE + j]
                    else:
                        total += g[R * W + j]
                found += (total,)
            g, sums = g[W:], found
            if AHEAD > 0:
                queue = rows[N:]
    _put_sums(partial, sums, part, c, column, is_column, WARPS)


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
        rows, shared = parts * (c // kernels), c // kernels
        high = min(256, max(16, _power_of_2(rows)))
        wide = min(64, 2048 // high)
        launch_kernel(_tap_sums_kernel, (taps, _ceil(kernels, wide)),
            partial, weight, bias, rows, c, kernels, shared, taps - 1, high, wide, num_warps=4,
        )  # fmt: skip
    return weight, bias


# Rows that a thread walks down, its pixels of a row, channels of its warp, warps side by side,
# rows loaded ahead, turns of the loop written out, and most registers; by size. Of 7x7 few
# programs run side by side, and a last round of few takes nearly as long as a full one: 0 is one
# of ``ROWS``. Rows of weights' gradients are a multiple of the turns.
STENCIL_BLOCK = {
    3: (8, 4, 64, 4, 1, 4, 96), 5: (8, 4, 64, 4, 0, 2, 168), 7: (0, 4, 32, 4, 0, 1, 168),
}  # fmt: skip
STENCIL_WEIGHT_BLOCK = {
    3: (8, 8, 32, 4, 0, 2, 128), 5: (8, 8, 32, 4, 0, 2, 128), 7: (16, 8, 32, 4, 0, 1, 168),
}  # fmt: skip
ROWS, TOGETHER = (8, 11, 16, 22, 32), 396  # programs of 168 registers on 132 processors
GATE_BLOCK = (8, 256)  # tokens and channels


def _parts(grid: tuple[int, int], b: int, c: int, block: tuple[int, ...]) -> tuple[int, ...]:
    """Strips of an image, blocks of its width, parts of all images, and programs."""
    rows, w, channels, warps, *_ = block
    strips, blocks = _ceil(grid[0], rows), _ceil(grid[1], w * warps)
    return strips, blocks, b * strips * blocks, b * strips * blocks * _ceil(c, channels)


@functools.lru_cache(maxsize=1024)
def _filled(
    block: tuple[int, ...], grid: tuple[int, int], b: int, c: int, together: int = TOGETHER,
    start: int = 1,
) -> tuple[int, ...]:  # fmt: skip
    """The block with those rows whose rounds of programs end first, if it leaves that open.

    ``together`` programs are a round, and to start takes as long as ``start`` rows.
    """

    def time(rows: int) -> int:
        programs = _parts(grid, b, c, (rows, *block[1:]))[3]
        return _ceil(programs, together) * (rows + start)

    return block if block[0] else (min(ROWS, key=time), *block[1:])


def _is_even(width: int, c: int, block: tuple[int, ...]) -> bool:
    """Whether no program reaches over the image's right edge or the channels' last."""
    _, w, channels, warps, *_ = block
    return width % (w * warps) == 0 and c % channels == 0


def _options(block: tuple[int, ...]) -> dict[str, int]:
    return {"num_warps": block[3]} | ({"maxnreg": block[6]} if _is_fast() else {})


def require_fit(x: Tensor, grid: tuple[int, int]) -> None:
    """Raises InvalidValue where kernels would read beyond the tokens."""
    if x.shape[1] != grid[0] * grid[1]:
        raise InvalidValue(f"{x.shape[1]} tokens are no grid of {grid[0]} x {grid[1]}")


def stencil(
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
    """Square depthwise convolution of tokens, with zero padding.

    Args:
        x: (b, h * w, c).
        weight: (kernels, 1, 3, 3) to (kernels, 1, 7, 7), as in ``depthwise_conv``.
        bias: (kernels,) or None.
        grid: (h, w).
        added: (b, h * w, c), added to the result, or None.
        is_transposed: Applies the adjoint, for the gradient of x.
        gate: (b, h * w, c), whose GELU multiplies the convolution, or None; not with ``added``.
        raw: Where the convolution itself is to be written, (b, h * w, c), contiguous; or None.
        out: Where the result is to be written, with equally spaced rows; or None.

    Returns:
        (b, h * w, c).
    """
    require_fit(x, grid)
    x, spacing = _rows(x)
    b, _, c = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    if not out.numel():
        return out
    weight, size = weight.contiguous(), weight.shape[-1]
    bias = None if bias is None else bias.contiguous()
    other = added if gate is None else gate
    other, other_spacing = (out, 0) if other is None else _rows(other)
    block = _filled(STENCIL_BLOCK[size], grid, b, c)
    strips, blocks, _, programs = _parts(grid, b, c, block)
    is_whole = 0 in (len(weight) % block[2], block[2] % len(weight))
    launch_kernel(_stencil_kernel, (programs,),
        x, weight, weight if bias is None else bias, other, out, out if raw is None else raw,
        *grid, c, len(weight), strips, blocks, spacing, other_spacing, out.stride(1),
        bias is not None, added is not None, gate is not None, raw is not None, is_transposed,
        is_whole, size, (size**2).bit_length(), *block[:6], _is_even(grid[1], c, block),
        **_options(block),
    )  # fmt: skip
    return out


def stencil_weight_gradient(
    x: Tensor, grad: Tensor, grid: tuple[int, int], weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of ``weight`` of ``stencil`` and of the bias, in its type."""
    size = weight.shape[-1]
    (x, spacing), (grad, grad_spacing) = _rows(x), _rows(grad)
    b, _, c = x.shape
    block = _filled(STENCIL_WEIGHT_BLOCK[size], grid, b, c)
    strips, blocks, parts, programs = _parts(grid, b, c, block)
    shape = parts * block[3], size**2 + 1, c
    partial = torch.empty(shape, dtype=torch.float32, device=x.device)
    if partial.numel():
        launch_kernel(_stencil_weight_kernel, (programs,),
            x, grad, partial, *grid, c, strips, blocks, spacing, grad_spacing, size,
            *block[:6], _is_even(grid[1], c, block), **_options(block),
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
    out = stencil(x, weight, bias, (height, width), gate=gate, raw=raw if save else None)
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
    stencil(of_raw, weight, None, (height, width), is_transposed=True, out=of_x)
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
