"""Map-wise DyDiLA by kernels: all that comes before the two products of its maps.

Features of both maps lie side by side, queries over their normalizers and the second map's times
-lambda. So keys and values make one state, and one product of twice the depth is the difference.
"""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo.ops.dispatch import is_inference
from attnzoo.ops.linear_core.torch import is_quadratic_cheaper, wide_bmm
from attnzoo.ops.map_difference.operands import SCHEMA, Operands
from attnzoo.ops.map_difference.triton_backward import (
    ROWS,
    Tiles,
    _add_logits,
    _columns,
    _limit,
    _loaded,
    _ordered,
    _stored,
    _table,
    _vector,
    map_backward,
)
from attnzoo.ops.power_map.triton import _pivot
from attnzoo.ops.routed_linear.triton import _decide, routed_pair
from attnzoo.ops.token_difference import Weights
from attnzoo.ops.token_difference.triton import _keep, between_projections
from attnzoo.ops.token_difference.triton_backward import _exponent, _relu, _risen
from attnzoo.ops.triton_common import (
    _LARGEST,
    _NORMAL,
    _ceil,
    _is_fast,
    _precision,
    _rows,
    _width,
    column_sum,
    launch_kernel,
    launched,
)
from attnzoo.ops.triton_replay import replayed


@triton.jit
def _powers(
    z, z_row, router, table, choices, kept, kept_line, stats, row, rows, is_row, d,
    dtype: tl.constexpr, SAVE: tl.constexpr, N: tl.constexpr, W: tl.constexpr, G: tl.constexpr,
    P: tl.constexpr, FAST: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Rows to the power that each chooses, in tiles of columns, and what restores their norm."""
    xs = _loaded(z, row, z_row, is_row, d, N, W, EVEN)
    logits = tl.zeros((W, ROWS, G), tl.float32)
    high = tl.zeros((W, ROWS), tl.float32)
    low = tl.full((W, ROWS), _LARGEST, tl.float32)
    for i in tl.static_range(N):
        logits = _add_logits(logits, xs[i], _table(router, d, d, choices, i, W, G, dtype), P)
        x = _relu(xs[i])
        high = tl.maximum(high, tl.max(x, 2))
        low = tl.minimum(low, tl.min(tl.where(x > _NORMAL, x, _LARGEST), 2))
    gamma, p, index = _decide(tl.sum(logits, 0), table, choices, dtype, G)
    peak = tl.maximum(tl.max(high, 0), _NORMAL)
    inverse = 1.0 / _pivot(gamma, tl.min(low, 0), peak)
    exponent = _exponent(gamma)
    squares = tl.zeros((W, ROWS), tl.float32)
    of_powers = tl.zeros((W, ROWS), tl.float32)
    powers = ()
    for i in tl.static_range(N):
        x = _relu(xs[i])
        ratio = x * (1.0 / peak)[:, None]
        squares += tl.sum(ratio * ratio, 2)
        power = _risen(x, x * inverse[:, None], exponent, FAST)
        of_powers += tl.sum(power * power, 2)
        powers += (power,)
    norm = tl.maximum(tl.sqrt(tl.sum(of_powers, 0)), _NORMAL)
    scale = peak * tl.sqrt(tl.sum(squares, 0)) / norm
    if SAVE:
        _keep(kept, index, kept_line, p, is_row, choices)
        tl.store(stats + row, gamma, mask=is_row)
        tl.store(stats + rows + row, inverse, mask=is_row)
        tl.store(stats + 2 * rows + row, norm, mask=is_row)
        tl.store(stats + 3 * rows + row, scale, mask=is_row)
    return powers, scale


@triton.jit
def _sums_of_queries(
    powers, scale, router, n_lambda, key_sum, eps, stats, row, rows, is_row, d,
    dtype: tl.constexpr, SAVE: tl.constexpr, W: tl.constexpr, L: tl.constexpr, P: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """The normalizer of each row, and its part of the logits of lambda."""
    logits = tl.zeros((W, ROWS, L), tl.float32)
    along = tl.zeros((W, ROWS), tl.float32)
    for i in tl.static_range(len(powers)):
        w = _table(router, 2 * d, d, n_lambda, i, W, L, dtype)
        logits = _add_logits(logits, powers[i].to(dtype), w, P)
        along += tl.sum(powers[i] * _vector(key_sum, is_row, d, i, W, EVEN), 2)
    normal = tl.sum(along, 0) * scale + eps
    if SAVE:
        tl.store(stats + 4 * rows + row, normal, mask=is_row)
    return normal, tl.sum(logits, 0) * scale[:, None]


@triton.jit
def _write(
    out, powers, gain, sums, row, is_row, d, SUM: tl.constexpr, W: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Stores rows times their gain, and their sum over the rows."""
    for i in tl.static_range(len(powers)):
        result = powers[i] * gain[:, None]
        _stored(out, result, row, 2 * d, is_row, d, i, W, EVEN)
        if SUM:  # rows that are not there are 0
            column = _columns(i, W)[:, None, :]
            total = tl.sum(result, 1)[:, None, :]
            place = _ordered(sums + column, out.dtype.element_ty)
            tl.store(place, total, mask=_ordered(column < d, out.dtype.element_ty))


@triton.jit
def _map_features_kernel(
    z1, z2, r1, r2, gammas, rd, lambdas, key_sum, out, sums, stats, choices, probability, n, rows,
    d, z1_row, z2_row, n_gamma, n_lambda, eps, blocks, samples, QUERY: tl.constexpr,
    SAVE: tl.constexpr, N: tl.constexpr, W: tl.constexpr, G: tl.constexpr, L: tl.constexpr,
    P: tl.constexpr, FAST: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    # Tokens are read once, and stay in registers until their features are written.
    sample = tl.program_id(0) // blocks
    block = (tl.program_id(0) % blocks).to(tl.int64)
    inside = block * ROWS + tl.arange(0, ROWS)
    is_row = inside < n
    row = sample.to(tl.int64) * n + inside
    dtype: tl.constexpr = out.dtype.element_ty
    width = 2 * n_gamma + (n_lambda if QUERY else 0)
    kept = probability + row * width
    sums += (block * samples + sample) * (2 * d)
    key_sum += sample * (2 * d)

    powers, scale = _powers(
        z1, z1_row, r1, gammas, n_gamma, choices + row, kept, stats, row, rows, is_row, d, dtype,
        SAVE, N, W, G, P, FAST, EVEN,
    )  # fmt: skip
    if QUERY:
        normal, logits = _sums_of_queries(
            powers, scale, rd, n_lambda, key_sum, eps, stats, row, rows, is_row, d, dtype, SAVE,
            W, L, P, EVEN,
        )  # fmt: skip
        scale /= normal
    _write(out, powers, scale, sums, row, is_row, d, not QUERY, W, EVEN)
    stats += 5 * rows
    powers, scale = _powers(
        z2, z2_row, r2, gammas, n_gamma, choices + rows + row, kept + n_gamma, stats, row, rows,
        is_row, d, dtype, SAVE, N, W, G, P, FAST, EVEN,
    )  # fmt: skip
    if QUERY:
        normal, others = _sums_of_queries(
            powers, scale, rd + d, n_lambda, key_sum + d, eps, stats, row, rows, is_row, d, dtype,
            SAVE, W, L, P, EVEN,
        )  # fmt: skip
        factor, p, index = _decide(logits + others, lambdas, n_lambda, dtype, L)
        scale *= -factor / normal
        if SAVE:
            _keep(choices + 2 * rows + row, index, kept + 2 * n_gamma, p, is_row, n_lambda)
            tl.store(stats + 5 * rows + row, factor, mask=is_row)
    _write(out + d, powers, scale, sums + d, row, is_row, d, not QUERY, W, EVEN)


# Of a thread, which leave an H100 sixteen warps.
FEATURE_REGISTERS = 128


class _Features(NamedTuple):
    """What the kernel leaves of queries or keys.

    Attributes:
        tokens: (b, n, 2 d).
        sums: Over the tokens, by program, (blocks, b, 2 d); of keys.
        stats: Statistics of the rows, (11, t), for the backward, as are the following.
        choices: (3, t) of queries, (2, t) of keys.
        probability: (t, 2 gammas + lambdas), or without lambdas.
    """

    tokens: Tensor
    sums: Tensor
    stats: Tensor
    choices: Tensor
    probability: Tensor


def _features(
    p: Operands, z1: Tensor, z2: Tensor, r1: Tensor, r2: Tensor, key_sum: Tensor | None
) -> _Features:
    b, n, d = z1.shape
    (z1, spacing1), (z2, spacing2) = _rows(z1), _rows(z2)
    tiles, is_query = Tiles.of(d, z1), key_sum is not None
    rows, blocks, n_gamma, n_lambda = b * n, _ceil(n, ROWS.value), len(p.gammas), len(p.lambdas)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=z1.device)

    kept = rows if p.save else 0
    found = _Features(
        new(b, n, 2 * d, dtype=z1.dtype),
        new(0 if is_query else blocks, b, 2 * d),
        new(11, kept),
        new(2 + is_query, kept, dtype=torch.int32),
        new(kept, 2 * n_gamma + is_query * n_lambda),
    )
    if rows:
        launch_kernel(_map_features_kernel, (b * blocks,),
            z1, z2, r1.contiguous(), r2.contiguous(), p.gammas, p.rd.contiguous(), p.lambdas,
            found.sums if key_sum is None else key_sum, *found, n, rows, d, spacing1, spacing2,
            n_gamma, n_lambda, p.eps, blocks, b, is_query, p.save, tiles.count, tiles.warps,
            _width(n_gamma), _width(n_lambda), _precision(r1.dtype), _is_fast(),
            d % tiles.columns == 0, num_warps=tiles.warps, **_limit(FEATURE_REGISTERS, z1),
        )  # fmt: skip
    return found


def _both_features(p: Operands) -> tuple[_Features, _Features, Tensor]:
    """Of queries and of keys, and the keys' sum, (b, 2 d)."""
    keys = _features(p, p.key, p.primes[1], p.key_router, p.prime_key_router, None)
    key_sum = column_sum(keys.sums, keys.tokens.dtype)
    routers = p.query_router, p.prime_query_router
    return _features(p, p.query, p.primes[0], *routers, key_sum), keys, key_sum


def _product(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Q K^T V in the cheaper order, and what it made on the way: the state, or the map."""
    if is_quadratic_cheaper(query.shape[1], key.shape[1], value.shape[2], value.shape[2]):
        between = wide_bmm(query, key.mT, False)
        return wide_bmm(between, value, False), between
    # Its sum over tokens is long; it is rounded once.
    between = wide_bmm(key.mT, value, True).to(key.dtype)
    return wide_bmm(query, between, False), between


@launched("map_attention", f"({SCHEMA}) -> ({', '.join(['Tensor'] * 11)})")
def map_forward(*operands: Any) -> tuple[Tensor, ...]:
    """The difference of two maps times V, of ``Operands``.

    Returns:
        The result (b, n, d), and for the backward features of queries and keys (b, n, 2 d), the
        state (b, 2 d, d) or map (b, n, n), the sum of the keys (b, 2 d), and what ``_Features``
        has behind them.
    """
    p = Operands(*operands)
    queries, keys, key_sum = _both_features(p)
    out, between = _product(queries.tokens, keys.tokens, p.value)
    return out, queries.tokens, keys.tokens, between, key_sum, *queries[2:], *keys[2:]


@map_forward.register_fake
def _(*operands: Any) -> tuple[Tensor, ...]:
    p = Operands(*operands)
    (b, n, d), n_gamma, n_lambda = p.query.shape, len(p.gammas), len(p.lambdas)
    rows, wide = b * n if p.save else 0, p.gammas.new_empty
    is_quadratic = is_quadratic_cheaper(n, n, d, d)
    between = (b, n, n) if is_quadratic else (b, 2 * d, d)
    new = p.query.new_empty
    return (
        new(b, n, d), new(b, n, 2 * d), new(b, n, 2 * d), new(between), new(b, 2 * d),
        wide(11, rows), wide(3, rows, dtype=torch.int32), wide(rows, 2 * n_gamma + n_lambda),
        wide(11, rows), wide(2, rows, dtype=torch.int32), wide(rows, 2 * n_gamma),
    )  # fmt: skip


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    p = Operands(*inputs)
    ctx.set_materialize_grads(False)
    ctx.options = p[12:]
    ctx.save_for_backward(*output[1:], *p[:12])


def _gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * len(Operands._fields)
    saved = ctx.saved_tensors
    p = Operands(*saved[10:], *ctx.options)
    *tokens, of_queries, of_keys, scalars = map_backward(grad, *saved[:10], *p)
    n, routers = len(p.gammas), [None] * 5
    if p.learn:
        of_queries, of_keys = of_queries.to(p.rd.dtype), of_keys.to(p.rd.dtype)
        routers = [*of_queries[: 2 * n].split(n), *of_keys.split(n)]
        routers.append(of_queries[2 * n :].view_as(p.rd))
    else:  # without a straight-through gradient routers get none, not 0
        tokens[-1] = None
    return *tokens, *routers, scalars[:n], scalars[n:], None, None, None


map_forward.register_autograd(_gradients, setup_context=_setup)


def dynamic_map_attention(
    x: Tensor, query: Tensor, key: Tensor, value: Tensor, weights: Weights, eps: float,
    learn: bool,
) -> Tensor:  # fmt: skip
    """See ``attnzoo.ops.map_difference``."""
    operands = weights.gammas, weights.lambdas, *weights.projector_routers, *weights.projectors
    operands = *operands, *weights.kernel_routers, *weights.difference_routers, eps, learn, 1
    return (_replayed_core if is_inference() else _core)(x, query, key, value, *operands)


def _core(
    x: Tensor, query: Tensor, key: Tensor, value: Tensor, gammas: Tensor, lambdas: Tensor,
    *operands: Any,
) -> Tensor:  # fmt: skip
    """``dynamic_map_attention`` of all weights side by side, of one head."""
    *routers, eps, learn, _ = operands
    primes, _, gates = routed_pair(x, routers[:2], routers[2:4])
    routers, scalars = (*routers[4:8:2], *routers[5:8:2], routers[8]), (gammas[0], lambdas[0])
    if not is_inference():  # the kernel reads any type; gradients are of float32
        scalars = [z.float() for z in scalars]
    operands = query, key, value, primes, gates, *routers, *[z.contiguous() for z in scalars]
    # Only a call that may be differentiated keeps what its backward needs.
    save = torch.is_grad_enabled() and any(z.requires_grad for z in operands)
    return map_forward(*operands, eps, learn, save)[0]


_replayed_core = replayed(_core)
attend = between_projections(_core)
