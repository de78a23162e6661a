"""Token-wise DyDiLA of packed tokens with its convolution, back into one gradient.

As operators of their own routed projections, differences, core and convolution would leave
gradients that PyTorch adds up, copies and puts side by side: of the tokens, of Q, K and V, and of
every table that several of them read.
"""

# Triton's stubs take a kernel for its Python function, whose launch has other arguments.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnzoo.ops.depthwise_conv.triton_branches import (
    _normed_branches,
    branch_gradients,
    split_branches,
)
from attnzoo.ops.dispatch import MACS
from attnzoo.ops.linear_core import linear_attention_macs, slower
from attnzoo.ops.linear_core.torch import wide_bmm
from attnzoo.ops.linear_core.triton import _linear_core, core_gradients
from attnzoo.ops.routed_linear.triton import (
    gate_gradients,
    grouped_input_gradient,
    grouped_product,
    grouped_weight_gradient,
    sort_by_expert,
    top1,
)
from attnzoo.ops.token_difference.operands import Operands, Weights
from attnzoo.ops.token_difference.triton import difference_forward, split_routers
from attnzoo.ops.token_difference.triton_backward import Parts, difference_gradients, new_parts
from attnzoo.ops.triton_common import _rows, column_sum, launched


class Conv(NamedTuple):
    """Three normed branches that are added; see ``normed_branches``, whose operands these are."""

    weights: tuple[Tensor, Tensor, Tensor]
    gains: Tensor
    shifts: Tensor
    eps: float
    processes: int


class Packed(NamedTuple):
    """What the operator ``packed_difference`` takes, in its order.

    Attributes:
        x: (b, n, d).
        qkv: (b, n, 3 d).
        p1: Projector router of Q', (projectors, d).
        p2: Of K'.
        w1: Projectors of Q', (projectors, d, d).
        w2: Of K'.
        k1: Kernel router of Q, (factors, d).
        k2: Of K.
        k3: Of Q'.
        k4: Of K'.
        d1: Difference router of queries, (factors', 2 d).
        d2: Of keys.
        gammas: (4, factors) or (1, factors), as in ``Weights``.
        lambdas: (2, factors') or (1, factors').
        square: The 3x3 branch of the convolution, or None without one, like the others.
        upright: The 3x1 branch.
        level: The 1x3 branch.
        gains: Of the norms, (3, d) in float32.
        shifts: Likewise.
        eps: Added to the normalizers.
        learn: Whether routers get the straight-through gradient of "ste".
        heads: How many.
        height: Of the grid.
        width: Likewise.
        conv_eps: Added to the variances.
        processes: How many norm together.
    """

    x: Tensor
    qkv: Tensor
    p1: Tensor
    p2: Tensor
    w1: Tensor
    w2: Tensor
    k1: Tensor
    k2: Tensor
    k3: Tensor
    k4: Tensor
    d1: Tensor
    d2: Tensor
    gammas: Tensor
    lambdas: Tensor
    square: Tensor | None
    upright: Tensor | None
    level: Tensor | None
    gains: Tensor | None
    shifts: Tensor | None
    eps: float
    learn: bool
    heads: int
    height: int
    width: int
    conv_eps: float
    processes: int

    def differences(self) -> tuple[Callable[[Tensor], list[Any]], list[Any]]:
        """``Operands`` from ``r1`` on, of queries by the keys' sum, and of keys."""
        gammas, lambdas = (z.float().contiguous() for z in (self.gammas, self.lambdas))
        gammas = gammas.expand(max(2, len(gammas)), -1)  # one may serve all
        step = len(gammas) // 2
        of_queries = [self.k1, self.k3, self.d1, gammas[::step], lambdas[0], None]
        of_keys = self.k2, self.k4, self.d2, gammas[step - 1 :: step], lambdas[-1]
        tail = self.eps, self.heads, self.learn, True
        return (
            lambda key_sum: [*of_queries, key_sum, *tail],
            [*of_keys, None, None, 0.0, 1, self.learn, True],
        )


SCHEMA = (
    f"Tensor {', Tensor '.join(Packed._fields[:14])}, Tensor? "
    f"{', Tensor? '.join(Packed._fields[14:19])}, float eps, bool learn, int heads, int height, "
    "int width, float conv_eps, int processes"
)
SAVED = (
    "primes", "order", "ends", "index", "probability", "query", "key", "key_sum", "query_stats",
    "query_choices", "query_probability", "key_stats", "key_choices", "key_probability", "state",
    "conv_stats",
)  # fmt: skip


def _is_wide(p: Packed) -> bool:
    """Whether the core is PyTorch's products, of one head."""
    return bool(slower(p.x.shape[2] // p.heads, is_normalized=False))


@launched("packed_difference", f"({SCHEMA}) -> ({', '.join(['Tensor'] * (1 + len(SAVED)))})")
def _packed_difference(*operands: Any) -> tuple[Tensor, ...]:
    """The result, and what a backward reads."""
    p = Packed(*operands)
    b, n, d = p.x.shape
    tokens = p.x.reshape(b * n, d)
    query, key, value = p.qkv.chunk(3, dim=-1)
    index, probability = top1(tokens, p.p1, p.p2)
    order, ends = sort_by_expert(index, 2 * len(p.w1))
    w1, w2 = p.w1.contiguous(), p.w2.contiguous()
    primes = grouped_product(tokens, w1, order, ends, w2).view(2, b, n, d)
    of_queries, of_keys = p.differences()
    key, key_sum, *of_key = difference_forward.function(key, primes[1], *of_keys)
    query, _, *of_query = difference_forward.function(query, primes[0], *of_queries(key_sum))
    if not _is_wide(p):
        out, state, _ = _linear_core.function(query, key, value, p.heads, "none", False, 0.0)
    elif n < d:  # in whichever order is less
        state = wide_bmm(query, key.mT, False)
        out = wide_bmm(state, value, False)
    else:
        state = wide_bmm(key.mT, value, True).to(query.dtype)
        out = wide_bmm(query, state, False)
    stats = state.new_empty(0)
    if p.square is not None:
        conv = p.square, p.upright, p.level, p.gains, p.shifts
        sizes = p.conv_eps, p.height, p.width, p.processes
        out, stats = _normed_branches.function(value, *conv, out, *sizes)
    saved = primes, order, ends, index, probability, query, key, key_sum, *of_query, *of_key
    return out, *saved, state, stats


@launched(
    "packed_difference_backward",
    f"(Tensor grad, Tensor {', Tensor '.join(SAVED)}, {SCHEMA}) -> ({', '.join(['Tensor'] * 9)})",
)
@torch.no_grad()
def _packed_difference_backward(grad: Tensor, *others: Any) -> tuple[Tensor, ...]:
    """Gradients, where there are any.

    Returns:
        Of x and of packed tokens; of the projectors (2 projectors, d, d), of their routers
        (2, projectors, d), of the routers of queries and keys (2, numbers), of gammas and lambdas;
        of the branches (15, d), of the norms' weights and their one bias (4, d).
    """
    count = len(SAVED)
    (primes, order, ends, index, probability, query, key, key_sum, *rest) = others[:count]
    of_query, of_key, (state, conv_stats) = rest[:3], rest[3:6], rest[6:]
    p, (grad, _) = Packed(*others[count:]), _rows(grad)
    b, n, d = p.x.shape
    *pair, value = p.qkv.chunk(3, dim=-1)
    packed = torch.empty(p.qkv.shape, dtype=p.qkv.dtype, device=p.qkv.device)
    *of_pair, of_value = packed.chunk(3, dim=-1)
    of_branches, of_norms = key_sum.new_empty(0), key_sum.new_empty(0)
    is_added = p.square is not None
    if is_added:
        conv = p.square, p.upright, p.level, p.gains, p.height, p.width, p.processes
        of_branches, of_norms = branch_gradients(grad, conv_stats, value, *conv, of_value)
    if not _is_wide(p):
        found = torch.empty_like(query), torch.empty_like(key), of_value
        unused = key_sum.new_empty(0)
        core_gradients(
            grad, unused, state, unused, query, key, value, p.heads, "none", False, 0.0, found,
            is_added,
        )  # fmt: skip
        of_differences = found[:2]
    else:
        if n < d:
            of_state = wide_bmm(grad, value.mT, False)
            of_differences = wide_bmm(of_state, key, False), wide_bmm(of_state.mT, query, False)
            left = state.mT, grad
        else:
            of_state = wide_bmm(query.mT, grad, False)
            products = wide_bmm(grad, state.mT, False), wide_bmm(value, of_state.mT, False)
            of_differences, left = products, (key, of_state)
        # Rounded once, with what the convolution has left there.
        torch.baddbmm(of_value, *left, beta=int(is_added), out=of_value)
    of_primes, of_gates = torch.empty_like(primes), key_sum.new_empty(2, b, n)
    of_queries, of_keys = p.differences()
    sides = of_queries(key_sum), of_keys
    n_gamma, n_lambda = p.gammas.shape[1], p.lambdas.shape[1]
    gammas, lambdas, routers = new_parts(pair[0], n_gamma, n_lambda, 2)
    grad_sum = None
    for i, saved in enumerate((of_query, of_key)):
        found = of_pair[i], of_primes[i], of_gates[i]
        left = Parts(gammas[:, :, i], lambdas[:, i], routers[:, i])
        operands = pair[i], primes[i], *sides[i]
        grad_sum = difference_gradients(of_differences[i], grad_sum, saved, operands, found, left)
    tokens, of_primes = p.x.reshape(b * n, d), of_primes.view(-1, d)
    gates, of_projector_routers, of_routers = None, *(key_sum.new_empty(0) for _ in range(2))
    if p.learn:
        of_logits, of_projector_routers = gate_gradients(
            of_gates.view(2, -1), tokens, p.p1, index, probability
        )
        gates = of_logits, (p.p1.contiguous(), p.p2.contiguous())
        of_routers = column_sum(routers, p.k1.dtype)
    weights = p.w1.contiguous(), p.w2.contiguous()
    grad_x = grouped_input_gradient(of_primes, weights, order, ends, gates).view(b, n, d)
    of_projectors = grouped_weight_gradient(tokens, of_primes, order, ends, len(ends))
    # Rows that the layer has once are once in the sum.
    gammas = (
        gammas.view(-1, *p.gammas.shape) if len(p.gammas) == 4 else gammas.view(-1, 1, n_gamma)
    )
    lambdas = lambdas.view(-1, *p.lambdas.shape)
    return (
        grad_x, packed, of_projectors, of_projector_routers, of_routers,
        column_sum(gammas, p.gammas.dtype), column_sum(lambdas, p.lambdas.dtype), of_branches,
        of_norms,
    )  # fmt: skip


@_packed_difference.register_fake
def _(*operands: Any) -> tuple[Tensor, ...]:
    p = Packed(*operands)
    b, n, d = p.x.shape
    rows, wide, half = b * n, torch.float32, p.qkv.new_empty
    width = 2 * p.gammas.shape[1] + p.lambdas.shape[1]
    entries = 2 * rows
    sides = [
        kept
        for heads in (p.heads, 1)
        for kept in (
            half(9 + heads, rows, dtype=wide), half(3, rows, dtype=torch.int32),
            half(rows, width, dtype=wide),
        )
    ]  # fmt: skip
    state = half(b, *((n, n) if n < d else (d, d)))
    if not _is_wide(p):
        state = half(b, p.heads, d // p.heads + 1, d // p.heads, dtype=wide)
    return (
        half(b, n, d), half(2, b, n, d), half(entries, dtype=torch.int32),
        half(2 * len(p.w1), dtype=torch.int32), half(entries, dtype=torch.int32),
        half(rows, 2, -(-len(p.w1) // 8) * 8, dtype=wide), half(b, n, d), half(b, n, d),
        half(b, d, dtype=wide), *sides, state,
        state.new_empty(0) if p.gains is None else p.gains.new_empty(9, d),
    )  # fmt: skip


@_packed_difference_backward.register_fake
def _(grad: Tensor, *others: Any) -> tuple[Tensor, ...]:
    p = Packed(*others[len(SAVED) :])
    d, wide = p.x.shape[2], p.gammas.new_empty
    routers = sum(z.numel() for z in (p.k1, p.k3, p.d1))
    none = p.qkv.new_empty(0, dtype=torch.float32)
    return (
        p.x.new_empty(p.x.shape), p.qkv.new_empty(p.qkv.shape),
        p.x.new_empty(2 * len(p.w1), d, d),
        p.p1.new_empty(2, *p.p1.shape) if p.learn else none.new_empty(0),
        p.k1.new_empty(2, routers) if p.learn else none.new_empty(0), wide(p.gammas.shape),
        p.lambdas.new_empty(p.lambdas.shape),
        *(none.new_empty(0) if p.gains is None else p.gains.new_empty(k, d) for k in (15, 4)),
    )  # fmt: skip


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    p = Packed(*inputs)
    ctx.set_materialize_grads(False)
    ctx.options = p[19:]
    ctx.save_for_backward(*output[1:], *p[:19])


def _gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * len(Packed._fields)
    operands = *ctx.saved_tensors, *ctx.options
    found = _packed_difference_backward(grad, *operands)
    x, qkv, projectors, of_projectors, routers, gammas, lambdas, branches, norms = found
    p = Packed(*operands[len(SAVED) :])
    # Without a straight-through gradient routers get none, not 0.
    learned: list[Any] = [None] * 8
    if p.learn:
        (k1, k3, d1), (k2, k4, d2) = (
            split_routers(part, Operands(p.x, p.x, p.k1, p.k3, p.d1, *[None] * 8))
            for part in routers
        )
        learned = [*of_projectors, k1, k2, k3, k4, d1, d2]
    conv: list[Any] = [None] * 5
    if p.square is not None:
        conv = split_branches(branches, (p.square, p.upright, p.level))
        # Not expanded: gradients that share memory would be clipped once for each.
        conv += [norms[:3], norms[3:].repeat(3, 1)]
    experts = len(p.w1)
    return (
        x, qkv, *learned[:2], projectors[:experts], projectors[experts:], *learned[2:], gammas,
        lambdas, *conv, *[None] * 7,
    )  # fmt: skip


_packed_difference.register_autograd(_gradients, setup_context=_setup)


def packed_attention(
    x: Tensor,
    qkv: Tensor,
    weights: Weights,
    eps: float,
    learn: bool,
    heads: int,
    grid: tuple[int, int],
    conv: Conv | None,
) -> tuple[Tensor, Tensor]:
    """``dynamic_differential_attention`` of packed tokens, and a convolution of the values.

    Args:
        x: (b, h * w, d).
        qkv: (b, h * w, 3 d).
        weights: The parameters, those of products in the type of x.
        eps: Added to the normalizers.
        learn: As there.
        heads: One, or some that the kernels' core serves.
        grid: (h, w).
        conv: What is added, or None.

    Returns:
        (b, h * w, d), and means, variances and 1 / deviations of the branches, (9, d), if any.
    """
    branches, sizes = (None,) * 5, (0.0, 1)
    if conv is not None:
        branches = *conv.weights, conv.gains.float(), conv.shifts.float()
        sizes = conv.eps, conv.processes
    out, *_, stats = _packed_difference(
        x, qkv, *weights.projector_routers, *weights.projectors, *weights.kernel_routers,
        *weights.difference_routers, weights.gammas, weights.lambdas, *branches, eps, learn,
        heads, *grid, *sizes,
    )  # fmt: skip
    return out, stats


def _macs(*operands: Any, **_: Any) -> int:
    p = Packed(*operands)
    b, n, d = p.x.shape
    routers = sum(z.numel() for z in (p.p1, p.p2, *p[6:12])) if p.learn else 0
    core = linear_attention_macs(n, n, d // p.heads, d // p.heads, False) * p.heads
    conv = 0 if p.square is None else 15 * d
    return b * (n * (routers + d + 2 * d * d + conv) + core)


MACS |= {
    "packed_difference": _macs,
    "packed_difference_backward": lambda grad, *others, **_: 2 * _macs(*others[len(SAVED) :]),
}
