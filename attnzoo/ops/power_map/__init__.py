"""The norm-preserving power map of focused linear attention (FLatten, arXiv 2308.00442)."""

from __future__ import annotations

from torch import Tensor

from attnzoo.ops.dispatch import Impl, operator


@operator
def power_map(z: Tensor, gamma: Tensor, *, impl: Impl = "auto") -> Tensor:
    """x^gamma / |x^gamma| * |x| of x = ReLU(z), over the last dimension.

    Sharpens a token and keeps its norm. Powers are those of the positive entries: an entry that
    is not positive becomes 0 for every exponent, 0 and negative ones too, and adds nothing to any
    gradient. Finite with finite gradients for rows of any scale, and for rows without a positive
    entry, which become 0. Positive means above the smallest normal number, 1.2e-38 in float32; an
    entry further than that factor below the largest of its row counts as that far below it.

    Args:
        z: (..., d); entries below 0 count as 0.
        gamma: Exponents of any sign, broadcastable to (..., 1). Below 0 the smallest positive
            entries become the largest; at 0 all positive entries become equal.
        impl: "native" is one pass in C, for CPUs.

    Returns:
        (..., d), computed in float32 or better.
    """
    ...


@operator
def scaled_power_map(
    z: Tensor, scale: Tensor, gamma: float, offset: float, *, impl: Impl = "auto"
) -> Tensor:
    """``power_map`` of (ReLU(z) + offset) / scale, FLatten's kernel function in one pass.

    Args:
        z: (..., d).
        scale: (d,), positive.
        gamma: The one exponent.
        offset: Added to every entry, at least 0.
        impl: See ``attnzoo.ops.dispatch``; "triton" rounds the result only, to the dtype of z.

    Returns:
        (..., d).
    """
    ...
