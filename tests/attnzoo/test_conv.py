"""The control: a gated depthwise convolution, tap by tap, and what it does not see."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

import attnzoo
from attnzoo import Attention, build_attention
from attnzoo.counting import count_macs, fvcore_macs
from tests.attnzoo import formulas
from tests.attnzoo.formulas import GRIDS, assert_same, depthwise, tokens

build = partial(formulas.build, "conv")
VARIANTS = [{}, {"kernel_size": 3, "expansion": 1}, {"kernel_size": 1, "expansion": 8 / 3}]


def oracle(layer: Attention, x: Tensor, grid: tuple[int, int]) -> Tensor:
    out = []
    for image in x:
        both = image @ layer.gate_value.weight.T + layer.gate_value.bias
        gate, value = both[:, : both.shape[1] // 2], both[:, both.shape[1] // 2 :]
        mixed = depthwise(value.reshape(*grid, -1), layer.conv.weight, layer.conv.bias)
        gate = gate * (1 + torch.erf(gate / math.sqrt(2))) / 2
        out.append((gate * mixed.flatten(0, 1)) @ layer.proj.weight.T + layer.proj.bias)
    return torch.stack(out)


@pytest.mark.parametrize("impl", ["auto", "reference", "torch"])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_formula(options: dict, impl: str) -> None:
    for grid, batch in zip(GRIDS[:4], (1, 3, 1, 1), strict=True):
        layer, x = build(dim=16, impl=impl, **options), tokens(grid, batch, 16)
        assert_same(x, (layer, layer(x, grid)), (layer, oracle(layer, x, grid)))


def test_a_token_sees_half_a_kernel_and_no_farther() -> None:
    layer, grid = build(dim=16), (9, 11)
    x = tokens(grid, 1, 16)
    [gradient] = torch.autograd.grad(layer(x, grid)[0, 4 * 11 + 5].sum(), x)
    seen = (gradient[0].abs().sum(-1) > 0).view(grid)
    assert seen[1:8, 2:9].all() and seen.sum() == 49


def test_its_projections_cost_what_an_attentions_do() -> None:
    for dim in (48, 384, 768, 1152):
        parts = build_attention("conv", dim).macs_parts((16, 16))
        assert parts["projections"] == build_attention("sana", dim).macs_parts((16, 16))[
            "projections"
        ]  # fmt: skip


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_closed_form_is_the_count(options: dict) -> None:
    layer = build_attention("conv", 48, **options)
    assert count_macs(layer, grid=(7, 13)).total == fvcore_macs(layer, grid=(7, 13))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 4}, "kernel_size=4 has no middle; choose 3 or 5"),
        ({"kernel_size": 0}, "kernel_size must be at least 1"),
        ({"expansion": 0.0}, "expansion must be positive, got 0.0"),
        (
            {"impl": "triton", "kernel_size": 9},
            r"does not serve kernel_size=9; choose one of \(3, 5, 7\)",
        ),
    ],
)
def test_errors_name_the_remedy(options: dict, message: str) -> None:
    with pytest.raises(attnzoo.InvalidValue, match=message):
        build_attention("conv", 64, **options)
