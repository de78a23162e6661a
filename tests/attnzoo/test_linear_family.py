"""Linear attention's further forms: each beside its formulas written out, and what these imply."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import attnzoo
from attnzoo import InvalidValue, testing
from attnzoo.counting import fvcore_macs, measure_macs
from attnzoo.layers.linear_attention import Features
from attnzoo.mechanisms.mhla import start_of_mixing
from attnzoo.ops.fixation_core import shifted
from attnzoo.ops.rotary_core import rotary
from attnzoo.ops.rotary_core.rotary import rotated
from tests.attnzoo import formulas
from tests.attnzoo.formulas import (
    GRIDS,
    assert_near,
    depthwise,
    grads,
    head_slices,
    tokens,
)

# Of layers whose parts differ by mechanism.
build: Callable[..., Any] = formulas.build
build_attention: Callable[..., Any] = attnzoo.build_attention
reference_of: Callable[..., Any] = testing.reference_of


def linear(layer: Any, x: Tensor) -> Tensor:
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def positive(z: Tensor) -> Tensor:
    """ELU + 1."""
    return torch.where(z > 0, z + 1, z.clamp_max(0).exp())


def linfusion(layer: Any, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """One image, query by query."""

    def doubled(network: Any) -> Tensor:
        z = linear(network.first, x)
        z = (z - z.mean(-1, True)) / (z.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        z = z * network.norm.weight + network.norm.bias
        return x + linear(network.second, torch.where(z > 0, z, 0.01 * z))

    query = positive(linear(layer.query, doubled(layer.query_network)))
    key = positive(linear(layer.key, doubled(layer.key_network)))
    value = linear(layer.value, x)
    heads = []
    for part in head_slices(layer.dim, layer.num_heads):
        q, k, v = query[:, part], key[:, part], value[:, part]
        rows = []
        for i in range(len(x)):
            z = (q[i] * k.mean(0)).sum() + 1e-4
            rows.append(((k * q[i]).sum(-1, True) * v).mean(0) / z)
        heads.append(torch.stack(rows))
    return linear(layer.proj, torch.cat(heads, -1))


def efficient(layer: Any, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """One image, channel by channel of the keys."""
    query, key, value = linear(layer.qkv, x).chunk(3, -1)
    heads = []
    for part in head_slices(layer.dim, layer.num_heads):
        q = query[:, part].exp() / query[:, part].exp().sum(-1, keepdim=True)
        out = torch.zeros_like(q)
        for c in range(q.shape[1]):
            weight = key[:, part][:, c].exp()
            context = (weight[:, None] * value[:, part]).sum(0) / weight.sum()
            out = out + q[:, c, None] * context
        heads.append(out)
    return linear(layer.proj, torch.cat(heads, -1))


STEPS = [(1, 0), (-1, 0), (0, 1), (0, -1), (-1, -1), (1, 1), (-1, 1), (1, -1)]  # y, x


def associated(z: Tensor, grid: tuple[int, int]) -> Tensor:
    """The channel shift of (n, c), token by token."""
    height, width = grid
    fold = z.shape[1] // 16
    image = z.reshape(height, width, -1)
    rows = []
    for y in range(height):
        for x in range(width):
            parts = []
            for i, (down, right) in enumerate(STEPS):
                part = slice(i * fold, (i + 1) * fold)
                is_inside = 0 <= y + down < height and 0 <= x + right < width
                if is_inside:
                    parts.append(image[y + down, x + right, part])
                else:
                    parts.append(image[y, x, part] * (1 if i >= 4 else 0))
            rows.append(torch.cat([*parts, image[y, x, 8 * fold :]]))
    return torch.stack(rows)


def fixation(layer: Any, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """One image, query by query."""
    query, key, value = linear(layer.qkv, x).chunk(3, -1)
    if layer.config.shift:
        key, value = associated(key, grid), associated(value, grid)
    width = layer.dim // layer.num_heads
    heads = []
    for part in head_slices(layer.dim, layer.num_heads):
        q, k = (z[:, part].clamp_min(0) + 1 / math.sqrt(width) for z in (query, key))
        v = value[:, part]
        gate = 1 / (1 + (-linear(layer.gate, torch.cat([q, k, v], -1))).exp())
        q, k = q * gate[:, :width], k * gate[:, -width:]
        rows = []
        for i in range(len(x)):
            similarity = (k * q[i]).sum(-1, keepdim=True)
            rows.append((similarity * v).sum(0) / (similarity.sum() + 1e-6))
        heads.append(torch.stack(rows))
    return linear(layer.proj, torch.cat(heads, -1))


def mhla(layer: Any, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """One image, query by query; blocks as a grid of ``side`` cells of whole tokens."""
    query, key, value = linear(layer.qkv, x).chunk(3, -1)
    side = math.isqrt(layer.config.n_blocks)
    down, across = (math.ceil(length / side) for length in grid)
    # Block, and place in the block, of every token.
    where = [
        (r // down * side + c // across, (r % down, c % across))
        for r in range(grid[0])
        for c in range(grid[1])
    ]
    mixing = layer.mixing
    heads = []
    for part in head_slices(layer.dim, layer.num_heads):
        q, k = query[:, part].clamp_min(0) + 1e-6, key[:, part].clamp_min(0) + 1e-6
        share = torch.stack([mixing[:, c] for c, _ in where], 1)  # (block, n)
        block = torch.tensor([c for c, _ in where])
        own = ((q @ k.T) * (block[:, None] == block)).sum(-1)  # similarity with its own block
        rows = []
        for i, (b, place) in enumerate(where):
            similarity = (k * q[i]).sum(-1) * share[b]
            norm = similarity.sum()
            if layer.config.normalizer == "official":
                norm = sum(mixing[b, c] * own[j] for j, (c, p) in enumerate(where) if p == place)
            rows.append((similarity[:, None] * value[:, part]).sum(0) / (norm + 1e-6))
        heads.append(torch.stack(rows))
    out = torch.cat(heads, -1)
    if layer.conv is not None:
        conv = layer.conv.branches[0]
        out = out + depthwise(value.reshape(*grid, -1), conv.weight, conv.bias).flatten(0, 1)
    return linear(layer.proj, out)


def turned(z: Tensor, grid: tuple[int, int]) -> Tensor:
    """Two-axis rotary positions of (n, d_head), pairs as complex numbers."""
    pairs = z.shape[1] // 4
    speeds = [10000 ** -(p / max(pairs - 1, 1)) for p in range(pairs)]
    rows = []
    for i in range(len(z)):
        angles = [(i // grid[1]) * speed for speed in speeds]
        angles += [(i % grid[1]) * speed for speed in speeds]
        unit = torch.polar(
            torch.ones(2 * pairs, dtype=z.dtype), torch.tensor(angles, dtype=z.dtype)
        )
        pair = torch.view_as_complex(z[i, : 4 * pairs].reshape(-1, 2))
        rows.append(torch.cat([torch.view_as_real(pair * unit).flatten(), z[i, 4 * pairs :]]))
    return torch.stack(rows)


def gated(layer: Any, x: Tensor, grid: tuple[int, int], heads: list[Tensor]) -> Tensor:
    """The convolution of the values, the gate and the projection of MALA and RALA."""
    out = torch.cat(heads, -1)
    if layer.conv is not None:
        conv, value = layer.conv.branches[0], linear(layer.qkv, x).chunk(3, -1)[2]
        out = out + depthwise(value.reshape(*grid, -1), conv.weight, conv.bias).flatten(0, 1)
    return linear(layer.proj, out * linear(layer.gate, x))


def mala(layer: Any, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """One image, query by query."""
    query, key, value = linear(layer.qkv, x).chunk(3, -1)
    heads, n, scale = [], len(x), (layer.dim // layer.num_heads) ** -0.5
    for part in head_slices(layer.dim, layer.num_heads):
        q, k, v = positive(query[:, part]), positive(key[:, part]), value[:, part]
        near, far = (turned(q, grid), turned(k, grid)) if layer.config.rope else (q, k)
        rows = []
        for i in range(n):
            z = scale * (q[i] * k.mean(0)).sum()
            similarity = scale * (far * near[i]).sum(-1, keepdim=True)
            weights = similarity / n * (1 + 1 / (z + 1e-6)) - z / n
            rows.append((weights * v).sum(0))
        heads.append(torch.stack(rows))
    return gated(layer, x, grid, heads)


def rala(layer: Any, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """One image, query by query."""
    query, key, value = linear(layer.qkv, x).chunk(3, -1)
    heads, n, scale = [], len(x), (layer.dim // layer.num_heads) ** -0.5
    for part in head_slices(layer.dim, layer.num_heads):
        q, k, v = positive(query[:, part]), positive(key[:, part]), value[:, part]
        seen = (scale * (k * q.mean(0)).sum(-1)).exp()
        k = n * (seen / seen.sum())[:, None] * k
        near, far = (turned(q, grid), turned(k, grid)) if layer.config.rope else (q, k)
        rows = []
        for i in range(n):
            norm = (q[i] * k.mean(0)).sum() + 1e-6
            rows.append(((far * near[i]).sum(-1, keepdim=True) * v).mean(0) / norm)
        heads.append(torch.stack(rows))
    return gated(layer, x, grid, heads)


# Mechanisms with options, and the formula of one image.
CASES: list[tuple[str, dict[str, Any], Callable[..., Tensor]]] = [
    ("linfusion", {}, linfusion),
    ("linfusion", {"middle_dim": 24, "num_heads": 4}, linfusion),
    ("efficient", {}, efficient),
    ("efficient", {"num_heads": 8}, efficient),
    ("fixation", {}, fixation),
    ("fixation", {"share_gate": False, "num_heads": 4}, fixation),
    ("fixation", {"shift": False, "num_heads": 2}, fixation),
    ("mala", {}, mala),
    ("mala", {"rope": False, "num_heads": 4, "conv": "3x3"}, mala),
    ("mala", {"num_heads": 8, "conv": "none"}, mala),
    ("rala", {}, rala),
    ("rala", {"rope": False, "num_heads": 4, "conv": "3x3"}, rala),
    ("rala", {"num_heads": 8, "conv": "none"}, rala),
    ("mhla", {}, mhla),
    ("mhla", {"n_blocks": 9, "num_heads": 4, "mixing": "cosine", "conv": "none"}, mhla),
    ("mhla", {"n_blocks": 1, "conv": "5x5", "num_heads": 2}, mhla),
]
NAMES = sorted({name for name, _, _ in CASES})
IDS = [f"{name}-{i}" for i, (name, _, _) in enumerate(CASES)]


# On the largest grid, where loops over queries take their time, without other options.
@pytest.mark.parametrize(
    ("name", "options", "formula", "grid"),
    [
        pytest.param(*case, grid, id=f"{name}-{grid[0]}x{grid[1]}")
        for name, case in zip(IDS, CASES, strict=True)
        for grid in (GRIDS[:4] if case[1] else GRIDS)
    ],
)
def test_formula(name, options, formula, grid):
    """Outputs and gradients in float64, of the fast path and of the reference, and in float32."""
    layer = build(name, dim=32, **options)
    if name == "mhla":  # a sum of both signs would come near 0
        layer.mixing.data.abs_()
    for batch in (1, 3) if grid == (1, 7) else (1,):
        x = tokens(grid, batch, dim=32)
        wanted = torch.stack([formula(layer, image, grid) for image in x])
        expected = [wanted, *grads(wanted, x, layer)]
        for one in (layer, reference_of(layer)):
            out = one(x, grid)
            assert_near([out], expected[:1])
            assert_near(grads(out, x, one), expected[1:])
        single, y = copy.deepcopy(layer).float(), x.detach().float().requires_grad_()
        out = single(y, grid)
        assert_near([out.double()], expected[:1], 2e-5)
        found = [gradient.double() for gradient in grads(out, y, single)]
        assert_near(found, expected[1:], 2e-4)


@pytest.mark.parametrize(("name", "options", "_"), CASES, ids=IDS)
def test_rows_of_the_map_times_the_values_are_the_output(name, options, _):
    layer = build(name, dim=32, **options)
    for grid in GRIDS[:4]:
        x = tokens(grid, 2, dim=32)
        weights = layer.attention_map(x, grid)
        value = layer.project(x, grid)[2]
        out = weights @ value.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)
        out = out.transpose(1, 2).flatten(2)
        if layer.conv is not None:
            out = out + layer.conv(value, grid)
        assert_near([layer.finish(out, x)], [layer(x, grid)])


@pytest.mark.parametrize(("name", "options", "_"), CASES, ids=IDS)
def test_the_closed_form_is_what_runs(name, options, _):
    layer = build_attention(name, 48, **options)
    for grid in ((1, 1), (1, 7), (7, 13), (32, 32)):
        counted = {part: macs for part, macs in layer.macs_parts(grid).items() if macs}
        assert counted == measure_macs(layer, grid=grid).parts
    assert fvcore_macs(layer, grid=(7, 13)) == layer.macs((7, 13))


@pytest.mark.parametrize("name", NAMES)
def test_memory_grows_with_the_tokens_alone(name):
    from torch.profiler import ProfilerActivity, profile

    layer = build_attention(name, 64)
    peaks = []
    for side in (32, 96):
        x = torch.randn(1, side * side, 64)
        with (
            torch.no_grad(),
            profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled,
        ):
            layer(x, (side, side))
        results: Any = profiled.profiler
        events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
        now = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            now += event.nbytes()
            peak = max(peak, now)
        peaks.append(peak)
    assert math.log(peaks[1] / peaks[0]) / math.log(9) <= 1.02, peaks


def test_linfusion_sees_twice_the_token_where_its_network_is_the_identity() -> None:
    """The official ``projection_mid_dim=-1``: the same as a projection of twice the start."""
    layer = build("linfusion", dim=32)
    x = tokens((3, 5), dim=32)
    layer.query_network = layer.key_network = nn.Identity()
    once = layer(2 * x, (3, 5))
    with torch.no_grad():
        layer.query.weight.mul_(2)
        layer.key.weight.mul_(2)
        layer.value.weight.mul_(2)
    assert_near([layer(x, (3, 5))], [once])


@pytest.mark.parametrize("options", [{}, {"num_heads": 1}])
def test_rows_of_efficient_attention_sum_to_1(options) -> None:
    layer = build("efficient", dim=32, **options)
    weights = layer.attention_map(tokens((7, 13), 2, dim=32), (7, 13))
    assert (weights.sum(-1) - 1).abs().max() < 1e-12 and weights.min() > 0


def test_the_shift_is_zero_beyond_the_straight_borders_and_itself_beyond_the_diagonal() -> None:
    image = torch.arange(1.0, 7).reshape(1, 6, 1).repeat(1, 1, 16)  # 1 2 3 / 4 5 6
    found = shifted(image, (2, 3))[0].reshape(2, 3, 16)
    assert found[0, 0].tolist() == [4, 0, 2, 0, 1, 5, 1, 1, *[1] * 8]
    assert found[1, 2].tolist() == [0, 3, 0, 5, 2, 6, 6, 6, *[6] * 8]
    assert found[0, 1].tolist() == [5, 0, 3, 1, 2, 6, 2, 4, *[2] * 8]


def test_a_narrow_token_is_not_shifted() -> None:
    image = torch.randn(1, 6, 15)
    assert torch.equal(shifted(image, (2, 3)), image)


def test_open_gates_leave_linear_attention() -> None:
    layer = build("fixation", dim=32, shift=False, num_heads=4, eps=1e-15)
    x = tokens((5, 7), dim=32)
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.bias.fill_(50)
    query, key, value = (
        z.unflatten(-1, (4, 8)).transpose(1, 2) for z in layer.qkv(x).chunk(3, -1)
    )
    weights = (query.relu() + 8**-0.5) @ (key.relu() + 8**-0.5).mT
    out = (weights / weights.sum(-1, keepdim=True)) @ value
    assert_near([layer(x, (5, 7))], [layer.proj(out.transpose(1, 2).flatten(2))])


@pytest.mark.parametrize("grid", [(8, 8), (16, 24)], ids=str)
def test_the_official_normalizer_of_mhla(grid) -> None:
    layer = build("mhla", dim=16, normalizer="official")
    layer.mixing.data.abs_()
    x = tokens(grid, dim=16)
    wanted = mhla(layer, x[0], grid)[None]
    expected = [wanted, *grads(wanted, x, layer)]
    for one in (layer, reference_of(layer)):
        out = one(x, grid)
        assert_near([out], expected[:1])
        assert_near(grads(out, x, one), expected[1:])
    for wide in (grid, (32, 32)):
        assert layer.macs_parts(wide) == measure_macs(layer, grid=wide).parts


def test_rows_of_mhla_sum_to_1_and_those_of_its_official_code_do_not() -> None:
    torch.manual_seed(0)
    exact = build_attention("mhla", 64, num_heads=1).double()
    official = build_attention("mhla", 64, num_heads=1, normalizer="official").double()
    official.load_state_dict(exact.state_dict())
    for grid in ((16, 16), (7, 13), (3, 5)):
        assert (exact.attention_map(tokens(grid), grid).sum(-1) - 1).abs().max() < 1e-6
    sums = official.attention_map(tokens((16, 16)), (16, 16)).sum(-1)
    assert sums.min() < 0.8 and sums.max() > 1.2


def test_the_start_of_mixing_falls_with_the_distance_of_blocks() -> None:
    far = math.hypot(3, 3)
    starts: dict[Any, Callable[[float], float]] = {
        "linear": lambda z: 1 - z / far,
        "cosine": lambda z: math.cos(math.pi / 4 * z / far),
        "exponential": lambda z: math.exp(-z / 3),
        "local": lambda z: float(z <= 1.5),
    }
    for kind, at in starts.items():
        start = start_of_mixing(4, kind)
        assert (start.sum(0) - 1).abs().max() < 1e-6
        for block, distance in ((0, 0), (5, math.sqrt(2)), (6, math.hypot(1, 2)), (15, far)):
            assert float(start[block, 0] / start[0, 0]) == pytest.approx(at(distance), abs=1e-6)


def test_one_block_is_linear_attention() -> None:
    layer = build("mhla", dim=32, n_blocks=1, conv="none", eps=1e-8)
    with torch.no_grad():
        layer.mixing.fill_(1)
    state = layer.state_dict()
    del state["mixing"]
    lit = build_attention("lit", 32, num_heads=1, conv="none").double()
    lit.load_state_dict(state)
    x = tokens((7, 13), dim=32)
    assert_near([layer(x, (7, 13))], [lit(x, (7, 13))], 1e-4)  # the offset of ReLU is left


def test_errors_of_mhla_name_the_remedy() -> None:
    with pytest.raises(InvalidValue, match="n_blocks=10 must be a square number; choose 9 or 16"):
        build_attention("mhla", 48, n_blocks=10)
    with pytest.raises(InvalidValue, match="set stream=None or normalizer='exact'"):
        build_attention("mhla", 48, normalizer="official", stream=64)
    with pytest.raises(
        InvalidValue, match="sides that 4 divides, got 8x6; set normalizer='exact'"
    ):
        build_attention("mhla", 48, normalizer="official")(torch.zeros(1, 48, 48), (8, 6))
    for options, unserved in (
        ({"normalizer": "official"}, "normalizer='official'"),
        ({"num_heads": 1}, "heads of width 192"),
        ({"n_blocks": 81}, "81 blocks"),
    ):
        with pytest.raises(InvalidValue, match=f"impl='triton' does not serve {unserved}; set"):
            build_attention("mhla", 192, impl="triton", **options)


@pytest.mark.parametrize("name", ["mala", "rala"])
def test_rows_sum_to_1_without_rotary_positions(name) -> None:
    for num_heads in (1, 8):
        layer = build(name, dim=32, rope=False, num_heads=num_heads, eps=1e-15)
        weights = layer.attention_map(tokens((7, 13), 2, dim=32), (7, 13))
        assert (weights.sum(-1) - 1).abs().max() < 1e-12


def test_weights_of_mala_grow_negative_with_the_scale_and_those_of_rala_never() -> None:
    shares = {}
    for name in ("mala", "rala"):
        torch.manual_seed(0)
        layer = build_attention(name, 64, rope=False)
        x = tokens((16, 16)).float()
        maps = (layer.attention_map(scale * x, (16, 16)) for scale in (1, 1.5, 4))
        shares[name] = [(weights < 0).double().mean().item() for weights in maps]
    assert shares["rala"] == [0, 0, 0]
    first, second, last = shares["mala"]
    assert 0.05 < first < 0.15 < second < 0.25 and 0.4 < last < 0.5  # a fifth, in the sources


def test_a_longer_query_makes_rows_of_mala_steeper() -> None:
    layer = build("mala", dim=32, rope=False, num_heads=1, eps=1e-15)
    query, key = (positive(z[:, None]) for z in tokens((16, 16), 2, dim=32).chunk(2))

    def spread(length: float) -> float:
        one, other = Features([query * length], [query * length]), Features([key], [key])
        weights = layer.weights(one, other, (16, 16))
        assert (weights.sum(-1) - 1).abs().max() < 1e-12
        return weights.std(-1).mean().item()

    assert spread(4.0) > 2 * spread(1.0)
    assert spread(4.0) < 4 * spread(1.0)


def test_a_query_that_is_similar_to_no_key_is_finite() -> None:
    for name in ("mala", "rala"):
        layer = build_attention(name, 32)
        with torch.no_grad():
            layer.qkv.bias.fill_(-500.0)
        x = tokens((4, 4), dim=32).detach().float().requires_grad_()
        out = layer(x, (4, 4))
        assert all(z.isfinite().all() for z in (out, *grads(out, x, layer)))


def test_a_rotated_product_depends_on_the_distance_alone() -> None:
    grid = (5, 7)
    one, other = (torch.randn(8, dtype=torch.float64) for _ in range(2))
    query, key = (rotated(z.expand(1, 1, 35, 8), grid)[0, 0] for z in (one, other))
    products = (query @ key.T).reshape(*grid, *grid)
    for down, right in ((0, 0), (1, 0), (0, 1), (2, 3)):
        found = [
            products[r, c, r + down, c + right] for r in range(5 - down) for c in range(7 - right)
        ]
        assert max(found) - min(found) < 1e-12
    assert abs(products[0, 0, 1, 0] - products[0, 0, 0, 1]) > 1e-3
    assert products[0, 0, 0, 0] == one @ other


def test_a_part_of_a_grid_is_rotated_as_the_whole() -> None:
    z = torch.randn(2, 3, 35, 10)  # two channels more than pairs of two axes
    whole = rotated(z, (5, 7))
    torch.testing.assert_close(rotated(z[:, :, 14:28], (5, 7), slice(14, 28)), whole[:, :, 14:28])
    assert torch.equal(whole[..., 8:], z[..., 8:]) and torch.equal(whole[:, :, 0], z[:, :, 0])
    narrow = torch.randn(1, 1, 35, 3)
    assert torch.equal(rotated(narrow, (5, 7)), narrow)
    odd = torch.randn(2, 3, 35, 11)[..., 1:]  # no pair lies where a complex number may
    torch.testing.assert_close(rotated(odd, (5, 7)), rotated(odd.clone(), (5, 7)))


def test_a_recording_reads_the_angles_made_before_and_keeps_none_of_its_own(monkeypatch) -> None:
    monkeypatch.setattr(rotary, "_TURNS", {})
    sizes = 5, 2, torch.device("cpu"), torch.float32
    made = rotary.turns(*sizes)
    monkeypatch.setattr(rotary, "is_passing", lambda _: True)
    assert rotary.turns(*sizes) is made
    assert rotary.turns(6, *sizes[1:]) is not rotary.turns(6, *sizes[1:])
    with FakeTensorMode():  # a tracer's tensors are no numbers, and it takes none of others
        assert rotary.turns(*sizes) is not made
    assert list(rotary._TURNS.values()) == [made]


def test_wide_heads_of_mala_and_rala_are_not_for_the_kernels() -> None:
    for name in ("mala", "rala"):
        layer = build(name, dim=160, num_heads=2)
        assert layer.unserved_option() == "heads of width 80"
        assert build(name, dim=128, num_heads=2).unserved_option() is None

        class Own(type(layer)):
            """What is derived may have another step."""

            def finish(self, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
                return -super().finish(out, x)

        own = Own(attnzoo.AttentionContext(dim=32), type(layer).Config())
        assert "Own" in own._unserved()
