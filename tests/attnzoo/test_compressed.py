"""Compressed softmax attention: naive twin, formulas, softmax itself, cost, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import attnzoo.mechanisms.compressed  # noqa: F401
from attnzoo.contract import Attention
from attnzoo.registry import build_attention

GRIDS = [(1, 1), (1, 7), (8, 8), (7, 13), (16, 24)]
OPTIONS = [
    {},
    {"ratio": 4, "num_heads": 4, "qk_norm": True},
    {"ratio": 3, "qkv_bias": False},
    {"ratio": 1},
]


def build(dim: int = 64, **options: object) -> Attention:
    """A layer in float64 whose parameters are all away from their start values."""
    torch.manual_seed(0)
    layer = build_attention("compressed", dim, **options).double()
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
    query, key, value = (
        x[0] @ w.T + b
        for w, b in zip(layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3), strict=True)
    )
    key, value = (compress(layer, z.reshape(*grid, -1), ratio) for z in (key, value))
    out = []
    for head in range(heads):
        part = slice(head * dim // heads, (head + 1) * dim // heads)
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
    out, expected = layer(x, grid), reference(layer, x, grid, 4, ratio)
    assert_near([out], [expected])
    assert_near(grads(out, x, layer), grads(expected, x, layer))


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(
    "options",
    [{"ratio": 1}, {"layers": "second-half", "layer_index": 3, "depth": 8}, {"layers": ()}],
)
def test_without_compression_it_is_softmax_attention(options: dict, qk_norm: bool) -> None:
    layer = build(num_heads=4, qk_norm=qk_norm, **options)
    softmax = build_attention("softmax", 64, num_heads=4, qk_norm=qk_norm).double()
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
    query, key, _ = layer._query_key_value(x, grid)
    coarse = torch.einsum("bhnd,bhmd->bhnm", query, key).mul(32**-0.5).softmax(-1)
    expected = torch.empty(1, 2, 15, 15, dtype=torch.float64)
    for token in range(15):
        top, left = token // 5 // 2, token % 5 // 2
        size = (2 if top == 0 else 1) * (2 if left < 2 else 1)
        expected[..., token] = coarse[..., 3 * top + left] / size
    weights = layer.attention_map(x, grid)
    assert_near([weights, weights.sum(-1)], [expected, torch.ones(1, 2, 15).double()])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0}, "ratio must be at least 1"),
        ({"layers": "second-hlaf"}, "did you mean 'second-half'"),
        ({"layers": (14,)}, r"names blocks \[14\], but depth=1; choose indices from 0 to 0"),
        ({"remainder": "padd"}, "did you mean 'pad'"),
        ({"impl": "flsh"}, "did you mean 'flash'"),
    ],
)
def test_errors_name_the_remedy(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_attention("compressed", 64, **options)


def test_grid_that_the_ratio_does_not_divide() -> None:
    layer = build(remainder="raise", ratio=4)
    assert layer(tokens((8, 12)), (8, 12)).isfinite().all()
    message = (
        r"ratio=4 does not divide grid=6x12; choose a ratio of \[1, 2, 3, 6\], or set "
        r"remainder='pad'"
    )
    with pytest.raises(ValueError, match=message):
        layer(tokens((6, 12)), (6, 12))


def test_layers_hold_indices() -> None:
    with pytest.raises(TypeError, match="layers must hold the indices"):
        build_attention("compressed", 64, layers=("all",))


@pytest.mark.parametrize("grid", [(8, 8), (7, 13)])
@pytest.mark.parametrize("options", OPTIONS)
def test_closed_form_macs_equal_the_count(grid: tuple[int, int], options: dict) -> None:
    # The meta device, because the CPU's fused softmax attention is not counted.
    with torch.device("meta"):
        layer = build_attention("compressed", 64, **options)
        x = torch.empty(1, grid[0] * grid[1], 64)
    with FlopCounterMode(display=False) as counter:
        layer(x, grid)
    assert counter.get_total_flops() == 2 * layer.macs(grid)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_over_4096_tokens(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = build_attention("compressed", 64)
    x = (8 * torch.randn(1, 4096, 64)).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        out = layer(x, (64, 64))
    out.float().square().mean().backward()
    assert out.isfinite().all()
    assert all(z.grad.isfinite().all() for z in [x, *layer.parameters()])


def test_wrong_grid_is_named() -> None:
    with pytest.raises(ValueError, match="grid=2x3 does not hold the 64 tokens"):
        build()(tokens((8, 8)), (2, 3))
