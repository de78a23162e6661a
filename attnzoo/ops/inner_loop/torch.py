"""The inner step by PyTorch's operators, with the gradient written out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.precision import in_float32


@in_float32
def unit_gradients(
    key: Tensor, value: Tensor, first: Tensor, second: Tensor, tokens: int
) -> tuple[Tensor, Tensor]:
    """Gradients of the loss of ``trained_unit``; those of parts of the tokens add up.

    Args:
        key: See there; also for ``value``, ``first`` and ``second``.
        tokens: n, of which ``key`` may hold a part.

    Returns:
        Both (b, h, d, d), in float32 or better.
    """
    linear, gate = key @ first, key @ second
    error = value / (-3 * tokens)
    squashed = gate.sigmoid()
    slope = squashed * (1 + gate * (1 - squashed))  # of SiLU
    return key.mT @ (error * gate * squashed), key.mT @ (error * linear * slope)


@in_float32
def stepped(weight: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """A matrix after its step."""
    return weight - rate * gradient / (gradient.norm(dim=-2, keepdim=True) + 1)


def trained_unit(
    key: Tensor, value: Tensor, first: Tensor, second: Tensor, rate: float = 1.0
) -> tuple[Tensor, Tensor]:
    """See ``attnzoo.ops.inner_loop``."""
    found = unit_gradients(key, value, first, second, key.shape[2])
    return stepped(first, found[0], rate), stepped(second, found[1], rate)


@in_float32
def trained_conv(key: Tensor, value: Tensor, weight: Tensor, rate: float = 1.0) -> Tensor:
    """See ``attnzoo.ops.inner_loop``."""
    height, width = key.shape[2:]
    error = (value / (-3 * height * width)).flatten(2).unsqueeze(-1)
    padded = F.pad(key, (1, 1, 1, 1))
    # Nine products of what a tap sees with the error, not a convolution with a kernel as large as
    # the image.
    taps = [
        padded[..., i : i + height, j : j + width].flatten(2).unsqueeze(-2) @ error
        for i in range(3)
        for j in range(3)
    ]
    gradient = torch.cat(taps, -1).view(*key.shape[:2], 3, 3)
    norm = gradient.norm(dim=(-2, -1), keepdim=True)
    return weight.squeeze(1) - rate * gradient / (norm + 1)
