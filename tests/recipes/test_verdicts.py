"""What a comparison concludes: families, bounds, machines, extractors, power, held-out curves."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from recipes import compare as compare_module
from recipes.lab.console import UserError
from recipes.lab.training.banner import banner
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.held_out import images_needed
from recipes.lab.training.memory import step_bytes
from recipes.lab.training.settings import Settings
from recipes.lab.training.trainer import Trainer
from recipes.studies.comparison import execution, plan
from recipes.studies.comparison.planned import OK, PlannedRun, is_done, read_result
from recipes.studies.comparison.report import write_report
from recipes.studies.comparison.statistics import holm
from recipes.studies.comparison.summary import collect
from recipes.studies.comparison.tables import read_table
from recipes.studies.comparison.verdicts import (
    ALL_PAIRS,
    MOVED,
    Choice,
    Verdict,
    all_pairs,
    compare_variants,
    corrected_together,
    family,
    rounded_up,
    verdict_of,
)
from recipes.studies.dydila.paper import paper_rows

HELD_OUT = "held_out_loss[ema]"
NO_PAPER = paper_rows([])


def table(metric=HELD_OUT, **values):
    return pd.concat(
        pd.DataFrame({"variant": name, "seed": range(len(v)), metric: v})
        for name, v in values.items()
    )


def one_run(label="sana", **settings):
    settings = {"attn": "sana", "steps": 100, "batch_size": 8, "data": "digits"} | settings
    return PlannedRun(
        label=label, settings=Settings(**settings), cfgs=(1.0,), samples=12, sampling_steps=2
    )


def finished(out, one, loss, *, device="cpu", torch_version="2.13", changes=()):
    """Leaves what a run of a learning curve that falls by 1/step leaves, without one."""
    folder = one.prepare(out)
    steps = range(10, one.settings.steps + 1, 10)
    names = ["held_out_loss", "held_out_loss_model"]
    names += [f"held_out_loss_quarter_{number}" for number in range(1, 5)]
    images = loss + torch.linspace(-0.1, 0.1, 20, dtype=torch.float64)
    result = {
        "state": OK,
        "error": None,
        "cost": {"macs": 10**6, "forward_seconds": 1e-3, "training_seconds": 1e-3},
        "metrics": {
            "results": {"1": {HELD_OUT: loss, "FID[smallcnn]": 10 * loss, "count": 12}},
            "real_floor": {}, "resolution": 8, "device": "cpu", "versions": {"torch": "2.13"},
            "evaluator": {"name": "smallcnn", "sha256": "0" * 64},
            "held_out": {"by_image": images.tolist()},
        },
        "curve": [[step, 1 / step] for step in steps],
        "held_out_curve": [
            {"step": step} | dict.fromkeys(names, loss * (1 + 1 / step)) for step in steps
        ],
        "wall_seconds": 1.0,
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "run").mkdir()
    config = {
        "settings": {"attn": "sana"},
        "data": {"class_names": ["a", "b"], "resolution": 8, "channels": 1},
        "environment": {"device": device, "torch": torch_version},
        "changes": [{"step": 5, "changes": list(changes)}] if changes else [],
    }
    (folder / "run" / "config.json").write_text(json.dumps(config))
    return one


class TestFamilies:
    def test_a_metric_is_corrected_over_all_settings(self):
        frame = pd.concat(
            [
                table(a=[1.0, 1.1, 1.3], b=[1.5, 1.9, 1.7], c=[1.6, 1.5, 1.9]).assign(side=side)
                for side in (8, 16)
            ]
        ).assign(cfg=1.0)
        found = family(frame, HELD_OUT, ["side", "cfg"])
        alone = [
            v for side in (8, 16) for v in all_pairs(frame[frame.side == side], HELD_OUT).values()
        ]
        assert len(alone) == 6
        expected = holm(v.difference.p for v in alone)
        assert [v.corrected for of in found.values() for v in of.values()] == expected
        # By itself a difference, among six none.
        assert compare_variants(frame[frame.side == 8], "a", "b", HELD_OUT).kind == "better"
        assert found[8, 1.0]["a", "b"].kind == "same"

    def test_a_loss_of_the_model_counts_once_for_all_scales(self):
        frame = pd.concat(
            table(a=[1.0, 1.1], b=[2.0, 2.15]).assign(cfg=cfg, side=8) for cfg in (1.0, 4.0)
        ).assign(**{"FID[x]": [1.0, 2.0, 3.0, 4.5] * 2})
        assert list(family(frame, HELD_OUT, ["side", "cfg"])) == [(8, 1.0)]
        assert list(family(frame, "FID[x]", ["side", "cfg"])) == [(8, 1.0), (8, 4.0)]

    def test_all_against_one(self):
        frame = table(a=[1.0, 1.1], b=[2.0, 2.15], c=[3.0, 3.3])
        assert list(all_pairs(frame, HELD_OUT, Choice(against="b"))) == [("a", "b"), ("c", "b")]

    def test_a_verdict_can_be_read_from_either_side(self):
        found = all_pairs(table(a=[1.0, 1.2, 1.1], b=[2.0, 2.15, 2.2]), HELD_OUT)
        turned = verdict_of(found, "b", "a")
        direct = compare_variants(table(a=[1.0, 1.2, 1.1], b=[2.0, 2.15, 2.2]), "b", "a", HELD_OUT)
        assert turned.gain == direct.gain and turned.kind == direct.kind == "worse"
        assert turned.difference.percent == pytest.approx(direct.difference.percent)
        assert verdict_of(found, "a", "z") is None


class TestBounds:
    def test_a_tie_is_an_upper_bound(self):
        found = compare_variants(
            table(a=[1.0, 1.02, 0.99], b=[1.01, 1.0, 1.0]), "a", "b", HELD_OUT
        )
        assert found.kind == "same" and "differs by less than 4.3 %" in found.words
        assert 4.2 < found.difference.bound_percent <= 4.3

    def test_a_bound_is_rounded_up_alone(self):
        values = [0.0101, 0.099, 0.123, 9.99, 12.01, 5e-7, 100.0, 0.8]
        for value in values:
            assert value <= float(rounded_up(value)) < 1.12 * value
        assert rounded_up(0.8) == "0.8" and rounded_up(100.0) == "1e+02"
        assert Verdict(0.0, 0.0, 3).bound_words == "equal in every seed"


class TestMachines:
    def frame(self, machines):
        values = table(a=[1.0, 1.1, 1.2], b=[1.5, 1.62, 1.71])
        return values.assign(machine=machines)

    def test_only_runs_of_one_machine_are_paired(self):
        frame = self.frame(["x", "x", "x", "x", "y", "x"])
        assert compare_variants(frame, "a", "b", HELD_OUT).seeds == 2
        assert compare_variants(frame, "a", "b", HELD_OUT, mixed_machines=True).seeds == 3
        # Whole seeds may lie on another machine.
        assert compare_variants(self.frame(["x", "y", "y"] * 2), "a", "b", HELD_OUT).seeds == 3
        assert compare_variants(self.frame([MOVED] * 6), "a", "b", HELD_OUT).seeds == 0
        assert compare_variants(self.frame([None] * 6), "a", "b", HELD_OUT).seeds == 3

    def test_only_losses_of_the_same_images_are_paired(self):
        frame = table(a=[1.0, 1.1, 1.2], b=[1.5, 1.62, 1.71]).assign(**{"FID[x]": range(6)})
        frame["held_out_images"] = [*["9 a"] * 5, "9 b"]
        assert compare_variants(frame, "a", "b", HELD_OUT).seeds == 2
        assert compare_variants(frame, "a", "b", HELD_OUT, mixed_machines=True).seeds == 2
        assert compare_variants(frame, "a", "b", "FID[x]").seeds == 3
        frame["held_out_images"] = None
        assert compare_variants(frame, "a", "b", HELD_OUT).seeds == 3

    @pytest.mark.usefixtures("no_charts")
    def test_a_study_that_moved_says_so_and_leaves_the_run_out(self, tmp_path):
        runs = []
        for label, loss in (("softmax", 1.0), ("sana", 0.9)):
            for seed in range(3):
                moved = (label, seed) == ("sana", 2)
                one = one_run(label, seed=seed, attn=label)
                changes = ["environment: torch 2.12 -> 2.13"] if moved else ()
                spread = loss + seed / 97 + loss / 50 * seed
                runs.append(finished(tmp_path, one, spread, changes=changes))
        write_report(tmp_path, runs, NO_PAPER, "x")
        page = (tmp_path / "report.html").read_text("utf-8")
        assert (
            page.count("The runs are of several machines (5 on cpu, torch 2.13; 1 begun on") == 1
        )
        assert runs[-1].name in page and "--mixed-machines pairs all" in page
        frame = read_table(tmp_path / "runs.csv")
        assert frame.machine.tolist() == ["cpu, torch 2.13"] * 5 + [MOVED]
        assert compare_variants(frame, "sana", "softmax", HELD_OUT).seeds == 2
        write_report(tmp_path, runs, NO_PAPER, "x", Choice(mixed_machines=True))
        assert "as --mixed-machines asks" in (tmp_path / "report.html").read_text("utf-8")


@pytest.fixture(scope="module")
def decided(tmp_path_factory):
    """Softmax, sana 1 % better in every seed, another that is as good as sana, and a failure."""
    out = tmp_path_factory.mktemp("decided")
    noise = np.random.default_rng(0).normal(size=(5, 3))
    runs = []
    for seed in range(5):
        base = 1 + 0.05 * noise[seed, 0]
        for label, share in (
            ("softmax", 1.0), ("sana", 0.99 + 1e-4 * noise[seed, 1]),
            ("mixer", 0.99 + 1e-4 * noise[seed, 2]),
        ):  # fmt: skip
            runs.append(finished(out, one_run(label, seed=seed), base * share))
    failed = one_run("broken")
    folder = failed.prepare(out)
    (folder / "result.json").write_text(json.dumps({"state": "crashed", "error": "killed"}))
    runs.append(failed)
    write_report(out, runs, NO_PAPER, "compare.py")
    return out, runs


class TestTheReport:
    def test_a_planted_percent_is_found_and_equal_models_are_not_told_apart(self, decided):
        out, _ = decided
        page = (out / "report.html").read_text("utf-8")
        frame = read_table(out / "runs.csv")
        verdicts = corrected_together(all_pairs(frame.dropna(subset=[HELD_OUT]), HELD_OUT))
        assert verdict_of(verdicts, "sana", "softmax").kind == "better"
        assert verdict_of(verdicts, "sana", "mixer").kind == "same"
        assert 0.9 < -verdict_of(verdicts, "sana", "softmax").difference.percent < 1.1
        assert "3 in the largest" in page and "corrected together by Holm" in page
        assert "differs by less than 0.0" in page  # of the two that are equal

    def test_the_verdict_comes_first_and_a_failed_run_is_named(self, decided):
        out, runs = decided
        page = (out / "report.html").read_text("utf-8")
        order = ["15 of 16 runs are done", runs[-1].name, "<h2>Verdict", "<h2>Held-out loss while",
                 "<h2>Numbers", "by time"]  # fmt: skip
        places = [page.index(text) for text in order]
        assert places == sorted(places) and "killed" in page
        assert "quarter 4" in page and "model&#x27;s own weights" in page

    def test_effects_are_steps_saved_too(self, decided):
        out, _ = decided
        page = (out / "report.html").read_text("utf-8")
        # 0.99 (1 + 1/s) = 1 + 1/100 at about s = 50.
        assert pytest.approx(50, abs=3) == int(page.split(" of 100 steps (")[0].split(">")[-1])

    def test_images_that_suffice_are_said(self, decided):
        out, runs = decided
        found = collect(out, runs)
        assert len(found.by_image) == 15
        assert "The held-out loss is of 20 images at 8 times" in (out / "report.html").read_text(
            "utf-8"
        )
        pair = [found.by_image[run.name][:, None] for run in runs[:2]]
        # All images differ alike.
        assert images_needed(*pair) == 1

    def test_power_is_a_table_of_every_comparison(self, decided, capsys, tmp_path):
        from recipes.studies.comparison.power import power_table

        out, runs = decided
        text = power_table(out, runs, ALL_PAIRS)
        lines = [line for line in text.splitlines() if " - " in line and "digits" in line]
        assert len(lines) == 6  # three pairs, two metrics
        tie = next(line for line in lines if HELD_OUT in line and "sana - mixer" in line)
        found = next(line for line in lines if HELD_OUT in line and "softmax - sana" in line)
        assert int(found.split()[-1]) <= 5 < int(tie.split()[-1])
        with pytest.raises(UserError, match=r"1 finished runs of 1 seed.*--seeds 2"):
            power_table(out, runs[:1], ALL_PAIRS)
        arguments = ["--attn", "sana", "--data", "digits", "--power", "--out", str(tmp_path)]
        with pytest.raises(UserError, match="0 finished runs"):
            compare_module.main(arguments)


class TestExtractors:
    def test_a_run_gets_the_numbers_of_another_one_later(self, tmp_path, monkeypatch):
        one = one_run(steps=1)
        folder = one.prepare(tmp_path)
        asked = []

        def evaluate(run, *, extractor, held_out, **_):
            asked.append((extractor, held_out))
            name = {"efficientnet-lite0": "efflite0"}.get(extractor, extractor)
            return {
                "results": {"1": {f"FID[{name}]": 1.0, "count": 12}},
                "real_floor": {f"FID[{name}]": 0.5}, "warnings": [name], "not_measured": {},
                "evaluator": {"name": name, "sha256": "0" * 64},
            }  # fmt: skip

        monkeypatch.setattr(execution, "evaluate", evaluate)
        assert execution.run_one(folder)["state"] == OK
        first = read_result(folder)
        both = PlannedRun(**{**vars(one), "extractors": ("smallcnn", "efficientnet-lite0")})
        assert both.name == one.name and is_done(first, one.extractors)
        assert not is_done(first, both.extractors)
        both.prepare(tmp_path)
        execution.set_aside(folder)
        monkeypatch.setattr(execution, "train", None)
        monkeypatch.setattr(execution, "cost_of", None)
        assert execution.run_one(folder)["state"] == OK
        assert asked == [("smallcnn", 1024), ("efficientnet-lite0", 0)]
        found = read_result(folder)
        assert is_done(found, both.extractors) and found["cost"] == first["cost"]
        assert set(found["metrics"]["results"]["1"]) == {"FID[smallcnn]", "FID[efflite0]", "count"}
        assert found["metrics"]["warnings"] == ["smallcnn", "efflite0"]
        assert not (folder / "earlier.json").exists()

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--extractor", "vgg"], "extractor 'vgg' is unknown"),
            (["--extractor", "smallcnn,smallcnn"], "each extractor once"),
            (["--extractor-weights", "x.pth"], "is the file of one extractor"),
            (
                ["--extractor", "efficientnet-lite0", "--extractor-weights", "none.pth"],
                "no weights at",
            ),
            (["--against", "dydila"], "none of the variants"),
        ],
    )
    def test_bad_input_is_one_line(self, arguments, words, tmp_path):
        given = ["--attn", "sana", "--data", "digits", "--out", str(tmp_path), "--dry-run"]
        with pytest.raises(UserError, match=words) as caught:
            compare_module.main([*given, *arguments])
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for name, count in (("a", 60), ("b", 2)):
        (root / name).mkdir()
        for number in range(count):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(root / name / f"{number}.png")
    return root


class TestHeldOutImages:
    def planned(self, folder, **settings):
        like = one_run(**settings)
        variants = [plan.parse_variant("sana")]
        return plan.plan_runs(
            variants, [(str(folder), 8), ("digits", None)], seeds=1, protocols=["controlled"],
            like=PlannedRun(**{**vars(like), "label": ""}),
        )  # fmt: skip

    def test_curves_are_taken_where_images_are_left_out(self, folder):
        assert [p.settings.held_out_every for p in self.planned(folder, held_out_every=5)] == [
            None, 5,
        ]  # fmt: skip
        found = self.planned(folder, held_out_every=5, hold_out=0.25)
        assert [p.settings.hold_out for p in found] == [0.25, 0.0]
        assert [p.settings.held_out_every for p in found] == [5, 5]
        # A look on the way makes no other run.
        assert [p.name for p in found] == [p.name for p in self.planned(folder, hold_out=0.25)]

    @pytest.mark.parametrize(
        ("share", "said"),
        [(0.0, "no held-out loss"), (0.2, r"of 1 of the 2 classes \(b\)"), (0.05, "too few")],
    )
    def test_what_cannot_be_said_is_said_first(self, folder, share, said):
        lines: list[str] = []
        planned = self.planned(folder, held_out_every=5 if share else None, hold_out=share)
        if share == 0.05:
            with pytest.raises(UserError, match=said):
                plan.check_plan(planned, lines.append)
            return
        plan.check_plan(planned, lines.append)
        assert len(lines) == 1 and pd.Series(lines).str.contains(said).all()
        if share:  # training says so too
            trainer = Trainer(planned[0].settings)
            assert re.search(said, banner(trainer, Run(folder), step_bytes(trainer)))


@pytest.mark.usefixtures("no_charts")
def test_nothing_is_infinite_in_a_report_of_one_seed(tmp_path):
    runs = [finished(tmp_path, one_run(label), loss) for label, loss in (("a", 1.0), ("b", 2.0))]
    write_report(tmp_path, runs, NO_PAPER, "x")
    page = (tmp_path / "report.html").read_text("utf-8")
    page = re.sub(r'src="[^"]*"', "", page)
    assert "too few seeds" in page and "inf" not in page
    assert math.isinf(compare_variants(table(a=[1.0], b=[2.0]), "a", "b", HELD_OUT).margin)
