"""Test-time training: against autograd on the loss as it is written, and its limits."""

import pytest
import torch
import torch.nn.functional as F

from attnzoo import InvalidValue, build_attention
from attnzoo.testing import CHECKS, GRIDS, build_scrambled, deviations, tokens


def oracle(layer, x, grid):
    """Image by image and head by head: autograd on the inner loss, and the convolution by hand."""
    (height, width), heads, n = grid, layer.num_heads, x.shape[1]
    e = layer.dim // heads
    out = []
    for image in x:
        made = image @ layer.qkv.weight.T + layer.qkv.bias
        q, k, v = made[:, : 3 * heads * e].view(n, 3, heads, e).unbind(1)
        parts = []
        for h in range(heads):
            w = [layer.first[h] * 1, layer.second[h] * 1]

            def f(z, w):
                return (z @ w[0]) * F.silu(z @ w[1])

            loss = -(f(k[:, h], w) * v[:, h]).sum() / (3 * n)
            g = torch.autograd.grad(loss, w, create_graph=True)
            w = [
                a - layer.config.rate * b / (b.square().sum(0).clamp_min(1e-60).sqrt() + 1)
                for a, b in zip(w, g, strict=True)
            ]
            parts.append(f(q[:, h], w))
        if layer.config.conv:
            q, k, v = made[:, 3 * heads * e :].view(height, width, 3, e).unbind(2)
            taps = layer.taps[:, 0] * 1

            def convolved(z, taps):
                z = F.pad(z, (0, 0, 1, 1, 1, 1))
                return sum(
                    taps[:, i, j] * z[i : i + height, j : j + width]
                    for i in range(3)
                    for j in range(3)
                )

            loss = -(convolved(k, taps) * v).sum() / (3 * n)
            [g] = torch.autograd.grad(loss, taps, create_graph=True)
            norm = g.square().sum((1, 2), keepdim=True).sqrt()
            parts.append(convolved(q, taps - layer.config.rate * g / (norm + 1)).view(n, e))
        out.append(torch.cat(parts, -1) @ layer.proj.weight.T + layer.proj.bias)
    return torch.stack(out)


def layer_gradients(function, layer, x):
    x = x.detach().clone().requires_grad_()
    out = function(x)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad((out * weight).sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_layer_is_its_equations(grid, batch, dtype):
    layer, x = build_scrambled("ttt", 24, num_heads=2), tokens(grid, batch, 24)
    found = layer_gradients(lambda z: layer.to(dtype)(z, grid), layer, x.to(dtype))
    layer = layer.double()
    wanted = layer_gradients(lambda z: oracle(layer, z, grid), layer, x.double())
    for ours, theirs in zip(found, wanted, strict=True):
        scale = theirs.abs().max().item() + 1e-6
        budget = 1e-10 if dtype == torch.float64 else 1e-4
        assert (ours.double() - theirs).abs().max() <= budget * scale


@pytest.mark.parametrize("options", [{"conv": False}, {"rate": 0.3}, {"num_heads": 1}], ids=str)
def test_options(options):
    layer = build_scrambled("ttt", **options)
    for grid in GRIDS:
        found = deviations(layer, tokens(grid, 2), grid)
        assert found["output"] <= found["allowed output"], (grid, found)
        assert found["gradients"] <= found["allowed gradients"], (grid, found)
    layer, x = layer.double(), tokens((3, 5)).double()
    torch.testing.assert_close(layer(x, (3, 5)), oracle(layer, x, (3, 5)))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract_without_the_convolution(check):
    check("ttt", conv=False)


def test_a_step_is_never_longer_than_the_rate():
    from attnzoo.ops.inner_loop import trained_conv, trained_unit

    key, value = 1e4 * torch.randn(2, 3, 16, 4), 1e4 * torch.randn(2, 3, 16, 4)
    start = torch.randn(3, 4, 4)
    for moved in trained_unit(key, value, start, start, 0.5):
        assert (moved - start).norm(dim=-2).max() <= 0.5 * (1 + 1e-5)
    taps = torch.randn(3, 1, 3, 3)
    moved = trained_conv(key, value, taps, 0.5) - taps.squeeze(1)
    assert moved.flatten(2).norm(dim=-1).max() <= 0.5 * (1 + 1e-5)


def test_without_gradients_the_reference_still_trains():
    layer, x = build_scrambled("ttt", impl="reference"), tokens((4, 4))
    with torch.no_grad():
        out = layer(x, (4, 4))
    assert not out.requires_grad
    torch.testing.assert_close(out, layer(x, (4, 4)).detach())


def test_weights_with_a_projection_for_the_convolution_alone_are_read():
    stack, fresh = (torch.nn.Sequential(build_attention("ttt", 24, num_heads=2)) for _ in range(2))
    old = stack.state_dict()
    for kind in ("weight", "bias"):
        own, local = old[f"0.qkv.{kind}"].split([72, 36])
        old |= {f"0.qkv.{kind}": own, f"0.local_qkv.{kind}": local}
    fresh.load_state_dict(old)
    torch.testing.assert_close(fresh.state_dict(), stack.state_dict(), rtol=0, atol=0)
    assert "0.local_qkv.bias" in old  # the caller's stay as they are


def test_a_rate_that_trains_nothing_is_refused():
    with pytest.raises(InvalidValue, match=r"rate must be positive, got 0\.0"):
        build_attention("ttt", 48, rate=0.0)
