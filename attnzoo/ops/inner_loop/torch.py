"""The inner step by PyTorch's operators, with the gradient written out."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.depthwise_conv import to_image, to_tokens
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
    squashed = gate.sigmoid()
    unit = gate * squashed
    slope = torch.lerp(unit, unit.new_ones(()), squashed)  # of SiLU: s + s z (1 - s)
    of_first, of_second = key.mT @ (value * unit), key.mT @ (value * linear * slope)
    return of_first / (-3 * tokens), of_second / (-3 * tokens)


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
    padded = F.pad(key, (1, 1, 1, 1))
    seen = [padded[..., i : i + height, j : j + width] for i in range(3) for j in range(3)]
    # What each tap sees times the values, not a convolution with a kernel as large as the image.
    gradient = torch.stack(seen, 2).flatten(3) @ value.flatten(2).unsqueeze(-1)
    gradient = (gradient / (-3 * height * width)).view(*key.shape[:2], 3, 3)
    norm = gradient.norm(dim=(-2, -1), keepdim=True)
    return weight.squeeze(1) - rate * gradient / (norm + 1)


def read_unit(query: Tensor, first: Tensor, second: Tensor, local: Tensor | None = None) -> Tensor:
    """What queries, (b, h, m, d), read of a trained unit, and ``local``: (b, m, h * d + d)."""
    first, second = (w.to(query.dtype) for w in (first, second))
    out = (query @ first * F.silu(query @ second)).transpose(1, 2).flatten(2)
    return out if local is None else torch.cat([out, local.to(out.dtype)], -1)


def read_conv(query: Tensor, taps: Tensor) -> Tensor:
    """What queries, an image (b, c, height, width), read of trained taps: tokens (b, n, c)."""
    # Every image has kernels of its own: as channels of one image they are one call.
    images = query.flatten(0, 1)[None]
    kernels = taps.to(query.dtype).flatten(0, 1)[:, None]
    out = F.conv2d(images, kernels, padding=1, groups=kernels.shape[0])
    return to_tokens(out.view_as(query))


def split_tokens(
    tokens: Tensor, grid: tuple[int, int], first: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Queries, keys and values of the heads, (b, h, n, d), and of the convolution, images."""
    heads, width, _ = first.shape
    of_heads = 3 * heads * width
    own, near = tokens.split([of_heads, tokens.shape[-1] - of_heads], dim=-1)
    parts = own.unflatten(-1, (3, heads, width)).transpose(1, 3).unbind(2)
    return parts, to_image(near, grid).chunk(3, dim=1) if near.shape[-1] else ()


def reading(
    unit: Callable[..., tuple[Tensor, Tensor]], conv: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """``inner_tokens`` of ``attnzoo.ops.inner_loop`` with these two ways to train."""

    def inner_tokens(
        tokens: Tensor, grid: tuple[int, int], first: Tensor, second: Tensor,
        taps: Tensor | None = None, rate: float = 1.0, bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        tokens = tokens if bias is None else tokens + (bias - bias.detach())
        (query, key, value), near = split_tokens(tokens, grid, first)
        local = None
        if taps is not None:
            local = read_conv(near[0], conv(near[1], near[2], taps, rate))
        return read_unit(query, *unit(key, value, first, second, rate), local)

    return inner_tokens


inner_tokens = reading(trained_unit, trained_conv)
