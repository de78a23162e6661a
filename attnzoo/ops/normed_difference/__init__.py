"""The difference of two attentions' outputs, normalized (Differential Transformer, 2410.05258)."""

from __future__ import annotations

from torch import Tensor

from attnzoo.ops.dispatch import Impl, operator


@operator
def normed_difference(
    first: Tensor,
    second: Tensor,
    factor: Tensor,
    weight: Tensor,
    eps: float,
    scale: float,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """scale RMSNorm(first - factor second), the norm over each head, as tokens.

    Args:
        first: (b, h, n, d).
        second: Likewise.
        factor: A scalar.
        weight: (d,), of the norm.
        eps: Of the norm.
        scale: What the result is multiplied by.
        impl: See ``attnzoo.ops.dispatch``.

    Returns:
        (b, n, h * d), in the dtype of ``first``.
    """
    ...
