"""Softmax attention of each token to its neighborhood on the grid (NATTEN, CLEAR)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnzoo.ops.dispatch import MACS, Impl, operator
from attnzoo.ops.neighborhood.window import Grid, Window, pairs_of

__all__ = ["Window", "neighborhood_attention", "neighborhood_macs"]


def unserved(query: Tensor, *_: Any) -> str | None:
    """What kernels do not serve; wider heads were not tried."""
    width = query.shape[-1]
    return f"heads of width {width}" if width < 16 or width > 128 else None


@operator
def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: Grid,
    window: Window,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V over the keys of each query's window.

    Memory grows with n times the keys of a window, never with n x n.

    Args:
        query: (batch, heads, height * width, d).
        key: Likewise.
        value: Likewise.
        grid: (height, width).
        window: Which keys a query sees. One that is larger than the map is cut to the map.
        impl: See ``attnzoo.ops.dispatch``. "torch" multiplies tiles, anywhere; "flex" is PyTorch's
            FlexAttention, on a GPU, compiled at the first call of each grid; "triton" kernels of
            our own; "natten" the library of that name, for windows that fit into the map.

    Returns:
        (batch, heads, height * width, d).

    Raises:
        Unavailable: The implementation that was asked for cannot run here.
    """
    ...


def neighborhood_macs(grid: Grid, window: Window, width: int) -> int:
    """Multiply-accumulates of the pairs that see each other, of heads of ``width`` together.

    The fast forms multiply dense tiles, and what they mask in them on top.
    """
    return 2 * pairs_of(grid, window) * width


def _macs(query: Tensor, key: Tensor, value: Tensor, height: int, width: int, *window: int) -> int:
    batch, heads, _, channels = query.shape
    macs = neighborhood_macs((height, width), Window(*window), channels)
    return batch * heads * macs


def _macs_of_tokens(query: Tensor, key: Tensor, value: Tensor, _: int, *sizes: int) -> int:
    (height, width, *window), (batch, _, channels) = sizes, query.shape
    return batch * neighborhood_macs((height, width), Window(*window), channels)


MACS |= {
    "neighborhood_tokens": lambda *args, **_: _macs_of_tokens(*args),
    "neighborhood_tokens_backward": lambda *args, **_: 5 * _macs_of_tokens(*args[3:]) // 2,
    "neighborhood": lambda *args, **_: _macs(*args),
    "neighborhood_backward": lambda _, *args, **__: 5 * _macs(*args) // 2,
}
