"""Agent attention: reference, formula, agents that change from call to call, biases and cost."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import attnzoo.mechanisms.agent as agent
from attnzoo import build_attention
from attnzoo.testing import CHECKS, GRIDS, build_scrambled, deviations, tokens

OPTIONS = [{}, {"n_agents": 9, "num_heads": 4}, {"n_agents": 1, "conv": False, "num_heads": 4}]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check):
    check("agent", n_agents=16, num_heads=4)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_reference(options, batch):
    layer = build_scrambled("agent", **options)
    for grid in GRIDS:
        found = deviations(layer, tokens(grid, batch), grid)
        assert found["output"] <= found["allowed output"], (grid, found)
        assert found["gradients"] <= found["allowed gradients"], (grid, found)


@pytest.mark.parametrize(
    ("grid", "n_agents"), [((1, 1), 1), ((1, 7), 1), ((8, 8), 49), ((7, 13), 16)]
)
@pytest.mark.parametrize("batch", [1, 3])
def test_reference_with_learned_biases(grid, n_agents, batch):
    options = {"n_agents": n_agents, "bias": "learned", "bias_grid": grid, "num_heads": 4}
    layer = build_scrambled("agent", **options)
    found = deviations(layer, tokens(grid, batch), grid)
    assert found["output"] <= found["allowed output"], found
    assert found["gradients"] <= found["allowed gradients"], found


def interpolate(maps: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(..., 7, 7) -> (..., height, width), bilinear between the centres of the cells."""

    def weights(size: int) -> torch.Tensor:
        matrix = torch.zeros(size, 7, dtype=maps.dtype)
        for i in range(size):
            position = max((i + 0.5) * 7 / size - 0.5, 0.0)
            low = min(int(position), 6)
            matrix[i, low] += 1 - (position - low)
            matrix[i, min(low + 1, 6)] += position - low
        return matrix

    return weights(height) @ maps @ weights(width).T


@pytest.mark.parametrize(
    ("grid", "n_agents", "bias"),
    [
        ((2, 3), 4, "none"),
        ((3, 2), 64, "none"),
        ((5, 7), 9, "none"),
        ((4, 5), 9, "learned"),
        ((9, 8), 4, "learned"),
    ],
)
def test_formula_agent_by_agent(grid, n_agents, bias):
    """Loops over agents, cells and queries, straight from the paper's sums."""
    dim, heads, (height, width) = 8, 2, grid
    n, d = height * width, dim // heads
    options = {"bias": bias, "bias_grid": grid if bias == "learned" else None}
    layer = build_scrambled("agent", dim, num_heads=heads, n_agents=n_agents, **options).double()
    layer.requires_grad_(False)
    x = tokens(grid, 1, dim).double()
    q, k, v = layer.qkv(x)[0].split(dim, -1)
    side = math.isqrt(n_agents)
    rows, columns = min(side, height), min(side, width)
    cells = []  # of each agent: the tokens of its cell
    for a in range(rows):
        for b in range(columns):
            ys = range(a * height // rows, -(-(a + 1) * height // rows))
            xs = range(b * width // columns, -(-(b + 1) * width // columns))
            cells.append([y * width + x for y in ys for x in xs])
    agents = torch.stack([q[cell].mean(0) for cell in cells])
    m = len(cells)
    out = torch.zeros(n, dim, dtype=torch.float64)
    for head in range(heads):
        part = slice(d * head, d * (head + 1))
        b1 = b2 = torch.zeros(m, n, dtype=torch.float64)
        if bias == "learned":
            b1, b2 = (
                (
                    interpolate(getattr(layer, f"{stage}_map")[head], height, width)
                    + getattr(layer, f"{stage}_row")[head]
                    + getattr(layer, f"{stage}_column")[head]
                ).reshape(m, n)
                for stage in ("gather", "hand_out")
            )
        gathered = []
        for a in range(m):
            e = [math.exp(agents[a, part] @ k[j, part] / d**0.5 + b1[a, j]) for j in range(n)]
            gathered.append(sum(e[j] / sum(e) * v[j, part] for j in range(n)))
        for i in range(n):
            e = [math.exp(q[i, part] @ agents[a, part] / d**0.5 + b2[a, i]) for a in range(m)]
            out[i, part] = sum(e[a] / sum(e) * gathered[a] for a in range(m))
    kernel, offset = layer.conv.branches[0].weight[:, 0], layer.conv.branches[0].bias
    for y in range(height):
        for z in range(width):
            out[y * width + z] += offset
            for dy in (-1, 0, 1):
                for dz in (-1, 0, 1):
                    if 0 <= y + dy < height and 0 <= z + dz < width:
                        neighbor = v[(y + dy) * width + z + dz]
                        out[y * width + z] += kernel[:, dy + 1, dz + 1] * neighbor
    expected = out @ layer.proj.weight.T + layer.proj.bias
    for impl in ("auto", "reference"):
        reference = build_attention("agent", dim, heads, n_agents=n_agents, impl=impl, **options)
        reference.double().load_state_dict(layer.state_dict())
        torch.testing.assert_close(reference(x, grid)[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_one_agent_per_token_is_two_softmax_attentions(grid):
    """With as many agents as tokens A = Q: O = softmax(Q Q^T s) softmax(Q K^T s) V."""
    layer = build_scrambled("agent", num_heads=4, n_agents=25, conv=False).double()
    if grid == (4, 4):
        layer.set_agents(16)
    x = tokens(grid).double()
    q, k, v = layer.qkv(x).view(2, -1, 3, 4, 12).permute(2, 0, 3, 1, 4)
    maps = [(a @ b.transpose(-1, -2) / 12**0.5).softmax(-1) for a, b in ((q, q), (q, k))]
    expected = layer.proj((maps[0] @ maps[1] @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, grid), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.attention_map(x, grid), maps[0] @ maps[1])


def test_one_agent_gives_every_query_the_same():
    layer = build_scrambled("agent", num_heads=4, n_agents=1, conv=False)
    out = layer(tokens((7, 13)), (7, 13))
    torch.testing.assert_close(out, out[:, :1].expand_as(out), rtol=0, atol=1e-6)


def test_attention_map_has_rows_that_sum_to_1_and_at_most_m_ranks():
    layer = build_scrambled("agent", num_heads=4, n_agents=9).double()
    weights = layer.attention_map(tokens((7, 13)).double(), (7, 13))
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert (torch.linalg.matrix_rank(weights, atol=1e-12) <= 9).all()


class TestNumberOfAgents:
    def test_set_agents_equals_a_layer_built_that_way(self):
        layer = build_scrambled("agent", num_heads=4, n_agents=64)
        small = build_attention("agent", 48, 4, n_agents=4)
        small.load_state_dict(layer.state_dict())
        x, grid = tokens((8, 8)), (8, 8)
        before = layer(x, grid)
        layer.set_agents(4)
        assert torch.equal(layer(x, grid), small(x, grid))
        assert layer.macs(grid) == small.macs(grid)
        assert not torch.allclose(layer(x, grid), before, atol=1e-3)
        layer.set_agents(64)
        assert torch.equal(layer(x, grid), before)

    def test_context_manager_covers_a_model_and_restores(self):
        layers = [build_attention("agent", 48, n_agents=n) for n in (64, 16)]
        model = torch.nn.Sequential(layers[0], torch.nn.ModuleList(layers[1:]))
        with agent.agents(model, 4):
            assert [layer.n_agents for layer in layers] == [4, 4]
            with agent.agents(model, 1):
                assert [layer.n_agents for layer in layers] == [1, 1]
            assert [layer.n_agents for layer in layers] == [4, 4]
        assert [layer.n_agents for layer in layers] == [64, 16]
        with pytest.raises(KeyError), agent.agents(model, 4):
            raise KeyError
        assert [layer.n_agents for layer in layers] == [64, 16]

    def test_context_manager_changes_nothing_if_a_layer_refuses(self):
        fixed = build_attention("agent", 48, n_agents=16, bias="learned", bias_grid=(4, 4))
        model = torch.nn.ModuleList([build_attention("agent", 48), fixed])
        with pytest.raises(ValueError, match="fixes n_agents=16"), agent.agents(model, 4):
            raise AssertionError("must not run")
        assert [layer.n_agents for layer in model] == [64, 16]

    def test_model_without_agents(self):
        with pytest.raises(ValueError, match="attn='agent'"), agent.agents(torch.nn.ReLU(), 4):
            raise AssertionError("must not run")


@pytest.mark.parametrize("grid", [(8, 8), (7, 13), (2, 16)])
@pytest.mark.parametrize("conv", [True, False])
def test_macs(grid, conv):
    """Counted on the meta device: on a CPU the counter overlooks fused attention."""
    layer = build_attention("agent", 48, 4, n_agents=16, conv=conv).to("meta")
    with FlopCounterMode(display=False) as counter:
        layer(torch.empty(1, grid[0] * grid[1], 48, device="meta"), grid)
    assert counter.get_total_flops() == 2 * layer.macs(grid)


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"n_agents": 50}, ["n_agents=50", "49", "64"]),
        ({"n_agents": 0}, ["n_agents=0", "1"]),
        ({"bias": "learned"}, ["n_agents=64", "8x8", "bias_grid=(height, width)"]),
        ({"bias": "learned", "bias_grid": (4, 16)}, ["8x8", "(4, 16)"]),
        ({"bias_grid": (8, 8)}, ["bias_grid=(8, 8)", "bias='learned'"]),
        ({"bias": "learned", "bias_grid": (8, 8), "impl": "flash"}, ["'flash'", "impl='torch'"]),
        ({"bias": "learnt"}, ["'learnt'", "'learned'"]),
    ],
)
def test_errors_name_value_and_remedy(options, fragments):
    with pytest.raises(ValueError) as caught:
        build_attention("agent", 48, **options)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_learned_biases_refuse_another_grid_or_number():
    layer = build_attention("agent", 48, n_agents=16, bias="learned", bias_grid=[8, 8])
    with pytest.raises(ValueError, match=r"bias_grid=\(8, 8\), got a grid of \(4, 16\)"):
        layer(tokens((4, 16)), (4, 16))
    with pytest.raises(ValueError, match="bias='none' to change"):
        layer.set_agents(4)


@pytest.mark.parametrize("bias", ["none", "learned"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_finite_under_autocast(dtype, bias):
    grid = (32, 32)
    layer = build_scrambled("agent", bias=bias, bias_grid=grid if bias == "learned" else None)
    x = (8 * tokens(grid, 1)).requires_grad_()
    with torch.autocast("cpu", dtype):
        out = layer(x, grid)
    out.float().square().mean().backward()
    assert out.isfinite().all() and x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
