"""Steps decided on the device, and recorded: the numbers of the eager loop, nothing lost."""

import gc
import json
import sys
import weakref

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import attnzoo
from attnzoo import registry
from backbones.cast_once import CastWeights
from recipes import train as train_module
from recipes.lab.console import INTERRUPTED, UserError
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.memory import step_bytes
from recipes.lab.training.session import train
from recipes.lab.training.settings import Settings
from recipes.lab.training.state import load_checkpoint, save_checkpoint
from recipes.lab.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("no_pictures")

SMALL = {"batch_size": 8, "checkpoint_every": 4, "sample_every": 1000, "diagnose_every": 1000}
# Elsewhere rounding differs between the two; TestGraph compares there.
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="of the core, on a CPU")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def on_device(monkeypatch):
    """Every trainer decides on its device, as on a GPU; on a CPU there is no graph."""
    own = Trainer.__init__

    def initialize(self, *arguments, **options):
        own(self, *arguments, **options)
        if self.recorded is None:
            self.decide_on_device()

    monkeypatch.setattr(Trainer, "__init__", initialize)


def deciding(trainer):
    trainer.decide_on_device()
    return trainer


def poison(monkeypatch, *steps):
    original = Trainer._batch

    def batch(self):
        index = self.step + len(self._queued)
        images, *rest = original(self)
        return (images * float("nan") if index in steps else images, *rest)

    monkeypatch.setattr(Trainer, "_batch", batch)


def state(trainer):
    """Everything that a step changes."""
    moments = {
        f"{name}/{key}": value
        for name, parameter in trainer.model.named_parameters()
        for key, value in trainer.optimizer.state.get(parameter, {}).items()
    }
    average = {f"average/{name}": value for name, value in trainer.average.shadow.items()}
    found = {**trainer.model.state_dict(), **average, **moments}
    return {name: tensor.clone().cpu() for name, tensor in found.items()}


def same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def near(one, other, tolerance):
    for name, tensor in one.items():
        torch.testing.assert_close(
            tensor, other[name], rtol=tolerance, atol=tolerance, check_dtype=False, msg=name
        )


def log(run):
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in run.read_log()]


def saved(run):
    _, folder = run.newest_checkpoint(warn=pytest.fail)
    return {
        f"{file.parent.name}/{name}": tensor
        for file in folder.rglob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


@on_cpu
@pytest.mark.parametrize(
    "options",
    [
        {"attn": "sana"},
        {"attn": "dydila", "accumulate": 2},
        {"attn": "sana", "warmup_steps": 2, "decay": "cosine", "weight_decay": 0.1},
    ],
)
def test_a_step_on_the_device_is_the_eager_step(options):
    settings = Settings(**SMALL | options, steps=9)
    eager, device = Trainer(settings), deciding(Trainer(settings))
    for _ in range(4):
        one, other = eager.train_step()[0], device.train_step()[0]
        assert one.keys() == other.keys()
        for name in one:
            assert one[name] == pytest.approx(other[name], rel=2e-4), name
    near(state(eager), state(device), 1e-4)


@on_cpu
@pytest.mark.parametrize("decide", [lambda trainer: trainer, deciding], ids=["eager", "device"])
def test_weights_that_are_cast_once_learn_as_those_of_autocast(decide, monkeypatch):
    settings = Settings(**SMALL, attn="dydila", accumulate=2, steps=9, precision="bf16")
    one, other = decide(Trainer(settings)), decide(Trainer(settings))
    monkeypatch.setattr(other, "casts", CastWeights(nn.Linear(1, 1), lambda: None))
    assert not other.casts.pairs
    for _ in range(3):
        assert one.train_step() == other.train_step()
    same(state(one), state(other))
    assert len(one.casts.pairs) > 40
    assert all(
        z.dtype == torch.float32 for z in one.model.state_dict().values() if z.is_floating_point()
    )


@on_cpu
@pytest.mark.parametrize(("precision", "is_cast"), [("bf16", True), ("fp32", False)])
def test_weights_are_cast_before_a_step_is_recorded(precision, is_cast, on_device, monkeypatch):
    """A loop records before its first step, and a recording goes on with what it was made of."""
    trainer = Trainer(Settings(**SMALL, attn="sana", steps=9, precision=precision))
    found = []
    monkeypatch.setattr(trainer.recorded, "record", lambda _: found.append(trainer.casts))
    trainer.recorded.is_tried = False
    trainer.record()
    assert [casts is not None for casts in found] == [is_cast]


@on_cpu
def test_a_step_that_is_not_finite_leaves_everything_as_it_was(monkeypatch):
    poison(monkeypatch, 2)
    settings = Settings(**SMALL, attn="dydila", steps=9, warmup_steps=4, weight_decay=0.1)
    eager, device = Trainer(settings), deciding(Trainer(settings))
    for trainer in (eager, device):
        trainer.train_step()
        trainer.train_step()
    before = state(device)
    assert str(device.train_step()) == str(eager.train_step())  # NaN is not equal to itself
    same(before, state(device))
    assert device.skipped == device.skipped_in_a_row == 1
    assert device.train_step()[0]["skipped_in_all"] == 1 and device.skipped_in_a_row == 0
    assert not torch.equal(before["class_embedding.weight"], device.model.class_embedding.weight)


@on_cpu
def test_an_idle_step_changes_nothing(on_device):
    """As they run before a recording."""
    trainer = Trainer(Settings(**SMALL, attn="dydila", steps=9))
    trainer.train_step()
    before = state(trainer)
    trainer.recorded._is_idle.fill_(1)
    trainer.recorded.step_on_device(trainer._batch())
    same(before, state(trainer))
    trainer.recorded._is_idle.zero_()
    trainer.recorded.step_on_device(trainer._batch())
    assert not torch.equal(before["final_projection.bias"], trainer.model.final_projection.bias)


def test_a_step_is_queued_before_the_one_before_is_read(on_device):
    trainer = Trainer(Settings(**SMALL, attn="sana", steps=9))
    queue, events = trainer.recorded, []

    class Noting:
        is_tried = True

        def __call__(self, *arguments, **options):
            number = sum(what == "queued" for what, _ in events)
            numbers = queue(*arguments, **options)
            events.append(("queued", number))
            return lambda: events.append(("read", number)) or numbers()

    trainer.recorded = Noting()
    entries = [trainer.train_step(ahead=ahead)[0] for ahead in (True, True, False)]
    assert [entry["step"] for entry in entries] == [1, 2, 3] and not trainer.is_ahead
    order = "queued 0, queued 1, read 0, queued 2, read 1, read 2"
    assert ", ".join(f"{what} {number}" for what, number in events) == order


@pytest.mark.parametrize("attn", ["softmax", "dydila"])
def test_a_run_ahead_is_resumed_exactly_and_stops_at_what_it_logged(attn, on_device, tmp_path):
    settings = Settings(**SMALL | {"attn": attn}, steps=11)
    whole, parts = Run(tmp_path / "whole"), Run(tmp_path / "parts")
    assert train(settings, whole) == 0
    assert train(settings, parts, should_stop=lambda step: step == 5) == INTERRUPTED
    step, _ = parts.newest_checkpoint(warn=pytest.fail)
    assert step == parts.read_log()[-1]["step"] == 6  # the one that was begun comes first
    assert train(settings, parts, resume=True) == 0
    assert log(whole) == log(parts) and len(log(whole)) == 11
    same(saved(whole), saved(parts))
    trainer = Trainer(settings)
    assert log(whole) == [trainer.train_step()[0] for _ in range(11)]


def test_too_many_steps_that_are_not_finite_stop_a_run_ahead(on_device, tmp_path, monkeypatch):
    poison(monkeypatch, 5, 6, 7, 8)
    run = Run(tmp_path / "run")
    assert train(Settings(**SMALL, attn="sana", steps=20, skip_limit=3), run) == 3
    assert [entry["step"] for entry in run.read_log()] == list(range(1, 9))
    assert run.newest_checkpoint(warn=pytest.fail)[0] == 4


@pytest.mark.parametrize("options", [{"attn": "softmax"}, {"attn": "dydila", "accumulate": 2}])
def test_an_estimate_of_memory_keeps_no_autograd_graph(options):
    """A weight's node of the default stream would break a recording."""
    trainer = Trainer(Settings(**SMALL | options, steps=9))
    weights = [*trainer.model.parameters()]

    def nodes():
        return [torch.autograd.graph.get_gradient_edge(weight).node.metadata for weight in weights]

    def mark(*_):
        for metadata in nodes():
            metadata["of the estimate"] = True

    trainer.model.register_forward_hook(mark)
    assert step_bytes(trainer) > 0
    gc.collect()
    assert not any(nodes())


def test_a_trainer_that_nothing_uses_keeps_no_memory():
    """A graph holds the memory of a step; what comes next in the process wants it."""
    trainer = Trainer(Settings(**SMALL, steps=9))
    deciding(trainer).train_step()
    trainer.batches.close()
    gone = weakref.ref(trainer)
    gc.collect()
    gc.disable()
    try:
        del trainer
        assert gone() is None
    finally:
        gc.enable()


@on_cpu
@pytest.mark.parametrize("first", ["eager", "device"])
def test_a_checkpoint_goes_on_in_the_other_mode(first, tmp_path):
    settings = Settings(**SMALL, attn="sana", steps=20)
    trainers = [Trainer(settings), deciding(Trainer(settings))]
    one, other = trainers if first == "eager" else trainers[::-1]
    for _ in range(4):
        one.train_step()
    run = Run(tmp_path)
    save_checkpoint(one, run)
    load_checkpoint(other, *run.newest_checkpoint(warn=pytest.fail))
    assert other.train_step()[0]["loss"] == pytest.approx(one.train_step()[0]["loss"], rel=1e-5)
    near(state(one), state(other), 1e-4)


class TestChoice:
    @on_cpu
    def test_auto_says_why_not_and_on_refuses(self, tmp_path, capsys):
        run = Run(tmp_path / "run")
        arguments = ["--attn", "sana", "--steps", "1", "--batch-size", "4", "--out", run.folder]
        assert train_module.main([*map(str, arguments)]) == 0
        said = capsys.readouterr().out.splitlines()
        assert [line for line in said if "needs a GPU" in line and "eagerly" in line]
        assert run.config()["settings"]["cuda_graph"] == "auto"
        arguments = [*arguments[:-1], tmp_path / "other", "--cuda-graph", "on"]
        with pytest.raises(UserError, match=r"--cuda-graph on is not possible.*GPU") as caught:
            train_module.main([*map(str, arguments)])
        assert "\n" not in str(caught.value) and not (tmp_path / "other").exists()

    def test_shards_are_a_reason(self):
        trainer = Trainer(Settings(**SMALL, attn="sana"))
        trainer.is_sharded = True
        assert "--sharded" in trainer._why_not_recorded()

    def test_off_says_nothing(self, tmp_path, capsys):
        settings = Settings(**SMALL, attn="sana", steps=1, cuda_graph="off")
        assert train(settings, Run(tmp_path / "run")) == 0
        assert "eagerly" not in capsys.readouterr().out

    @pytest.mark.parametrize("compiled", [None, False])
    def test_a_run_from_before_goes_on_eagerly(self, compiled, tmp_path, capsys):
        run = Run(tmp_path / "run")
        first = Settings(**SMALL, attn="sana", steps=2, cuda_graph="off", compile="off")
        assert train(first, run) == 0
        config = json.loads(run.config_file.read_text())
        del config["settings"]["cuda_graph"], config["settings"]["compile"]
        if compiled is not None:
            config["settings"]["compile"] = compiled
        run.config_file.write_text(json.dumps(config))
        more = ["--out", str(run.folder), "--steps", "4", "--allow-change", "steps"]
        assert train_module.main(more) == 0
        assert run.config()["changes"][-1]["changes"] == ["steps: 2 -> 4"]
        assert train(Settings(**SMALL, attn="sana", steps=4), run, resume=True) == 0
        assert "eagerly" not in capsys.readouterr().out
        assert run.config()["settings"]["compile"] == "off"
        for flag, name in (("--cuda-graph", "cuda_graph"), ("--compile", "compile")):
            with pytest.raises(UserError, match=f"--allow-change {name}"):
                train_module.main(["--out", str(run.folder), flag, "on"])


NOISY = """
import torch
import attnzoo

@attnzoo.register_attention("noisy")
class Noisy(attnzoo.Attention):
    def __init__(self, context, config):
        super().__init__(context, config)
        self.value = torch.nn.Linear(self.dim, self.dim)

    def forward(self, x, grid):
        HERE
        return torch.nn.functional.dropout(self.value(x), 0.5, self.training)
"""


@pytest.fixture
def noisy(tmp_path):
    def forget():
        registry._REGISTRY.pop("noisy", None)
        registry._SOURCES.pop("noisy", None)
        for name in [name for name in sys.modules if name.startswith("attnzoo_noisy_")]:
            del sys.modules[name]

    def register(here):
        forget()
        file = tmp_path / "noisy.py"
        file.write_text(NOISY.replace("HERE", here))
        attnzoo.import_mechanisms(str(file))

    yield register
    forget()


def test_noise_inside_a_mechanism_depends_on_the_step_alone(on_device, noisy, tmp_path):
    noisy("pass")
    settings = Settings(**SMALL, attn="noisy", steps=8)
    whole, parts = Run(tmp_path / "whole"), Run(tmp_path / "parts")
    assert train(settings, whole) == 0
    assert train(settings, parts, should_stop=lambda step: step == 3) == INTERRUPTED
    assert train(settings, parts, resume=True) == 0
    assert log(whole) == log(parts)
    same(saved(whole), saved(parts))


@needs_gpu
class TestGraph:
    """What is recorded, on a GPU."""

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    @pytest.mark.parametrize("attn", ["softmax", "sana", "dydila", "moh"])
    def test_a_recording_leaves_the_state_and_replays_the_step(self, attn, precision):
        settings = Settings(**SMALL, attn=attn, steps=50, precision=precision, cuda_graph="on")
        graph, plain = Trainer(settings), Trainer(settings)
        plain.recorded.is_tried = True  # the same step, launched
        before = state(graph)
        start = [parameter.detach().clone() for parameter in graph.model.parameters()]
        graph.record()
        found = state(graph)
        same(before, {name: found[name] for name in before})
        for name in found.keys() - before.keys():
            assert not found[name].any(), name  # moments begin at 0
        for _ in range(5):
            one, other = graph.train_step()[0], plain.train_step()[0]
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-2)
        moved, wanted = (
            torch.cat([(p.detach() - old).flatten() for p, old in zip(of, start, strict=True)])
            for of in (graph.model.parameters(), plain.model.parameters())
        )
        # Adam divides differences of rounding by small gradients.
        assert wanted.norm() > 0 and (moved - wanted).norm() < 0.3 * wanted.norm()
        counts = [s["step"].item() for s in graph.optimizer.state.values()]
        assert counts and set(counts) == {5.0}

    @pytest.mark.parametrize(
        "options",
        [{"attn": "softmax"}, {"attn": "dydila"}, {"attn": "sana", "accumulate": 2},
         {"attn": "softmax", "preset": "dit", "compile": "on"}, {"attn": "noisy"}],
    )  # fmt: skip
    def test_a_recorded_run_is_resumed_exactly(self, options, noisy, tmp_path):
        noisy("pass")
        own = {"size": "tiny", "precision": "bf16", "cuda_graph": "on"}
        settings = Settings(**SMALL | own | options, steps=11)
        whole, parts = Run(tmp_path / "whole"), Run(tmp_path / "parts")
        assert train(settings, whole) == 0
        assert train(settings, parts, should_stop=lambda step: step == 5) == INTERRUPTED
        assert train(settings, parts, resume=True) == 0
        assert log(whole) == log(parts)
        same(saved(whole), saved(parts))

    def test_a_skipped_step_leaves_everything_as_it_was(self, monkeypatch):
        poison(monkeypatch, 2)
        trainer = Trainer(Settings(**SMALL, attn="dydila", steps=9, cuda_graph="on"))
        trainer.train_step()
        trainer.train_step()
        before = state(trainer)
        assert "nan" in trainer.train_step()[0]["skipped"]
        same(before, state(trainer))
        assert trainer.train_step()[0]["loss"] is not None

    def test_a_smaller_batch_is_launched_eagerly(self):
        trainer = Trainer(Settings(**SMALL, attn="dydila", steps=9, cuda_graph="on"))
        trainer.train_step()
        few = [tensor[:3] for tensor in trainer._batch()]
        numbers = trainer.recorded(few, rate=1e-4, share=0.1, wants_stop=False)
        assert numbers()[0] > 0
        assert trainer.train_step()[0]["loss"] > 0

    @pytest.mark.parametrize(
        "here", ["x = x * float(x.mean() > -9)", "torch.cuda.synchronize()"], ids=["value", "wait"]
    )
    def test_what_cannot_be_recorded_is_launched(self, here, noisy, tmp_path, capsys):
        noisy(here)
        settings = Settings(**SMALL, attn="noisy", steps=3)
        run = Run(tmp_path / "run")
        assert train(settings, run) == 0
        said = capsys.readouterr().out.splitlines()
        assert len([line for line in said if "launched eagerly" in line]) == 1
        noisy("pass")
        recorded = Trainer(settings)
        assert log(run)[0]["loss"] == pytest.approx(recorded.train_step()[0]["loss"], rel=1e-3)
        assert not recorded.why_eager

    def test_on_refuses_what_cannot_be_recorded(self, noisy):
        noisy("x = x * float(x.mean() > -9)")
        trainer = Trainer(Settings(**SMALL, attn="noisy", steps=3, cuda_graph="on"))
        with pytest.raises(UserError, match="--cuda-graph on is not possible") as caught:
            trainer.train_step()
        assert "\n" not in str(caught.value)
