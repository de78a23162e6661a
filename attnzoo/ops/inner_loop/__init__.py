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
    "inner_tokens",
    "read_unit",
    "stepped",
    "trained_conv",
    "trained_unit",
    "unit_gradients",
]

# Heads whose matrices a program of the kernels holds; all but bfloat16 is computed in float32.
WIDEST_HALF, WIDEST = 64, 32


def unserved(tokens: Tensor, _: Any, first: Tensor, *__: Any) -> str | None:
    """What the Triton kernels do not serve."""
    if not tokens.numel():
        return "no tokens"
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
def inner_tokens(
    tokens: Tensor,
    grid: tuple[int, int],
    first: Tensor,
    second: Tensor,
    taps: Tensor | None = None,
    rate: float = 1.0,
    bias: Tensor | None = None,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """What the queries read of the models that ``trained_unit`` and ``trained_conv`` train.

    Args:
        tokens: Queries, keys and values of the heads side by side, behind them those of the
            convolution: (b, n, 3 * h * d), or (b, n, 3 * h * d + 3 * d) with ``taps``.
        grid: (height, width), n = height * width.
        first: See ``trained_unit``; also for ``second`` and ``rate``. There may be no head.
        taps: Of the convolution, (d, 1, 3, 3), or None.
        bias: What was added to every token, if it is to be given the sum of their gradients.
        impl: See ``attnzoo.ops.dispatch``.

    Returns:
        (b, n, h * d), or (b, n, h * d + d) with ``taps``.
    """
    ...


def _macs(tokens: Tensor, first: Tensor, *_: Any, **__: Any) -> int:
    heads, width, _last = first.shape
    of_heads = 3 * heads * width
    return tokens[..., 0].numel() * (2 * of_heads * width + 6 * (tokens.shape[-1] - of_heads))


# Backward: two products for each; that some are made anew is not counted, as nowhere.
MACS |= {
    "trained_tokens": _macs,
    "trained_tokens_backward": lambda *operands, **_: 2 * _macs(*operands[3:]),
}
