"""PVT and Linformer, which attend to fewer keys: their equations, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import attnzoo
from attnzoo import Attention, build_attention
from attnzoo.counting import count_macs, fvcore_macs
from attnzoo.testing import build_scrambled
from tests.attnzoo import formulas
from tests.attnzoo.formulas import GRIDS, assert_near, assert_same, build, head_slices, tokens

PVT = [
    {},
    {"ratio": 1},
    {"ratio": 3},
    {"ratio": 4},
    {"kind": "pool"},
    {"kind": "pool", "pool": 3},
    {"kind": "pool", "pool": 1},
]
LINFORMER = [
    {"map_grid": (7, 13), "landmarks": 5},
    {"map_grid": (4, 4), "landmarks": 3},
    {"map_grid": (9, 20), "landmarks": 4, "shares_maps": True},
]
VARIANTS = [("pvt", options) for options in PVT] + [("linformer", o) for o in LINFORMER]


def attended(layer: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention of one image, query by query and head by head."""
    out = []
    for part in head_slices(query.shape[1], layer.num_heads):
        rows = []
        for q in query[:, part]:
            scores = (key[:, part] * q).sum(-1) / math.sqrt(part.stop - part.start)
            weights = scores.exp()
            rows.append((weights[:, None] * value[:, part]).sum(0) / weights.sum())
        out.append(torch.stack(rows))
    return torch.cat(out, 1) @ layer.proj.weight.T + layer.proj.bias


def norm(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    z = z - z.mean(-1, keepdim=True)
    return z / ((z**2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def reduced(layer: Attention, image: Tensor, options: dict) -> Tensor:
    """The tokens that keys and values of PVT are made from, of an image (h, w, d)."""
    height, width, _ = image.shape
    conv, out = layer.reduce, []
    if options.get("kind") == "pool":
        sides = [min(side, options.get("pool", 7)) for side in (height, width)]
        for i in range(sides[0]):
            for j in range(sides[1]):
                bins = [
                    range(k * n // m, -(-(k + 1) * n // m))
                    for k, n, m in zip((i, j), (height, width), sides, strict=True)
                ]
                mean = torch.stack([image[y, x] for y in bins[0] for x in bins[1]]).mean(0)
                out.append(conv.weight[:, :, 0, 0] @ mean + conv.bias)
        z = norm(torch.stack(out), layer.norm.weight, layer.norm.bias)
        return z * (1 + torch.erf(z / math.sqrt(2))) / 2
    ratio = options.get("ratio", 2)
    if ratio == 1:
        return image.flatten(0, 1)
    for top in range(0, height, ratio):
        for left in range(0, width, ratio):
            terms = [
                conv.weight[:, :, i, j] @ image[top + i, left + j]
                for i in range(ratio)
                for j in range(ratio)
                if top + i < height and left + j < width
            ]
            out.append(sum(terms) * ratio**2 / len(terms) + conv.bias)
    return norm(torch.stack(out), layer.norm.weight, layer.norm.bias)


def pvt_oracle(layer: Attention, x: Tensor, grid: tuple[int, int], options: dict) -> Tensor:
    out = []
    for image in x:
        query = image @ layer.query.weight.T + layer.query.bias
        fewer = reduced(layer, image.reshape(*grid, -1), options)
        both = fewer @ layer.key_value.weight.T + layer.key_value.bias
        out.append(attended(layer, query, *both.chunk(2, -1)))
    return torch.stack(out)


def taps(before: int, after: int) -> Tensor:
    """Weights of linear interpolation, wider where places get fewer: (after, before)."""
    scale = max(before / after, 1.0)
    rows = torch.zeros(after, before, dtype=torch.float64)
    for i in range(after):
        center = (i + 0.5) * before / after
        for j in range(before):
            rows[i, j] = max(0.0, 1 - abs(j + 0.5 - center) / scale)
    return rows / rows.sum(1, keepdim=True)


def landmarks(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Each old token's weight, shared by those that take it over."""
    rows, columns = (taps(*z) for z in zip(maps.shape[1:], grid, strict=True))
    rows, columns = rows / rows.sum(0), columns / columns.sum(0)
    return torch.einsum("yi,xj,rij->ryx", rows, columns, maps).flatten(1)


def linformer_oracle(layer: Attention, x: Tensor, grid: tuple[int, int], options: dict) -> Tensor:
    of_keys = landmarks(layer.key_maps, grid)
    is_shared = options.get("shares_maps")
    of_values = of_keys if is_shared else landmarks(layer.value_maps, grid)
    out = []
    for image in x:
        query, key, value = (image @ layer.qkv.weight.T).chunk(3, -1)
        out.append(attended(layer, query, of_keys @ key, of_values @ value))
    return torch.stack(out)


ORACLES = {"pvt": pvt_oracle, "linformer": linformer_oracle}


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (7, 13)])
def test_formula(name: str, options: dict, grid: tuple[int, int], impl: str) -> None:
    layer, x = build(name, 8, num_heads=2, impl=impl, **options), tokens(grid, 1, 8)
    expected = ORACLES[name](layer, x, grid, options)
    assert_same(x, (layer, layer(x, grid)), (layer, expected))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("options", [{"ratio": 5}, {"kind": "pool"}], ids=str)
def test_pvt_on_every_grid(options: dict, grid: tuple[int, int], batch: int) -> None:
    layer, x = build("pvt", 16, num_heads=2, **options), tokens(grid, batch, 16)
    query = x @ layer.query.weight.T + layer.query.bias
    fewer = torch.stack([reduced(layer, z.reshape(*grid, -1), options) for z in x])
    both = fewer @ layer.key_value.weight.T + layer.key_value.bias
    key, value = both.chunk(2, -1)
    heads = []
    for part in head_slices(16, 2):
        scores = query[..., part] @ key[..., part].transpose(1, 2) / 8**0.5
        heads.append(scores.softmax(-1) @ value[..., part])
    expected = torch.cat(heads, -1) @ layer.proj.weight.T + layer.proj.bias
    assert_same(x, (layer, layer(x, grid)), (layer, expected))


@pytest.mark.parametrize("hook", [False, True])
@pytest.mark.parametrize("options", [{"ratio": 3}, {"kind": "pool", "pool": 3}], ids=str)
def test_pvts_windows_in_one_product(options: dict, hook: bool, monkeypatch) -> None:
    """As on a GPU; a convolution that something hangs on is called all the same."""
    monkeypatch.setattr("attnzoo.layers.linear.is_without_kernels", lambda _: False)
    layer, x, grid, calls = (
        build("pvt", 8, num_heads=2, **options),
        tokens((7, 5), 2, 8),
        (7, 5),
        [],
    )
    if hook:
        layer.reduce.register_forward_hook(lambda *_: calls.append(True))
    assert_same(x, (layer, layer(x, grid)), (layer, pvt_oracle(layer, x, grid, options)))
    assert len(calls) == hook


def test_one_window_a_row_in_half_precision() -> None:
    layer, x = build_scrambled("pvt", 16, ratio=4), torch.randn(1, 16, 16)
    with torch.no_grad():
        exact = layer(x, (4, 4))
        out = layer.bfloat16()(x.bfloat16(), (4, 4))
    assert (out - exact).norm() < 0.05 * exact.norm()


def test_without_reduction_pvt_is_softmax_attention() -> None:
    layer, softmax = build("pvt", ratio=1), formulas.build("softmax")
    softmax.proj.load_state_dict(layer.proj.state_dict())
    for name in ("weight", "bias"):
        both = getattr(layer.query, name), getattr(layer.key_value, name)
        getattr(softmax.qkv, name).data = torch.cat(both)
    x, grid = tokens((7, 13), 2), (7, 13)
    assert_near([layer(x, grid)], [softmax(x, grid)], 1e-12)
    assert_near([layer.attention_map(x, grid)], [softmax.attention_map(x, grid)], 1e-12)


@pytest.mark.parametrize("ratio", [2, 3, 4])
@pytest.mark.parametrize("grid", [(1, 7), (7, 13), (9, 4)])
def test_pvt_sees_every_token_of_every_grid(grid: tuple[int, int], ratio: int) -> None:
    layer = build("pvt", 8, ratio=ratio)
    x = tokens(grid, 1, 8)
    [gradient] = torch.autograd.grad(layer.reduced(x, grid).square().sum(), x)
    assert (gradient.abs().sum(-1) > 0).all()


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
@pytest.mark.parametrize("grid", [(8, 8), (7, 13), (3, 5)])
def test_closed_form_is_the_count(name: str, options: dict, grid: tuple[int, int]) -> None:
    layer = build_attention(name, 32, **options)
    assert count_macs(layer, grid=grid).total == fvcore_macs(layer, grid=grid)


@pytest.mark.parametrize("options", LINFORMER, ids=str)
@pytest.mark.parametrize("grid", [(7, 13), (5, 5), (16, 9)])
def test_linformers_map_times_values_is_the_output(options: dict, grid: tuple[int, int]) -> None:
    layer, x = build("linformer", num_heads=2, **options), tokens(grid)
    value = layer.qkv(x).chunk(3, -1)[2].unflatten(-1, (2, 32)).transpose(1, 2)
    out = layer.attention_map(x, grid) @ value
    assert_near([layer.proj(out.transpose(1, 2).flatten(2))], [layer(x, grid)])


@pytest.mark.parametrize("grid", [(1, 1), (3, 40), (8, 8), (7, 13), (64, 64), (13, 16)])
def test_a_landmark_keeps_its_sum_on_every_grid(grid: tuple[int, int]) -> None:
    layer = build("linformer", map_grid=(13, 16), landmarks=6)
    for old, new in zip((layer.key_maps, layer.value_maps), layer.maps(grid), strict=True):
        assert new.shape == (6, grid[0] * grid[1])
        assert_near([new.sum(1)], [old.flatten(1).sum(1)], 1e-12)
    if grid == (13, 16):
        assert_near([layer.maps(grid)[0]], [layer.key_maps.flatten(1)], 1e-15)


def test_rows_of_pvts_map_sum_to_one() -> None:
    for options in PVT:
        weights = build("pvt", **options).attention_map(tokens((7, 13)), (7, 13))
        assert_near([weights.sum(-1)], [torch.ones_like(weights[..., 0])])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pvt", {"ratio": 0}, "ratio must be at least 1"),
        ("pvt", {"pool": 0}, "pool must be at least 1"),
        ("pvt", {"kind": "pol"}, "did you mean 'pool'"),
        ("linformer", {"landmarks": 0}, "landmarks must be at least 1"),
        ("linformer", {"map_grid": (4,)}, r"map_grid must be \(height, width\), got \(4,\)"),
        ("linformer", {"map_grid": (4, 0)}, "map_grid must be"),
    ],
)
def test_errors_name_the_remedy(name: str, options: dict, message: str) -> None:
    with pytest.raises(attnzoo.InvalidValue, match=message):
        build_attention(name, 64, **options)
