"""Routed power map and token difference as one operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnzoo.ops.fused.support import kernels, operator


@operator("focused_difference")
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
    return kernels().difference_forward(
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


@operator("focused_difference_backward")
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
    return kernels().difference_backward(
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
