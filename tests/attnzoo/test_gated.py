"""Gated linear attention: kernel against its reference and fla, scan orders, DiG's extras."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import attnzoo.mechanisms.dig
import attnzoo.mechanisms.gated  # noqa: F401
from attnzoo import build_attention
from attnzoo.ops.gated_scan import (
    gated_linear_attention,
    gated_linear_attention_macs,
    scan,
    unscan,
)
from attnzoo.ops.gated_scan import torch as chunks
from attnzoo.ops.gated_scan.reference import gated_linear_attention as recurrence

GRID = (4, 6)
DIRECTIONS = ("forward", "backward", "columns-forward", "columns-backward")


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def operands(
    n: int, strength: float = 1.0, batch: int = 1, key_dim: int = 16, value_dim: int = 24
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n)
    query, key, logit, value = (
        torch.randn(batch, 2, n, width, generator=generator)
        for width in (key_dim, key_dim, key_dim, value_dim)
    )
    return [query * key_dim**-0.5, key, value, F.logsigmoid(logit) / 16 * strength]


def with_gradients(function, tensors: list[Tensor], **options) -> list[Tensor]:
    """The output, then the gradients of all tensors under a fixed random projection of it."""
    tensors = [tensor.clone().requires_grad_() for tensor in tensors]
    out = function(*tensors, **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    (out * weight).sum().backward()
    return [out.detach(), *(tensor.grad for tensor in tensors)]


def layer(name: str, dim: int = 32, **options):
    torch.manual_seed(0)
    module = build_attention(name, dim=dim, num_heads=options.pop("num_heads", 2), **options)
    with torch.no_grad():  # far from the start, so that decays and gates matter
        for parameter in module.layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module


class TestKernel:
    @pytest.mark.parametrize("impl", ["auto", "torch"])
    @pytest.mark.parametrize("strength", [1, 10, 100, "mixed", "-100"])
    @pytest.mark.parametrize("n", [1, 7, 64, 91, 384])
    def test_equals_the_reference(self, n, strength, impl):
        tensors = operands(n, strength if isinstance(strength, int) else 1)
        if strength == "-100":
            tensors[3] = torch.full_like(tensors[3], -100)
        elif strength == "mixed":  # a closed gate here and there between nearly open ones
            closed = torch.rand(tensors[3].shape, generator=torch.Generator().manual_seed(2)) < 0.1
            tensors[3] = torch.where(closed, -100.0, tensors[3])
        expected = with_gradients(recurrence, [tensor.double() for tensor in tensors])
        actual = with_gradients(gated_linear_attention, tensors, impl=impl)
        assert all(tensor.isfinite().all() for tensor in actual)
        for got, want in zip(actual[:4], expected[:4], strict=True):
            assert relative(got, want) < 2e-6
        # Where every gate is shut its gradient is 0 but for exp(-100).
        if n > 1 and strength != "-100":
            assert relative(actual[4], expected[4]) < 4e-6
        assert (actual[4] - expected[4]).abs().max() < 1e-5 * max(1, expected[4].abs().max())

    def test_both_forms_were_taken(self, monkeypatch):
        taken = []
        for form in ("_two_factors", "_doubling"):
            function = getattr(chunks, form)
            monkeypatch.setattr(
                chunks, form, lambda *a, f=function, name=form: taken.append(name) or f(*a)
            )
        for strength, impl in ((1, "auto"), (100, "auto"), (1, "torch")):
            gated_linear_attention(*operands(91, strength), impl=impl)
        assert taken == ["_two_factors", "_doubling", "_doubling"]

    def test_auto_at_its_limit(self):
        """The whole decay of a chunk in one token: the steepest gates the two factors meet."""
        tensors = operands(128)
        tensors[3] = torch.zeros_like(tensors[3])
        tensors[3][:, :, 40::64] = chunks._FACTOR_LIMIT + 0.1
        expected = recurrence(*(tensor.double() for tensor in tensors))
        assert relative(gated_linear_attention(*tensors), expected) < 2e-6

    def test_shut_gates_are_no_nan(self):
        tensors = operands(91)
        tensors[3] = torch.full_like(tensors[3], -torch.inf)
        query, key, value, _ = tensors
        out = gated_linear_attention(*tensors)
        torch.testing.assert_close(out, (query * key).sum(-1, keepdim=True) * value)

    def test_open_gates_are_causal_linear_attention(self):
        query, key, value, _ = operands(91)
        out = gated_linear_attention(query, key, value, torch.zeros_like(key))
        expected = (query @ key.transpose(-2, -1)).tril() @ value
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)

    def test_macs_are_those_of_the_recurrence(self):
        with FlopCounterMode(display=False) as counter:
            recurrence(*operands(24))
        assert counter.get_total_flops() == 2 * 2 * gated_linear_attention_macs(24, 16, 24)

    @pytest.mark.parametrize("strength", ["mild", "strong"])
    @pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
    def test_equals_flash_linear_attention(self, impl, strength):
        golden = load_file(Path(__file__).parents[1] / "golden" / "gla.safetensors")

        def run(query, key, value, log_gate):
            query, key, value, log_gate = (
                z.transpose(1, 2) for z in (query, key, value, log_gate)
            )
            scaled = query * query.shape[-1] ** -0.5
            return gated_linear_attention(scaled, key, value, log_gate, impl).transpose(1, 2)

        names = ("query", "key", "value", "log_gate")
        prefixes = {"log_gate": f"{strength}."}
        inputs = [golden[prefixes.get(z, "") + z].requires_grad_() for z in names]
        out = run(*inputs)
        (out * golden["weight"]).sum().backward()
        assert relative(out, golden[f"{strength}.out"]) < 2e-6
        for name, tensor in zip(names, inputs, strict=True):
            assert relative(tensor.grad, golden[f"{strength}.grad.{name}"]) < 4e-6

    def test_compiles_whole(self):
        """Also when n changes, which makes the compiler try symbolic shapes."""
        torch._dynamo.reset()
        compiled = torch.compile(gated_linear_attention, fullgraph=True, backend="aot_eager")
        for impl, n in (("torch", 21), ("torch", 70), ("auto", 70)):
            tensors = operands(n, 100, key_dim=4, value_dim=4)
            actual = with_gradients(compiled, tensors, impl=impl)
            expected = with_gradients(gated_linear_attention, tensors, impl="torch")
            for got, want in zip(actual, expected, strict=True):
                torch.testing.assert_close(got, want)


class TestScan:
    def test_orders(self):
        index = torch.arange(6).view(1, 6)
        orders = {z: scan(index, (2, 3), z)[0].tolist() for z in DIRECTIONS}
        assert orders == {
            "forward": [0, 1, 2, 3, 4, 5],
            "backward": [5, 4, 3, 2, 1, 0],
            "columns-forward": [0, 3, 1, 4, 2, 5],
            "columns-backward": [5, 2, 4, 1, 3, 0],
        }

    @pytest.mark.parametrize("direction", DIRECTIONS)
    def test_inverse(self, direction):
        x = torch.randn(2, 24, 3)
        assert torch.equal(unscan(scan(x, GRID, direction), GRID, direction), x)


def by_hand(module, x: Tensor, grid: tuple[int, int], orders: list[Tensor]) -> tuple[Tensor, ...]:
    """The layer from its formulas in float64: weights of each order, their mean, and the output.

    ``orders`` holds, for every direction, the tokens in the order in which they are visited.
    """
    part, heads = module.layer, module.num_heads

    def split(z: Tensor) -> Tensor:
        return z.unflatten(-1, (heads, -1)).transpose(1, 2)

    query, key, value, gate = (
        split(f(x)) for f in (part.query, part.key, part.value, part.output_gate)
    )
    log_gate = split(part.forget_gate[1](part.forget_gate[0](x))).sigmoid().log() / 16
    n, key_dim = query.shape[-2:]
    weights = []
    for order in orders:
        place = torch.empty_like(order)
        place[order] = torch.arange(n)
        sums = log_gate[:, :, order].cumsum(2)[:, :, place]  # gates up to each token
        decay = (sums.unsqueeze(3) - sums.unsqueeze(2)).clamp_max(0).exp()  # (b, h, i, j, dk)
        weight = (query.unsqueeze(3) * decay * key.unsqueeze(2)).sum(-1) / key_dim**0.5
        weights.append(weight * (place[:, None] >= place[None]))
    weight = torch.stack(weights).mean(0)
    out = weight @ value
    out = out / (out.square().mean(-1, keepdim=True) + part.norm_eps).sqrt()
    out = out * part.norm.weight * gate * gate.sigmoid()
    return weight, part.proj(out.transpose(1, 2).flatten(2))


def orders_of(direction: str, grid: tuple[int, int]) -> list[Tensor]:
    height, width = grid
    rows = torch.arange(height * width)
    columns = torch.tensor([r * width + c for c in range(width) for r in range(height)])
    table = {
        "forward": [rows],
        "backward": [rows.flip(0)],
        "columns-forward": [columns],
        "columns-backward": [columns.flip(0)],
        "both": [rows, rows.flip(0)],
        "four": [rows, rows.flip(0), columns, columns.flip(0)],
    }
    return table[direction]


class TestGated:
    @pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
    @pytest.mark.parametrize("direction", [*DIRECTIONS, "both", "four"])
    def test_equals_formulas(self, direction, impl):
        module = layer("gated", direction=direction, impl=impl).double()
        x = torch.randn(2, 24, 32, dtype=torch.float64)
        weights, out = by_hand(module, x, GRID, orders_of(direction, GRID))
        torch.testing.assert_close(module(x, GRID), out)
        torch.testing.assert_close(module.attention_map(x, GRID), weights)

    def test_both_is_the_mean_of_two_scans(self):
        module = layer("gated", direction="both")
        x = torch.randn(2, 24, 32)
        mixed = module.layer._scans(x, module.layer._heads(module.layer.value(x)), GRID,
                                    ("forward", "backward"))  # fmt: skip
        one, two = (
            module.layer._scans(z, module.layer._heads(module.layer.value(z)), GRID, ("forward",))
            for z in (x, x.flip(1))
        )
        torch.testing.assert_close(mixed, (one + two.flip(1)) / 2)

    def test_compiles_whole(self):
        torch._dynamo.reset()
        # test_properties.py has gradients, of a scan there and back, on one grid.
        module = layer("gated", direction="columns-backward", impl="torch")
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for grid in (GRID, (7, 10)):
            x = torch.randn(2, grid[0] * grid[1], 32)
            with torch.no_grad():
                torch.testing.assert_close(
                    compiled(x, grid), module(x, grid), rtol=1e-4, atol=1e-5
                )

    def test_single_direction_is_causal(self):
        x = torch.randn(1, 24, 32, requires_grad=True)
        layer("gated", direction="forward")(x, GRID)[0, 9].sum().backward()
        seen = x.grad[0].abs().sum(-1) > 0
        assert seen.tolist() == [i <= 9 for i in range(24)]

    def test_macs(self):
        for direction, count in (("forward", 1), ("both", 2), ("four", 4)):
            module = layer("gated", direction=direction, impl="reference", expand_v=2.0)
            with FlopCounterMode(display=False) as counter:
                module(torch.randn(1, 24, 32), GRID)
            parts = module.macs_parts(GRID)
            assert counter.get_total_flops() == 2 * sum(parts.values())
            assert parts["core"] == count * 2 * 2 * 24 * 8 * 32

    def test_start(self):
        module = build_attention("gated", dim=384)
        assert (module.num_heads, module.layer.query.out_features) == (6, 192)
        bound = 2**-2.5 * (6 / (384 + 192)) ** 0.5
        assert bound * 0.98 < module.layer.query.weight.abs().max() <= bound
        assert not module.layer.forget_gate[1].bias.any()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_finite_under_autocast(self, dtype):
        module = build_attention("gated", dim=64, num_heads=2)
        with torch.no_grad():  # gates nearly open, sums over all tokens: more than float16 holds
            module.layer.forget_gate[1].bias.fill_(8)
            module.layer.query.weight.mul_(300)
        x = (8 * torch.randn(1, 4096, 64)).requires_grad_()
        with torch.autocast("cpu", dtype):
            out = module(x, (64, 64))
        out.float().square().mean().backward()
        assert out.isfinite().all() and x.grad.isfinite().all()
        with torch.no_grad():
            expected = module(x, (64, 64))
        assert relative(out, expected) < (0.01 if dtype is torch.float16 else 0.05)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_keeps_dtype(self, dtype):
        module = layer("gated").to(dtype)
        x = torch.randn(2, 24, 32, dtype=dtype)
        assert module(x, GRID).dtype == module.attention_map(x, GRID).dtype == dtype

    def test_empty_batch(self):
        assert layer("gated")(torch.randn(0, 24, 32), GRID).shape == (0, 24, 32)

    def test_rejects(self):
        with pytest.raises(ValueError, match=r"expand_k=0\.3"):
            build_attention("gated", dim=32, num_heads=2, expand_k=0.3)
        with pytest.raises(ValueError, match="gate_normalizer must be at least 1e-15"):
            build_attention("gated", dim=32, gate_normalizer=0)
        with pytest.raises(ValueError, match="columns-forward"):
            build_attention("gated", dim=32, direction="column-forward")
        with pytest.raises(ValueError, match="does not hold"):
            layer("gated")(torch.randn(1, 24, 32), (5, 5))


class TestDiG:
    def test_scans_as_the_sequence_of_flips_and_transposes(self):
        """Each layer sees the tokens in the order that reorienting after every block yields."""
        grid, tokens = GRID, torch.arange(24)  # which image token stands where
        for index in range(6):
            module = layer("dig", layer_index=index, depth=6).double()
            x = torch.randn(1, 24, 32, dtype=torch.float64)
            _, out = by_hand(module, x, GRID, [tokens])
            torch.testing.assert_close(module(x, GRID), out)
            tokens = tokens.flip(0)
            if index % 2 == 1:
                tokens = tokens.view(grid).t().reshape(-1)
                grid = grid[::-1]

    @pytest.mark.parametrize("depth", [4, 5, 6])
    def test_network_equals_reorienting_network(self, depth):
        """A residual stack that flips and transposes, put back in order at its end."""
        modules = [layer("dig", layer_index=i, depth=depth) for i in range(depth)]
        rows = [layer("gated", direction="forward") for _ in range(depth)]
        x = torch.randn(2, 24, 32)
        ours, theirs, places, grid = x, x, torch.arange(24), GRID
        for index, (module, row) in enumerate(zip(modules, rows, strict=True)):
            row.layer.load_state_dict(module.layer.state_dict())
            row.layer.norm_eps = module.layer.norm_eps
            ours = ours + module(ours, GRID)
            theirs = (theirs + row(theirs, grid)).flip(1)
            places = places.flip(0)
            if index % 2 == 1:
                theirs = theirs.unflatten(1, grid).transpose(1, 2).flatten(1, 2)
                places = places.view(grid).t().reshape(-1)
                grid = grid[::-1]
        torch.testing.assert_close(ours[:, places], theirs, rtol=1e-4, atol=1e-4)
        # Only a depth that 4 divides leaves the reoriented tokens in the image's order.
        assert torch.equal(places, torch.arange(24)) == (depth % 4 == 0)

    def test_schedules(self):
        for schedule, expected in (
            ("four", [*DIRECTIONS, "forward"]),
            ("two", ["forward", "backward", "forward", "backward", "forward"]),
            ("forward", ["forward"] * 5),
        ):
            modules = [
                build_attention("dig", dim=32, layer_index=i, depth=5, schedule=schedule)
                for i in range(5)
            ]
            assert [module.direction for module in modules] == expected

    def test_enhancement_starts_as_identity(self):
        module = build_attention("dig", dim=32)
        x = torch.randn(2, 24, 32)
        assert torch.equal(module.after_block(x, GRID), x)
        with torch.no_grad():
            for parameter in module.enhancement.parameters():
                parameter.normal_()
        kernel, bias = module.enhancement.parameters()
        expected = F.conv2d(
            x.transpose(1, 2).unflatten(2, GRID), kernel, bias, padding=1, groups=32
        )
        torch.testing.assert_close(
            module.after_block(x, GRID), expected.flatten(2).transpose(1, 2)
        )

    def test_without_enhancement(self):
        module = build_attention("dig", dim=32, enhancement=False)
        x = torch.randn(2, 24, 32)
        assert module.after_block(x, GRID) is x
        assert module.macs_parts(GRID)["conv"] == 0

    def test_attention_map(self):
        module = layer("dig", layer_index=2, depth=4).double()
        x = torch.randn(2, 24, 32, dtype=torch.float64)
        weights, _ = by_hand(module, x, GRID, orders_of("columns-forward", GRID))
        torch.testing.assert_close(module.attention_map(x, GRID), weights)

    def test_macs(self):
        module = layer("dig", impl="reference")
        with FlopCounterMode(display=False) as counter:
            x = torch.randn(1, 24, 32)
            module.after_block(x + module(x, GRID), GRID)
        assert counter.get_total_flops() == 2 * module.macs(GRID)
        d, n = 32, 24
        assert module.macs(GRID) == (4 * d**2 + 24 * d + 9 * d) * n + n * d**2 // 2

    def test_heads(self):
        heads = [build_attention("dig", dim=dim).num_heads for dim in (384, 512, 768, 1024, 1152)]
        assert heads == [6, 8, 12, 16, 18]
