"""The one place that owns autocast and float32."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def _promote(value: Any) -> Any:
    if isinstance(value, list | tuple):
        promoted = [_promote(item) for item in value]
        return type(value)(*promoted) if hasattr(value, "_fields") else type(value)(promoted)
    is_half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if is_half else value


def in_float32(function: Function) -> Function:
    """Runs ``function`` with autocast off and half-precision tensors in float32.

    The first argument is a tensor, or a tuple or list that begins with one; a tensor result comes
    back in its dtype. Whatever holds tensors is promoted too, float64 stays float64.
    """

    def is_wide(operands: Any) -> bool:
        for z in operands:
            if isinstance(z, Tensor):
                if z.dtype is torch.float16 or z.dtype is torch.bfloat16:
                    return False
            elif isinstance(z, list | tuple) and not is_wide(z):
                return False
        return True

    @functools.wraps(function)
    def wrapper(first: Any, *args: Any, **kwargs: Any) -> Any:
        like = first
        while not isinstance(like, Tensor):
            like = like[0]
        # Casting alone is not enough: autocast lowers the matmul that follows, and a float16
        # sum over a few thousand keys overflows.
        device_type = like.device.type
        if device_type == "meta":  # has no autocast; asking torch breaks a graph in torch 2.11
            return function(first, *args, **kwargs)
        if not torch.is_autocast_enabled(device_type) and is_wide((first, args, *kwargs.values())):
            result = function(first, *args, **kwargs)  # nothing to guard
        else:
            with torch.autocast(device_type, enabled=False):
                result = function(
                    _promote(first),
                    *map(_promote, args),
                    **{name: _promote(value) for name, value in kwargs.items()},
                )
        return result.to(like.dtype) if isinstance(result, Tensor) else result

    return cast(Function, wrapper)


def in_wide_range(x: Tensor) -> Tensor:
    """float16 as float32, anything else as it is.

    A normalizer near 0 makes gradients beyond 65504, float16's largest, that what comes before it
    in the forward makes small again; in float16 they are infinite by then, and infinity times 0
    is NaN.
    """
    return x.float() if x.dtype == torch.float16 else x


def operand_dtype(x: Tensor) -> torch.dtype:
    """The dtype to which autocast would cast ``x`` for a matmul; its own where autocast is off."""
    device_type, dtype = x.device.type, x.dtype
    # The meta device has no autocast, and float64 is never lowered.
    if device_type == "meta" or dtype == torch.float64:
        return dtype
    is_on = torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if is_on else dtype


def autocast_operands(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts operands as autocast would for a matmul; custom operators are unknown to it."""
    dtypes = map(operand_dtype, tensors)
    return tuple(z if z.dtype is t else z.to(t) for z, t in zip(tensors, dtypes, strict=True))
