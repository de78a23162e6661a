"""What the operator of map-wise DyDiLA takes, stated once."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Operands(NamedTuple):
    """What the operator ``map_attention`` takes, in its order.

    Attributes:
        query: Q, (b, n, d).
        key: K, (b, n, d).
        value: V, (b, n, d).
        primes: Q' and K', (2, b, n, d).
        gates: (2, b, n) of value 1, by which the primes count as multiplied; the routers of their
            projections learn from the gates' gradient.
        query_router: Of the exponents of Q, (factors, d).
        prime_query_router: Of Q'.
        key_router: Of K.
        prime_key_router: Of K'.
        rd: Router of lambda, of (phi(Q), phi(Q')), (factors', 2 d).
        gammas: Exponents, (factors,) in float32, or in any type where nothing is differentiated or
            watched.
        lambdas: (factors',), likewise.
        eps: Added to the normalizers.
        learn: Whether routers get the straight-through gradient of "ste".
        save: Whether what the backward needs is returned too.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    primes: Tensor
    gates: Tensor
    query_router: Tensor
    prime_query_router: Tensor
    key_router: Tensor
    prime_key_router: Tensor
    rd: Tensor
    gammas: Tensor
    lambdas: Tensor
    eps: float
    learn: bool
    save: bool


# The same as torch's schemas write it.
SCHEMA = (
    "Tensor query, Tensor key, Tensor value, Tensor primes, Tensor gates, Tensor query_router, "
    "Tensor prime_query_router, Tensor key_router, Tensor prime_key_router, Tensor rd, "
    "Tensor gammas, Tensor lambdas, float eps, bool learn, bool save"
)
