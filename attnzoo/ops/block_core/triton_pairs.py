"""MHLA's attention pair by pair of tokens, for grids of few: the states would outweigh the tokens.

P_ij = (phi(Q_i) . phi(K_j)) W_b(i)b(j), O_i = sum_j P_ij V_j / (sum_j P_ij + eps), tile by tile. A
tile of W is the product of rows of W, one for each token of one side, and of marks, which say of
each token of the other side in which block it lies: tokens stay in the order of the grid, and
blocks may have any shape. The gradient of W is summed over blocks by the same marks.
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

from attnzoo.ops.block_core.token_blocks import TokenBlocks
from attnzoo.ops.block_core.triton_common import (
    GRADIENTS,
    SCHEMA,
    _convolved,
    _features,
    _new,
    _of_convolution,
    _phi,
    _tile,
    register,
)
from attnzoo.ops.triton_common import (
    _add_dot,
    _ceil,
    _dot,
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
def _own(n, heads, R: tl.constexpr):
    """Image and head, and tokens of a program."""
    tiles = tl.cdiv(n, R)
    head = tl.program_id(0) // tiles
    token = tl.program_id(0) % tiles * R + tl.arange(0, R)
    return (head // heads).to(tl.int64), head % heads, token


@triton.jit
def _quotient(a, b):
    """a // b, of less than 2^20, by an inverse: divisions of integers take a loop's most time."""
    return ((a.to(tl.float32) + 0.5) * (1.0 / b)).to(tl.int32)


@triton.jit
def _block(token, width, columns, tall, wide):
    row = _quotient(token, width)
    return _quotient(row, tall) * columns + _quotient(token - row * width, wide)


@triton.jit
def _marks(token, n, width, columns, tall, wide, M: tl.constexpr):
    """(tokens, blocks), 1 for each token's block; where there is no token all are 0."""
    block = tl.where(token < n, _block(token, width, columns, tall, wide), M)
    return (block[:, None] == tl.arange(0, M)[None, :]).to(tl.float32)


@triton.jit
def _lines(mixing, token, n, width, columns, tall, wide, blocks, across, along, M: tl.constexpr):
    """(tokens, blocks), each token's row of W, or with its strides exchanged its column."""
    block, other = _block(token, width, columns, tall, wide), tl.arange(0, M)
    mask = (token < n)[:, None] & (other < blocks)[None, :]
    place = mixing + block[:, None] * across + other[None, :] * along
    return tl.load(place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _key_value(key, value, token, n, spacing, column, is_column):
    """phi of keys, where there are none too, whose pairs have no weight; and values."""
    mask = (token < n)[:, None] & is_column
    k = _tile(key, token, spacing, column, mask)
    v = _tile(value, token, spacing, column, mask)
    return _phi(k).to(k.dtype), v


@triton.jit
def _pair_kernel(
    query, key, value, mixing, out, inverse, n, heads, d, spacing, width, columns, tall, wide,
    blocks, eps, ADD: tl.constexpr, R: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    M: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Of R queries, over C keys at a time; with ADD what lies in ``out`` is added."""
    image, head, token = _own(n, heads, R)
    place = image * n * spacing + head * d
    query, key, value = query + place, key + place, value + place
    column, other = tl.arange(0, D), tl.arange(0, C)
    is_column = (column < d)[None, :]
    mask = (token < n)[:, None] & is_column
    x = _tile(query, token, spacing, column, mask)
    x = _features(x, mask).to(x.dtype)
    w = _lines(mixing, token, n, width, columns, tall, wide, blocks, blocks, 1, M)
    acc = tl.zeros((R, D), tl.float32)
    norm = tl.zeros((R,), tl.float32)
    for first in range(0, n, C):
        near = first + other
        k, v = _key_value(key, value, near, n, spacing, column, is_column)
        marks = _marks(near, n, width, columns, tall, wide, M)
        p = _dot(x, tl.trans(k), P) * _dot(w, tl.trans(marks), P)
        norm += tl.sum(p, 1)
        acc = _add_dot(acc, p.to(v.dtype), v, P)
    norm = 1 / (norm + eps)
    tl.store(inverse + (image * heads + head) * n + token, norm, mask=token < n)
    acc *= norm[:, None]
    place = out + (image * n + token)[:, None] * (heads * d) + head * d + column[None, :]
    if ADD:
        acc += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    tl.store(place, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _pair_query_gradient_kernel(
    grad, query, key, value, mixing, inverse, shared, grad_q, n, heads, d, g_row, spacing, gq_row,
    width, columns, tall, wide, blocks, R: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    M: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Of R queries; and what the gradients of all their pairs have in common, by the norm."""
    image, head, token = _own(n, heads, R)
    grad += image * n * g_row + head * d
    place = image * n * spacing + head * d
    query, key, value = query + place, key + place, value + place
    column, other = tl.arange(0, D), tl.arange(0, C)
    is_column = (column < d)[None, :]
    mask = (token < n)[:, None] & is_column
    g = _tile(grad, token, g_row, column, mask).to(query.dtype.element_ty)
    w = _lines(mixing, token, n, width, columns, tall, wide, blocks, blocks, 1, M)
    acc = tl.zeros((R, D), tl.float32)
    sums = tl.zeros((R, D), tl.float32)
    for first in range(0, n, C):
        near = first + other
        k, v = _key_value(key, value, near, n, spacing, column, is_column)
        marks = _marks(near, n, width, columns, tall, wide, M)
        mixed = _dot(w, tl.trans(marks), P)
        slope = _dot(g, tl.trans(v), P) * mixed
        acc = _add_dot(acc, slope.to(k.dtype), k, P)
        sums = _add_dot(sums, mixed.to(k.dtype), k, P)
    place = (image * heads + head) * n + token
    over = tl.load(inverse + place, mask=token < n, other=0.0)[:, None]
    z = _tile(query, token, spacing, column, mask).to(tl.float32)
    acc *= over
    common = tl.sum(_features(z, mask) * acc, 1)
    tl.store(shared + place, common, mask=token < n)
    acc -= common[:, None] * over * sums
    here = grad_q + (image * n + token)[:, None] * gq_row + head * d + column[None, :]
    tl.store(here, tl.where(z <= 0, 0.0, acc).to(grad_q.dtype.element_ty), mask=mask)


@triton.jit
def _pair_key_gradient_kernel(
    grad, query, key, value, mixing, inverse, shared, added, grad_k, grad_v, of_mixing, n, heads,
    d, g_row, spacing, gk_row, width, columns, tall, wide, blocks, ADD: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, D: tl.constexpr, M: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Of R keys and values, over C queries at a time, and of W a part."""
    image, head, token = _own(n, heads, R)
    grad += image * n * g_row + head * d
    place = image * n * spacing + head * d
    query, key, value = query + place, key + place, value + place
    inverse += (image * heads + head) * n
    shared += (image * heads + head) * n
    column, other = tl.arange(0, D), tl.arange(0, C)
    is_column = (column < d)[None, :]
    mask = (token < n)[:, None] & is_column
    z = _tile(key, token, spacing, column, mask)
    k = _features(z, mask).to(z.dtype)
    v = _tile(value, token, spacing, column, mask)
    w = _lines(mixing, token, n, width, columns, tall, wide, blocks, 1, blocks, M)
    of_key = tl.zeros((R, D), tl.float32)
    of_value = tl.zeros((R, D), tl.float32)
    of_lines = tl.zeros((R, M), tl.float32)
    for first in range(0, n, C):
        near = first + other
        is_near = (near < n)[:, None] & is_column
        x = _tile(query, near, spacing, column, is_near)
        g = _tile(grad, near, g_row, column, is_near).to(x.dtype)
        over = tl.load(inverse + near, mask=near < n, other=0.0)
        common = tl.load(shared + near, mask=near < n, other=0.0)
        # Features are divided, once for all products; what comes in is read as it was loaded.
        x = (_phi(x) * over[:, None]).to(x.dtype)
        marks = _marks(near, n, width, columns, tall, wide, M)
        mixed = _dot(w, tl.trans(marks), P)
        s = _dot(k, tl.trans(x), P)
        of_value = _add_dot(of_value, (s * mixed).to(g.dtype), g, P)
        slope = _dot(v, tl.trans(g), P) - common[None, :]
        of_lines = _add_dot(of_lines, (s * slope).to(x.dtype), marks.to(x.dtype), P)
        of_key = _add_dot(of_key, (slope * mixed).to(x.dtype), x, P)
    row = image * n + token
    if ADD:
        of_value += _tile(added, row, heads * d, head * d + column, mask).to(tl.float32)
    here = row[:, None] * gk_row + head * d + column[None, :]
    tl.store(grad_v + here, of_value.to(grad_v.dtype.element_ty), mask=mask)
    tl.store(grad_k + here, tl.where(z <= 0, 0.0, of_key).to(grad_k.dtype.element_ty), mask=mask)
    marks = _marks(token, n, width, columns, tall, wide, M)
    block = tl.arange(0, M)
    part = of_mixing + tl.program_id(0).to(tl.int64) * blocks * blocks
    part += block[:, None] + block[None, :] * blocks
    is_block = block < blocks
    part_mask = is_block[:, None] & is_block[None, :]
    tl.store(part, _dot(tl.trans(marks), of_lines, P), mask=part_mask)


class Tile(NamedTuple):
    """How a kernel is launched."""

    rows: int  # tokens of a program
    others: int  # of the other side, at a time
    warps: int
    stages: int


# In half precision, and in float32.
TILES = {
    "pair": (Tile(128, 64, 8, 2), Tile(32, 32, 4, 1)),
    "query_gradient": (Tile(128, 64, 8, 2), Tile(32, 32, 4, 1)),
    "key_gradient": (Tile(64, 32, 4, 2), Tile(16, 32, 4, 1)),
}
# Pairs take n^2 d multiplications a head, states blocks * d^2 numbers from and to memory. So many
# multiplications are taken in place of a number, likewise; by counting, not yet by measuring.
WORTH = 256, 32
MOST_BLOCKS = 32  # with more the gradient of W spills registers on an A100


def is_worth(dtype: torch.dtype, width: int, blocks: TokenBlocks) -> bool:
    """Whether pairs of tokens are cheaper than states, of heads of ``width``."""
    n = blocks.grid[0] * blocks.grid[1]
    worth = WORTH[dtype == torch.float32] * blocks.count * width
    return blocks.count <= MOST_BLOCKS and n * n <= worth


class _Launch(NamedTuple):
    """Programs; what the kernel is told of the blocks and of its tile; what Triton is told."""

    grid: tuple[int, ...]
    sizes: tuple[int, ...]
    tile: tuple[Any, ...]
    options: dict[str, int]


@functools.lru_cache(maxsize=1024)
def _launch(
    tiles: tuple[Tile, Tile], dtype: torch.dtype, precision: str, heads: int, n: int, d: int,
    blocks: TokenBlocks,
) -> _Launch:  # fmt: skip
    """``heads`` of all images."""
    rows, others, warps, stages = tiles[dtype == torch.float32]
    rows, others = min(rows, _width(n)), min(others, _width(n))
    sizes = blocks.grid[1], blocks.columns, blocks.height, blocks.width, blocks.count
    tile = rows, others, _width(d), _width(blocks.count), precision
    options = {"num_warps": warps, "num_stages": stages}
    return _Launch((heads * _ceil(n, rows),), sizes, tile, options)


def _sizes(kernel: str, query: Tensor, heads: int, blocks: TokenBlocks) -> _Launch:
    b, n, c = query.shape
    kind = query.dtype, _precision(query.dtype)
    return _launch(TILES[kernel], *kind, b * heads, n, c // heads, blocks)


def _run(
    qkv: Tensor, mixing: Tensor, weight: Tensor | None, bias: Tensor | None, heads: int,
    height: int, width: int, tall: int, wide: int, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The result; 1 / norm, (b, h, n)."""
    blocks = TokenBlocks.of_size((height, width), (tall, wide))
    qkv, spacing = _rows(qkv)
    query, key, value = qkv.chunk(3, dim=-1)
    b, n, c = query.shape
    out, inverse = _convolved(value, weight, bias, blocks), _new(qkv, b, heads, n)
    if query.numel():
        s = _sizes("pair", query, heads, blocks)
        launch_kernel(_pair_kernel, s.grid,
            query, key, value, mixing.contiguous(), out, inverse, n, heads, c // heads, spacing,
            *s.sizes, eps, weight is not None, *s.tile, **s.options,
        )  # fmt: skip
    return out, inverse


_forward = launched("block_core_pairs", f"({SCHEMA}) -> (Tensor, Tensor)")(_run)
_forward.register_inference(replayed(on_its_device(_run), 1))


@launched("block_core_pairs_backward", f"(Tensor grad, Tensor inverse, {SCHEMA}) -> {GRADIENTS}")
def _backward(
    grad: Tensor, inverse: Tensor, qkv: Tensor, mixing: Tensor, weight: Tensor | None,
    bias: Tensor | None, heads: int, height: int, width: int, tall: int, wide: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Of tokens, of W, and of the convolution's kernels and biases."""
    blocks = TokenBlocks.of_size((height, width), (tall, wide))
    (qkv, spacing), (grad, g_row) = _rows(qkv), _rows(grad)
    query, key, value = qkv.chunk(3, dim=-1)
    b, n, c = query.shape
    grads = torch.empty(b, n, 3 * c, dtype=qkv.dtype, device=qkv.device)
    grad_q, grad_k, grad_v = grads.chunk(3, dim=-1)
    local, of_weight, of_bias = _of_convolution(grad, value, weight, blocks)
    s = _sizes("key_gradient", query, heads, blocks)
    of_mixing = _new(qkv, *s.grid, blocks.count, blocks.count)
    if grads.numel():
        mixing, shared, size = mixing.contiguous(), torch.empty_like(inverse), c // heads
        rows = n, heads, size, g_row, spacing, 3 * c
        first = _sizes("query_gradient", query, heads, blocks)
        launch_kernel(_pair_query_gradient_kernel, first.grid,
            grad, query, key, value, mixing, inverse, shared, grad_q, *rows, *first.sizes,
            *first.tile, **first.options,
        )  # fmt: skip
        launch_kernel(_pair_key_gradient_kernel, s.grid,
            grad, query, key, value, mixing, inverse, shared, local, grad_k, grad_v, of_mixing,
            *rows, *s.sizes, weight is not None, *s.tile, **s.options,
        )  # fmt: skip
    return grads, column_sum(of_mixing, mixing.dtype), of_weight, of_bias


@_forward.register_fake
def _(qkv: Tensor, mixing: Any, weight: Any, bias: Any, heads: int, *_: Any) -> tuple[Tensor, ...]:
    b, n, c = qkv.shape
    return qkv.new_empty(b, n, c // 3), qkv.new_empty(b, heads, n, dtype=torch.float32)


register(_forward, _backward)
