"""Kernels of softmax attention: over few keys, and over neighborhoods."""

from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from attnzoo import build_attention
from attnzoo.errors import InvalidValue
from attnzoo.layers import linear
from attnzoo.ops.few_keys import few_keys
from attnzoo.ops.neighborhood import Window, neighborhood_attention
from tests.attnzoo.interpreted import (
    BUDGETS,
    CAN_RUN,
    DEVICE,
    IMPLEMENTATIONS,
    IS_INTERPRETED,
    errors,
    random,
)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "budget"), BUDGETS, ids=str)
@pytest.mark.parametrize(
    ("n", "m", "is_packed"),
    # One token; two parts of the tokens, the first of two tiles, the last not full.
    [(1, 2, False), (41, 3, True), (41, 37, True)],
)
def test_few_keys(impl, dtype, budget, n, m, is_packed, monkeypatch):
    if impl == "triton" and IS_INTERPRETED:
        from attnzoo.ops.few_keys import triton as kernels

        monkeypatch.setattr(kernels, "PROGRAMS", 12)
        for name in ("FORWARD", "BACKWARD"):
            monkeypatch.setattr(kernels, name, {kernels.MOST_HALF: (16, 4)})
    query, both = random(2, n, 72, seed=1), random(2, m, 48, seed=2)

    def run(query, both, **options):
        operands = query[..., 24:48], *both.chunk(2, dim=-1)  # parts of wider rows
        if not is_packed:
            operands = (z.contiguous() for z in operands)
        return few_keys(*operands, 3, **options)

    found = errors(run, [query, both], (2, n, 24), dtype, impl)
    assert max(found) < budget


@pytest.mark.skipif(not CAN_RUN, reason="needs Triton, and a GPU or its interpreter")
@pytest.mark.parametrize(("dtype", "budget"), BUDGETS, ids=str)
@pytest.mark.parametrize(
    ("grid", "window"),
    # More than one tile, each with more than one block; windows that end at the border, are
    # moved, dilated, wider than the map; a disc.
    [
        ((9, 18), Window(9)),
        ((18, 5), Window(5, 2)),
        ((2, 3), Window(3, 9)),
        ((10, 9), Window(7, 1, 3)),
        ((1, 1), Window(7)),
    ],
    ids=str,
)
def test_neighborhoods(dtype, budget, grid, window):
    n = grid[0] * grid[1]

    def run(x, impl):
        parts = (z.unflatten(-1, (2, -1)).transpose(1, 2) for z in x.chunk(3, dim=-1))
        return neighborhood_attention(*parts, grid, window, impl=impl)

    found = errors(run, [random(2, n, 144, seed=1)], (2, 2, n, 24), dtype, "triton")
    assert max(found) < budget


@pytest.mark.skipif(not CAN_RUN, reason="needs Triton, and a GPU or its interpreter")
def test_gradients_side_by_side_are_the_projections(monkeypatch):
    monkeypatch.setattr(linear, "owns_gradient", lambda *_: True)
    monkeypatch.setattr(torch, "cat", Mock(side_effect=torch.cat))
    slopes: list[torch.Tensor] = []
    layer: Any = build_attention("local", 32, num_heads=2, window=3).to(DEVICE)
    for impl in ("reference", "triton"):
        layer.config = replace(layer.config, impl=impl)
        out = layer(random(1, 20, 32), (4, 5)).square().sum()
        slopes.append(torch.autograd.grad(out, layer.qkv.weight)[0])
        assert torch.cat.call_count == 1  # the reference's
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize(
    ("shape", "keys", "heads"), [((1, 4, 64), 129, 1), ((1, 4, 256), 8, 1), ((1, 4, 64), 0, 1)]
)
def test_other_keys_are_left_to_pytorch(shape, keys, heads):
    query, key = random(*shape), random(1, keys, shape[-1])
    exact = few_keys(query, key, key, heads, impl="reference")
    torch.testing.assert_close(few_keys(query, key, key, heads), exact, equal_nan=True)
    if CAN_RUN:
        with pytest.raises(InvalidValue, match=f"does not serve {keys} keys with heads of"):
            few_keys(query, key, key, heads, impl="triton")
