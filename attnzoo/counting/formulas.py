"""What an operator costs, and whose cost it is, for torch's ``FlopCounterMode``.

Where torch has a formula and it is right, it is used. It counts 0 for grouped matmuls and for the
fused attention of CPUs, and the backward of a depthwise convolution as that of a dense one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from attnzoo.ops.dispatch import OPERATORS
from attnzoo.ops.softmax import softmax_macs

for _operator in OPERATORS:  # those that come later find the counter and tell it themselves
    _operator.register_flops()


def formulas() -> dict[Any, Callable[..., int]]:
    """Multiply-accumulates of every operator that multiplies matrices, by operator."""
    aten = torch.ops.aten

    def halve(formula: Callable[..., int]) -> Callable[..., int]:
        return lambda *args, **kwargs: formula(*args, **kwargs) // 2

    found = {op: halve(formula) for op, formula in flop_registry.items()} | {
        aten.convolution: convolution,
        aten._convolution: convolution,
        aten.convolution_backward: convolution_backward,
    }
    for name, formula in (
        ("_scaled_dot_product_flash_attention_for_cpu", fused_attention),
        ("_scaled_dot_product_flash_attention_for_cpu_backward", fused_attention_backward),
        ("_grouped_mm", grouped_product),
    ):
        if hasattr(aten, name):  # not every version of torch has them all
            found[getattr(aten, name)] = formula
    return found


def convolution(x: Tensor, weight: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    return out_val.numel() * weight[0].numel()


def convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, *args: Any, **_: Any) -> int:
    wants_x, wants_weight = args[-1][:2]
    return grad.numel() * weight[0].numel() * (bool(wants_x) + bool(wants_weight))


def fused_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return softmax_macs(
        math.prod(query.shape[:-1]), key.shape[-2], query.shape[-1], value.shape[-1]
    )


def fused_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> int:
    # The scores once more, then the gradients of values, weights, queries and keys.
    pairs = math.prod(query.shape[:-1]) * key.shape[-2]
    return pairs * (3 * query.shape[-1] + 2 * value.shape[-1])


def grouped_product(left: Tensor, right: Tensor, *_: Any, **__: Any) -> int:
    if left.ndim == 3 and right.ndim == 2:  # columns of the right factor are shared out
        return right.numel() * left.shape[-2]
    return left.numel() * right.shape[-1]


def products(operator: Any, args: tuple[Any, ...], macs: int) -> list[tuple[int, list[Tensor]]]:
    """The products that an operator makes: their multiply-accumulates and what they multiply.

    The other tensors of an operator are added or choose.
    """
    aten = torch.ops.aten
    if str(operator) == "attnzoo.focused_difference":
        z, router, key_sum = args[0], args[2], args[8]
        if key_sum is None:
            return [(macs, [z, router])]
        return [(macs - z.numel(), [z, router]), (z.numel(), [z, key_sum])]
    if str(operator) == "attnzoo.map_attention":
        query, key, routers = args[0], args[1], args[5:10]
        routing = query[..., 0].numel() * sum(router.numel() for router in routers)
        return [(routing, [query, routers[0]]), (macs - routing, [query, key])]
    if operator in (aten.addmm, aten.baddbmm):
        args = args[1:]
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    return [(macs, tensors[: 3 if "attention" in str(operator) else 2])]


def routed_weights(operator: Any, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Parameters of which one matrix only acts on a token."""
    places = {"attnzoo.routed_linear": slice(1, 2), "attnzoo.grouped_linear": slice(1, 3)}
    return tuple(z for z in args[places.get(str(operator), slice(0))] if z is not None)


def attention_part(operator: Any, parameters: Iterable[str]) -> str:
    """The part of a mechanism that an operator belongs to, by the parameters it multiplies."""
    if str(operator) in ("aten.convolution", "aten._convolution", "attnzoo.stencil"):
        return "conv"
    names = list(parameters)
    if not names:
        return "core"
    return "routing" if any("router" in name for name in names) else "projections"
