"""LiT's attention: formulas written out, what it is related to."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from attnzoo import Attention, build_attention
from tests.attnzoo import formulas
from tests.attnzoo.formulas import (
    assert_near,
    assert_same,
    depthwise,
    head_slices,
    projected,
    tokens,
)

build = partial(formulas.build, "lit")


def reference(layer: Attention, x: Tensor, grid: tuple[int, int], heads: int) -> Tensor:
    """ReLU linear attention plus the values' convolution, query by query, for one image."""
    dim, n = x.shape[-1], grid[0] * grid[1]
    query, key, value = projected(layer, x)
    out = []
    for part in head_slices(dim, heads):
        q, k, v = query[:, part].clamp_min(0), key[:, part].clamp_min(0), value[:, part]
        rows = []
        for i in range(n):
            similarity = (k * q[i]).sum(-1)
            rows.append((similarity[:, None] * v).sum(0) / (similarity.sum() + 1e-8))
        conv = layer.conv.conv.branches[0]
        local = depthwise(v.reshape(*grid, -1), conv.weight, conv.bias)
        out.append(torch.stack(rows) + local.flatten(0, 1))
    return (torch.cat(out, -1) @ layer.proj.weight.T + layer.proj.bias)[None]


@pytest.mark.parametrize("grid", [(1, 1), (3, 5)])
def test_formula(grid: tuple[int, int]) -> None:
    layer, x = build(), tokens(grid)
    assert_same(x, (layer, layer(x, grid)), (layer, reference(layer, x, grid, 2)))


def test_without_convolution_it_is_sana_with_few_heads() -> None:
    layer = build(conv="none")
    sana = build_attention("sana", 64, num_heads=2, qkv_bias=True).double()
    sana.load_state_dict(layer.state_dict())
    x = tokens((7, 13))
    assert_near([layer(x, (7, 13))], [sana(x, (7, 13))])


def test_heads_are_few() -> None:
    assert build_attention("lit", 384).num_heads == 2
    assert build_attention("lit", 1152, num_heads=4).num_heads == 4
    assert build_attention("lit", 63).num_heads == 1
