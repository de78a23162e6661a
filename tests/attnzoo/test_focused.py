"""Focused linear attention: naive twin, formulas written out, cost, precision, errors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import attnzoo.mechanisms.focused  # noqa: F401
from attnzoo.contract import Attention
from attnzoo.registry import build_attention

GRIDS = [(1, 1), (1, 7), (8, 8), (7, 13), (16, 24)]
OPTIONS = [
    {},
    {"norm_scope": "head", "conv_scope": "token", "conv": "acnet-plain"},
    {"softplus_scale": False, "qkv_bias": False, "conv": "none", "relu_offset": 0.0},
    {"focusing_factor": 4.5, "num_heads": 1, "conv": "acnet"},
]


def build(dim: int = 64, **options: object) -> Attention:
    """A layer in float64 whose parameters are all away from their start values."""
    torch.manual_seed(0)
    layer = build_attention("focused", dim, **options).double()
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


def reference(layer: Attention, x: Tensor, grid: tuple[int, int], heads: int) -> Tensor:
    """FLatten's formulas, query by query, for one image."""
    dim, n = x.shape[-1], grid[0] * grid[1]
    query, key, value = (
        x[0] @ w.T + b
        for w, b in zip(layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3), strict=True)
    )
    key = key + layer.key_position.offset
    focused = []
    for z in (query, key):
        z = (z.clamp_min(0) + 1e-6) / (1 + layer.scale.exp()).log()
        cube = z**3
        focused.append(cube / (cube**2).sum(-1, True).sqrt() * (z**2).sum(-1, True).sqrt())
    out = []
    for head in range(heads):
        part = slice(head * dim // heads, (head + 1) * dim // heads)
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
    out, expected = layer(x, grid), reference(layer, x, grid, 4)
    assert_near([out], [expected])
    assert_near(grads(out, x, layer), grads(expected, x, layer))


def test_power_one_is_relu_linear_attention() -> None:
    layer = build(
        focusing_factor=1, softplus_scale=False, relu_offset=0.0, conv="none", num_heads=4
    )
    sana = build_attention("sana", 64, num_heads=4, qkv_bias=True, eps=91e-6).double()
    sana.load_state_dict(layer.state_dict())
    x = tokens((7, 13))
    assert_near([layer(x, (7, 13))], [sana(x, (7, 13))])


def test_focus_keeps_the_norm_of_the_token() -> None:
    x = tokens((7, 13))
    layer = build(conv="none", softplus_scale=False)
    query = layer._query_key_value(x, (7, 13))[0].transpose(1, 2).flatten(2)
    plain = layer.qkv(x).chunk(3, -1)[0].relu() + 1e-6
    assert_near([query.norm(dim=-1)], [plain.norm(dim=-1)])


def test_conv_kernels_are_shared_by_all_heads() -> None:
    shared, own = build(num_heads=4), build(num_heads=4, conv_scope="token")
    assert shared.conv.conv.branches[0].weight.shape == (16, 1, 5, 5)
    assert own.conv.conv.branches[0].weight.shape == (64, 1, 5, 5)
    assert shared.macs((8, 8)) == own.macs((8, 8))


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_position": (4, 0)}, r"key_position must be a grid \(height, width\) or None"),
        ({"key_position": (4, 4, 4)}, "key_position must be a grid"),
        ({"focusing_factor": 0.0}, "focusing_factor must be positive"),
        ({"eps": -1.0}, "eps must be at least 0"),
        ({"conv": "5x6"}, "did you mean '5x5'"),
        ({"norm_scope": "heads"}, "did you mean 'head'"),
    ],
)
def test_errors_name_the_remedy(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_attention("focused", 64, **options)


@pytest.mark.parametrize("kind", ["acnet", "acnet-plain", "5x5"])
def test_fuse_keeps_the_output(kind: str) -> None:
    layer = build(conv=kind)
    x = tokens((7, 13), 2)
    layer(x, (7, 13))  # moves the batch norms' statistics
    fused = copy.deepcopy(layer.eval())
    changed = fused.fuse()
    assert changed == {"conv": "5x5" if kind == "5x5" else "3x3"}
    assert_near([fused(x, (7, 13))], [layer(x, (7, 13))])
    fresh = build(**changed).eval()
    fresh.load_state_dict(fused.state_dict())
    assert_near([fresh(x, (7, 13))], [layer(x, (7, 13))])


def test_attention_map_is_what_the_output_sums() -> None:
    layer = build(conv="none")
    x = tokens((7, 13))
    weights = layer.attention_map(x, (7, 13))
    value = layer.qkv(x).chunk(3, -1)[2].unflatten(-1, (2, 32)).transpose(1, 2)
    out = layer.proj((weights @ value).transpose(1, 2).flatten(2))
    assert_near([out], [layer(x, (7, 13))])


@pytest.mark.parametrize("grid", [(8, 8), (7, 13)])
@pytest.mark.parametrize("options", OPTIONS)
def test_closed_form_macs_equal_the_count(grid: tuple[int, int], options: dict) -> None:
    layer = build_attention("focused", 64, **options)
    x = torch.randn(1, grid[0] * grid[1], 64)
    with FlopCounterMode(display=False) as counter:
        layer(x, grid)
    assert counter.get_total_flops() == 2 * layer.macs(grid)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_over_4096_tokens(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = build_attention("focused", 64)
    x = (8 * torch.randn(1, 4096, 64)).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        out = layer(x, (64, 64))
    out.float().square().mean().backward()
    assert out.isfinite().all()
    assert all(z.grad.isfinite().all() for z in [x, *layer.parameters()])


def test_wrong_grid_is_named() -> None:
    with pytest.raises(ValueError, match="grid=2x3 does not hold the 64 tokens"):
        build()(tokens((8, 8)), (2, 3))
