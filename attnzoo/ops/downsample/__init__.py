"""Depthwise convolution of tokens with a stride, which leaves fewer of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnzoo.ops.dispatch import MACS, Impl, operator

MOST = 4  # side of the Triton kernel's window

__all__ = ["coarse_grid", "downsample"]


def coarse_grid(grid: tuple[int, int], stride: int) -> tuple[int, int]:
    """(height, width) of what ``downsample`` leaves."""
    return -(-grid[0] // stride), -(-grid[1] // stride)


def unserved(
    x: Tensor, grid: tuple[int, int], weight: Tensor, bias: Any, stride: int, padding: int
) -> str | None:
    """What the Triton kernels do not serve."""
    if weight.shape[-1] > MOST:
        return f"windows of {weight.shape[-1]} tokens a side, more than {MOST}"
    if not padding and (grid[0] % stride or grid[1] % stride):
        return f"windows of {stride} tokens that hang over the edge of a {grid} grid"
    return None


@operator
def downsample(
    x: Tensor,
    grid: tuple[int, int],
    weight: Tensor,
    bias: Tensor,
    stride: int,
    padding: int,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Convolves each channel with a kernel of its own, every ``stride`` tokens.

    Without padding, windows that hang over the edge sum only the tokens that are there, and the
    sum is scaled up to a full window's, so that a mean stays a mean.

    Args:
        x: (b, h * w, parts * c); all parts share the kernels.
        grid: (h, w).
        weight: (c, 1, k, k).
        bias: (c,).
        stride: Distance between windows, at most k.
        padding: Zeros around the image: 0 where k is the stride, else k // 2.
        impl: See ``attnzoo.ops.dispatch``.

    Returns:
        (b, ceil(h / stride) * ceil(w / stride), parts * c).
    """
    ...


def _macs(x: Tensor, weight: Tensor, bias: Any, height: int, width: int, stride: int, *_: Any,
          **__: Any) -> int:  # fmt: skip
    high, wide = coarse_grid((height, width), stride)
    return x.shape[0] * x.shape[2] * high * wide * weight[0].numel()


MACS |= {
    "downsample": _macs,
    "downsample_backward": lambda grad, x, weight, *sizes, **_: 2 * _macs(x, weight, None, *sizes),
}
