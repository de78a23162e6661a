"""Local attention: windows spelled out token by token, forms against each other, memory."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import attnzoo
from attnzoo import Attention, build_attention
from attnzoo.counting import count_macs, fvcore_macs
from attnzoo.ops.neighborhood import Window, flex, neighborhood_attention
from attnzoo.testing import deviations
from attnzoo.testing import tokens as standard_tokens
from tests.attnzoo import formulas
from tests.attnzoo.formulas import GRIDS, assert_near, assert_same, head_slices, projected, tokens

build = partial(formulas.build, "local")
VARIANTS = [
    {},
    {"window": 3},
    {"window": 1},
    {"window": 3, "dilation": 2},
    {"window": 5, "dilation": 3},
    {"window": 31},
    {"window": 31, "dilation": 4},
    {"shape": "disc", "radius": 1},
    {"shape": "disc", "radius": 3},
    {"shape": "disc", "radius": 8},
    {"shape": "disc", "radius": 50},
]


def seen_along(place: int, length: int, window: int, dilation: int) -> list[int]:
    """NATTEN's rule along one axis: as many neighbors as fit, moved to stay inside."""
    reachable = [i for i in range(length) if (i - place) % dilation == 0]
    while len(reachable) > window:  # the farther end goes; of two equally far ones either does
        is_first = place - reachable[0] > reachable[-1] - place
        reachable.pop(0 if is_first else -1)
    return reachable


def seen(token: int, grid: tuple[int, int], options: dict) -> list[int]:
    y, x = divmod(token, grid[1])
    if options.get("shape") == "disc":
        limit = options.get("radius", 8) ** 2
        places = [(i, j) for i in range(grid[0]) for j in range(grid[1])]
        return [i * grid[1] + j for i, j in places if (i - y) ** 2 + (j - x) ** 2 < limit]
    window, dilation = options.get("window", 7), options.get("dilation", 1)
    rows, columns = (
        seen_along(place, length, window, dilation)
        for place, length in zip((y, x), grid, strict=True)
    )
    return [i * grid[1] + j for i in rows for j in columns]


def oracle(layer: Attention, x: Tensor, grid: tuple[int, int], options: dict) -> Tensor:
    """The equations, token by token."""
    out = []
    for image in x:
        query, key, value = projected(layer, image[None])
        rows = []
        for i in range(len(image)):
            keys, parts = seen(i, grid, options), []
            for part in head_slices(x.shape[-1], layer.num_heads):
                scores = key[keys, part] @ query[i, part] / (part.stop - part.start) ** 0.5
                weights = (scores - scores.max()).exp()
                parts.append((weights @ value[keys, part]) / weights.sum())
            rows.append(torch.cat(parts))
        out.append(torch.stack(rows) @ layer.proj.weight.T + layer.proj.bias)
    return torch.stack(out)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("grid", GRIDS)
def test_formula_on_every_grid(grid: tuple[int, int], batch: int) -> None:
    layer, x = build(dim=16, num_heads=2), tokens(grid, batch, 16)
    assert_same(x, (layer, layer(x, grid)), (layer, oracle(layer, x, grid, {})))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("grid", [(1, 7), (7, 13), (16, 5)])
def test_formula_with_options(grid: tuple[int, int], options: dict) -> None:
    for impl in ("auto", "reference"):
        layer, x = build(dim=8, num_heads=2, impl=impl, **options), tokens(grid, 1, 8)
        assert_same(x, (layer, layer(x, grid)), (layer, oracle(layer, x, grid, options)))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("grid", [(1, 1), (8, 8), (16, 24)])
def test_float32_is_as_near_to_float64_as_the_reference(grid, options) -> None:
    torch.manual_seed(0)
    layer = build_attention("local", 48, **options)
    found = deviations(layer, standard_tokens(grid, 3), grid)
    for kind in ("output", "gradients"):
        assert found[kind] <= found[f"allowed {kind}"], found


def test_a_token_at_the_border_keeps_all_keys_of_a_square() -> None:
    layer, grid = build(dim=8), (9, 11)
    counts = (layer.attention_map(tokens(grid, 1, 8), grid) > 0).sum(-1)
    assert (counts == 49).all()
    corner = layer.attention_map(tokens(grid, 1, 8), grid)[0, 0, 0].view(grid)
    assert (corner[:7, :7] > 0).all() and corner[7:].sum() == corner[:, 7:].sum() == 0


def test_a_disc_of_eight_has_193_keys_inside_the_map_and_fewer_in_a_corner() -> None:
    layer, grid = build(dim=8, shape="disc"), (17, 17)
    counts = (layer.attention_map(tokens(grid, 1, 8), grid) > 0).sum(-1)[0, 0].view(grid)
    assert counts[8, 8] == 193
    assert counts[0, 0] == sum(y * y + x * x < 64 for y in range(8) for x in range(8))


@pytest.mark.parametrize("options", [{"window": 13}, {"shape": "disc", "radius": 15}])
def test_a_window_of_the_whole_map_is_softmax_attention(options: dict) -> None:
    layer, softmax = build(**options), formulas.build("softmax")
    softmax.load_state_dict(layer.state_dict())
    x, grid = tokens((7, 13), 2), (7, 13)
    assert_same(x, (layer, layer(x, grid)), (softmax, softmax(x, grid)))
    assert layer.macs_parts(grid) | {"conv": 0} == softmax.macs_parts(grid)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_rows_of_the_map_times_values_are_the_output(options: dict) -> None:
    layer, grid = build(num_heads=2, **options), (7, 13)
    x = tokens(grid)
    weights = layer.attention_map(x, grid)
    value = layer.qkv(x).chunk(3, -1)[2].unflatten(-1, (2, 32)).transpose(1, 2)
    out = layer.proj((weights @ value).transpose(1, 2).flatten(2))
    assert_near([out, weights.sum(-1)], [layer(x, grid), torch.ones(1, 2, 91).double()])


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("grid", [(1, 7), (16, 24)])
def test_the_count_is_that_of_pairs_that_see_each_other(grid, options: dict) -> None:
    layer = build_attention("local", 32, **options)
    pairs = sum(len(seen(i, grid, options)) for i in range(grid[0] * grid[1]))
    assert layer.macs_parts(grid) == {
        "projections": 4 * 32**2 * grid[0] * grid[1], "core": 2 * pairs * 32,
    }  # fmt: skip
    assert count_macs(layer, grid=grid).total == fvcore_macs(layer, grid=grid) == layer.macs(grid)


def peak(layer: Attention, side: int, train: bool) -> int:
    """Bytes at the worst moment of a forward, or of a training step."""
    x = torch.randn(1, side * side, layer.dim, requires_grad=train)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        with torch.set_grad_enabled(train):
            out = layer(x, (side, side))
        if train:
            out.sum().backward()
    results = profiled.profiler.kineto_results  # pyright: ignore[reportOptionalMemberAccess]
    events = [event for event in results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("options", [{}, {"dilation": 3}, {"shape": "disc", "radius": 4}], ids=str)
def test_memory_grows_with_n_alone(options: dict, train: bool) -> None:
    layer = build_attention("local", 128, **options)
    peak(layer, 32, train)  # what a grid needs is made once
    small, large = peak(layer, 32, train), peak(layer, 64, train)
    assert math.log(large / small) / math.log(4) < 1.02
    # Tokens, queries, keys, values, gradients, and the weights of a few tiles. The n x n maps of
    # two heads alone would be 64 such tensors.
    assert large / (4 * 64**2 * 128) < 30


@pytest.mark.parametrize("window", [Window(7), Window(3, 2), Window(5, 3), Window(1, 1, 5)])
@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (8, 8), (7, 13), (33, 20)])
def test_flex_attention_on_a_cpu_is_the_reference(grid, window) -> None:
    query, key, value = torch.randn(3, 2, 2, grid[0] * grid[1], 16)
    out = flex.neighborhood_attention(query, key, value, grid, window)
    expected = neighborhood_attention(query, key, value, grid, window, impl="reference")
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [Window(7), Window(3, 2), Window(1, 1, 5)])
@pytest.mark.parametrize("grid", [(8, 16), (7, 13)])
def test_flex_attentions_gradient_is_put_back_in_order(grid, window, monkeypatch) -> None:
    # PyTorch has no fused backward for a CPU, and refuses the plain one that it has.
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    operands = [torch.randn(2, 2, grid[0] * grid[1], 16, requires_grad=True) for _ in range(3)]
    expected = neighborhood_attention(*operands, grid, window, impl="reference")
    cotangent = torch.randn_like(expected)
    slopes = torch.autograd.grad(expected, operands, cotangent)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        out = flex.neighborhood_attention(*operands, grid, window)
        found = torch.autograd.grad(out, operands, cotangent)
    torch.testing.assert_close(found, slopes, rtol=1e-5, atol=1e-5)
    ran = {event.name.removeprefix("aten::") for event in profiled.events()}
    # What reads the captured places has an index_put of its own, of nothing.
    assert "index_select" in ran and not ran & {"index_add", "index_add_"}


def test_flex_attention_learns_after_an_inference_mode(monkeypatch) -> None:
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    z = torch.randn(1, 1, 5 * 11, 256)  # so wide that both take the same plan
    with torch.inference_mode():
        flex.neighborhood_attention(z, z, z, (5, 11), Window(5))
    z.requires_grad_()
    flex.neighborhood_attention(z, z, z, (5, 11), Window(5)).sum().backward()
    assert z.grad is not None and z.grad.isfinite().all()


@pytest.mark.parametrize("window", [Window(7), Window(3, 2), Window(5, 3), Window(1, 1, 5)])
@pytest.mark.parametrize("block", [64, 128])
def test_flex_attentions_blocks_hold_every_pair_and_few_in_vain(window, block) -> None:
    # On a CPU the blocks are ignored, on a GPU what is not in them is not seen.
    plan = flex.plan_of((33, 20), window, block, torch.device("cpu"))
    mask = flex.mask_of(window.radius**2, *plan.blocks, *plan.bounds)
    place = torch.arange(len(plan.order))
    pairs = mask.mask_mod(place[0], place[0], place[:, None], place).unflatten(1, (-1, block))
    needed = pairs.any(2).unflatten(0, (-1, block)).any(1)
    met, indices = plan.blocks[0][0, 0], plan.blocks[1][0, 0]
    for row, count, order in zip(needed, met, indices, strict=True):
        assert set(order[:count].tolist()) == set(row.nonzero().flatten().tolist())
    met, indices = plan.blocks[2][0, 0], plan.blocks[3][0, 0]
    for column, count, order in zip(needed.t(), met, indices, strict=True):
        assert set(order[:count].tolist()) == set(column.nonzero().flatten().tolist())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 4}, "window=4 has no middle; choose 3 or 5"),
        ({"window": 0}, "window must be at least 1"),
        ({"dilation": 0}, "dilation must be at least 1"),
        ({"shape": "disc", "dilation": 2}, "dilation=2 is of squares"),
        ({"shape": "disc", "impl": "natten"}, "has no discs"),
        ({"shape": "disk"}, "did you mean 'disc'"),
    ],
)
def test_errors_name_the_remedy(options: dict, message: str) -> None:
    with pytest.raises(attnzoo.InvalidValue, match=message):
        build_attention("local", 64, **options)


@pytest.mark.parametrize(
    ("impl", "message"),
    [("flex", "runs on a GPU, not on 'cpu'"), ("natten", "natten")],
)
def test_what_was_asked_for_and_is_missing_is_named(impl: str, message: str) -> None:
    layer = build_attention("local", 32, impl=impl)
    with pytest.raises(RuntimeError, match=message):
        layer(torch.randn(1, 64, 32), (8, 8))
