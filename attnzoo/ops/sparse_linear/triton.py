"""SLA's forward in four launches: states of blocks, the choice, sums of states, both parts.

A program reads the tokens of one block and one head where the projection left them. Each block of
keys has a state of d + 1 rows of d: phi(K)^T V, then the sum of phi(K). Nothing is n x n but one
byte for each pair of blocks.
"""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportReturnType=false

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.ops.precision import operand_dtype
from attnzoo.ops.sparse_linear.torch import blocks_kept
from attnzoo.ops.sparse_linear.triton_backward import (
    _sparse_key_kernel,
    _sparse_query_kernel,
    _sparse_turn_kernel,
)
from attnzoo.ops.sparse_linear.triton_common import (
    _features,
    _here,
    _listed,
    _matrix,
    _put,
    _put_state,
    _state_of,
    _tile,
)
from attnzoo.ops.triton_common import (
    _LOG2E,
    _add_dot,
    _ceil,
    _dot,
    _is_fast,
    _power_of_2,
    _precision,
    _rows,
    _width,
    column_sum,
    launch_kernel,
    launched,
    on_its_device,
    sample_sum,
)
from attnzoo.ops.triton_replay import replayed


@triton.jit
def _sparse_fold_kernel(
    query, key, value, means, state, n, blocks, heads, d, q_row, k_row, v_row, S: tl.constexpr,
    D: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The means of a block of queries and of keys, and the state of the keys."""
    image, head, part, block, token, is_real, column = _here(n, heads, d, S, S, D)
    q = _tile(query + image * n * q_row + head * d, token, q_row, column, is_real, d)
    k = _tile(key + image * n * k_row + head * d, token, k_row, column, is_real, d)
    v = _tile(value + image * n * v_row + head * d, token, v_row, column, is_real, d)
    size = tl.minimum(n - block * S, S)
    place = means + part * (2 * d * blocks) + column * blocks + block
    tl.store(place, tl.sum(q.to(tl.float32), 0) / size, mask=column < d)
    tl.store(place + d * blocks, tl.sum(k.to(tl.float32), 0) / size, mask=column < d)
    x = _features(k, is_real, column, d)
    kind = state.dtype.element_ty
    product = _dot(tl.trans(x.to(kind)), v.to(kind), P)
    state += (part * blocks + block) * ((d + 1) * d)
    _put_state(state, column, d, product, tl.sum(x, 0))


@triton.jit
def _sparse_choice_kernel(
    means, kept, chosen, blocks, count, d, R: tl.constexpr, B: tl.constexpr, U: tl.constexpr
):
    """The ``count`` blocks of keys that each of R blocks of queries is most similar to.

    As a list in their order, and as a map of ones and zeros.
    """
    part = tl.program_id(1).to(tl.int64)
    row, column = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, B)
    is_row, is_column = row < blocks, column < blocks
    means += part * (2 * d * blocks)
    score = tl.zeros((R, B), tl.float32)
    for first in range(0, d, U):
        for i in tl.static_range(U):  # loads that wait for no other
            line, is_channel = means + (first + i) * blocks, first + i < d
            q = tl.load(line + row, mask=is_row & is_channel, other=0.0)
            line += d * blocks
            # What all keys have in common decides nothing, and would cost digits.
            common = tl.load(line, mask=is_channel, other=0.0)
            k = tl.load(line + column, mask=is_column & is_channel, other=0.0) - common
            score += q[:, None] * k[None, :]
    # Unsigned numbers in the order of the scores, NaN among them; what is no block is the least.
    bits = score.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) ^ -0x80000000
    order = tl.where(is_column[None, :], bits.to(tl.uint32, bitcast=True), 0)
    least = tl.zeros((R,), tl.uint32)  # of those that are kept, bit by bit
    bit = tl.full((R,), 1, tl.uint32) << 31
    for _ in range(32):
        higher = least | bit
        above = tl.sum((order >= higher[:, None]).to(tl.int32), 1)
        least = tl.where(above >= count, higher, least)
        bit = bit >> 1
    is_more = order > least[:, None]
    missing = count - tl.sum(is_more.to(tl.int32), 1)
    is_equal = order == least[:, None]
    is_kept = is_more | (is_equal & (tl.cumsum(is_equal.to(tl.int32), 1) <= missing[:, None]))
    line = part * blocks + row
    mask = is_row[:, None] & is_column[None, :]
    tl.store(chosen + line[:, None] * blocks + column[None, :], is_kept.to(tl.int8), mask=mask)
    place = line[:, None] * count + tl.cumsum(is_kept.to(tl.int32), 1) - 1
    tl.store(
        kept + place, tl.broadcast_to(column[None, :], (R, B)), mask=is_row[:, None] & is_kept
    )


@triton.jit
def _sparse_rest_kernel(
    chosen, state, out, blocks, size, row_step, step, M: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Of every block, the sum of the states of the blocks that it has not chosen."""
    part = tl.program_id(2).to(tl.int64)
    kind = state.dtype.element_ty
    row = tl.program_id(1) * M + tl.arange(0, M)
    column = tl.program_id(0) * N + tl.arange(0, N)
    chosen += part * blocks * blocks
    state += part * blocks * size
    acc = tl.zeros((M, N), tl.float32)
    for first in range(0, blocks, K):
        other = first + tl.arange(0, K)
        is_other = other < blocks
        place = chosen + row[:, None] * row_step + other[None, :] * step
        mask = (row < blocks)[:, None] & is_other[None, :]
        rest = (tl.load(place, mask=mask, other=1) == 0).to(tl.float32).to(kind)
        mask = is_other[:, None] & (column < size)[None, :]
        z = tl.load(state + other[:, None] * size + column[None, :], mask=mask, other=0.0)
        acc = _add_dot(acc, rest, z, P)
    mask = (row < blocks)[:, None] & (column < size)[None, :]
    place = out + part * blocks * size + row[:, None] * size + column[None, :]
    tl.store(place, acc.to(kind), mask=mask)


@triton.jit
def _sparse_read_kernel(
    query, key, value, weight, bias, kept, rest, near, out, logs, n, blocks, count, heads, d,
    q_row, k_row, v_row, part_step, block_step, scale, eps, JOIN: tl.constexpr,
    KEEP: tl.constexpr, S: tl.constexpr, K: tl.constexpr, D: tl.constexpr, FULL: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """Both parts of a block of queries, and log2 of the softmax's sums of exponentials.

    The linear part, or with JOIN its projection plus the other, goes to ``out``.
    """
    image, head, part, block, token, is_real, column = _here(n, heads, d, S, S, D)
    q = _tile(query + image * n * q_row + head * d, token, q_row, column, is_real, d)
    key += image * n * k_row + head * d
    value += image * n * v_row + head * d
    kept += (part * blocks + block) * count
    peak = tl.full((S,), -1e30, tl.float32)
    total = tl.zeros((S,), tl.float32)
    acc = tl.zeros((S, D), tl.float32)
    for i in range(count * (S // K)):
        other = _listed(kept, i, S, K)
        is_key = other < n
        k = _tile(key, other, k_row, column, is_key, d)
        v = _tile(value, other, v_row, column, is_key, d)
        s = _dot(q, tl.trans(k), P)
        if not FULL:
            s = tl.where(is_key[None, :], s, -float("inf"))
        higher = tl.maximum(peak, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - higher[:, None])
        shrink = tl.exp2(peak - higher)
        total = total * shrink + tl.sum(p, 1)
        acc = _add_dot(acc * shrink[:, None], p.to(v.dtype), v, P)
        peak = higher
    tl.store(logs + part * n + token, peak + tl.log2(total), mask=is_real)
    row = heads * d
    start = image * n * row + head * d
    acc /= total[:, None]
    if KEEP:
        _put(near + start, token, row, column, is_real, d, acc)
    x = _features(q, is_real, column, d)
    state, sums = _state_of(rest + part * part_step + block * block_step, column, d)
    norm = tl.sum(x * sums[None, :], 1) + eps
    far = _dot(x.to(state.dtype), state, P) / norm[:, None]
    if JOIN:
        matrix = _matrix(weight, column, d)
        b = tl.load(bias + column, mask=column < d, other=0.0).to(tl.float32)
        far = _add_dot(acc + b[None, :], far.to(matrix.dtype), tl.trans(matrix), P)
    _put(out + start, token, row, column, is_real, d, far)


# Tokens of others that are read at once, warps, stages and registers of a thread, of each kernel
# for heads of at most 64 in half precision.
LAUNCHES = {
    "fold": (64, 4, 1, None),
    "read": (64, 4, 3, None),
    "query": (64, 4, 2, 168),
    "key": (64, 4, 2, 168),
}
REST_TILE = (64, 128, 64, 4, 3)  # rows, columns and depth, warps, stages
CHOICES = 1024  # scores that a program of the choice compares at most


def _sizes(
    kernel: str, dtype: torch.dtype, block: int, d: int
) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Tokens of a block, those that are read at once, and channels of a tile; Triton's options."""
    piece, warps, stages, registers = LAUNCHES[kernel]
    if dtype == torch.float32:
        piece, warps, stages, registers = 16, 8, 1, None
    elif d > 64:
        piece, warps, stages, registers = 32, 8, 1, None
    options = {"num_warps": warps, "num_stages": stages}
    if registers and _is_fast():
        options["maxnreg"] = registers
    return (block, min(piece, block), _width(d)), options


def _state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of sums and their gradients, which overflow float16."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _exact(dtype: torch.dtype) -> str:
    """For float32 no tensor cores: by ptxas 12.8 their products read outside shared memory."""
    return "ieee" if dtype == torch.float32 else _precision(dtype)


def choose(means: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The blocks that are kept, of means of queries and keys, (parts, 2, d, blocks).

    Returns:
        Lists, (parts, blocks, count), and a map of ones and zeros, (parts, blocks, blocks).
    """
    parts, _, d, blocks = means.shape
    kept = torch.empty(parts, blocks, count, dtype=torch.int32, device=means.device)
    chosen = torch.empty(parts, blocks, blocks, dtype=torch.int8, device=means.device)
    columns = _power_of_2(blocks)
    rows = max(1, min(4, CHOICES // columns))
    launch_kernel(_sparse_choice_kernel, (_ceil(blocks, rows), parts),
        means, kept, chosen, blocks, count, d, rows, columns, 8, num_warps=1,
    )  # fmt: skip
    return kept, chosen


def turned(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Of such a map, for each block of keys the blocks of queries that keep it; their number."""
    parts, blocks, _ = chosen.shape
    readers = torch.empty(parts, blocks, blocks, dtype=torch.int32, device=chosen.device)
    counts = torch.empty(parts, blocks, dtype=torch.int32, device=chosen.device)
    launch_kernel(_sparse_turn_kernel, (blocks, parts),
        chosen, readers, counts, blocks, _power_of_2(blocks), num_warps=1,
    )  # fmt: skip
    return readers, counts


def rest_sums(chosen: Tensor, state: Tensor, is_rest_only: bool, is_transposed: bool) -> Tensor:
    """(parts, blocks, size) -> likewise, of what is not chosen; of all blocks (parts, size)."""
    parts, blocks, size = state.shape
    if not is_rest_only:
        return sample_sum(state, state.dtype)
    out = torch.empty(parts, blocks, size, dtype=state.dtype, device=state.device)
    rows, columns, depth, warps, stages = REST_TILE
    if state.dtype == torch.float32:
        columns, depth, stages = columns // 2, depth // 2, 1
    steps = (1, blocks) if is_transposed else (blocks, 1)
    grid = _ceil(size, columns), _ceil(blocks, rows), parts
    launch_kernel(_sparse_rest_kernel, grid,
        chosen, state, out, blocks, size, *steps, rows, columns, depth, _exact(state.dtype),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


SCHEMA = (
    "Tensor query, Tensor key, Tensor value, Tensor? weight, Tensor? bias, int heads, int block, "
    "int count, bool is_rest_only, float eps"
)


def _run(
    is_kept: bool, query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None,
    bias: Tensor | None, heads: int, block: int, count: int, is_rest_only: bool, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The softmax part, (b, n, c), and the linear one, or with ``weight`` the sum.

    Then logs, sums of states, and the choice as lists and as a map.
    """
    (query, q_row), (key, k_row), (value, v_row) = _rows(query), _rows(key), _rows(value)
    b, n, c = query.shape
    dtype, device = query.dtype, query.device
    d, blocks, parts = c // heads, _ceil(n, block), b * heads
    out = torch.empty(b, n, c, dtype=dtype, device=device)
    has_near = is_kept or weight is None
    near = torch.empty(b, n, c, dtype=dtype, device=device) if has_near else out
    logs = torch.empty(b, heads, n, dtype=torch.float32, device=device)
    means = torch.empty(parts, 2, d, blocks, dtype=torch.float32, device=device)
    size = (d + 1) * d
    state = torch.empty(parts, blocks, size, dtype=_state_dtype(dtype), device=device)
    if not out.numel():
        kept = torch.empty(parts, blocks, count, dtype=torch.int32, device=device)
        return near, out, logs, state, kept, kept.to(torch.int8)
    spacings, precision = (q_row, k_row, v_row), _exact(dtype)
    tile, options = _sizes("fold", dtype, block, d)
    launch_kernel(_sparse_fold_kernel, (blocks, parts),
        query, key, value, means, state, n, blocks, heads, d, *spacings, tile[0],
        tile[2], precision, **options,
    )  # fmt: skip
    kept, chosen = choose(means, count)
    rest = rest_sums(chosen, state, is_rest_only, False)
    steps = (blocks * size, size) if is_rest_only else (size, 0)
    tile, options = _sizes("read", dtype, block, d)
    launch_kernel(_sparse_read_kernel, (blocks, parts),
        query, key, value, *_or_none(query, weight, bias), kept, rest, near, out, logs, n, blocks,
        count, heads, d, *spacings, *steps, d**-0.5 * _LOG2E.value, eps, weight is not None,
        has_near, *tile, n % block == 0, precision, **options,
    )  # fmt: skip
    return near, out, logs, rest, kept, chosen


def _or_none(like: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Operands of a kernel, which takes anything in place of those that it does not read."""
    return tuple(like if z is None else z.contiguous() for z in tensors)


@launched("sparse_linear", f"({SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
def _forward(query: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return _run(True, query, *others)


# Nothing but the backward reads the others.
_forward.register_inference(replayed(on_its_device(functools.partial(_run, False)), 2))


@_forward.register_fake
def _(
    query: Tensor, key: Any, value: Any, weight: Any, bias: Any, heads: int, block: int,
    count: int, is_rest_only: bool, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    b, n, c = query.shape
    blocks, d, parts = -(-n // block), c // heads, b * heads
    sizes = (parts, blocks, (d + 1) * d) if is_rest_only else (parts, (d + 1) * d)
    return (
        query.new_empty(query.shape), query.new_empty(query.shape),
        query.new_empty(b, heads, n, dtype=torch.float32),
        query.new_empty(sizes, dtype=_state_dtype(query.dtype)),
        query.new_empty(parts, blocks, count, dtype=torch.int32),
        query.new_empty(parts, blocks, blocks, dtype=torch.int8),
    )  # fmt: skip


@launched(
    "sparse_linear_backward",
    "(Tensor of_near, Tensor of_far, Tensor near, Tensor logs, Tensor rest, Tensor kept, "
    f"Tensor chosen, {SCHEMA}) -> (Tensor, Tensor)",
)
def _backward(
    of_near: Tensor, of_far: Tensor, near: Tensor, logs: Tensor, rest: Tensor, kept: Tensor,
    chosen: Tensor, query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None,
    bias: Tensor | None, heads: int, block: int, count: int, is_rest_only: bool, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients side by side, (b, n, 3 c), as a projection to all three wants them.

    Then, with ``weight``, its gradient and as a last row the bias's.
    """
    (query, q_row), (key, k_row), (value, v_row) = _rows(query), _rows(key), _rows(value)
    (of_near, n_row), (of_far, f_row) = _rows(of_near), _rows(of_far)
    b, n, c = query.shape
    dtype, d, blocks, parts = query.dtype, c // heads, _ceil(n, block), b * heads
    grads = torch.empty(b, n, 3 * c, dtype=dtype, device=query.device)
    size, precision = (d + 1) * d, _exact(dtype)
    programs = parts * blocks if weight is not None else 0
    of_weight = torch.empty(programs, d + 1, d, dtype=torch.float32, device=query.device)
    if not grads.numel():
        return grads, column_sum(of_weight)
    along, scale = torch.empty_like(logs), d**-0.5 * _LOG2E.value
    of_rest = torch.empty(parts, blocks, size, dtype=rest.dtype, device=rest.device)
    steps = (blocks * size, size) if is_rest_only else (size, 0)
    tile, options = _sizes("query", dtype, block, d)
    launch_kernel(_sparse_query_kernel, (blocks, parts),
        of_near, of_far, near, query, key, value, *_or_none(query, weight), kept, rest, logs,
        grads, of_rest, of_weight, along, n, blocks, count, heads, d, n_row, f_row, q_row, k_row,
        v_row, *steps, scale, eps, weight is not None, *tile, n % block == 0, precision, **options,
    )  # fmt: skip
    of_state = rest_sums(chosen, of_rest, is_rest_only, True)
    readers, counts = turned(chosen)
    tile, options = _sizes("key", dtype, block, d)
    rows = min(block, 32) if dtype == torch.float32 else block
    launch_kernel(_sparse_key_kernel, (_ceil(n, rows), parts),
        of_near, query, key, value, readers, counts, of_state, logs, along, grads, n, blocks,
        heads, d, n_row, q_row, k_row, v_row, *steps, scale, block, rows,
        *tile[1:], precision,
        **options,
    )  # fmt: skip
    return grads, column_sum(of_weight)


@_backward.register_fake
def _(*operands: Any) -> tuple[Tensor, Tensor]:
    query, heads = operands[7], operands[12]
    b, n, c = query.shape
    d = c // heads
    return query.new_empty(b, n, 3 * c), query.new_empty(d + 1, d, dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *operands, ctx.heads, ctx.block, ctx.count, ctx.is_rest_only, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    near, _, *others = output
    ctx.save_for_backward(near, *others, *operands)


def _gradients(
    ctx: Any, of_near: Tensor | None, of_out: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    if of_near is None and of_out is None:
        return (None,) * 10
    saved = ctx.saved_tensors
    near, weight, bias = saved[0], *saved[-2:]
    if weight is not None:
        of_near = of_out
    of_near, of_out = (torch.zeros_like(near) if g is None else g for g in (of_near, of_out))
    options = ctx.heads, ctx.block, ctx.count, ctx.is_rest_only, ctx.eps
    grads, of_weight = _backward(of_near, of_out, *saved, *options)
    learned = (None, None)
    if weight is not None:
        learned = of_weight[:-1].to(weight.dtype), of_weight[-1].to(bias.dtype)
    return *grads.chunk(3, -1), *learned, *(None,) * 5


_forward.register_autograd(_gradients, setup_context=_setup)


def _both(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None, bias: Tensor | None,
    block: int, share: float, is_rest_only: bool, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype, (_, heads, n, _) = operand_dtype(query), query.shape
    operands = (z.to(dtype).transpose(1, 2).flatten(2) for z in (query, key, value))
    learned = (None if z is None else z.to(dtype) for z in (weight, bias))
    count = blocks_kept(-(-n // block), share)
    return _forward(*operands, *learned, heads, block, count, is_rest_only, eps)[:2]


def sparse_linear_attention(
    query: Tensor, key: Tensor, value: Tensor, block: int, share: float, is_rest_only: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See ``attnzoo.ops.sparse_linear``; all sums in float32, states in bfloat16 if values are."""
    both = _both(query, key, value, None, None, block, share, is_rest_only, eps)
    near, far = (z.unflatten(-1, (query.shape[1], -1)).transpose(1, 2) for z in both)
    return near, far


def sparse_linear_tokens(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor, block: int,
    share: float, is_rest_only: bool, eps: float,
) -> Tensor:  # fmt: skip
    """Likewise."""
    return _both(query, key, value, weight, bias, block, share, is_rest_only, eps)[1]
