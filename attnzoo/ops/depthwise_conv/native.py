"""A few tokens' convolution in several normed branches in C, for CPUs: see ``DepthwiseConv``."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnzoo.ops.native_build import library


def branch_conv(
    x: Tensor,
    grid: tuple[int, int],
    branches: Sequence[Tensor],
    eps: float,
    added: Tensor | None,
) -> Tensor:
    """The sum of three depthwise convolutions, each with a batch norm in eval mode.

    Args:
        x: (b, h * w, c).
        grid: (h, w).
        branches: Of each, its kernel, (c, 1, 3, 3), (c, 1, 3, 1) and (c, 1, 1, 3) in turn, and
            its norm's running mean, running variance, weight and bias, (c,) each; in float32.
        eps: Of the norms.
        added: (b, h * w, c), to which the result is added, or None.

    Returns:
        (b, h * w, c).
    """
    x, added = x.contiguous(), None if added is None else added.contiguous()
    out, kernel = torch.empty_like(x), x.new_empty(10, x.shape[-1])
    branches = list(map(Tensor.contiguous, branches))
    pointers = (ctypes.c_void_p * 15)(*map(Tensor.data_ptr, branches))
    _function()(
        x.data_ptr(), pointers, eps, kernel.data_ptr(),
        None if added is None else added.data_ptr(), out.data_ptr(), x.shape[0], *grid, x.shape[2],
    )  # fmt: skip
    return out


@functools.cache
def _function() -> Any:
    function: Any = getattr(library(), "branch_conv")  # noqa: B009
    pointer, number = ctypes.c_void_p, ctypes.c_long
    function.argtypes = [pointer, pointer, ctypes.c_float, *[pointer] * 3, *[number] * 4]
    function.restype = None
    return function
