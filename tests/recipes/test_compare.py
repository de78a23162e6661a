"""Comparisons: the plan, runs that fail, the report, and what a few seeds can say."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import attnzoo.registry
from attnzoo.errors import UsageError
from recipes import compare as compare_module
from recipes.lab.console import UserError
from recipes.lab.drawing.palette import color_of, marker_of
from recipes.lab.training.build import build_model
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.settings import Settings
from recipes.studies.comparison import costs, execution, study
from recipes.studies.comparison.plan import (
    parse_data,
    parse_variant,
    parse_variants,
    plan_runs,
    split_data,
)
from recipes.studies.comparison.planned import OK, PlannedRun, read_result
from recipes.studies.comparison.summary import chance_lines, summarize
from recipes.studies.comparison.verdicts import (
    NO_DIFFERENCE,
    Verdict,
    at_chance,
    compare_variants,
    summary_sentence,
)
from recipes.studies.dydila import results
from recipes.studies.dydila.paper import CLAIMS, PRESETS, paper_rows
from tests.commands import Forked

SEED = ["--seeds", "1"]
TINY = ["--data", "digits", "--seeds", "1", "--steps", "3", "--batch-size", "8", "--samples", "12",
        "--sampling-steps", "2", "--cfg", "1.0", "--patch-size", "4"]  # fmt: skip


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Two tiny runs, one of which crashes in the middle of its training."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "zoo_of_mine.py").write_text(
        textwrap.dedent(
            """
            import os
            import attnzoo

            @attnzoo.register_attention("crashing")
            class Crashing(attnzoo.Attention):
                calls = 0

                def forward(self, x, grid):
                    Crashing.calls += self.training
                    if Crashing.calls > 8:
                        os.kill(os.getpid(), 9)
                    return x
            """
        )
    )
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(folder))
    patch.chdir(folder)
    patch.setenv("OMP_NUM_THREADS", "1")
    out = folder / "out"
    arguments = ["--attn", "softmax,crashing", "--import", "zoo_of_mine", *TINY, "--out", str(out)]
    status = compare_module.main(arguments)
    yield out, status, arguments
    attnzoo.registry._REGISTRY.pop("crashing", None)
    patch.undo()


class TestRuns:
    def test_one_that_is_killed_stops_no_other(self, compared):
        out, status, _ = compared
        assert status == 1
        frame = pd.read_csv(out / "runs.csv").set_index("variant")
        assert frame.state.to_dict() == {"softmax": OK, "crashing": "crashed"}
        assert "killed by signal 9" in frame.error["crashing"]
        assert np.isfinite(frame["FID[smallcnn]"]["softmax"])
        curve = pd.read_csv(out / "curves.csv").dropna(subset=["held_out_loss"])
        assert curve.step.tolist() == [1, 2, 3] and curve.held_out_loss_model.notna().all()
        assert frame.macs["softmax"] > 0 and frame.forward_seconds["softmax"] > 0

    def test_flags_of_another_comparison_replace_no_report(self, compared):
        out, _, arguments = compared
        before = {file: file.read_bytes() for file in out.iterdir() if file.is_file()}
        for more in (["--steps", "4"], ["--steps", "4", "--report-only"]):
            with pytest.raises(UserError, match=r"holds 1 finished runs .* flags .*command\.txt"):
                compare_module.main([*arguments, *more])
        now = {file: file.read_bytes() for file in out.iterdir() if file.is_file()}
        assert now == before

    def test_the_report_shows_the_failure_and_the_rest(self, compared):
        out, _, _ = compared
        page = (out / "report.html").read_text()
        assert "1 of 2 runs are done" in page and "killed by signal 9" in page
        assert "FID[smallcnn]" in page and "Learning curves" in page and "samples of soft" in page
        assert "<li class=bad>digits-easy-native-crashing" in page
        assert "Held-out loss while training" in page and "average, quarter 4" in page
        # One file that needs no other: every picture is inside, nothing is fetched.
        sources = re.findall(r'src="([^"]{0,30})', page)
        assert len(sources) >= 4
        assert all(source.startswith("data:image/png;base64,") for source in sources)
        assert not re.search(r"https?://|<script", page)

    @pytest.mark.usefixtures("no_charts")
    def test_what_is_done_is_not_done_again(self, compared, monkeypatch, capsys):
        _, _, arguments = compared
        started = []
        failing = [sys.executable, "-c", "raise SystemExit(1)"]
        own = subprocess.Popen

        def popen(command, **options):
            started.append(Path(command[3]).name)
            return own(failing, **options)

        monkeypatch.setattr(execution.subprocess, "Popen", popen)
        assert compare_module.main(arguments) == 1
        assert len(started) == 1 and started[0].startswith("digits-easy-native-crashing")
        assert "1 done, 1 to run" in capsys.readouterr().out

    @pytest.mark.usefixtures("no_charts")
    def test_no_run_starts_when_time_is_up(self, compared, monkeypatch):
        _, _, arguments = compared
        monkeypatch.setattr(execution.subprocess, "Popen", None)
        assert compare_module.main([*arguments, "--time-budget", "0"]) == 1

    def test_a_run_goes_on_where_it_was_stopped(self, tmp_path, monkeypatch):
        one = tiny_run()
        folder = one.prepare(tmp_path)
        seen = []
        own = execution.train

        def stopping(settings, run, **options):
            seen.append(options["resume"])
            if len(seen) == 1:
                return own(settings, run, should_stop=lambda step: step == 2, **options)
            return own(settings, run, **options)

        monkeypatch.setattr(execution, "train", stopping)
        monkeypatch.setattr(
            execution, "evaluate", lambda run, **_: {"results": {}, "real_floor": {}}
        )
        assert execution.run_one(folder)["state"] == "interrupted"
        result = execution.run_one(folder)
        assert result["state"] == OK and seen == [False, True]
        assert [step for step, _ in result["curve"]] == [1, 2, 3]
        assert read_result(folder) == json.loads(json.dumps(result))

    @pytest.mark.parametrize("keeps_checkpoint", [True, False])
    def test_a_folder_goes_on_elsewhere(self, tmp_path, monkeypatch, keeps_checkpoint):
        """As it travels between machines; what has lost its checkpoint starts anew."""
        one = tiny_run()
        folder = one.prepare(tmp_path / "here")
        monkeypatch.setattr(
            execution, "evaluate", lambda run, **_: {"results": {}, "real_floor": {}}
        )
        own = execution.train
        monkeypatch.setattr(
            execution, "train",
            lambda *a, **k: own(*a, should_stop=lambda step: step == 2, **k),
        )  # fmt: skip
        assert execution.run_one(folder)["state"] == "interrupted"
        monkeypatch.setattr(execution, "train", own)
        shutil.move(tmp_path / "here", tmp_path / "there")
        moved = one.prepare(tmp_path / "there")
        log = (moved / "run" / "log.jsonl").read_text().splitlines()[:2]
        if not keeps_checkpoint:
            shutil.rmtree(moved / "run" / "checkpoints")
        result = execution.run_one(moved)
        assert result["state"] == OK
        assert [step for step, _ in result["curve"]] == [1, 2, 3]
        kept = (moved / "run" / "log.jsonl").read_text().splitlines()[:2] == log
        assert kept == keeps_checkpoint  # times differ where the steps were taken again

    def test_a_cost_is_of_a_micro_step_and_what_it_lacks_loses_no_run(self, tmp_path, monkeypatch):
        """Of compiled blocks a step may fit where the plain one that is measured does not."""
        seen = set()

        def watched(*arguments):
            def look(model, _, inputs):
                if "hidden_states" in inputs:  # not of the count
                    is_lowered = torch.is_autocast_enabled("cpu")
                    seen.add((len(inputs["hidden_states"]), is_lowered, model.training))
                if model.training:
                    raise torch.OutOfMemoryError("out of memory")

            model = build_model(*arguments)
            model.register_forward_pre_hook(look, with_kwargs=True)
            return model

        monkeypatch.setattr(costs, "build_model", watched)
        monkeypatch.setattr(
            execution, "evaluate", lambda run, **_: {"results": {}, "real_floor": {}}
        )
        folder = tiny_run(accumulate=4, precision="bf16").prepare(tmp_path)
        result = execution.run_one(folder)
        assert result["state"] == OK and seen == {(2, True, False), (2, True, True)}
        assert result["cost"]["forward_seconds"] > 0
        assert result["cost"]["training_seconds"] is None

    def test_a_cost_that_was_not_measured_has_no_price(self, monkeypatch):
        def measured(*arguments, own=costs.cost_of, **options):
            return own(*arguments, **options) | {"training_seconds": None}

        monkeypatch.setattr(costs, "cost_of", measured)
        assert "NaN" in costs.dry_run([tiny_run()], jobs=1)

    def test_a_signal_lets_the_running_runs_save_and_writes_the_report(
        self, tmp_path, monkeypatch
    ):
        out = tmp_path / "out"
        arguments = ["--attn", "softmax,sana", *TINY, "--steps", "100000", "--out", str(out)]
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setattr(study, "prepare_evaluators", lambda *_: None)  # none is asked
        with (tmp_path / "said").open("w") as said:
            process = Forked(compare_module.main, arguments, said.fileno())
        deadline = time.monotonic() + 120
        while not list(out.glob("runs/*/run/log.jsonl")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(timeout=120) == 1
        frame = pd.read_csv(out / "runs.csv").set_index("variant")
        assert frame.state.to_dict() == {"softmax": "interrupted", "sana": "not run"}
        assert len(list(out.glob("runs/*/run/checkpoints/step-*"))) == 1
        assert "1 of" not in (out / "report.html").read_text()

    def test_a_wrong_option_is_an_error_of_its_run_alone(self, tmp_path):
        folder = tiny_run(attn_options={"nonsense": 1}).prepare(tmp_path)
        result = execution.run_one(folder)
        assert result["state"] == "error" and "no option 'nonsense'" in result["error"]

    def test_mechanisms_of_one_seed_see_the_same_data_and_noise(self, tmp_path):
        """Paired: only the model differs between two runs of a seed."""
        from recipes.lab.training.trainer import Trainer

        plan = plan_runs(
            [parse_variant("softmax"), parse_variant("dydila")], [("digits", None)], seeds=2,
            protocols=["controlled"],
            like=PlannedRun(label="", settings=Settings(patch_size=4, steps=5, batch_size=4),
            cfgs=(1.0,), samples=10, sampling_steps=2))  # fmt: skip
        batches = [Trainer(one.settings)._batch() for one in plan]
        for one, other in zip(batches[0], batches[1], strict=True):
            assert torch.equal(one, other)
        assert not torch.equal(batches[0][3], batches[2][3])


def tiny_run(**settings):
    settings = Settings(attn="sana", steps=3, batch_size=8, sample_every=3, **settings)
    return PlannedRun(label="sana", settings=settings, cfgs=(1.0,), samples=12, sampling_steps=2)


class TestSubmitit:
    def test_a_job_that_died_counts_its_seconds_with_those_before(self, tmp_path, monkeypatch):
        job = SimpleNamespace(job_id="7", done=lambda: True, exception=lambda: "node failed")
        executor = SimpleNamespace(update_parameters=lambda **_: None, submit=lambda *_: job)
        module = SimpleNamespace(AutoExecutor=lambda **_: executor)
        monkeypatch.setitem(sys.modules, "submitit", module)
        for name in ("PYTHONPATH", "PYTHONSAFEPATH"):
            monkeypatch.setenv(name, "")
        earlier = {"state": "crashed", "error": "", "wall_seconds": 5.0}
        (tmp_path / "result.json").write_text(json.dumps(earlier))
        run = execution.by_submitit("local", tmp_path / "log", {})
        result = run(tmp_path, 0, threading.Event())
        assert result["wall_seconds"] >= 5 and result["error"] == "submitit job 7: node failed"

    @pytest.mark.slow
    def test_runs_go_through_its_local_executor(self, tmp_path, monkeypatch):
        pytest.importorskip("submitit")
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        (tmp_path / "failing.py").write_text(
            textwrap.dedent(
                """
                import attnzoo

                @attnzoo.register_attention("failing")
                class Failing(attnzoo.Attention):
                    def forward(self, x, grid):
                        raise RuntimeError("it fails")
                """
            )
        )
        arguments = ["--attn", "sana,failing", *TINY, "--import", str(tmp_path / "failing.py")]
        out = tmp_path / "out"
        try:
            status = compare_module.main([*arguments, "--engine", "submitit", "--out", str(out)])
        finally:
            attnzoo.registry._REGISTRY.pop("failing", None)
        states = pd.read_csv(out / "runs.csv").set_index("variant").state
        assert status == 1 and states.to_dict() == {"sana": OK, "failing": "error"}


class Miscounted(attnzoo.get_attention("softmax")):
    def macs_parts(self, grid):
        return {"core": 1}


def test_a_cost_that_is_stated_wrong_ends_a_run_before_its_training(tmp_path, monkeypatch):
    monkeypatch.setattr(attnzoo.registry, "_REGISTRY", dict(attnzoo.registry._REGISTRY))
    monkeypatch.setitem(attnzoo.registry._SOURCES, "miscounted", "mine.py")
    attnzoo.register_attention("miscounted")(Miscounted)
    one = tiny_run()
    one = dataclasses.replace(one, settings=dataclasses.replace(one.settings, attn="miscounted"))
    folder = one.prepare(tmp_path)
    result = execution.run_one(folder)
    assert result["state"] == "error" and "'miscounted' is wrong in" in result["error"]
    assert not (folder / "run").exists()


class TestThePlan:
    def test_a_dry_run_prints_cost_and_runs_nothing(self, tmp_path, capsys):
        out = tmp_path / "out"
        assert (
            compare_module.main(["--attn", "softmax", *TINY, "--dry-run", "--out", str(out)]) == 0
        )
        text = capsys.readouterr().out
        assert "MMACs" in text and "1 runs" in text and "minutes" in text
        assert not out.exists()

    def test_a_dry_run_prices_each_protocol_by_its_own_model(self, capsys):
        def parameters(protocols):
            flags = ["--protocol", protocols, "--dry-run", "--out", "none"]
            assert compare_module.main(["--attn", "dydila", *TINY, *flags]) == 0
            rows = [line.split() for line in capsys.readouterr().out.splitlines()]
            return [row[row.index("dydila") + 3] for row in rows if "dydila" in row]

        found = parameters("controlled,matched")
        assert found == parameters("controlled") + parameters("matched")
        assert len({*found}) == 2

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ([], "either --attn"),
            (["--attn", "softmax", "--preset", "table4"], "either --attn"),
            (["--attn", "softmx"], "did you mean 'softmax'"),
            (["--attn", "sana,sana"], "sana is given twice"),
            (["--attn", "sana:conv"], "NAME:OPTION=VALUE"),
            (["--attn", "sana", "--data", "digit"], "digits"),
            (["--attn", "sana", "--data", "digits", "--resolutions", "9"], "never enlarged"),
            (["--attn", "sana", "--data", "digits@big"], "NAME@PIXELS"),
            (["--attn", "sana", "--import", "no_such_module"], "no_such_module"),
            (["--attn", "sana", "--protocol", "controlled,fair"], "unknown protocol 'fair'"),
            (["--attn", ","], "names no mechanism"),
            (["--attn", "sana:a=(1,2"], "does not close )"),
            (["--attn", "sana:a=1)"], "closes a bracket that is not open"),
            (["--attn", "sana:a=1:a=2"], "gives an option twice"),
            (["--attn", "sana:a=1e999"], "cannot be saved"),
            (["--attn", "sana:nonsense=1", "--data", "digits"], "no option 'nonsense'"),
            (["--attn", "sana", "--import", "no/such.py"], "no/such.py"),
            (["--attn", "sana", "--cfg", ","], "--cfg takes finite"),
            (["--attn", "sana", "--cfg", "1,nan"], "--cfg takes finite"),
            (["--attn", "sana", "--cfg", "1,1.0"], "names a guidance scale twice"),
            (["--attn", "sana", "--resolutions", "-8"], "from 1 up"),
            (["--attn", "sana", "--run-minutes", "nan"], "must be above 0"),
            (["--attn", "sana", "--run-minutes", "inf"], "below 1e6"),
            (["--attn", "sana", "--time-budget", "-1"], "must be at least 0"),
            (["--attn", "sana", "--data", ","], "names no data"),
            (["--attn", "sana", "--data", "no/such/folder"], "no/such/folder"),
        ],
    )
    def test_bad_input_is_one_clear_line(self, arguments, words, tmp_path):
        with pytest.raises((UserError, UsageError)) as caught:
            compare_module.main([*arguments, "--dry-run", "--out", str(tmp_path)])
        assert words in str(caught.value) and "\n" not in str(caught.value)

    def test_presets_name_rows_of_the_paper_and_claims_name_presets(self):
        for name in ("table4", "table5", "table6", "table1-S"):
            rows = paper_rows(PRESETS[name].variants)
            assert len(rows) == len(PRESETS[name].variants), name
            assert rows.fid.notna().all()
        main = {variant.label for variant in PRESETS["main"].variants}
        assert main == {"softmax", "sana", "focused", "dydila", "dydila-map"}
        assert PRESETS["main"].protocols == ("controlled", "matched")
        ladder = paper_rows(PRESETS["table4"].variants)
        assert ladder.fid.tolist() == [28.00, 28.20, 27.87, 27.46, 26.20, 24.48]
        known = {variant.label for variant in PRESETS["results"].variants}
        assert {claim.better for claim in CLAIMS} | {claim.worse for claim in CLAIMS} <= known

    def test_options_may_hold_separators(self):
        text = "a:w=(1,2):n={'k:l': [3,4]},b:t='x,y:z',dydila:conv=none"
        labels = ["a:w=(1,2):n={'k:l': [3,4]}", "b:t='x,y:z'", "dydila:conv=none"]
        variants = parse_variants(text)
        assert [variant.label for variant in variants] == labels
        assert variants[0].options == {"w": (1, 2), "n": {"k:l": [3, 4]}}
        assert variants[1].options == {"t": "x,y:z"}

    def test_data_may_hold_commas_and_has_one_spelling(self, tmp_path, monkeypatch):
        assert split_data('shapes,"a,b",c (1)') == ["shapes", "a,b", "c (1)"]
        assert parse_data("d5/") == parse_data("./d5") == parse_data("d5") == ("d5", "easy")
        assert parse_data("./digits")[0] == "./digits" and parse_data("digits")[0] == "digits"
        assert tiny_run(data="d5").name == tiny_run(data=parse_data("d5/")[0]).name
        for name in ("d5@home/a", "d5@home/b"):
            (tmp_path / name).mkdir(parents=True)
            Image.new("RGB", (16, 16)).save(tmp_path / name / "x.png")
        monkeypatch.chdir(tmp_path)
        arguments = ["--attn", "sana", "--data", "d5@home,d5@home/", "--resolutions", "16", *SEED]
        assert compare_module.main([*arguments, "--dry-run"]) == 0

    def test_fewer_images_than_classes_are_refused(self, tmp_path):
        for number in range(11):
            (tmp_path / "data" / str(number)).mkdir(parents=True)
            Image.new("RGB", (16, 16)).save(tmp_path / "data" / str(number) / "x.png")
        arguments = ["--data", str(tmp_path / "data"), "--resolutions", "16", "--samples", "10"]
        with pytest.raises(UserError, match="--samples 10 are fewer than the 11 classes"):
            compare_module.main(["--attn", "sana", *arguments, "--out", str(tmp_path / "out")])
        assert not (tmp_path / "out").exists()

    def test_runs_of_earlier_versions_are_found(self):
        """The names that they had, whatever settings are added meanwhile."""
        assert tiny_run().name == "digits-easy-native-sana-seed-0-72f596df"
        settings = Settings(
            attn="dydila", attn_options={"conv": "none", "lambda_init": 0.1}, steps=3,
            data="pics/d5", resolution=32, protocol="matched",
        )  # fmt: skip
        one = PlannedRun(
            label="+focused kernel", settings=settings, cfgs=(1.0, 4.0), samples=500,
            sampling_steps=20, imports=("zoo_of_mine",),
        )  # fmt: skip
        assert one.name == "d5-easy-32-matched-focused-kernel-seed-0-6ca1988e"

    def test_data_and_variants_are_read(self):
        assert parse_data("shapes/long-range") == ("shapes", "long-range")
        assert parse_data("folder/long-range") == ("folder/long-range", "easy")
        variant = parse_variant("dydila:lambda_init=0.1:conv=none:qkv_bias=true")
        assert variant.attn == "dydila"
        assert variant.options == {"lambda_init": 0.1, "conv": "none", "qkv_bias": True}

    def test_small_images_come_first_within_a_seed_and_protocols_are_crossed(self):
        plan = plan_runs(
            [parse_variant("softmax"), parse_variant("sana")],
            [("shapes", 32), ("digits", None), ("shapes/long-range", 16)], seeds=2,
            protocols=["controlled", "matched"],
            like=PlannedRun(label="", settings=Settings(patch_size=4, steps=5, batch_size=4),
            cfgs=(1.0,), samples=10, sampling_steps=2))  # fmt: skip
        order = [(c.settings.seed, c.settings.resolution, c.settings.protocol) for c in plan[::2]]
        assert order == [
            (seed, side, protocol)
            for seed in (0, 1)
            for side in (None, 16, 32)
            for protocol in ("controlled", "matched")
        ]
        assert len({one.name for one in plan}) == 24
        assert sum("matched" in one.name for one in plan) == 12

    def test_other_settings_are_another_run(self):
        assert tiny_run().name == tiny_run().name
        assert tiny_run(seed=1).name != tiny_run().name
        assert tiny_run(learning_rate=1e-4).name != tiny_run().name


def table(**values):
    return pd.concat(
        pd.DataFrame({"variant": name, "seed": range(len(v)), "FID[smallcnn]": v, "IS[x]": v})
        for name, v in values.items()
    )


class TestWhatSeedsCanSay:
    def test_a_difference_within_the_spread_is_none(self):
        frame = table(a=[1.0, 2.0, 3.0], b=[1.2, 1.9, 3.1])
        found = compare_variants(frame, "a", "b", "FID[smallcnn]")
        assert found.kind == "same" and NO_DIFFERENCE in found.words

    def test_pairing_finds_what_the_spread_between_seeds_would_hide(self):
        frame = table(a=[1.0, 20.0, 300.0], b=[1.5, 20.51, 300.49])
        found = compare_variants(frame, "a", "b", "FID[smallcnn]")
        assert found.kind == "better" and found.gain == pytest.approx(0.5)
        assert compare_variants(frame, "b", "a", "FID[smallcnn]").kind == "worse"
        assert compare_variants(frame, "b", "a", "IS[x]").kind == "better"

    def test_the_interval_is_students(self):
        frame = table(a=[0.0, 0.0, 0.0], b=[1.0, 2.0, 3.0])
        found = compare_variants(frame, "a", "b", "FID[smallcnn]")
        assert found.margin == pytest.approx(4.302653 * 1 / 3**0.5, rel=1e-5)
        assert found.kind == "same"  # 2 ± 2.48

    def test_one_seed_says_nothing(self):
        found = compare_variants(table(a=[1.0], b=[5.0]), "a", "b", "FID[smallcnn]")
        assert found.kind == "unknown" and "nothing can be said" in found.words
        assert compare_variants(table(a=[1.0]), "a", "c", "FID[smallcnn]").kind == "unknown"

    def test_gains_that_agree_to_the_last_digit_are_no_certainty(self):
        found = compare_variants(table(a=[1.0, 2.0], b=[1.5, 2.5]), "a", "b", "FID[smallcnn]")
        assert found.kind == "unknown" and "no spread" in found.words
        same = compare_variants(table(a=[1.0, 2.0], b=[1.0, 2.0]), "a", "b", "FID[smallcnn]")
        assert same.kind == "same"

    def test_the_sentence_names_the_best_and_the_ties(self):
        frame = table(a=[1.0, 2.0, 3.0], b=[1.1, 1.9, 3.1], c=[9.0, 10.0, 11.5])
        text = summary_sentence(frame, "FID[smallcnn]")
        assert "a has the best mean (2)" in text
        assert "beyond the spread over seeds better than c (80 %)" in text
        # 0.033 ± 0.29 of 2.03: a bound is never rounded down.
        assert f"{NO_DIFFERENCE} from b (differs by less than 16 %)" in text

    def test_equal_means_are_a_tie_though_their_sums_differ(self):
        frame = table(a=[0.1, 0.2, 0.3], b=[0.0, 0.3, 0.3], c=[0.5, 0.6, 0.7])
        assert len({np.mean([0.1, 0.2, 0.3]), np.mean([0.0, 0.3, 0.3])}) == 2
        text = summary_sentence(frame, "FID[smallcnn]")
        assert "a and b tie for the best mean (0.2)" in text and "has the best" not in text
        both = summary_sentence(frame[frame.variant != "c"], "FID[smallcnn]")
        assert both == "FID[smallcnn]: all variants tie (0.2)."

    def test_a_winner_is_shown_with_the_digits_that_make_it_one(self):
        frame = table(a=[0.12001, 0.12002], b=[0.120014, 0.120025])
        text = summary_sentence(frame, "FID[smallcnn]")
        assert "a has the best mean (0.120015, then 0.12002)" in text
        found = Verdict(0.0404, 0.0396, 3)
        assert found.kind == "better" and found.gain_and_margin(2, 1) == "+0.0404 ± 0.04"
        assert Verdict(0.12, 0.034, 3).gain_and_margin(2, 1) == "+0.12 ± 0.03"
        assert Verdict(0.0, 0.0, 3).gain_and_margin(2, 1) == "+0 ± 0"

    def test_gains_that_agree_but_for_rounding_are_no_certainty(self):
        frame = table(a=[0.12, 0.3, 0.5], b=[0.02, 0.2, 0.4])
        assert compare_variants(frame, "a", "b", "IS[x]").kind == "unknown"
        frame = table(a=[0.1 + 0.2, 0.3], b=[0.3, 0.1 + 0.2])
        assert compare_variants(frame, "a", "b", "IS[x]").kind == "same"

    def test_runs_at_chance_are_called_so(self):
        def runs(share, first=1.0, last=0.5, classes=10, count=500):
            row = {"class_accuracy[smallcnn]": share, "classes": classes, "count": count,
                   "first_loss": first, "last_loss": last, "variant": "a"}  # fmt: skip
            return pd.DataFrame([row, row])

        assert "0.104, where guessing gives 0.1" in at_chance(runs(0.104))
        assert at_chance(runs(0.3)) is None and at_chance(runs(1.0, classes=1)) is None
        assert "0.2, where" in at_chance(runs(0.2, count=12)) and at_chance(runs(0.2)) is None
        assert "training loss 1.01 after 1 at its start" in at_chance(runs(0.3, last=1.01))
        assert at_chance(runs(0.3)[["variant"]]) is None
        assert chance_lines(runs(0.1))[0].startswith("a is at chance (class_accuracy[smallcnn]")

    def test_means_and_spreads(self):
        frame = table(a=[1.0, 2.0, 3.0]).assign(
            data="d", level="", resolution=8, protocol="matched", cfg=1.0
        )
        row = summarize(frame).set_index("metric").loc["FID[smallcnn]"]
        assert (row["mean"], row["std"], row["seeds"]) == (2.0, 1.0, 3)


def comparison(folder, frame, **values):
    """The folder of a comparison with these runs, as compare.py leaves it."""
    values = {
        "data": "digits", "level": "", "resolution": 8, "cfg": 4.0, "state": OK, "samples": 300,
        "protocol": "controlled", "steps": 5, "batch_size": 4, "macs": 1e6, "device": "cpu",
        "torch": "2.13", "evaluator": "smallcnn 520aacd8", **values,
    }  # fmt: skip
    frame = frame.drop(columns="IS[x]").assign(**values)
    frame["run"] = frame.variant + frame.seed.astype(str) + frame.protocol + f"{values['steps']}"
    folder.mkdir(exist_ok=True)
    frame.to_csv(folder / "runs.csv", index=False)
    (folder / "command.txt").write_text("python recipes/compare.py --attn x")
    return folder


GOOD = table(dydila=[1.0, 1.1, 1.2], sana=[2.0, 2.15, 2.2], softmax=[1.9, 2.3, 2.1]).rename(
    columns={"FID[smallcnn]": "KID[smallcnn]"}
)


class TestTheResultsPage:
    def test_claims_are_judged_from_the_tables_alone(self, tmp_path):
        page = results.results_page([comparison(tmp_path / "a", GOOD)])
        short, overview = page.split("## ")[1:3]
        holds, _, rest = short.partition("Cannot tell")
        assert "Holds wherever" in holds and "dydila before sana (Table 1): 1 for dydila" in holds
        assert "sana before softmax" in rest and "sana before softmax" not in holds
        assert overview.startswith("Overview, protocol controlled")
        assert "| claim | digits 8 px |" in overview
        assert "| dydila before sana (Table 1) | ✓ +1 ± 0.07 |" in overview
        assert "| sana before softmax (Table 1) | ~ -0.017 ± 0.4 |" in overview
        assert "python recipes/compare.py --attn x" in page and "24.48" in page
        assert "| digits 8 px | controlled | 9 of 9 | 0: 3, 1: 3, 2: 3 | 5 x 4 | 300 | cpu" in page
        assert "different devices" not in page

    def test_protocols_devices_and_lengths_stay_apart(self, tmp_path):
        """A second folder reverses the first one's order: joined, they would be a tie."""
        reverse = GOOD.assign(**{"KID[smallcnn]": 3 - GOOD["KID[smallcnn]"]})
        here = comparison(tmp_path / "a", GOOD)
        for other in ({"protocol": "matched"}, {"steps": 50}):
            page = results.results_page([here, comparison(tmp_path / "b", reverse, **other)])
            assert "dydila before sana (Table 1): 1 for dydila, 1 for sana" in page
        there = comparison(tmp_path / "b", GOOD[GOOD.seed > 1], device="cuda", resolution=8)
        (tmp_path / "a" / "runs.csv").write_text(
            "".join(
                line
                for line in (here / "runs.csv").read_text().splitlines(keepends=True)
                if ",2," not in line or line.startswith("variant")
            )
        )
        page = results.results_page([here, there])
        assert "different devices: digits 8 px (cpu 6, cuda 3)" in page

    def test_a_run_that_two_comparisons_share_counts_once(self, tmp_path):
        waiting = comparison(tmp_path / "a", GOOD, state="not run", cfg=np.nan)
        page = results.results_page([waiting, comparison(tmp_path / "b", GOOD)])
        assert "9 of 9" in page and "have no number" not in page

    def test_verdicts_add_up_to_a_conclusion(self):
        claim = CLAIMS[0]
        words = {
            "holds": ["better", "same"],
            "mostly holds": [*["better"] * 10, "worse", "same"],
            "cannot tell": ["better", "worse", *["same"] * 18],
            "the opposite holds": ["worse", "same"],
            "mostly the opposite holds": [*["worse"] * 10, "better", "same"],
            "mixed": ["better", "worse"],
            "not measured": ["unknown"],
        }
        for wanted, kinds in words.items():
            assert results.conclusion(claim, kinds)[0] == wanted
        equal = next(claim for claim in CLAIMS if claim.equal)
        # Each side by itself is within chance, though together they are not.
        few = ["better"] * 3 + ["worse"] * 5 + ["same"] * 52
        assert results.conclusion(claim, few)[0] == "cannot tell"
        assert results.conclusion(equal, ["same"])[0] == "no difference seen"
        assert results.conclusion(equal, ["same", "worse"])[0] == "a difference is seen"

    def test_a_folder_without_a_comparison_is_named(self, tmp_path):
        with pytest.raises(UserError, match=r"holds no comparison.*compare\.py"):
            results.results_page([tmp_path])


class TestPalette:
    def test_one_color_per_mechanism_under_every_name(self):
        assert color_of("sana") == color_of("Sana") == color_of("Sana-S/2") == "#0072B2"
        assert color_of("dydila") == color_of("DyDi-LiT") == color_of("+reparameterization")
        assert color_of("a-name-of-mine") == color_of("a-name-of-mine")
        assert re.fullmatch(r"#[0-9A-F]{6}", color_of("a-name-of-mine"))
        assert marker_of("DiT") == marker_of("softmax") != marker_of("sana")

    def test_the_zoo_has_colors_of_its_own(self):
        from attnzoo import get_attention, list_attention

        # Other tests of this process may have registered mechanisms of their own.
        of_zoo = "attnzoo.mechanisms."
        names = [n for n in list_attention() if get_attention(n).__module__.startswith(of_zoo)]
        assert len({color_of(name) for name in names}) == len(names)
        pairs = {(color_of(name), marker_of(name)) for name in names}
        assert len(pairs) == len(names)


def test_reports_of_nothing_are_possible(tmp_path):
    from recipes.studies.comparison.report import write_report

    one = tiny_run()
    states = write_report(tmp_path, [one], paper_rows([]), title="nothing")
    assert states == {one.name: "not run"}
    assert "0 of 1 runs are done" in (tmp_path / "report.html").read_text()
    assert not Run(tmp_path / "runs" / one.name / "run").config_file.exists()
