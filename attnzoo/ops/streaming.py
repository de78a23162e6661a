"""Inference of linear attention in two passes over blocks of tokens, in almost no memory.

The first pass sums the keys' states, the second reads them with the queries. Besides the tokens
that come in, one tensor as large as they are is kept: first it holds the values, which a
convolution wants to see, then the outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

State = list[tuple[Tensor, ...]]


def linear_parts(
    layer: nn.Module, x: Tensor, width: int, parts: slice = slice(None)
) -> list[Tensor]:
    """Outputs of a linear layer in parts of ``width``, without computing the others.

    One product per part makes each a tensor of its own, which is freed by itself and is not a
    strided slice of a longer row: that costs a CPU more than the three products.
    """
    if type(layer) is not nn.Linear:  # an adapter around it has its own idea of its weight
        return list(layer(x).split(width, dim=-1)[parts])
    weights = layer.weight.split(width)[parts]
    biases = [None] * len(weights) if layer.bias is None else layer.bias.split(width)[parts]
    return [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def stream(
    x: Tensor,
    grid: tuple[int, int],
    block: int,
    encode: Callable[[Tensor, slice], tuple[Tensor, State]],
    decode: Callable[[Tensor, State], Tensor],
    proj: nn.Module,
    conv: Callable[[Tensor, tuple[int, int]], Tensor] | None = None,
    halo: int = 0,
) -> Tensor:
    """Runs linear attention block by block.

    Args:
        x: (b, h * w, d).
        grid: (height, width).
        block: Tokens per block; whole rows of the grid are taken, at least one.
        encode: Tokens of a block and their place -> their values (b, m, d), and the state of
            their keys, which is summed over blocks.
        decode: Tokens of a block and the sum of all states -> (b, m, d).
        proj: The output projection.
        conv: A convolution of the values, (b, m, d) on its grid -> (b, m, d), which is added.
        halo: Rows that the convolution looks up and down.

    Returns:
        (b, h * w, d).
    """
    height, width = grid
    step, halo = max(1, halo, block // width), halo * width
    starts = range(0, height, step)
    spans = [slice(row * width, min(height, row + step) * width) for row in starts]
    total: State = []
    kept = done = x
    for span in spans:
        value, state = encode(x[:, span], span)
        if span.start == 0:
            kept, total = value.new_empty(x.shape), state
        else:
            total = [
                tuple(a + b for a, b in zip(whole, part, strict=True))
                for whole, part in zip(total, state, strict=True)
            ]
        if conv is not None:
            kept[:, span] = value
        del value, state
    for last, span in zip([None, *spans], spans, strict=False):
        out = decode(x[:, span], total)
        if conv is not None:
            first = max(0, span.start - halo)
            values = kept[:, first : span.stop + halo]
            local = conv(values, (values.shape[1] // width, width))
            out = out + local.narrow(1, span.start - first, out.shape[1]).to(out.dtype)
        # One block late, because the next one's convolution looks at the values above it.
        if last is not None:
            kept[:, last] = done
        done = proj(out)
    kept[:, spans[-1]] = done
    return kept
