"""What a run is told before it starts, what it remembers, and what it refuses when it goes on."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import attnzoo
from attnzoo import registry
from recipes import export as export_module
from recipes import train as train_module
from recipes.lab.console import DONE, INTERRUPTED, Progress, UserError, is_users_mistake
from recipes.lab.data.encoding import encode
from recipes.lab.sampling import RunSampler
from recipes.lab.training import banner, description, memory
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.session import train
from recipes.lab.training.settings import Settings, resumed_settings
from recipes.lab.training.trainer import Trainer
from tests.recipes.reliability import draw, make_vae
from tests.recipes.test_checkpoint import WEIGHTS, edited

SMALL = {"attn": "sana", "batch_size": 4, "checkpoint_every": 2, "sample_every": 1000}
SCRIPT = Path(train_module.__file__)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "sample_grid", lambda self, path: None)
        run = Run(tmp_path_factory.mktemp("finished") / "run")
        assert train(Settings(**SMALL, steps=2), run) == DONE
    return run


@pytest.fixture
def copy(finished, tmp_path, no_pictures):
    shutil.copytree(finished.folder, tmp_path / "run")
    return Run(tmp_path / "run")


def contents(folder):
    return {
        str(path): (os.readlink(path) if path.is_symlink() else path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


@contextlib.contextmanager
def refused(folder, match):
    """One line, and not a byte of the folder changes."""
    before = contents(folder)
    with pytest.raises((UserError, attnzoo.UsageError), match=match) as caught:
        yield caught
    assert "\n" not in str(caught.value)
    assert contents(folder) == before


@pytest.fixture
def pictures(tmp_path):
    generator = np.random.default_rng(0)
    for name in "abc":
        for number in range(2):
            draw(tmp_path / "pictures" / name / f"{number}.png", generator)
    return tmp_path / "pictures"


def resume(run, *arguments):
    return train_module.main(["--out", str(run.folder), *map(str, arguments)])


class TestSettings:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *(("learning_rate", value) for value in (float("inf"), float("nan"), -1.0, 0, "1")),
            *(("gradient_clip", value) for value in (0.0, float("nan"), -1.0)),
            *(("adam_beta2", value) for value in (1.0, -0.1, float("nan"))),
            *(("ema_decay", value) for value in (1.0, 1.5, -0.1)),
            *(("label_dropout", value) for value in (-0.1, 1.1, float("nan"))),
            *(
                (name, value)
                for name in (
                    *("steps", "batch_size", "accumulate", "skip_limit", "checkpoint_every"),
                    *("sample_every", "diagnose_every", "keep_every", "resolution"),
                    *("patch_size", "class_count"),
                )
                for value in (0, -1, 1.5, "2", True)
            ),
            *((name, value) for name in ("seed", "class_seed") for value in (-1, 2**64, None)),
            *(
                (name, "no such choice")
                for name in (
                    "compile",
                    "decay",
                    "precision",
                    "preset",
                    "size",
                    "protocol",
                    "level",
                )
            ),
            *((name, 1) for name in ("strict", "sharded", "ema_ramp")),
            *((name, "") for name in ("attn", "data", "vae")),
            ("attn_options", {"x": float("nan")}),
            ("attn_options", [1]),
            ("steps", 2**62),
        ],
    )
    def test_what_cannot_be_is_refused_before_work(self, name, value):
        with pytest.raises(UserError, match=f"--(set|{name.replace('_', '-')})") as caught:
            Settings(**{name: value})
        assert "\n" not in str(caught.value)

    def test_every_field_has_a_rule(self):
        from recipes.lab.training import settings

        for field in dataclasses.fields(Settings):
            assert field.metadata["rule"].fits(getattr(Settings(), field.name))
        for preset in settings.PRESETS.values():
            Settings(**preset)

    @pytest.mark.parametrize("rate", ["inf", "nan", "-1", "0", "1e39", "1e300"])
    def test_the_command_line_refuses_a_rate(self, rate, tmp_path):
        with pytest.raises(UserError, match="--learning-rate must be a number above 0 and at mo"):
            train_module.main([f"--learning-rate={rate}", "--out", str(tmp_path / "run")])
        assert not (tmp_path / "run").exists()

    def test_a_tuple_is_the_list_that_json_makes_of_it(self):
        saved = {"attn_options": {"grid": [4, 6]}}
        _, lines = resumed_settings(saved, {"attn_options": {"grid": (4, 6)}})
        assert lines == []
        with pytest.raises(UserError, match="attn_options"):
            resumed_settings(saved, {"attn_options": {"grid": (4, 7)}})


def edit(run, change):
    config = json.loads(run.config_file.read_text())
    change(config)
    run.config_file.write_text(json.dumps(config))


class TestDamagedFiles:
    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("{", "is damaged"),
            ("", "is damaged"),
            ("[1, 2]", "not the configuration of a run"),
            ("[" * 100_000, "nested too deeply"),
            ("{}", "not the configuration of a run"),
            ('{"settings": {}}', "not the configuration of a run"),
            ('{"settings": {"attn": "sana", "steps": "many"}}', "damaged.*--steps"),
            ('{"settings": {"attn": "sana", "decay": "sudden"}}', "damaged.*--decay.*linear"),
            ('{"settings": {"attn": "sana", "warmup": 5}}', "setting 'warmup'.*does not know"),
            ('{"settings": {"attn": "sana"}, "data": [1]}', "damaged"),
            ('{"settings": {"attn": "sana"}, "data": {"class_names": "ab"}}', "damaged"),
            ('{"settings": {"attn": "sana"}, "data": {"resolution": "8"}}', "damaged"),
            ('{"settings": {"attn": "sana"}, "imports": []}', "damaged"),
        ],
    )
    def test_of_a_configuration(self, copy, text, said):
        if text.startswith('{"settings": {"attn"') and '"data"' not in text:
            text = json.dumps({"data": copy.config()["data"]} | json.loads(text))
        copy.config_file.write_text(text)
        with refused(copy.folder, f"config.json.*{said}") as caught:
            resume(copy)
        if "does not know" not in said:
            assert str(caught.value).endswith("; restore it, or choose another folder")

    def test_of_a_configuration_that_is_to_be_replaced(self, copy):
        copy.config_file.write_text("{")
        with refused(copy.folder, r"config.json' is damaged.*; restore it, or choose another fol"):
            resume(copy, "--overwrite")

    @pytest.mark.parametrize(
        "text", ["{}", "[]", "{", '"done"', '{"state": 1}', "\xff", '{"state": "running"}']
    )
    def test_of_a_status(self, copy, text):
        copy.status_file.write_text(text, encoding="latin-1")
        with refused(copy.folder, r"status\.json' is damaged.*; log\.jsonl beside it lists"):
            train_module.main(["--status", str(copy.folder)])

    @pytest.mark.parametrize("name", ["log.jsonl", "log.held.jsonl"])
    @pytest.mark.parametrize(
        "line",
        ["{", "[]", '{"loss": 1}', '{"step": "1"}', "", "\xff", '{"step": 1, "loss": "x"}',
         '{"step": 1, "gradient_norm": true}', f'{{"step": 1, "loss": 1{"0" * 400}}}'],
    )  # fmt: skip
    def test_of_a_log(self, copy, name, line):
        lines = copy.log_file.read_text().splitlines()
        file = copy.folder / name
        file.write_text("\n".join([lines[0], line, lines[1], ""]), encoding="latin-1")
        with refused(copy.folder, rf"line 2 of .*{name}' is damaged"):
            resume(copy, "--steps", 4, "--allow-change", "steps")

    def test_escape_codes_do_not_reach_the_terminal(self, copy, capsys):
        status = json.loads(copy.status_file.read_text())
        copy.status_file.write_text(json.dumps({**status, "reason": "\x1b[2J"}))
        assert train_module.main(["--status", str(copy.folder)]) == DONE
        assert "\x1b" not in capsys.readouterr().out


class TestData:
    def test_a_run_remembers_what_its_data_held(self, finished):
        data = finished.config()["data"]
        assert data["identity"]["images"] == 1438
        assert len(data["identity"]["sha256"]) == 64
        assert data["latent"] is None and data["source"] is None

    @pytest.mark.parametrize("change", ["rename", "overwrite", "remove", "add"])
    def test_data_that_has_changed_is_refused_and_allowed_by_name(
        self, pictures, tmp_path, change, no_pictures, capsys
    ):
        run = Run(tmp_path / "run")
        settings = Settings(**SMALL, steps=2, data=str(pictures), resolution=16)
        assert train(settings, run) == DONE
        if change == "rename":
            (pictures / "b").rename(pictures / "z")
        elif change == "overwrite":
            Image.new("RGB", (20, 20), "red").save(pictures / "b" / "1.png")
        elif change == "remove":
            (pictures / "b" / "1.png").unlink()
        else:
            shutil.copy(pictures / "b" / "1.png", pictures / "b" / "2.png")
        more = ["--steps", 4, "--allow-change", "steps"]
        said = "class_names" if change == "rename" else "SHA-256"
        with refused(run.folder, f"is not what it began with.*{said}.*--allow-change data"):
            resume(run, *more)
        assert resume(run, *more, "--allow-change", "data") == DONE
        assert "the data has changed" in capsys.readouterr().out
        assert any("data: " in line for line in run.config()["changes"][0]["changes"])
        # What was allowed is what it is from now on.
        assert resume(run, "--steps", 5, "--allow-change", "steps") == DONE

    def test_a_run_from_before_identities_goes_on_with_one_line(self, copy, capsys):
        edit(copy, lambda config: [config["data"].pop("identity"), config.pop("environment")])
        more = ["--allow-change", "steps"]
        assert resume(copy, "--steps", 3, *more) == DONE
        assert capsys.readouterr().out.count("does not say what its data held") == 1
        assert copy.config()["data"]["identity"]["images"] == 1438
        assert resume(copy, "--steps", 4, *more) == DONE
        assert "does not say" not in capsys.readouterr().out

    def test_refusals_change_nothing(self, copy):
        with refused(copy.folder, "--allow-change attn"):
            resume(copy, "--attn", "softmax")
        with refused(copy.folder, "is of another model"):
            resume(copy, "--attn", "softmax", "--steps", 9, "--allow-change", "attn",
                   "--allow-change", "steps")  # fmt: skip
        with refused(copy.folder, "divide among"):
            resume(copy, "--accumulate", 3, "--allow-change", "accumulate")
        with refused(copy.folder, "already holds a run"):
            train(Settings(**SMALL), copy)
        with refused(copy.folder, "tracker 'none'"):
            train(Settings(**SMALL, steps=3), copy, resume=True, trackers=["none"])

    def test_previews_of_cached_latents_are_decoded(self, pictures, tmp_path, capsys):
        vae = make_vae(tmp_path / "vae")
        encode(pictures, tmp_path / "latents", vae=vae, resolution=16, dtype="fp32")
        run = Run(tmp_path / "run")
        settings = Settings(**SMALL, steps=2, data=str(tmp_path / "latents"))
        assert train(settings, run) == DONE
        assert "first latent channel" not in capsys.readouterr().out
        data = run.config()["data"]
        assert data["latent"]["place"] == str(Path(vae).resolve())
        assert data["source"]["folder"] == str(pictures.resolve())
        pixels = np.asarray(Image.open(run.samples / "step-00000002.png"))
        assert (pixels.max(-1) != pixels.min(-1)).any()
        # Without its VAE one line says what is shown instead.
        shutil.rmtree(vae)
        other = Run(tmp_path / "other")
        assert train(dataclasses.replace(settings, steps=3, sample_every=1), other) == DONE
        assert capsys.readouterr().out.count("show the first latent channel") == 1
        assert len(list(other.samples.iterdir())) == 3


OWN = """
import torch
import attnzoo

@attnzoo.register_attention("mean")
class Mean(attnzoo.Attention):
    def __init__(self, context, config):
        super().__init__(context, config)
        self.value = torch.nn.Linear(self.dim, self.dim)

    def forward(self, x, grid):
        return self.value(x.mean(1, keepdim=True)).expand_as(x)
"""


@pytest.fixture
def own(tmp_path):
    file = tmp_path / "mean.py"
    file.write_text(OWN)
    yield file
    forget()


def forget():
    registry._REGISTRY.pop("mean", None)
    registry._SOURCES.pop("mean", None)
    for name in [name for name in sys.modules if name.startswith("attnzoo_mean_")]:
        del sys.modules[name]


TIED = OWN.replace(
    "\n    def forward", """
        self.key = torch.nn.Linear(self.dim, self.dim)
        self.key.weight = self.value.weight
        self.register_buffer("cache", torch.zeros(1), persistent=False)

    def forward""",
).replace("self.value(x", "self.value(self.key(x.tanh())")  # fmt: skip


class TestOwnMechanism:
    def test_weights_that_are_tied_and_buffers_that_are_not_saved(
        self, own, tmp_path, no_pictures
    ):
        own.write_text(TIED)
        attnzoo.import_mechanisms(str(own))
        settings = Settings(**SMALL | {"attn": "mean"}, steps=4)
        whole, half = Run(tmp_path / "whole"), Run(tmp_path / "half")
        assert train(settings, whole) == DONE
        assert train(settings, half, should_stop=lambda step: step == 2) == INTERRUPTED

        def as_before(average):
            for index in range(4):
                layer = f"blocks.{index}.attention"
                average[f"{layer}.cache"] = torch.zeros(1)
                assert average.pop(f"{layer}.key.weight").equal(average[f"{layer}.value.weight"])

        edited(half, f"ema/{WEIGHTS}", as_before)
        assert RunSampler(half)(torch.tensor([1]), steps=1).isfinite().all()
        assert train(settings, half, resume=True) == DONE
        for part in (f"model/{WEIGHTS}", f"ema/{WEIGHTS}", "optimizer.safetensors"):
            one, other = (run.checkpoints / "step-00000004" / part for run in (whole, half))
            assert one.read_bytes() == other.read_bytes()
        assert export_module.main([str(half.folder), "--out", str(tmp_path / "out")]) == DONE

    def test_a_run_remembers_where_it_came_from(self, own, tmp_path, no_pictures, capsys):
        run = Run(tmp_path / "run")
        start = ["--import", str(own), "--attn", "mean", "--steps", "2", "--batch-size", "4"]
        assert train_module.main([*start, "--out", str(run.folder)]) == DONE
        assert run.config()["imports"]["mean"]["source"] == str(own.resolve())
        forget()
        more = ["--allow-change", "steps", "--steps"]
        assert resume(run, *more, 3) == DONE
        assert "imported from" in capsys.readouterr().err
        forget()
        own.rename(tmp_path / "moved.py")
        with refused(run.folder, r"attention 'mean' of .*mean\.py.*--import"):
            resume(run, *more, 4)
        assert resume(run, *more, 4, "--import", tmp_path / "moved.py") == DONE

    def test_a_mistake_in_it_shows_its_traceback(self, own, tmp_path, commands):
        own.write_text(OWN.replace("x.mean(1, keepdim=True)", "x.mean(1) + 'a'"))
        arguments = ["--import", own, "--attn", "mean", "--out", tmp_path / "run"]
        status, said = commands.run(SCRIPT, *arguments, cwd=tmp_path)
        assert status == 1
        assert "Traceback" in said and "TypeError" in said and str(own) in said

    def test_a_result_of_another_shape_is_not_trained(self, own, tmp_path):
        own.write_text(OWN.replace(".expand_as(x)", ""))
        attnzoo.import_mechanisms(str(own))
        said = r"attention 'mean' returned tokens of \(\d+, 1, 96\) for tokens of \(\d+, 16, 96\)"
        with pytest.raises(ValueError, match=said) as caught:
            train(Settings(**SMALL | {"attn": "mean"}, steps=1), Run(tmp_path / "run"))
        assert not is_users_mistake(caught.value)

    @pytest.mark.parametrize("where", ["step", "diagnostics", "preview"])
    def test_a_late_mistake_is_no_line_either(self, own, tmp_path, where):
        mistakes = {
            "step": "    def forward(self, x, grid):\n        if self.training: None + 1",
            "preview": "    def forward(self, x, grid):\n"
            "        if not self.training and not torch.is_grad_enabled(): None + 1",
            "diagnostics": "    def diagnostics(self, x, grid):\n        return None + 1\n\n"
            "    def forward(self, x, grid):",
        }
        own.write_text(OWN.replace("    def forward(self, x, grid):", mistakes[where]))
        attnzoo.import_mechanisms(str(own))
        settings = Settings(**SMALL | {"attn": "mean"}, steps=2, diagnose_every=1)
        with pytest.raises(TypeError):
            train(settings, Run(tmp_path / "run"))


class TestEnvironment:
    def test_a_resume_elsewhere_says_what_differs(self, copy, capsys):
        edit(copy, lambda config: config["environment"].update(
            {"torch": "1.0", "compiled power map": True, "threads": 99}
        ))  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(description.build, "library", _Library())
            assert resume(copy, "--steps", 3, "--allow-change", "steps") == DONE
        said = capsys.readouterr().out
        assert said.count("not bit for bit") == 1
        assert "torch 1.0 -> " in said and "compiled power map True -> False" in said
        assert "threads 99 -> " in said
        assert copy.config()["environment"]["torch"] == torch.__version__

    def test_the_same_environment_is_not_mentioned(self, copy, capsys):
        assert resume(copy, "--steps", 3, "--allow-change", "steps") == DONE
        assert "bit for bit" not in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("ACCELERATE_USE_DEEPSPEED", "true"),
            ("ACCELERATE_USE_MEGATRON_LM", "true"),
            ("ACCELERATE_USE_FSDP", "1"),
            ("ACCELERATE_USE_PARALLELISM_CONFIG", "true"),
            ("ACCELERATE_DYNAMO_BACKEND", "inductor"),
            ("ACCELERATE_USE_CPU", "banana"),
            ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "x"),
            ("WORLD_SIZE", "abc"),
            ("WORLD_SIZE", "2"),
        ],
    )
    def test_a_variable_for_what_is_not_done_here_is_one_line(self, name, value, monkeypatch):
        monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"{name}|launcher started 2") as caught:
            Trainer(Settings(**SMALL))
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("impl", ["flash", "triton", "xformers", "fla"])
    @pytest.mark.parametrize("attn", ["softmax", "dydila", "gated"])
    def test_an_implementation_that_cannot_run_is_one_line(self, attn, impl, tmp_path):
        if torch.cuda.is_available():
            pytest.skip("it may run on a GPU")
        arguments = ["--attn", attn, "--set", f"impl={impl}", "--out", str(tmp_path / "run")]
        with pytest.raises((UserError, attnzoo.UsageError)) as caught:
            train_module.main([*arguments, "--steps", "1", "--batch-size", "2"])
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run").exists()


class _Library:
    """A power map that could not be compiled."""

    def __call__(self):
        return None

    def cache_info(self):
        return type("Info", (), {"currsize": 1})


class TestMemory:
    @pytest.mark.parametrize("attn", ["softmax", "dydila", "sana"])
    def test_the_estimate_is_near_what_a_step_takes(self, attn, tmp_path, commands):
        code = """
            import sys
            import torch
            torch.set_num_threads(1)
            from recipes.lab.training import memory
            from recipes.lab.training.settings import Settings
            from recipes.lab.training.trainer import Trainer
            trainer = Trainer(Settings(attn=sys.argv[1], data="shapes", batch_size=192))
            told = memory.step_bytes(trainer)
            before = int(open("/proc/self/statm").read().split()[1]) * 4096
            open("/proc/self/clear_refs", "w").write("5")
            trainer.train_step()
            peak = [line.split()[1] for line in open("/proc/self/status") if "VmHWM" in line]
            print(told, int(peak[0]) * 1024 - before)
        """
        script = tmp_path / "peak.py"
        script.write_text(textwrap.dedent(code))
        status, said = commands.run(script, attn, cwd=tmp_path)
        assert status == 0, said
        told, taken = map(int, said.splitlines()[-1].split())
        assert 0.65 < told / taken < 1.35, (told, taken)

    def test_the_model_is_left_as_it_was(self):
        trainer = Trainer(Settings(**SMALL | {"attn": "dydila"}, gradient_checkpointing=True))
        before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        few = memory.step_bytes(trainer)
        for name, tensor in trainer.model.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        assert trainer.model.training and trainer.model.gradient_checkpointing
        plain = Trainer(Settings(**SMALL | {"attn": "dydila"}))
        assert few < memory.step_bytes(plain)

    def test_compiled_blocks_keep_less(self):
        told, weights = {}, 0
        for mode in ("off", "on"):
            trainer = Trainer(Settings(**SMALL | {"attn": "sana"}, compile=mode))
            told[mode] = memory.step_bytes(trainer)
            weights = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
        kept = {mode: count - 1.25 * 3 * weights for mode, count in told.items()}
        assert kept["on"] == pytest.approx(0.75 * kept["off"], abs=2)

    def test_a_step_that_does_not_fit_is_refused(self, tmp_path, monkeypatch, no_pictures):
        monkeypatch.setattr(banner, "free_bytes", lambda device: 1_000_000)
        arguments = ["--attn", "sana", "--steps", "1", "--out", str(tmp_path / "run")]
        with pytest.raises(UserError, match=r"takes about .*GB are free.*--batch-size"):
            train_module.main(arguments)
        assert not (tmp_path / "run").exists()
        assert train_module.main([*arguments, "--ignore-memory"]) == DONE

    def test_the_limits_of_control_groups_count(self, tmp_path):
        def put(path, text):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)

        cpu = torch.device("cpu")
        assert memory.free_bytes(cpu, tmp_path) is None
        put("proc/meminfo", "MemTotal: 9 kB\nMemAvailable: 8000 kB\n")
        assert memory.free_bytes(cpu, tmp_path) == 8_192_000
        put("proc/self/cgroup", "0::/a/b\n")
        put("sys/fs/cgroup/a/b/memory.max", "max\n")
        put("sys/fs/cgroup/a/memory.max", "5000\n")
        put("sys/fs/cgroup/a/memory.current", "4000\n")
        put("sys/fs/cgroup/a/memory.stat", "anon 1\ninactive_file 500\n")
        assert memory.free_bytes(cpu, tmp_path) == 1500
        put("proc/self/cgroup", "7:cpu,memory:/docker/x\n")
        put("sys/fs/cgroup/memory/memory.limit_in_bytes", "900\n")
        put("sys/fs/cgroup/memory/memory.usage_in_bytes", "200\n")
        assert memory.free_bytes(cpu, tmp_path) == 700

    def test_the_recipe_for_latents_refuses_pixels(self, pictures, tmp_path, no_pictures):
        arguments = ["--preset", "dit", "--data", str(pictures), "--out", str(tmp_path / "run")]
        with pytest.raises(UserError, match=r"--vae.*encode\.py.*--pixels"):
            train_module.main(arguments)
        assert not (tmp_path / "run").exists()
        small = ["--size", "tiny", "--batch-size", "2", "--steps", "1", "--resolution", "16"]
        assert train_module.main([*arguments, *small, "--pixels"]) == DONE

    def test_a_run_begins_with_what_it_is(self, tmp_path, no_pictures, capsys):
        assert train(Settings(**SMALL, steps=1), Run(tmp_path / "run")) == DONE
        first, second = capsys.readouterr().out.splitlines()[:2]
        assert "sana, " in first and "M parameters, 16 tokens and 0.00" in first
        assert "cpu, digits: 1438 images of 8 px, 10 classes; a step of 4 takes about" in second
        assert second.endswith("GB free")


class TestOutput:
    def test_without_a_terminal_there_is_a_line_at_times(self, capsys, monkeypatch):
        monkeypatch.delenv("TQDM_DISABLE", raising=False)
        clock = [0.0]
        monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
        shown = Progress("run", 500, is_main=True)
        shown.start(0)
        for _ in range(400):
            clock[0] += 0.1
            shown.advance("loss 1")
        shown.say("said")
        written = capsys.readouterr()
        lines = written.err.split("\n")[:-1]
        assert written.out == "said\n" and "\r" not in written.err
        assert len(lines) == 4 or len(lines) == 5  # the first at the start
        assert lines[1].startswith("run: ") and "/500" in lines[1] and "loss 1" in lines[1]

    @pytest.mark.parametrize("terminal", [False, True])
    def test_tqdm_disable_is_respected(self, terminal, capsys, monkeypatch):
        monkeypatch.setenv("TQDM_DISABLE", "1")
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
        shown = Progress("run", 5, is_main=True)
        shown.start(0)
        shown.advance("loss 1")
        shown.say("said")
        shown.close()
        assert capsys.readouterr() == ("said\n", "")

    @pytest.mark.parametrize("closed", ["stdout", "both"])
    def test_a_closed_pipe_ends_in_a_saved_run(self, closed, tmp_path, commands):
        out, pipe = tmp_path / "run", tmp_path / "pipe"
        os.mkfifo(pipe)
        errors = tmp_path / "errors" if closed == "stdout" else None
        # Nothing more is said on stdout before the end; progress on stderr is noticed earlier.
        steps = 60 if closed == "stdout" else 100_000
        process = commands.start(
            SCRIPT, "--attn", "sana", "--batch-size", 4, "--steps", steps, "--out", out,
            cwd=tmp_path, to=pipe, errors=errors,
        )  # fmt: skip
        with pipe.open() as reader:
            reader.readline()
        code = commands.wait(process)
        said = errors.read_text() if errors else ""
        assert "Traceback" not in said
        run = Run(out)
        assert code == INTERRUPTED or (closed == "stdout" and code == DONE), said
        step, _ = run.newest_checkpoint(warn=pytest.fail)
        assert step == run.read_log()[-1]["step"]
        assert json.loads(run.status_file.read_text())["state"] in ("done", "preempted")

    def test_a_broken_output_stops_after_the_step(self, tmp_path, monkeypatch, no_pictures):
        class Broken:
            def write(self, text):
                raise BrokenPipeError(32, "Broken pipe")

            def flush(self):
                pass

        def close(step):
            if step == 2:
                monkeypatch.setattr(sys, "stdout", Broken())
                monkeypatch.setattr(sys, "stderr", Broken())
            return False

        run = Run(tmp_path / "run")
        settings = Settings(**SMALL | {"sample_every": 1}, steps=50)
        monkeypatch.setattr(Trainer, "sample_grid", lambda self, path: "a line")
        assert train(settings, run, should_stop=close) == INTERRUPTED
        assert run.newest_checkpoint(warn=pytest.fail)[0] == 3
        assert "closed output" in json.loads(run.status_file.read_text())["reason"]

    def test_a_closed_terminal_saves(self, tmp_path, no_pictures):
        run = Run(tmp_path / "run")

        def hang_up(step):
            if step == 3:
                os.kill(os.getpid(), signal.SIGHUP)
            return False

        before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
        try:
            assert train(Settings(**SMALL, steps=50), run, should_stop=hang_up) == INTERRUPTED
        finally:
            signal.signal(signal.SIGHUP, before)
        assert run.newest_checkpoint(warn=pytest.fail)[0] == 4
        assert "SIGHUP" in json.loads(run.status_file.read_text())["reason"]

    def test_nohup_is_respected(self, tmp_path, no_pictures):
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            settings = Settings(**SMALL, steps=3)
            stop = lambda step: os.kill(os.getpid(), signal.SIGHUP) is not None  # noqa: E731
            assert train(settings, Run(tmp_path / "run"), should_stop=stop) == DONE
        finally:
            signal.signal(signal.SIGHUP, before)

    def test_names_are_written_without_a_utf8_locale(self, tmp_path, commands):
        folder = tmp_path / "bücher"
        for name in ("käse", "猫"):
            (folder / name).mkdir(parents=True)
            Image.new("RGB", (16, 16), "red").save(folder / name / "a.png")
        status, said = commands.run(
            SCRIPT, "--attn", "sana", "--data", folder, "--resolution", 16, "--steps", 1,
            "--batch-size", 2, "--out", tmp_path / "läufe", cwd=tmp_path,
        )  # fmt: skip
        assert status == DONE, said
        assert Run(tmp_path / "läufe").config()["data"]["class_names"] == ["käse", "猫"]
