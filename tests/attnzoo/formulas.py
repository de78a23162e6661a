"""What tests that write a mechanism's formulas out share: layers, gradients, one convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.contract import Attention
from attnzoo.registry import build_attention

GRIDS = [(1, 1), (1, 7), (8, 8), (7, 13), (16, 24)]


def build(name: str, dim: int = 64, **options: object) -> Attention:
    """A layer in float64 whose parameters are all away from their start values."""
    torch.manual_seed(0)
    layer = build_attention(name, dim, **options).double()
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
    weights = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    return list(torch.autograd.grad((out * weights).sum(), [x, *layer.parameters()]))


def assert_near(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-9) -> None:
    # The largest value of all sets the scale: some gradients are zero but for rounding.
    scale = max(tensor.abs().max() for tensor in expected)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= tolerance * scale


def assert_same(x: Tensor, one: tuple[Attention, Tensor], other: tuple[Attention, Tensor]) -> None:
    """Two layers, or a layer and its formula, agree in the output and in all gradients."""
    assert_near([one[1]], [other[1]])
    assert_near(grads(one[1], x, one[0]), grads(other[1], x, other[0]))


def projected(layer: Attention, x: Tensor) -> list[Tensor]:
    """Queries, keys and values of one image, (n, d)."""
    parts = zip(layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3), strict=True)
    return [x[0] @ weight.T + bias for weight, bias in parts]


def head_slices(dim: int, heads: int) -> list[slice]:
    return [slice(head * dim // heads, (head + 1) * dim // heads) for head in range(heads)]


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
