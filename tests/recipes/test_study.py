"""Studies: plans, the launcher, and runs that are measured."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import sys
import time
import types
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

from attnzoo import get_attention, list_attention
from backbones.presets import SIZES
from recipes import study
from recipes.lab import files
from recipes.lab.console import UserError
from recipes.lab.data import datasets
from recipes.lab.data.datasets import load_dataset, share
from recipes.lab.files import CannotWrite, write_json
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.settings import Settings
from recipes.studies.comparison import execution
from recipes.studies.comparison.plan import check_plan
from recipes.studies.quality import launch, seconds, table
from recipes.studies.quality.plans import (
    CONTROLS,
    CONVOLVED,
    RESOLUTION,
    STUDIES,
    Scale,
    macs_of,
    study_runs,
)
from recipes.studies.quality.seconds import read_seconds

ROOT = Path(__file__).parents[2]
TINY = Scale(model="96x4", data="digits", steps=10, seeds=4, precision="fp32")
AT = {"resolutions": [8]}


@pytest.fixture()
def launching(monkeypatch):
    """What a launcher changes of its process is as it was before."""
    for name in ("CUDA_VISIBLE_DEVICES", "PYTORCH_NVML_BASED_CUDA_CHECK"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


class TestPlan:
    def test_every_variant_can_be_built_and_every_claim_names_two_of_them(self):
        for one in STUDIES.values():
            runs = study_runs(one, TINY, {}, protocols=["depth"], **AT)
            check_plan([run.planned for run in runs], warn=lambda line: None)
            labels = [variant.label for variant in one.variants]
            assert len(labels) == len({*labels})
            named = {name for claim in one.claims for name in (claim.first, claim.second)}
            assert named <= {*labels}
            assert len({claim[1:3] for claim in one.claims}) == len(one.claims)

    def test_every_mechanism_with_a_convolution_of_values_is_controlled(self):
        has_option = {
            name
            for name in list_attention()
            if any(f.name == "conv" for f in dataclasses.fields(get_attention(name).Config))
        }
        # DeltaNet convolves queries and keys too, as part of its rule; softmax has none by itself.
        assert {*CONVOLVED} == has_option - {"deltanet", "softmax"}

    def test_first_come_main_variants_and_three_seeds_at_all_resolutions(self):
        runs = study_runs(RESOLUTION, TINY, {}, resolutions=[4, 8], protocols=["depth"])
        first = runs[: 3 * 2 * len(RESOLUTION.tiers[0])]
        assert {one.planned.label for one in first} == {v.label for v in RESOLUTION.tiers[0]}
        seen = [(one.planned.settings.resolution, one.planned.settings.seed) for one in first]
        assert {*seen} == {(side, seed) for side in (4, 8) for seed in range(3)}
        assert runs[len(first)].planned.settings.seed == 3

    def test_the_largest_model_is_size_s_at_the_rate_that_was_asked(self):
        large = dataclasses.replace(TINY, model="384x12", learning_rate=1e-3)
        settings = study_runs(RESOLUTION, large, {}, protocols=["depth"], **AT)[0].planned.settings
        assert settings.learning_rate == 1e-3 and settings.accumulate == 1
        size = SIZES["S"]
        heads = size.dim // size.head_dim
        assert settings.backbone == {"dim": size.dim, "depth": size.depth, "num_heads": heads}

    def test_micro_steps_are_a_run_of_its_own_and_the_table_says_so(self, tmp_path):
        runs = [
            study_runs(RESOLUTION, dataclasses.replace(TINY, accumulate=count), {},
                       protocols=["depth"], **AT)[0]
            for count in (1, 2)
        ]  # fmt: skip
        assert runs[0].planned.name != runs[1].planned.name
        rows = table.collect(tmp_path, runs, {})
        assert list(rows["arithmetic"]) == ["fp32", "fp32, 2 micro-steps"]

    def test_equal_macs_are_as_near_as_blocks_allow(self):
        (softmax, *others) = study_runs(
            CONTROLS, TINY, {}, protocols=["MACs"], only=["softmax", "dydila", "conv"], **AT
        )[:3]
        target = macs_of(softmax.planned.settings, 4)
        for one in others:
            settings = one.planned.settings
            depth = settings.backbone["depth"]
            off = {d: abs(macs_of(settings, d) - target) for d in (depth - 1, depth, depth + 1)}
            assert min(off, key=off.__getitem__) == depth

    def test_equal_time_is_by_steps_and_wants_to_be_measured(self, tmp_path):
        only = {"protocols": ["time"], "only": ["softmax", "sana"], **AT}
        known = {("softmax", 8): 0.02, ("sana", 8): 0.01}
        steps = [r.planned.settings.steps for r in study_runs(RESOLUTION, TINY, known, **only)[:2]]
        assert steps == [10, 20]
        with pytest.raises(UserError, match="'sana' at 8 px are not known: measure them"):
            study_runs(RESOLUTION, TINY, {("softmax", 8): 0.02}, **only)
        entry = {"variant": "sana", "resolution": 8, "seconds": 0.1, "device": "a", "torch": "2"}
        file = tmp_path / "seconds.json"
        write_json(file, {"steps": [entry]})
        assert read_seconds(file, TINY) == {("sana", 8): 0.1}
        write_json(file, {"steps": [entry, entry | {"device": "b"}]})
        with pytest.raises(UserError, match=r"several machines .* measure again"):
            read_seconds(file, TINY)
        write_json(file, {"steps": [{}]})
        with pytest.raises(UserError, match="is damaged"):
            read_seconds(file, TINY)

    @pytest.mark.parametrize(
        "other",
        [{"model": "192x6"}, {"batch_size": 8}, {"precision": "bf16"}, {"compile": "on"},
         {"accumulate": 2}],
    )  # fmt: skip
    def test_seconds_are_of_one_model_and_its_steps(self, other, tmp_path, monkeypatch):
        file, taken = tmp_path / "seconds.json", iter((0.1, 0.2))
        monkeypatch.setattr(seconds, "seconds_of_step", lambda settings: next(taken))
        runs = study_runs(RESOLUTION, TINY, {}, protocols=["depth"], only=["sana"], **AT)
        changed = dataclasses.replace(TINY, **other)
        seconds.measure(runs, TINY, file, 1)
        assert read_seconds(file, changed) == {}
        seconds.measure(runs, changed, file, 1)
        seconds.measure(runs, changed, file, 1)  # has nothing left to measure
        assert read_seconds(file, TINY) == {("sana", 8): 0.1}
        assert read_seconds(file, changed) == {("sana", 8): 0.2}

    def test_what_is_named_twice_runs_once(self):
        runs = study_runs(RESOLUTION, TINY, {}, resolutions=[8, 8], protocols=["depth"] * 2)
        assert len(runs) == len(study_runs(RESOLUTION, TINY, {}, protocols=["depth"], **AT))

    def test_an_unknown_name_is_one_line(self):
        with pytest.raises(UserError, match="'softmx' is none of softmax; softmax, conv"):
            study_runs(CONTROLS, TINY, {}, only=["softmx"])
        with pytest.raises(UserError, match="'cost' is none of depth; MACs; time"):
            study_runs(CONTROLS, TINY, {}, protocols=["cost"])


def test_a_shared_data_set_serves_every_seed(monkeypatch):
    monkeypatch.setattr(datasets, "_SHARED", {})
    share("digits", resolution=8)
    one, other = (load_dataset("digits", resolution=8, seed=seed) for seed in (0, 5))
    assert one is other
    assert load_dataset("digits", resolution=4) is not one
    share("shapes", resolution=16)
    # Drawn images are of their seed.
    assert load_dataset("shapes", resolution=16) is not load_dataset(
        "shapes", resolution=16, seed=5
    )


class TestLauncher:
    @pytest.fixture()
    def folders(self, tmp_path):
        made = [tmp_path / name for name in "abc"]
        for folder in made:
            folder.mkdir()
        return made

    def launch(self, folders, monkeypatch, work, slots=(None,), minutes=1.0):
        def run_one(folder):
            result = {"state": "ok", "cost": {}, "curve": [], "error": None,
                      "metrics": {"results": {}, "real_floor": {}}}  # fmt: skip
            work(folder)
            write_json(folder / "result.json", result)
            return result

        monkeypatch.setattr(launch, "run_one", run_one)
        seen = {}
        launch.run_forked(folders, slots, 1, minutes, lambda f, r: seen.update({f.name: r}))
        return {name: None if one is None else one["state"] for name, one in seen.items()}

    def test_each_slot_sees_its_gpu_and_one_that_dies_stops_no_other(self, folders, monkeypatch):
        def work(folder):
            (folder / "gpu").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
            if folder.name == "b":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.3)

        states = self.launch(folders, monkeypatch, work, slots=("0", "1"))
        assert states == {"a": "ok", "b": "crashed", "c": "ok"}
        assert {(f / "gpu").read_text() for f in folders[:2]} == {"0", "1"}
        assert "killed by signal 9" in (folders[1] / "result.json").read_text()

    def test_a_full_disk_stops_no_other(self, folders, monkeypatch):
        def work(folder):
            if folder.name == "a":
                os.kill(os.getpid(), signal.SIGKILL)

        write = files.write_bytes

        def refuse(path, content):
            if path.parent.name == "a":
                raise CannotWrite(path, OSError(28, "No space left on device"))
            write(path, content)

        monkeypatch.setattr(files, "write_bytes", refuse)  # below all that write a result
        states = self.launch(folders, monkeypatch, work)
        assert states == {"a": "crashed", "b": "ok", "c": "ok"}

    @pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to tell a child")
    def test_a_run_ends_with_a_launcher_that_is_killed(self, tmp_path):
        def work():
            (tmp_path / "begun").write_text(str(os.getpid()))
            time.sleep(60)

        until, launcher = time.monotonic() + 30, os.fork()
        if not launcher:
            launch.forked(work, None, 1, tmp_path / "output.txt")
            time.sleep(60)
            os._exit(0)
        while not (tmp_path / "begun").is_file() or not (tmp_path / "begun").read_text():
            assert time.monotonic() < until
            time.sleep(0.01)
        os.kill(launcher, signal.SIGKILL)
        os.waitpid(launcher, 0)
        run = Path("/proc", (tmp_path / "begun").read_text())
        while run.exists() and ") Z " not in (run / "stat").read_text():  # if nobody asks for it
            assert time.monotonic() < until
            time.sleep(0.01)

    def test_when_time_is_up_running_ones_are_told_and_others_wait(self, folders, monkeypatch):
        monkeypatch.setattr(launch, "SAVE_SECONDS", 0.0)
        monkeypatch.setattr(launch, "START_SECONDS", 0.2)
        before = {"state": "interrupted", "error": None, "wall_seconds": 100.0}
        write_json(folders[0] / "result.json", before)
        states = self.launch(folders, monkeypatch, lambda _: time.sleep(60), minutes=0.5 / 60)
        assert states == {"a": "interrupted", "b": None, "c": None}
        # Of all attempts, also of one that could not say so itself.
        result = json.loads((folders[0] / "result.json").read_text())
        assert 100.3 < result["wall_seconds"] < 160

    @pytest.mark.usefixtures("launching")
    def test_gpus_that_are_not_there_are_refused(self, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: 2)
        assert launch.gpus_to_use("all") == ["0", "1"]
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
        assert launch.gpus_to_use("1") == ["7"]
        for wrong in ("2", "one"):
            with pytest.raises(UserError, match=f"numbers below 2, got '{wrong}'"):
                launch.gpus_to_use(wrong)
        assert launch.gpus_to_use("none") == []


@pytest.mark.usefixtures("launching")
def test_a_measurement_needs_no_extractor(tmp_path, monkeypatch):
    monkeypatch.setattr(seconds, "seconds_of_step", lambda settings: 0.1)
    given = ["resolution", "--data", "digits", "--resolutions", "8", "--only", "sana", "--gpus",
             "none", "--measure", "--out", str(tmp_path), "--extractor", "inception",
             "--extractor-weights", str(tmp_path / "none.pth")]  # fmt: skip
    assert study.main(given) == 0
    scale = Scale(precision="fp32")
    assert read_seconds(tmp_path / seconds.FILE, scale) == {("sana", 8): 0.1}


@pytest.mark.usefixtures("launching")
def test_a_folder_without_held_out_images_is_refused_before_the_first_run(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "_SHARED", {})
    for name in ("a", "b"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(12):
            Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / name / f"{number}.png")
    given = ["resolution", "--data", str(tmp_path / "pictures"), "--resolutions", "8", "--only",
             "sana", "--samples", "0", "--gpus", "none", "--protocols", "depth", "--out",
             str(tmp_path / "out")]  # fmt: skip
    for more, said in (([], "--hold-out 0.1"), (["--hold-out", "0.1"], "too few for a loss")):
        with pytest.raises(UserError, match=said):
            study.main([*given, *more])
    with pytest.raises(UserError, match="digits has held-out images of its own"):
        study.main([*given, "--hold-out", "0.1", "--data", "digits"])
    assert not (tmp_path / "out").exists()


def test_a_study_takes_its_held_out_losses_from_training(tmp_path, monkeypatch):
    planned = study_runs(RESOLUTION, TINY, {}, protocols=["depth"], **AT)[0].planned
    # Runs of an earlier version are found.
    assert dataclasses.replace(planned, held_out=9).name == planned.name
    asked = []
    monkeypatch.setattr(execution, "evaluate", lambda run, **given: asked.append(given) or {})
    for images in (0, 9):
        stored = dataclasses.asdict(dataclasses.replace(planned, held_out=images))
        execution._measured(Run(tmp_path), stored, tmp_path / "runs" / "one", None, False)
    assert planned.held_out == 0 and [given["held_out"] for given in asked] == [0, 9]


@pytest.mark.parametrize("slowest", [1.1, 1.3])
def test_a_measurement_on_a_busy_machine_says_so(slowest, monkeypatch, capsys):
    class Trainer:
        batches = types.SimpleNamespace(close=lambda: None)

        def __init__(self, settings):
            pass

        def train_step(self, ahead=False):
            now[0] += next(paces) if ahead else 0

    now = [0.0]
    paces = (pace for pace in (1.0, 1.0, slowest, 1.0, 1.0) for _ in range(seconds._LEAST_STEPS))
    monkeypatch.setattr(seconds, "Trainer", Trainer)
    monkeypatch.setattr(seconds.time, "perf_counter", lambda: now[0])
    assert seconds.seconds_of_step(Settings()) == 1.0
    assert ("something else uses this machine" in capsys.readouterr().err) == (slowest == 1.3)


@pytest.mark.usefixtures("launching")
def test_the_script_runs_a_plan_and_another_machine_takes_its_rows_over(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(datasets, "_SHARED", {})
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # a pool of threads does not survive a fork
    given = ["resolution", "--data", "digits", "--resolutions", "8", "--only", "softmax;sana",
             "--seeds", "1", "--steps", "5", "--batch-size", "8", "--samples", "0", "--points",
             "5", "--held-out-images", "32", "--model", "96x4", "--protocols", "depth",
             "--gpus", "none"]  # fmt: skip
    out = tmp_path / "out"
    assert study.main([*given, "--out", str(out), "--per-gpu", "2"]) == 0
    found = table.read(out / "table.csv")
    assert list(found["state"]) == ["ok", "ok"] and found["loss"].notna().all()
    assert [step for step, _ in table.curve_of(found["curve"][0])] == [1, 2, 3, 4, 5]
    # The log of a run has the very number.
    (run,) = (out / "runs").glob("*softmax*")
    assert f'"held_out_loss": {found["loss"][0]:.4f}'[:-2] in (run / "run/log.jsonl").read_text()
    ok = json.loads((run / "result.json").read_text())
    log = (run / "run/log.jsonl").read_text()
    other = ["--out", str(tmp_path / "other"), "--report-only"]
    more = [*given, "--held-out-images", "48", "--out", str(out), "--report-only"]
    assert study.main(more) == 0  # of a run that is done its own number counts
    assert set(table.read(out / "table.csv")["held_out"]) == {32}
    with pytest.raises(UserError, match="with 3 micro-steps each"):  # before the first run
        study.main([*given, "--out", str(tmp_path / "uneven"), "--accumulate", "3"])
    assert not (tmp_path / "uneven" / "runs").exists()
    # What was cut while it sampled keeps what training has measured, and half a run its curve.
    write_json(run / "result.json", {"state": "interrupted", "error": "stopped"})
    cut = ["--only", "softmax", "--out", str(out), "--report-only"]
    (out / "table.csv").rename(tmp_path / "whole.csv")
    assert study.main([*given, *cut]) == 1
    row, before = (table.read(f).iloc[0] for f in (out / "table.csv", tmp_path / "whole.csv"))
    assert row["state"] == "interrupted" and row["loss"] == before["loss"] > 0
    assert row["curve"] == before["curve"] and row["train_loss"] == before["train_loss"]
    (out / "table.csv").unlink()
    (last,) = (run / "run/checkpoints").iterdir()
    last.rename(last.with_name("step-00000004"))
    assert study.main([*given, *cut]) == 1
    half = table.read(out / "table.csv").iloc[0]
    assert half["curve"] == before["curve"] and math.isnan(half["loss"] + half["train_loss"])
    # A damaged one hides no other.
    last.with_name("step-00000004").rename(last)
    write_json(run / "result.json", ok)
    (run / "run/log.jsonl").write_text("{\n")
    assert study.main([*given, "--out", str(out), "--report-only"]) == 1
    assert list(table.read(out / "table.csv")["state"]) == ["damaged", "ok"]
    assert "line 1 of" in table.read(out / "table.csv")["error"][0]
    (run / "run/log.jsonl").write_text(log)
    (tmp_path / "whole.csv").replace(out / "table.csv")
    # A call of fewer variants forgets no run that one page may hold beside its own.
    assert study.main([*given, "--out", str(out), "--only", "sana", "--report-only"]) == 0
    assert set(table.read(out / "table.csv")["variant"]) == {"softmax", "sana"}
    elsewhere = ["--batch-size", "4", "--out", str(out), "--report-only"]
    assert study.main([*given, *elsewhere]) == 1
    assert set(table.read(out / "table.csv")["batch"]) == {4}
    assert study.main([*given, "--out", str(out), "--report-only"]) == 0
    assert study.main([*given, *other]) == 1
    assert "not run: resolution, equal depth, 8 px, sana, seed 0" in capsys.readouterr().out
    assert study.main([*given, *other, "--table", str(out / "table.csv")]) == 0
    taken_over = table.read(tmp_path / "other" / "table.csv")
    # How pandas stores text depends on what else has been imported meanwhile.
    pd.testing.assert_frame_equal(taken_over, found, check_dtype=False, check_column_type=False)
