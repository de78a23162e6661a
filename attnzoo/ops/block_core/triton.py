"""MHLA's attention, from the packed projection and back into it.

A program finds the tokens of a part of one block and one head where the projection left them, so
that nothing is put in the order of the blocks. Each block and head has a state of d + 1 rows of d:
phi(K)^T V, then the sum of phi(K). Parts of a state are added up by what mixes the states. Few
tokens are multiplied in pairs, ``triton_pairs``.
"""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAssignmentType=false

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.ops.block_core import triton_pairs
from attnzoo.ops.block_core.token_blocks import TokenBlocks
from attnzoo.ops.block_core.triton_common import (
    GRADIENTS,
    SCHEMA,
    _convolved,
    _features,
    _new,
    _of_convolution,
    _tile,
    register,
)
from attnzoo.ops.precision import operand_dtype
from attnzoo.ops.triton_common import (
    _add_dot,
    _ceil,
    _dot,
    _is_fast,
    _precision,
    _rows,
    _width,
    column_sum,
    launch_kernel,
    launched,
    on_its_device,
)
from attnzoo.ops.triton_replay import replayed


@triton.jit
def _part(heads, blocks, splits, chunk, size, d, W: tl.constexpr):
    """Image, block and head; first place in the block and the one behind the last; channels."""
    part = tl.program_id(0) // heads
    image, block = (part // splits // blocks).to(tl.int64), part // splits % blocks
    start = part % splits * chunk
    column = tl.arange(0, W)
    stop = tl.minimum(start + chunk, size)
    return image, block, tl.program_id(0) % heads, start, stop, column, column < d


@triton.jit
def _tokens(block, place, stop, height, width, columns, tall, wide):
    """Tokens of the grid at some places in a block, and which there are."""
    row = block // columns * tall + place // wide
    column = block % columns * wide + place % wide
    return row * width + column, (place < stop) & (row < height) & (column < width)


@triton.jit
def _block_fold_kernel(
    key, value, partial, n, heads, d, spacing, height, width, blocks, columns, tall, wide, splits,
    chunk, R: tl.constexpr, W: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """A part of each state."""
    image, block, head, start, stop, column, is_column = _part(
        heads, blocks, splits, chunk, tall * wide, d, W
    )
    key += image * n * spacing + head * d
    value += image * n * spacing + head * d
    acc = tl.zeros((W, W), tl.float32)
    total = tl.zeros((R, W), tl.float32)
    for first in range(start, stop, R):
        place = first + tl.arange(0, R)
        token, is_token = _tokens(block, place, stop, height, width, columns, tall, wide)
        mask = is_token[:, None] & is_column[None, :]
        x = _features(_tile(key, token, spacing, column, mask), mask)
        v = _tile(value, token, spacing, column, mask)
        total += x
        acc = _add_dot(acc, tl.trans(x.to(v.dtype)), v, P)
    state = partial + tl.program_id(0).to(tl.int64) * (d + 1) * d + column
    tl.store(
        state[None, :] + column[:, None] * d, acc, mask=is_column[:, None] & is_column[None, :]
    )
    tl.store(state + d * d, tl.sum(total, 0), mask=is_column)


@triton.jit
def _whole(partial, block, column, mask, splits, size, image, blocks, B: tl.constexpr,
           C: tl.constexpr):  # fmt: skip
    """Some numbers of all blocks' states, of their parts."""
    place = partial + (image * blocks + block)[:, None] * splits * size + column[None, :]
    z = tl.zeros((B, C), tl.float32)
    for first in range(0, splits, 4):
        for i in tl.static_range(4):  # loads that wait for no other
            split = first + i
            z += tl.load(place + split * size, mask=mask & (split < splits), other=0.0)
    return z


@triton.jit
def _block_mix_kernel(
    partial, weight, state, result, blocks, splits, size, KEEP: tl.constexpr, B: tl.constexpr,
    C: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """States, of their parts, and what the blocks read."""
    image = tl.program_id(1).to(tl.int64)
    block, column = tl.arange(0, B), tl.program_id(0) * C + tl.arange(0, C)
    is_block = block < blocks
    mask = is_block[:, None] & (column < size)[None, :]
    z = _whole(partial, block, column, mask, splits, size, image, blocks, B, C)
    place = (image * blocks + block)[:, None] * size + column[None, :]
    if KEEP:
        tl.store(state + place, z, mask=mask)
    pair = is_block[:, None] & is_block[None, :]
    w = tl.load(weight + block[:, None] * blocks + block[None, :], mask=pair, other=0.0)
    tl.store(result + place, _dot(w.to(tl.float32), z, P), mask=mask)


@triton.jit
def _block_mix_gradient_kernel(
    partial, weight, state, of_state, of_weight, blocks, splits, size, B: tl.constexpr,
    C: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Of states, from parts of that of what the blocks read; of W a part."""
    image = tl.program_id(1).to(tl.int64)
    block, column = tl.arange(0, B), tl.program_id(0) * C + tl.arange(0, C)
    is_block = block < blocks
    mask = is_block[:, None] & (column < size)[None, :]
    g = _whole(partial, block, column, mask, splits, size, image, blocks, B, C)
    place = (image * blocks + block)[:, None] * size + column[None, :]
    z = tl.load(state + place, mask=mask, other=0.0)
    pair = is_block[:, None] & is_block[None, :]
    w = tl.load(weight + block[None, :] * blocks + block[:, None], mask=pair, other=0.0)
    tl.store(of_state + place, _dot(w.to(tl.float32), g, P), mask=mask)
    part = of_weight + (image * tl.num_programs(0) + tl.program_id(0)) * blocks * blocks
    place = block[:, None] * blocks + block[None, :]
    tl.store(part + place, _dot(g, tl.trans(z), P), mask=pair)


@triton.jit
def _block_read_kernel(
    query, state, out, n, heads, d, spacing, height, width, blocks, columns, tall, wide, splits,
    chunk, eps, ADD: tl.constexpr, R: tl.constexpr, W: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """What queries read of mixed states; with ADD what lies in ``out`` is added."""
    image, block, head, start, stop, column, is_column = _part(
        heads, blocks, splits, chunk, tall * wide, d, W
    )
    query += image * n * spacing + head * d
    out += image * n * heads * d + head * d
    state += ((image * blocks + block) * heads + head) * (d + 1) * d + column
    is_pair = is_column[:, None] & is_column[None, :]
    products = tl.load(state[None, :] + column[:, None] * d, mask=is_pair, other=0.0)
    products = products.to(query.dtype.element_ty)
    sums = tl.load(state + d * d, mask=is_column, other=0.0)
    for first in range(start, stop, R):
        place = first + tl.arange(0, R)
        token, is_token = _tokens(block, place, stop, height, width, columns, tall, wide)
        mask = is_token[:, None] & is_column[None, :]
        x = _features(_tile(query, token, spacing, column, mask), mask)
        inverse = 1 / (tl.sum(x * sums[None, :], 1) + eps)
        z = _dot(x.to(products.dtype), products, P) * inverse[:, None]
        here = out + token[:, None] * (heads * d) + column[None, :]
        if ADD:
            z += tl.load(here, mask=mask, other=0.0).to(tl.float32)
        tl.store(here, z.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _block_query_gradient_kernel(
    grad, query, state, grad_q, partial, n, heads, d, g_row, spacing, gq_row, height, width,
    blocks, columns, tall, wide, splits, chunk, eps, R: tl.constexpr, W: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """Of queries, and a part of that of mixed states."""
    image, block, head, start, stop, column, is_column = _part(
        heads, blocks, splits, chunk, tall * wide, d, W
    )
    grad += image * n * g_row + head * d
    query += image * n * spacing + head * d
    grad_q += image * n * gq_row + head * d
    state += ((image * blocks + block) * heads + head) * (d + 1) * d + column
    is_pair = is_column[:, None] & is_column[None, :]
    # Transposed: (channels of values, channels of keys).
    products = tl.load(state[:, None] + column[None, :] * d, mask=is_pair, other=0.0)
    products = products.to(query.dtype.element_ty)
    sums = tl.load(state + d * d, mask=is_column, other=0.0)
    acc = tl.zeros((W, W), tl.float32)
    total = tl.zeros((R, W), tl.float32)
    for first in range(start, stop, R):
        place = first + tl.arange(0, R)
        token, is_token = _tokens(block, place, stop, height, width, columns, tall, wide)
        mask = is_token[:, None] & is_column[None, :]
        z = _tile(query, token, spacing, column, mask).to(tl.float32)
        x = _features(z, mask)
        # Where there is no token this may be 1 / 0.
        inverse = tl.where(is_token, 1 / (tl.sum(x * sums[None, :], 1) + eps), 0.0)[:, None]
        # Features are divided, not what comes in: products read that as it was loaded.
        g = _tile(grad, token, g_row, column, mask).to(products.dtype)
        acc = _add_dot(acc, tl.trans((x * inverse).to(products.dtype)), g, P)
        slope = _dot(g, products, P) * inverse
        of_norm = -tl.sum(slope * x, 1)[:, None] * inverse
        total += x * of_norm
        slope = tl.where(z <= 0, 0.0, slope + of_norm * sums[None, :])
        here = grad_q + token[:, None] * gq_row + column[None, :]
        tl.store(here, slope.to(grad_q.dtype.element_ty), mask=mask)
    part = partial + tl.program_id(0).to(tl.int64) * (d + 1) * d + column
    tl.store(part[None, :] + column[:, None] * d, acc, mask=is_pair)
    tl.store(part + d * d, tl.sum(total, 0), mask=is_column)


@triton.jit
def _block_key_gradient_kernel(
    key, value, of_state, added, grad_k, grad_v, n, heads, d, spacing, gk_row, height, width,
    blocks, columns, tall, wide, splits, chunk, ADD: tl.constexpr, R: tl.constexpr,
    W: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Of keys and values."""
    image, block, head, start, stop, column, is_column = _part(
        heads, blocks, splits, chunk, tall * wide, d, W
    )
    key += image * n * spacing + head * d
    value += image * n * spacing + head * d
    grad_k += image * n * gk_row + head * d
    grad_v += image * n * gk_row + head * d
    added += image * n * heads * d + head * d
    of_state += ((image * blocks + block) * heads + head) * (d + 1) * d + column
    is_pair = is_column[:, None] & is_column[None, :]
    products = tl.load(of_state[None, :] + column[:, None] * d, mask=is_pair, other=0.0)
    products = products.to(key.dtype.element_ty)
    sums = tl.load(of_state + d * d, mask=is_column, other=0.0)
    for first in range(start, stop, R):
        place = first + tl.arange(0, R)
        token, is_token = _tokens(block, place, stop, height, width, columns, tall, wide)
        mask = is_token[:, None] & is_column[None, :]
        z = _tile(key, token, spacing, column, mask)
        of_value = _dot(_features(z, mask).to(products.dtype), products, P)
        if ADD:
            of_value += _tile(added, token, heads * d, column, mask).to(tl.float32)
        v = _tile(value, token, spacing, column, mask)
        slope = _dot(v, tl.trans(products), P) + sums[None, :]
        here = token[:, None] * gk_row + column[None, :]
        tl.store(grad_v + here, of_value.to(grad_v.dtype.element_ty), mask=mask)
        slope = tl.where(z <= 0, 0.0, slope)
        tl.store(grad_k + here, slope.to(grad_k.dtype.element_ty), mask=mask)


class Block(NamedTuple):
    """How a kernel is launched."""

    rows: int  # tokens of a tile
    programs: int  # at least
    warps: int
    stages: int
    registers: int | None = None  # of a thread, at most


# In half precision; in float32 registers hold fewer tokens.
BLOCKS = {
    "fold": Block(64, 264, 4, 3), "read": Block(64, 528, 4, 3),
    # Three programs side by side: all of one image of 4,096 tokens at once.
    "query_gradient": Block(32, 264, 4, 3, 168), "key_gradient": Block(64, 528, 4, 2),
}  # fmt: skip
# Numbers of a tile of all blocks' states, and warps. What W's gradient multiplies is as deep as a
# tile is wide, and every warp does all of it.
MIXED = {"mix": (2048, 4), "mix_gradient": (1024, 2)}


class _Launch(NamedTuple):
    """Parts of a block; what the kernel is told of them and of its tile; what Triton is told."""

    splits: int
    sizes: tuple[int, ...]
    tile: tuple[Any, ...]
    options: dict[str, int]


@functools.lru_cache(maxsize=1024)
def _launch(
    block: Block, dtype: torch.dtype, precision: str, b: int, heads: int, d: int,
    blocks: TokenBlocks,
) -> _Launch:  # fmt: skip
    rows, programs, warps, stages, registers = block
    width, size = _width(d), blocks.height * blocks.width
    if dtype == torch.float32:
        rows, warps, stages = (min(rows, 32), warps, 1) if width <= 32 else (16, 8, 1)
    rows = min(rows, _width(size))
    splits = max(1, min(_ceil(size, rows), _ceil(programs, max(1, b * blocks.count * heads))))
    chunk = _ceil(_ceil(size, splits), rows) * rows
    splits = _ceil(size, chunk)
    sizes = *blocks.grid, blocks.count, *blocks[1:4], splits, chunk
    options = {"num_warps": warps, "num_stages": stages}
    if registers and dtype != torch.float32 and _is_fast():
        options["maxnreg"] = registers
    return _Launch(splits, sizes, (rows, width, precision), options)


def _sizes(kernel: str, query: Tensor, heads: int, blocks: TokenBlocks) -> _Launch:
    b, _, c = query.shape
    kind = query.dtype, _precision(query.dtype)
    return _launch(BLOCKS[kernel], *kind, b, heads, c // heads, blocks)


def _mix_tile(kernel: str, blocks: int) -> tuple[tuple[int, int, str], int]:
    """Blocks and columns of a tile, and the precision of its products; warps."""
    lines, (numbers, warps) = _width(blocks), MIXED[kernel]
    return (lines, max(16, numbers // lines), _precision(torch.float32)), warps


def _run(
    is_kept: bool, qkv: Tensor, mixing: Tensor, weight: Tensor | None, bias: Tensor | None,
    heads: int, height: int, width: int, tall: int, wide: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The result; states, (b, blocks, h, d + 1, d), and mixed ones."""
    blocks = TokenBlocks.of_size((height, width), (tall, wide))
    qkv, spacing = _rows(qkv)
    query, key, value = qkv.chunk(3, dim=-1)
    b, n, c = query.shape
    d, count = c // heads, blocks.count
    shape = b, count, heads, d + 1, d
    result = _new(qkv, *shape)
    if not query.numel():
        return torch.empty(b, n, c, dtype=qkv.dtype, device=qkv.device), _new(qkv, *shape), result
    s = _sizes("fold", query, heads, blocks)
    partial = _new(qkv, b, count, s.splits, *shape[2:])
    launch_kernel(_block_fold_kernel, (b * count * s.splits * heads,),
        key, value, partial, n, heads, d, spacing, *s.sizes, *s.tile, **s.options,
    )  # fmt: skip
    is_kept = is_kept and s.splits > 1
    state = _new(qkv, *shape) if is_kept else partial.view(b, -1, *shape[2:])
    tile, warps = _mix_tile("mix", count)
    launch_kernel(_block_mix_kernel, (_ceil(heads * (d + 1) * d, tile[1]), b),
        partial, mixing.contiguous(), state, result, count, s.splits, heads * (d + 1) * d,
        is_kept, *tile, num_warps=warps,
    )  # fmt: skip
    out = _convolved(value, weight, bias, blocks)
    s = _sizes("read", query, heads, blocks)
    launch_kernel(_block_read_kernel, (b * count * s.splits * heads,),
        query, result, out, n, heads, d, spacing, *s.sizes, eps, weight is not None, *s.tile,
        **s.options,
    )  # fmt: skip
    return out, state, result


@launched("block_core", f"({SCHEMA}) -> (Tensor, Tensor, Tensor)")
def _forward(qkv: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _run(True, qkv, *others)


# Nothing but the backward reads the others.
_forward.register_inference(replayed(on_its_device(functools.partial(_run, False)), 1))


@launched(
    "block_core_backward",
    f"(Tensor grad, Tensor state, Tensor mixed, {SCHEMA}) -> {GRADIENTS}",
)
def _backward(
    grad: Tensor, state: Tensor, mixed: Tensor, qkv: Tensor, mixing: Tensor,
    weight: Tensor | None, bias: Tensor | None, heads: int, height: int, width: int, tall: int,
    wide: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Of tokens, of W, and of the convolution's kernels and biases."""
    blocks = TokenBlocks.of_size((height, width), (tall, wide))
    (qkv, spacing), (grad, g_row) = _rows(qkv), _rows(grad)
    query, key, value = qkv.chunk(3, dim=-1)
    b, n, c = query.shape
    d, count = c // heads, blocks.count
    grads = torch.empty(b, n, 3 * c, dtype=qkv.dtype, device=qkv.device)
    grad_q, grad_k, grad_v = grads.chunk(3, dim=-1)
    local, of_weight, of_bias = _of_convolution(grad, value, weight, blocks)
    (tile, warps), size = _mix_tile("mix_gradient", count), heads * (d + 1) * d
    programs = _ceil(size, tile[1])
    of_mixing = _new(qkv, b * programs, count, count)
    if grads.numel():
        s = _sizes("query_gradient", query, heads, blocks)
        partial = _new(qkv, b, count, s.splits, heads, d + 1, d)
        launch_kernel(_block_query_gradient_kernel, (b * count * s.splits * heads,),
            grad, query, mixed, grad_q, partial, n, heads, d, g_row, spacing, 3 * c, *s.sizes,
            eps, *s.tile, **s.options,
        )  # fmt: skip
        of_state = torch.empty_like(state)
        launch_kernel(_block_mix_gradient_kernel, (programs, b),
            partial, mixing.contiguous(), state, of_state, of_mixing, count, s.splits, size,
            *tile, num_warps=warps,
        )  # fmt: skip
        s = _sizes("key_gradient", query, heads, blocks)
        launch_kernel(_block_key_gradient_kernel, (b * count * s.splits * heads,),
            key, value, of_state, local, grad_k, grad_v, n, heads, d, spacing, 3 * c, *s.sizes,
            weight is not None, *s.tile, **s.options,
        )  # fmt: skip
    return grads, column_sum(of_mixing, mixing.dtype), of_weight, of_bias


@_forward.register_fake
def _(
    qkv: Tensor, mixing: Tensor, weight: Any, bias: Any, heads: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    b, n, c = qkv.shape
    c //= 3
    state = qkv.new_empty(b, len(mixing), heads, c // heads + 1, c // heads, dtype=torch.float32)
    return qkv.new_empty(b, n, c), state, torch.empty_like(state)


register(_forward, _backward)


def block_core(
    qkv: Tensor, mixing: Tensor, weight: Tensor | None, bias: Tensor | None, heads: int,
    blocks: TokenBlocks, eps: float,
) -> Tensor:  # fmt: skip
    """See ``attnzoo.ops.block_core``; features, sums and mixed states in float32."""
    sizes = heads, *blocks.grid, blocks.height, blocks.width, eps
    qkv = qkv.to(operand_dtype(qkv))
    of_pairs = triton_pairs.is_worth(qkv.dtype, qkv.shape[-1] // (3 * heads), blocks)
    run = triton_pairs._forward if of_pairs else _forward
    return run(qkv, mixing, weight, bias, *sizes)[0]
