"""DyDiLA: options keep the reference, the paper's equations hold, so does its ablation."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from attnzoo import build_attention
from attnzoo.mechanisms.dydila import ABLATION_STEPS
from attnzoo.ops import dispatch
from attnzoo.testing import (
    DIM,
    build_scrambled,
    check_half_precision,
    check_reference,
    reference_of,
    tokens,
)

OPTIONS = [
    {"router_gradient": "none"},
    {"normalizer": "diff"},
    {"normalizer": "mean"},
    {"normalizer": "none"},
    {"num_heads": 3},
    {"gamma_form": "clamp"},
    {"gamma_jitter": 0.5},
    {"lambda_init": "increasing"},
    {"lambda_init": -0.2},
    {"qkv_bias": True},
    {"n_projectors": 1, "n_kernel_factors": 1, "n_differential_factors": 1},
    *({"conv": kind} for kind in ("3x3", "5x5", "none")),
    {"projection": "none", "differential": "none"},
    {"kernel": "fixed"},
    {"kernel": "relu"},
]


def _id(options):
    return ",".join(f"{k}={v}" for k, v in options.items()) or "default"


@pytest.mark.parametrize("options", OPTIONS, ids=_id)
@pytest.mark.parametrize("name", ["dydila", "dydila-map"])
def test_every_option_keeps_the_reference(name, options):
    check_reference(name, **options)


@pytest.mark.parametrize("step", ABLATION_STEPS)
def test_every_ablation_step_builds_and_keeps_the_reference(step):
    check_reference("dydila", **ABLATION_STEPS[step])


@pytest.mark.parametrize("map_router", ["token", "image"])
def test_map_router(map_router):
    check_reference("dydila-map", map_router=map_router)


@pytest.mark.parametrize("normalizer", ["diff", "mean"])
def test_other_normalizers_survive_half_precision(normalizer):
    check_half_precision("dydila", normalizer=normalizer)


def test_the_first_step_is_sana():
    layer = build_scrambled("dydila", eps=1e-8, **ABLATION_STEPS["sana"])
    sana = build_attention("sana", DIM, num_heads=1).eval()
    sana.load_state_dict({k.replace("shared", "qkv"): v for k, v in layer.state_dict().items()})
    x = tokens((6, 9))
    torch.testing.assert_close(layer(x, (6, 9)), sana(x, (6, 9)))


@pytest.mark.parametrize("name", ["dydila", "dydila-map"])
def test_the_equations_token_by_token(name):
    """Eqs. 1 to 10 written as loops over tokens, with the normalizer off as they stand."""
    layer = build_scrambled(name, normalizer="none").double()
    grid, n = (3, 4), 12
    x = tokens(grid, batch=1).double()
    w = layer.shared.weight
    tilde = {z: [] for z in ("query", "key", "query_prime", "key_prime")}
    values, lambdas = [], {"query": [], "key": [], "map": []}
    for token in x[0]:
        q, k, v = (w[i * DIM : (i + 1) * DIM] @ token for i in range(3))
        values.append(v)
        raw = {"query": q, "key": k}
        for z in ("query", "key"):
            chosen = int((layer.projector_routers[z].weight @ token).argmax())
            raw[f"{z}_prime"] = token @ layer.projectors[z][chosen]
        for z, value in raw.items():
            gamma = layer.gamma[0][int((layer.kernel_routers[z].weight @ value).argmax())]
            positive = value.clamp_min(0)
            powered = positive**gamma
            tilde[z].append(powered / powered.norm() * positive.norm())
        for z, router in layer.differential_routers.items():
            side = "query" if z == "map" else z
            both = torch.cat([tilde[side][-1], tilde[f"{side}_prime"][-1]])
            lambdas[z].append(layer.lambda_[0][int((router.weight @ both).argmax())])
    out = torch.zeros(n, DIM, dtype=torch.float64)
    for i, j in itertools.product(range(n), range(n)):
        if name == "dydila":
            q = tilde["query"][i] - lambdas["query"][i] * tilde["query_prime"][i]
            k = tilde["key"][j] - lambdas["key"][j] * tilde["key_prime"][j]
            weight = q @ k
        else:
            weight = tilde["query"][i] @ tilde["key"][j]
            weight = weight - lambdas["map"][i] * (tilde["query_prime"][i] @ tilde["key_prime"][j])
        out[i] += weight * values[j]
    value = torch.stack(values)[None]
    expected = F.linear(out[None] + layer.conv(value, grid), layer.proj.weight, layer.proj.bias)
    torch.testing.assert_close(layer(x, grid), expected, rtol=1e-6, atol=1e-6)


def test_straight_through_is_bit_identical_to_the_literal_routing():
    ste = build_scrambled("dydila").train()
    literal = build_scrambled("dydila", router_gradient="none").train()
    literal.load_state_dict(ste.state_dict())
    x = tokens((8, 8))
    assert torch.equal(ste(x, (8, 8)), literal(x, (8, 8)))
    ste(x, (8, 8)).square().sum().backward()
    literal(x, (8, 8)).square().sum().backward()
    for z in ("query", "key"):
        assert ste.projector_routers[z].weight.grad.abs().max() > 0
        assert literal.projector_routers[z].weight.grad is None
    for routers in (literal.kernel_routers, literal.differential_routers):
        assert all(router.weight.grad is None for router in routers.values())


def test_kernel_and_differential_routers_learn_once_factors_differ():
    layer = build_scrambled("dydila", gamma_jitter=0.3)
    layer(tokens((8, 8)), (8, 8)).square().sum().backward()
    for routers in (layer.kernel_routers, layer.differential_routers):
        assert all(router.weight.grad.abs().max() > 1e-6 for router in routers.values())


def test_rows_of_the_map_sum_to_one_less_lambda():
    layer = build_attention("dydila-map", DIM, lambda_init=0.3, eps=1e-15).eval()
    weights = layer.attention_map(tokens((5, 5)), (5, 5))
    torch.testing.assert_close(weights.sum(-1), torch.full((2, 1, 25), 0.7))


def test_map_equals_what_the_reference_multiplies():
    layer = build_scrambled("dydila", conv="none")
    x = tokens((4, 6))
    value = layer.shared(x)[..., 2 * DIM :]
    expected = layer.proj((layer.attention_map(x, (4, 6)) @ value[:, None])[:, 0])
    torch.testing.assert_close(reference_of(layer)(x, (4, 6)), expected)


@pytest.mark.parametrize("conv", ["acnet", "3x3", "5x5"])
def test_fusing_changes_nothing_but_the_cost(conv):
    layer = build_scrambled("dydila", conv=conv)
    x, grid = tokens((7, 5)), (7, 5)
    before, cost = layer(x, grid), layer.macs(grid)
    changed = layer.fuse()
    torch.testing.assert_close(layer(x, grid), before, rtol=1e-5, atol=1e-5)
    assert layer.config.conv == changed["conv"]
    assert layer.macs(grid) < cost if conv.startswith("acnet") else layer.macs(grid) == cost


def test_routes_are_reported_by_router():
    routes = build_scrambled("dydila").routes(tokens((4, 4)), (4, 4))
    assert {"projector.query", "kernel.key_prime", "differential.key"} <= routes.keys()
    assert all(index.shape == (2, 16) for index in routes.values())


@pytest.mark.skipif(not dispatch._native_works(), reason="no C compiler, or ATTNZOO_NATIVE=0")
@pytest.mark.parametrize("options", [{}, {"normalizer": "diff"}, {"n_differential_factors": 1}])
def test_a_few_tokens_in_c_are_their_reference(options):
    layer = build_scrambled("dydila", gamma_jitter=0.3, **options)
    with torch.no_grad():
        layer.gamma[0, ::3] *= -1
    x, grid = tokens((5, 7)), (5, 7)
    pair = [layer.shared(x)[..., :DIM]] * 2
    with torch.no_grad():
        assert dispatch.is_few("focused_difference", "auto", *pair)
        assert not dispatch.is_few("focused_difference", "reference", *pair)
        out, routes = layer(x, grid), layer.routes(x, grid)
    assert not dispatch.is_few("focused_difference", "auto", *pair), "it has no gradient"
    torch.testing.assert_close(out, reference_of(layer)(x, grid), rtol=1e-5, atol=1e-5)
    with torch.enable_grad():
        expected = reference_of(layer).routes(x, grid)
    assert routes.keys() == expected.keys()
    assert all(torch.equal(routes[name], expected[name]) for name in routes)


def test_a_nan_among_a_few_tokens_stays_in_its_image():
    layer, x = build_scrambled("dydila"), tokens((4, 4))
    x[0, 3, 5] = float("nan")
    with torch.no_grad():
        out = layer(x, (4, 4))
    assert out[0].isnan().any() and out[1].isfinite().all()
