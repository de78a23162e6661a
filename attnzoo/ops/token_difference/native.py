"""The token difference of a few tokens in C, for CPUs."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnzoo.ops.native_build import library


def focused_difference(operands: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """phi(Z) and phi(Z) - lambda phi(Z') with phi the power map whose power a token chooses.

    Args:
        operands: Z and Z', (b, n, d); routers of their exponents, (factors, d), and of lambda,
            (factors', 2 d); exponents, (1, factors); lambdas, (1, factors'). All in float32.

    Returns:
        Both, (b, n, d), and the three choices of each token, (3, b, n).
    """
    operands = list(map(Tensor.contiguous, operands))
    first, gammas, lambdas = operands[0], operands[5], operands[6]
    *lead, width = first.shape
    base, difference = torch.empty_like(first), torch.empty_like(first)
    chosen = first.new_empty(3, *lead, dtype=torch.int64)
    pointers = map(Tensor.data_ptr, [*operands, base, difference, chosen])
    _function()(*pointers, first.numel() // width, width, gammas.numel(), lambdas.numel())
    return base, difference, chosen


@functools.cache
def _function() -> Any:
    function: Any = getattr(library(), "focused_difference")  # noqa: B009
    function.argtypes = [ctypes.c_void_p] * 10 + [ctypes.c_long] * 4
    function.restype = None
    return function
