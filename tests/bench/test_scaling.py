"""Trainings of several processes are timed, checked, written as they come, judged by goals."""

import dataclasses
import json
import os
import time
from typing import ClassVar

import pytest
import torch

from attnzoo import registry
from bench import reports
from bench.scaling import __main__ as scaling
from bench.scaling import checks as scaling_checks
from bench.scaling import figures as scaling_figures
from bench.scaling.__main__ import main
from bench.scaling.cases import MECHANISMS, WAYS, Case, planned, write_latents
from bench.scaling.checks import Checks
from bench.scaling.worker import measure
from recipes.lab.console import UserError
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.settings import Settings
from tests.bench.own import OWN

TINY = ["--device", "cpu", "--size", "tiny", "--tokens", "16"]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "scaling.json"


def report_of(out, *arguments):
    assert main(["--out", str(out), *TINY, *arguments]) == 0
    return json.loads(out.read_text())


def row_of(case, speed=1.0, **changed):
    found = {
        "mechanism": case.mechanism, "tokens": case.tokens, "gpus": case.gpus, "way": case.way,
        "size": case.size, "saves": case.saves, "images": case.images, "treatment": "launched",
        "notes": [], "seconds": {"median": 0.02, "q1": 0.01, "q3": 0.03}, "loss": 1.0,
        "images_per_second": speed, "making_a_batch": 0.001, "waiting_for_a_batch": 0.0,
        "until_the_second_step": 1.0, "peak_memory": 0, "checkpoint": None,
    }  # fmt: skip
    return found | changed


def test_a_case_is_timed_as_train_py_takes_its_steps(tmp_path):
    latents, case = tmp_path / "latents", Case("sana", 16, 1, size="tiny", saves=True)
    write_latents(latents, 16)
    run = Run(tmp_path / "run")
    run.make()
    row = measure(case, latents, run)
    entries = run.read_log()
    assert [entry["step"] for entry in entries] == list(range(1, case.steps + 1))
    assert row["loss"] == entries[-1]["loss"] and 0.1 < row["loss"] < 10
    logged = [entry["seconds"] for entry in entries[case.steps // 3 :]]
    assert min(logged) <= row["seconds"]["median"] < 1.1 * max(logged)
    assert row["images_per_second"] == pytest.approx(2 / row["seconds"]["median"])
    assert row["treatment"] == "launched" and "needs a GPU" in row["notes"][0]
    assert row["making_a_batch"] > 0 and row["waiting_for_a_batch"] < row["seconds"]["median"]
    assert row["checkpoint"]["bytes"] > 1e6 and row["checkpoint"]["seconds"] > 0


def test_two_processes_shard_and_the_one_that_fails_says_why(out, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reports, "names_in", lambda pattern: ())  # any name
    monkeypatch.setattr(scaling, "_PROCESSES", 2)  # else two starts, side by side
    report = report_of(out, "--gpus", "2", "--mechanisms", "sana,softmin", "--ways", "fsdp2",
                       "--parts", "training")  # fmt: skip
    (row,), (miss,) = report["training"], report["missed"]
    assert (row["gpus"], row["way"], row["images"]) == (2, "fsdp2", 2)
    assert row["treatment"] == "launched" and "--sharded" in row["notes"][0]
    assert row["checkpoint"]["bytes"] > 1e6 and row["images_per_second"] > 0
    assert miss["what"].startswith("softmin") and "unknown attention" in miss["reason"]
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- scaling -->\nold\n<!-- /scaling -->\nafter\n")
    capsys.readouterr()
    assert main(["--table", str(out), "--into", str(page)]) == 0
    said, written = capsys.readouterr().out, page.read_text()
    assert report["commit"] in said and "| sana " in said and "FSDP2" in said
    assert said.strip() in written and "old" not in written and written.endswith("after\n")
    assert main(["--table", str(out), "--also", str(out), str(out)]) == 0
    assert capsys.readouterr().out.count(said.strip()) == 3


def test_a_mechanism_of_ones_own_is_trained_in_other_processes(out, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    (tmp_path / "scaled_mean.py").write_text(OWN.format("scaled-mean"))
    monkeypatch.chdir(tmp_path)  # where a module is found, too
    report = report_of(out, "--gpus", "1", "--mechanisms", "scaled-mean", "--ways", "overlapped",
                       "--parts", "training", "--import", "scaled_mean")  # fmt: skip
    assert [row["mechanism"] for row in report["training"]] == ["scaled-mean"]
    assert report["imports"]["scaled-mean"]["source"] == "scaled_mean"


class Played:
    """A ``Launch`` that answers at once: "broken" fails, "slow" never ends."""

    started: ClassVar[list] = []

    def __init__(self, cases, devices, folder, imports):
        assert cases and not folder.exists()
        self.cases, self.is_closed = list(cases), False
        self.started.append(([case.name for case in cases], devices))

    def rows(self):
        good = []
        while self.cases and self.cases[0].mechanism not in ("broken", "slow"):
            good.append(row_of(self.cases.pop(0)))
        return good

    def failure(self, patience):
        return "it broke" if self.cases[0].mechanism == "broken" else None

    def close(self):
        assert not self.is_closed
        self.is_closed = True


@pytest.fixture
def played(monkeypatch):
    monkeypatch.setattr(Played, "started", [])
    monkeypatch.setattr(scaling, "Launch", Played)
    monkeypatch.setattr(reports, "names_in", lambda pattern: ())  # any name
    return Played.started


def test_what_fails_is_named_and_the_others_are_measured(out, played):
    names = "softmax,broken,sana"
    report = report_of(out, "--gpus", "8", "--ways", "overlapped", "--parts", "training",
                       "--mechanisms", names)  # fmt: skip
    assert [row["mechanism"] for row in report["training"]] == ["softmax", "sana"]
    broken = "broken tiny 16 tokens overlapped on 8"
    assert report["missed"] == [{"what": broken, "reason": "it broke"}]
    assert [len(names) for names, _ in played] == [3, 1]
    again = report_of(out, "--gpus", "8", "--ways", "overlapped", "--parts", "training",
                      "--mechanisms", names, "--resume")  # fmt: skip
    assert again["training"] == report["training"] and len(again["missed"]) == 1
    assert [names for names, _ in played[2:]] == [[broken]]
    out.write_text(json.dumps(report | {"commit": "another"}))
    with pytest.raises(UserError, match=r"another.*without --resume"):
        report_of(out, "--resume")


@pytest.mark.parametrize(
    ("reason", "is_tried"), [("it broke", True), ("took longer than 9 s", False)]
)
def test_what_fails_recorded_is_tried_launched(out, played, monkeypatch, reason, is_tried):
    class Once(Played):
        def rows(self):
            good = []
            while self.cases and not self.cases[0].recorded:
                good.append(row_of(self.cases.pop(0)))
            return good

        def failure(self, patience):
            return reason

    monkeypatch.setattr(scaling, "Launch", Once)
    options = scaling._options(["--out", str(out), *TINY, "--gpus", "2", "--parts", "training",
                                "--mechanisms", "sana,agent", "--ways", "ddp"])  # fmt: skip
    options.device, options.there, options.resume = "cuda", 2, False
    monkeypatch.setattr(scaling.nccl, "version", lambda: (2, 28))
    monkeypatch.setattr(reports.machine, "describe", lambda *_: {"versions": {}})
    report = scaling.Run(options).measure()
    first, second = report["training"]
    assert first["notes"] == [f"its recorded step failed: {reason}"] and not report["missed"]
    # Where it hung, the others are spared the wait.
    assert ("as that of sana" in second["notes"][0]) != is_tried
    assert len(played) == (3 if is_tried else 2)


def test_a_run_without_time_left_says_what_it_lacks(out, played):
    report = report_of(out, "--gpus", "1,2", "--mechanisms", "slow", "--seconds", "0.3")
    assert not report["training"] and not report["checks"]
    # Two ways on one and on two, and three checks.
    assert len(report["missed"]) == 4 + 3
    assert all("--resume" in miss["reason"] for miss in report["missed"])


def test_one_gpu_comes_first_and_groups_get_gpus_of_their_own(out, played, monkeypatch):
    waves = planned(MECHANISMS, (1, 2, 4), (256, 4096), WAYS, "L", 4)
    shape = [[(group[0].gpus, {case.way for case in group}, len(group)) for group in wave]
             for wave in waves]  # fmt: skip
    assert shape == [
        [(1, {"overlapped", "fsdp2"}, 4)] * 4,  # one reduction of one GPU would be the first
        [(4, {"overlapped"}, 8)], [(2, {"overlapped"}, 4)] * 2,
        [(4, {"bf16"}, 8)], [(2, {"bf16"}, 4)] * 2,
        [(4, {"fsdp2"}, 8)], [(2, {"fsdp2"}, 4)] * 2, [(4, {"25MB"}, 8)], [(2, {"25MB"}, 4)] * 2,
        [(4, {"ddp"}, 8)], [(2, {"ddp"}, 4)] * 2,
    ]  # fmt: skip
    cases = [case for wave in waves for group in wave for case in group]
    assert len({case.name for case in cases}) == len(cases) == 4 * 2 * (2 + 2 * 5)
    assert waves[1][0][0] == Case("softmax", 256, 4, "overlapped", "L", saves=True)
    alone = planned(["sana"], (1,), (256,), ("ddp",), "L", 4)
    assert [case.way for wave in alone for group in wave for case in group] == ["ddp"]
    assert [case.name for case in cases if case.saves] == [
        f"softmax L 256 tokens {way} on 4" for way in WAYS
    ]
    monkeypatch.setattr(scaling, "write_latents", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(scaling.nccl, "version", lambda: (2, 28))
    monkeypatch.setattr(reports.machine, "describe", lambda *_: {"device_name": "x",
                                                                 "versions": {}})  # fmt: skip
    assert main(["--out", str(out), "--device", "cuda", "--parts", "training"]) == 0
    places = [list(devices) for _, devices in played]
    assert places[:5] == [[0], [1], [2], [3], [0, 1, 2, 3]] and places[5:7] == [[0, 1], [2, 3]]


def test_what_is_trained_is_the_recipe_of_dit(tmp_path):
    one, four = (Case("sana", 256, gpus, "fsdp2").settings(tmp_path) for gpus in (1, 4))
    assert (one.batch_size, four.batch_size) == (32, 128)
    assert (one.sharded, one.cuda_graph) == (False, "off")
    assert (four.sharded, four.cuda_graph) == (True, "auto")
    assert four.precision == "bf16" and four.compile == "auto" and four.size == "L"
    four = Case("sana", 4096, 4).settings(tmp_path)
    assert four.batch_size == 32 and four.bucket_mb == Settings().bucket_mb
    others = [("ddp", {"bucket_mb": 0}), ("25MB", {"bucket_mb": 25}),
              ("bf16", {"gradient_sums": "bf16"})]  # fmt: skip
    for way, changed in others:
        other = Case("sana", 4096, 4, way).settings(tmp_path)
        assert dataclasses.replace(four, **changed) == other != four


def test_shares_are_of_the_same_way_on_one_gpu_and_judged():
    rows = [
        row_of(Case("sana", 256, 1), 100.0), row_of(Case("sana", 256, 1, "fsdp2"), 80.0),
        row_of(Case("sana", 256, 4), 380.0, checkpoint={"seconds": 5.0, "bytes": 2e9}),
        row_of(Case("sana", 256, 2), 170.0), row_of(Case("sana", 256, 4, "fsdp2"), 240.0),
        row_of(Case("dydila", 256, 4), 300.0), row_of(Case("sana", 4096, 4), 40.0),
        row_of(Case("sana", 256, 4, "ddp"), 340.0),
    ]  # fmt: skip
    rows = [row | {"beside": 0} for row in rows]
    check = {"check": "encode", "processes": 4, "equal": False, "shards": 3, "images": 9}
    report = {
        "training": rows, "checks": [check], "missed": [{"what": "x", "reason": "y"}],
        "gpus": 4, "device": "cuda", "device_name": "H", "versions": {}, "commit": "c",
        "datetime": "2026-01-01",
    }  # fmt: skip
    assert scaling_figures.share_of_linear(report, rows[4]) == pytest.approx(0.75)
    assert scaling_figures.share_of_linear(report, rows[5]) is None
    assert scaling_figures.share_of_linear(report, rows[7]) == pytest.approx(0.85)
    found = [(f.goal, f.what, f.value, f.verdict) for f in scaling_figures.figures(report)]
    assert [(goal, value, verdict) for goal, _, value, verdict in found] == [
        ("E13", pytest.approx(0.85), "minimum missed"), ("E13", pytest.approx(0.95),
                                                         "target reached"),
    ]  # fmt: skip
    assert "sana, 2 GPUs" in found[0][1]
    # A file of before the overlap has the goal from its one reduction.
    before = [row | {"way": "ddp"} for row in (rows[0], rows[3])]
    (figure,) = scaling_figures.figures(report | {"training": before})
    assert figure.value == pytest.approx(0.85)
    said = scaling_figures.tables(report)
    assert (
        "380 (0.95)" in said and "340 (0.85)" in said and "240 (0.75)" in said and "4 x H" in said
    )
    # 5 s of saving beside 5000 steps of 20 ms.
    assert "4.76%" in said and "are DIFFERENT" in said and "not measured: x: y" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "either --out"),
        (["--out", "x.json", "--table", "y.json"], "either --out"),
        (["--out", "x.json", "--gpus", "16"], "--gpus 16: take at most the 8 processes"),
        (["--out", "x.json", "--gpus", "two"], "--gpus takes positive integers"),
        (["--out", "x.json", "--tokens", "²"], "--tokens takes positive integers"),
        (["--out", "x.json", "--gpus", ","], "numbers such as"),
        (["--out", "x.json", "--gpus", "0"], "--gpus takes positive integers"),
        (["--out", "x.json", "--tokens", "200"], "must be a square"),
        (["--out", "x.json", "--mechanisms", "softmaxx"], "softmax"),
        (["--out", "x.json", "--mechanisms", ","], "names none"),
        (["--out", "x.json", "--ways", "fsdp"], "fsdp2"),
        (["--out", "x.json", "--parts", "kil"], "kill"),
        (["--out", "x.json", "--into", "page.md"], "--into is for --table"),
        (["--out", "x.json", "--also", "y.json"], "--also is for --table"),
        (["--table", "nowhere.json"], "nowhere.json"),
        (["--out", "/proc/none/x.json"], "/proc/none"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UserError, OSError)) as raised:
        main([*arguments, *([] if "--table" in arguments else ["--device", "cpu"])])
    assert words in str(raised.value) and "\n" not in str(raised.value)
    assert not os.listdir(tmp_path)


def test_another_file_is_no_file_of_scaling(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError, match=r"no file of python -m bench\.scaling"):
        main(["--table", str(tmp_path / "x.json")])


@pytest.mark.parametrize(
    ("row", "check", "words"),
    [
        ({"images_per_second": 0.0}, {}, "images_per_second is 0.0"),
        ({"gpus": 0}, {}, "gpus is 0"),
        ({"checkpoint": {"seconds": 1.0}}, {}, "checkpoint has no bytes"),
        ({"checkpoint": 3}, {}, r"training\[0\].checkpoint is 3"),
        ({"beside": {}}, {}, r"training\[0\].beside is {}"),
        ({}, {"check": "encode", "equal": None}, r"checks\[0\].equal is None"),
        ({}, {"check": "encode", "shards": None}, "encode.shards is None"),
        ({}, {"check": "kill"}, "kill has no mechanism"),
        ({}, {"check": "sleep"}, "has the check 'sleep'; known are kill, encode"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_line(row, check, words, tmp_path):
    check = [{"processes": 2, "equal": True, **check}] if check else []
    report = {
        "training": [row_of(Case("sana", 16, 1), beside=0) | row], "checks": check, "missed": [],
        "gpus": 1, "device": "cpu", "device_name": "C", "versions": {}, "commit": "c",
        "datetime": "2026-01-01",
    }  # fmt: skip
    file = tmp_path / "x.json"
    file.write_text(json.dumps(report))
    with pytest.raises(UserError, match=words):
        main(["--table", str(file)])


def test_a_way_counts_once_and_one_of_a_later_version_is_named(tmp_path):
    assert scaling._chosen("--ways", "bf16,ddp,bf16", list(WAYS)) == ["bf16", "ddp"]
    report = {
        "training": [row_of(Case("sana", 16, 1, "fp8"), beside=0)], "checks": [], "missed": [],
        "gpus": 1, "device": "cpu", "device_name": "C", "versions": {}, "commit": "c",
        "datetime": "2026-01-01",
    }  # fmt: skip
    file = tmp_path / "x.json"
    file.write_text(json.dumps(report))
    with pytest.raises(UserError, match=r"x\.json has the way 'fp8'; known are overlapped, bf16"):
        main(["--table", str(file)])


def test_runs_that_differ_in_one_number_are_found(tmp_path):
    runs = [Run(tmp_path / name) for name in ("one", "other")]
    for run, value in zip(runs, (1.0, 1.5), strict=True):
        tensors = {"a": torch.ones(3), "b": torch.tensor([0.0, value])}
        run.save(4, {"model/x.safetensors": tensors}, {}, {})
    assert scaling_checks._differences(runs[0], runs[0]) == (2, 2, 0.0)
    assert scaling_checks._differences(*runs) == (1, 2, 0.5)


def test_a_check_that_cannot_be_made_says_why(tmp_path, monkeypatch):
    real = scaling_checks.start

    def start(script, processes, devices, output):
        return real(["-c", "import sys; sys.exit('it is broken')"], 1, devices, output)

    monkeypatch.setattr(scaling_checks, "start", start)
    checks = Checks(2, None, tmp_path / "checks", time.monotonic() + 30)
    found = {name: (row, reason) for name, row, reason in checks.run(("kill", "encode"))}
    assert all(row is None and "it is broken" in reason for row, reason in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_all_of_it_with_processes(out, processes):
    report = report_of(out, "--gpus", f"1,{processes}", "--mechanisms", "sana,dydila")
    assert not report["missed"] and len(report["training"]) == 2 * 2 * 2
    assert [check["check"] for check in report["checks"]] == ["kill", "encode", "evaluate"]
    assert all(check["equal"] for check in report["checks"])
    kill = report["checks"][0]
    assert kill["equal_before"] and kill["ended_by_itself"]
    assert kill["resumed_from"] <= kill["at_step"] < 10 and kill["killed"] == processes - 1
