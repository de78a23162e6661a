"""EDiT's attention: naive twin, formulas written out, cost, precision, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import attnzoo.mechanisms.edit  # noqa: F401
from attnzoo.contract import Attention
from attnzoo.registry import build_attention

GRIDS = [(1, 1), (1, 7), (8, 8), (7, 13), (16, 24)]
OPTIONS = [
    {},
    {"bottleneck": 4, "groups": 4, "stride": 1, "num_heads": 1},
    {"conv_bias": False, "qkv_bias": False, "negative_slope": 0.2, "stride": 3},
]


def build(dim: int = 64, **options: object) -> Attention:
    """A layer in float64 whose parameters are all away from their start values."""
    torch.manual_seed(0)
    layer = build_attention("edit", dim, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer


def tokens(grid: tuple[int, int], batch: int = 1, dim: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(grid[0] * 100 + grid[1] + batch)
    shape = (batch, grid[0] * grid[1], dim)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def grads(out: Tensor, x: Tensor, layer: Attention) -> list[Tensor]:
    """Gradients of a fixed random sum of ``out`` by the input and by every parameter."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(out.shape, generator=generator, dtype=out.dtype)
    return list(torch.autograd.grad((out * weights).sum(), [x, *layer.parameters()]))


def assert_near(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-9) -> None:
    # The largest value of all sets the scale: some gradients are zero but for rounding.
    scale = max(tensor.abs().max() for tensor in expected)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= tolerance * scale


def compare(fast: Attention, naive: Attention, grid: tuple[int, int], batch: int) -> None:
    naive.load_state_dict(fast.state_dict())
    x = tokens(grid, batch)
    outs = fast(x, grid), naive(x, grid)
    assert_near([outs[0]], [outs[1]])
    assert_near(grads(outs[0], x, fast), grads(outs[1], x, naive))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("grid", GRIDS)
def test_twin(grid: tuple[int, int], batch: int) -> None:
    compare(build(), build(impl="naive"), grid, batch)


@pytest.mark.parametrize("options", OPTIONS[1:])
def test_twin_with_options(options: dict) -> None:
    compare(build(**options), build(impl="naive", **options), (7, 13), 2)


def depthwise(image: Tensor, weight: Tensor, bias: Tensor, stride: int = 1) -> Tensor:
    """Zero-padded depthwise convolution of (h, w, c), tap by tap."""
    height, width, _ = image.shape
    side = weight.shape[-1]
    rows = []
    for top in range(-(side // 2), height - side // 2, stride):
        row = []
        for left in range(-(side // 2), width - side // 2, stride):
            total = bias
            for i in range(side):
                for j in range(side):
                    if 0 <= top + i < height and 0 <= left + j < width:
                        total = total + weight[:, 0, i, j] * image[top + i, left + j]
            row.append(total)
        rows.append(torch.stack(row))
    return torch.stack(rows)


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
    for head in range(heads):
        part = slice(head * dim // heads, (head + 1) * dim // heads)
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
    out, expected = layer(x, grid), reference(layer, x, grid, 2)
    assert_near([out], [expected])
    assert_near(grads(out, x, layer), grads(expected, x, layer))


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
        query, key, value = layer._query_key_value(tokens(grid), grid)
        assert query.shape[2] == grid[0] * grid[1]
        assert key.shape[2] == value.shape[2] == keys


def test_attention_map_shares_a_window_among_its_tokens() -> None:
    layer, grid = build(num_heads=2), (3, 4)
    x = tokens(grid)
    query, key, _ = layer._query_key_value(x, grid)
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 7}, r"groups=7 does not divide the bottleneck's 32 channels .* choose one of"),
        ({"bottleneck": 0}, "bottleneck must be at least 1"),
        ({"groups": 0}, "groups must be at least 1"),
        ({"eps": -1.0}, "eps must be at least 0"),
    ],
)
def test_errors_name_the_remedy(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_attention("edit", 64, **options)


def test_stride_beyond_the_window_is_refused() -> None:
    with pytest.raises(TypeError, match="stride"):
        build_attention("edit", 64, stride=4)


@pytest.mark.parametrize("grid", [(8, 8), (7, 13)])
@pytest.mark.parametrize("options", OPTIONS)
def test_closed_form_macs_equal_the_count(grid: tuple[int, int], options: dict) -> None:
    layer = build_attention("edit", 64, **options)
    x = torch.randn(1, grid[0] * grid[1], 64)
    with FlopCounterMode(display=False) as counter:
        layer(x, grid)
    assert counter.get_total_flops() == 2 * layer.macs(grid)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_over_4096_tokens(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = build_attention("edit", 64)
    x = (8 * torch.randn(1, 4096, 64)).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        out = layer(x, (64, 64))
    out.float().square().mean().backward()
    assert out.isfinite().all()
    assert all(z.grad.isfinite().all() for z in [x, *layer.parameters()])


def test_wrong_grid_is_named() -> None:
    with pytest.raises(ValueError, match="grid=2x3 does not hold the 64 tokens"):
        build()(tokens((8, 8)), (2, 3))
