"""EDiT's attention: formulas written out, its parts."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from attnzoo import Attention, build_attention
from tests.attnzoo import formulas
from tests.attnzoo.formulas import assert_near, assert_same, depthwise, head_slices, tokens

build = partial(formulas.build, "edit")


def fused(layer: Attention, image: Tensor, groups: int) -> Tensor:
    """X + C_2(LeakyReLU(GN(C_1(X)))) of (h, w, d), tap by tap."""
    height, width, _ = image.shape
    squeeze, norm, expand = layer.fusion.squeeze, layer.fusion.norm, layer.fusion.expand
    rows = []
    for y in range(height):
        for x in range(width):
            total = squeeze.bias
            for i in range(3):
                for j in range(3):
                    if 0 <= y + i - 1 < height and 0 <= x + j - 1 < width:
                        total = total + squeeze.weight[:, :, i, j] @ image[y + i - 1, x + j - 1]
            rows.append(total)
    hidden = torch.stack(rows).reshape(height * width, groups, -1)
    mean = hidden.mean((0, 2), keepdim=True)
    variance = ((hidden - mean) ** 2).mean((0, 2), keepdim=True)
    hidden = ((hidden - mean) / (variance + 1e-5).sqrt()).flatten(1) * norm.weight + norm.bias
    hidden = torch.where(hidden > 0, hidden, 0.01 * hidden)
    return image + (hidden @ expand.weight[:, :, 0, 0].T + expand.bias).reshape(image.shape)


def test_one_channel_of_one_token_is_its_bias() -> None:
    layer, x = build_attention("edit", 8, bottleneck=8), torch.randn(1, 1, 8)
    exact = build_attention("edit", 8, bottleneck=8, impl="reference")
    exact.load_state_dict(layer.state_dict())
    assert_near([layer(x, (1, 1))], [exact(x, (1, 1))], 1e-5)


def reference(layer: Attention, x: Tensor, grid: tuple[int, int], heads: int) -> Tensor:
    """EDiT's formulas, query by query, for one image."""
    dim = x.shape[-1]
    query = (
        fused(layer, x[0].reshape(*grid, -1), groups=16) @ layer.query.weight.T + layer.query.bias
    )
    query = query.flatten(0, 1).clamp_min(0)
    key_value = (x[0] @ layer.key_value.weight.T + layer.key_value.bias).reshape(*grid, -1)
    conv = layer.compress.conv
    compressed = [
        depthwise(key_value[..., part], conv.weight[part], conv.bias[part], stride=2).flatten(0, 1)
        for part in (slice(0, dim), slice(dim, 2 * dim))
    ]
    out = []
    for part in head_slices(dim, heads):
        k, v = compressed[0][:, part].clamp_min(0), compressed[1][:, part]
        rows = []
        for q in query[:, part]:
            similarity = (k * q).sum(-1)
            rows.append((similarity[:, None] * v).sum(0) / (similarity.sum() + 1e-8))
        out.append(torch.stack(rows))
    return (torch.cat(out, -1) @ layer.proj.weight.T + layer.proj.bias)[None]


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (4, 6)])
def test_formula(grid: tuple[int, int]) -> None:
    layer, x = build(num_heads=2), tokens(grid)
    assert_same(x, (layer, layer(x, grid)), (layer, reference(layer, x, grid, 2)))


def test_idle_convolutions_leave_relu_linear_attention() -> None:
    layer = build(stride=1, num_heads=4)
    with torch.no_grad():
        for parameter in [*layer.fusion.expand.parameters(), *layer.compress.parameters()]:
            parameter.zero_()
        layer.compress.conv.weight[:, :, 1, 1] = 1
    sana = build_attention("sana", 64, num_heads=4, qkv_bias=True).double()
    sana.proj.load_state_dict(layer.proj.state_dict())
    with torch.no_grad():
        sana.qkv.weight.copy_(torch.cat([layer.query.weight, layer.key_value.weight]))
        sana.qkv.bias.copy_(torch.cat([layer.query.bias, layer.key_value.bias]))
    x = tokens((7, 13))
    assert_near([layer(x, (7, 13))], [sana(x, (7, 13))])
    assert_near([layer.attention_map(x, (7, 13)).sum(-1)], [torch.ones(1, 4, 91)], 1e-7)


def test_a_quarter_of_the_keys_is_left() -> None:
    layer = build()
    for grid, keys in (((8, 8), 16), ((7, 13), 28), ((1, 1), 1)):
        query, key, value = layer.project(tokens(grid), grid)
        assert query.shape[1] == grid[0] * grid[1]
        assert key.shape[1] == value.shape[1] == keys


def test_attention_map_shares_a_window_among_its_tokens() -> None:
    layer, grid = build(num_heads=2), (3, 4)
    x = tokens(grid)
    query, key, _ = layer.project(x, grid)
    query, key = (z.relu().unflatten(-1, (2, -1)).transpose(1, 2) for z in (query, key))
    coarse = torch.einsum("bhnd,bhmd->bhnm", query, key)
    coarse = coarse / (coarse.sum(-1, keepdim=True) + 1e-8)
    expected = torch.zeros(1, 2, 12, 12, dtype=torch.float64)
    for window, (top, left) in enumerate([(-1, -1), (-1, 1), (1, -1), (1, 1)]):
        inside = [
            4 * y + z
            for y in range(top, top + 3)
            for z in range(left, left + 3)
            if 0 <= y < 3 and 0 <= z < 4
        ]
        expected[..., inside] += coarse[..., window : window + 1] / len(inside)
    assert_near([layer.attention_map(x, grid)], [expected])


@pytest.mark.parametrize(("dim", "groups"), [(384, 32), (64, 16), (96, 24), (4, 1), (50, 5)])
def test_default_groups_divide_the_bottleneck(dim: int, groups: int) -> None:
    layer = build_attention("edit", dim)
    assert layer.fusion.norm.num_groups == groups
    assert layer(torch.randn(1, 1, dim), (1, 1)).isfinite().all()


def test_stride_beyond_the_window_is_refused() -> None:
    with pytest.raises(TypeError, match="stride"):
        build_attention("edit", 64, stride=4)
