"""Feed-forwards with experts: against loops over tokens, alone and in the backbone."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import attnzoo
from attnzoo import InvalidValue
from attnzoo.counting import count_macs, fvcore_macs, measure_macs
from attnzoo.layers.linear import linear_gelu
from attnzoo.ops import dispatch
from backbones import DiT, build_backbone, compile_blocks, record
from backbones.cast_once import cast_once
from backbones.feedforward import MLP, DiffMoE, TimeExperts, build_feedforward
from tests.backbones import weights

TINY = {"dim": 16, "depth": 2, "num_classes": 10, "in_channels": 3, "feedforward_ratio": 2.0}
GRID = (4, 6)


def build(kind, dim=8, seed=0):
    torch.manual_seed(seed)
    layer = build_feedforward(kind, dim, 2.0, layer_index=1, depth=6)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer.double()


def tokens(batch=3, dim=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, GRID[0] * GRID[1], dim, generator=generator, dtype=torch.float64)


def mlp(layer, expert, z):
    hidden = z @ layer.expand[expert] + layer.expand_bias[expert]
    return (
        F.gelu(hidden, approximate="tanh") @ layer.contract[expert] + layer.contract_bias[expert]
    )


def gradients(layer, out, x):
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    wanted = [x, *(p for n, p in layer.named_parameters() if not n.startswith("predictor"))]
    return [out, *torch.autograd.grad((out * weight).sum(), wanted, allow_unused=True)]


@pytest.fixture
def fused(monkeypatch):
    """The calls of PyTorch's fused projection, which on GPUs that gain by it "auto" takes."""
    calls, call = [], torch._addmm_activation

    def counted(bias, rows, weight, **options):
        calls.append(rows.dtype)
        return call(bias, rows, weight, **options)

    monkeypatch.setattr(torch, "_addmm_activation", counted)
    monkeypatch.setattr(dispatch, "_try_fused_gelu", lambda: True)
    return calls


@pytest.fixture
def on_gpu(fused, monkeypatch):
    """Tensors of the host that say they are on a GPU; there the fused call has the exact GELU."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    return fused


def halves(dtype=torch.bfloat16):
    return build("mlp", 16).to(dtype), tokens(dim=16).to(dtype)


def on_no_gpu(dtype=torch.bfloat16):
    """An MLP and tokens on a GPU without numbers, which need none: inside a ``FakeTensorMode``."""
    with torch.device("meta"):
        layer = build_feedforward("mlp", 16, 2.0)
    for part in (layer.expand, layer.contract):
        for name, z in part.named_parameters():
            fake = torch.empty(z.shape, dtype=dtype, device="cuda")
            part._parameters[name] = torch.nn.Parameter(fake)
    return layer, torch.empty(3, 24, 16, dtype=dtype, device="cuda")


def plainly(layer, x):
    return layer.contract(F.gelu(layer.expand(x), approximate="tanh"))


class TestFusedGelu:
    """One kernel projects, adds the bias and applies GELU, where PyTorch has one and it pays."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @torch.no_grad()
    def test_equals_the_two_calls(self, on_gpu, dtype):
        layer, x = halves(dtype)
        wanted = plainly(layer, x)
        torch.testing.assert_close(layer(x, GRID), wanted, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(layer(x[0, 0], GRID), wanted[0, 0], rtol=2e-2, atol=2e-2)
        assert layer(x[:0], GRID).shape == x[:0].shape
        assert on_gpu == [dtype] * 3

    @torch.no_grad()
    def test_casts_as_autocast_does(self, on_gpu):
        layer, x = halves(torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            found, wanted = layer(x, GRID), plainly(layer, x)
        assert on_gpu == [torch.bfloat16] and found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)

    @torch.no_grad()
    def test_weights_are_cast_once_for_it_too(self, on_gpu):
        layer, x = halves(torch.float32)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            wanted = layer(x, GRID)
            with cast_once(layer, lambda: layer(x, GRID)) as cast:
                assert len(cast) == 4 and layer.expand.weight.dtype == torch.bfloat16
                assert torch.equal(layer(x, GRID), wanted)
        assert len(on_gpu) == 3

    def test_is_for_gpus(self, fused):
        layer, x = halves()
        with torch.no_grad():
            assert torch.equal(layer(x, GRID), plainly(layer, x))
        assert not fused

    def test_gradients_go_through_the_two_calls(self, on_gpu):
        layer, x = halves()
        layer(x, GRID).sum().backward()
        assert not on_gpu and layer.expand.weight.grad.abs().max() > 0
        layer.requires_grad_(False)
        layer(x.requires_grad_(), GRID).sum().backward()
        assert not on_gpu and x.grad.abs().max() > 0
        layer(x.detach(), GRID)  # nothing of it wants a gradient
        assert len(on_gpu) == 1

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @torch.no_grad()
    def test_wider_types_are_computed_as_ever(self, on_gpu, dtype):
        layer, x = halves(dtype)
        assert torch.equal(layer(x, GRID), plainly(layer, x)) and not on_gpu
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError):
            layer.double()(x.float(), GRID)
        assert not on_gpu

    @pytest.mark.parametrize("way", ["hook", "pre-hook", "forward", "adapter", "subclass"])
    @torch.no_grad()
    def test_whatever_is_around_the_projection_is_called(self, on_gpu, way):
        layer, x = halves()
        seen, own = [], layer.expand.forward
        if way == "hook":
            layer.expand.register_forward_hook(lambda *_: seen.append(1))
        elif way == "pre-hook":
            layer.expand.register_forward_pre_hook(lambda *_: seen.append(1))
        elif way == "forward":
            layer.expand.forward = lambda z: (seen.append(1), own(z))[1]
        elif way == "adapter":
            layer.expand.__class__ = type(
                "Adapted",
                (torch.nn.Linear,),
                {"forward": lambda self, z: seen.append(1) or own(z)},
            )
        else:
            kept = type("Kept", (torch.Tensor,), {})
            layer.expand.weight = torch.nn.Parameter(layer.expand.weight.as_subclass(kept))
            seen.append(1)
        layer(x, GRID)
        assert seen == [1] and not on_gpu

    @torch.no_grad()
    def test_transforms_and_tangents_go_through(self, on_gpu):
        layer, x = halves()
        found = torch.func.vmap(lambda z: layer(z, GRID))(x)
        assert torch.equal(found, torch.func.vmap(lambda z: plainly(layer, z))(x))
        wanted = torch.func.jvp(lambda z: plainly(layer, z), (x,), (x,))[1]
        assert torch.equal(torch.func.jvp(lambda z: layer(z, GRID), (x,), (x,))[1], wanted)
        with forward_ad.dual_level():
            out = layer(forward_ad.make_dual(x, x), GRID)
            assert torch.equal(forward_ad.unpack_dual(out).tangent, wanted)
        assert not on_gpu

    @torch.no_grad()
    def test_counters_and_tracers_see_the_two_calls(self, on_gpu):
        layer, x = halves()
        with FlopCounterMode(display=False) as counter:
            layer(x[:1], GRID)
        assert counter.get_total_flops() == 2 * layer.macs(GRID)
        graph = make_fx(lambda z: layer(z, GRID))(x).graph  # of a mode without hooks
        assert torch.ops.aten.gelu.default in {node.target for node in graph.nodes}
        assert not on_gpu

    @pytest.mark.parametrize("strict", [False, True])
    @torch.no_grad()
    def test_exports_know_the_two_calls_only(self, monkeypatch, strict):
        monkeypatch.setattr(dispatch, "_try_fused_gelu", lambda: True)
        with FakeTensorMode():
            layer, x = on_no_gpu()
            program = torch.export.export(layer, (x, GRID), strict=strict)
        names = [str(node.target) for node in program.graph.nodes]
        assert "aten.gelu.default" in names and "aten._addmm_activation.default" not in names

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @torch.no_grad()
    def test_a_compiler_for_a_gpu_is_given_it(self, monkeypatch, dtype):
        monkeypatch.setattr(dispatch, "_try_fused_gelu", lambda: True)
        found = []

        def keep(graph, example):
            found.extend(node.target for node in graph.graph.nodes)
            return graph.forward

        torch._dynamo.reset()
        with FakeTensorMode():
            layer, x = on_no_gpu(dtype)
            out = torch.compile(layer, backend=keep, fullgraph=True)(x, GRID)
        assert out.shape == x.shape and out.is_cuda
        assert (torch._addmm_activation in found) == (dtype == torch.bfloat16)
        assert (F.gelu in found) == (dtype == torch.float32)

    @pytest.mark.parametrize("attn", ["softmax", "sana"])
    @torch.no_grad()
    def test_a_compiled_block_keeps_it_whole(self, monkeypatch, attn):
        """It is not among what the compiler takes apart on its way to kernels."""
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd
        from torch._inductor.decomposition import select_decomp_table

        graphs = []

        def keep(graph, example):
            graphs.append([str(node.target) for node in graph.graph.nodes])
            return make_boxed_func(graph.forward)

        model = weights.scrambled(DiT(attn=attn, **TINY)).bfloat16()
        arguments = inputs()[0].bfloat16(), *inputs()[1:]
        wanted = model(*arguments).sample
        monkeypatch.setattr("attnzoo.layers.linear.has_fused_gelu", lambda *_: True)
        torch._dynamo.reset()
        backend = aot_autograd(fw_compiler=keep, decompositions=select_decomp_table())
        found = compile_blocks(model, backend=backend)(*arguments).sample
        torch.testing.assert_close(found, wanted, rtol=5e-2, atol=5e-2)
        assert graphs and all(z.count("aten._addmm_activation.default") == 1 for z in graphs)
        assert not any("aten.tanh.default" in z or "aten.gelu.default" in z for z in graphs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestFusedGeluOnAGpu:
    @torch.no_grad()
    def test_it_is_the_tanh_approximation(self):
        x, weight = (torch.randn(128, 64, device="cuda") for _ in range(2))
        bias = torch.randn(128, device="cuda")
        hidden = F.linear(x.double(), weight.double(), bias.double())
        found = torch._addmm_activation(bias, x, weight.t(), use_gelu=True).double()
        assert (found - F.gelu(hidden, approximate="tanh")).abs().max() < 5e-5
        assert (found - F.gelu(hidden)).abs().max() > 2e-4

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @torch.no_grad()
    def test_errs_no_more_than_the_two_calls(self, fused, dtype):
        layer = build("mlp", 64).cuda()
        x = tokens(dim=64).cuda()
        exact = F.gelu(layer.expand(x), approximate="tanh")
        layer, x = layer.to(dtype), x.to(dtype)
        one, two = linear_gelu(layer.expand, x), F.gelu(layer.expand(x), approximate="tanh")
        assert fused == [dtype] and one.shape == two.shape and one.dtype == two.dtype
        assert (one - exact).norm() <= 1.1 * (two - exact).norm()

    @pytest.mark.parametrize("attn", ["softmax", "sana", "dydila"])
    def test_models_are_as_exact_eager_compiled_and_recorded(self, fused, monkeypatch, attn):
        options = {"depth": 3, "num_classes": 10}
        model = weights.scrambled(build_backbone(attn, "S", "controlled", **options)).cuda().eval()
        images = torch.randn(2, 4, 16, 16, device="cuda")
        arguments = images, torch.tensor([3.0, 900.0]).cuda(), torch.tensor([1, 7]).cuda()

        def run(call=model):
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
                return call(*arguments).sample.float()

        with torch.no_grad():
            exact = model(*arguments).sample
        found = {"eager": run()}
        assert len(fused) == 3
        found["recorded"] = record(model, 2, 16, dtype=torch.bfloat16)(*arguments).sample
        monkeypatch.setattr(dispatch, "_try_fused_gelu", lambda: False)
        plain = (run() - exact).abs().mean()
        monkeypatch.undo()  # the compiler is to see PyTorch's own function
        monkeypatch.setattr(dispatch, "_try_fused_gelu", lambda: True)
        torch._dynamo.reset()
        compile_blocks(model)
        found["compiled"] = run()
        replay = record(model, 2, 16, dtype=torch.bfloat16, frozen=True)
        found["compiled and recorded"] = replay(*arguments).sample
        for way, out in found.items():
            assert (out - exact).abs().mean() <= 1.5 * plain, way
        with torch.autocast("cuda", torch.bfloat16):
            model(*arguments).sample.sum().backward()
        assert model.blocks[0].feedforward.expand.weight.grad.isfinite().all()


class TestDiffMoE:
    def test_in_training_experts_choose_among_all_tokens_of_the_batch(self):
        layer, x = build("diffmoe").train(), tokens().requires_grad_()
        flat = x.flatten(0, 1)
        gates = (flat @ layer.router.T).softmax(-1)
        taken = len(flat) // 16
        rows = [0.0] * len(flat)
        for expert in range(16):
            for t in sorted(range(len(flat)), key=lambda t: -gates[t, expert].item())[:taken]:
                rows[t] = rows[t] + gates[t, expert] * mlp(layer, expert, flat[t])
        rows = [row if torch.is_tensor(row) else torch.zeros(8).double() for row in rows]
        wanted = gradients(layer, torch.stack(rows).view_as(x), x)
        torch.testing.assert_close(gradients(layer, layer(x, GRID), x), wanted)

    def test_at_inference_each_token_decides_for_itself(self):
        layer, x = build("diffmoe").eval(), tokens().requires_grad_()
        layer.threshold.uniform_(0.2, 0.8)
        rows, chosen = [], 0
        for t in x.flatten(0, 1):
            first, _, last = layer.predictor
            hidden = F.silu(first.weight @ t + first.bias)
            predicted = torch.sigmoid(last.weight @ hidden + last.bias)
            gates = (layer.router @ t).softmax(-1)
            row = torch.zeros(8, dtype=torch.float64)
            for expert in range(16):
                if predicted[expert] > layer.threshold[expert]:
                    row, chosen = row + gates[expert] * mlp(layer, expert, t), chosen + 1
            rows.append(row)
        assert 0 < chosen < 16 * len(rows)
        wanted = gradients(layer, torch.stack(rows).view_as(x), x)
        torch.testing.assert_close(gradients(layer, layer(x, GRID), x), wanted)

    def test_samples_are_independent_at_inference_only(self):
        layer, x = build("diffmoe").eval(), tokens()
        layer.threshold.fill_(0.5)
        together = layer(x, GRID)
        torch.testing.assert_close(torch.cat([layer(image[None], GRID) for image in x]), together)
        poisoned = x.clone()
        poisoned[0] = torch.nan
        torch.testing.assert_close(layer(poisoned, GRID)[1:], together[1:])
        layer.train()
        assert (layer(x, GRID)[:1] - layer(x[:1], GRID)).abs().max() > 1e-3

    def test_the_predictor_learns_of_the_choice_and_the_thresholds_follow(self):
        layer, x = build("diffmoe").train(), tokens()
        layer.threshold.fill_(0.25)
        layer(x, GRID).sum().backward(retain_graph=True)
        assert all(p.grad is None for p in layer.predictor.parameters())
        flat = x.flatten(0, 1)
        gates, predicted = (flat @ layer.router.T).softmax(-1), layer.predictor(flat).sigmoid()
        loss, quantiles = 0.0, []
        for expert in range(16):
            best = sorted(range(len(flat)), key=lambda t: -gates[t, expert].item())[:4]
            for t in range(len(flat)):
                p = predicted[t, expert].item()
                loss -= math.log(p if t in best else 1 - p) / (16 * len(flat))
            quantiles.append(float(predicted[:, expert].sort(descending=True).values[3]))
        auxiliary = attnzoo.auxiliary_loss(layer)
        assert auxiliary.item() == pytest.approx(0.01 * loss / 3)  # three layers of six have it
        moved = 0.95 * 0.25 + 0.05 * torch.tensor(quantiles).double()
        torch.testing.assert_close(layer.threshold, moved)
        router = layer.router.grad.clone()
        auxiliary.backward()
        assert all(p.grad.abs().max() > 0 for p in layer.predictor.parameters())
        assert torch.equal(layer.router.grad, router)

    def test_every_expert_learns_of_one_token_too(self):
        layer = build("diffmoe").train()
        (layer(tokens()[:1, :1], (1, 1)).sum() + attnzoo.auxiliary_loss(layer)).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
        assert (layer.expand.grad.abs().amax((1, 2)) > 0).all()

    def test_every_second_block_has_it(self):
        model = DiT(attn="sana", feedforward="diffmoe", **TINY | {"depth": 5})
        kinds = [type(block.feedforward) for block in model.blocks]
        assert kinds == [MLP, DiffMoE, MLP, DiffMoE, MLP]
        assert {b.feedforward.layers for b in model.blocks[1::2]} == {2}

    def test_an_empty_batch_is_answered(self):
        assert build("diffmoe").eval()(tokens()[:0], GRID).shape == (0, 24, 8)


class TestTimeExperts:
    @pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
    def test_each_sample_meets_the_expert_of_its_time(self, dtype):
        times = torch.tensor([0, 99, 100, 555, 999, 1000]).to(dtype)
        layer, x = build("time-experts"), tokens(6).requires_grad_()
        rows = [
            torch.stack([mlp(layer, expert, t) for t in image])
            for image, expert in zip(x, [0, 0, 1, 5, 9, 9], strict=True)
        ]
        wanted = gradients(layer, torch.stack(rows), x)
        found = gradients(layer, layer(x, GRID, times), x)
        torch.testing.assert_close(found, wanted)
        assert found[2][2].abs().max() == 0  # nothing was in that interval

    def test_without_times_it_cannot_choose(self):
        with pytest.raises(InvalidValue, match="needs the time"):
            build("time-experts")(tokens(), GRID)


KINDS = ["diffmoe", "time-experts"]


def scrambled(kind, attn="sana", **options):
    torch.manual_seed(0)
    model = DiT(attn=attn, feedforward=kind, **TINY | options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(batch=2):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, 8, 12, generator=generator)
    return images, torch.linspace(3, 999, batch), torch.arange(batch) % 10


def step(model, *arguments):
    model.zero_grad()
    loss = model(*arguments).sample.square().sum()
    extra = attnzoo.auxiliary_loss(model)
    (loss if extra is None else loss + extra).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [(4, 4), (7, 13)], ids=str)
def test_counts_are_measured_counts(kind, grid):
    model = scrambled(kind)
    counted = count_macs(model, grid=grid)  # refuses a difference
    assert counted.total == measure_macs(model, grid=grid).total == fvcore_macs(model, grid=grid)
    ran = measure_macs(model, grid=grid, run_backward=True).backward
    # Run without its loss, the predictor has no backward: three products of 16 x 16 a token.
    ran += 3 * 256 * grid[0] * grid[1] if kind == "diffmoe" else 0
    assert counted.backward == pytest.approx(ran, rel=0.03)
    # What acts on a token is an MLP, the router and the predictor; biases of others are not told.
    plain = count_macs(DiT(attn="sana", **TINY), grid=grid)
    more = {"diffmoe": 16 * 16 + 16 * 17 + 16 * 17, "time-experts": 2 * 9 * 48}[kind]
    assert counted.active_parameters == plain.active_parameters + more


@pytest.mark.parametrize("kind", KINDS)
def test_saved_weights_come_back_with_their_thresholds(kind, tmp_path):
    model = scrambled(kind)
    step(model.train(), *inputs())
    model.eval().save_pretrained(tmp_path)
    loaded = DiT.from_pretrained(tmp_path).eval()
    assert loaded.config.feedforward == kind
    for (name, buffer), other in zip(model.named_buffers(), loaded.buffers(), strict=True):
        assert torch.equal(buffer, other) and (buffer > 0).all(), name
    assert torch.equal(model(*inputs()).sample, loaded(*inputs()).sample)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpointed_step_is_one_step(kind):
    model = scrambled(kind).train()
    other = copy.deepcopy(model)
    other.enable_gradient_checkpointing()
    found, wanted = step(other, *inputs()), step(model, *inputs())
    assert found.keys() == wanted.keys() == dict(model.named_parameters()).keys()
    torch.testing.assert_close(found, wanted)
    for ours, theirs in zip(other.buffers(), model.buffers(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_blocks_equal_the_model(kind, monkeypatch):
    monkeypatch.setattr(DiffMoE, "EXPERTS", 4)  # the compiler unrolls a loop over them
    model = scrambled(kind)
    compiled = compile_blocks(copy.deepcopy(model), backend="aot_eager")
    torch._dynamo.reset()
    for mode in (True, False):
        ours, theirs = compiled.train(mode), model.train(mode)
        if mode:
            torch.testing.assert_close(step(ours, *inputs()), step(theirs, *inputs()))
        with torch.no_grad():
            torch.testing.assert_close(ours(*inputs()).sample, theirs(*inputs()).sample)
    for ours, theirs in zip(compiled.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_two_equal_steps_are_equal_to_the_last_bit(kind):
    """Whatever the threads: sums over experts have one order."""
    model = scrambled(kind, dim=64).train()
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        first, second = (step(copy.deepcopy(model), *inputs(16)) for _ in range(2))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite(kind, dtype):
    model = scrambled(kind)
    for mode in (True, False):
        with torch.autocast("cpu", dtype):
            assert model.train(mode)(*inputs()).sample.isfinite().all()
    images, times, labels = inputs()
    out = model.eval().to(dtype)(images.to(dtype), times, labels).sample
    assert out.isfinite().all()


def test_a_typo_lists_the_kinds():
    with pytest.raises(InvalidValue, match=r"'diffmo'; did you mean 'diffmoe'\?.*time-experts"):
        build_feedforward("diffmo", 8, 4.0)
    assert isinstance(build("time-experts"), TimeExperts)
