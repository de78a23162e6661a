"""Tokens as windows of their grid, channel by channel, and back."""

from __future__ import annotations

from torch import Tensor

from attnzoo.ops.dispatch import Impl, operator


@operator
def to_windows(
    x: Tensor, grid: tuple[int, int], size: tuple[int, int], *, impl: Impl = "auto"
) -> Tensor:
    """Puts the tokens of a window side by side, as a convolution's kernels lie.

    Args:
        x: (b, h * w, c).
        grid: (h, w).
        size: (p, q), which divide h and w.
        impl: See ``attnzoo.ops.dispatch``.

    Returns:
        (b, h / p * w / q, c * p * q).
    """
    ...


@operator
def from_windows(
    x: Tensor, grid: tuple[int, int], size: tuple[int, int], *, impl: Impl = "auto"
) -> Tensor:
    """Inverse of ``to_windows``: (b, h / p * w / q, c * p * q) -> (b, h * w, c).

    Args:
        x: Windows.
        grid: (h, w), of the tokens.
        size: (p, q).
        impl: See ``attnzoo.ops.dispatch``.
    """
    ...
