"""Whole models timed: checked before they are timed, written as they come, judged by goals."""

import contextlib
import dataclasses
import functools
import gc
import json
import os
import pickle
import shutil
import signal
import types

import pytest
import torch
from torch._inductor import config as inductor
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from attnzoo import registry
from attnzoo.errors import Unavailable
from bench.checks import WrongStep
from bench.whole_models import __main__ as whole_models
from bench.whole_models import by_recipe, process, profiles
from bench.whole_models import cases as whole_cases
from bench.whole_models import figures as whole_figures
from bench.whole_models.__main__ import main, planned
from bench.whole_models.by_recipe import RECIPES, Steps, measure_recipe
from bench.whole_models.cases import Case, Layer, LayerSubject, Setup, Subject
from bench.whole_models.measures import measure_launch, measure_layer, measure_over_before
from bench.whole_models.process import Elsewhere, Job
from recipes.lab.console import UserError
from tests.bench.answering import Asked, answers
from tests.bench.own import OWN
from tests.bench.whole_rows import case_row

TINY = ["--sizes", "tiny", "--tokens", "16", "--device", "cpu", "--backend", "eager",
        "--round-seconds", "0"]  # fmt: skip
ON_CPU = Setup("cpu", "eager", 0.0)


@pytest.fixture(autouse=True)
def checked_elsewhere(monkeypatch):
    monkeypatch.setattr(process, "check_layer", lambda *_: {})


@pytest.fixture
def forwards(monkeypatch):
    """Training steps are left out where they go the same way."""
    monkeypatch.setattr(whole_models, "MODES", ("forward",))


def run(tmp_path, *arguments):
    out = tmp_path / "whole.json"
    assert main(["--out", str(out), *TINY, *arguments]) == 0
    return json.loads(out.read_text())


def test_every_case_is_timed_with_softmax_and_printed(tmp_path, capsys):
    report = run(tmp_path, "--mechanisms", "sana,softmax")
    rows = {(row["mechanism"], row["mode"]): row for row in report["cases"]}
    assert len(rows) == 4 and not report["missed"]
    for (name, _), row in rows.items():
        assert row["seconds"].keys() == {"eager", "compiled"} and not row["missing"]
        assert row["errors"]["compiled"] <= 1e-3
        assert row["over_softmax"].keys() == (
            set() if name == "softmax" else row["seconds"].keys()
        )
        for ratio in row["over_softmax"].values():
            assert 0 < ratio["q1"] <= ratio["median"] <= ratio["q3"]
    capsys.readouterr()
    assert main(["--table", str(tmp_path / "whole.json")]) == 0
    said = capsys.readouterr().out
    assert report["commit"] in said and f"torch {torch.__version__}" in said
    assert "| sana " in said and "Not measured" not in said


def test_what_computes_something_else_is_not_timed(forwards, tmp_path, monkeypatch):
    real = whole_cases.compile_blocks

    def broken(model, **options):
        with torch.no_grad():
            model.final_projection.weight.mul_(1.01)
        return real(model, **options)

    monkeypatch.setattr(whole_cases, "compile_blocks", broken)
    [row] = run(tmp_path, "--mechanisms", "softmax")["cases"]
    assert row["seconds"].keys() == {"eager"}
    assert "differs from the eager step" in row["missing"]["compiled"]


def test_a_mechanism_that_differs_from_its_reference_is_not_timed(forwards, tmp_path, monkeypatch):
    def check(mechanism, *_):
        if mechanism == "sana":
            raise ValueError("it differs")

    monkeypatch.setattr(process, "check_layer", check)
    report = run(tmp_path, "--mechanisms", "softmax,sana")
    assert {row["mechanism"] for row in report["cases"]} == {"softmax"}
    assert [miss["reason"] for miss in report["missed"]] == ["ValueError: it differs"]


def test_why_a_compiler_failed_can_be_sent_to_another_process(monkeypatch):
    def fails(*_):
        raise NotImplementedError("no such call", json)  # a module has no pickle

    monkeypatch.setattr(process, "compile_ahead", fails)
    job = process.Job("cases", "softmax", whole_cases.Case("softmax", "tiny", 16, "forward"))
    with pytest.raises(RuntimeError, match=r"NotImplementedError: .*no such call") as raised:
        process.compile_job(job, whole_cases.Setup("cpu", "eager"))
    assert "no such call" in str(pickle.loads(pickle.dumps(raised.value)))


def test_a_run_without_time_left_says_what_it_lacks(tmp_path, capsys):
    report = run(tmp_path, "--mechanisms", "softmax", "--seconds", "0")
    assert not report["cases"] and len(report["missed"]) == 2
    assert "raise --seconds" in capsys.readouterr().out


def test_what_was_measured_before_a_crash_is_there(tmp_path, monkeypatch):
    real, done = process.measure_case, []

    def dying(*arguments):
        if done:
            raise KeyboardInterrupt
        done.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(process, "measure_case", dying)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "--mechanisms", "softmax")
    assert len(json.loads((tmp_path / "whole.json").read_text())["cases"]) == 1


def test_a_second_run_goes_on_with_what_is_missing(forwards, tmp_path, monkeypatch):
    first = run(tmp_path, "--mechanisms", "softmax", "--skip-compiled", "softmax")
    for row in first["cases"]:
        assert row["seconds"].keys() == {"eager"}
        assert row["missing"] == {"compiled": "left out by --skip-compiled"}
    second = run(tmp_path, "--mechanisms", "softmax,sana", "--resume")
    assert second["datetime"] == first["datetime"] and len(second["cases"]) == 2
    assert all(row["seconds"].keys() == {"eager", "compiled"} for row in second["cases"])
    monkeypatch.setattr(process, "measure_case", None)  # nothing is measured twice
    third = run(tmp_path, "--mechanisms", "softmax,sana", "--resume")
    assert third["cases"] == second["cases"] and not third["missed"]
    out = tmp_path / "whole.json"
    out.write_text(json.dumps(third | {"commit": "another"}))
    with pytest.raises(UserError, match=r"another.*without --resume"):
        run(tmp_path, "--resume")


def test_models_are_compared_at_their_fastest_though_a_treatment_lacks(forwards, tmp_path):
    report = run(tmp_path, "--mechanisms", "softmax,sana", "--skip-compiled", "sana")
    assert len(report["cases"]) == 2
    for row in report["cases"]:
        if row["mechanism"] == "sana":
            assert row["over_softmax"].keys() == {"eager"}
            assert row["over_fastest"]["ours"] == "eager"
            assert row["over_fastest"]["softmax"] in ("eager", "compiled")
            assert whole_figures.over_fastest(row)[0] > 0
        else:
            assert row["over_fastest"] is None and whole_figures.over_fastest(row) is None


def test_a_training_step_leaves_no_graph_behind():
    step = Subject(Case("moh", "tiny", 16, "train"), ON_CPU)
    marked = []

    def mark(module, inputs, output):
        nodes = [output.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is not None and "marked" not in node.metadata:
                node.metadata["marked"] = True
                marked.append(node.name())
                nodes += [following for following, _ in node.next_functions]

    with step.model.final_projection.register_forward_hook(mark):
        step.step()
    gc.collect()
    left = [p.expand_as(p).grad_fn.next_functions[0][0].metadata for p in step.parameters]
    assert any("AccumulateGrad" in name for name in marked)
    assert not any(left) and not any(average.requires_grad for average in step.average)


def test_what_breaks_a_process_breaks_no_other_job():
    bench = Elsewhere(None, None, answers)
    try:
        found = [bench.answer(Asked(part), 30.0)[0] for part in ("layers", "peaks", "layers")]
        first, second, third = (row["process"] for row in found if row is not None)
        assert first == second != third != os.getpid()
        assert all(row["seconds"] == 25 for row in found)  # a training ends before the process
        row, reason = bench.answer(Asked("launches"), 30.0)
        assert row is None and "exit code 3" in reason
        row, reason = bench.answer(Asked("check"), 1.0)
        assert row is None and reason == "took longer than 1 s"
        assert bench.answer(Asked("layers"), 30.0)[0] is not None
    finally:
        bench.close()


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A file that registers "timed-mean", for this test alone."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    file = tmp_path / "mine.py"
    file.write_text(OWN.format("timed-mean"))
    return file


def test_a_mechanism_of_ones_own_is_timed_and_a_changed_one_is_not_mixed_in(
    forwards, tmp_path, own
):
    asked = "--import", str(own), "--mechanisms", "softmax,timed-mean"
    report = run(tmp_path, *asked, "--skip-compiled", "softmax,timed-mean")
    assert {row["mechanism"] for row in report["cases"]} == {"softmax", "timed-mean"}
    assert report["imports"]["timed-mean"]["source"] == str(own)
    cls = registry._REGISTRY.pop("timed-mean")
    assert run(tmp_path, "--mechanisms", "softmax", "--resume")["imports"] == report["imports"]
    registry._REGISTRY["timed-mean"] = cls
    own.write_text(own.read_text() + "# changed\n")
    with pytest.raises(UserError, match=r"'timed-mean' of .*has changed"):
        run(tmp_path, *asked, "--resume")
    with pytest.raises(UserError, match=r"unknown mechanism 'mine'.*--import"):
        run(tmp_path, "--mechanisms", "mine")


def test_other_processes_import_what_the_command_line_names(tmp_path, own, monkeypatch):
    options = whole_models._options(["--out", str(tmp_path / "out.json"), "--import", str(own)])
    assert whole_models.Run(options).setup.imports == (str(own),)
    monkeypatch.delitem(registry._REGISTRY, "timed-mean")
    own.rename(renamed := own.with_name("other.py"))
    setup, ahead = dataclasses.replace(ON_CPU, imports=(str(renamed),)), []
    monkeypatch.setattr(process, "compile_ahead", lambda case, _: ahead.append(case.mechanism))
    process.compile_job(Job("cases", case=Case("timed-mean", "tiny", 16, "forward")), setup)
    assert ahead == ["timed-mean"] and "timed-mean" in registry._REGISTRY


def test_a_failing_job_says_why_and_what_follows_is_measured(own):
    bench = Elsewhere(dataclasses.replace(ON_CPU, imports=(str(own),)), None)
    try:
        layer = Layer("softmin", 16, "forward", ("recorded",), width=96)
        row, reason = bench.answer(Job("layers", "softmin", layer), 120.0)
        assert row is None and reason.startswith("InvalidValue") and "softmin" in reason
        peaks = {"float32": 1.0, "copy": 1.0}
        for name in ("sana", "timed-mean"):
            layer = dataclasses.replace(layer, mechanism=name)
            row, _ = bench.answer(Job("layers", name, layer, peaks=peaks), 120.0)
            assert row["seconds"]["recorded"]["median"] > 0
    finally:
        bench.close()


def test_goals_come_first_and_small_before_large():
    models = dict.fromkeys(("S", "L"), (256, 1024, 4096, 16384))
    cases = planned(["agent", "sana", "softmax"], models, "cuda")
    assert len(cases) == len(set(cases)) == 3 * 8 * 2
    places = {case: index for index, case in enumerate(cases)}
    assert cases[0] == Case("softmax", "S", 4096, "forward")
    assert places[Case("sana", "L", 16384, "train")] < places[Case("agent", "S", 4096, "forward")]
    # Two models of size L are held at once, each under three treatments.
    large = [Case("sana", "L", tokens, "train") for tokens in (1024, 4096, 16384)]
    assert [case.batch * case.tokens for case in large] == [16384] * 3
    assert Case("sana", "L", 4096, "forward").batch == 4
    assert Case("sana", "S", 4096, "train").batch == 16
    assert Case("sana", "S", 256, "train").batch == 64
    assert Case("sana", "S", 576, "forward").resolution == 384
    some = planned(["agent", "sana", "softmax"], models, "cuda", ("sana",))
    assert {case.mechanism for case in some if case.size == "L"} == {"sana"}
    assert len(some) == 3 * 4 * 2 + 4 * 2


@pytest.mark.parametrize("mode", ["forward", "train"])
def test_a_layer_is_held_to_the_longer_of_its_floors(mode):
    slow = {"float32": 1e9, "copy": 1e-3}
    layer = Layer("sana", 16, mode, ("recorded",), width=32)
    found = measure_layer(layer, ON_CPU, slow)
    moved = (6 * 16 * 32 + 4 * 32**2 + 32) * 4 * (3 if mode == "train" else 1)
    assert found["bound"] == "memory" and found["bytes"] == moved
    assert found["floor"] == pytest.approx(moved / 1e6)
    found = measure_layer(layer, ON_CPU, slow | {"copy": 1e9})
    assert found["bound"] == "products"
    assert found["floor"] == pytest.approx(2 * found["macs"] / 1e18)


@pytest.mark.parametrize("mode", ["forward", "train"])
def test_a_layer_is_compiled_checked_and_timed_both_ways(mode, monkeypatch):
    peaks, compiled = {"float32": 1e9, "copy": 1.0}, Setup("cpu", "aot_eager", 0.0)
    layer = Layer("moh", 16, mode, width=32)
    real, calls = whole_cases.compile_modules, []

    def watched(modules, **options):
        calls.append(options)
        real(modules, **options)

    monkeypatch.setattr(whole_cases, "compile_modules", watched)
    found = measure_layer(layer, compiled, peaks)
    assert calls == [{"backend": "aot_eager"}] and not found["missing"]
    assert found["seconds"].keys() == {"recorded", "compiled"} == found["errors"].keys()
    seconds = {name: spent["median"] for name, spent in found["seconds"].items()}
    best = min(seconds, key=seconds.__getitem__)
    assert whole_figures.fastest(found) == (seconds[best], best)
    with inductor.patch(compile_threads=1):
        assert whole_cases.compile_ahead(layer, compiled) == layer.name and len(calls) == 2

    def broken(modules, **options):
        with torch.no_grad():
            modules[0].layer.proj.weight.mul_(1.01)

    monkeypatch.setattr(whole_cases, "compile_modules", broken)
    found = measure_layer(layer, compiled, peaks)
    assert found["seconds"].keys() == {"recorded"}
    assert "differs from the eager step" in found["missing"]["compiled"]


def test_another_implementation_is_held_to_the_usual_one(monkeypatch):
    layer = Layer("deltanet", 16, "train", ("recorded",), "reference", width=64)
    peaks = {"float32": 1e9, "copy": 1.0}
    row = measure_layer(layer, ON_CPU, peaks)
    assert row["impl"] == "reference" and row["errors"]["recorded"] < 1e-4
    usual = row | {"impl": "", "seconds": {"compiled": {"median": 2.0}}}
    row["seconds"] = {"recorded": {"median": 0.5}}
    report = {name: [] for name in ("launches", "cases")} | {"layers": [usual, row]}
    [goal] = whole_figures.figures(report)
    assert goal.value == pytest.approx(2 / usual["floor"]) and "compiled" in goal.note
    assert "deltanet, reference n=16 train 4.00" in whole_figures._over_others(report)
    real = LayerSubject._train

    def wrong(subject):
        real(subject)
        if subject.case.impl:
            subject.x.grad.mul_(2)

    monkeypatch.setattr(LayerSubject, "_train", wrong)
    with pytest.raises(WrongStep, match=r"recorded: .*differs from the eager step"):
        measure_layer(layer, ON_CPU, peaks)


def test_layers_are_compiled_ahead_and_what_is_late_is_timed_without(tmp_path, monkeypatch):
    ahead = []

    def late(self, jobs):
        ahead.extend(job.name for job in jobs if job.is_compiled)
        return {"layer sana n=16 train": "was not compiled in time"}

    monkeypatch.setattr(whole_models.Run, "_compile_ahead", late)
    peaks = {"float32": 1.0, "copy": 1.0}
    monkeypatch.setattr(whole_models.machine, "measure_peaks", lambda *_: peaks)
    report = run(tmp_path, "--mechanisms", "sana", "--parts", "layers")
    assert ahead == ["layer sana n=16 forward", "layer sana n=16 train"] and not report["cases"]
    forward, train = report["layers"]
    assert forward["seconds"].keys() == {"recorded", "compiled"} and not forward["missing"]
    assert train["seconds"].keys() == {"recorded"}
    assert train["missing"] == {"compiled": "was not compiled in time"}
    # As layers were before they were compiled: what is not there at all comes first.
    old = {name: value for name, value in forward.items() if name not in ("treatments", "missing")}
    out = tmp_path / "whole.json"
    out.write_text(json.dumps(report | {"layers": [old | {"seconds": 1.0}]}))
    again = run(tmp_path, "--mechanisms", "sana", "--parts", "layers", "--resume")
    assert [row["mode"] for row in again["layers"]] == ["train", "forward"]
    assert again["layers"][1]["seconds"].keys() == {"recorded", "compiled"}


def test_a_launch_is_counted_in_products():
    found = measure_launch("sana", ON_CPU, tokens=16, width=32)
    assert found["seconds"] > found["bmm_seconds"] > 0
    assert 1 < found["launches"]["median"] < 1000


def test_a_recipe_is_started_as_a_user_starts_it_and_cut_off(monkeypatch):
    real, begun = by_recipe.start, []

    def start(script, processes, output, root):
        words = {"S": "tiny", "64": "16", "on": "off"}
        changed = [words.get(word, word) for word in script]
        process = real([*changed, "--patch-size", "4"], processes, output, root)
        begun.append((script, process))
        return process

    monkeypatch.setattr(by_recipe, "start", start)
    row = measure_recipe("train", "sana", "compiled", ON_CPU, steps=Steps(1, 2, 0.0, most=10**6))
    assert row["images_per_second"] > 0 and row["way"] == "compiled" and 2 <= row["steps"] < 10**6
    [(script, process)] = begun
    assert script[-4:] == ["--cuda-graph", "on", "--compile", "on"]
    assert process.returncode == -signal.SIGKILL
    broken = ["-c", "import sys; sys.exit('it is broken')"]
    monkeypatch.setattr(by_recipe, "start", lambda _, *others: real(broken, *others))
    with pytest.raises(WrongStep, match=r"train\.py ended with 1: it is broken"):
        measure_recipe("train", "sana", "eager", ON_CPU)
    with pytest.raises(WrongStep, match="took longer than 0 s"):
        measure_recipe("train", "sana", "eager", ON_CPU, patience=0.0)
    if torch.cuda.device_count() < 2:
        with pytest.raises(Unavailable, match=r"needs 2 GPUs, and there (is|are)"):
            measure_recipe("train on GPUs", "dydila", "two GPUs", ON_CPU)


def test_a_profile_says_what_a_step_consists_of(tmp_path, capsys):
    assert "profile" not in whole_models.DEFAULT_PARTS
    few = ("--mechanisms", "sana", "--parts", "profile")
    report = run(tmp_path, *few)
    assert not report["cases"] and len(report["profile"]) == 2 and not report["missed"]
    for row in report["profile"]:
        found, seconds = row["profiles"]["eager"], row["seconds"]["eager"]["median"]
        assert found["busy"] + found["gaps"] == pytest.approx(seconds, rel=1e-4)
        spent = [kernel[2] for kernel in found["longest"]]
        assert spent == sorted(spent, reverse=True) and 0 < sum(spent) < found["busy"]
        assert len(spent) == 12 < found["kernels"]
    said = capsys.readouterr().out
    assert said.count("<details>") == 2 and "| aten::addmm" in said
    assert "<summary>sana tiny 64px train, eager: the longest kernels</summary>" in said
    again = run(tmp_path, *few, "--resume")
    assert again["profile"] == report["profile"]
    assert capsys.readouterr().out.startswith(str(report["device_name"]))  # nothing was measured


def test_a_layers_profile_says_what_its_step_consists_of(tmp_path, capsys):
    few = ("--mechanisms", "sana", "--parts", "layer-profile")
    report = run(tmp_path, *few)
    assert not report["layers"] and not report["missed"]
    assert [row["mode"] for row in report["layer-profile"]] == ["forward", "train"]
    said = capsys.readouterr().out
    assert "<summary>sana layer 64px train, recorded: the longest kernels</summary>" in said
    again = run(tmp_path, *few, "--resume")
    assert again["layer-profile"] == report["layer-profile"]


def test_kernels_of_a_replay_are_told_from_the_hosts_calls(monkeypatch):
    def event(name, microseconds, kind=DeviceType.CUDA, **others):
        return FunctionEvent(1, name, 0, 7.0, 7.0 + microseconds, device_type=kind, **others)

    replay = [event("gemm", 30.0), event("gemm", 50.0), event("norm<float>", 100.0),
              event("Memset (Device)", 2.0), event("Memcpy DtoD (Device -> Device)", 4.0),
              event("step", 500.0, is_user_annotation=True),
              event("cudaGraphLaunch", 900.0, DeviceType.CPU)]  # fmt: skip
    monkeypatch.setattr(profiles.torch.cuda, "synchronize", lambda: None)
    events, replayed = lambda: replay * len(replayed), []
    traced = contextlib.nullcontext(types.SimpleNamespace(events=events))
    monkeypatch.setattr(profiles, "profile", lambda **_: traced)
    found = profiles._parts(lambda: replayed.append(1), 200e-6, "cuda")
    assert len(replayed) == profiles._REPLAYS
    assert (found["kernels"], found["memsets"], found["copies"]) == (3, 1, 1)
    assert found["busy"] == pytest.approx(186e-6) and found["gaps"] == pytest.approx(14e-6)
    names, counts, spent = zip(*found["longest"], strict=True)
    assert names[:3] == ("norm<float>", "gemm", "Memcpy DtoD (Device -> Device)")
    assert counts[:2] == (1, 2) and spent[:2] == pytest.approx((100e-6, 80e-6))
    replay = replay[-2:]
    with pytest.raises(Unavailable, match="sees no kernel"):
        profiles._parts(lambda: None, 1.0, "cuda")


def test_which_steps_of_a_training_count():
    steps = Steps(settling=2, least=3, seconds=5.0, most=9)
    assert steps.counted([9.0, 9.0, 2.0, 2.0]) is None  # too few
    assert steps.counted([9.0, 9.0, *[1.0] * 4]) is None  # too short
    assert steps.counted([9.0, 9.0, *[1.0] * 5]) == [1.0] * 5
    assert steps.counted([9.0, 9.0, *[0.1] * 6]) is None
    assert steps.counted([9.0, 9.0, *[0.1] * 7]) == [0.1] * 7  # no more will come


def test_what_cannot_end_in_time_is_not_started(tmp_path, monkeypatch):
    options = whole_models._options(["--out", str(tmp_path / "x.json"), *TINY])
    run, asked = whole_models.Run(options), []

    class Answering(Elsewhere):
        def answer(self, job, seconds):
            asked.append(job.name)
            return {}, ""

    run._bench = Answering(ON_CPU, None)
    clock = [100.0]
    monkeypatch.setattr(whole_models.time, "monotonic", lambda: clock[0])
    run.end, run._wrong = 120.0, {"dydila": None}
    job = Job("recipes", "dydila", recipe=("train", "compiled"))
    row, reason = run._measured(job)
    assert row is None and not asked
    assert reason == "takes about 25 s, and 20 were left; raise --seconds, or go on with --resume"
    assert run._measured(Job("launches", "dydila"))[0] is not None
    run._taken["train"] = 15.0  # as another took
    assert run._measured(job)[0] is not None and len(asked) == 2


def test_sampling_is_checked_and_timed(monkeypatch):
    shallow = functools.partial(whole_cases.build_model, depth=1)
    monkeypatch.setattr(by_recipe, "build_model", shallow)
    short = functools.partial(by_recipe._sampling, images=1)
    monkeypatch.setattr(by_recipe, "_sampling", short)
    row = measure_recipe("sample", "softmax", "eager", Setup("cpu", "eager", 0.0))
    assert row["images_per_second"] > 0
    monkeypatch.setattr(by_recipe, "relative_error", lambda *_: 0.5)
    with pytest.raises(WrongStep, match="images differ"):
        measure_recipe("sample", "softmax", "eager", Setup("cpu", "eager", 0.0))


@pytest.fixture
def older(tmp_path):
    """A checkout whose recipes do not compute, but keep what they were asked for."""
    folder = tmp_path / "before-a69f5a4"
    for package in ("backbones", "recipes", "recipes/diffusion"):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").touch()
    (folder / "recipes" / "train.py").write_text(
        "import backbones, json, pathlib, sys\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
        "out.mkdir()\n"
        "(out / 'log.jsonl').write_text('{\"seconds\": 0.5}\\n' * 60)\n"
        "note = pathlib.Path(backbones.__file__).with_name('asked.json')\n"
        "note.write_text(json.dumps(sys.argv))\n"
    )
    (folder / "attnzoo.py").write_text("def auxiliary_loss(model): return None")
    (folder / "backbones" / "__init__.py").write_text(
        "import time, torch\n"
        "class Model(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.gate = torch.nn.Parameter(torch.zeros(1))\n"
        "    def forward(self, images, times, labels, return_dict):\n"
        "        time.sleep(0.06 if self.training else 0.03)\n"
        "        return (torch.cat((images, images), 1) / self.gate,)\n"
        "def build_backbone(*asked):\n"
        "    *model, pixels = asked\n"
        "    assert model in (['dydila', 'S', 'controlled'], ['softmax', 'tiny', 'controlled'])\n"
        "    assert pixels == (256 if 'S' in model else 64)\n"
        "    return Model()\n"
    )
    (folder / "recipes" / "diffusion" / "__init__.py").write_text(
        "import time, torch\n"
        "DIFFUSION_PRESETS = {'dit': None}\n"
        "def sample(model, preset, *, labels, shape, cfg, batch_size, steps, **others):\n"
        "    assert (shape, cfg, batch_size, steps in (3, 20)) == ((4, 32, 32), 4.0, 16, True)\n"
        "    time.sleep((0.01 if torch.is_autocast_enabled('cpu') else 0.1) * steps / 20)\n"
        "    return torch.zeros(len(labels))\n"
    )
    return folder


def test_an_older_checkout_is_timed_by_its_own_recipes(older, tmp_path):
    found, commit = whole_models._older(older)
    assert (found, commit) == (older, "a69f5a4")
    setup = dataclasses.replace(ON_CPU, before=found, before_commit=commit, seconds=0.1)
    trained = measure_recipe("train", "dydila", "before", setup)
    assert (trained["images_per_second"], trained["steps"]) == (128, 50)
    assert trained["commit"] == "a69f5a4"
    asked = json.loads((older / "backbones" / "asked.json").read_text())
    assert asked[asked.index("--attn") + 1] == "dydila" and "--cuda-graph" not in asked
    sampled = measure_recipe("sample", "dydila", "before", setup)
    assert sampled["float32_images_per_second"] < 160 < sampled["images_per_second"] < 1600
    rows = [
        trained, sampled, trained | {"way": "eager", "images_per_second": 256.0},
        trained | {"way": "compiled", "images_per_second": 640.0},
    ]  # fmt: skip
    report = {name: [] for name in ("launches", "layers", "cases")} | {"recipes": rows}
    [goal] = whole_figures.figures(report)
    assert (goal.goal, goal.value) == ("E2", 5.0)
    assert goal.note == "compiled 640 images/s, before (a69f5a4) 128"
    arguments = ["--out", str(tmp_path / "x.json"), "--before", str(older)]
    run = whole_models.Run(whole_models._options([*arguments, "--parts", "recipes"]))
    jobs = {job.name: job for job in run._planned()}
    names = list(jobs)
    # What goals compare comes first, one beside the other.
    assert names[:4] == ["train before softmax", "train compiled softmax",
                         "train before dydila", "train compiled dydila"]  # fmt: skip
    assert {name.split()[0] for name in names[4:8]} == {"sample"}
    assert {name.split()[1] for name in names[4:8]} == {"before", "compiled"}
    assert {name.split()[1] for name in names[-8:]} == {"recorded", "eager"}
    # What is compiled on the way is run once before, and is no figure.
    with inductor.patch(compile_threads=1):
        process.compile_job(jobs["sample before dydila"], setup)
    assert jobs["train compiled dydila"].is_compiled
    assert not jobs["train recorded dydila"].is_compiled
    assert not jobs["train on GPUs one GPU dydila"].is_compiled
    assert not [name for name in names if "GPUs before" in name or name.startswith("layer")]
    with pytest.raises(UserError, match="give --parts recipes,before, too"):
        main([*arguments, "--parts", "cases"])


def test_softmax_is_held_to_an_older_checkout_in_turn(older, tmp_path):
    setup = Setup("cpu", "aot_eager", 0.3, older, "a69f5a4")
    rows = []
    ways = {"forward": (0.03, ("recorded", "compiled")), "train": (0.06, ("recorded",))}
    for mode, (least, treatments) in ways.items():
        case = Case("softmax", "tiny", 16, mode, treatments)
        row = measure_over_before(case, setup)
        spent = {name: found["median"] for name, found in row["seconds"].items()}
        assert spent.keys() == {"before", *treatments} and not row["missing"]
        assert least <= spent["before"] < 3 * least  # of one, though several are taken in a row
        over, best = row["over_before"], row["over_before"]["ours"]
        assert spent[best] == min(spent[name] for name in treatments)
        assert 0 < over["q1"] <= over["median"] <= over["q3"] and over["rounds"] == 5
        rows.append(row | {"treatments": case.treatments})
    seconds = {"before": 4.0, "recorded": 2.0, "compiled": 1.0}
    rows[1]["seconds"] = {name: {"median": value} for name, value in seconds.items()}
    rows[1]["over_before"] |= {"ours": "compiled", "median": 0.25}
    today = case_row("softmax", 4096, {}, recorded=2.0, compiled=1.0)
    report = {name: [] for name in ("launches", "layers")}
    report |= {"before": rows, "cases": [today, today | {"mode": "train"}]}
    forward, train = whole_figures.figures(report)
    assert forward.goal == train.goal == "E6" and train.value == 0.25
    # A goal says what it is over, and nothing is hidden.
    assert "fastest over recorded at commit a69f5a4, S, 4096 tokens, training step" in train.what
    assert train.note == ("compiled 1000.00 ms, before 4000.00; "
                          "compiled blocks over today's recorded alone 0.500")  # fmt: skip
    del report["before"]
    forward, train = whole_figures.figures(report)
    assert "compiled blocks over recorded alone" in train.what and train.value == 0.5
    # It is planned beside the model of that size, and known again.
    arguments = ["--out", str(tmp_path / "x.json"), "--mechanisms", "softmax", "--parts", "before"]
    run = whole_models.Run(whole_models._options([*arguments, "--before", str(older)]))
    names = [job.name for job in run._planned()]
    row = rows[0] | {"size": "S", "tokens": 4096}
    assert len(names) == 2 and names[0] == whole_models._name_of(row)
    assert names[0] not in (Case("softmax", "S", 4096, "forward").name, names[1])
    with pytest.raises(UserError, match="name it by --before FOLDER"):
        main(arguments)


def test_what_is_no_older_checkout_is_refused(older, tmp_path):
    with pytest.raises(UserError, match=r"has no recipes/train\.py"):
        whole_models._older(tmp_path)
    unnamed = older.rename(tmp_path / "older")
    with pytest.raises(UserError, match="name end with its commit"):
        whole_models._older(unnamed)
    shutil.rmtree(unnamed / "backbones")
    setup = dataclasses.replace(ON_CPU, before=unnamed)
    with pytest.raises(WrongStep, match=r"before\.py ended with 1"):
        measure_recipe("sample", "dydila", "before", setup)


def test_one_mode_may_be_asked_for(tmp_path):
    arguments = ["--out", str(tmp_path / "x.json"), "--mechanisms", "sana", "--modes", "train"]
    run = whole_models.Run(whole_models._options([*arguments, "--parts", "cases,layers"]))
    assert {job.case.mode for job in run._planned()} == {"train"}
    assert {job.part for job in run._planned()} == {"cases", "layers"}


def test_what_a_gpu_is_asked_for_beside_models(tmp_path, monkeypatch):
    arguments = ["--out", str(tmp_path / "x.json"), "--device", "cuda", "--mechanisms"]
    found = {}
    monkeypatch.setattr(whole_models.machine, "describe", lambda *_: {})
    monkeypatch.setattr(whole_models.importlib.util, "find_spec", lambda name: name)
    for names in ("softmax,dydila,gated", "sana", "deltanet,zigma"):
        run = whole_models.Run(whole_models._options([*arguments, names]))
        found[names] = [job.name for job in run._others()]
    names = found["softmax,dydila,gated"]
    assert len(names) == len(set(names)) == 3 * 9 + 2 * 3 + 2 * 3 + 2 + 2 + 2
    assert "train compiled dydila" in names and "scans forward" in names
    # What goals name comes before the others' layers and models.
    run = whole_models.Run(whole_models._options([*arguments, "gated,dydila"]))
    places = {job.name: place for place, job in enumerate(run._planned())}
    ordered = ("dydila S 1024px train", "layer dydila n=4096 train", "dydila L 512px train",
               "sample eager dydila", "layer gated n=4096 train", "layer gated, fla n=4096 train",
               "gated S 1024px train")  # fmt: skip
    assert sorted(ordered, key=places.__getitem__) == list(ordered)
    assert len(found["sana"]) == 9
    # zigma has an implementation by that name for another state than its own.
    others = [name for name in found["deltanet,zigma"] if "fla" in name]
    assert others == ["layer deltanet, fla n=4096 forward", "layer deltanet, fla n=4096 train"]
    rows = [
        {"recipe": recipe, "mechanism": name, "way": way}
        for (recipe, ones), ways in RECIPES.items()
        for name in ones
        for way in ways
    ]
    rows += [{"mode": mode, "over_fla": {}} for mode in ("forward", "train")]
    rows += [dataclasses.asdict(Layer("gated", 4096, "train", impl=impl)) for impl in ("", "fla")]
    assert {whole_models._name_of(row) for row in rows} < set(names)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "x.json", "--mechanisms", "softmin"], "'softmax'"),
        (["--out", "x.json", "--tokens", "200"], "squares"),
        (["--out", "x.json", "--tokens", "0"], "squares"),
        (["--out", "x.json", "--mechanisms", ","], "--mechanisms , names none"),
        (["--out", "x.json", "--parts", ","], "--parts , names none"),
        (["--out", "x.json", "--sizes", "XL"], "unknown size 'XL'"),
        (["--out", "x.json", "--parts", "layer"], "unknown part 'layer'; choose of cases, layers"),
        (["--out", "x.json", "--modes", "step"], "unknown mode 'step'; choose of forward, train"),
        (["--out", "x.json", "--parts", "layers", "--no-layers"], "short for --parts cases"),
        ([], "either --out"),
        (["--out", "x.json", "--table", "x.json"], "either --out"),
    ],
)
def test_mistakes_are_one_line(arguments, said):
    with pytest.raises(UserError, match=said):
        main(arguments)


@pytest.mark.parametrize("flag", ["--seconds", "--patience", "--round-seconds"])
@pytest.mark.parametrize("value", ["nan", "-1", "inf", "much"])
def test_a_run_that_would_never_end_or_never_begin_is_refused(flag, value, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "x.json"), *TINY, f"{flag}={value}"])
    assert f"{flag}: must be a number from 0 on, got '{value}'" in capsys.readouterr().err
    assert not os.listdir(tmp_path)


def test_what_cannot_be_measured_leaves_the_file_as_it_is(tmp_path):
    out = tmp_path / "whole.json"
    out.write_text("older")
    arguments = ["--out", str(out), "--sizes", "tiny", "--tokens", "16", "--mechanisms", "sana"]
    cases = [(["--device", "cpu", "--parts", "scans"], "--parts scans has nothing to measure")]
    if not torch.cuda.is_available():
        cases.append((["--device", "cuda"], "--device cuda: PyTorch sees no GPU"))
    for flags, said in cases:
        with pytest.raises(UserError, match=said):
            main([*arguments, *flags])
    assert out.read_text() == "older"
