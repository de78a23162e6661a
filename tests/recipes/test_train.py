"""Training: it learns, it resumes exactly, and it refuses what it cannot do."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import attnzoo
from attnzoo.testing import check_shapes
from recipes import train as train_module
from recipes.checkpoint import Run
from recipes.console import INTERRUPTED, NON_FINITE, UserError
from recipes.train import Settings, Trainer, train

SMALL = {"batch_size": 16, "checkpoint_every": 10, "sample_every": 1000}
SCRIPT = Path(train_module.__file__)


def weights(run):
    _, folder = run.newest_checkpoint(warn=pytest.fail)
    return {
        f"{part}.{name}": tensor
        for part in ("model", "ema")
        for name, tensor in load_file(
            folder / part / "diffusion_pytorch_model.safetensors"
        ).items()
    } | load_file(folder / "optimizer.safetensors")


def log(run):
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in run.read_log()]


def command_line(*arguments):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=300
    )


def test_thirty_steps_lower_the_loss_and_leave_a_run(trained):
    losses = [entry["loss"] for entry in trained.read_log()]
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    grid = Image.open(trained.samples / "step-00000030.png")
    assert grid.size == (10 * 66 + 2, 2 * 66 + 2)
    kept = sorted(folder.name for folder in trained.checkpoints.iterdir())
    assert kept == ["step-00000020", "step-00000030"]


@pytest.mark.parametrize("attn", ["softmax", "dydila"])
def test_a_resumed_run_equals_an_uninterrupted_one(attn, tmp_path):
    settings = Settings(attn=attn, steps=12, **SMALL | {"checkpoint_every": 4})
    whole, parts = Run(tmp_path / "whole"), Run(tmp_path / "parts")
    assert train(settings, whole) == 0
    assert train(settings, parts, should_stop=lambda step: step == 5) == INTERRUPTED
    parts.append_log({"step": 6, "loss": 123.0})  # logged after the checkpoint, then lost
    assert train(settings, parts, resume=True) == 0
    assert log(whole) == log(parts)
    first, second = weights(whole), weights(parts)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_every_mechanism_sees_the_same_batches():
    batches = []
    for attn in ("softmax", "dydila"):
        trainer = Trainer(Settings(attn=attn, steps=5))
        trainer.step = 3
        batches.append(trainer._batch())
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one, other)


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--steps", "5000", "--batch-size", "8", "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not (out / "log.jsonl").exists():
        assert process.poll() is None, process.stdout.read()
    os.kill(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == INTERRUPTED, printed
    assert f"--resume --out {out}" in printed
    assert "Traceback" not in printed
    step, _ = Run(out).newest_checkpoint(warn=pytest.fail)
    assert step == Run(out).read_log()[-1]["step"]


def test_non_finite_loss_stops_with_the_last_checkpoint_whole(tmp_path, monkeypatch, capsys):
    original = Trainer._batch

    def poisoned(self):
        images, *rest = original(self)
        return (images * float("nan") if self.step == 7 else images, *rest)

    monkeypatch.setattr(Trainer, "_batch", poisoned)
    run = Run(tmp_path / "run")
    settings = Settings(attn="sana", steps=12, **SMALL | {"checkpoint_every": 5})
    assert train(settings, run) == NON_FINITE
    assert run.newest_checkpoint(warn=pytest.fail)[0] == 5
    assert "step 8: loss nan" in capsys.readouterr().out


@pytest.mark.parametrize("preset", ["dit", "flow"])
def test_other_presets_train_and_sample(preset, tmp_path):
    run = Run(tmp_path / "run")
    arguments = ["--attn", "sana", "--preset", preset, "--steps", "2", "--batch-size", "8"]
    assert train_module.main([*arguments, "--precision", "fp32", "--out", str(run.folder)]) == 0
    assert ("vb" in run.read_log()[0]) == (preset == "dit")
    assert (run.samples / "step-00000002.png").exists()


@pytest.mark.parametrize("data", ["shapes", "folder"])
def test_other_data_trains(data, tmp_path):
    if data == "folder":
        for label in ("cat", "dog"):
            (tmp_path / "data" / label).mkdir(parents=True)
            Image.new("RGB", (40, 30), (label == "cat" and "red") or "blue").save(
                tmp_path / "data" / label / "a.png"
            )
        data = str(tmp_path / "data")
    run = Run(tmp_path / "run")
    arguments = ["--attn", "sana", "--data", data, "--resolution", "16", "--steps", "2"]
    assert train_module.main([*arguments, "--batch-size", "4", "--out", str(run.folder)]) == 0
    assert run.config()["data"]["channels"] == 3


def test_a_mechanism_of_ones_own_trains_with_no_other_change(tmp_path):
    @attnzoo.register_attention("uniform")
    class Uniform(attnzoo.Attention):
        def __init__(self, context, config):
            super().__init__(context, config)
            self.value = torch.nn.Linear(self.dim, self.dim)

        def forward(self, x, grid):
            self.check_tokens(x, grid)
            return self.value(x.mean(1, keepdim=True)).expand_as(x)

    try:
        check_shapes("uniform")
        assert train(Settings(attn="uniform", steps=2, **SMALL), Run(tmp_path / "run")) == 0
    finally:
        from attnzoo import registry

        del registry._REGISTRY["uniform"]


def _errors(tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    empty = tmp_path / "empty"
    empty.mkdir()
    return {
        "unknown attention": (["--attn", "snaa"], ["'snaa'", "'sana'"]),
        "unknown option": (["--set", "gama_init=2"], ["'gama_init'", "'gamma_init'"]),
        "option value": (["--set", "conv=acnett"], ["'acnett'", "'acnet'"]),
        "option form": (["--set", "conv"], ["option=value", "'conv'"]),
        "resolution": (
            ["--data", "shapes", "--resolution", "18", "--patch-size", "4"],
            ["18", "20"],
        ),
        "upsampling": (["--data", "digits", "--resolution", "32"], ["32", "8"]),
        "missing data": (["--data", str(tmp_path / "nowhere")], ["nowhere"]),
        "empty data": (["--data", str(empty)], [str(empty)]),
        "size": (["--size", "XL"], ["'XL'", "tiny"]),
        "foreign folder": (["--out", str(foreign)], [str(foreign), "another --out"]),
        "no run": (["--resume", "--out", str(tmp_path / "none")], ["none", "no run"]),
    }


CASES = (
    "unknown attention",
    "unknown option",
    "option value",
    "option form",
    "resolution",
    "upsampling",
    "missing data",
    "empty data",
    "size",
    "foreign folder",
    "no run",
)


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_clear_line(case, tmp_path):
    arguments, fragments = _errors(tmp_path)[case]
    if "--out" not in arguments:
        arguments = [*arguments, "--out", str(tmp_path / "run")]
    with pytest.raises(UserError) as caught:
        train_module.main([*arguments, "--steps", "1"])
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message
    assert not (tmp_path / "run").exists()


def test_the_command_line_exits_with_two_and_no_traceback(tmp_path):
    for arguments in (["--steps", "0"], ["--attn", "dydlia", "--out", str(tmp_path / "run")]):
        result = command_line(*arguments)
        assert result.returncode == 2
        assert "Traceback" not in result.stderr
        assert "error:" in result.stderr.strip().splitlines()[-1]


def test_a_run_is_never_overwritten_unasked(trained):
    before = {path: path.stat().st_mtime_ns for path in trained.folder.rglob("*")}
    arguments = ["--attn", "sana", "--steps", "3", "--out", str(trained.folder)]
    with pytest.raises(UserError, match=r"--resume.*--overwrite"):
        train_module.main(arguments)
    with pytest.raises(UserError, match=r"attn: 'dydila' -> 'sana'"):
        train_module.main([*arguments, "--resume"])
    assert before == {path: path.stat().st_mtime_ns for path in trained.folder.rglob("*")}


def test_overwrite_replaces_only_what_a_run_makes(tmp_path):
    run = Run(tmp_path / "run")
    settings = Settings(attn="sana", steps=2, **SMALL)
    assert train(settings, run) == 0
    (run.folder / "notes.txt").write_text("mine")
    assert train(settings, run, overwrite=True) == 0
    assert len(run.read_log()) == 2
    assert (run.folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "manifest"])
def test_a_broken_checkpoint_is_named_and_passed_over(damage, tmp_path):
    run = Run(tmp_path / "run")
    assert train(Settings(attn="sana", steps=4, **SMALL | {"checkpoint_every": 2}), run) == 0
    victim = run.checkpoints / "step-00000004" / "optimizer.safetensors"
    if damage == "truncate":
        victim.write_bytes(victim.read_bytes()[:-10])
    elif damage == "flip":
        content = bytearray(victim.read_bytes())
        content[-1] ^= 1
        victim.write_bytes(content)
    elif damage == "delete":
        victim.unlink()
    else:
        (victim.parent / "manifest.json").write_text("")
    said = []
    assert run.newest_checkpoint(warn=said.append)[0] == 2
    assert "step-00000004" in said[0]


def test_configuration_is_readable(trained):
    config = json.loads(trained.config_file.read_text())
    assert config["settings"]["attn"] == "dydila"
    assert config["data"]["class_names"] == [str(digit) for digit in range(10)]
