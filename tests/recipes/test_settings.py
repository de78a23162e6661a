"""Settings: one class gives flags, defaults, files and their table; --help waits for nothing."""

import dataclasses
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from recipes import convert as convert_module
from recipes import train as train_module
from recipes.lab.console import DONE, INTERRUPTED, Progress, UserError, log
from recipes.lab.data import folder
from recipes.lab.data import images as images_module
from recipes.lab.data.datasets import DATASETS, load_dataset
from recipes.lab.training import banner
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.distillation import TERMS
from recipes.lab.training.flags import given_settings, settings_table
from recipes.lab.training.optimizer import make_optimizer
from recipes.lab.training.session import train
from recipes.lab.training.settings import FIELDS, PRESETS, Settings, flag_of
from recipes.lab.training.settings_file import read_settings
from recipes.lab.training.trainer import Trainer
from tests.recipes.reliability import draw

ROOT = Path(__file__).parents[2]
SMALL = {"attn": "sana", "batch_size": 4, "checkpoint_every": 2, "sample_every": 1000}
HEAVY = {
    *("torch", "numpy", "pandas", "diffusers", "accelerate", "PIL", "matplotlib", "seaborn"),
    *("scipy", "sklearn", "yaml", "safetensors", "einops", "tqdm"),
}


@pytest.fixture(scope="module")
def helps():
    """--help of every script, and what was imported to print it; each in turn by one process."""
    code = f"""
        import contextlib, io, json, runpy, sys
        from pathlib import Path
        found = {{}}
        for file in sorted(Path("recipes").glob("[!_]*.py")):
            sys.argv, said = [str(file), "--help"], io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
                runpy.run_path(str(file), run_name="__main__")
            loaded = {{name.partition(".")[0] for name in sys.modules}} & {HEAVY}
            found[file.stem] = said.getvalue(), sorted(loaded)
        print(json.dumps(found))
    """
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(line[8:] for line in code.splitlines())],
        capture_output=True, text=True, cwd=ROOT, timeout=120, env={"COLUMNS": "100"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


class TestHelp:
    def test_it_waits_for_nothing_and_shows_an_example(self, helps):
        assert {"train", "sample", "evaluate", "compare", "demo"} <= helps.keys()
        for script, (text, loaded) in helps.items():
            assert not loaded, (script, loaded)
            assert f"\n    python recipes/{script}.py " in text, script

    def test_it_is_grouped_and_shows_defaults(self, helps):
        text = " ".join(helps["train"][0].split())
        for group in ("data:", "model:", "optimization:", "run:", "folder and output:"):
            assert group in text
        for name, field in FIELDS.items():
            if field.metadata["group"] and field.default not in (None, False, True):
                assert f"{flag_of(name)} " in text and f"(default: {field.default})" in text
        # A conversion's are those of the trained model.
        converted = helps["convert"][0].partition("\ndata:")[2]
        assert "default:" not in converted.partition("\nconversion and output:")[0]

    def test_it_names_what_there_is_to_choose_from(self, helps):
        from backbones.presets import PROTOCOLS
        from recipes.lab.evaluation.scores import FEWEST
        from recipes.studies.dydila.figures import FIGURES
        from recipes.studies.dydila.paper import PRESETS as COMPARED

        for name, field in FIELDS.items():
            for choice in field.metadata["rule"].choices():
                said = f"{field.metadata['help']} {field.metadata['rule'].flag}"
                assert choice in said, (name, choice)
        text = {script: " ".join(said.split()) for script, (said, _) in helps.items()}
        assert all(name in FIELDS["data"].metadata["help"] for name in DATASETS)
        assert ", ".join(f"{name}={weight}" for name, weight in TERMS.items()) in text["convert"]
        assert ",".join(FIGURES) in text["figures"]
        assert "{" + ",".join(COMPARED) + "}" in text["compare"]
        assert ",".join(PROTOCOLS) in text["compare"]
        for script in ("compare", "evaluate"):
            result = command_line(script, "RUN", f"--samples={FEWEST - 1}")
            assert result.returncode == 2 and f"at least {FEWEST}" in result.stderr

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--stpes", "5"], "'--stpes 5' is not known here; did you mean --steps?"),
            (["--device", "cpu"], "'--device cpu' is not known here; python"),
            (["--config"], "--config: expected one argument"),
            (["--learning-rate", "fast"], "'fast' is not a number"),
            (["--steps", "none"], "'none' is not an integer"),
        ],
    )
    def test_a_mistake_is_one_line_and_two(self, arguments, said, capsys):
        with pytest.raises(SystemExit) as caught:
            train_module.main(arguments)
        assert caught.value.code == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1 and error.startswith("error: ")

    def test_the_table_of_the_docs_is_the_class(self):
        page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
        assert settings_table() in page, "python -m recipes.lab.training.flags prints it"


def command_line(script, *arguments):
    return subprocess.run(
        [sys.executable, f"recipes/{script}.py", *arguments],
        capture_output=True, text=True, cwd=ROOT, timeout=60,
    )  # fmt: skip


def written(path, text):
    path.write_text(text, encoding="utf-8")
    return path


class TestFile:
    def test_yaml_is_read_as_it_looks(self, tmp_path):
        file = written(
            tmp_path / "run.yaml",
            "# of mine\nlearning_rate: 1e-4\nsteps: 400_000\ncompile: on\ncuda-graph: off\n"
            "strict: true\ngradient_clip: none\nkeep_every: null\nema_decay: 0\nvae: ~\n"
            "attn: 'sana*3+softmax'\nattn_options: {sana: {qk_norm: true}}\n",
        )
        assert read_settings(file) == {
            "learning_rate": 1e-4, "steps": 400_000, "compile": "on", "cuda_graph": "off",
            "strict": True, "gradient_clip": None, "keep_every": None, "ema_decay": 0.0,
            "vae": None, "attn": "sana*3+softmax", "attn_options": {"sana": {"qk_norm": True}},
        }  # fmt: skip
        Settings(**read_settings(file))
        again = written(tmp_path / "run.json", json.dumps(read_settings(file)))
        assert read_settings(again) == read_settings(file)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("steps: 5\n\tseed: 1\n", "line 2: .*indent with spaces"),
            ("steps:\t5\n", "line 1: .*indent with spaces"),
            ("steps: [5, 6]", r"steps is \[5, 6\] and must be an integer .*such as steps: 1500"),
            ("steps: 1e3", r"steps is 1000\.0 and must be an integer"),
            ("learning_rate: fast", "learning_rate is 'fast' and must be a number above 0 and"),
            ("learning_rate: .nan", "learning_rate is '.nan' and must be"),
            ("strict: yes", "strict is 'yes' and must be true or false"),
            ("size: XL", "size is 'XL' and must be one of tiny, S, B, L"),
            ("level: {a: 1}", "level is .* and must be one of easy"),
            ("stepps: 5", "'stepps', which is not a setting; did you mean 'steps'"),
            ("out: runs/x", "'out', which a file does not say: pass --out"),
            ("steps: 5\nsteps: 6", "'steps' is given twice"),
            ("5: 6", "5 is no name"),
            ("? [a, b]\n: 1", "is no name"),
            ("- steps: 5", "holds a list: give settings by name"),
            ("steps", "holds no names: give"),
            ("", "holds nothing"),
            ("a: &x 5\nb: *x", "alias"),
            (
                "steps: !!python/object/apply:os.system [touch canary]",
                "line 1: could not determine",
            ),
            ("steps: !!int {}", "is not YAML: "),
            ("steps: {", "line 1: "),
            ("a: 1\x00", "is not YAML: .*special characters"),
            ('{"_class_name": "DiT", "depth": 2}', "'_class_name', so it is the configuration of"),
        ],
    )
    def test_a_careless_one_is_one_line(self, text, said, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        file = written(tmp_path / "run.yaml", text)
        with pytest.raises(UserError, match=said) as caught:
            train_module.main(["--config", str(file), "--out", str(tmp_path / "run")])
        assert "\n" not in str(caught.value) and str(file) in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]

    @pytest.mark.parametrize("text", ["{", '{"steps": 5, "steps": 6}', "[" * 100_000, "[1]"])
    def test_a_careless_json_too(self, text, tmp_path):
        with pytest.raises(UserError, match=r"run\.json") as caught:
            read_settings(written(tmp_path / "run.json", text))
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("name", ["nowhere.yaml", "."])
    def test_one_that_is_not_there(self, name, tmp_path):
        with pytest.raises(UserError, match="cannot be read: No such file"):
            read_settings(tmp_path / name)

    def test_flags_come_before_it(self, tmp_path, capsys):
        file = str(written(tmp_path / "run.yaml", "attn: dydila\nsteps: 5\nstrict: true\n"
                           "attn_options: {n_projectors: 2, conv: none}\n"))  # fmt: skip

        def asked(*arguments):
            given = vars(train_module._parser().parse_args(["--config", file, *arguments]))
            return given_settings(
                {n: z for n, z in given.items() if n in (*FIELDS, "config", "set")}
            )

        assert asked("--no-strict", "--steps", "7") == {
            "attn": "dydila", "steps": 7, "strict": False,
            "attn_options": {"n_projectors": 2, "conv": "none"},
        }  # fmt: skip
        assert asked("--set", "conv=acnet")["attn_options"] == {"n_projectors": 2, "conv": "acnet"}
        # Options are of one mechanism.
        assert "attn_options" not in asked("--attn", "softmax")
        assert "attn_options of" in capsys.readouterr().out
        both = asked("--attn", "sana", "--set", "qk_norm=true")
        assert both["attn_options"] == {"qk_norm": True}
        written(Path(file), "attn_options: {qk_norm: true}")
        assert asked("--attn", "sana")["attn_options"] == {"qk_norm": True}


# What a run from before issue 19 did not say.
NEW = ("warmup_steps", "decay_steps", "weight_decay")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "sample_grid", lambda self, path: None)
        run = Run(tmp_path_factory.mktemp("finished") / "run")
        assert train(Settings(**SMALL, steps=4), run) == DONE
    return run


class TestRuns:
    def test_its_own_settings_are_a_file_and_make_the_same_run(
        self, finished, tmp_path, no_pictures, capsys
    ):
        again = tmp_path / "again"
        given = ["--config", str(finished.config_file), "--out", str(again)]
        assert train_module.main(given) == DONE
        assert losses(Run(again)) == losses(finished)
        # The folder will do, and what is there is the same run.
        assert train_module.main(["--config", str(again), "--out", str(again)]) == DONE
        assert "is done, 4 steps" in capsys.readouterr().out
        with pytest.raises(UserError, match=r"learning_rate: 0\.003 -> 0\.1.*--allow-change"):
            train_module.main([*given, "--learning-rate", "0.1"])

    def test_one_from_before_goes_on_as_it_began(self, finished, tmp_path, no_pictures):
        run = Run(tmp_path / "run")
        stop = lambda step: step == 2  # noqa: E731
        assert train(Settings(**SMALL, steps=4), run, should_stop=stop) == INTERRUPTED
        config = json.loads(run.config_file.read_text())
        for name in NEW:
            del config["settings"][name]
        run.config_file.write_text(json.dumps(config))
        assert train_module.main(["--out", str(run.folder)]) == DONE
        assert losses(run) == losses(finished)
        assert NEW[0] not in run.config()["settings"] and "changes" not in run.config()
        assert read_settings(run.config_file)["weight_decay"] == 0
        newest = [one.newest_checkpoint(pytest.fail)[1] for one in (run, finished)]
        one, other = ((path / "optimizer.safetensors").read_bytes() for path in newest)
        assert one == other

    def test_one_that_was_converted_is_refused(self, finished, tmp_path):
        config = json.loads(finished.config_file.read_text())
        config["settings"]["start"] = {"source": "softmax"}
        file = written(tmp_path / "config.json", json.dumps(config))
        with pytest.raises(UserError, match=r"recipes/convert\.py.*convert again"):
            read_settings(file)

    def test_an_unknown_setting_of_a_run_is_named(self, finished, tmp_path):
        config = json.loads(finished.config_file.read_text())
        config["settings"]["stepps"] = 5
        with pytest.raises(UserError, match=r"'stepps'.*does not know.*'steps'"):
            read_settings(written(tmp_path / "config.json", json.dumps(config)))

    def test_a_conversion_takes_a_file_too(self, tmp_path):
        file = written(tmp_path / "run.yaml", "stepps: 5")
        with pytest.raises(UserError, match="did you mean 'steps'"):
            convert_module.main(["nowhere", "--config", str(file)])


def losses(run):
    return [entry["loss"] for entry in run.read_log()]


class TestRate:
    def test_without_new_settings_it_is_what_it_was(self):
        settings = Settings(steps=7)
        for step in range(7):
            assert settings.rate_at(step) == 3e-3 * (1 - step / 7)
        assert Settings(decay="constant").rate_at(1499) == 3e-3

    def test_it_rises_stays_and_falls(self):
        settings = Settings(steps=20, learning_rate=1.0, warmup_steps=4, decay_steps=8)
        rates = [settings.rate_at(step) for step in range(20)]
        assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4:13] == [1.0] * 9
        assert rates[13:] == pytest.approx([7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
        cosine = dataclasses.replace(settings, decay="cosine")
        assert cosine.rate_at(16) == pytest.approx(0.5)
        assert cosine.rate_at(19) == pytest.approx((1 + math.cos(math.pi * 7 / 8)) / 2)
        whole = Settings(steps=10, learning_rate=1.0, warmup_steps=2, decay="cosine")
        assert whole.rate_at(2) == 1.0 and whole.rate_at(6) == pytest.approx(0.5)
        assert Settings(steps=4, learning_rate=1.0, warmup_steps=4).rate_at(3) == 1.0

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"warmup_steps": 11}, "--warmup-steps 11 are more than --steps 10"),
            ({"decay_steps": 11}, "--warmup-steps 0 and --decay-steps 11 are more than --steps"),
            ({"warmup_steps": 6, "decay_steps": 5}, "are more than --steps 10: choose fewer"),
            ({"decay": "constant", "decay_steps": 5}, "--decay constant does not: drop one"),
            ({"decay": "exponential"}, "--decay must be one of linear, cosine, constant"),
            ({"warmup_steps": -1}, "--warmup-steps must be an integer from 0"),
            ({"weight_decay": -0.1}, "--weight-decay must be a number from 0 to 1e9"),
            ({"weight_decay": 1e39}, "--weight-decay must be a number from 0 to 1e9"),
            ({"gradient_clip": 1e300}, "--gradient-clip must be a number above 0 and at most 1e9"),
            ({"sharded": True, "accumulate": 2, "gradient_sums": "bf16"}, "2 micro-steps adds as"),
        ],
    )
    def test_what_cannot_be_is_refused(self, options, said):
        with pytest.raises(UserError, match=said):
            Settings(**{"steps": 10} | options)

    def test_weight_decay_shrinks_matrices_only(self):
        model = torch.nn.Linear(3, 2)
        optimizer = make_optimizer(model, Settings(weight_decay=0.5, learning_rate=0.1))
        before = [parameter.clone() for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        weight, bias = model.parameters()
        torch.testing.assert_close(weight, before[0] * (1 - 0.1 * 0.5))
        assert torch.equal(bias, before[1])
        assert len(make_optimizer(model, Settings()).param_groups) == 1

    def test_a_run_follows_it_and_resumes_exactly(self, tmp_path, no_pictures):
        settings = Settings(
            **SMALL, steps=6, warmup_steps=2, decay="cosine", decay_steps=3, weight_decay=0.1
        )
        whole, parts = Run(tmp_path / "whole"), Run(tmp_path / "parts")
        assert train(settings, whole) == DONE
        assert train(settings, parts, should_stop=lambda step: step == 3) == INTERRUPTED
        assert train_module.main(["--out", str(parts.folder)]) == DONE
        assert losses(whole) == losses(parts)
        rates = [entry["learning_rate"] for entry in whole.read_log()]
        assert rates == [settings.rate_at(step) for step in range(6)]


class TestDecoding:
    @pytest.fixture
    def images(self, tmp_path):
        generator = np.random.default_rng(0)
        for number in range(12):
            draw(tmp_path / "images" / f"{number % 2}" / f"{number}.png", generator)
        (tmp_path / "images" / "0" / "bad.png").write_bytes(b"no image")
        (tmp_path / "images" / "1" / "bad.png").write_bytes(b"")
        return tmp_path / "images"

    @pytest.mark.parametrize("cached", [True, False])
    def test_any_number_of_threads_gives_the_same(self, images, cached, monkeypatch):
        monkeypatch.setattr(images_module, "_AT_ONCE", 5)
        if not cached:
            monkeypatch.setattr(folder, "CACHE_BYTES", 0)
        found = []
        for number in (1, 3, 16):
            monkeypatch.setattr(images_module, "threads", lambda number=number: number)
            dataset = load_dataset(str(images), resolution=16)
            found.append((dataset.skipped, *dataset.batch(torch.tensor([11, 0, 5, 5, 2]))))
        for skipped, pixels, labels in found[1:]:
            assert skipped == found[0][0] and len(skipped) == 2
            assert torch.equal(pixels, found[0][1]) and torch.equal(labels, found[0][2])

    def test_processes_of_one_machine_share_its_cores(self, monkeypatch):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12), raising=False)
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        assert images_module.threads() == 12
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        assert images_module.threads() == 3
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "99")
        assert images_module.threads() == 1


class TestBanner:
    def test_large_pixels_are_remarked_on(self, monkeypatch, tmp_path):
        run = Run(tmp_path / "run")
        shown = banner.banner(Trainer(Settings(**SMALL, steps=9, warmup_steps=3)), run, 10**9)
        assert "9 steps of 4 images (0.025 epochs) at a rate of 0.003, rising over 3" in shown
        assert "trains on pixels" not in shown
        trainer = Trainer(Settings(**SMALL, data="shapes", resolution=128))
        shown = banner.banner(trainer, run, 10**9)
        assert "trains on pixels, 1024 tokens" in shown and "about 64: " in shown
        assert "--vae" in shown and "(" not in shown.splitlines()[2]

    def test_why_a_cost_is_not_counted_is_said(self, monkeypatch, tmp_path):
        def count_macs(*_, **__):
            raise ValueError("of macs_parts")

        monkeypatch.setattr(banner, "count_macs", count_macs)
        shown = banner.banner(Trainer(Settings(**SMALL)), Run(tmp_path / "run"), 10**9)
        assert "multiply-accumulates are not counted: ValueError: of macs_parts" in shown


class TestOutput:
    def test_other_handlers_may_take_the_lines(self, capsys, monkeypatch):
        taken = []

        class Keep(logging.Handler):
            def emit(self, record):
                taken.append((record.levelname, record.getMessage()))

        monkeypatch.setattr(log, "handlers", [Keep()])
        Progress("run", 5, is_main=True).say("said 100%")
        folder.warn("careful")
        assert taken == [("INFO", "said 100%"), ("WARNING", "careful")]
        assert capsys.readouterr() == ("", "")


def test_every_setting_has_a_flag_or_is_of_a_conversion():
    parser = train_module._parser()
    flags = {flag for action in parser._actions for flag in action.option_strings}
    without = [name for name in FIELDS if flag_of(name) not in flags]
    assert without == ["start", "backbone", "distil"]
    assert all(name in FIELDS for preset in PRESETS.values() for name in preset)
