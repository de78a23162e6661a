"""Top-1 routing: decisions, gates that carry a gradient, and projections of routed tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnzoo.ops.dispatch import MACS, Impl, operator
from attnzoo.ops.routed_linear.reference import Route, RouterGradient
from attnzoo.ops.routed_linear.torch import (
    balance_loss,
    by_ones,
    decide,
    gated,
    pick,
    router_logits,
    usage_of,
)

__all__ = [
    "Route",
    "RouterGradient",
    "balance_loss",
    "by_ones",
    "decide",
    "gated",
    "grouped_linear",
    "pick",
    "routed_linear",
    "router_logits",
    "usage_of",
]


@operator
def routed_linear(x: Tensor, weight: Tensor, index: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Projects each token by its own projector: out_i = x_i W_{index_i} (DyDiLA, Eq. 2).

    Each token meets one projector only: tokens are sorted into one segment per projector.

    Args:
        x: (..., d_in).
        weight: (projectors, d_in, d_out).
        index: (...,), int64.

    Returns:
        (..., d_out), in the dtype a matmul would give.
    """
    ...


def grouped_linear(x: Tensor, first: Tensor, second: Tensor, index: Tensor) -> Tensor:
    """Two routed projections of the same tokens as one grouped product, by Triton.

    Args:
        x: (t, d).
        first: Projectors, (experts, d, e).
        second: Likewise.
        index: Choices of the first, then those of the second plus ``experts``, (2 t,) int32.

    Returns:
        (2, t, e).
    """
    from attnzoo.ops.routed_linear import triton

    return triton.grouped_linear(x, first, second, index)


def _linear_macs(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return x.numel() * weight.shape[2]  # each token meets one projector


def _grouped_macs(x: Tensor, first: Tensor, second: Tensor | None, index: Tensor, **_: Any) -> int:
    return index.numel() * first[0].numel()


def _gates_macs(x: Tensor, first: Tensor, second: Tensor, **_: Any) -> int:
    return x.shape[0] * (first.numel() + second.numel())


def _scalar_macs(x: Tensor, y: Tensor | None, router: Tensor, *_: Any) -> int:
    return x.shape[0] * router.numel()


MACS |= {
    "routed_linear": _linear_macs,
    "routed_linear_backward": lambda grad, *rest, **_: 2 * _linear_macs(*rest),
    "grouped_linear": _grouped_macs,
    "grouped_linear_backward": (
        lambda grad, x, first, *_, **__: 2 * grad.numel() * first.shape[1]
    ),
    "routed_scalar": _scalar_macs,
    "routed_scalar_backward": (
        lambda grad, *rest, **_: 2 * _scalar_macs(*rest) if rest[-1] else 0
    ),
    "routed_gates": _gates_macs,
    "routed_gates_backward": lambda grad, *args, **_: 2 * _gates_macs(*args[:3]),
}
