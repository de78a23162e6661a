"""Recorded forwards and compiled blocks: equal to the model itself, or refused."""

import copy
import pickle

import pytest
import torch
from torch._dynamo.utils import counters

from attnzoo import InvalidValue, auxiliary_loss, list_attention
from attnzoo.errors import Unavailable
from backbones import DiT, build_backbone, compile_blocks, record, refuse_waits, why_not_recorded
from backbones.recorded import Placement, captured, recording_stream
from tests.backbones.weights import scrambled

QUICK = ("sana", "dydila", "moh")
TINY = {"dim": 32, "depth": 3, "num_classes": 10, "in_channels": 3, "sample_size": 8}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def named(names):
    slow = [pytest.param(name, marks=pytest.mark.slow) for name in names if name not in QUICK]
    return pytest.mark.parametrize("attn", [*QUICK, *slow])


def inputs(batch=2, size=8, device="cpu", channels=3):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, channels, size, size, generator=generator)
    times = torch.linspace(3, 999, batch)
    return images.to(device), times.to(device), (torch.arange(batch) % 10).to(device)


def gradients(model, *arguments):
    model.zero_grad()
    loss = model(*arguments).sample.square().sum()
    extra = auxiliary_loss(model)
    (loss if extra is None else loss + extra).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class TestRefusals:
    model = DiT(attn="softmax", **TINY).eval()

    def test_a_cpu_has_no_graphs(self):
        assert "needs a GPU" in why_not_recorded(self.model)
        assert "'cpu'" in why_not_recorded(self.model, "cpu")
        with pytest.raises(Unavailable, match=r"model\.to\('cuda'\)"):
            record(self.model, 2)

    def test_a_gpu_has_them_unless_blocks_are_computed_twice(self):
        model = DiT(attn="softmax", **TINY).train()
        assert why_not_recorded(model, "cuda") is None
        model.enable_gradient_checkpointing()
        assert "checkpointing" in why_not_recorded(model, "cuda")
        assert why_not_recorded(model.eval(), "cuda") is None

    def test_batch_size_and_mode_are_looked_at_first(self):
        with pytest.raises(InvalidValue, match="batch must be at least 1, got 0"):
            record(self.model, 0)
        with pytest.raises(InvalidValue, match="9x9"):
            record(self.model, 1, 9)
        with pytest.raises(InvalidValue, match=r"call model\.eval\(\)"):
            record(copy.deepcopy(self.model).train(), 1)


class TestPlacement:
    def test_what_is_changed_in_place_is_no_change(self):
        model = DiT(attn="sana", **TINY)
        placement = Placement(model)
        model.load_state_dict({key: z + 1 for key, z in model.state_dict().items()})
        model.train()(*inputs()).sample.sum().backward()
        assert not placement.has_changed()

    @pytest.mark.parametrize("change", [
        lambda model: model.double(),
        lambda model: model.load_state_dict(model.state_dict(), assign=True),
        lambda model: setattr(model.final_projection, "bias", None),
        lambda model: setattr(model.patch_embedding.weight, "data", torch.ones(32, 3, 2, 2)),
        lambda model: model.blocks.insert(0, model.blocks[1]),
        lambda model: setattr(model.blocks[0], "attention", model.blocks[1].attention),
        lambda model: model.blocks.append(model.blocks[1]),
    ])  # fmt: skip
    def test_moved_weights_and_other_modules_are_one(self, change):
        model = DiT(attn="sana", **TINY)
        placement = Placement(model)
        change(model)
        assert placement.has_changed()


class TestCompiledBlocks:
    @named(list_attention())
    def test_equal_the_model_in_training_and_inference(self, attn):
        """And nothing falls back to eager: fullgraph makes a break or a limit an error."""
        model = scrambled(DiT(attn=attn, **TINY))
        compiled = compile_blocks(copy.deepcopy(model), backend="aot_eager")
        torch._dynamo.reset()
        counters.clear()
        found, wanted = (gradients(z.train(), *inputs()) for z in (compiled, model))
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4)
        for arguments in (inputs(), inputs(batch=3)):
            with torch.no_grad():
                ours, theirs = (z.eval()(*arguments).sample for z in (compiled, model))
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert counters["stats"]["unique_graphs"] > 0
        assert not counters["graph_break"]

    def test_outlive_the_limit_of_eight(self):
        """Sizes, modes, gradients and blocks beyond it: none is run eagerly."""
        graphs = []

        def count(graph, example):
            graphs.append(graph)
            return graph.forward

        torch._dynamo.reset()
        model = compile_blocks(DiT(attn="differential", **TINY | {"depth": 2}), backend=count)
        for size in (2, 4, 6):
            for mode in (True, False):
                model.train(mode)(*inputs(size=size))
            with torch.no_grad():
                model(*inputs(size=size))
        # Three sizes, with gradients and without, of blocks that differ by their place.
        assert len(graphs) >= 12
        with torch.compiler.set_stance("fail_on_recompile"):
            for size in (2, 6):
                model.train()(*inputs(size=size))
                with torch.no_grad():
                    model.eval()(*inputs(size=size))

    def test_copies_and_pickles_are_not_compiled(self):
        model = compile_blocks(DiT(attn="sana", **TINY), backend="aot_eager").eval()
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert all(block._compiled_call_impl is None for block in other.blocks)
            torch.testing.assert_close(other(*inputs()).sample, model(*inputs()).sample)

    def test_hooks_of_a_block_run(self):
        model = compile_blocks(DiT(attn="sana", **TINY), backend="eager").eval()
        model.blocks[1].register_forward_hook(lambda module, arguments, out: out + 1)
        plain = copy.deepcopy(model)
        torch.testing.assert_close(plain(*inputs()).sample, model(*inputs()).sample)


@needs_gpu
class TestRecorded:
    @staticmethod
    def model(attn, **options):
        model = build_backbone(attn, "S", "controlled", depth=3, num_classes=10, **options)
        return scrambled(model).cuda()

    @pytest.mark.parametrize("dtype", [None, torch.bfloat16])
    @pytest.mark.parametrize("attn", list_attention())
    def test_equals_the_model(self, attn, dtype):
        model = self.model(attn)
        replay = record(model, 2, 16, dtype=dtype)
        for seed in range(2):
            images, times, labels = inputs(2, 16, "cuda", channels=4)
            images = images + seed
            with torch.no_grad(), torch.autocast("cuda", dtype, dtype is not None):
                wanted = model(images, times, labels).sample
            found = replay(images, times, labels).sample
            scale = wanted.abs().max()
            assert found.dtype == wanted.dtype
            assert (found - wanted).abs().max() <= (3e-2 if dtype else 1e-4) * scale

    def test_sees_weights_changed_in_place_and_refuses_replaced_ones(self):
        model = self.model("sana")
        replay = record(model, 1, 16)
        arguments = inputs(1, 16, "cuda", channels=4)
        first = replay(*arguments, return_dict=False)[0]
        assert torch.equal(first, replay(*arguments).sample)
        with torch.no_grad():
            model.final_projection.bias.add_(1)
        torch.testing.assert_close(replay(*arguments).sample, first + 1)
        with pytest.raises(InvalidValue, match=r"recorded for an input of \(1, 4, 16, 16\)"):
            replay(*inputs(2, 16, "cuda", channels=4))
        with pytest.raises(InvalidValue, match="eval"):
            model.train()
            replay(*arguments)
        model.eval().bfloat16()
        with pytest.raises(InvalidValue, match="moved or replaced"):
            replay(*arguments)

    @pytest.mark.parametrize("is_compiled", [False, True])
    @pytest.mark.parametrize("attn", ["softmax", "dydila"])
    def test_frozen_it_casts_weights_once_and_gives_the_same(self, attn, is_compiled):
        model, arguments = self.model(attn), inputs(2, 16, "cuda", channels=4)
        if is_compiled:  # and called, for the weights' own type: PyTorch must not take that again
            compile_blocks(model)
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
                for _ in range(3):
                    model(*arguments)
        own = {key: z.clone() for key, z in model.state_dict().items()}
        wanted = record(model, 2, 16, dtype=torch.bfloat16)(*arguments).sample
        replay = record(model, 2, 16, dtype=torch.bfloat16, frozen=True)
        assert torch.equal(replay(*arguments).sample, wanted)
        assert all(torch.equal(z, own[key]) for key, z in model.state_dict().items())

    def test_a_wait_is_refused_by_name_and_leaves_random_numbers_usable(self):
        model = self.model("sana")
        model.final_projection.register_forward_hook(
            lambda *z: print(end=f"{z[2].sum().item()}"[:0])
        )
        with pytest.raises(Unavailable, match=r"'sana' cannot be recorded: .*call the model"):
            record(model, 1, 16)
        torch.randn(3, device="cuda")
        with pytest.raises(RuntimeError), refuse_waits():
            torch.ones(1, device="cuda").item()
        assert torch.ones(1, device="cuda").item() == 1

    @pytest.mark.parametrize("attn", ["softmax", "sana", "dydila", "moh"])
    def test_compiled_blocks_are_recorded(self, attn):
        model = self.model(attn)
        arguments = inputs(2, 16, "cuda", channels=4)
        with torch.no_grad():
            exact = model(*arguments).sample
            with torch.autocast("cuda", torch.bfloat16):
                eager = model(*arguments).sample
        counters.clear()
        replay = record(compile_blocks(model), 2, 16, dtype=torch.bfloat16)
        assert not counters["graph_break"] and counters["stats"]["unique_graphs"] > 0
        found = replay(*arguments).sample
        assert (found - exact).abs().mean() <= 1.5 * (eager - exact).abs().mean()

    def test_what_modules_cached_outlives_a_call_of_another_size(self):
        model = self.model("sana")
        replay = record(model, 1, 16)
        arguments = inputs(1, 16, "cuda", channels=4)
        first = replay(*arguments).sample
        with torch.no_grad():
            model(*inputs(1, 8, "cuda", channels=4))
        with torch.cuda.stream(recording_stream()):  # takes what was freed
            junk = [
                torch.full((64, model.config.dim), torch.nan, device="cuda") for _ in range(99)
            ]
        torch.cuda.synchronize()
        assert len(junk) == 99 and torch.equal(replay(*arguments).sample, first)


def _fail():
    raise ValueError("of the call")


@needs_gpu
class TestCaptured:
    @pytest.mark.parametrize(
        ("how", "error"),
        [
            (_fail, ValueError),
            (torch.cuda.synchronize, RuntimeError),
            # As a weight's node does that was made on the default stream.
            (lambda: torch.cuda.default_stream().wait_stream(torch.cuda.current_stream()),
             RuntimeError),
        ],
        ids=["error", "wait", "default stream"],
    )  # fmt: skip
    def test_a_failed_one_leaves_the_process_usable(self, how, error):
        stream = torch.cuda.current_stream()
        x = torch.ones(4, device="cuda")

        def good():
            return x + torch.randn(4, device="cuda")

        def bad():
            good()
            if torch.cuda.is_current_stream_capturing():
                how()

        before, old = captured(lambda: x + 1)
        for _ in range(2):
            with pytest.raises(error):
                captured(bad)
        assert torch.cuda.current_stream() == stream
        assert torch.randn(3, device="cuda").isfinite().all()
        graph, out = captured(good)
        drawn = []
        for _ in range(2):
            torch.manual_seed(0)
            for _ in range(2):
                graph.replay()
                drawn.append(out.clone())
        assert torch.equal(drawn[0], drawn[2]) and torch.equal(drawn[1], drawn[3])
        assert not torch.equal(drawn[0], drawn[1])
        before.replay()
        assert torch.equal(old, x + 1)

    def test_garbage_with_an_autograd_graph_is_in_no_way(self):
        weight = torch.nn.Parameter(torch.ones(3, device="cuda"))
        garbage = [weight.square().sum()]
        garbage.append(garbage)
        del garbage

        def step():
            weight.grad = None
            weight.square().sum().backward()
            return weight.grad

        graph, gradient = captured(step)
        with torch.no_grad():
            weight.fill_(4)
        graph.replay()
        assert gradient.tolist() == [8.0] * 3
