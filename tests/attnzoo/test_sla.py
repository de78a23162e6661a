"""Sparse-linear attention: against loops over tokens, ragged blocks, and the choice of blocks."""

import math

import pytest
import torch

from attnzoo import InvalidValue, build_attention
from attnzoo.ops.sparse_linear import blocks_kept, sparse_linear_attention
from attnzoo.testing import CHECKS, GRIDS, build_scrambled, deviations, tokens


def oracle(layer, x):
    """Token by token: which keys its block keeps, their softmax, and the others' linear part."""
    heads, n, width = layer.num_heads, x.shape[1], layer.dim // layer.num_heads
    size = min(layer.config.block, n)
    blocks = [range(start, min(n, start + size)) for start in range(0, n, size)]
    count = max(1, math.floor(layer.config.share * len(blocks) + 1e-9))
    out = []
    for image in x:
        z = (image @ layer.qkv.weight.T + layer.qkv.bias).view(n, 3, heads, width)
        parts = []
        for h in range(heads):
            q, k, v = z[:, :, h].unbind(1)
            centered = (k - k.mean(0)).detach()
            rows = []
            for mine in blocks:
                mean = q[list(mine)].mean(0).detach()
                scores = [float(mean @ centered[list(b)].mean(0)) for b in blocks]
                best = sorted(range(len(blocks)), key=lambda b: -scores[b])[:count]
                near = [j for b in best for j in blocks[b]]
                far = [j for b in range(len(blocks)) if b not in best for j in blocks[b]]
                far = list(range(n)) if layer.config.linear == "all" else far
                for i in mine:
                    weights = (k[near] @ q[i] / math.sqrt(width)).exp()
                    row = weights @ v[near] / weights.sum()
                    similar = k[far].softmax(-1) @ q[i].softmax(-1)
                    linear = similar @ v[far] / (similar.sum() + layer.config.eps)
                    proj = layer.linear_proj
                    rows.append(row + proj.weight @ linear + proj.bias)
            parts.append(torch.stack(rows))
        out.append(torch.cat(parts, -1) @ layer.proj.weight.T + layer.proj.bias)
    return torch.stack(out)


def layer_gradients(function, layer, x):
    x = x.detach().clone().requires_grad_()
    out = function(x)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad((out * weight).sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize(("linear", "batch"), [("rest", 3), ("all", 1)])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_layer_is_its_equations(grid, linear, batch):
    options = {"linear": linear, "block": 16, "share": 0.4}
    layer, x = build_scrambled("sla", 12, num_heads=2, **options), tokens(grid, batch, 12)
    single = layer_gradients(lambda z: layer(z, grid), layer, x)
    layer = layer.double()
    double = layer_gradients(lambda z: layer(z, grid), layer, x.double())
    wanted = layer_gradients(lambda z: oracle(layer, z), layer, x.double())
    for found, budget in ((single, 1e-4), (double, 1e-10)):
        for ours, theirs in zip(found, wanted, strict=True):
            scale = theirs.abs().max().item() + 1e-2
            assert (ours.double() - theirs).abs().max() <= budget * scale


@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("block", [1, 5, 64])
@pytest.mark.parametrize("linear", ["rest", "all"])
def test_reference(linear, block, share):
    layer = build_scrambled("sla", linear=linear, block=block, share=share)
    for grid in GRIDS[:4]:
        found = deviations(layer, tokens(grid, 2), grid)
        assert found["output"] <= found["allowed output"], (grid, found)
        assert found["gradients"] <= found["allowed gradients"], (grid, found)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract_of_small_blocks(check):
    check("sla", block=8, share=0.3, linear="all")


@pytest.mark.parametrize("grid", [(8, 8), (7, 13)], ids=str)
def test_all_blocks_are_softmax_attention(grid):
    """And the linear part of the rest, which is nothing, is 0 to the last bit."""
    layer = build_scrambled("sla", block=16, share=1.0)
    softmax = build_attention("softmax", 48)
    weights = {k: v for k, v in layer.state_dict().items() if not k.startswith("linear")}
    softmax.load_state_dict(weights)
    with torch.no_grad():
        layer.linear_proj.bias.zero_()
    x = tokens(grid)
    torch.testing.assert_close(layer(x, grid), softmax(x, grid), rtol=0, atol=1e-6)
    q, k, v = layer._query_key_value(x, grid)
    assert sparse_linear_attention(q, k, v, 16, 1.0, True, 1e-5)[1].abs().max() == 0


def test_starts_as_the_sparse_part_which_is_its_map():
    torch.manual_seed(0)
    layer, grid = build_attention("sla", 48, block=8, num_heads=3).double(), (7, 13)
    x = tokens(grid).double()
    weights = layer.attention_map(x, grid)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert ((weights > 0).sum(-1) <= 16).all()  # two of twelve blocks, one perhaps the short one
    value = layer._query_key_value(x, grid)[2]
    mixed = (weights @ value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer.proj(mixed), layer(x, grid))


def test_a_projection_that_is_watched_is_called():
    """In half precision it is part of an operator else."""
    layer, x = build_scrambled("sla", block=16).bfloat16(), tokens((7, 13)).bfloat16()
    out, seen = layer(x, (7, 13)), []
    layer.linear_proj.register_forward_hook(lambda _, __, out: seen.append(out))
    assert (layer(x, (7, 13)) - out).norm() <= 2**-6 * out.norm()
    assert seen[0].abs().max() > 0


def test_what_moves_all_keys_alike_moves_no_choice():
    """A common part of all keys, a thousand times as large, would drown the differences."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 96, 8, generator=generator)
    near = sparse_linear_attention(q, k, v, 16, 0.2, True, 1e-5)[0]
    moved = sparse_linear_attention(q, k + 1e3, v, 16, 0.2, True, 1e-5)[0]
    torch.testing.assert_close(moved, near, rtol=0, atol=0.05)


def test_one_block_at_least_and_no_less_than_was_asked():
    assert [blocks_kept(n, 0.2) for n in (1, 4, 5, 9, 10, 64)] == [1, 1, 1, 1, 2, 12]
    assert blocks_kept(100, 0.29) == 29  # 28.999999999999996


@pytest.mark.parametrize(
    ("options", "message"),
    [({"share": 0.0}, r"share must lie in \(0, 1\], got 0\.0"), ({"share": 1.5}, "got 1.5"),
     ({"block": 0}, "block must be at least 1, got 0"), ({"linear": "some"}, "'rest', 'all'")],
)  # fmt: skip
def test_errors_name_value_and_remedy(options, message):
    with pytest.raises(InvalidValue, match=message):
        build_attention("sla", 48, **options)


@pytest.mark.parametrize("scale", [1e4, 1e5])
@pytest.mark.parametrize("grid", [(8, 8), (7, 13)], ids=str)
def test_steep_scores_have_finite_gradients(scale, grid):
    for seed in range(4):
        layer = build_scrambled("sla", 32, seed=seed, block=16)
        x = (tokens(grid, dim=32, seed=seed) * scale).requires_grad_()
        layer(x, grid).sum().backward()
        assert x.grad.isfinite().all()
        assert all(p.grad.isfinite().all() for p in layer.parameters())
