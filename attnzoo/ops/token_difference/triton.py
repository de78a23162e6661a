"""Token-wise DyDiLA by kernels: routed power map and token difference in one pass.

The backward has a file of its own.
"""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.ops.dispatch import is_inference
from attnzoo.ops.linear_core import linear_tokens, slower
from attnzoo.ops.linear_core.torch import half_attention
from attnzoo.ops.power_map.triton import _pivot
from attnzoo.ops.precision import operand_dtype
from attnzoo.ops.routed_linear.triton import _decide, routed_pair
from attnzoo.ops.token_difference.operands import SCHEMA, Operands, Weights
from attnzoo.ops.token_difference.triton_backward import (
    _are_many,
    _columns,
    _exponent,
    _of_head,
    _relu,
    _risen,
    _tile,
    _weights,
    difference_backward,
)
from attnzoo.ops.triton_common import (
    _LARGEST,
    _NORMAL,
    _add_dot,
    _ceil,
    _is_fast,
    _power_of_2,
    _precision,
    _rows,
    _width,
    launch_kernel,
    launched,
)
from attnzoo.ops.triton_replay import replayed


@triton.jit
def _falling(line, is_row, gamma, peak, d, R: tl.constexpr, C: tl.constexpr):
    """(pivot, norm of ReLU(z)) of rows, where the smallest positive entry may be the pivot."""
    low = tl.full((R, C), _LARGEST, tl.float32)
    squares = tl.zeros((R, C), tl.float32)
    for first in range(0, d, C):
        column = first + tl.arange(0, C)
        mask = is_row[:, None] & (column < d)[None, :]
        x = tl.load(line + column[None, :], mask=mask, other=0.0).to(tl.float32)
        low = tl.minimum(low, tl.where(x > _NORMAL, x, _LARGEST))
        ratio = tl.where(x <= 0, 0.0, x) * (1.0 / peak)[:, None]
        squares += ratio * ratio
    return _pivot(gamma, tl.min(low, 1), peak), peak * tl.sqrt(tl.sum(squares, 1))


@triton.jit
def _is_extreme(peak):
    """Of rows, whether squares leave float32's range; rows of zeros do not."""
    return (peak > 1e15) | ((peak < 1e-12) & (peak > _NORMAL))


@triton.jit
def _difference_kernel(
    z1,
    z2,
    r1,
    r2,
    gammas,
    rd,
    lambdas,
    key_sum,
    out,
    sums,
    stats,
    choices,
    probability,
    n,
    rows,
    d,
    z1_row,
    z2_row,
    n_gamma,
    n_lambda,
    eps,
    blocks,
    head_dim,
    NORMALIZE: tl.constexpr,
    SAVE: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    FAST: tl.constexpr,
    EVEN: tl.constexpr,
):
    # Tokens are walked three times, from memory once: for the exponents, for the norms and the
    # factor, and for the result. With several heads no tile of columns spans two of them.
    sample = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    inside = block * R + tl.arange(0, R)
    is_row = inside < n
    row = sample.to(tl.int64) * n + inside
    dtype: tl.constexpr = out.dtype.element_ty
    line1 = z1 + row[:, None] * z1_row
    line2 = z2 + row[:, None] * z2_row

    peak_tile1 = tl.zeros((R, C), tl.float32)
    peak_tile2 = tl.zeros((R, C), tl.float32)
    units1 = tl.zeros((R, C), tl.float32)
    units2 = tl.zeros((R, C), tl.float32)
    logits1 = tl.zeros((R, G), tl.float32)
    logits2 = tl.zeros((R, G), tl.float32)
    for first in range(0, d, C):
        column = first + tl.arange(0, C)
        x = _tile(line1, column, is_row, d, EVEN)
        y = _tile(line2, column, is_row, d, EVEN)
        w = _weights(r1, d, d, n_gamma, column, G)
        logits1 = _add_dot(logits1, x.to(w.dtype), tl.trans(w), P)
        x = _relu(x)
        peak_tile1 = tl.maximum(peak_tile1, x)
        units1 += x * x
        w = _weights(r2, d, d, n_gamma, column, G)
        logits2 = _add_dot(logits2, y.to(w.dtype), tl.trans(w), P)
        y = _relu(y)
        peak_tile2 = tl.maximum(peak_tile2, y)
        units2 += y * y
    gamma1, p1, c1 = _decide(logits1, gammas, n_gamma, dtype, G)
    gamma2, p2, c2 = _decide(logits2, gammas + n_gamma, n_gamma, dtype, G)
    peak1 = tl.maximum(tl.max(peak_tile1, 1), _NORMAL)
    peak2 = tl.maximum(tl.max(peak_tile2, 1), _NORMAL)
    pivot1, pivot2 = peak1, peak2
    length1, length2 = tl.sqrt(tl.sum(units1, 1)), tl.sqrt(tl.sum(units2, 1))
    power1, power2 = _exponent(gamma1), _exponent(gamma2)
    # Rare enough for a walk of its own: exponents that fall, and squares out of range.
    is_rare = (tl.minimum(gamma1, gamma2) < 0.0) | _is_extreme(peak1) | _is_extreme(peak2)
    if tl.max(is_rare.to(tl.int32), 0) > 0:
        pivot1, length1 = _falling(line1, is_row, gamma1, peak1, d, R, C)
        pivot2, length2 = _falling(line2, is_row, gamma2, peak2, d, R, C)
    inverse1, inverse2 = 1.0 / pivot1, 1.0 / pivot2

    squares1 = tl.zeros((R, C), tl.float32)
    squares2 = tl.zeros((R, C), tl.float32)
    along = tl.zeros((R, C), tl.float32)
    normals = tl.zeros((R, H), tl.float32)
    heads = tl.arange(0, H)
    logits1 = tl.zeros((R, L), tl.float32)
    logits2 = tl.zeros((R, L), tl.float32)
    for first in range(0, d, C):
        column = first + tl.arange(0, C)
        x = _tile(line1, column, is_row, d, EVEN).to(tl.float32)
        power = _risen(x, x * inverse1[:, None], power1, FAST)
        squares1 += power * power
        w = _weights(rd, 2 * d, d, n_lambda, column, L)
        logits1 = _add_dot(logits1, power.to(dtype).to(w.dtype), tl.trans(w), P)
        if NORMALIZE:
            total = tl.load(key_sum + sample * d + column, mask=column < d, other=0.0)
            if H == 1:
                along += power * total[None, :]
            else:
                sums_here = tl.sum(power * total[None, :], 1)[:, None]
                normals += tl.where(heads[None, :] == first // head_dim, sums_here, 0.0)
        x = _tile(line2, column, is_row, d, EVEN).to(tl.float32)
        power = _risen(x, x * inverse2[:, None], power2, FAST)
        squares2 += power * power
        w = _weights(rd + d, 2 * d, d, n_lambda, column, L)
        logits2 = _add_dot(logits2, power.to(dtype).to(w.dtype), tl.trans(w), P)
    norm1 = tl.maximum(tl.sqrt(tl.sum(squares1, 1)), _NORMAL)
    norm2 = tl.maximum(tl.sqrt(tl.sum(squares2, 1)), _NORMAL)
    scale1, scale2 = length1 / norm1, length2 / norm2
    logits = logits1 * scale1[:, None] + logits2 * scale2[:, None]
    factor, pd, cd = _decide(logits, lambdas, n_lambda, dtype, L)
    if NORMALIZE:
        if H == 1:
            normals = tl.sum(along, 1)[:, None]
        normals = normals * scale1[:, None] + eps

    share = scale2 * factor
    for first in range(0, d, C):
        column = first + tl.arange(0, C)
        x = _tile(line1, column, is_row, d, EVEN).to(tl.float32)
        result = _risen(x, x * inverse1[:, None], power1, FAST)
        x = _tile(line2, column, is_row, d, EVEN).to(tl.float32)
        redundant = _risen(x, x * inverse2[:, None], power2, FAST)
        if NORMALIZE:
            over = 1.0 / _of_head(normals, first // head_dim, H)
            result *= (scale1 * over)[:, None]
            result -= redundant * (share * over)[:, None]
        else:
            result *= scale1[:, None]
            # Rows that are not there are 0.
            place = tl.program_id(0).to(tl.int64) * d + column
            tl.store(sums + place, tl.sum(result, 0), mask=column < d)
            result -= redundant * share[:, None]
        mask = is_row[:, None] & (column < d)[None, :]
        tl.store(out + row[:, None] * d + column[None, :], result.to(dtype), mask=mask)
    if SAVE:
        tl.store(stats + row, gamma1, mask=is_row)
        tl.store(stats + rows + row, inverse1, mask=is_row)
        tl.store(stats + 2 * rows + row, norm1, mask=is_row)
        tl.store(stats + 3 * rows + row, scale1, mask=is_row)
        tl.store(stats + 4 * rows + row, gamma2, mask=is_row)
        tl.store(stats + 5 * rows + row, inverse2, mask=is_row)
        tl.store(stats + 6 * rows + row, norm2, mask=is_row)
        tl.store(stats + 7 * rows + row, scale2, mask=is_row)
        tl.store(stats + 8 * rows + row, factor, mask=is_row)
        if NORMALIZE:
            is_head = is_row[:, None] & (heads[None, :] * head_dim < d)
            tl.store(stats + (9 + heads[None, :]) * rows + row[:, None], normals, mask=is_head)
        tl.store(choices + row, c1, mask=is_row)
        tl.store(choices + rows + row, c2, mask=is_row)
        tl.store(choices + 2 * rows + row, cd, mask=is_row)
        width = 2 * n_gamma + n_lambda
        g = tl.arange(0, G)
        is_g = is_row[:, None] & (g[None, :] < n_gamma)
        line = probability + row[:, None] * width
        tl.store(line + g[None, :], p1, mask=is_g)
        tl.store(line + n_gamma + g[None, :], p2, mask=is_g)
        lam = tl.arange(0, L)
        is_l = is_row[:, None] & (lam[None, :] < n_lambda)
        tl.store(line + 2 * n_gamma + lam[None, :], pd, mask=is_l)


# Rows and columns of a tile, warps and stages. Sixteen rows a warp, which is what one product of
# a warp takes: with fewer, several warps compute the same powers, which pays where few rows would
# leave most of a GPU idle.
DIFFERENCE_BLOCK = (64, 64, 4, 3)
FEW_DIFFERENCE_BLOCK = (16, 32, 2, 3)
EXACT_DIFFERENCE_BLOCK = (32, 32, 2, 3)


@launched("focused_difference", f"({SCHEMA}) -> ({', '.join(['Tensor'] * 5)})")
def difference_forward(*operands: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """phi(Z) - lambda phi(Z') of ``Operands``, with phi the routed power map.

    Returns:
        The difference (b, n, d), the sum of the powered z1 over n (b, d) or nothing, statistics of
        the rows (9 + heads, t), choices (3, t), probabilities (t, 2 gammas + lambdas) for the
        backward.
    """
    z1, z2, r1, r2, rd, gammas, lambdas, _, key_sum, eps, heads, _, save = Operands(*operands)
    b, n, d = z1.shape
    (z1, spacing1), (z2, spacing2) = _rows(z1), _rows(z2)
    r1, r2, rd = r1.contiguous(), r2.contiguous(), rd.contiguous()
    rows, n_gamma, n_lambda = b * n, gammas.shape[1], lambdas.numel()
    block = DIFFERENCE_BLOCK if _are_many(rows, z1) else FEW_DIFFERENCE_BLOCK
    size, chunk, warps, stages = block if z1.element_size() == 2 else EXACT_DIFFERENCE_BLOCK
    chunk = _columns(chunk, d // heads, heads)
    blocks = _ceil(n, size)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=z1.device)

    out = new(b, n, d, dtype=z1.dtype)
    sums = new(b, blocks if key_sum is None else 0, d)
    kept = rows if save else 0
    stats, choices = new(9 + heads, kept), new(3, kept, dtype=torch.int32)
    probability = new(kept, 2 * n_gamma + n_lambda)
    if rows:
        launch_kernel(_difference_kernel, (b * blocks,),
            z1, z2, r1, r2, gammas, rd, lambdas, out if key_sum is None else key_sum,
            out, sums, stats, choices, probability, n, rows, d, spacing1, spacing2,
            n_gamma, n_lambda, eps, blocks, d // heads, key_sum is not None, save, size, chunk,
            _power_of_2(heads), _width(n_gamma), _width(n_lambda),
            _precision(r1.dtype), _is_fast(), d % chunk == 0,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    # Queries, which bring a sum, have none: nothing to launch for.
    return out, sums.sum(1) if key_sum is None else sums.flatten(1), stats, choices, probability


@difference_forward.register_fake
def _(*operands: Any) -> tuple[Tensor, ...]:
    p = Operands(*operands)
    b, n, d = p.z1.shape
    rows = b * n if p.save else 0
    wide = p.gammas.new_empty
    return (
        p.z1.new_empty(b, n, d),
        wide(b, d if p.key_sum is None else 0),
        wide(9 + p.heads, rows),
        wide(3, rows, dtype=torch.int32),
        wide(rows, 2 * p.gammas.shape[1] + p.lambdas.shape[0]),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    p, (out, _, *saved) = Operands(*inputs), output
    ctx.set_materialize_grads(False)
    ctx.options = p[9:]
    ctx.save_for_backward(out, *saved, *p[:7], p.key_sum)


def _gradients(
    ctx: Any, grad: Tensor, grad_sum: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    *saved, key_sum = ctx.saved_tensors
    p = Operands(*saved[4:], None, key_sum, *ctx.options)
    if key_sum is None and grad_sum is None:
        grad_sum = p.gammas.new_zeros(p.z1.shape[0], p.z1.shape[2])
    z1, z2, gate, routers, scalars, grad_key_sum = difference_backward(
        grad, grad_sum, *saved[:4], *p
    )
    # Without a straight-through gradient routers get none, not 0.
    learned = [None] * 3
    if p.learn:
        r1, r2, base, redundant = routers.split([len(r) for r in (p.r1, p.r2, p.rd, p.rd)])
        learned = [r1, r2, torch.cat([base, redundant], 1)]
        learned = [z.to(r.dtype) for z, r in zip(learned, (p.r1, p.r2, p.rd), strict=True)]
    n_gamma = p.gammas.numel()
    gammas, lambdas = scalars[:n_gamma].view_as(p.gammas), scalars[n_gamma:]
    return (
        z1, z2, *learned, gammas, lambdas, gate if p.learn else None,
        None if key_sum is None else grad_key_sum, *[None] * 4,
    )  # fmt: skip


difference_forward.register_autograd(_gradients, setup_context=_setup)


def focused_difference(
    tokens: Tensor,
    redundant: Tensor,
    kernel_routers: Sequence[Tensor],
    gammas: Tensor,
    difference_router: Tensor,
    lambdas: Tensor,
    gate: Tensor,
    key_sum: Tensor | None = None,
    eps: float = 0.0,
    learn: bool = True,
    heads: int = 1,
) -> tuple[Tensor, Tensor]:
    """phi(Z) - lambda phi(Z') with phi the routed power map, reading Z and Z' once.

    The backward computes everything from Z and Z' again; it keeps a few numbers per token. See
    ``Operands``.

    Returns:
        (b, n, d) in the dtype of Z, and, where ``key_sum`` is None, the sum of phi(Z) over the
        tokens, (b, d) in float32.
    """
    # Only a call that may be differentiated keeps what its backward needs.
    save = torch.is_grad_enabled()
    if save:
        operands = (tokens, redundant, *kernel_routers, gammas, difference_router, lambdas)
        save = any(z.requires_grad for z in operands)
    return difference_forward(
        tokens, redundant, *kernel_routers, difference_router, gammas.float().contiguous(),
        lambdas.float().contiguous(), gate, key_sum, eps, heads if key_sum is not None else 1,
        learn, save,
    )[:2]  # fmt: skip


def dynamic_differential_attention(
    x: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Weights,
    eps: float,
    learn: bool,
    heads: int,
) -> Tensor:
    """See ``attnzoo.ops.token_difference``."""
    options = eps, learn, heads
    operands = x, query, key, weights.gammas, weights.lambdas
    routers = *weights.kernel_routers, *weights.difference_routers
    operands = *operands, *weights.projector_routers, *weights.projectors, *routers, *options
    # Without autocast, or after it: under another type the core might not be the kernels'.
    is_replayed = is_inference() and operand_dtype(x) is x.dtype
    if slower(query.shape[-1] // heads, is_normalized=False) is None:
        return (_replayed_attention if is_replayed else _attention)(*operands, value)
    query, key = (_replayed_differences if is_replayed else _differences)(*operands)
    if heads == 1:
        return half_attention(query, key, value)
    query, key, value = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in (query, key, value))
    return half_attention(query, key, value).transpose(1, 2).flatten(2)


def _differences(
    x: Tensor,
    query: Tensor,
    key: Tensor,
    gammas: Tensor,
    lambdas: Tensor,
    *operands: Any,
) -> tuple[Tensor, Tensor]:
    """Queries and keys of ``dynamic_differential_attention``, of all weights side by side.

    Queries leave their kernel divided by their normalizers, so that plain products are left.
    """
    *routers, eps, learn, heads = operands
    projector_routers, projectors = routers[:2], routers[2:4]
    kernel_routers, difference_routers = routers[4:8], routers[8:]
    primes, _, gates = routed_pair(x, projector_routers, projectors)
    lambdas = lambdas.float()
    if gammas.shape[0] == 1:  # one copy serves queries and keys
        gammas = gammas.expand(2, -1)
        gammas = gammas.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        of_queries = of_keys = gammas
    else:
        of_queries, of_keys = gammas[::2], gammas[1::2]
    query_prime, key_prime = primes.unbind(0)
    key, key_sum = focused_difference(
        key, key_prime, kernel_routers[1::2], of_keys, difference_routers[1], lambdas[-1],
        gates[1], learn=learn,
    )  # fmt: skip
    query, _ = focused_difference(
        query, query_prime, kernel_routers[::2], of_queries, difference_routers[0], lambdas[0],
        gates[0], key_sum, eps, learn, heads,
    )  # fmt: skip
    return query, key


def _attention(*operands: Any) -> Tensor:
    """``_differences``, and the core by kernels."""
    *of_differences, heads, value = operands
    query, key = _differences(*of_differences, heads)
    return linear_tokens(query, key, value, heads, is_normalized=False)


_replayed_differences, _replayed_attention = replayed(_differences), replayed(_attention)
