"""Differential attention: reference, both official orders of computing, lambda, norm and cost."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import attnzoo.mechanisms.differential  # noqa: F401
from attnzoo import build_attention
from attnzoo.testing import (
    CHECKS,
    GRIDS,
    build_scrambled,
    check_half_precision,
    deviations,
    tokens,
)

OPTIONS = [{}, {"num_heads": 4}, {"num_heads": 3, "lambda_init": 0.5}]


# 4 heads of 4096 tokens take long: torch has no fused CPU attention for values wider than keys.
@pytest.mark.parametrize(
    "check", [c for c in CHECKS if c is not check_half_precision], ids=lambda check: check.__name__
)
def test_contract(check):
    check("differential", num_heads=4)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_reference(options, batch):
    layer = build_scrambled("differential", **options)
    for grid in GRIDS:
        found = deviations(layer, tokens(grid, batch), grid)
        assert found["output"] <= found["allowed output"], (grid, found)
        assert found["gradients"] <= found["allowed gradients"], (grid, found)


@pytest.mark.parametrize("grid", GRIDS[:4])
@pytest.mark.parametrize("order", ["maps", "outputs", "halves of the outputs"])
def test_both_official_orders(grid, order):
    """Maps subtracted first, or outputs of two attentions, or of four on halves of the values."""
    dim, h, d = 48, 2, 12
    layer = build_scrambled("differential", dim, num_heads=h).double()
    x = tokens(grid).double()
    b, n, _ = x.shape
    wq, wk, wv = layer.qkv.weight.split(dim)
    q, k = (x @ w.T for w in (wq, wk))
    q, k = (z.view(b, n, 2 * h, d).transpose(1, 2) for z in (q, k))
    v = (x @ wv.T).view(b, n, h, 2 * d).transpose(1, 2)
    maps = torch.softmax(q @ k.transpose(2, 3) / d**0.5, -1)  # (b, 2h, n, n)
    (lq1, lk1), (lq2, lk2) = layer.lambda_vectors
    start = 0.8 - 0.6 * math.exp(-0.3)  # layer 1
    factor = torch.exp(lq1 @ lk1) - torch.exp(lq2 @ lk2) + start
    if order == "maps":
        maps = maps.view(b, h, 2, n, n)
        out = (maps[:, :, 0] - factor * maps[:, :, 1]) @ v
    elif order == "outputs":
        out = maps[:, ::2] @ v - factor * (maps[:, 1::2] @ v)
    else:
        out = torch.cat(
            [maps[:, ::2] @ half - factor * (maps[:, 1::2] @ half) for half in v.split(d, -1)], -1
        )
    root = (out.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    out = out / root * layer.norm.weight * (1 - start)
    expected = out.transpose(1, 2).reshape(b, n, dim) @ layer.proj.weight.T
    torch.testing.assert_close(layer(x, grid), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.factor(), factor)


def test_formula_token_by_token():
    dim, h, grid, n = 8, 2, (2, 3), 6
    layer = build_scrambled("differential", dim, num_heads=h, lambda_init=0.3).double()
    layer.requires_grad_(False)
    x = tokens(grid, 1, dim).double()
    q, k, v = layer.qkv(x)[0].split(dim, -1)
    vectors = layer.lambda_vectors.tolist()
    dots = [sum(a * b for a, b in zip(*pair, strict=True)) for pair in vectors]
    factor = math.exp(dots[0]) - math.exp(dots[1]) + 0.3
    out = torch.zeros(n, dim, dtype=torch.float64)
    for head in range(h):
        first = slice(4 * head, 4 * head + 2)
        second = slice(4 * head + 2, 4 * head + 4)
        whole = slice(4 * head, 4 * head + 4)
        for i in range(n):
            e1 = [math.exp(q[i, first] @ k[j, first] / 2**0.5) for j in range(n)]
            e2 = [math.exp(q[i, second] @ k[j, second] / 2**0.5) for j in range(n)]
            for j in range(n):
                out[i, whole] += (e1[j] / sum(e1) - factor * e2[j] / sum(e2)) * v[j, whole]
            size = math.sqrt(sum(value**2 for value in out[i, whole].tolist()) / 4 + 1e-5)
            out[i, whole] *= 0.7 * layer.norm.weight / size
    torch.testing.assert_close(layer(x, grid)[0], out @ layer.proj.weight.T, rtol=0, atol=1e-12)


class TestLambda:
    @pytest.mark.parametrize(
        ("layer_index", "value"), [(0, 0.2), (1, 0.3555), (5, 0.6661), (11, 0.7779), (27, 0.7998)]
    )
    def test_schedule(self, layer_index, value):
        layer = build_attention("differential", 48, layer_index=layer_index, depth=28)
        assert layer.lambda_init == pytest.approx(value, abs=5e-5)
        torch.nn.init.zeros_(layer.lambda_vectors)
        assert layer.factor().item() == pytest.approx(layer.lambda_init)

    def test_vectors_start_with_the_deviation_0_1(self):
        torch.manual_seed(0)
        vectors = build_attention("differential", 4096, 1).lambda_vectors
        assert vectors.shape == (2, 2, 2048)
        assert vectors.mean().item() == pytest.approx(0, abs=0.005)
        assert vectors.std().item() == pytest.approx(0.1, abs=0.005)

    def test_fixed(self):
        layers = [
            build_attention("differential", 48, layer_index=i, depth=2, lambda_init=0.5)
            for i in range(2)
        ]
        assert [layer.lambda_init for layer in layers] == [0.5, 0.5]

    def test_rows_of_the_map_sum_to_1_minus_lambda(self):
        layer = build_scrambled("differential", num_heads=4)
        weights = layer.attention_map(tokens((4, 6)), (4, 6))
        torch.testing.assert_close(
            weights.sum(-1), (1 - layer.factor()).expand(2, 4, 24), rtol=0, atol=1e-5
        )

    def test_lambda_learns(self):
        layer = build_scrambled("differential", num_heads=4)
        layer(tokens((8, 8)), (8, 8)).square().sum().backward()
        assert (layer.lambda_vectors.grad.abs() > 0).all()


def test_equal_maps_cancel():
    """With Q_1 = Q_2 and K_1 = K_2 the output is that of softmax attention, normed per head."""
    layer = build_scrambled("differential", num_heads=4).double()
    with torch.no_grad():
        for weight in layer.qkv.weight[:96].view(2, 4, 2, 6, 48):
            weight[:, 1] = weight[:, 0]
    x = tokens((4, 6)).double()
    both = layer.attention_map(x, (4, 6))
    q, k, _ = layer.qkv(x).view(2, 24, 3, 4, 12)[..., :6].permute(2, 0, 3, 1, 4)
    single = (q @ k.transpose(-1, -2) / 6**0.5).softmax(-1)
    torch.testing.assert_close(both, (1 - layer.factor()) * single)


def test_number_of_heads():
    assert [build_attention("differential", d).num_heads for d in (384, 512, 768)] == [3, 4, 6]
    assert build_attention("differential", 130).num_heads == 5  # 2 would make a width of 65


def test_parameters_have_no_bias():
    names = {name for name, _ in build_attention("differential", 48).named_parameters()}
    assert names == {"qkv.weight", "proj.weight", "norm.weight", "lambda_vectors"}


@pytest.mark.parametrize("grid", [(8, 8), (7, 13)])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_macs(grid, impl):
    layer = build_attention("differential", 48, 4, impl=impl)
    with FlopCounterMode(display=False) as counter:
        layer(tokens(grid, 1), grid)
    assert counter.get_total_flops() == 2 * layer.macs(grid)


@pytest.mark.parametrize(
    ("dim", "options", "fragments"),
    [
        (48, {"num_heads": 16}, ["num_heads=16", "width 3", "[1, 2, 3, 4, 6, 8, 12, 24]"]),
        (49, {}, ["width 49", "dim=49", "even dim"]),
        (48, {"lambda_init": 1.0}, ["lambda_init=1.0", "[0, 1)", "'increasing'"]),
        (48, {"lambda_init": "rising"}, ["'rising'", "'increasing'"]),
        (48, {"impl": "flash"}, ["impl='flash'", "torch"]),
    ],
)
def test_errors_name_value_and_remedy(dim, options, fragments):
    with pytest.raises(ValueError) as caught:
        build_attention("differential", dim, **options)
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_finite_under_autocast(dtype):
    layer = build_scrambled("differential", num_heads=4)
    x = (8 * tokens((32, 32), 1)).requires_grad_()
    with torch.autocast("cpu", dtype):
        out = layer(x, (32, 32))
    out.float().square().mean().backward()
    assert out.isfinite().all() and x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
