"""Token-wise DyDiLA by kernels: routed power map and token difference in one pass.

The backward has a file of its own.
"""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.ops.depthwise_conv.triton import depthwise_conv
from attnzoo.ops.dispatch import is_inference
from attnzoo.ops.linear_core import linear_tokens, slower
from attnzoo.ops.linear_core.torch import half_attention
from attnzoo.ops.power_map.triton import _pivot
from attnzoo.ops.routed_linear.triton import _decide, routed_pair
from attnzoo.ops.token_difference.operands import SCHEMA, Operands, Weights
from attnzoo.ops.token_difference.triton_backward import (
    _are_many,
    _columns,
    _exponent,
    _of_head,
    _relu,
    _risen,
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
    sample_sum,
)
from attnzoo.ops.triton_replay import replayed


@triton.jit
def _part(line, column, d, EVEN: tl.constexpr):
    """Columns of the rows that ``line`` points to."""
    if EVEN:
        return tl.load(line + column[None, :])
    return tl.load(line + column[None, :], mask=(column < d)[None, :], other=0.0)


@triton.jit
def _in_order(tile, W: tl.constexpr, E: tl.constexpr):
    """A tile (rows, columns) with its columns, and the rows of W warps, in another order.

    A product may sum over columns in any order. In this one a thread's part of the operand is
    what it loaded, 16 bytes of a row at once; E entries fill a register.
    """
    R: tl.constexpr = tile.shape[0]
    C: tl.constexpr = tile.shape[1]
    tile = tl.reshape(tile, (R // (16 * W), 2, W, 8, 4, C // (4 * E), E))
    return tl.reshape(tl.permute(tile, (0, 2, 1, 3, 5, 4, 6)), (R, C))


@triton.jit
def _in_rows(logits, W: tl.constexpr):
    """What ``_routed`` returns, with its rows in their own order."""
    R: tl.constexpr = logits.shape[0]
    G: tl.constexpr = logits.shape[1]
    logits = tl.reshape(logits, (R // (16 * W), W, 2, 8, G))
    return tl.reshape(tl.permute(logits, (0, 2, 1, 3, 4)), (R, G))


@triton.jit
def _routed(total, x, w, W: tl.constexpr, P: tl.constexpr):
    """Adds products of x (rows, columns) with a router's w (choices, columns)."""
    E: tl.constexpr = 32 // w.dtype.primitive_bitwidth
    w = tl.trans(_in_order(w, 1, E))
    return _add_dot(total, _in_order(x.to(w.dtype), W, E), w, P)


@triton.jit
def _falling(line, gamma, peak, d, C: tl.constexpr, EVEN: tl.constexpr):
    """(pivot, norm of ReLU(z)) of rows, where the smallest positive entry may be the pivot."""
    low = tl.full(peak.shape, _LARGEST, tl.float32)
    squares = tl.zeros(peak.shape, tl.float32)
    for first in range(0, d, C):
        x = _part(line, first + tl.arange(0, C), d, EVEN).to(tl.float32)
        low = tl.minimum(low, tl.min(tl.where(x > _NORMAL, x, _LARGEST), 1))
        ratio = tl.where(x <= 0, 0.0, x) * (1.0 / peak)[:, None]
        squares += tl.sum(ratio * ratio, 1)
    return _pivot(gamma, low, peak), peak * tl.sqrt(squares)


@triton.jit
def _keep(place, index, line, p, is_row, choices):
    """Stores a decision and its probabilities."""
    choice = tl.arange(0, p.shape[1])[None, :]
    tl.store(place, index, mask=is_row)
    tl.store(line[:, None] + choice, p, mask=is_row[:, None] & (choice < choices))


@triton.jit
def _is_extreme(peak):
    """Of rows, whether squares leave float32's range; rows of zeros do not."""
    return (peak > 1e15) | ((peak < 1e-12) & (peak > _NORMAL))


@triton.jit
def _powers(
    line, router, table, choices, difference_router, n_lambda, key_sum, kept, kept_line, is_row,
    d, head_dim, dtype: tl.constexpr, NORMALIZE: tl.constexpr, SAVE: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, H: tl.constexpr, G: tl.constexpr, L: tl.constexpr,
    P: tl.constexpr, FAST: tl.constexpr, EVEN: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """What turns rows into their powers, and sums over these.

    Returns:
        The exponent, one over the pivot, the norm of the unscaled powers, what restores the norm,
        and of the powers so scaled products with the difference router (R, L) and, for each head,
        with ``key_sum`` (R, H).
    """
    peak = tl.full((R,), _NORMAL, tl.float32)
    squares = tl.zeros((R,), tl.float32)
    logits = tl.zeros((R, G), tl.float32)
    # Choices past the last are the last once more, so that no load needs a mask.
    router += tl.minimum(tl.arange(0, G), choices - 1)[:, None] * d
    for first in range(0, d, C):
        column = first + tl.arange(0, C)
        x = _part(line, column, d, EVEN)
        logits = _routed(logits, x, _part(router, column, d, EVEN), W, P)
        x = _relu(x)
        peak = tl.maximum(peak, tl.max(x, 1))
        squares += tl.sum(x * x, 1)
    gamma, p, index = _decide(_in_rows(logits, W), table, choices, dtype, G)
    if SAVE:
        _keep(kept, index, kept_line, p, is_row, choices)
    pivot, length = peak, tl.sqrt(squares)
    # Rare enough for a walk of its own: exponents that fall, and squares out of range.
    is_rare = (gamma < 0.0) | _is_extreme(peak)
    if tl.max(is_rare.to(tl.int32), 0) > 0:
        pivot, length = _falling(line, gamma, peak, d, C, EVEN)
    inverse, exponent = 1.0 / pivot, _exponent(gamma)

    squares = tl.zeros((R,), tl.float32)
    along = tl.zeros((R,), tl.float32)
    normals = tl.zeros((R, H), tl.float32)
    heads = tl.arange(0, H)[None, :]
    logits = tl.zeros((R, L), tl.float32)
    difference_router += tl.minimum(tl.arange(0, L), n_lambda - 1)[:, None] * (2 * d)
    for first in range(0, d, C):
        column = first + tl.arange(0, C)
        x = _part(line, column, d, EVEN).to(tl.float32)
        power = _risen(x, x * inverse[:, None], exponent, FAST)
        squares += tl.sum(power * power, 1)
        w = _part(difference_router, column, d, EVEN)
        logits = _routed(logits, power.to(dtype), w, W, P)
        if NORMALIZE:
            total = tl.load(key_sum + column, mask=column < d, other=0.0)
            sums_here = tl.sum(power * total[None, :], 1)
            if H == 1:
                along += sums_here
            else:
                normals += tl.where(heads == first // head_dim, sums_here[:, None], 0.0)
    if H == 1:
        normals = along[:, None]
    norm = tl.maximum(tl.sqrt(squares), _NORMAL)
    scale = length / norm
    logits = _in_rows(logits, W) * scale[:, None]
    return gamma, inverse, norm, scale, logits, normals * scale[:, None]


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
    gammas_row,
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
    W: tl.constexpr,
):
    # Tokens are walked three times, from memory once: for the exponents, for the norms and the
    # factor, and for the result. With several heads no tile of columns spans two of them.
    sample = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    inside = block * R + tl.arange(0, R)
    is_row = inside < n
    # Rows past the last are the last once more.
    row = sample.to(tl.int64) * n + tl.minimum(inside, n - 1)
    dtype: tl.constexpr = out.dtype.element_ty
    line1 = z1 + row[:, None] * z1_row
    line2 = z2 + row[:, None] * z2_row
    kept = probability + row * (2 * n_gamma + n_lambda)
    key_sum += sample * d

    gamma1, inverse1, norm1, scale1, logits1, normals = _powers(
        line1, r1, gammas, n_gamma, rd, n_lambda, key_sum, choices + row, kept, is_row,
        d, head_dim, dtype, NORMALIZE, SAVE, R, C, H, G, L, P, FAST, EVEN, W,
    )  # fmt: skip
    gamma2, inverse2, norm2, scale2, logits2, _ = _powers(
        line2, r2, gammas + gammas_row, n_gamma, rd + d, n_lambda, key_sum, choices + rows + row,
        kept + n_gamma, is_row,
        d, head_dim, dtype, False, SAVE, R, C, 1, G, L, P, FAST, EVEN, W,
    )  # fmt: skip
    factor, p, index = _decide(logits1 + logits2, lambdas, n_lambda, dtype, L)
    if SAVE:
        _keep(choices + 2 * rows + row, index, kept + 2 * n_gamma, p, is_row, n_lambda)

    power1, power2 = _exponent(gamma1), _exponent(gamma2)
    gain, share = tl.where(is_row, scale1, 0.0), scale2 * factor
    heads = tl.arange(0, H)
    if NORMALIZE:
        normals += eps
        if SAVE:
            is_head = is_row[:, None] & (heads[None, :] * head_dim < d)
            tl.store(stats + (9 + heads[None, :]) * rows + row[:, None], normals, mask=is_head)
        if H == 1:
            over = 1.0 / _of_head(normals, 0, H)
            gain *= over
            share *= over
    for first in range(0, d, C):
        column = first + tl.arange(0, C)
        x = _part(line1, column, d, EVEN).to(tl.float32)
        result = _risen(x, x * inverse1[:, None], power1, FAST) * gain[:, None]
        x = _part(line2, column, d, EVEN).to(tl.float32)
        redundant = _risen(x, x * inverse2[:, None], power2, FAST) * share[:, None]
        if not NORMALIZE:
            # Rows that are not there are 0.
            place = tl.program_id(0).to(tl.int64) * d + column
            tl.store(sums + place, tl.sum(result, 0), mask=column < d)
        result -= redundant
        if NORMALIZE and H > 1:
            result *= (1.0 / _of_head(normals, first // head_dim, H))[:, None]
        mask = is_row[:, None] if EVEN else is_row[:, None] & (column < d)[None, :]
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


# Rows and columns of a tile, warps and stages, by whether rows are many and whether they are wide.
# A warp takes the sixteen rows of one product, and a tile the columns that four threads load, 16
# bytes each: with others ``_in_order`` saves nothing. Each tile loads its part of the routers:
# with 32 rows, many of them take 1.3 times as long. Few are split over more warps, for they leave
# a GPU idle.
DIFFERENCE_BLOCK = {
    (True, False): (64, 32, 4, 3), (True, True): (64, 64, 4, 3),
    (False, False): (16, 64, 4, 3), (False, True): (32, 64, 4, 3),
}  # fmt: skip
EXACT_DIFFERENCE_BLOCK = (32, 16, 2, 1)
MOST_COLUMNS = 512  # of rows that are not wide
# Of a thread, for many rows: what decisions spill costs less than warps that find no room. Wide
# rows that keep what the backward needs spill too much.
MOST_REGISTERS, WIDE_REGISTERS = 128, 168


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
    is_many, is_wide = _are_many(rows, z1), d > MOST_COLUMNS
    block, registers = DIFFERENCE_BLOCK[is_many, is_wide], MOST_REGISTERS
    if is_wide:
        registers = 0 if save else WIDE_REGISTERS
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
    limit = {"maxnreg": registers} if is_many and _is_fast() and registers else {}
    if rows:
        launch_kernel(_difference_kernel, (b * blocks,),
            z1, z2, r1, r2, gammas, rd, lambdas, out if key_sum is None else key_sum,
            out, sums, stats, choices, probability, n, rows, d, spacing1, spacing2,
            gammas.stride(0), n_gamma, n_lambda, eps, blocks, d // heads, key_sum is not None,
            save, size, chunk, _power_of_2(heads), _width(n_gamma), _width(n_lambda),
            _precision(r1.dtype), _is_fast(), d % chunk == 0, min(warps, size // 16),
            num_warps=warps, num_stages=stages, **limit,
        )  # fmt: skip
    # Queries, which bring a sum, have none: nothing to launch for.
    sums = sample_sum(sums) if key_sum is None else sums.flatten(1)
    return out, sums, stats, choices, probability


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
    p, (_, _, *saved) = Operands(*inputs), output
    ctx.set_materialize_grads(False)
    ctx.options = p[9:]
    ctx.save_for_backward(*saved, *p[:7], p.key_sum)


def _gradients(
    ctx: Any, grad: Tensor, grad_sum: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    *saved, key_sum = ctx.saved_tensors
    p = Operands(*saved[3:], None, key_sum, *ctx.options)
    if key_sum is None and grad_sum is None:
        grad_sum = p.gammas.new_zeros(p.z1.shape[0], p.z1.shape[2])
    z1, z2, gate, routers, gammas, lambdas, grad_key_sum = difference_backward(
        grad, grad_sum, *saved[:3], *p
    )
    # Without a straight-through gradient routers get none, not 0.
    learned = split_routers(routers, p) if p.learn else [None] * 3
    return (
        z1, z2, *learned, gammas, lambdas, gate if p.learn else None,
        None if key_sum is None else grad_key_sum, *[None] * 4,
    )  # fmt: skip


def split_routers(found: Tensor, p: Operands) -> list[Tensor]:
    """Gradients of r1, r2 and rd that lie one behind the other."""
    routers = p.r1, p.r2, p.rd
    parts = found.split([router.numel() for router in routers])
    return [z.view(router.shape) for z, router in zip(parts, routers, strict=True)]


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
        operands = (tokens, redundant, *kernel_routers, gammas, difference_router, lambdas, gate)
        save = any(z is not None and z.requires_grad for z in (*operands, key_sum))
    if not is_inference():  # the kernel reads any type; gradients are of float32
        gammas, lambdas = gammas.float(), lambdas.float()
    return difference_forward(
        tokens, redundant, *kernel_routers, difference_router, gammas, lambdas.contiguous(), gate,
        key_sum, eps, heads if key_sum is not None else 1, learn, save,
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
    routers = *weights.kernel_routers, *weights.difference_routers
    operands = weights.gammas, weights.lambdas, *weights.projector_routers, *weights.projectors
    core = _replayed_core if is_inference() else _core
    return core(x, query, key, value, *operands, *routers, eps, learn, heads)


def _core(
    x: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gammas: Tensor,
    lambdas: Tensor,
    *operands: Any,
) -> Tensor:
    """``dynamic_differential_attention`` of all weights side by side.

    Queries leave their kernel divided by their normalizers, so that plain products are left.
    """
    *routers, eps, learn, heads = operands
    projector_routers, projectors = routers[:2], routers[2:4]
    kernel_routers, difference_routers = routers[4:8], routers[8:]
    primes, _, gates = routed_pair(x, projector_routers, projectors)
    gammas = gammas.contiguous().expand(max(2, len(gammas)), -1)  # one row may serve all
    step = len(gammas) // 2
    query_prime, key_prime = primes.unbind(0)
    key, key_sum = focused_difference(
        key, key_prime, kernel_routers[1::2], gammas[step - 1 :: step], difference_routers[1],
        lambdas[-1], gates[1], learn=learn,
    )  # fmt: skip
    query, _ = focused_difference(
        query, query_prime, kernel_routers[::2], gammas[::step], difference_routers[0], lambdas[0],
        gates[0], key_sum, eps, learn, heads,
    )  # fmt: skip
    if slower(query.shape[-1] // heads, is_normalized=False) is None:
        return linear_tokens(query, key, value, heads, is_normalized=False)
    if heads == 1:
        return half_attention(query, key, value)
    query, key, value = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in (query, key, value))
    return half_attention(query, key, value).transpose(1, 2).flatten(2)


_replayed_core = replayed(_core)


def between_projections(core: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What a layer computes of packed tokens where no gradient is wanted, as one replay.

    Args:
        core: Of x, Q, K, V, and what else there is.

    Returns:
        A function of x (b, h * w, d), of Q, K and V side by side (b, h * w, 3 d), of the weight
        and bias of a convolution of V that is added, or None, of h and w, and of what else the
        core takes. It casts weights of products to the type of Q, K and V.
    """

    def attend(
        x: Tensor,
        qkv: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        height: int,
        width: int,
        gammas: Tensor,
        lambdas: Tensor,
        *operands: Any,
    ) -> Tensor:
        *weights, eps, heads = operands
        query, key, value = qkv.chunk(3, dim=-1)
        x, *weights = (z if z.dtype is qkv.dtype else z.to(qkv.dtype) for z in (x, *weights))
        out = core(x, query, key, value, gammas, lambdas, *weights, eps, False, heads)
        return out if weight is None else depthwise_conv(value, (height, width), weight, bias, out)

    return replayed(attend)


attend = between_projections(_core)
