"""Depthwise convolution of tokens on their grid, with zero padding that keeps the grid."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnzoo.ops.depthwise_conv.torch import to_image, to_tokens
from attnzoo.ops.dispatch import MACS, Impl, operator

__all__ = [
    "depthwise_conv",
    "depthwise_conv_macs",
    "gated_depthwise_conv",
    "to_image",
    "to_tokens",
]

SERVED = (3, 5, 7)  # sides of the Triton kernels


def unserved(x: Tensor, grid: Any, weight: Tensor, *_: Any) -> str | None:
    """What the Triton kernel does not serve."""
    high, wide = weight.shape[2:]
    return f"kernels of {high} x {wide}" if max(high, wide) not in SERVED else None


@operator
def depthwise_conv(
    x: Tensor,
    grid: tuple[int, int],
    weight: Tensor,
    bias: Tensor | None,
    added: Tensor | None = None,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Convolves each channel of tokens with a small kernel of its own.

    Args:
        x: (b, h * w, c).
        grid: (h, w).
        weight: (kernels, 1, rows, columns), both odd; the Triton kernels take up to 7 x 7. As
            many kernels as channels, or fewer, which all parts of the channels share.
        bias: (kernels,) or None.
        added: (b, h * w, c), to which the result is added, or None.
        impl: See ``attnzoo.ops.dispatch``.

    Returns:
        (b, h * w, c).
    """
    ...


@operator
def gated_depthwise_conv(
    packed: Tensor,
    grid: tuple[int, int],
    weight: Tensor,
    bias: Tensor | None,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """GELU of the first half of the channels times the convolution of the second.

    Args:
        packed: (b, h * w, 2 * c).
        grid: (h, w).
        weight: As in ``depthwise_conv``.
        bias: (kernels,) or None.
        impl: See ``attnzoo.ops.dispatch``.

    Returns:
        (b, h * w, c).
    """
    ...


def depthwise_conv_macs(weight: Tensor, grid: tuple[int, int]) -> int:
    """Multiply-accumulates of one sample."""
    return weight.numel() * grid[0] * grid[1]


def _stencil_macs(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return x.numel() * weight[0].numel()


def _gated_macs(packed: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return packed.numel() // 2 * weight[0].numel()


def _branches_macs(x: Tensor, *weights: Any, **_: Any) -> int:
    # Of the branches; that they are convolved again is not counted, as nowhere.
    return x.numel() * sum(weight[0].numel() for weight in weights[:3])


MACS |= {
    "gated_stencil": _gated_macs,
    "gated_stencil_backward": lambda _, __, *rest, **___: 2 * _gated_macs(*rest),
    "normed_branches": _branches_macs,
    "normed_branches_backward": lambda _, __, *rest, **___: 2 * _branches_macs(*rest),
    "stencil": _stencil_macs,
    "stencil_backward": lambda grad, _, weight, *__, **___: 2 * _stencil_macs(grad, weight),
}
