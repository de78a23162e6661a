"""One step of gradient descent on the tokens themselves: test-time training (2512.01643).

The weights of a small model f are moved so that f(k_i) is more like v_i:
W <- W - rate g / (|g| + 1) with g the gradient of L = -sum_i f(k_i) v_i / (3 n). The norm, which
keeps a step below ``rate``, is that of a column of a matrix, or of a channel's nine taps.
"""

from __future__ import annotations

from torch import Tensor

from attnzoo.ops.dispatch import Impl, operator
from attnzoo.ops.inner_loop.torch import stepped, unit_gradients

__all__ = ["stepped", "trained_conv", "trained_unit", "unit_gradients"]


@operator
def trained_unit(
    key: Tensor,
    value: Tensor,
    first: Tensor,
    second: Tensor,
    rate: float = 1.0,
    *,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """The weights of f(k) = (k W_1) * SiLU(k W_2) after a step.

    Args:
        key: (b, h, n, d).
        value: (b, h, n, d).
        first: W_1 of every head, (h, d, d).
        second: W_2, likewise.
        rate: Of the step.
        impl: "reference" has autograd find the gradient of the loss.

    Returns:
        W_1 and W_2 of every image, (b, h, d, d), in float32 or better.
    """
    ...


@operator
def trained_conv(
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    rate: float = 1.0,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """The weights of a depthwise 3x3 convolution, padded with zeros, after a step.

    Args:
        key: (b, c, height, width).
        value: (b, c, height, width).
        weight: (c, 1, 3, 3).
        rate: See ``trained_unit``; also for ``impl``.

    Returns:
        (b, c, 3, 3), in the dtype of ``key``.
    """
    ...
