"""SiLU of a depthwise convolution over each token and the few before it, as Mamba has it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnzoo.ops.dispatch import MACS, Impl, operator


@operator
def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor, reverse: bool = False, *, impl: Impl = "auto"
) -> Tensor:
    """SiLU(conv(x) + bias), without leaving the layout of tokens.

    Args:
        x: (b, n, c).
        weight: (c, 1, k); its last tap is the token's own.
        bias: (c,).
        reverse: Whether it goes over each token and those after it.
        impl: See ``attnzoo.ops.dispatch``.

    Returns:
        (b, n, c).
    """
    ...


def _macs(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return x.shape[0] * x.shape[1] * weight.numel()


MACS |= {
    "causal_conv": _macs,
    "causal_conv_backward": lambda _, *operands, **__: 2 * _macs(*operands),
}
