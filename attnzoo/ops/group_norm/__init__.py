"""GroupNorm of an image's tokens and a leaky ReLU, without leaving the layout of tokens."""

from __future__ import annotations

from torch import Tensor

from attnzoo.ops.dispatch import Impl, operator


@operator
def group_norm(
    x: Tensor,
    shift: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    slope: float = 1.0,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """LeakyReLU(GroupNorm(x + shift)), the norm over all tokens and the channels of a group.

    Args:
        x: (b, n, c).
        shift: (c,), the bias of what made ``x``.
        groups: Of neighboring channels, a divisor of c.
        weight: (c,).
        bias: (c,).
        eps: Added to the variance.
        slope: Of the leaky ReLU below 0; 1 is none.
        impl: See ``attnzoo.ops.dispatch``.

    Returns:
        (b, n, c), in the dtype of ``x``.
    """
    ...
