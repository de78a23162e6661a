"""Rotary positions on a grid (RoFormer, arXiv 2104.09864; in two axes as in RALA, 2411.07635)."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.ops.precision import in_float32

SLOWEST = 10_000.0  # RoFormer's base; RALA's slowest pair turns by its inverse per step


@in_float32
def rotated(z: Tensor, grid: tuple[int, int], span: slice = slice(None)) -> Tensor:
    """Turns pairs of channels by angles that grow with the token's row or column.

    The first half of a head's channels turns with the row, the second with the column; of d
    channels d / 4 pairs each, by 10000 ** -t per step, t evenly from 0 to 1. Channels beyond the
    last multiple of four stay as they are.

    Args:
        z: (b, heads, m, d), tokens of whole rows.
        grid: (height, width).
        span: The tokens' place in it.

    Returns:
        (b, heads, m, d).
    """
    height, width = grid
    pairs = z.shape[-1] // 4
    if not pairs:
        return z
    first, stop, _ = span.indices(height * width)
    options = {"device": z.device, "dtype": z.dtype}
    speed = SLOWEST ** -torch.linspace(0, 1, pairs, **options)
    rows = torch.arange(first // width, stop // width, **options)[:, None] * speed
    columns = torch.arange(width, **options)[:, None] * speed
    # (rows, width, 2 * pairs), of every token.
    angles = [rows[:, None].expand(-1, width, -1), columns.expand(len(rows), -1, -1)]
    angle = torch.cat(angles, -1).flatten(0, 1)
    cosine, sine = angle.cos(), angle.sin()
    even, odd = z[..., : 4 * pairs].unflatten(-1, (2 * pairs, 2)).unbind(-1)
    turned = torch.stack((even * cosine - odd * sine, odd * cosine + even * sine), -1).flatten(-2)
    rest = z[..., 4 * pairs :]
    return turned if not rest.shape[-1] else torch.cat((turned, rest), -1)
