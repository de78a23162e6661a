"""A few tokens' normalized linear attention in C, for CPUs."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from torch import Tensor

from attnzoo.errors import InvalidValue
from attnzoo.ops.native_build import library


def linear_core(
    query: Tensor, query_norm: Tensor, key: Tensor, key_norm: Tensor, value: Tensor, eps: float
) -> Tensor:
    """Q (K^T V) / (Q_norm sum_j K_norm_j^T + eps).

    Args:
        query: (b, h, n, d), as the next; float32, as all.
        query_norm: What normalizes the queries.
        key: (b, h, m, d), as the next.
        key_norm: What normalizes the keys.
        value: (b, h, m, e).
        eps: Added to the normalizer.

    Returns:
        (b, h, n, e).

    Raises:
        InvalidValue: Shapes do not fit.
    """
    (b, h, n, d), (m, e) = query.shape, value.shape[2:]
    if key.shape != (b, h, m, d) or (query_norm.shape, key_norm.shape) != (query.shape, key.shape):
        raise InvalidValue(
            f"queries {tuple(query.shape)} do not multiply keys {tuple(key.shape)} of values "
            f"{tuple(value.shape)}; give both kernels one width"
        )
    out = value.new_empty(b, n, h, e).transpose(1, 2)
    state = value.new_empty(d * (e + 1))
    operands, strides = [], []
    for z in (query, query_norm, key, key_norm, value, out):
        is_fit = z.stride(-1) == 1 and z.dtype is value.dtype
        operands.append(z if is_fit else z.to(value.dtype).contiguous())
        strides += operands[-1].stride()[:3]
    _function()(
        *map(Tensor.data_ptr, operands), (ctypes.c_long * 18)(*strides), state.data_ptr(), eps,
        b, h, n, m, d, e,
    )  # fmt: skip
    return out


@functools.cache
def _function() -> Any:
    function: Any = getattr(library(), "linear_core")  # noqa: B009
    pointer = ctypes.c_void_p
    function.argtypes = [pointer] * 8 + [ctypes.c_float] + [ctypes.c_long] * 6
    function.restype = None
    return function
