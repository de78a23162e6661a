"""Softmax attention's options: norms of queries and keys, and the gate of the output."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo import Attention, InvalidValue, build_attention
from attnzoo.counting import count_macs, fvcore_macs
from attnzoo.testing import CHECKS
from tests.attnzoo import formulas
from tests.attnzoo.formulas import GRIDS, assert_near, assert_same, head_slices, projected, tokens
from tests.attnzoo.test_hard_inputs import hard_inputs, not_finite

build = partial(formulas.build, "softmax", dim=16, num_heads=2)
VARIANTS = [
    {"gate": "head"},
    {"gate": "element"},
    {"qk_norm": True},
    {"gate": "element", "qk_norm": True},
    {"conv": "acnet"},
    {"conv": "5x5", "gate": "head"},
]


def normed(z: Tensor, weight: Tensor) -> Tensor:
    return z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def convolved(layer: Any, value: Tensor, part: slice, grid: tuple[int, int]) -> Tensor:
    """Each branch's depthwise convolution of one image's values, then its norm, in eval mode."""
    image, total = value.T.reshape(1, -1, *grid), torch.zeros(1)
    for branch, norm in zip(layer.conv.branches, layer.conv.norms, strict=True):
        weight = branch.weight[part]
        bias = None if branch.bias is None else branch.bias[part]
        padding = [side // 2 for side in weight.shape[2:]]
        out = F.conv2d(image, weight, bias, padding=padding, groups=len(weight))
        if isinstance(norm, torch.nn.BatchNorm2d):
            mean, variance = norm.running_mean[part], norm.running_var[part]
            out = F.batch_norm(out, mean, variance, norm.weight[part], norm.bias[part])
        total = total + out
    return total.flatten(2)[0].T


def oracle(layer: Attention, x: Tensor, options: dict, grid: tuple[int, int]) -> Tensor:
    """The equations, head by head and query by query."""
    out = []
    for image in x:
        query, key, value = projected(layer, image[None])
        heads = []
        for head, part in enumerate(head_slices(16, 2)):
            q, k = query[:, part], key[:, part]
            if options.get("qk_norm"):
                q, k = normed(q, layer.query_norm.weight), normed(k, layer.key_norm.weight)
            rows = []
            for one in q:
                weights = (k @ one / 8**0.5).exp()
                rows.append(weights @ value[:, part] / weights.sum())
            mixed = torch.stack(rows)
            if "conv" in options:
                mixed = mixed + convolved(layer, value[:, part], part, grid)
            if "gate" in options:
                row = slice(head, head + 1) if options["gate"] == "head" else part
                mixed = mixed / (1 + (-(image @ layer.gate.weight[row].T)).exp())
            heads.append(mixed)
        out.append(torch.cat(heads, 1) @ layer.proj.weight.T + layer.proj.bias)
    return torch.stack(out)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_formula(options: dict, impl: str) -> None:
    for grid in GRIDS[:4]:
        for batch in (1, 3):
            layer, x = build(impl=impl, **options).eval(), tokens(grid, batch, 16)
            assert_same(x, (layer, layer(x, grid)), (layer, oracle(layer, x, options, grid)))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check, options: dict) -> None:
    check("softmax", **options)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_hard_inputs_are_finite(options: dict, dtype: torch.dtype) -> None:
    layer = build_attention("softmax", 48, **options)
    for x in hard_inputs().values():
        assert not not_finite(layer.to(dtype), x.to(dtype))
        if dtype != torch.float32:
            assert not not_finite(layer.float(), x, dtype=dtype)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_closed_form_is_the_count(options: dict) -> None:
    layer = build_attention("softmax", 48, num_heads=4, **options)
    counted = count_macs(layer, grid=(7, 13))
    assert counted.total == fvcore_macs(layer, grid=(7, 13))
    gate = {"head": 4 * 48, "element": 48 * 48}.get(options.get("gate", ""), 0)
    assert counted.parts["projections"] == (4 * 48**2 + gate) * 91
    taps = {"acnet": 15, "5x5": 25}.get(options.get("conv", ""), 0)
    assert counted.parts["conv"] == taps * 48 * 91


@pytest.mark.parametrize("conv", ["acnet", "3x3", "5x5"])
def test_fuse_keeps_the_output(conv: str) -> None:
    layer, x = build(conv=conv), tokens((4, 6), 2, 16)
    layer.train()(x, (4, 6))  # batch statistics of its own
    whole = layer.eval()(x, (4, 6))
    changed = layer.fuse()
    assert changed == {"conv": "5x5" if conv == "5x5" else "3x3"}
    assert layer.config == build(**changed).config
    assert_near([layer(x, (4, 6))], [whole])
    build(**changed).load_state_dict(layer.state_dict())


def test_a_gate_opens_half_way_and_multiplies_the_output() -> None:
    layer, plain = build(gate="element"), build()
    plain.load_state_dict(layer.state_dict(), strict=False)
    with torch.no_grad():
        layer.gate.weight.zero_()
    x = tokens((4, 6), 2, 16)
    bias = layer.proj.bias
    assert_near([2 * (layer(x, (4, 6)) - bias)], [plain(x, (4, 6)) - bias])


def test_without_the_option_nothing_is_new() -> None:
    assert {*build().state_dict()} == {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}


@pytest.mark.parametrize("options", VARIANTS[3:], ids=str)  # which have all of the others
def test_compiles_into_one_graph(options: dict) -> None:
    layer, x = build_attention("softmax", 48, **options), torch.randn(2, 24, 48)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, (4, 6)), layer(x, (4, 6)), rtol=1e-5, atol=1e-5)


def test_an_unknown_gate_is_named() -> None:
    with pytest.raises(InvalidValue, match="did you mean 'head'"):
        build_attention("softmax", 64, gate="heads")
