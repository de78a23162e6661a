"""State-space mechanisms: scans, zigzag paths and layers against loops over tokens."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo import InvalidType, InvalidValue, build_attention
from attnzoo.layers.state_space import rms_norm
from attnzoo.mechanisms.zigma import zigzag
from attnzoo.ops.selective_scan import mamba, selective_scan
from attnzoo.ops.selective_scan import torch as chunked
from attnzoo.ops.ssd_scan import fla, ssd_scan
from attnzoo.testing import CHECKS, build_scrambled, tokens

GRIDS = ((1, 1), (1, 7), (8, 8), (7, 13), (16, 24))
NAMES = ("zigma", "dis", "diffussm")


def loop_selective(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    h, y = torch.zeros(x.shape[0], *a.shape, dtype=x.dtype), []
    for t in range(x.shape[1]):
        h = torch.exp(torch.einsum("bd,ds->bds", dt[:, t], a)) * h
        h = h + torch.einsum("bd,bs->bds", dt[:, t] * x[:, t], b[:, t])
        y.append(torch.einsum("bds,bs->bd", h, c[:, t]))
    return torch.stack(y, 1)


def loop_ssd(x: Tensor, gate: Tensor, b: Tensor, c: Tensor) -> Tensor:
    h, y = 0, []
    for t in range(x.shape[1]):
        h = torch.exp(gate[:, t])[..., None, None] * h
        h = h + torch.einsum("bs,bhd->bhsd", b[:, t], x[:, t])
        y.append(torch.einsum("bs,bhsd->bhd", c[:, t], h))
    return torch.stack(y, 1)


def selective_operands(n: int, batch: int = 1, strength: float = 1.0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(n)
    x, dt = torch.randn(2, batch, n, 6, generator=draw)
    b, c = torch.randn(2, batch, n, 5, generator=draw)
    a = -torch.arange(1.0, 6).repeat(6, 1) * torch.rand(6, 5, generator=draw)
    return [x, F.softplus(dt - 2), a * strength, b, c]


def ssd_operands(n: int, batch: int = 1, strength: float = 1.0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(n)
    x = torch.randn(batch, n, 3, 4, generator=draw)
    b, c = torch.randn(2, batch, n, 5, generator=draw)
    return [x, -strength * torch.rand(batch, n, 3, generator=draw), b, c]


SCANS = {
    "selective": (selective_scan, loop_selective, selective_operands),
    "ssd": (ssd_scan, loop_ssd, ssd_operands),
}


def with_gradients(function, operands, weight=None, **options) -> list[Tensor]:
    leaves = [z.clone().requires_grad_() for z in operands]
    out = function(*leaves, **options)
    if weight is None:
        draw = torch.Generator().manual_seed(9)
        weight = torch.randn(out.shape, generator=draw, dtype=torch.float64)
    (out * weight).sum().backward()
    return [out.detach(), *(z.grad for z in leaves)]


def largest_error(found: list[Tensor], exact: list[Tensor]) -> float:
    assert all(z.isfinite().all() for z in found)
    scales = [max(1.0, z.abs().max().item()) for z in exact]
    errors = ((f.double() - e).abs().max().item() for f, e in zip(found, exact, strict=True))
    return max(error / scale for error, scale in zip(errors, scales, strict=True))


class TestScans:
    @pytest.mark.parametrize("impl", ["torch", "reference"])
    @pytest.mark.parametrize("kind", SCANS)
    @pytest.mark.parametrize("grid", GRIDS, ids=str)
    def test_equal_a_loop_over_tokens(self, grid, kind, impl):
        scan, loop, make = SCANS[kind]
        for batch in (1, 3):
            operands = make(grid[0] * grid[1], batch)
            exact = with_gradients(loop, [z.double() for z in operands])
            wide = with_gradients(scan, [z.double() for z in operands], impl=impl)
            assert largest_error(wide, exact) < 1e-12
            assert largest_error(with_gradients(scan, operands, impl=impl), exact) < 1e-5

    @pytest.mark.parametrize("kind", SCANS)
    @pytest.mark.parametrize("strength", [1e-6, 30.0, 1e4, 1e30])
    def test_any_decay_on_long_sequences(self, strength, kind):
        scan, loop, make = SCANS[kind]
        operands = make(1000, 1, strength)
        exact = with_gradients(loop, [z.double() for z in operands])
        for impl in ("torch", "reference"):
            assert largest_error(with_gradients(scan, operands, impl=impl), exact) < 2e-5

    def test_weak_decays_after_a_strong_one_keep_their_sum(self):
        """Of which a difference of running sums has only the leading digits of the strong one."""
        x, gate, b, c = ssd_operands(64)
        gate = gate * 0.01
        gate[:, 5] = -1e5
        exact = loop_ssd(*(z.double() for z in (x, gate, b, c)))

        def by_difference(x, gate, b, c):
            total = gate.cumsum(1)
            is_later = torch.ones(64, 64).triu(1).bool()[..., None]
            pairs = total[:, :, None] - total[:, None]
            pairs = pairs.masked_fill(is_later, -torch.inf).exp()
            return torch.einsum("bij,bijh,bjhd->bihd", c @ b.mT, pairs, x)

        assert largest_error([by_difference(x, gate, b, c)], [exact]) > 1e-3
        assert largest_error([ssd_scan(x, gate, b, c, impl="torch")], [exact]) < 1e-5

    def test_a_mask_after_the_exponential_would_give_nan(self):
        """The trap that the form avoids: infinity above the diagonal times 0 in the backward."""
        operands = ssd_operands(64, strength=100.0)

        def mask_after(x, gate, b, c):
            total = gate.cumsum(1)
            pairs = (total[:, :, None] - total[:, None]).exp()
            pairs = torch.where(torch.ones(64, 64).tril()[..., None] > 0, pairs, 0)
            return torch.einsum("bij,bijh,bjhd->bihd", c @ b.mT, pairs, x)

        assert with_gradients(mask_after, operands)[2].isnan().any()
        exact = with_gradients(loop_ssd, [z.double() for z in operands])
        assert largest_error(with_gradients(ssd_scan, operands, impl="torch"), exact) < 1e-5

    def test_factored_decays_would_overflow(self):
        """exp(L_t) times the sum of exp(-L_j) b_j x_j: the second is infinite soon."""
        operands = selective_operands(500, strength=10.0)

        def factored(x, dt, a, b, c):
            logs = (dt.unsqueeze(-1) * a).cumsum(1)
            taken = (dt * x).unsqueeze(-1) * b.unsqueeze(-2)
            return ((logs.exp() * ((-logs).exp() * taken).cumsum(1)) @ c.unsqueeze(-1)).squeeze(-1)

        assert not factored(*operands).isfinite().all()
        exact = with_gradients(loop_selective, [z.double() for z in operands])
        assert largest_error(with_gradients(selective_scan, operands, impl="torch"), exact) < 1e-5

    @pytest.mark.parametrize("kind", SCANS)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_states_of_half_precision_are_float32(self, kind, dtype):
        """In half precision, a sum of 4,096 small numbers would stand still on the way."""
        scan, loop, make = SCANS[kind]
        operands = [z.to(dtype) for z in make(4096, 1, 1e-4)]
        out = scan(*operands)
        assert out.dtype == dtype
        exact = loop(*(z.double() for z in operands))
        assert (out.double() - exact).norm() < 5e-3 * exact.norm()

    def test_the_backward_stores_one_state_in_64_tokens(self):
        stored = []
        operands = [z.requires_grad_() for z in selective_operands(640)]
        with torch.autograd.graph.saved_tensors_hooks(stored.append, lambda z: z):
            selective_scan(*operands, impl="torch")
        assert sum(z.numel() for z in stored) == sum(z.numel() for z in operands) + 10 * 6 * 5

    @pytest.mark.parametrize("n", [64, 65, 300, 640])
    def test_chunks_side_by_side_change_nothing(self, n):
        """As an accelerator computes them."""
        x, dt, a, b, c = operands = [z.double() for z in selective_operands(n, 2)]
        weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(9)).double()
        exact = with_gradients(loop_selective, operands, weight=weight)
        for chunks in (2, 4, 100):
            y, _, starts = chunked._run(x, dt, a.T, b, c, None, chunks)
            grads = chunked._differentiate(weight, x, dt, a.T, b, c, starts, chunks)
            found = [y, *grads[:2], grads[2].T, *grads[3:]]
            assert largest_error(found, exact) < 1e-12

    @pytest.mark.parametrize("kind", SCANS)
    def test_autocast_lowers_nothing(self, kind):
        scan, _, make = SCANS[kind]
        operands = make(100)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(scan(*operands), scan(*operands))
            lowered = scan(*operands)
        assert torch.equal(lowered, scan(*operands))


class OnGpu(torch.Tensor):
    is_cuda = True  # type: ignore[assignment]


class TestLibraries:
    """What the libraries are given, with a loop in place of their kernels."""

    def test_mamba(self, monkeypatch):
        def kernel(x, dt, a, b, c):  # (batch, d, n) and (batch, s, n)
            return loop_selective(*(z.mT for z in (x, dt)), a, *(z.mT for z in (b, c))).mT

        monkeypatch.setattr(mamba, "load", lambda *_: kernel)
        operands = selective_operands(9, 2)
        found = selective_scan(*(z.as_subclass(OnGpu) for z in operands), impl="mamba")
        torch.testing.assert_close(found.as_subclass(Tensor), loop_selective(*operands))

    def test_fla(self, monkeypatch):
        def kernel(query, key, value, gate, scale):  # (batch, n, heads, ...)
            assert scale == 1.0 and query.shape[2] == key.shape[2] == gate.shape[2] == 3
            return loop_ssd(value, gate, key[:, :, 0], query[:, :, 1]), None

        monkeypatch.setattr(fla, "load", lambda *_: kernel)
        operands = ssd_operands(9, 2)
        found = ssd_scan(*(z.as_subclass(OnGpu) for z in operands), impl="fla")
        torch.testing.assert_close(found.as_subclass(Tensor), loop_ssd(*operands))

    @pytest.mark.parametrize(("kind", "impl"), [("selective", "mamba"), ("ssd", "fla")])
    def test_a_kernel_that_fails_is_one_line(self, kind, impl, monkeypatch):
        def broken(*_, **__):
            raise AttributeError("no such thing\nand more")

        scan, _, make = SCANS[kind]
        monkeypatch.setattr(mamba if impl == "mamba" else fla, "load", lambda *_: broken)
        operands = make(4)
        with pytest.raises(InvalidValue, match=f"impl='{impl}' runs on a GPU, not on 'cpu'"):
            scan(*operands, impl=impl)
        said = f"impl='{impl}' cannot run: AttributeError: no such thing;"
        with pytest.raises(InvalidValue, match=said):
            scan(*(z.as_subclass(OnGpu) for z in operands), impl=impl)

    def test_a_missing_library_is_named_with_its_remedy(self):
        x = tokens((2, 2), dim=32)
        for name, options, said in (
            ("dis", {"impl": "mamba"}, "pip install mamba-ssm"),
            ("zigma", {"impl": "fla", "state": "ssd"}, r"attnzoo\[fla\]"),
        ):
            with pytest.raises(InvalidValue, match=said) as caught:
                build_attention(name, 32, **options)(x, (2, 2))
            assert isinstance(caught.value, RuntimeError)


# Start (row, column), and the step along a line and from line to line.
PATHS = {
    0: ("top left", (0, 1), (1, 0)),
    1: ("top left", (1, 0), (0, 1)),
    2: ("top right", (0, -1), (1, 0)),
    3: ("top right", (1, 0), (0, -1)),
    4: ("bottom left", (0, 1), (-1, 0)),
    5: ("bottom left", (-1, 0), (0, 1)),
    6: ("bottom right", (0, -1), (-1, 0)),
    7: ("bottom right", (-1, 0), (0, -1)),
}


def walk(path: int, height: int, width: int) -> list[int]:
    """A path, walked step by step: along a line until its end, to the next line, and back."""
    corner, along, across = PATHS[path]
    row = height - 1 if corner.startswith("bottom") else 0
    column = width - 1 if corner.endswith("right") else 0
    places = [(row, column)]
    while len(places) < height * width:
        step = row + along[0], column + along[1]
        if not (0 <= step[0] < height and 0 <= step[1] < width):
            step = row + across[0], column + across[1]
            along = -along[0], -along[1]
        row, column = step
        places.append(step)
    return [row * width + column for row, column in places]


class TestZigzag:
    SIDES = tuple((h, w) for h in range(1, 8) for w in range(1, 14))

    @pytest.mark.parametrize("path", PATHS)
    def test_is_the_path_of_the_table(self, path):
        for height, width in self.SIDES:
            assert zigzag((height, width), path).tolist() == walk(path, height, width)

    def test_of_a_square_is_as_published(self):
        """Row and column of token i N + j: the corner and its signs, j running back in odd i."""
        corners = ((0, 0, 1, 1), (0, 3, 1, -1), (3, 0, -1, 1), (3, 3, -1, -1))
        for path in range(8):
            row, column, down, right = corners[path // 2]
            expected = []
            for i in range(4):
                for j in range(4) if i % 2 == 0 else range(3, -1, -1):
                    y, x = (j, i) if path % 2 else (i, j)
                    expected.append((row + down * y) * 4 + column + right * x)
            assert zigzag((4, 4), path).tolist() == expected

    @pytest.mark.parametrize("path", PATHS)
    def test_takes_every_token_once_in_steps_to_neighbors(self, path):
        for height, width in self.SIDES:
            order = zigzag((height, width), path)
            assert order.sort().values.tolist() == list(range(height * width))
            rows, columns = order // width, order % width
            steps = rows.diff().abs() + columns.diff().abs()
            assert (steps == 1).all(), (height, width)
            assert torch.equal(order[order.argsort()], torch.arange(height * width))

    def test_learns_after_an_inference_mode(self):
        layer, x = build_attention("zigma", 16, layer_index=3, depth=8), tokens((3, 17), 1, 16)
        with torch.inference_mode():
            expected = layer(x, (3, 17))
        out = layer(x.requires_grad_(), (3, 17))
        assert torch.allclose(out, expected.clone(), atol=1e-6)
        out.sum().backward()
        assert x.grad.isfinite().all()

    @pytest.mark.parametrize("options", [{}, {"state": "ssd"}])
    @pytest.mark.parametrize("layer_index", range(10))
    def test_layers_take_the_paths_in_turn(self, layer_index, options):
        """A token is seen by those after it on its layer's path, and by no other."""
        torch.manual_seed(0)
        for paths in (8, 3):
            layer = build_attention(
                "zigma", 16, layer_index=layer_index, depth=10, paths=paths, **options
            )
            order = walk(layer_index % paths, 3, 4)
            x = tokens((3, 4), 1, 16)
            changed = x.clone()
            changed[0, order[5]] += 1
            difference = (layer(x, (3, 4)) - layer(changed, (3, 4))).abs().amax(-1)[0]
            assert [place for place in order if difference[place] > 0] == order[5:]


def mamba_scan(scan, x: Tensor) -> Tensor:
    """One direction of Mamba, token by token, from its equations."""
    if scan.conv is not None:
        conv = scan.conv.conv
        x = torch.stack([
            sum(conv.weight[:, 0, 3 - back] * x[:, t - back] for back in range(4) if back <= t)
            + conv.bias for t in range(x.shape[1])
        ], 1)  # fmt: skip
        x = x * x.sigmoid()
    rank = scan.step_proj.in_features
    step, b, c = (x @ scan.input_proj.weight.T).split([rank, 16, 16], -1)
    dt = (1 + (step @ scan.step_proj.weight.T + scan.step_proj.bias).exp()).log()
    return loop_selective(x, dt, -scan.log_rates.exp(), b, c) + scan.skip * x


def mamba_layer(layer, x: Tensor) -> Tensor:
    x, z = (x @ layer.in_proj.weight.T).chunk(2, -1)
    gate = z * z.sigmoid()
    y = mamba_scan(layer.scans[0], x) * gate
    if len(layer.scans) == 2:
        y = y + (mamba_scan(layer.scans[1], x.flip(1)) * gate.flip(1)).flip(1)
    return y @ layer.out_proj.weight.T


def mamba2_layer(layer, x: Tensor) -> Tensor:
    width, heads = layer.width, layer.num_heads
    z, u, step = (x @ layer.in_proj.weight.T).split([width, width + 256, heads], -1)
    weight, bias = layer.conv.conv.weight[:, 0], layer.conv.conv.bias
    u = torch.stack([
        sum(weight[:, 3 - back] * u[:, t - back] for back in range(4) if back <= t) + bias
        for t in range(u.shape[1])
    ], 1)  # fmt: skip
    u, b, c = (u * u.sigmoid()).split([width, 128, 128], -1)
    u = u.unflatten(-1, (heads, -1))
    dt = (1 + (step + layer.step_bias).exp()).log()
    y = loop_ssd(u * dt[..., None], -dt * layer.log_rates.exp(), b, c)
    y = (y + layer.skip * u).flatten(2) * z * z.sigmoid()
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.norm_weight
    return y @ layer.out_proj.weight.T


def zigma_layer(layer, x: Tensor, grid) -> Tensor:
    order = walk(layer.path, *grid)
    mixed = (mamba_layer if hasattr(layer.layer, "scans") else mamba2_layer)(
        layer.layer, x[:, order]
    )
    out = torch.empty_like(x)
    out[:, order] = mixed
    return out


def diffussm_layer(layer, x: Tensor, grid) -> Tensor:
    size, n = layer.config.reduction, x.shape[1]
    groups = [range(start, min(n, start + size)) for start in range(0, n, size)]

    def hourglass(dense, x):
        rows = []
        for group in groups:
            mean = sum(x[:, t] for t in group) / len(group)
            for t in group:
                rest = x[:, t] - mean
                rest = sum(rest.chunk(x.shape[-1] // layer.dim, -1))
                rows.append(dense(mean) + (rest if size > 1 else 0))
        return torch.stack(rows, 1)

    forth, back = layer.scans
    u = F.silu(hourglass(layer.before, x))
    y = torch.cat([mamba_scan(forth, u), mamba_scan(back, u.flip(1)).flip(1)], -1)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.norm_weight
    gated = F.silu(hourglass(layer.after, y)) * F.silu(hourglass(layer.gate, x))
    return hourglass(layer.proj, gated)


LAYERS = {
    "zigma": ("zigma", {}, zigma_layer),
    "zigma ssd": ("zigma", {"state": "ssd", "num_heads": 4}, zigma_layer),
    "dis": ("dis", {}, lambda layer, x, _: mamba_layer(layer.layer, x)),
    "diffussm": ("diffussm", {}, diffussm_layer),
    "diffussm of 5": ("diffussm", {"reduction": 5}, diffussm_layer),
    "diffussm of 1": ("diffussm", {"reduction": 1}, diffussm_layer),
}


class TestLayers:
    @pytest.mark.parametrize("case", LAYERS)
    @pytest.mark.parametrize("grid", [(1, 1), (1, 7), (7, 13)], ids=str)
    def test_equal_the_equations(self, grid, case):
        name, options, oracle = LAYERS[case]
        layer = build_scrambled(name, 32, **options).double()
        x = tokens(grid, 2, 32).double()

        def run(function):
            layer.zero_grad()
            leaf = x.clone().requires_grad_()
            out = function(leaf)
            out.square().sum().backward()
            return [out.detach(), leaf.grad, *(p.grad for p in layer.parameters())]

        found, exact = run(lambda x: layer(x, grid)), run(lambda x: oracle(layer, x, grid))
        assert largest_error(found, exact) < 1e-10

    @pytest.mark.parametrize(
        ("name", "options"),
        [("zigma", {"state": "ssd"}), ("diffussm", {"reduction": 3}), ("zigma", {"paths": 1})],
    )
    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_options_keep_the_contract(self, check, name, options):
        check(name, **options)

    @pytest.mark.parametrize(("name", "attribute"), [("dis", "layer"), ("diffussm", "")])
    def test_both_directions_start_alike(self, name, attribute):
        """In DiS's code the second one's steps start at 0.69, outside Mamba's range."""
        layer = build_attention(name, 256)
        for scan in (layer.layer if attribute else layer).scans:
            steps = F.softplus(scan.step_proj.bias)
            assert 1e-3 * 0.999 < steps.min() < 3e-3 and 0.03 < steps.max() < 0.1 * 1.001
            assert scan.step_proj.weight.abs().max() <= 16**-0.5
            torch.testing.assert_close(scan.log_rates.exp()[7], torch.arange(1.0, 17))
            assert (scan.skip == 1).all()

    def test_mamba_2_starts_as_published(self):
        layer = build_attention("zigma", 512, state="ssd").layer
        assert layer.num_heads == 16 and layer.width // layer.num_heads == 64
        rates, steps = layer.log_rates.exp(), F.softplus(layer.step_bias)
        assert rates.min() >= 1 and rates.max() <= 16 and rates.std() > 1
        assert steps.min() > 1e-3 * 0.999 and steps.max() < 0.1 * 1.001

    @pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
    def test_the_norm_of_half_precision_is_computed_in_float32(self, weight_dtype):
        """4,096 squares summed in bfloat16 would stand still at 256 of them."""
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(3, 4096, generator=draw).bfloat16()
        weight = torch.randn(4096, generator=draw).to(weight_dtype)
        out = rms_norm(x, weight)
        assert out.dtype == torch.bfloat16
        exact = F.rms_norm(x.double(), (4096,), weight.double(), 1e-5)
        torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=0)

    def test_parameters_are_those_of_mamba(self):
        d, rank = 64, 4
        one = 2 * d * (rank + 32) + rank * 2 * d + 2 * d * 5 + 2 * d * 16 + 2 * 2 * d
        for name, scans in (("zigma", 1), ("dis", 2)):
            layer = build_attention(name, d)
            assert sum(p.numel() for p in layer.parameters()) == 6 * d * d + scans * one

    @pytest.mark.parametrize("name", NAMES)
    def test_closed_form_is_the_page(self, name):
        d, n = 64, 6 * 8
        macs = {
            "zigma": 6.25 * d**2 + 136 * d,
            "dis": 6.5 * d**2 + 272 * d,
            "diffussm": 2.75 * d**2 + 128 * d,
        }
        assert build_attention(name, d).macs((6, 8)) == n * macs[name]
        if name == "zigma":
            ssd = build_attention(name, d, state="ssd", num_heads=2)
            assert ssd.macs((6, 8)) == n * (6 * d**2 + 778 * d + 1024)

    @pytest.mark.parametrize("name", NAMES)
    def test_there_is_no_map(self, name):
        """Each channel mixes tokens by a matrix of its own."""
        with pytest.raises(InvalidType, match="gives no attention_map"):
            build_attention(name, 16).attention_map(tokens((2, 2), dim=16), (2, 2))

    def test_a_reversed_image_reverses_what_dis_gives_with_its_scans_exchanged(self):
        layer, grid = build_scrambled("dis"), (3, 5)
        turned = copy.deepcopy(layer)
        turned.layer.scans = turned.layer.scans[::-1]
        x = tokens(grid)
        torch.testing.assert_close(turned(x.flip(1), grid).flip(1), layer(x, grid))

    @pytest.mark.parametrize(
        ("name", "options", "said"),
        [
            ("zigma", {"paths": 9}, r"paths must lie in \[1, 8\], got 9"),
            ("zigma", {"paths": 0}, r"paths must lie in \[1, 8\], got 0"),
            ("zigma", {"state": "mamba2"}, "did you mean 'mamba'"),
            ("zigma", {"impl": "fla"}, "impl='fla' computes state='ssd', not state='mamba'"),
            ("zigma", {"impl": "mamba", "state": "ssd"}, "computes state='mamba', not"),
            ("diffussm", {"reduction": 0}, "reduction must be at least 1, got 0"),
            ("dis", {"impl": "mamba", "stream": 4}, "set stream=None or impl='auto'"),
        ],
    )
    def test_mistakes_are_named(self, name, options, said):
        with pytest.raises(InvalidValue, match=said):
            build_attention(name, 16, **options)

    def test_log_of_steps_is_uniform(self):
        torch.manual_seed(0)
        layer = build_attention("zigma", 1024)
        logs = F.softplus(layer.layer.scans[0].step_proj.bias).log()
        share = (logs < math.log(1e-2)).float().mean()  # half of the range
        assert abs(share - 0.5) < 0.05
