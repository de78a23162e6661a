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


def formulas() -> dict[Any, Callable[..., int]]:
    """Multiply-accumulates of every operator that multiplies matrices, by operator."""
    aten, own = torch.ops.aten, torch.ops.attnzoo

    def halve(formula: Callable[..., int]) -> Callable[..., int]:
        return lambda *args, **kwargs: formula(*args, **kwargs) // 2

    found = {op: halve(formula) for op, formula in flop_registry.items()} | {
        aten.convolution: convolution,
        aten._convolution: convolution,
        aten.convolution_backward: convolution_backward,
        own.routed_projection: routed_projection,
        own.routed_projection_backward: lambda grad, *rest, **_: 2 * routed_projection(*rest),
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


def routed_projection(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return x.numel() * weight.shape[2]  # each token meets one projector


def fused_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    pairs = math.prod(query.shape[:-1]) * key.shape[-2]
    return pairs * (query.shape[-1] + value.shape[-1])


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


def factors(operator: Any, args: tuple[Any, ...]) -> list[Tensor]:
    """The tensors that an operator multiplies; the others are added or choose."""
    aten = torch.ops.aten
    if operator in (aten.addmm, aten.baddbmm):
        args = args[1:]
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    return tensors[: 3 if "attention" in str(operator) else 2]


def attention_part(operator: Any, parameters: Iterable[str]) -> str:
    """The part of a mechanism that an operator belongs to, by the parameters it multiplies."""
    if operator in (torch.ops.aten.convolution, torch.ops.aten._convolution):
        return "conv"
    names = list(parameters)
    if not names:
        return "core"
    return "routing" if any("router" in name for name in names) else "projections"
