"""Inference in two passes over blocks of tokens, in almost no memory.

The first pass sums what queries read of the keys, the second reads it with the queries. Besides
the tokens that come in, one tensor as large as they are is cached: first it holds what a block
needs of its neighbors (values, which a convolution wants to see; scans of another direction), then
the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from attnzoo.contract import AttentionConfig
from attnzoo.errors import InvalidValue
from attnzoo.ops.gated_scan import Direction, scan, unscan
from attnzoo.ops.precision import in_float32

State = list[tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True)
class StreamConfig(AttentionConfig):
    """The option of every linear mechanism."""

    stream: int | None = None  # tokens per block in eval mode without gradients

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stream is None:
            return
        self.at_least(1, "stream")
        if (impl := getattr(self, "impl", "auto")) not in ("auto", "torch", "reference"):
            raise InvalidValue(
                f"impl={impl!r} takes all tokens at once; set stream=None or impl='auto'"
            )

    def block(self, training: bool) -> int | None:
        """Tokens per block of a forward now, or None where all come at once.

        A batch norm in training, a gradient and the reference want all of them.
        """
        is_reference = getattr(self, "impl", None) == "reference"
        is_whole = training or torch.is_grad_enabled() or is_reference
        return None if is_whole else self.stream


def summed(whole: State, part: State) -> State:
    """The state of both states' keys, where states add up."""
    return [
        tuple(a + b for a, b in zip(one, other, strict=True))
        for one, other in zip(whole, part, strict=True)
    ]


def spans_of(grid: tuple[int, int], block: int, rows: int = 1) -> list[slice]:
    """Blocks of at most ``block`` tokens, but at least ``rows`` rows of the grid or a multiple."""
    height, width = grid
    step = max(1, block // (width * rows)) * rows
    return [slice(row * width, min(height, row + step) * width) for row in range(0, height, step)]


def first_pass(
    x: Tensor,
    spans: list[slice],
    encode: Callable[[slice], tuple[Tensor | None, State]],
    merge: Callable[[State, State], State] = summed,
) -> tuple[Tensor | None, State]:
    """Encodes every block.

    Args:
        x: (b, n, d).
        spans: The blocks' places.
        encode: A place -> what to cache of its tokens, (b, m, up to d), or None; and the state
            of their keys.
        merge: Joins two states.

    Returns:
        What was cached, in the first channels of (b, n, d), or None; and the state of all keys.
    """
    cached: Tensor | None = None
    total: State = []
    for span in spans:
        value, state = encode(span)
        total = merge(total, state) if span.start else state
        if value is not None:
            cached = value.new_empty(x.shape) if cached is None else cached
            cached[:, span, : value.shape[-1]] = value
        del value, state
    return cached, total


def second_pass(
    cached: Tensor | None, spans: list[slice], decode: Callable[[slice], Tensor]
) -> Tensor:
    """What ``decode`` makes of each block, (b, m, d), together; overwrites what was cached."""
    out = done = decode(spans[0])
    if cached is None:
        cached = out.new_empty(out.shape[0], spans[-1].stop, out.shape[2])
    for last, span in pairwise(spans):
        out = decode(span)
        # One block late, because this one's convolution looks at what is cached above it.
        cached[:, last], done = done, out
    cached[:, spans[-1]] = done
    return cached


def convolve(
    x: Tensor, span: slice, width: int, conv: Callable[..., Tensor], halo: int, impl: str
) -> Tensor:
    """A block of the convolution of ``x``, which is on a grid of ``width``.

    ``halo`` are the rows that it looks up and down.
    """
    first = max(0, span.start - halo * width)
    near = x[:, first : span.stop + halo * width]
    out = conv(near, (near.shape[1] // width, width), impl=impl)
    return out.narrow(1, span.start - first, span.stop - span.start)


@in_float32
def softmax_fold(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> State:
    """State of a few queries' softmax attention over a block of keys; ``softmax_merge`` joins two.

    Args:
        query: (b, h, m, d).
        key: (b, h, n, d).
        value: (b, h, n, d).
        bias: Added to the scores, (h, m, n).

    Returns:
        Largest score and sum of exponentials of each query, both (b, h, m, 1), and the values'
        weighted sum, (b, h, m, d), in float32 or better.
    """
    scores = query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)
    return weighted(scores if bias is None else scores + bias, value)


@in_float32
def weighted(scores: Tensor, *values: Tensor) -> State:
    """State of values under the exponentials of scores; ``softmax_merge`` joins two.

    Args:
        scores: (..., m, n).
        values: (..., n, d) each.

    Returns:
        Largest score and sum of exponentials, both (..., m, 1), and the values' weighted sums,
        (..., m, d) each, in float32 or better.
    """
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top).exp_()
    sums = (weights @ value for value in values)
    return [(top, weights.sum(-1, keepdim=True), *sums)]


def softmax_merge(whole: State, part: State) -> State:
    """The state of both states' keys."""
    [(one, *sums)], [(other, *others)] = whole, part
    top = torch.maximum(one, other)
    left, right = (one - top).exp(), (other - top).exp()
    return [(top, *(a * left + b * right for a, b in zip(sums, others, strict=True)))]


def stream_scans(
    x: Tensor,
    grid: tuple[int, int],
    block: int,
    directions: Sequence[Direction],
    advance: Callable[[Tensor, Any], tuple[Tensor, Any]],
    finish: Callable[[Tensor, Tensor], Tensor],
    prepare: Callable[[Tensor, int, int, int, Direction], Tensor] | None = None,
) -> Tensor:
    """Runs scans in several directions one after the other, block by block, and means them.

    Args:
        x: (b, h * w, d).
        grid: (height, width).
        block: Tokens per block; whole rows, or columns, of the grid are taken, at least one.
        directions: Of the scans.
        advance: Tokens of a block in the order of a scan, and the state that the last one left,
            if there was one -> outputs of the scan, (b, m, heads, e), and the state that is left.
        finish: Tokens of a block and the mean of the scans' outputs -> (b, m, d).
        prepare: What ``advance`` gets in place of the tokens, (b, m, ...), where it needs more
            than them: of the image, (b, h, w, d), the axis, first and number of a block's rows or
            columns, and the direction.

    Returns:
        (b, h * w, d).
    """
    image, cached, dtype = x.unflatten(1, grid), None, x.dtype
    for passed, direction in enumerate(directions, 1):
        axis = 2 if direction.startswith("columns") else 1
        lines, length = grid[axis - 1], grid[2 - axis]
        starts = list(range(0, lines, max(1, block // length)))
        state = None
        for start in reversed(starts) if direction.endswith("backward") else starts:
            size = min(max(1, block // length), lines - start)
            here = image.narrow(axis, start, size)
            tokens, shape = here.flatten(1, 2), (here.shape[1], here.shape[2])
            fed = tokens if prepare is None else prepare(image, axis, start, size, direction)
            out, state = advance(scan(fed, shape, direction), state)
            out, heads = unscan(out, shape, direction).flatten(2), out.shape[2:]
            if cached is not None and passed > 1:
                out = out + cached.narrow(axis, start, size)[..., : out.shape[-1]].flatten(1, 2)
            if passed == len(directions):
                out = finish(tokens, (out / passed).unflatten(2, heads))
                dtype = out.dtype
            if cached is None:  # a scan's outputs may be wider than tokens
                cached = out.new_empty(*image.shape[:-1], max(out.shape[-1], x.shape[-1]))
            cached.narrow(axis, start, size)[..., : out.shape[-1]] = out.unflatten(1, shape)
    assert cached is not None
    return cached[..., : x.shape[-1]].to(dtype).flatten(1, 2)


def stream_orders(
    x: Tensor,
    orders: Sequence[Tensor],
    block: int,
    advance: Callable[[Tensor, Any, int], tuple[Tensor, Any]],
) -> Tensor:
    """Sums scans in several orders, one after the other, block by block.

    Args:
        x: (b, n, d).
        orders: Of the tokens, each a permutation of their n indices.
        block: Tokens per block.
        advance: Tokens of a block in an order, what the block before left, and the number of the
            order -> the scan's part of the outputs, (b, m, e), and what is left.

    Returns:
        (b, n, e).
    """
    total = None
    for number, order in enumerate(orders):
        carried = None
        for places in order.split(block):
            out, carried = advance(x[:, places], carried, number)
            if total is None:
                total = out.new_zeros(out.shape[0], x.shape[1], out.shape[2])
            total[:, places] += out
    assert total is not None
    return total
