"""Sana's options: the norm of Sana 1.5 and the gated form of Sana-Video 2."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor

from attnzoo import Attention, InvalidValue, build_attention
from attnzoo.counting import count_macs, fvcore_macs
from attnzoo.testing import CHECKS, build_scrambled
from attnzoo.testing import tokens as standard_tokens
from tests.attnzoo import formulas
from tests.attnzoo.formulas import GRIDS, assert_near, assert_same, head_slices, tokens
from tests.attnzoo.test_hard_inputs import SCALES, hard_inputs, not_finite

build = partial(formulas.build, "sana", dim=16, num_heads=2)
VARIANTS = [{"qk_norm": True}, {"gated": True}]


def normed(z: Tensor, weight: Tensor) -> Tensor:
    return z / (z.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def oracle(layer: Attention, x: Tensor, is_gated: bool) -> Tensor:
    """The equations, head by head and query by query."""
    out = []
    for image in x:
        query, key, value = (image @ layer.qkv.weight.T).chunk(3, -1)
        query = normed(query, layer.query_norm.weight)
        key = normed(key, layer.key_norm.weight)
        heads = []
        for head, part in enumerate(head_slices(16, 2)):
            rows = []
            positive = key[:, part].clamp_min(0)
            weighed = positive
            if is_gated:
                beta = image @ layer.beta.weight[head] + layer.beta.bias[head]
                weighed = key[:, part] / (1 + (-beta[:, None]).exp())
            for q in query[:, part]:
                read = q if is_gated else q.clamp_min(0)
                total = (positive @ q.clamp_min(0)).sum() + 1e-8
                rows.append((weighed @ read) @ value[:, part] / total)
            mixed = torch.stack(rows)
            heads.append(normed(mixed, layer.head_norm.weight) if is_gated else mixed)
        mixed = torch.cat(heads, 1)
        if is_gated:
            mixed = mixed / (1 + (-(image @ layer.gate.weight.T + layer.gate.bias)).exp())
        out.append(mixed @ layer.proj.weight.T + layer.proj.bias)
    return torch.stack(out)


@pytest.mark.parametrize("impl", ["auto", "reference", "torch"])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_formula(options: dict, impl: str) -> None:
    for grid in GRIDS[:4]:
        for batch in (1, 3):
            layer, x = build(impl=impl, **options), tokens(grid, batch, 16)
            assert_same(x, (layer, layer(x, grid)), (layer, oracle(layer, x, "gated" in options)))


def test_a_gated_layer_is_always_normed() -> None:
    one, other = build(gated=True), build(gated=True, qk_norm=True)
    other.load_state_dict(one.state_dict())
    x = tokens((4, 6), 1, 16)
    assert torch.equal(one(x, (4, 6)), other(x, (4, 6)))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check, options: dict) -> None:
    check("sana", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mixed", [False, True], ids=["plain", "autocast"])
def test_hard_inputs_are_finite(dtype: torch.dtype, mixed: bool) -> None:
    if mixed and dtype == torch.float32:
        pytest.skip("autocast has no float32")
    layer = build_scrambled("sana", gated=True).train()
    layer = layer if mixed else layer.to(dtype)
    options = {"dtype": dtype} if mixed else {}
    for kind, x in hard_inputs().items():
        if kind == "half the tokens zero" and dtype == torch.float16:
            continue  # their sum of ReLUs is 0: a slope of 1 / eps, beyond float16's 65504
        for scale in SCALES[:2] if dtype == torch.float16 else SCALES:
            here = (x * scale).to(torch.float32 if mixed else dtype)
            assert not not_finite(layer, here, **options), (kind, scale)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_closed_form_is_the_count(impl: str) -> None:
    layer = build_attention("sana", 48, num_heads=4, gated=True, impl=impl)
    counted = count_macs(layer, grid=(7, 13))
    assert counted.total == fvcore_macs(layer, grid=(7, 13))
    assert counted.parts["projections"] == (5 * 48 + 4) * 48 * 91


def test_in_blocks_it_is_the_same() -> None:
    layer = build_scrambled("sana", gated=True)
    stream = build_scrambled("sana", gated=True, stream=32)
    x = standard_tokens((16, 24))
    with torch.no_grad():
        torch.testing.assert_close(stream(x, (16, 24)), layer(x, (16, 24)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"stream": 8}, {"impl": "reference"}], ids=str)
@pytest.mark.parametrize("mixed", [False, True], ids=["plain", "autocast"])
def test_a_normalizer_near_zero_does_not_overflow_float16(options: dict, mixed: bool) -> None:
    """Narrow heads have queries without a positive number; the norm takes any size."""
    layer = build_scrambled("sana", gated=True, num_heads=8, **options)
    x, grid = standard_tokens((8, 8)), (8, 8)
    with torch.no_grad():
        exact = layer(x, grid)
        half = layer if mixed else copy.deepcopy(layer).half()
        with torch.autocast("cpu", torch.float16, enabled=mixed):
            out = half(x if mixed else x.half(), grid)
    assert out.dtype is torch.float16
    assert (out - exact).norm() < 1e-2 * exact.norm()


def test_rows_of_the_map_times_values_are_what_the_norm_gets() -> None:
    layer, grid = build(gated=True), (5, 7)
    x = tokens(grid, 1, 16)
    value = layer.qkv(x).chunk(3, -1)[2].unflatten(-1, (2, 8)).transpose(1, 2)
    mixed = (layer.attention_map(x, grid) @ value).transpose(1, 2)
    mixed = layer.head_norm(mixed).flatten(2) * layer.gate(x).sigmoid()
    assert_near([layer.proj(mixed)], [layer(x, grid)])


def test_without_the_option_nothing_is_new_and_fused_kernels_serve_it() -> None:
    layer = build()
    assert {*layer.state_dict()} == {"qkv.weight", "proj.weight", "proj.bias"}
    assert layer.unserved_option() is None and layer.is_packed
    assert build(qk_norm=True).unserved_option() is None


def test_what_the_fused_kernels_do_not_serve_is_named() -> None:
    pytest.importorskip("triton")
    with pytest.raises(InvalidValue, match="does not serve gated=True; set impl='auto'"):
        build_attention("sana", 64, gated=True, impl="triton")


def test_compiles_into_one_graph() -> None:
    layer, x = build_attention("sana", 48, gated=True), torch.randn(2, 24, 48)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, (4, 6)), layer(x, (4, 6)), rtol=1e-5, atol=1e-5)
