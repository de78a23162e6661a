"""--compile: auto where it pays and works, on insists, off is what earlier runs go on with."""

import functools
from types import SimpleNamespace

import pytest
import torch

from backbones import build_backbone
from recipes import evaluate as evaluate_module
from recipes import sample as sample_module
from recipes import train as train_module
from recipes.lab import compiling
from recipes.lab.console import COMPILE_MODES, spelled_out
from recipes.lab.sampling import RunSampler
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.session import train
from recipes.lab.training.settings import Settings
from recipes.lab.training.trainer import Trainer

SMALL = {"attn": "sana", "batch_size": 4, "steps": 2, "sample_every": 1000}


@pytest.fixture
def broken(monkeypatch):
    """Compiled blocks that fail; compiling always pays."""

    def fail(*_):
        raise RuntimeError("no compiler\nto be found")

    compile_blocks = functools.partial(compiling.compile_blocks, backend=fail)
    monkeypatch.setattr(compiling, "compile_blocks", compile_blocks)
    monkeypatch.setattr(compiling, "pays", lambda *_: True)


@pytest.fixture
def counted(monkeypatch):
    """The models whose blocks were to be compiled."""
    made = []
    monkeypatch.setattr(compiling, "compile_blocks", lambda model, **_: made.append(model))
    return made


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--compile", "runs/a"], ["--compile=on", "runs/a"]),
        (["runs/a", "--compile"], ["runs/a", "--compile=on"]),
        (["--compile", "--cfg", "2"], ["--compile=on", "--cfg", "2"]),
        (["--compile", "off", "runs/a"], ["--compile", "off", "runs/a"]),
        (["--compile=auto", "runs/a"], ["--compile=auto", "runs/a"]),
        ([], []),
    ],
)
def test_a_bare_flag_takes_no_run_for_its_value(arguments, wanted):
    assert spelled_out(arguments) == wanted


@pytest.mark.parametrize("script", [sample_module, evaluate_module])
def test_a_run_may_follow_the_bare_flag(script, tmp_path):
    for arguments in (["--compile", "RUN"], ["RUN", "--compile"]):
        given = script._parser().parse_args(spelled_out(arguments))
        assert (given.run, given.compile) == ("RUN", "on")
    assert script._parser().parse_args(["RUN"]).compile == "auto"


def test_train_takes_the_bare_flag_and_words(tmp_path):
    assert train_module._parser().parse_args(["--compile"]).compile == "on"
    for mode in COMPILE_MODES:
        assert train_module._parser().parse_args(["--compile", mode]).compile == mode


def test_auto_pays_on_a_gpu_for_many_calls():
    model = build_backbone("sana", "tiny")
    assert not compiling.pays(model, 10**9)
    with torch.device("meta"):
        model = build_backbone("sana", "tiny")
    assert not compiling.pays(model, 10**9)


@pytest.mark.parametrize(
    ("mode", "pays", "times"),
    [("on", False, 1), ("off", True, 0), ("auto", True, 1), ("auto", False, 0)],
)
def test_the_mode_decides(mode, pays, times, counted, monkeypatch):
    monkeypatch.setattr(compiling, "pays", lambda *_: pays)
    trainer = Trainer(Settings(**SMALL, compile=mode))
    assert len(counted) == times and trainer.compiling.is_on == bool(times)


@pytest.mark.parametrize("graph", ["auto", "off"])
def test_training_goes_back_to_blocks_as_written(graph, broken, tmp_path, capsys):
    one, other = Run(tmp_path / "one"), Run(tmp_path / "other")
    assert train(Settings(**SMALL, cuda_graph=graph), one) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "not compiled" in line]
    assert said and said == [said[0]] and "no compiler to be found" in said[0]
    assert train(Settings(**SMALL, cuda_graph=graph, compile="off"), other) == 0
    losses = [[entry["loss"] for entry in run.read_log()] for run in (one, other)]
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_training_with_on_insists(broken):
    trainer = Trainer(Settings(**SMALL, compile="on"))
    with pytest.raises(RuntimeError, match="no compiler"):
        trainer.train_step()


def test_sampling_goes_back_to_blocks_as_written(broken, trained):
    lines, labels = [], torch.arange(3)
    options = {"steps": 3, "cfg": 2.0}
    found = RunSampler(trained, device="cpu", say=lines.append)(labels, **options)
    assert [line for line in lines if "not compiled" in line and "no compiler to be found" in line]
    assert torch.equal(found, RunSampler(trained, device="cpu", compile="off")(labels, **options))
    with pytest.raises(RuntimeError, match="no compiler"):
        RunSampler(trained, device="cpu", compile="on")(labels, **options)


@pytest.mark.parametrize("why", ["later", "another process is gone"])
def test_a_failure_of_another_cause_is_no_reason_to_go_back(why, counted, monkeypatch):
    monkeypatch.setattr(compiling, "pays", lambda *_: True)
    monkeypatch.setattr(compiling.failures, "is_echo", lambda error: "gone" in str(error))
    lines = []
    model = build_backbone("sana", "tiny")
    one = compiling.Compiling(model, "auto", 1, lines.append)
    if why == "later":
        assert one.attempt(lambda: 3) == 3

    def fail():
        raise RuntimeError(why)

    with pytest.raises(RuntimeError, match=why):
        one.attempt(fail)
    assert one.is_on and not lines


@pytest.mark.parametrize(
    ("device", "calls", "pays"),
    [("cuda", 5000, True), ("cuda", 4999, False), ("cpu", 10**6, False)],
)
def test_auto_compiles_on_a_gpu_what_is_called_often_enough(device, calls, pays):
    parameter = SimpleNamespace(device=torch.device(device))
    model = SimpleNamespace(parameters=lambda: iter([parameter]))
    assert compiling.pays(model, calls) is pays
