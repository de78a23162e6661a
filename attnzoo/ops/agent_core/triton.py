"""Agent attention from the tokens as a projection leaves them, and its gradient back into them.

The means of the queries; the agents' attention over all keys, split among programs and joined; and
the queries' over the agents, whose scores fit into registers. The backward computes scores again
and leaves the gradients of queries, keys and values side by side.
"""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.ops.depthwise_conv.triton import stencil, stencil_weight_gradient
from attnzoo.ops.precision import operand_dtype
from attnzoo.ops.triton_common import (
    _LOG2E,
    _add_dot,
    _ceil,
    _dot,
    _precision,
    _rows,
    _width,
    launched,
)


@triton.jit
def _pool_kernel(
    query, agent, width, cells_w, cell_h, cell_w, c, q_row, R: tl.constexpr, C: tl.constexpr
):
    """The mean of a cell."""
    cell = tl.program_id(0)
    column = tl.program_id(1) * C + tl.arange(0, C)
    total = tl.zeros((R, C), tl.float32)
    for start in range(0, cell_h * cell_w, R):
        place = start + tl.arange(0, R)
        # Cells are counted over all images, one below the other.
        token = (cell // cells_w * cell_h + place // cell_w).to(tl.int64) * width
        token = token + cell % cells_w * cell_w + place % cell_w
        mask = (place < cell_h * cell_w)[:, None] & (column < c)[None, :]
        z = tl.load(query + token[:, None] * q_row + column[None, :], mask=mask, other=0.0)
        total += z.to(tl.float32)
    mean = tl.sum(total, 0) / (cell_h * cell_w)
    place = agent + cell.to(tl.int64) * c + column
    tl.store(place, mean.to(agent.dtype.element_ty), mask=column < c)


@triton.jit
def _tile(z, row, spacing, column, mask):
    return tl.load(z + row.to(tl.int64)[:, None] * spacing + column[None, :], mask=mask, other=0.0)


@triton.jit
def _gather_kernel(
    agent, key, value, partial, sums, n, agents, heads, d, k_row, splits, chunk, scale,
    M: tl.constexpr, D: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Agents' attention over a part of the keys, not yet divided by the sum."""
    split, image_head = tl.program_id(0) % splits, tl.program_id(0) // splits
    image, head = image_head // heads, image_head % heads
    m, column = tl.arange(0, M), tl.arange(0, D)
    is_column = (column < d)[None, :]
    mask_m = (m < agents)[:, None] & is_column
    a = _tile(agent, image * agents + m, heads * d, head * d + column, mask_m)
    peak = tl.full((M,), -float("inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, D), tl.float32)
    for start in range(split * chunk, tl.minimum((split + 1) * chunk, n), R):
        row = start + tl.arange(0, R)
        mask = (row < n)[:, None] & is_column
        k = _tile(key, image * n + row, k_row, head * d + column, mask)
        v = _tile(value, image * n + row, k_row, head * d + column, mask)
        s = _dot(a, tl.trans(k), P) * (scale * _LOG2E)
        s = tl.where((row < n)[None, :], s, -float("inf"))
        higher = tl.maximum(peak, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        shrink = tl.exp2(peak - higher)
        total = total * shrink + tl.sum(p, 1)
        acc = _add_dot(acc * shrink[:, None], p.to(v.dtype), v, P)
        peak = higher
    place = tl.program_id(0).to(tl.int64) * agents + m
    tl.store(partial + place[:, None] * d + column[None, :], acc, mask=mask_m)
    tl.store(sums + 2 * place, peak, mask=m < agents)
    tl.store(sums + 2 * place + 1, total, mask=m < agents)


@triton.jit
def _join_kernel(
    partial, sums, gathered, logs, agents, heads, d, splits, S: tl.constexpr, D: tl.constexpr
):
    """An agent's attention of its parts, and log2 of the sum of its exponentials."""
    image_head, m = tl.program_id(0) // agents, tl.program_id(0) % agents
    split, column = tl.arange(0, S), tl.arange(0, D)
    is_split, is_column = split < splits, column < d
    place = (image_head * splits + split).to(tl.int64) * agents + m
    peak = tl.load(sums + 2 * place, mask=is_split, other=-float("inf"))
    total = tl.load(sums + 2 * place + 1, mask=is_split, other=0.0)
    z = tl.load(
        partial + place[:, None] * d + column[None, :],
        mask=is_split[:, None] & is_column[None, :], other=0.0,
    )  # fmt: skip
    highest = tl.max(peak, 0)
    share = tl.exp2(peak - highest)
    total = tl.sum(total * share, 0)
    z = tl.sum(z * share[:, None], 0) / total
    row = (image_head // heads).to(tl.int64) * agents + m
    place = gathered + row * heads * d + image_head % heads * d + column
    tl.store(place, z.to(gathered.dtype.element_ty), mask=is_column)
    tl.store(logs + tl.program_id(0), highest + tl.log2(total))


@triton.jit
def _scores(q, a, m, agents, scale, P: tl.constexpr):
    """softmax over the agents, (rows, agents)."""
    s = _dot(q, tl.trans(a), P) * (scale * _LOG2E)
    s = tl.where((m < agents)[None, :], s, -float("inf"))
    p = tl.exp2(s - tl.max(s, 1)[:, None])
    return p / tl.sum(p, 1)[:, None]


@triton.jit
def _hand_out_kernel(
    query, agent, gathered, out, n, agents, heads, d, q_row, splits, chunk, scale,
    M: tl.constexpr, D: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    split, image_head = tl.program_id(0) % splits, tl.program_id(0) // splits
    image, head = image_head // heads, image_head % heads
    m, column = tl.arange(0, M), tl.arange(0, D)
    is_column = (column < d)[None, :]
    mask_m = (m < agents)[:, None] & is_column
    a = _tile(agent, image * agents + m, heads * d, head * d + column, mask_m)
    v = _tile(gathered, image * agents + m, heads * d, head * d + column, mask_m)
    for start in range(split * chunk, tl.minimum((split + 1) * chunk, n), R):
        row = start + tl.arange(0, R)
        mask = (row < n)[:, None] & is_column
        q = _tile(query, image * n + row, q_row, head * d + column, mask)
        z = _dot(_scores(q, a, m, agents, scale, P).to(v.dtype), v, P)
        place = (image * n + row).to(tl.int64)[:, None] * (heads * d)
        place += head * d + column[None, :]
        tl.store(out + place, z.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _hand_out_gradient_kernel(
    grad, query, agent, gathered, grad_q, partial, n, agents, heads, d, g_row, q_row, gq_row,
    splits, chunk, scale, M: tl.constexpr, D: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Of queries, and a part of those of agents and of what they gathered."""
    split, image_head = tl.program_id(0) % splits, tl.program_id(0) // splits
    image, head = image_head // heads, image_head % heads
    m, column = tl.arange(0, M), tl.arange(0, D)
    is_column = (column < d)[None, :]
    mask_m = (m < agents)[:, None] & is_column
    a = _tile(agent, image * agents + m, heads * d, head * d + column, mask_m)
    v = _tile(gathered, image * agents + m, heads * d, head * d + column, mask_m)
    of_agent = tl.zeros((M, D), tl.float32)
    of_value = tl.zeros((M, D), tl.float32)
    for start in range(split * chunk, tl.minimum((split + 1) * chunk, n), R):
        row = start + tl.arange(0, R)
        mask = (row < n)[:, None] & is_column
        q = _tile(query, image * n + row, q_row, head * d + column, mask)
        g = _tile(grad, image * n + row, g_row, head * d + column, mask)
        p = _scores(q, a, m, agents, scale, P)
        slope = _dot(g, tl.trans(v), P)
        of_value = _add_dot(of_value, tl.trans(p.to(g.dtype)), g, P)
        slope = (p * (slope - tl.sum(p * slope, 1)[:, None]) * scale).to(q.dtype)
        of_agent = _add_dot(of_agent, tl.trans(slope), q, P)
        place = (image * n + row).to(tl.int64)[:, None] * gq_row + head * d + column[None, :]
        tl.store(grad_q + place, _dot(slope, a, P).to(grad_q.dtype.element_ty), mask=mask)
    place = (tl.program_id(0).to(tl.int64) * 2 * agents + m)[:, None] * d + column[None, :]
    tl.store(partial + place, of_agent, mask=mask_m)
    tl.store(partial + place + agents * d, of_value, mask=mask_m)


@triton.jit
def _turn_kernel(
    partial, gathered, of_agent, of_value, along, agents, heads, d, splits,
    S: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Sums of the parts of an agent, and the gradient along what it gathered."""
    image_head, m = tl.program_id(0) // agents, tl.program_id(0) % agents
    split, column = tl.arange(0, S), tl.arange(0, D)
    is_column = column < d
    mask = (split < splits)[:, None] & is_column[None, :]
    place = ((image_head * splits + split).to(tl.int64) * 2 * agents + m)[:, None] * d
    place += column[None, :]
    first = tl.sum(tl.load(partial + place, mask=mask, other=0.0), 0)
    second = tl.sum(tl.load(partial + place + agents * d, mask=mask, other=0.0), 0)
    row = ((image_head // heads).to(tl.int64) * agents + m) * heads * d
    row += image_head % heads * d + column
    z = tl.load(gathered + row, mask=is_column, other=0.0).to(tl.float32)
    tl.store(along + tl.program_id(0), tl.sum(second * z, 0))
    tl.store(of_agent + row, first, mask=is_column)
    tl.store(of_value + row, second.to(of_value.dtype.element_ty), mask=is_column)


@triton.jit
def _gather_gradient_kernel(
    key, value, agent, of_value, along, logs, added, grad_k, grad_v, partial, n, agents, heads, d,
    k_row, gk_row, splits, chunk, scale, ADD: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
    R: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Of keys and values, and a part of that of agents."""
    split, image_head = tl.program_id(0) % splits, tl.program_id(0) // splits
    image, head = image_head // heads, image_head % heads
    m, column = tl.arange(0, M), tl.arange(0, D)
    is_column = (column < d)[None, :]
    mask_m = (m < agents)[:, None] & is_column
    a = _tile(agent, image * agents + m, heads * d, head * d + column, mask_m)
    g = _tile(of_value, image * agents + m, heads * d, head * d + column, mask_m)
    delta = tl.load(along + image_head * agents + m, mask=m < agents, other=0.0)[None, :]
    log = tl.load(logs + image_head * agents + m, mask=m < agents, other=float("inf"))[None, :]
    of_agent = tl.zeros((M, D), tl.float32)
    for start in range(split * chunk, tl.minimum((split + 1) * chunk, n), R):
        row = start + tl.arange(0, R)
        mask = (row < n)[:, None] & is_column
        k = _tile(key, image * n + row, k_row, head * d + column, mask)
        v = _tile(value, image * n + row, k_row, head * d + column, mask)
        p = tl.exp2(_dot(k, tl.trans(a), P) * (scale * _LOG2E) - log)
        p = tl.where((row < n)[:, None], p, 0.0)
        of_v = _dot(p.to(g.dtype), g, P)
        if ADD:
            of_v += _tile(added, image * n + row, heads * d, head * d + column, mask).to(
                tl.float32
            )
        slope = (p * (_dot(v, tl.trans(g), P) - delta) * scale).to(k.dtype)
        of_agent = _add_dot(of_agent, tl.trans(slope), k, P)
        place = (image * n + row).to(tl.int64)[:, None] * gk_row + head * d + column[None, :]
        tl.store(grad_v + place, of_v.to(grad_v.dtype.element_ty), mask=mask)
        tl.store(grad_k + place, _dot(slope, a, P).to(grad_k.dtype.element_ty), mask=mask)
    place = (tl.program_id(0).to(tl.int64) * agents + m)[:, None] * d + column[None, :]
    tl.store(partial + place, of_agent, mask=mask_m)


@triton.jit
def _spread_kernel(
    of_agent, partial, agents, heads, d, splits, scale, S: tl.constexpr, D: tl.constexpr
):
    """The gradient of a mean, for each that it is of: adds what is left of the parts."""
    image_head, m = tl.program_id(0) // agents, tl.program_id(0) % agents
    split, column = tl.arange(0, S), tl.arange(0, D)
    is_column = column < d
    mask = (split < splits)[:, None] & is_column[None, :]
    place = ((image_head * splits + split).to(tl.int64) * agents + m)[:, None] * d
    total = tl.sum(tl.load(partial + place + column[None, :], mask=mask, other=0.0), 0)
    row = ((image_head // heads).to(tl.int64) * agents + m) * heads * d
    row = of_agent + row + image_head % heads * d + column
    total = (total + tl.load(row, mask=is_column, other=0.0)) * scale
    tl.store(row, total, mask=is_column)


@triton.jit
def _add_mean_kernel(
    grad_q, of_agent, rows, width, cells_w, cell_h, cell_w, c, gq_row,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Adds to each token what its cell has."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.program_id(1) * C + tl.arange(0, C)
    mask = (row < rows)[:, None] & (column < c)[None, :]
    cell = row // width // cell_h * cells_w + row % width // cell_w
    place = grad_q + row.to(tl.int64)[:, None] * gq_row + column[None, :]
    z = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    z += tl.load(of_agent + cell[:, None] * c + column[None, :], mask=mask, other=0.0)
    tl.store(place, z.to(grad_q.dtype.element_ty), mask=mask)


PROGRAMS = 264
# Tokens of a tile and warps, in half precision, by kernel.
BLOCKS = {
    "gather": (64, 4), "hand_out": (64, 4), "hand_out_gradient": (64, 4),
    "gather_gradient": (64, 4),
}  # fmt: skip
# Agents times channels beyond which, and in float32, fewer tokens fit into shared memory.
LARGE, FEW_ROWS = 4096, 16


def _launch(kernel: str, qkv: Tensor, heads: int, agents: int) -> tuple[Any, ...]:
    """Parts of the tokens, tokens of a part; what the kernel is told; what Triton is told."""
    (rows, warps), (b, n, width) = BLOCKS[kernel], qkv.shape
    tile, stages = _width(agents) * _width(width // 3 // heads), 2
    if qkv.dtype == torch.float32 or tile > LARGE:
        rows, stages = FEW_ROWS, 1
    splits = max(1, min(_ceil(n, rows), _ceil(PROGRAMS, max(1, b * heads)), 128))
    chunk = _ceil(_ceil(n, splits), rows) * rows
    constants = _width(agents), _width(width // 3 // heads), rows, _precision(qkv.dtype)
    return _ceil(n, chunk), chunk, constants, {"num_warps": warps, "num_stages": stages}


SCHEMA = (
    "Tensor qkv, Tensor? weight, Tensor? bias, int heads, int height, int width, int rows, "
    "int columns"
)


@launched("agent_core", f"({SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)")
def _forward(
    qkv: Tensor, weight: Tensor | None, bias: Tensor | None, heads: int, height: int, width: int,
    rows: int, columns: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The result; agents and what they gathered, (b, m, c); and log2 of their sums, (b, h, m)."""
    qkv, spacing = _rows(qkv)
    query, key, value = qkv.chunk(3, dim=-1)
    b, n, c = query.shape
    d, agents = c // heads, rows * columns

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=qkv.device)

    out, logs = new(b, n, c, dtype=qkv.dtype), new(b, heads, agents)
    agent, gathered = (new(b, agents, c, dtype=qkv.dtype) for _ in range(2))
    if not out.numel():
        return out, agent, gathered, logs
    _pool_kernel[(b * agents, _ceil(c, 128))](
        query, agent, width, columns, height // rows, width // columns, c, spacing, 16, 128,
        num_warps=4,
    )  # fmt: skip
    splits, chunk, constants, options = _launch("gather", qkv, heads, agents)
    partial, sums = new(b * heads * splits, agents, d), new(b * heads * splits, agents, 2)
    _gather_kernel[(b * heads * splits,)](
        agent, key, value, partial, sums, n, agents, heads, d, spacing, splits, chunk, d**-0.5,
        *constants, **options,
    )  # fmt: skip
    _join_kernel[(b * heads * agents,)](
        partial, sums, gathered, logs, agents, heads, d, splits, triton.next_power_of_2(splits),
        _width(d), num_warps=1,
    )  # fmt: skip
    splits, chunk, constants, options = _launch("hand_out", qkv, heads, agents)
    _hand_out_kernel[(b * heads * splits,)](
        query, agent, gathered, out, n, agents, heads, d, spacing, splits, chunk, d**-0.5,
        *constants, **options,
    )  # fmt: skip
    if weight is not None:
        out = stencil(value, weight, bias, (height, width), out)
    return out, agent, gathered, logs


@launched(
    "agent_core_backward",
    f"(Tensor grad, Tensor agent, Tensor gathered, Tensor logs, {SCHEMA}) "
    "-> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor, agent: Tensor, gathered: Tensor, logs: Tensor, qkv: Tensor,
    weight: Tensor | None, bias: Tensor | None, heads: int, height: int, width: int, rows: int,
    columns: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of tokens, and of the convolution's kernels and biases."""
    (qkv, spacing), (grad, g_row) = _rows(qkv), _rows(grad)
    query, key, value = qkv.chunk(3, dim=-1)
    b, n, c = query.shape
    d, agents, grid = c // heads, rows * columns, (height, width)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=qkv.device)

    grads = new(b, n, 3 * c, dtype=qkv.dtype)
    local, of_weight, of_bias = grad, new(0), new(0)
    if weight is not None:
        local = stencil(grad, weight, None, grid, is_transposed=True)
        of_weight, of_bias = stencil_weight_gradient(value, grad, grid, weight)
    if not grads.numel():
        return grads, of_weight, of_bias
    grad_q, grad_k, grad_v = grads.chunk(3, dim=-1)
    of_agent, along = new(b, agents, c), new(b, heads, agents)
    of_value = new(b, agents, c, dtype=qkv.dtype)
    splits, chunk, constants, options = _launch("hand_out_gradient", qkv, heads, agents)
    partial = new(b * heads * splits, 2, agents, d)
    _hand_out_gradient_kernel[(b * heads * splits,)](
        grad, query, agent, gathered, grad_q, partial, n, agents, heads, d, g_row, spacing, 3 * c,
        splits, chunk, d**-0.5, *constants, **options,
    )  # fmt: skip
    _turn_kernel[(b * heads * agents,)](
        partial, gathered, of_agent, of_value, along, agents, heads, d, splits,
        triton.next_power_of_2(splits), _width(d), num_warps=1,
    )  # fmt: skip
    splits, chunk, constants, options = _launch("gather_gradient", qkv, heads, agents)
    partial = new(b * heads * splits, agents, d)
    _gather_gradient_kernel[(b * heads * splits,)](
        key, value, agent, of_value, along, logs, local, grad_k, grad_v, partial, n, agents, heads,
        d, spacing, 3 * c, splits, chunk, d**-0.5, weight is not None, *constants, **options,
    )  # fmt: skip
    _spread_kernel[(b * heads * agents,)](
        of_agent, partial, agents, heads, d, splits, agents / n, triton.next_power_of_2(splits),
        _width(d), num_warps=1,
    )  # fmt: skip
    _add_mean_kernel[(_ceil(b * n, 16), _ceil(c, 128))](
        grad_q, of_agent, b * n, width, columns, height // rows, width // columns, c, 3 * c, 16,
        128, num_warps=4,
    )  # fmt: skip
    return grads, of_weight, of_bias


@_forward.register_fake
def _(qkv: Tensor, weight: Any, bias: Any, heads: int, *sizes: int) -> tuple[Tensor, ...]:
    b, n, c = qkv.shape
    agents = sizes[2] * sizes[3]
    return (
        qkv.new_empty(b, n, c // 3),
        qkv.new_empty(b, agents, c // 3),
        qkv.new_empty(b, agents, c // 3),
        qkv.new_empty(b, heads, agents, dtype=torch.float32),
    )


@_backward.register_fake
def _(
    grad: Tensor, agent: Tensor, gathered: Tensor, logs: Tensor, qkv: Tensor,
    weight: Tensor | None, *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    none = logs.new_empty(0)
    if weight is None:
        return qkv.new_empty(qkv.shape), none, none.clone()
    return (
        qkv.new_empty(qkv.shape), weight.new_empty(weight.shape), weight.new_empty(len(weight)),
    )  # fmt: skip


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    qkv, weight, bias, *ctx.sizes = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], qkv, weight, bias)


def _gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    *saved, weight, bias = ctx.saved_tensors
    of_qkv, *of_conv = _backward(grad, *saved, weight, bias, *ctx.sizes)
    of_conv = [
        None if z is None else g.to(z.dtype) for g, z in zip(of_conv, (weight, bias), strict=True)
    ]
    return of_qkv, *of_conv, None, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup)


def agent_core(
    qkv: Tensor, weight: Tensor | None, bias: Tensor | None, heads: int, grid: tuple[int, int],
    pooled: tuple[int, int],
) -> Tensor:  # fmt: skip
    """See ``attnzoo.ops.agent_core``; scores and sums in float32."""
    return _forward(qkv.to(operand_dtype(qkv)), weight, bias, heads, *grid, *pooled)[0]
