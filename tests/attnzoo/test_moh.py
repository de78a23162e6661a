"""Mixture-of-head attention: reference, formula, gates, schedules, balancing loss and cost."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import attnzoo.mechanisms.moh as moh
from attnzoo import auxiliary_loss, build_attention
from attnzoo.testing import CHECKS, GRIDS, build_scrambled, deviations, tokens

SPLITS = [(2, 2), (1, 1), (0, 3), (3, 3), (6, 0), (5, 1)]


def build(shared: int, routed: int, dim: int = 48, heads: int = 6, **options):
    split = {"shared_heads": shared, "routed_heads": routed}
    return build_scrambled("moh", dim, num_heads=heads, **split, **options)


def build_router(*rows: torch.Tensor, dim: int = 4, heads: int = 4, **options):
    """A layer whose router's rows are given."""
    layer = build_attention("moh", dim, num_heads=heads, **options)
    with torch.no_grad():
        layer.router.copy_(torch.stack(rows))
    return layer


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check):
    check("moh", num_heads=6, shared_heads=2, routed_heads=3)


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_reference(split, batch):
    layer = build(*split)
    for grid in GRIDS:
        found = deviations(layer, tokens(grid, batch), grid)
        assert found["output"] <= found["allowed output"], (grid, found)
        assert found["gradients"] <= found["allowed gradients"], (grid, found)


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_formula_token_by_token(split):
    """A loop over tokens and heads, straight from the paper's sums."""
    shared, routed = split
    dim, heads, grid = 12, 6, (2, 3)
    layer = build(shared, routed, dim).double().requires_grad_(False)
    x = tokens(grid, 1, dim).double()
    q, k, v = (part.view(6, heads, 2) for part in layer.qkv(x)[0].split(dim, -1))
    w1, wr, w0 = layer.router.split([shared, heads - shared, 2 if shared and routed else 0])
    out = torch.zeros(6, dim, dtype=torch.float64)
    for i in range(6):
        token = x[0, i]
        weights = [0.0] * heads
        exp = [math.exp(float(w @ token)) for w in w1]
        for head in range(shared):
            weights[head] = shared * exp[head] / sum(exp)
        exp = [math.exp(float(w @ token)) for w in wr]
        best = sorted(range(heads - shared), key=lambda head: -exp[head])[:routed]
        for head in best:
            weights[shared + head] = routed * exp[head] / sum(exp[other] for other in best)
        if len(w0):
            exp = [math.exp(float(w @ token)) for w in w0]
            for head in range(heads):
                weights[head] *= 2 * exp[head >= shared] / sum(exp)
        for head in range(heads):
            scores = torch.stack([q[i, head] @ k[j, head] for j in range(6)]) / math.sqrt(2)
            mixed = sum(p * v[j, head] for j, p in enumerate(scores.exp() / scores.exp().sum()))
            columns = slice(2 * head, 2 * head + 2)
            out[i] += weights[head] * layer.proj.weight[:, columns] @ mixed
    torch.testing.assert_close(layer(x, grid)[0], out + layer.proj.bias, rtol=0, atol=1e-12)


def test_equals_softmax_when_all_gates_are_one():
    layer = build(6, 0)
    torch.nn.init.zeros_(layer.router)
    softmax = build_attention("softmax", 48, num_heads=6)
    softmax.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "router"})
    for grid in GRIDS:
        x = tokens(grid)
        assert (layer.gates(x, grid) == 1).all()
        torch.testing.assert_close(layer(x, grid), softmax(x, grid), rtol=0, atol=1e-6)


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_gates_are_sparse_and_sum_to_the_number_of_active_heads(split):
    shared, routed = split
    gates = build(shared, routed).double().gates(tokens((7, 13)).double(), (7, 13))
    assert gates.shape == (2, 6, 91) and (gates >= 0).all()
    used = gates > 0
    assert used[:, :shared].all() and (used[:, shared:].sum(1) == routed).all()
    # The two groups are balanced by factors that sum to 2.
    groups = zip(gates.split([shared, 6 - shared], 1), split, strict=True)
    factors = [group.sum(1) / size for group, size in groups if size]
    torch.testing.assert_close(sum(factors), torch.full_like(gates[:, 0], len(factors)))


def test_attention_map_rows_sum_to_the_gates():
    layer, x = build(2, 2), tokens((4, 6))
    weights = layer.attention_map(x, (4, 6))
    torch.testing.assert_close(weights.sum(-1), layer.gates(x, (4, 6)))


def test_router_learns_through_the_gates():
    layer = build(2, 2, balance_coefficient=0.0).train()
    layer(tokens((8, 8)), (8, 8)).square().sum().backward()
    assert auxiliary_loss(layer) is None
    for rows in layer.router.grad.split([2, 4, 2]):
        assert rows.abs().max() > 1e-3


def test_top_1_routing_learns_by_balancing_only():
    """A single chosen head has the gate 1, whatever its probability: a known limit of MoH."""
    for coefficient, is_moved in ((0.0, False), (0.01, True)):
        layer = build(2, 1, balance_coefficient=coefficient).train()
        loss = layer(tokens((8, 8)), (8, 8)).square().sum()
        aux = auxiliary_loss(layer)
        (loss if aux is None else loss + aux).backward()
        assert (layer.router.grad[2:6].abs().max() > 1e-7).item() is is_moved


class TestBalanceLoss:
    def test_by_hand(self):
        # One shared head, three routed ones, top 1; logits are the tokens' last three entries.
        eye = torch.eye(4)
        zero = torch.zeros(4)
        rows = [zero, *eye[1:], zero, zero]
        options = {"shared_heads": 1, "routed_heads": 1, "balance_coefficient": 0.5, "depth": 4}
        layer = build_router(*rows, **options).train()
        x = torch.tensor([[0, 1, 0, 0], [0, 0, 2, 0], [0, 0, 3, 0], [0, 0, 0, 1]]).float()
        layer(x[None], (2, 2))
        e = math.e
        p = [
            [e / (e + 2), 1 / (e + 2), 1 / (e + 2)],
            [1 / (e**2 + 2), e**2 / (e**2 + 2), 1 / (e**2 + 2)],
            [1 / (e**3 + 2), e**3 / (e**3 + 2), 1 / (e**3 + 2)],
            [1 / (e + 2), 1 / (e + 2), e / (e + 2)],
        ]
        mean = [sum(row[i] for row in p) / 4 for i in range(3)]
        loss = 9 * (mean[0] * 0.25 + mean[1] * 0.5 + mean[2] * 0.25) / 3
        assert auxiliary_loss(layer).item() == pytest.approx(0.5 * loss / 4, rel=1e-5)

    def test_uniform_is_the_minimum(self):
        """Uniform routing gives k; any spread over heads that usage follows gives more."""
        rows = [torch.zeros(4), *torch.eye(4)[1:], torch.zeros(4), torch.zeros(4)]
        layer = build_router(*rows, shared_heads=1, routed_heads=1, balance_coefficient=1.0)
        uniform = torch.cat([torch.zeros(3, 1), 9 * torch.eye(3)], 1)[None]
        layer.train()(uniform, (1, 3))
        assert auxiliary_loss(layer).item() == pytest.approx(1.0, rel=1e-5)
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            lean = 3 * torch.randn(1, 1, 4, generator=generator)
            layer(uniform + lean, (1, 3))
            assert auxiliary_loss(layer).item() >= 1.0 - 1e-5

    def test_sum_over_layers_is_the_mean_over_those_that_route(self):
        layers = torch.nn.ModuleList(
            build_attention("moh", 48, 6, index, 12, schedule="S-90") for index in range(12)
        )
        x = tokens((4, 4))
        for layer in layers:
            torch.nn.init.zeros_(layer.router)
            layer.train()(x, (4, 4))
        assert sum(layer.auxiliary_loss is not None for layer in layers) == 8
        # Equal probabilities cost k = 2 per layer; the coefficient is 0.01.
        assert auxiliary_loss(layers).item() == pytest.approx(0.02)

    def test_none_in_eval(self):
        layer = build(2, 2).eval()
        layer(tokens((4, 4)), (4, 4))
        assert layer.auxiliary_loss is None


class TestSchedules:
    @pytest.mark.parametrize(
        ("name", "heads", "shared", "routed"),
        [
            ("S-90", 6, [3] * 8 + [6] * 4, [2] * 8 + [0] * 4),
            ("S-75", 6, [2] * 2 + [3] * 8 + [6] * 2, [1] * 6 + [2] * 4 + [0] * 2),
            ("B-90", 12, [6] * 5 + [7] * 5 + [12] * 2, [4] * 10 + [0] * 2),
            ("B-75", 12, [4] * 2 + [6] * 8 + [12] * 2, [2] * 2 + [3] * 8 + [0] * 2),
        ],
    )
    def test_released_models(self, name, heads, shared, routed):
        layers = [build_attention("moh", 12, heads, i, 12, schedule=name) for i in range(12)]
        assert [layer.shared_heads for layer in layers] == shared
        assert [layer.routed_heads for layer in layers] == routed
        share = sum(shared + routed) / (12 * heads)
        assert share == pytest.approx(int(name[2:]) / 100, abs=0.02)

    @pytest.mark.parametrize("name", moh.SCHEDULES)
    @pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 8, 12, 16])
    @pytest.mark.parametrize("depth", [1, 2, 9, 12, 28])
    def test_scaled(self, name, heads, depth):
        splits = [moh.scheduled_heads(name, heads, index, depth) for index in range(depth)]
        for shared, routed in splits:
            assert 1 <= shared <= heads and 0 <= routed <= heads - shared
            assert routed or shared == heads
        if heads >= 6 and depth >= 9:
            used = sum(map(sum, splits)) / (heads * depth)
            assert used == pytest.approx(int(name[2:]) / 100, abs=0.1)
            assert splits[-1] == (heads, 0) and splits[0][1] > 0


@pytest.mark.parametrize("grid", [(8, 8), (7, 13)])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_macs(grid, split):
    layer = build(*split, impl="reference")
    with FlopCounterMode(display=False) as counter:
        layer(tokens(grid, 1), grid)
    assert counter.get_total_flops() == 2 * layer.macs(grid)


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"shared_heads": 4, "routed_heads": 3}, ["shared_heads=4", "routed_heads=3", "<= 6"]),
        ({"shared_heads": 3, "routed_heads": 0}, ["routed_heads=0", "shared_heads=6"]),
        ({"shared_heads": 3}, ["routed_heads=None", "set both", "'S-90'"]),
        ({"shared_heads": -1, "routed_heads": 2}, ["shared_heads must be at least 0", "-1"]),
        ({"schedule": "S-80"}, ["'S-80'", "'S-90'"]),
        ({"balance_coefficient": -1.0}, ["balance_coefficient must be at least 0"]),
    ],
)
def test_errors_name_value_and_remedy(options, fragments):
    with pytest.raises(ValueError) as caught:
        build_attention("moh", 48, 6, **options)
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_finite_under_autocast(dtype):
    layer = build(2, 2).train()
    x = (8 * tokens((32, 32), 1)).requires_grad_()
    with torch.autocast("cpu", dtype):
        out = layer(x, (32, 32))
    (F.mse_loss(out.float(), torch.zeros_like(x)) + auxiliary_loss(layer)).backward()
    assert out.isfinite().all() and x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
