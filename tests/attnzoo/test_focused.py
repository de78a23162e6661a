"""Focused linear attention: formulas written out, its parts, errors."""

from __future__ import annotations

import math
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

build = partial(formulas.build, "focused")


def reference(layer: Attention, x: Tensor, grid: tuple[int, int], heads: int) -> Tensor:
    """FLatten's formulas, query by query, for one image."""
    dim, n = x.shape[-1], grid[0] * grid[1]
    query, key, value = projected(layer, x)
    key = key + layer.key_position.offset
    focused = []
    for z in (query, key):
        z = (z.clamp_min(0) + 1e-6) / (1 + layer.scale.exp()).log()
        cube = z**3
        focused.append(cube / (cube**2).sum(-1, True).sqrt() * (z**2).sum(-1, True).sqrt())
    out = []
    for part in head_slices(dim, heads):
        q, k, v = focused[0][:, part], focused[1][:, part], value[:, part]
        rows = []
        for i in range(n):
            similarity = (k * q[i]).sum(-1)
            rows.append((similarity[:, None] * v).mean(0) / (similarity.mean() + 1e-6))
        conv = layer.conv.conv.branches[0]
        local = depthwise(v.reshape(*grid, -1), conv.weight, conv.bias)
        out.append(torch.stack(rows) + local.flatten(0, 1))
    return (torch.cat(out, -1) @ layer.proj.weight.T + layer.proj.bias)[None]


@pytest.mark.parametrize("grid", [(1, 1), (3, 5)])
def test_formula(grid: tuple[int, int]) -> None:
    layer = build(key_position=grid, num_heads=4)
    x = tokens(grid)
    assert_same(x, (layer, layer(x, grid)), (layer, reference(layer, x, grid, 4)))


def test_power_one_is_relu_linear_attention() -> None:
    layer = build(focusing_factor=1, conv="none", num_heads=4)
    state = layer.state_dict()
    state.pop("scale").fill_(math.log(math.e - 1))  # softplus of it is 1
    # The mean over keys with eps is their sum with n eps.
    sana = build_attention("sana", 64, num_heads=4, qkv_bias=True, eps=91e-6).double()
    sana.load_state_dict(state)
    x = tokens((7, 13))
    assert_near([layer(x, (7, 13))], [sana(x, (7, 13))], 1e-4)  # ReLU's offset, 1e-6, is left


def test_focus_keeps_the_norm_of_the_token() -> None:
    x = tokens((7, 13))
    layer = build(conv="none")
    query = layer.qkv(x).chunk(3, -1)[0]
    plain = (query.relu() + 1e-6) / torch.nn.functional.softplus(layer.scale)
    assert_near([layer.query_kernel(query).norm(dim=-1)], [plain.norm(dim=-1)])


def test_conv_kernels_are_shared_by_all_heads() -> None:
    layer = build(num_heads=4)
    assert layer.conv.conv.branches[0].weight.shape == (16, 1, 5, 5)
    assert layer.macs_parts((8, 8))["conv"] == 25 * 64 * 64


def test_key_position_starts_as_nothing_and_learns() -> None:
    torch.manual_seed(0)
    layer = build_attention("focused", 64, key_position=(4, 6)).double()
    free = build_attention("focused", 64).double()
    state = layer.state_dict()
    assert not state.pop("key_position.offset").any()
    free.load_state_dict(state)
    x = tokens((4, 6))
    assert_near([layer(x, (4, 6))], [free(x, (4, 6))])
    layer(x, (4, 6)).square().sum().backward()
    assert layer.key_position.offset.grad.abs().max() > 0


def test_key_position_names_its_grid() -> None:
    layer = build(key_position=[4, 6])
    with pytest.raises(ValueError, match=r"built for grid=4x6 .* grid=6x4; set key_position=None"):
        layer(tokens((6, 4)), (6, 4))
