"""Compressed softmax attention: formulas written out, softmax itself, layers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo import Attention, build_attention
from attnzoo.ops.few_keys import by_head
from tests.attnzoo import formulas
from tests.attnzoo.formulas import assert_near, assert_same, grads, head_slices, projected, tokens

build = partial(formulas.build, "compressed")


def compress(layer: Attention, image: Tensor, ratio: int) -> Tensor:
    """Weighted windows of (h, w, d), each scaled up to a full one, then LayerNorm."""
    height, width, _ = image.shape
    conv, norm = layer.compress.conv, layer.compress_norm
    out = []
    for top in range(0, height, ratio):
        for left in range(0, width, ratio):
            terms = [
                conv.weight[:, 0, i, j] * image[top + i, left + j]
                for i in range(ratio)
                for j in range(ratio)
                if top + i < height and left + j < width
            ]
            out.append(sum(terms) * ratio**2 / len(terms) + conv.bias)
    z = torch.stack(out)
    z = z - z.mean(-1, keepdim=True)
    z = z / ((z**2).mean(-1, keepdim=True) + 1e-5).sqrt()
    return z * norm.weight + norm.bias


def reference(
    layer: Attention, x: Tensor, grid: tuple[int, int], heads: int, ratio: int
) -> Tensor:
    """PixArt-Sigma's formulas, query by query, for one image."""
    dim = x.shape[-1]
    query, key, value = projected(layer, x)
    key, value = (compress(layer, z.reshape(*grid, -1), ratio) for z in (key, value))
    out = []
    for part in head_slices(dim, heads):
        rows = []
        for q in query[:, part]:
            weights = ((key[:, part] * q).sum(-1) / (dim // heads) ** 0.5).exp()
            rows.append((weights[:, None] * value[:, part]).sum(0) / weights.sum())
        out.append(torch.stack(rows))
    return (torch.cat(out, -1) @ layer.proj.weight.T + layer.proj.bias)[None]


@pytest.mark.parametrize("ratio", [2, 3])
@pytest.mark.parametrize("grid", [(1, 1), (4, 6), (5, 7)])
def test_formula(grid: tuple[int, int], ratio: int) -> None:
    layer, x = build(num_heads=4, ratio=ratio), tokens(grid)
    assert_same(x, (layer, layer(x, grid)), (layer, reference(layer, x, grid, 4, ratio)))


@pytest.mark.parametrize(
    "options",
    [{"ratio": 1}, {"layers": "second-half", "layer_index": 3, "depth": 8}, {"layers": ()}],
)
def test_without_compression_it_is_softmax_attention(options: dict) -> None:
    layer = build(num_heads=4, **options)
    softmax = build_attention("softmax", 64, num_heads=4).double()
    softmax.load_state_dict(layer.state_dict())
    x, grid = tokens((7, 13), 2), (7, 13)
    outs = layer(x, grid), softmax(x, grid)
    assert_near([outs[0]], [outs[1]], 1e-14)
    assert_near(grads(outs[0], x, layer), grads(outs[1], x, softmax), 1e-12)
    assert_near([layer.attention_map(x, grid)], [softmax.attention_map(x, grid)], 1e-14)
    assert layer.macs_parts(grid) == softmax.macs_parts(grid) | {"conv": 0}


@pytest.mark.parametrize("ratio", [2, 4])
def test_starts_as_average_pooling(ratio: int) -> None:
    layer = build_attention("compressed", 64, ratio=ratio).double()
    x = tokens((8, 12))
    image = x.unflatten(1, (8, 12)).permute(0, 3, 1, 2)
    expected = F.avg_pool2d(image, ratio).flatten(2).transpose(1, 2)
    assert_near([layer.compress(x, (8, 12))], [expected], 1e-14)
    # The last windows average the tokens that are there.
    image = x[:, :91].unflatten(1, (7, 13)).permute(0, 3, 1, 2)
    expected = F.avg_pool2d(image, ratio, ceil_mode=True).flatten(2).transpose(1, 2)
    assert_near([layer.compress(x[:, :91], (7, 13))], [expected], 1e-14)


@pytest.mark.parametrize(
    ("layers", "depth", "expected"),
    [
        ("second-half", 28, range(14, 28)),
        ("second-half", 9, range(4, 9)),
        ("first-half", 28, range(14)),
        ("first-half", 9, range(5)),
        ("all", 3, range(3)),
        ([0, 2], 4, [0, 2]),
        ("second-half", 1, [0]),
        ("first-half", 1, [0]),
    ],
)
def test_layers_that_compress(layers: object, depth: int, expected: list) -> None:
    built = [
        build_attention("compressed", 8, layer_index=i, depth=depth, layers=layers)
        for i in range(depth)
    ]
    assert [i for i, layer in enumerate(built) if layer.compress is not None] == list(expected)


def test_keys_and_values_share_one_compressor() -> None:
    names = [name for name, _ in build().named_parameters() if name.startswith("compress")]
    assert names == [
        f"{part}.{name}"
        for part in ("compress.conv", "compress_norm")
        for name in ("weight", "bias")
    ]


def test_attention_map_shares_a_window_among_its_tokens() -> None:
    layer, grid = build(num_heads=2), (3, 5)
    x = tokens(grid)
    query, key, _ = (by_head(z, 2) for z in layer._query_key_value(x, grid))
    coarse = torch.einsum("bhnd,bhmd->bhnm", query, key).mul(32**-0.5).softmax(-1)
    expected = torch.empty(1, 2, 15, 15, dtype=torch.float64)
    for token in range(15):
        top, left = token // 5 // 2, token % 5 // 2
        size = (2 if top == 0 else 1) * (2 if left < 2 else 1)
        expected[..., token] = coarse[..., 3 * top + left] / size
    weights = layer.attention_map(x, grid)
    assert_near([weights, weights.sum(-1)], [expected, torch.ones(1, 2, 15).double()])


def test_layers_hold_indices() -> None:
    with pytest.raises(TypeError, match=r"layers\[0\] must be int"):
        build_attention("compressed", 64, layers=("all",))
