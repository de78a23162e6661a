"""Fused operators for GPUs, written in Triton: custom operators with gradients.

They equal the eager operators of ``ops.routing``, ``ops.focused`` and ``ops.linear`` and wait for
nothing on the device, so that CUDA graphs and ``torch.compile`` take them. Importing this module
does not import Triton; calling an operator does. With ATTNZOO_TRITON=0 in the environment nothing
takes them unasked.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# torch before 2.8 cannot sum half-precision operands into a float32 result.
_HAS_WIDE_PRODUCT = "dtype" in torch.ops.aten.bmm.overloads() and torch.version.hip is None


def _is_installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # an import that was blocked on purpose
        return False


def require_triton() -> None:
    """Raises RuntimeError, naming the extra, where Triton cannot be imported."""
    if not _is_installed():
        raise RuntimeError(
            "impl='triton' needs Triton, which is not installed; pip install 'attnzoo[triton]', "
            "or leave impl='auto'"
        )


@functools.cache
def _try_kernels() -> bool:
    is_old = torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0)
    if os.environ.get("ATTNZOO_TRITON") == "0" or is_old or not _is_installed():
        return False
    try:  # being installed is not enough: Triton needs a C compiler and a driver that it knows
        from triton.runtime import driver

        driver.active.get_current_target()
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        warnings.warn(
            f"Triton is installed but cannot run ({reason}), so that torch's operators take over; "
            "set ATTNZOO_TRITON=0 to be spared this warning",
            stacklevel=2,
        )
        return False
    return True


@torch.compiler.assume_constant_result
def _kernels_work() -> bool:
    return _try_kernels()


def runs_on(x: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether the kernels take this tensor unasked: on a GPU, and of a type that they know.

    Args:
        x: The tensor.
        dtype: What it will be cast to; by default it stays what it is.
    """
    known = (dtype or x.dtype) in (torch.float32, torch.bfloat16)
    return x.is_cuda and known and _kernels_work()


def has_half_sums(*operands: Tensor) -> bool:
    """Whether to multiply in bfloat16 with float32 sums; float16 would overflow on rounding.

    Not while compiling: a compiler joins the float32 copies with what comes before them.
    """
    is_eager = _HAS_WIDE_PRODUCT and not torch.compiler.is_compiling()
    return is_eager and all(z.is_cuda and z.dtype == torch.bfloat16 for z in operands)


def _kernels() -> Any:
    require_triton()
    from attnzoo.ops import kernels

    return kernels


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device; this makes it that of the first tensor."""

    @functools.wraps(function)
    def guarded(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device_of(first):
            return function(first, *args, **kwargs)

    return guarded


def _operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    def register(function: Callable[..., Any]) -> Any:
        guarded = _on_its_device(function)
        return torch.library.custom_op(f"attnzoo::{name}", guarded, mutates_args=())

    return register


# --------------------------------------------------------------------- routing and projection


@_operator("routed_gates")
def _routed_gates(x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    index, probability = _kernels().top1(x, first, second)
    return x.new_ones(2, x.shape[0], dtype=torch.float32), index, probability


@_routed_gates.register_fake
def _(x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    padded = -(-first.shape[0] // 8) * 8
    return (
        x.new_empty(2, x.shape[0], dtype=torch.float32),
        x.new_empty(2 * x.shape[0], dtype=torch.int32),
        x.new_empty(x.shape[0], 2, padded, dtype=torch.float32),
    )


def _gates_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output[1:])


@_operator("routed_gates_backward")
def _routed_gates_backward(
    grad: Tensor, x: Tensor, first: Tensor, second: Tensor, index: Tensor, probability: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient that each token's chosen probability, over itself, hands its router."""
    rows, _, padded = probability.shape
    experts = first.shape[0]
    offset = torch.arange(2, device=x.device)[:, None] * experts
    chosen = (index.view(2, rows) - offset).t().unsqueeze(-1)
    mine = chosen == torch.arange(padded, device=x.device)
    grad_logits = (grad.t().unsqueeze(-1) * (mine.float() - probability)).to(x.dtype)
    grad_logits = grad_logits.flatten(1)
    pad = (0, 0, 0, padded - experts)
    routers = torch.cat([F.pad(first, pad), F.pad(second, pad)]).to(x.dtype)
    grad_routers = _bmm(grad_logits.t()[None], x[None], is_wide=True)[0]
    grad_first, grad_second = grad_routers.unflatten(0, (2, padded))[:, :experts]
    return (
        grad_logits @ routers,
        # Copies: an operator's results may not share memory.
        grad_first.to(first.dtype, copy=True),
        grad_second.to(second.dtype, copy=True),
    )


@_routed_gates_backward.register_fake
def _(
    grad: Tensor, x: Tensor, first: Tensor, second: Tensor, index: Tensor, probability: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), first.new_empty(first.shape), second.new_empty(second.shape)


def _gates_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    return (None,) * 3 if grad is None else _routed_gates_backward(grad, *ctx.saved_tensors)


_routed_gates.register_autograd(_gates_backward, setup_context=_gates_setup)


@_operator("grouped_projection")
def _grouped_projection(
    x: Tensor, first: Tensor, second: Tensor, index: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = _kernels()
    order, ends = kernels.sort_by_expert(index, 2 * first.shape[0])
    out = kernels.grouped_product(x, first.contiguous(), order, ends, second.contiguous())
    return out, order, ends


@_grouped_projection.register_fake
def _(x: Tensor, first: Tensor, second: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(index.shape[0], first.shape[2]),
        torch.empty_like(index, dtype=torch.int32),
        index.new_empty(2 * first.shape[0], dtype=torch.int32),
    )


@_operator("grouped_projection_backward")
def _grouped_projection_backward(
    grad: Tensor, x: Tensor, first: Tensor, second: Tensor, order: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    kernels = _kernels()
    first, second = first.contiguous(), second.contiguous()
    both = kernels.grouped_product(grad, first.mT, order, ends, second.mT)
    grad_weight = kernels.grouped_weight_gradient(x, grad, order, ends, 2 * first.shape[0])
    first_grad, second_grad = both.view(2, *x.shape).unbind(0)
    return first_grad + second_grad, grad_weight


@_grouped_projection_backward.register_fake
def _(
    grad: Tensor, x: Tensor, first: Tensor, second: Tensor, order: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(2 * first.shape[0], *first.shape[1:])


def _grouped_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.save_for_backward(*inputs[:3], *output[1:])
    ctx.set_materialize_grads(False)


def _grouped_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, first, second, order, ends = ctx.saved_tensors
    grad_x, grad_weight = _grouped_projection_backward(
        grad.contiguous(), x, first, second, order, ends
    )
    experts = first.shape[0]
    return grad_x, grad_weight[:experts], grad_weight[experts:], None


_grouped_projection.register_autograd(_grouped_backward, setup_context=_grouped_setup)


def grouped_projection(x: Tensor, first: Tensor, second: Tensor, index: Tensor) -> Tensor:
    """Two routed projections of the same tokens as one grouped product, with its sort.

    Args:
        x: (t, d).
        first: Projectors, (experts, d, e).
        second: Likewise.
        index: Choices of the first, then those of the second plus ``experts``, (2 t,) int32.

    Returns:
        (2, t, e).
    """
    return _grouped_projection(x, first, second, index)[0].unflatten(0, (2, x.shape[0]))


def routed_pair(
    x: Tensor,
    routers: Sequence[Tensor],
    projectors: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Two routed projections of the same tokens: decisions, sorting and both products.

    Args:
        x: (b, n, d).
        routers: Two of (experts, d).
        projectors: Two of (experts, d, e).

    Returns:
        Projected tokens (2, b, n, e); choices (2, b, n), those of the second plus ``experts``;
        and gates (2, b, n) of value 1, by which the tokens count as multiplied: whoever uses the
        tokens must return the gates' gradients, and the routers learn from those.
    """
    tokens = x.flatten(0, 1)
    gates, index, _ = _routed_gates(tokens, *routers)
    out = grouped_projection(tokens, *projectors, index)
    shape = (2, *x.shape[:2])
    return out.unflatten(1, x.shape[:2]), index.view(shape), gates.view(shape)


@_on_its_device
def device_routed_projection(x: Tensor, weight: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """``attnzoo::routed_projection`` on a GPU: (t, k), (experts, k, n), (t,) -> (t, n) and a plan.

    The plan, (2 t + experts,) int64, holds the order, t entries that nothing needs here, and
    where each expert's segment ends.
    """
    kernels, rows = _kernels(), x.shape[0]
    plan = torch.empty(2 * rows + weight.shape[0], dtype=torch.int64, device=x.device)
    order, ends = kernels.sort_by_expert(index, weight.shape[0], plan[:rows], plan[2 * rows :])
    return kernels.grouped_product(x, weight, order, ends), plan


@_on_its_device
def device_routed_projection_backward(
    grad: Tensor, x: Tensor, weight: Tensor, plan: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of ``device_routed_projection`` with respect to x and weight."""
    kernels, rows = _kernels(), x.shape[0]
    order, ends = plan[:rows], plan[2 * rows :]
    grad_x = kernels.grouped_product(grad, weight.mT, order, ends)
    return grad_x, kernels.grouped_weight_gradient(x, grad, order, ends, weight.shape[0])


# ------------------------------------------------------------------------------ the power map


@_operator("relu_power_map")
def _relu_power_map(z: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    return _kernels().power_map_forward(z, gamma)


@_relu_power_map.register_fake
def _(z: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), z.new_empty(3, z.shape[0], dtype=torch.float32)


@_operator("relu_power_map_backward")
def _relu_power_map_backward(
    grad: Tensor, z: Tensor, gamma: Tensor, stats: Tensor
) -> tuple[Tensor, Tensor]:
    return _kernels().power_map_backward(grad, z, gamma, stats)


@_relu_power_map_backward.register_fake
def _(grad: Tensor, z: Tensor, gamma: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), torch.empty_like(gamma)


def _power_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _power_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor]:
    return _relu_power_map_backward(grad, *ctx.saved_tensors)


_relu_power_map.register_autograd(_power_backward, setup_context=_power_setup)


def relu_power_map(z: Tensor, gamma: Tensor) -> Tensor:
    """``power_map(relu(z), gamma)`` in one pass over memory.

    Args:
        z: (..., d), float32 or half precision; computed in float32.
        gamma: Exponents, broadcastable to (..., 1).

    Returns:
        (..., d), in the dtype of z.
    """
    powers = gamma.float().expand(*z.shape[:-1], 1).reshape(-1)
    # Expanding may leave all rows one address, which a kernel would not see.
    powers = powers.contiguous()
    return _relu_power_map(z.reshape(-1, z.shape[-1]), powers)[0].view(z.shape)


# ------------------------------------------- routed power map and token difference, in one pass


@_operator("focused_difference")
def _focused_difference(
    z1: Tensor,
    z2: Tensor,
    r1: Tensor,
    r2: Tensor,
    rd: Tensor,
    gammas: Tensor,
    lambdas: Tensor,
    gate: Tensor,
    key_sum: Tensor | None,
    eps: float,
    heads: int,
    learn: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    routers = r1, r2, rd
    return _kernels().difference_forward(
        z1, z2, routers, gammas, lambdas, key_sum, eps, heads, save
    )


@_focused_difference.register_fake
def _(
    z1: Tensor,
    z2: Tensor,
    r1: Tensor,
    r2: Tensor,
    rd: Tensor,
    gammas: Tensor,
    lambdas: Tensor,
    gate: Tensor,
    key_sum: Tensor | None,
    eps: float,
    heads: int,
    learn: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    b, n, d = z1.shape
    rows = b * n if save else 0
    wide = gammas.new_empty
    return (
        z1.new_empty(b, n, d),
        wide(b, d),
        wide(9 + heads, rows),
        wide(3, rows, dtype=torch.int32),
        wide(rows, 2 * gammas.shape[1] + lambdas.shape[0]),
    )


@_operator("focused_difference_backward")
def _focused_difference_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    out: Tensor,
    z1: Tensor,
    z2: Tensor,
    r1: Tensor,
    r2: Tensor,
    rd: Tensor,
    gammas: Tensor,
    lambdas: Tensor,
    key_sum: Tensor | None,
    stats: Tensor,
    choices: Tensor,
    probability: Tensor,
    heads: int,
    learn: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _kernels().difference_backward(
        grad, grad_sum, out, z1, z2, (r1, r2, rd), gammas, lambdas, key_sum,
        (stats, choices, probability), heads, learn,
    )  # fmt: skip


@_focused_difference_backward.register_fake
def _(
    grad: Tensor,
    grad_sum: Tensor | None,
    out: Tensor,
    z1: Tensor,
    z2: Tensor,
    r1: Tensor,
    r2: Tensor,
    rd: Tensor,
    gammas: Tensor,
    lambdas: Tensor,
    key_sum: Tensor | None,
    stats: Tensor,
    choices: Tensor,
    probability: Tensor,
    heads: int,
    learn: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    b, n, d = z1.shape
    wide = gammas.new_empty
    return (
        z1.new_empty(b, n, d), z1.new_empty(b, n, d), wide(b, n), wide(r1.shape), wide(r2.shape),
        wide(rd.shape), wide(gammas.shape), wide(lambdas.shape), wide(b, d),
    )  # fmt: skip


def _difference_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    z1, z2, r1, r2, rd, gammas, lambdas, _, key_sum, _, heads, learn, _ = inputs
    out, _, *saved = output
    ctx.set_materialize_grads(False)
    ctx.heads, ctx.learn = heads, learn
    ctx.save_for_backward(out, z1, z2, r1, r2, rd, gammas, lambdas, key_sum, *saved)


def _difference_backward(
    ctx: Any, grad: Tensor, grad_sum: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    out, z1, z2, r1, r2, rd, gammas, lambdas, key_sum, *saved = ctx.saved_tensors
    if key_sum is None and grad_sum is None:
        grad_sum = gammas.new_zeros(z1.shape[0], z1.shape[2])
    found = _focused_difference_backward(
        grad, grad_sum, out, z1, z2, r1, r2, rd, gammas, lambdas, key_sum, *saved, ctx.heads,
        ctx.learn,
    )  # fmt: skip
    grad_z1, grad_z2, grad_gate, *routers, grad_gammas, grad_lambdas, grad_key_sum = found
    # Without a straight-through gradient routers get none, not 0.
    grads = [
        found.to(router.dtype) if ctx.learn else None
        for found, router in zip(routers, (r1, r2, rd), strict=True)
    ]
    return (
        grad_z1, grad_z2, *grads, grad_gammas, grad_lambdas, grad_gate if ctx.learn else None,
        None if key_sum is None else grad_key_sum, None, None, None, None,
    )  # fmt: skip


_focused_difference.register_autograd(_difference_backward, setup_context=_difference_setup)


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
    """phi(Z) - lambda phi(Z') with phi the routed power map of ReLU, reading Z and Z' once.

    The backward computes everything from Z and Z' again; it keeps a few numbers per token.

    Args:
        tokens: Z, (b, n, d).
        redundant: Z', (b, n, d).
        kernel_routers: Of Z and of Z', each (factors, d).
        gammas: Exponents of Z and of Z', (2, factors).
        difference_router: (factors', 2 d), of (phi(Z), phi(Z')).
        lambdas: (factors',).
        gate: (b, n) of value 1, by which Z' counts as multiplied; see ``routed_pair``.
        key_sum: (b, d) in float32. Given, each head's part of the result is divided by its part
            of phi(Z) . key_sum, plus eps.
        eps: See ``key_sum``.
        learn: Whether routers get the straight-through gradient of "ste".
        heads: Parts of equal width, a multiple of 16 where there are several.

    Returns:
        (b, n, d) in the dtype of Z, and, where ``key_sum`` is None, the sum of phi(Z) over the
        tokens, (b, d) in float32.
    """
    # Only a call that may be differentiated keeps what its backward needs.
    operands = (tokens, redundant, *kernel_routers, gammas, difference_router, lambdas)
    save = torch.is_grad_enabled() and any(z.requires_grad for z in operands)
    return _focused_difference(
        tokens, redundant, *kernel_routers, difference_router, gammas.float().contiguous(),
        lambdas.float().contiguous(),
        gate, key_sum, eps, heads if key_sum is not None else 1, learn, save,
    )[:2]  # fmt: skip


def dynamic_differential_attention(
    x: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projector_routers: Sequence[Tensor],
    projectors: Sequence[Tensor],
    kernel_routers: Sequence[Tensor],
    gammas: Tensor,
    difference_routers: Sequence[Tensor],
    lambdas: Tensor,
    eps: float,
    learn: bool = True,
    heads: int = 1,
) -> Tensor:
    """Token-wise DyDiLA, normalised by phi(Q) . sum phi(K), without convolution.

    Queries leave their kernel divided by their normalisers, so that plain products are left.

    Args:
        x: (b, n, d).
        query: Q, (b, n, d); may be a slice of a wider tensor, as may K and V.
        key: K, likewise.
        value: V, likewise.
        projector_routers: Of Q' and K', (projectors, d) each.
        projectors: Of Q' and K', (projectors, d, d) each.
        kernel_routers: Of Q, K, Q', K', (factors, d) each.
        gammas: Exponents of Q, K, Q', K', (4, factors).
        difference_routers: Of queries and of keys, (factors', 2 d) each.
        lambdas: Of queries and of keys, (2, factors').
        eps: Added to the normalisers.
        learn: Whether routers get the straight-through gradient of "ste".
        heads: See ``focused_difference``.

    Returns:
        (b, n, d).
    """
    primes, _, gates = routed_pair(x, projector_routers, projectors)
    query_prime, key_prime = primes.unbind(0)
    key, key_sum = focused_difference(
        key, key_prime, kernel_routers[1::2], gammas[1::2], difference_routers[1], lambdas[1],
        gates[1], learn=learn,
    )  # fmt: skip
    query, _ = focused_difference(
        query, query_prime, kernel_routers[::2], gammas[::2], difference_routers[0], lambdas[0],
        gates[0], key_sum, eps, learn, heads,
    )  # fmt: skip
    query, key, value = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in (query, key, value))
    if query.shape[2] < query.shape[3]:  # the n x n weights are the smaller product
        out = half_matmul(half_matmul(query, key.mT, is_wide=False), value, is_wide=False)
    else:
        out = half_kernel_product(query, key, value)
    return out.transpose(1, 2).flatten(2)


# ------------------------------------------------------- half-precision products, float32 sums


def _bmm(a: Tensor, b: Tensor, is_wide: bool) -> Tensor:
    if a.dtype in (torch.float32, torch.float64):
        return torch.bmm(a, b)
    if not (a.is_cuda and _HAS_WIDE_PRODUCT):
        out = torch.bmm(a.float(), b.float())
        return out if is_wide else out.to(a.dtype)
    # A long sum is split among blocks, and those would add up in half precision.
    if is_wide or a.shape[2] > max(a.shape[1], b.shape[2]):
        out = torch.bmm(a, b, out_dtype=torch.float32)
        return out if is_wide else out.to(a.dtype)
    return torch.bmm(a, b)


@_operator("half_matmul")
def _half_matmul(a: Tensor, b: Tensor, is_wide: bool) -> Tensor:
    return _bmm(a, b, is_wide)


@_half_matmul.register_fake
def _(a: Tensor, b: Tensor, is_wide: bool) -> Tensor:
    dtype = torch.promote_types(a.dtype, torch.float32) if is_wide else a.dtype
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2], dtype=dtype)


def _matmul_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _matmul_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    a, b = ctx.saved_tensors
    grad = grad.to(a.dtype)
    return (
        _half_matmul(grad, b.mT, False) if ctx.needs_input_grad[0] else None,
        _half_matmul(a.mT, grad, False) if ctx.needs_input_grad[1] else None,
        None,
    )


_half_matmul.register_autograd(_matmul_backward, setup_context=_matmul_setup)


def half_matmul(a: Tensor, b: Tensor, is_wide: bool = True) -> Tensor:
    """Product of half-precision matrices, summed in float32, with gradients.

    Args:
        a: (..., n, k).
        b: (..., k, m).
        is_wide: Whether the result stays in float32 or is rounded, once, to the dtype of a.

    Returns:
        (..., n, m).
    """
    lead = a.shape[:-2]
    flat = a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:])
    out = _half_matmul(*flat, is_wide)
    return out.view(*lead, *out.shape[-2:])


def half_read(query: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Q times each factor in turn, in float32 at last: (..., n, d) and (..., d, e), ..."""
    for factor in factors[:-1]:
        query = half_matmul(query, factor.to(query.dtype), is_wide=False)
    factor = factors[-1]
    high = factor.to(query.dtype)
    if factor.shape[-1] > 1 or factor.dtype == query.dtype:
        return half_matmul(query, high)
    # Two half-precision columns carry a sum to twice the digits; one product serves both.
    columns = torch.cat([high, (factor - high.float()).to(query.dtype)], dim=-1)
    return half_matmul(query, columns).sum(-1, keepdim=True)


def half_kernel_product(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Q (K^T V), (..., n, d) each, with the state summed in float32 and rounded once."""
    state = half_matmul(key.transpose(-2, -1), value)
    return half_matmul(query, state.to(query.dtype), is_wide=False)


def half_key_sums(query: Tensor, key: Tensor) -> Tensor:
    """Q sum_j K_j^T, (..., n, 1), in float32."""
    return half_read(query, [key.sum(-2, dtype=torch.float32).unsqueeze(-1)])


# -------------------------------------------------------------------------- 3x3 depthwise stencil


@_operator("stencil")
def _stencil(
    x: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None, height: int, width: int
) -> Tensor:
    return _kernels().stencil(x, weight, bias, (height, width), added)


@_stencil.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None, height: int, width: int
) -> Tensor:
    return x.new_empty(x.shape)


@_operator("stencil_backward")
def _stencil_backward(
    grad: Tensor, x: Tensor, weight: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    kernels, grid = _kernels(), (height, width)
    grad_x = kernels.stencil(grad, weight, None, grid, is_transposed=True)
    return grad_x, *kernels.stencil_weight_gradient(x, grad, grid)


@_stencil_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    wide = weight.new_empty
    return (
        x.new_empty(x.shape),
        wide(weight.shape, dtype=torch.float32),
        wide(weight.shape[0], dtype=torch.float32),
    )


def _stencil_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, added, *grid = inputs
    ctx.grid, ctx.has_bias, ctx.has_added = grid, bias is not None, added is not None
    ctx.save_for_backward(x, weight)


def _stencil_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = _stencil_backward(grad, x, weight, *ctx.grid)
    return (
        grad_x,
        grad_weight.to(weight.dtype),
        grad_bias.to(weight.dtype) if ctx.has_bias else None,
        grad if ctx.has_added else None,
        None,
        None,
    )


_stencil.register_autograd(_stencil_gradients, setup_context=_stencil_setup)


def depthwise3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: tuple[int, int],
    added: Tensor | None = None,
) -> Tensor:
    """3x3 depthwise convolution of tokens with zero padding, added to ``added``.

    Args:
        x: (b, h * w, c).
        weight: (c, 1, 3, 3).
        bias: (c,) or None.
        grid: (h, w).
        added: (b, h * w, c) or None.

    Returns:
        (b, h * w, c).
    """
    return _stencil(x, weight, bias, added, *grid)
