"""Gated DeltaNet: the rule and the layer against loops over tokens, and its traps."""

import math
import time

import pytest
import torch
import torch.nn.functional as F

from attnzoo import InvalidValue, build_attention
from attnzoo.ops.delta_rule import gated_delta_block, gated_delta_rule
from attnzoo.testing import CHECKS, GRIDS, build_scrambled, deviations, tokens


def operands(n, dk=6, dv=5, batch=2, heads=3, decay=1.0, dtype=torch.float64, seed=0):
    """What the rule takes; ``decay`` is the strength of forgetting."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(dk,), (dk,), (dv,), (), ()]
    q, k, v, g, b = (
        torch.randn(batch, heads, n, *end, generator=generator, dtype=torch.float64)
        for end in shapes
    )
    found = q, F.normalize(k, dim=-1), v, -decay * g.exp(), b.sigmoid()
    return [z.to(dtype).requires_grad_() for z in found]


def loop(q, k, v, g, b):
    """S_t = a S + b k (v - a S^T k)^T and o_t = q S_t, number by number over images and heads."""
    rows = []
    for image in range(q.shape[0]):
        for head in range(q.shape[1]):
            s = torch.zeros(q.shape[-1], v.shape[-1], dtype=q.dtype)
            for t in range(q.shape[2]):
                at = image, head, t
                s = g[at].exp() * s
                s = s + b[at] * torch.outer(k[at], v[at] - s.T @ k[at])
                rows.append(q[at] @ s)
    return torch.stack(rows).view(*q.shape[:3], v.shape[-1])


def gradients(function, inputs):
    out = function(*inputs)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad((out * weight).sum(), inputs)]


@pytest.mark.parametrize("n", [1, 7, 64, 65, 91, 200])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_the_rule_is_the_equation(n, impl):
    inputs = operands(n)
    found = gradients(lambda *z: gated_delta_rule(*z, impl=impl), inputs)
    torch.testing.assert_close(found, gradients(loop, inputs), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("decay", [0.0, 1e-3, 1.0, 30.0, 1e4])
def test_decays_of_any_strength_in_float32(decay):
    """Weak ones after a strong one too: a difference of sums would have lost them."""
    exact = operands(130, decay=decay)
    with torch.no_grad():
        exact[3][..., ::50] = -3e4
    inputs = [z.detach().float().requires_grad_() for z in exact]
    wanted = gradients(loop, exact)
    found = gradients(gated_delta_rule, inputs)
    for ours, theirs in zip(found, wanted, strict=True):
        scale = max(1.0, theirs.abs().max().item())
        assert ours.isfinite().all()
        assert (ours.double() - theirs).abs().max() < 2e-5 * scale


def test_what_is_masked_is_masked_before_the_exponential():
    """Above the diagonal exponents are positive and large: 0 times infinity is NaN."""
    inputs = operands(64, decay=0.0, dtype=torch.float32)
    with torch.no_grad():
        inputs[3].fill_(-80.0)  # over 64 tokens exp(5,120)
    for z in gradients(gated_delta_rule, inputs):
        assert z.isfinite().all()


@pytest.mark.parametrize("cut", [1, 63, 64, 100])
def test_a_state_that_is_handed_on_changes_nothing(cut):
    inputs = [z.detach() for z in operands(130)]
    whole, last = gated_delta_block(*inputs, state=None)
    first, state = gated_delta_block(*(z[:, :, :cut] for z in inputs), state=None)
    second, state = gated_delta_block(*(z[:, :, cut:] for z in inputs), state=state)
    torch.testing.assert_close(torch.cat([first, second], 2), whole)
    torch.testing.assert_close(state, last)


def test_strength_one_replaces_and_strength_zero_writes_nothing():
    q, k, v, g, b = (z.detach() for z in operands(8))
    g, k = torch.zeros_like(g), k[:, :, :1].expand_as(k)
    replaced = gated_delta_rule(k, k, v, g, torch.ones_like(b))
    torch.testing.assert_close(replaced, v)  # a memory that is asked for what was last written
    assert gated_delta_rule(q, k, v, g, torch.zeros_like(b)).abs().max() == 0


def layer_loop(layer, x, grid):
    """The layer from its equations: windows cut by hand, one token after the other."""
    (height, width), heads, dim = grid, layer.num_heads, layer.dim
    orders = {
        "forward": [(r, c) for r in range(height) for c in range(width)],
        "columns-forward": [(r, c) for c in range(width) for r in range(height)],
    }
    out = []
    for image in x:
        projected = (image @ layer.qkv.weight.T).view(height, width, 3 * dim)
        if layer.config.conv == "3x3":
            [branch] = layer.conv.branches
            padded = F.pad(projected, (0, 0, 1, 1, 1, 1))
            projected = branch.bias + sum(
                branch.weight[:, 0, i, j] * padded[i : i + height, j : j + width]
                for i in range(3)
                for j in range(3)
            )
        mixed = 0
        gates = (image @ layer.gates.weight.T).view(height, width, len(layer.directions), 2, heads)
        for index, direction in enumerate(layer.directions):
            order = orders[direction.replace("backward", "forward")]
            order = order[::-1] if direction.endswith("backward") else order
            state = torch.zeros(heads, dim // heads, dim // heads, dtype=x.dtype)
            read = {}
            for step, (r, c) in enumerate(order):
                z = projected[r, c]
                if layer.config.conv == "causal":
                    taps = layer.taps.weight[:, 0]
                    z = sum(
                        taps[:, 3 - back] * projected[order[step - back]]
                        for back in range(min(4, step + 1))
                    )
                q, k, v = F.silu(z).view(3, heads, dim // heads)
                q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
                pre, b = gates[r, c, index]
                rate = layer.log_rate[index].exp()
                a = (-rate * torch.log1p((pre + layer.step_bias[index]).exp())).exp()
                state = a[:, None, None] * state
                error = v - torch.einsum("hkv,hk->hv", state, k)
                state = state + torch.einsum("h,hk,hv->hkv", b.sigmoid(), k, error)
                read[r, c] = torch.einsum("hk,hkv->hv", q, state) / math.sqrt(dim // heads)
            mixed = mixed + torch.stack([read[place] for place in orders["forward"]])
        mixed = mixed / len(layer.directions)
        normed = mixed / (mixed.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.norm.weight
        gate = F.silu(image @ layer.output_gate.weight.T)
        out.append((normed.flatten(1) * gate) @ layer.proj.weight.T)
    return torch.stack(out)


def layer_gradients(function, layer, x):
    x = x.detach().clone().requires_grad_()
    out = function(x)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad((out * weight).sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_layer_is_its_equations(grid):
    batch = 1 if grid == (16, 24) else 3
    layer, x = build_scrambled("deltanet", 24, num_heads=2), tokens(grid, batch, 24)
    single = layer_gradients(lambda z: layer(z, grid), layer, x)
    layer = layer.double()
    double = layer_gradients(lambda z: layer(z, grid), layer, x.double())
    wanted = layer_gradients(lambda z: layer_loop(layer, z, grid), layer, x.double())
    for found, budget in ((single, 1e-3), (double, 1e-9)):
        for ours, theirs in zip(found, wanted, strict=True):
            scale = theirs.abs().max().item() + 1e-3
            assert (ours.double() - theirs).abs().max() <= budget * scale


@pytest.mark.parametrize("conv", ["causal", "none"])
@pytest.mark.parametrize("direction", ["forward", "columns-backward", "four"])
@pytest.mark.parametrize("grid", [(1, 1), (3, 5)], ids=str)
def test_options_are_their_equations(direction, conv, grid):
    layer = build_scrambled("deltanet", 24, num_heads=2, direction=direction, conv=conv).double()
    x = tokens(grid, 2, 24).double()
    wanted = layer_gradients(lambda z: layer_loop(layer, z, grid), layer, x)
    torch.testing.assert_close(layer_gradients(lambda z: layer(z, grid), layer, x), wanted)


@pytest.mark.parametrize("options", [{"direction": "four"}, {"conv": "causal"}, {"conv": "none"}])
def test_reference(options):
    layer = build_scrambled("deltanet", **options)
    for grid in GRIDS[1:4]:
        found = deviations(layer, tokens(grid, 2), grid)
        assert found["output"] <= found["allowed output"], (grid, found)
        assert found["gradients"] <= found["allowed gradients"], (grid, found)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract_of_the_papers_own_form(check):
    check("deltanet", direction="forward", conv="causal")


def test_the_map_times_the_values_is_what_the_norm_sees():
    layer, grid = build_scrambled("deltanet", conv="none").double(), (4, 5)
    x = tokens(grid).double()
    value = F.silu(layer.qkv(x)).chunk(3, -1)[2].unflatten(-1, (layer.num_heads, -1))
    mixed = torch.einsum("bhnm,bmhd->bnhd", layer.attention_map(x, grid), value)
    torch.testing.assert_close(layer._finish(x, mixed), layer(x, grid))


@pytest.mark.parametrize("value", [0.0, 1e-30])
def test_keys_of_zeros_have_finite_gradients(value):
    layer = build_scrambled("deltanet", conv="none")
    x = torch.full((1, 16, 48), value).requires_grad_()
    layer(x, (4, 4)).sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_starts_between_forgetting_nothing_and_forgetting_at_once():
    layer = build_attention("deltanet", 768)
    step = F.softplus(layer.step_bias)
    assert 0.001 <= step.min() < step.max() <= 0.1001
    assert 1 <= layer.log_rate.exp().min() < layer.log_rate.exp().max() <= 16.001


def test_fla_never_falls_back():
    with pytest.raises(InvalidValue, match="impl='fla'"):
        build_attention("deltanet", 32, impl="fla")(tokens((4, 4), dim=32), (4, 4))
    with pytest.raises(InvalidValue, match="stream=None"):
        build_attention("deltanet", 32, impl="fla", stream=16)


def test_chunks_are_faster_than_the_loop():
    inputs = [z.detach() for z in operands(1024, 32, 32, 1, 4, dtype=torch.float32)]

    def seconds(impl):
        start = time.perf_counter()
        gated_delta_rule(*inputs, impl=impl)
        return time.perf_counter() - start

    assert min(seconds("torch") for _ in range(3)) < min(seconds("reference") for _ in range(3))
