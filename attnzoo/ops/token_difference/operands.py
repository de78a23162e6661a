"""What the operators of token-wise DyDiLA take, stated once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Weights(NamedTuple):
    """Parameters of token-wise DyDiLA, d wide.

    Attributes:
        projector_routers: Of Q' and K', (projectors, d) each.
        projectors: Of Q' and K', (projectors, d, d) each.
        kernel_routers: Of Q, K, Q', K', (factors, d) each.
        gammas: Exponents of Q, K, Q', K', (4, factors), or (1, factors) of all alike.
        difference_routers: Of queries and of keys, (factors', 2 d) each.
        lambdas: Of queries and of keys, (2, factors'), or (1, factors') of both.
    """

    projector_routers: Sequence[Tensor]
    projectors: Sequence[Tensor]
    kernel_routers: Sequence[Tensor]
    gammas: Tensor
    difference_routers: Sequence[Tensor]
    lambdas: Tensor


class Operands(NamedTuple):
    """What the operator ``focused_difference`` takes, in its order.

    Attributes:
        z1: Z, (b, n, d).
        z2: Z', (b, n, d).
        r1: Kernel router of Z, (factors, d).
        r2: Of Z'.
        rd: Difference router of (phi(Z), phi(Z')), (factors', 2 d).
        gammas: Exponents of Z and Z', (2, factors), each row without gaps; in float32, or in any
            type where nothing is differentiated or watched.
        lambdas: (factors',), likewise.
        gate: (b, n) of value 1, by which Z' counts as multiplied; the router of its projection
            learns from the gate's gradient.
        key_sum: (b, d) in float32, or None. Given, each head's part of the result is divided by
            its part of phi(Z) . key_sum, plus eps.
        eps: See there.
        heads: How many divide the result.
        learn: Whether routers get the straight-through gradient of "ste".
        save: Whether what the backward needs is returned too.
    """

    z1: Tensor
    z2: Tensor
    r1: Tensor
    r2: Tensor
    rd: Tensor
    gammas: Tensor
    lambdas: Tensor
    gate: Tensor | None
    key_sum: Tensor | None
    eps: float
    heads: int
    learn: bool
    save: bool


# The same as torch's schemas write it.
SCHEMA = (
    "Tensor z1, Tensor z2, Tensor r1, Tensor r2, Tensor rd, Tensor gammas, Tensor lambdas, "
    "Tensor? gate, Tensor? key_sum, float eps, int heads, bool learn, bool save"
)
