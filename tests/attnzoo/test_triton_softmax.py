"""Kernels of softmax attention: over few keys, over neighborhoods, and over chosen blocks."""

from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from attnzoo import build_attention
from attnzoo.errors import InvalidValue
from attnzoo.layers import linear
from attnzoo.ops.few_keys import few_keys
from attnzoo.ops.neighborhood import Window, neighborhood_attention
from attnzoo.ops.sparse_linear import sparse_linear_attention, sparse_linear_tokens
from tests.attnzoo.interpreted import (
    BUDGETS,
    CAN_RUN,
    DEVICE,
    HALF,
    IMPLEMENTATIONS,
    IS_INTERPRETED,
    errors,
    random,
)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "budget"), BUDGETS, ids=str)
@pytest.mark.parametrize(
    ("n", "m", "is_packed"),
    # One token; two parts of the tokens, the first of two tiles, the last not full.
    [(1, 2, False), (41, 3, True), (41, 37, True)],
)
def test_few_keys(impl, dtype, budget, n, m, is_packed, monkeypatch):
    if impl == "triton" and IS_INTERPRETED:
        from attnzoo.ops.few_keys import triton as kernels

        monkeypatch.setattr(kernels, "PROGRAMS", 12)
        for name in ("FORWARD", "BACKWARD"):
            monkeypatch.setattr(kernels, name, {kernels.MOST_HALF: (16, 4)})
    query, both = random(2, n, 72, seed=1), random(2, m, 48, seed=2)

    def run(query, both, **options):
        operands = query[..., 24:48], *both.chunk(2, dim=-1)  # parts of wider rows
        if not is_packed:
            operands = (z.contiguous() for z in operands)
        return few_keys(*operands, 3, **options)

    found = errors(run, [query, both], (2, n, 24), dtype, impl)
    assert max(found) < budget


@pytest.mark.skipif(not CAN_RUN, reason="needs Triton, and a GPU or its interpreter")
@pytest.mark.parametrize(("dtype", "budget"), BUDGETS, ids=str)
@pytest.mark.parametrize(
    ("grid", "window"),
    # More than one tile, each with more than one block; windows that end at the border, are
    # moved, dilated, wider than the map; a disc.
    [
        ((9, 18), Window(9)),
        ((18, 5), Window(5, 2)),
        ((2, 3), Window(3, 9)),
        ((10, 9), Window(7, 1, 3)),
        ((1, 1), Window(7)),
    ],
    ids=str,
)
def test_neighborhoods(dtype, budget, grid, window):
    n = grid[0] * grid[1]

    def run(x, impl):
        parts = (z.unflatten(-1, (2, -1)).transpose(1, 2) for z in x.chunk(3, dim=-1))
        return neighborhood_attention(*parts, grid, window, impl=impl)

    found = errors(run, [random(2, n, 144, seed=1)], (2, 2, n, 24), dtype, "triton")
    assert max(found) < budget


@pytest.mark.skipif(not CAN_RUN, reason="needs Triton, and a GPU or its interpreter")
@pytest.mark.parametrize(("dtype", "budget"), BUDGETS, ids=str)
@pytest.mark.parametrize(
    ("n", "batch", "block", "share", "is_rest_only", "is_packed"),
    # The last block not full, read in pieces; all keys seen twice; one block alone, shorter than
    # a tile, and one token; every block kept, which leaves nothing to the linear part.
    [
        (75, 1, 32, 0.67, True, True),
        (41, 2, 16, 0.4, True, False),
        (41, 1, 16, 0.4, False, True),
        (9, 1, 64, 0.2, True, True),
        (1, 1, 16, 0.2, False, False),
        (32, 1, 16, 1.0, True, True),
    ],
)
def test_sparse_and_linear_parts(dtype, budget, n, batch, block, share, is_rest_only, is_packed):
    def run(x, impl):
        parts = by_head(x) if is_packed else map(torch.Tensor.contiguous, by_head(x))
        near, far = sparse_linear_attention(*parts, block, share, is_rest_only, 1e-5, impl=impl)
        return torch.stack([near, 2 * far])  # gradients that differ

    found = errors(run, [random(batch, n, 72, seed=1)], (2, batch, 2, n, 12), dtype, "triton")
    assert max(found) < budget


@pytest.mark.skipif(not CAN_RUN, reason="needs Triton, and a GPU or its interpreter")
def test_wide_heads_of_whole_blocks_in_float32():
    """Their products on Hopper's tensor cores read outside shared memory."""

    def run(x, impl):
        parts = [z.unsqueeze(1) for z in x.chunk(3, dim=-1)]
        return torch.stack(sparse_linear_attention(*parts, 64, 0.5, True, 1e-5, impl=impl))

    found = errors(run, [random(1, 128, 192, seed=1)], (2, 1, 1, 128, 64), torch.float32, "triton")
    assert max(found) < BUDGETS[0][1]


def by_head(x):
    """Packed queries, keys and values of two heads."""
    return [z.unflatten(-1, (2, -1)).transpose(1, 2) for z in x.chunk(3, dim=-1)]


@pytest.mark.skipif(not CAN_RUN, reason="needs Triton, and a GPU or its interpreter")
@pytest.mark.parametrize("n", [75, 5])
def test_the_linear_part_is_projected_and_added(n):
    def run(x, weight, bias, impl):
        operands = *by_head(x), weight, bias
        return sparse_linear_tokens(*operands, 32, 0.4, True, 1e-5, impl=impl)

    # Most of the result is the linear part's.
    operands = random(2, n, 72, seed=1), 9 * random(12, 12, seed=2), random(12, seed=3)
    found = errors(run, operands, (2, n, 24), HALF, "triton")
    assert max(found) < BUDGETS[1][1]


@pytest.mark.skipif(not CAN_RUN, reason="needs Triton, and a GPU or its interpreter")
def test_blocks_are_chosen_turned_and_summed(monkeypatch):
    from attnzoo.ops.sparse_linear import triton as kernels

    monkeypatch.setattr(kernels, "REST_TILE", (16, 32, 32, 4, 1))  # several each way
    blocks, count = 18, 5
    means, state = random(2, 2, 10, blocks), random(2, blocks, 20)
    means[1, 0, :, 7] = torch.nan  # whose choice is any
    kept, chosen = kernels.choose(means, count)
    key = means[:, 1] - means[:, 1].mean(-1, keepdim=True)
    wanted = (means[:, 0].mT @ key).topk(count).indices.sort(-1).values
    wanted[1, 7] = torch.arange(count)  # all are equal
    assert torch.equal(kept.long(), wanted)
    mask = torch.zeros(2, blocks, blocks, device=DEVICE).scatter_(-1, wanted, 1)
    assert torch.equal(chosen.float(), mask)
    readers, counts = kernels.turned(chosen)
    for part, block in ((0, 0), (1, 3), (1, 17)):
        found = readers[part, block, : counts[part, block]]
        assert found.tolist() == mask[part, :, block].nonzero().flatten().tolist()
    for is_transposed, rest in ((False, 1 - mask), (True, 1 - mask.mT)):
        found = kernels.rest_sums(chosen, state, True, is_transposed)
        torch.testing.assert_close(found, rest @ state)


@pytest.mark.skipif(not CAN_RUN, reason="needs Triton, and a GPU or its interpreter")
def test_an_image_of_nan_leaves_the_others_theirs():
    x = random(2, 40, 36)
    x[0, 3, 2] = torch.nan
    x.requires_grad_()

    def run(z):
        parts = (part.unsqueeze(1) for part in z.chunk(3, dim=-1))
        near, far = sparse_linear_attention(*parts, 16, 0.4, True, 1e-5, impl="triton")
        return (near + far).sum((1, 2, 3))

    out = run(x)
    [grad] = torch.autograd.grad(out.sum(), x)
    assert out[0].isnan() and out[1] == run(x[1:])[0]
    assert grad[0].isnan().any() and grad[1].isfinite().all()


@pytest.mark.skipif(not CAN_RUN, reason="needs Triton, and a GPU or its interpreter")
@pytest.mark.parametrize(
    ("name", "options"), [("local", {"window": 3}), ("sla", {"block": 16})], ids=str
)
def test_gradients_side_by_side_are_the_projections(name, options, monkeypatch):
    monkeypatch.setattr(linear, "owns_gradient", lambda *_: True)
    monkeypatch.setattr(torch, "cat", Mock(side_effect=torch.cat))
    slopes: list[torch.Tensor] = []
    layer: Any = build_attention(name, 32, num_heads=2, **options).to(DEVICE)
    for impl in ("reference", "triton"):
        layer.config = replace(layer.config, impl=impl)
        out = layer(random(1, 20, 32), (4, 5)).square().sum()
        slopes.append(torch.autograd.grad(out, layer.qkv.weight)[0])
        assert torch.cat.call_count == 1  # the reference's
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize(
    ("shape", "keys", "heads"), [((1, 4, 64), 129, 1), ((1, 4, 256), 8, 1), ((1, 4, 64), 0, 1)]
)
def test_other_keys_are_left_to_pytorch(shape, keys, heads):
    query, key = random(*shape), random(1, keys, shape[-1])
    exact = few_keys(query, key, key, heads, impl="reference")
    torch.testing.assert_close(few_keys(query, key, key, heads), exact, equal_nan=True)
    if CAN_RUN:
        with pytest.raises(InvalidValue, match=f"does not serve {keys} keys with heads of"):
            few_keys(query, key, key, heads, impl="triton")


@pytest.mark.parametrize(
    ("n", "width", "block"), [(4, 16, 5), (4, 129, 16), (16400, 1, 16)], ids=str
)
def test_other_blocks_are_left_to_pytorch(n, width, block):
    if not CAN_RUN:
        pytest.skip("needs Triton")
    z = random(1, 1, n, width)
    with pytest.raises(InvalidValue, match=r"does not serve (blocks of 5|heads|1025)"):
        sparse_linear_attention(z, z, z, block, 0.2, True, 1e-5, impl="triton")
    learned, options = (z[0, 0, :1], z[0, 0, 0]), (16, 0.2, True, 1e-5)
    with pytest.raises(InvalidValue, match=r"does not serve (the projection|heads)"):
        sparse_linear_tokens(z, z, z, *learned, *options, impl="triton")
