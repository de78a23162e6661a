"""The norm-preserving power of ReLU as one operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.ops.fused.support import kernels, operator


@operator("relu_power_map")
def _relu_power_map(z: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    return kernels().power_map_forward(z, gamma)


@_relu_power_map.register_fake
def _(z: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), z.new_empty(3, z.shape[0], dtype=torch.float32)


@operator("relu_power_map_backward")
def _relu_power_map_backward(
    grad: Tensor, z: Tensor, gamma: Tensor, stats: Tensor
) -> tuple[Tensor, Tensor]:
    return kernels().power_map_backward(grad, z, gamma, stats)


@_relu_power_map_backward.register_fake
def _(grad: Tensor, z: Tensor, gamma: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), torch.empty_like(gamma)


def _power_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _power_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor]:
    return _relu_power_map_backward(grad, *ctx.saved_tensors)


_relu_power_map.register_autograd(_power_backward, setup_context=_power_setup)


def relu_power_map(z: Tensor, gamma: Tensor) -> Tensor:
    """``power_map(relu(z), gamma)`` in one pass over memory.

    Args:
        z: (..., d), float32 or half precision; computed in float32.
        gamma: Exponents, broadcastable to (..., 1).

    Returns:
        (..., d), in the dtype of z.
    """
    powers = gamma.float().expand(*z.shape[:-1], 1).reshape(-1)
    # Expanding may leave all rows one address, which a kernel would not see.
    powers = powers.contiguous()
    return _relu_power_map(z.reshape(-1, z.shape[-1]), powers)[0].view(z.shape)
