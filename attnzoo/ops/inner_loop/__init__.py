"""One step of gradient descent on the tokens themselves: test-time training (2512.01643).

The weights of a small model f are moved so that f(k_i) is more like v_i:
W <- W - rate g / (|g| + 1) with g the gradient of L = -sum_i f(k_i) v_i / (3 n). The norm, which
keeps a step below ``rate``, is that of a column of a matrix, or of a channel's nine taps.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, bfloat16

from attnzoo.ops.dispatch import MACS, Impl, operator
from attnzoo.ops.inner_loop.torch import read_unit, stepped, unit_gradients
from attnzoo.ops.precision import operand_dtype

__all__ = [
    "conv_tokens",
    "read_unit",
    "stepped",
    "trained_conv",
    "trained_unit",
    "unit_gradients",
    "unit_tokens",
]

# Heads whose matrices a program of the kernels holds; all but bfloat16 is computed in float32.
WIDEST_HALF, WIDEST = 64, 32


def unserved(tokens: Tensor, first: Any, *_: Any) -> str | None:
    """What the Triton kernels do not serve."""
    if not tokens.numel():
        return "no tokens"
    if not isinstance(first, Tensor):
        return None
    width, dtype = first.shape[-1], operand_dtype(tokens)
    most = WIDEST_HALF if dtype == bfloat16 else WIDEST
    return f"heads of width {width} in {dtype}, only up to {most}" if width > most else None


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


@operator
def unit_tokens(
    tokens: Tensor,
    first: Tensor,
    second: Tensor,
    heads: int,
    rate: float = 1.0,
    local: Tensor | None = None,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """What the queries read of the model that ``trained_unit`` trains.

    Args:
        tokens: Queries, keys and values side by side, (b, n, 3 * h * d).
        first: See ``trained_unit``; also for ``second`` and ``rate``.
        heads: h.
        local: (b, n, d), which comes behind the heads' outputs, or None.
        impl: See ``attnzoo.ops.dispatch``.

    Returns:
        (b, n, h * d), or (b, n, h * d + d) with ``local``.
    """
    ...


@operator
def conv_tokens(
    tokens: Tensor,
    grid: tuple[int, int],
    weight: Tensor,
    rate: float = 1.0,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """What the queries read of the convolution that ``trained_conv`` trains.

    Args:
        tokens: Queries, keys and values side by side, (b, height * width, 3 * c).
        grid: (height, width).
        weight: See ``trained_conv``; also for ``rate``.
        impl: See ``attnzoo.ops.dispatch``.

    Returns:
        (b, height * width, c).
    """
    ...


def _unit_macs(tokens: Tensor, first: Tensor, *_: Any, **__: Any) -> int:
    return 2 * tokens.numel() * first.shape[-1]


def _conv_macs(tokens: Tensor, *_: Any, **__: Any) -> int:
    return 6 * tokens.numel()


# Backward: two products for each; that some are made anew is not counted, as nowhere.
MACS |= {
    "trained_unit_tokens": _unit_macs,
    "trained_unit_tokens_backward": lambda *operands, **_: 2 * _unit_macs(*operands[3:]),
    "trained_conv_tokens": _conv_macs,
    "trained_conv_tokens_backward": lambda *operands, **_: 2 * _conv_macs(*operands[3:]),
}
