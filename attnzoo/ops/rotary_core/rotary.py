"""Rotary positions on a grid (RoFormer, arXiv 2104.09864; in two axes as in RALA, 2411.07635)."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.ops.dispatch import is_passing, is_seen_through
from attnzoo.ops.precision import in_float32

SLOWEST = 10_000.0  # RoFormer's base; RALA's slowest pair turns by its inverse per step
_TURNS: dict[tuple[object, ...], Tensor] = {}  # never let go: a recorded graph reads them


def turns(steps: int, pairs: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Cosines and sines of what each pair has turned after 0, 1, ... steps; cached.

    Args:
        steps: How many.
        pairs: Pair i turns by 10000 ** -t per step, t evenly from 0 to 1.
        device: Where to.
        dtype: Of the result, whose angles are those of float64.

    Returns:
        (2, steps, pairs).
    """
    key = steps, pairs, device, dtype
    # A recording may read what was made before it, though what it makes itself is no number yet.
    if not is_seen_through() and key in _TURNS:  # a compiler would guard the table
        return _TURNS[key]
    with torch.inference_mode(False), torch.no_grad():
        wide = torch.float32 if device.type == "mps" else torch.float64
        speed = SLOWEST ** -torch.linspace(0, 1, pairs, dtype=wide, device=device)
        angle = torch.arange(steps, dtype=wide, device=device)[:, None] * speed
        table = torch.stack((angle.cos(), angle.sin())).to(dtype)
    if not is_passing(device):
        _TURNS[key] = table
    return table


def rows_of(span: slice, grid: tuple[int, int]) -> tuple[int, int]:
    """First row of the grid and the one after the last, of a part of the tokens, whole rows."""
    # Not ``span.indices``, which torch.compile of torch 2.11 cannot trace.
    stop = grid[0] * grid[1] if span.stop is None else span.stop
    return (span.start or 0) // grid[1], stop // grid[1]


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
    width, pairs = grid[1], z.shape[-1] // 4
    if not pairs:
        return z
    first, stop = rows_of(span, grid)
    # More than it reads, for an export: whether a side is the longer one would be a condition.
    steps = sum(grid) if isinstance(width, torch.SymInt) else max(grid)
    table = turns(steps, pairs, z.device, z.dtype)
    rows = table[:, first:stop, None].expand(-1, -1, width, -1)
    columns = table[:, None, :width].expand_as(rows)
    # (m, 2 * pairs), of every token.
    cosine, sine = torch.cat((rows, columns), -1).flatten(1, 2)
    turning, rest = z[..., : 4 * pairs], z[..., 4 * pairs :]
    if _is_complex(turning):
        numbers = torch.view_as_complex(turning.unflatten(-1, (2 * pairs, 2)))
        turned = torch.view_as_real(numbers * torch.complex(cosine, sine)).flatten(-2)
    else:
        # Of a pair (a, b): (a, b) cos + (b, a) (-sin, sin).
        swapped = turning.unflatten(-1, (2 * pairs, 2)).flip(-1).flatten(-2)
        sines = torch.stack((-sine, sine), -1).flatten(-2)
        turned = torch.addcmul(turning * cosine.repeat_interleave(2, -1), swapped, sines)
    return turned if not rest.shape[-1] else torch.cat((turned, rest), -1)


def _is_complex(z: Tensor) -> bool:
    """Whether pairs may be multiplied as complex numbers, in one pass: compilers know none."""
    if not z.is_cpu or is_passing(z.device):  # first: a graph breaks on asking for an offset
        return False
    steps = *z.stride()[:-1], z.storage_offset()
    return z.stride(-1) == 1 and not any(step % 2 for step in steps)
