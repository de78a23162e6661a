"""Training: it learns, it resumes exactly, and it refuses what it cannot do."""

import dataclasses
import errno
import gc
import json
import os
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import attnzoo
from attnzoo.testing import check_shapes
from recipes import train as train_module
from recipes.lab import failures
from recipes.lab.console import INTERRUPTED, UserError, argument, parse_options, run_script
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.ema import WeightAverage
from recipes.lab.training.guard import SpikeWatch, quartile_entry, quartile_sums
from recipes.lab.training.session import train
from recipes.lab.training.settings import Settings
from recipes.lab.training.trainer import Trainer

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


def test_thirty_steps_lower_the_loss_and_leave_a_run(trained):
    losses = [entry["loss"] for entry in trained.read_log()]
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    grid = Image.open(trained.samples / "step-00000030.png")
    assert grid.size == (10 * 66 + 2, 2 * 66 + 2)
    kept = sorted(folder.name for folder in trained.checkpoints.iterdir())
    assert kept == ["step-00000020", "step-00000030"]


@pytest.mark.parametrize(
    ("attn", "feedforward"),
    [("softmax", None), ("dydila", None), ("sana", "diffmoe"), ("sana", "time-experts")],
)
def test_a_resumed_run_equals_an_uninterrupted_one(attn, feedforward, tmp_path):
    every = SMALL | {"checkpoint_every": 4}
    settings = Settings(attn=attn, feedforward=feedforward, steps=12, **every)
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


def test_stops_at_and_between_the_ends_of_epochs_change_nothing(tmp_path):
    """Six images in batches of four, of two micro-steps: an epoch ends within step 2, and at 3."""
    for number in range(6):
        (tmp_path / "data" / f"{number % 2}").mkdir(parents=True, exist_ok=True)
        picture = Image.new("RGB", (16, 16), (40 * number, 99, 200 - 40 * number))
        picture.save(tmp_path / "data" / f"{number % 2}" / f"{number}.png")
    settings = Settings(
        **SMALL | {"batch_size": 4}, attn="sana", steps=8, accumulate=2,
        data=str(tmp_path / "data"), resolution=16,
    )  # fmt: skip
    whole, parts = Run(tmp_path / "whole"), Run(tmp_path / "parts")
    assert train(settings, whole) == 0
    for stop in (2, 3, 4, 5):
        resume = parts.config_file.exists()
        stopped = train(
            settings, parts, resume=resume, should_stop=lambda step, at=stop: step == at
        )
        assert stopped == INTERRUPTED
    assert train(settings, parts, resume=True) == 0
    assert log(whole) == log(parts)
    first, second = weights(whole), weights(parts)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_a_set_smaller_than_a_batch_trains(tmp_path):
    (tmp_path / "data" / "only").mkdir(parents=True)
    Image.new("RGB", (16, 16), "red").save(tmp_path / "data" / "only" / "a.png")
    settings = Settings(
        attn="sana", steps=2, batch_size=8, data=str(tmp_path / "data"), resolution=16
    )
    assert train(settings, Run(tmp_path / "run")) == 0


def test_every_mechanism_sees_the_same_batches():
    batches = []
    for attn in ("softmax", "dydila"):
        trainer = Trainer(Settings(attn=attn, steps=5))
        trainer.step = 3
        batches.append(trainer._batch())
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one, other)


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, commands):
    out, printed = tmp_path / "run", tmp_path / "printed"
    process = commands.start(
        SCRIPT, "--steps", 5000, "--batch-size", 8, "--out", out, cwd=tmp_path, to=printed
    )
    while not (out / "log.jsonl").exists():
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        assert state != "Z", printed.read_text()
        time.sleep(0.02)
    os.kill(process, signal.SIGINT)
    assert commands.wait(process) == INTERRUPTED, printed.read_text()
    assert f"--resume --out {out}" in printed.read_text()
    assert "Traceback" not in printed.read_text()
    step, _ = Run(out).newest_checkpoint(warn=pytest.fail)
    assert step == Run(out).read_log()[-1]["step"]


@pytest.mark.parametrize("preset", ["dit", "flow"])
def test_other_presets_train_and_sample(preset, tmp_path):
    run = Run(tmp_path / "run")
    arguments = ["--attn", "sana", "--preset", preset, "--size", "tiny", "--steps", "2"]
    arguments += ["--batch-size", "8"]
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
        "unknown attention": (["--attn", "snaa"], ["'snaa'", "'sana'", "--import"]),
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
        "a file": (["--out", str(foreign / "thesis.tex")], ["is a file", "another --out"]),
        "no folder": (["--out", ""], ["--out ''", "drop it"]),
        "no value": (["--vae="], ["--vae ''", "drop it"]),
        "null character": (["--data", "a\0b"], [r"'a\x00b'", "leave it out"]),
        "nobody's home": (["--data=~nobody-here/x"], ["'~nobody-here/x' is in the home of no"]),
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
    "a file",
    "no folder",
    "no value",
    "null character",
    "nobody's home",
    "no run",
)


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_clear_line(case, tmp_path):
    arguments, fragments = _errors(tmp_path)[case]
    if "--out" not in arguments:
        arguments = [*arguments, "--out", str(tmp_path / "run")]
    with pytest.raises((UserError, attnzoo.UsageError)) as caught:
        train_module.main([*arguments, "--steps", "1"])
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message
    assert not (tmp_path / "run").exists()


def test_the_command_line_exits_with_two_and_no_traceback(tmp_path, commands):
    for arguments in (
        ["--steps", "0"],
        ["--attn", "dydlia", "--out", str(tmp_path / "run")],
        ["--steps", "1", "--out", "a" * 300],
    ):
        status, said = commands.run(SCRIPT, *arguments, cwd=tmp_path)
        assert status == 2
        assert "Traceback" not in said
        assert "error:" in said.strip().splitlines()[-1]


class Gone:
    """A store whose process has ended."""

    def compare_set(self, *arguments):
        raise RuntimeError("Connection reset by peer")

    check = compare_set


def test_of_several_processes_the_first_to_fail_speaks(monkeypatch, capsys):
    gone = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1"
    shared = UserError("x")
    shared.is_shared = True
    lost = failures.UNHEARD
    cases = (
        ([UserError("x"), RuntimeError(gone)], 2, ["error in process 1: x\n", ""]),
        ([shared, shared], 2, ["error: x\n", ""]),
        ([RuntimeError(gone), RuntimeError(gone)], 1, [f"error: {lost}\n"] * 2),
        ([KeyboardInterrupt(), RuntimeError(gone), KeyboardInterrupt()], 130,
         ["interrupted; the same command goes on where it can\n", "", ""]),
        ([ZeroDivisionError(), RuntimeError(gone), ValueError("another bug")], 1, ["", "", ""]),
        ([BrokenPipeError(), RuntimeError(gone)], 141, ["", ""]),
        ([RuntimeError("gloo does not know this type")], 1, [""]),
        ([RuntimeError("Broken pipe")], 1, [""]),
        ([ValueError(gone)], 1, [""]),
        ([UserError("\udcff")], 2, ["error in process 1: \\udcff\n"]),
        ([UserError("x")], 2, ["error in process 1: x\n"], Gone),
        ([RuntimeError(gone)], 1, [f"error: {lost}\n"], Gone),
    )  # fmt: skip

    def interrupted(seconds):
        raise KeyboardInterrupt  # a second Ctrl-C

    monkeypatch.setattr("time.sleep", interrupted)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for errors, status, said, *kind in cases:
        store = kind[0]() if kind else torch.distributed.HashStore()
        monkeypatch.setattr(failures, "_store", lambda store=store: store)
        for rank, error, line in zip((1, 0, 2), errors, said, strict=False):
            monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
            monkeypatch.setenv("RANK", str(rank))

            def main(arguments, error=error):
                raise error

            is_bug = status == 1 and rank == 1 and not line
            with pytest.raises(type(error) if is_bug else SystemExit) as caught:
                run_script(main)
            assert is_bug or caught.value.code == status
            assert capsys.readouterr().err == line


@pytest.mark.parametrize("arguments", [["--no-such"], ["--status", "nowhere"]])
def test_the_first_of_several_processes_says_first_what_may_be_wrong_in_all(
    arguments, monkeypatch, capsys
):
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        assert not capsys.readouterr().err

    monkeypatch.setattr("time.sleep", sleep)
    monkeypatch.setattr("sys.argv", ["train.py", *arguments])
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as caught:
            run_script(lambda arguments: train_module.main(arguments))
        assert caught.value.code == 2 and capsys.readouterr().err.startswith("error")
    assert len(waited) == 1 and waited[0] > 1


@pytest.mark.parametrize("file", ["/forbidden/run/config.json", None])
def test_a_place_that_is_forbidden_is_one_line(file, capsys):
    def main(arguments):
        raise PermissionError(errno.EACCES, "Permission denied", file)

    with pytest.raises(SystemExit if file else PermissionError) as caught:
        run_script(main)
    if file:
        said = f"error: {file!r} cannot be reached (Permission denied); choose another place\n"
        assert (caught.value.code, capsys.readouterr().err) == (2, said)


def test_a_command_that_is_shown_takes_any_folder():
    names = ["-x", "a b", "$(x)", "plain"]
    assert [shlex.split(argument(name)) for name in names] == [
        ["./-x"],
        ["a b"],
        ["$(x)"],
        ["plain"],
    ]


def test_a_run_is_never_overwritten_unasked(trained):
    before = {path: path.stat().st_mtime_ns for path in trained.folder.rglob("*")}
    arguments = ["--attn", "sana", "--steps", "3", "--out", str(trained.folder)]
    for more in ([], ["--resume"]):
        with pytest.raises(UserError, match=r"attn: 'dydila' -> 'sana'.*--allow-change attn"):
            train_module.main([*arguments, *more])
    with pytest.raises(UserError, match="already holds a run"):
        train_module.main([*arguments, "--resume", "never"])
    with pytest.raises(UserError, match=r"--size must be one of tiny"):  # none to be allowed
        train_module.main([*arguments, "--size", "XL"])
    assert before == {path: path.stat().st_mtime_ns for path in trained.folder.rglob("*")}


def test_a_finished_run_says_so_and_stays_as_it_is(trained, capsys):
    before = {path: path.stat().st_mtime_ns for path in trained.folder.rglob("*")}
    assert train_module.main(["--out", str(trained.folder)]) == 0
    said = capsys.readouterr().out
    assert "is done, 30 steps" in said and "--overwrite" in said
    assert before == {path: path.stat().st_mtime_ns for path in trained.folder.rglob("*")}


def test_a_finished_run_gets_back_what_found_no_room(trained, tmp_path):
    shutil.copytree(trained.folder, tmp_path / "run")
    run = Run(tmp_path / "run")
    lines = run.log_file.read_bytes().splitlines(keepends=True)
    run.log_file.write_bytes(b"".join(lines[:-2]))
    run.held_file.write_bytes(b"".join(lines[-2:]))
    assert train_module.main(["--out", str(run.folder)]) == 0
    assert run.log_file.read_bytes() == b"".join(lines) and not run.held_file.exists()


def test_commands_that_are_shown_can_be_pasted(tmp_path, capsys):
    folder = tmp_path / "my first run"
    with pytest.raises(UserError, match=r"--out '.*my first run'"):
        Run.open(folder)
    settings = Settings(attn="softmax", steps=2, **SMALL)
    assert train(settings, Run(folder), should_stop=lambda step: step == 1) == INTERRUPTED
    assert train(settings, Run(folder), resume=True) == 0
    assert train(settings, Run(folder), resume=True) == 0
    said = capsys.readouterr().out
    commands = [shlex.split(line) for line in said.splitlines() if "  python recipes/" in line]
    assert [str(folder) in command for command in commands] == [True] * 3


def test_a_run_that_is_there_is_continued(tmp_path, capsys):
    run = Run(tmp_path / "run")
    settings = Settings(attn="sana", steps=6, **SMALL)
    assert train(settings, run, should_stop=lambda step: step == 2) == INTERRUPTED
    assert train_module.main(["--attn", "sana", "--out", str(run.folder)]) == 0
    assert "is there: going on after step 2" in capsys.readouterr().out
    # Longer, by name, and noted.
    arguments = ["--steps", "8", "--out", str(run.folder), "--allow-change"]
    with pytest.raises(UserError, match=r"'stepps' is not a setting; did you mean 'steps'"):
        train_module.main([*arguments, "stepps"])
    assert train_module.main([*arguments, "steps"]) == 0
    assert [entry["step"] for entry in run.read_log()] == list(range(1, 9))
    assert run.config()["settings"]["steps"] == 8
    assert run.config()["changes"] == [{"step": 6, "changes": ["steps: 6 -> 8"]}]


def test_a_run_that_died_before_its_first_checkpoint_starts_over(trained, tmp_path):
    run = Run(tmp_path / "run")
    settings = Settings(attn="sana", steps=2, **SMALL)
    config = {"settings": dataclasses.asdict(settings), "data": trained.config()["data"]}
    run.create(config, overwrite=False)
    run.append_log({"step": 1, "loss": 1.0})
    assert train(settings, run, resume=True) == 0
    assert [entry["step"] for entry in run.read_log()] == [1, 2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_signals_finish_the_step_save_and_tell(number, tmp_path):
    run = Run(tmp_path / "run")

    def send(step):
        if step == 3:
            os.kill(os.getpid(), number)
        return False

    settings = Settings(attn="sana", steps=50, **SMALL)
    assert train(settings, run, should_stop=send) == INTERRUPTED
    assert run.newest_checkpoint(warn=pytest.fail)[0] == 4
    status = json.loads(run.status_file.read_text())
    assert status["state"] == "preempted" and signal.Signals(number).name in status["reason"]


def test_no_flag_is_taken_by_a_launcher():
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    own = [flag for action in train_module._parser()._actions for flag in action.option_strings]
    for launcher in (get_args_parser(), launch_command_parser()):
        for flag in own:  # one that begins several of the launcher's ends it
            assert launcher.parse_args(["train.py", flag, "1"]).training_script_args == [flag, "1"]


def test_batches_that_cannot_be_shared_out_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"batch size 16.*multiple of 3"):
        train(Settings(accumulate=3, **SMALL), Run(tmp_path / "run"))


def test_nothing_to_shard_is_said(tmp_path, capsys):
    settings = Settings(attn="sana", steps=1, sharded=True, **SMALL)
    assert train(settings, Run(tmp_path / "run")) == 0
    assert "one process has nothing to shard" in capsys.readouterr().out


def test_trackers_log_too(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    run = Run(tmp_path / "run")
    assert train(Settings(attn="sana", steps=2, **SMALL), run, trackers=["tensorboard"]) == 0
    assert list(run.folder.rglob("events.out.tfevents*"))
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match="pip install trackio"):
        train(Settings(steps=2), Run(tmp_path / "other"), trackers=["trackio"])


def test_spikes_are_named():
    watch = SpikeWatch({"loss": 1.0, "gradient_norm": 1.0} for _ in range(30))
    assert watch.look({"loss": 4.0, "gradient_norm": 9.0}) == []
    assert watch.look({"loss": 6.0, "gradient_norm": 11.0}) == ["loss", "gradient_norm"]
    assert watch.look({"loss": None, "skipped": "nan"}) == []
    assert SpikeWatch().look({"loss": 1e9}) == []


def test_loss_by_time_is_summed_in_quarters():
    sums = quartile_sums(torch.tensor([1.0, 2, 3, 4]), torch.tensor([0, 249, 250, 999]), 1000)
    assert quartile_entry(sums.tolist()) == {
        "mse_quarter_1": 1.5,
        "mse_quarter_2": 3.0,
        "mse_quarter_4": 4.0,
    }


def test_the_average_takes_in_buffers():
    layer = torch.nn.BatchNorm1d(2)
    layer.register_buffer("cache", torch.zeros(1), persistent=False)
    average = WeightAverage(layer, decay=0.75, ramp=False)
    assert average.shadow.keys() == layer.state_dict().keys()
    with torch.no_grad():
        layer.weight += 4
        layer.running_mean += 8
        layer.num_batches_tracked += 5
    average.move(average.share(1))
    with average.applied():
        assert layer.weight.tolist() == [2, 2] and layer.running_mean.tolist() == [2, 2]
        assert layer.num_batches_tracked == 5
        layer.cache += 1  # as a forward may
    assert layer.cache == 0
    assert layer.weight.tolist() == [5, 5] and layer.running_mean.tolist() == [8, 8]


def test_what_a_forward_adds_is_not_left_untrained():
    layer = torch.nn.BatchNorm1d(2)
    average = WeightAverage(layer, decay=0.75, ramp=False)
    layer.extra = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"^extra\.bias came or went .* in __init__"):
        average.move(0.5)
    del layer.extra
    layer.bias = None
    with pytest.raises(TypeError, match=r"^bias came or went"):
        average.move(0.5)


def test_a_buffer_that_a_forward_replaces_is_the_models_own_again():
    layer = torch.nn.BatchNorm1d(2)
    average = WeightAverage(layer, decay=0.75, ramp=False)
    with average.applied():
        layer.running_mean = layer.running_mean + 8
    assert layer.running_mean.tolist() == [0, 0]


def test_processes_share_out_the_average():
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(6)))
    whole, *parts = (WeightAverage(model, 0.5, False, *of) for of in ((), (3, 0), (3, 1), (3, 2)))
    before = {name: tensor.clone() for name, tensor in whole.shadow.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    for average in (whole, *parts):
        average.move(0.5)
    for name, tensor in whole.shadow.items():
        moved = [part.shadow[name] for part in parts
                 if not torch.equal(part.shadow[name], before[name])]  # fmt: skip
        assert len(moved) == 1 and torch.equal(moved[0], tensor)
    shares = [sum(not torch.equal(tensor, before[name]) for name, tensor in part.shadow.items())
              for part in parts]  # fmt: skip
    assert shares == [4, 4, 4]


def test_nothing_grows_over_the_steps():
    """The slow battery runs 1000 steps; a leak of one tensor per step shows in fifty."""
    trainer = Trainer(Settings(attn="sana", batch_size=2))

    def tensors():
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    for _ in range(3):
        trainer.train_step()
    before = tensors()
    for _ in range(20):
        trainer.train_step()
    assert tensors() <= before


def test_overwrite_replaces_only_what_a_run_makes(tmp_path):
    run = Run(tmp_path / "run")
    settings = Settings(attn="sana", steps=2, **SMALL)
    assert train(settings, run) == 0
    (run.folder / "notes.txt").write_text("mine")
    assert train(settings, run, overwrite=True) == 0
    assert len(run.read_log()) == 2
    assert (run.folder / "notes.txt").read_text() == "mine"


def test_configuration_is_readable(trained):
    config = json.loads(trained.config_file.read_text())
    assert config["settings"]["attn"] == "dydila"
    assert config["data"]["class_names"] == [str(digit) for digit in range(10)]


def test_option_values_keep_their_kind():
    given = ["conv=none", "normalizer=none", "stream=None", "p=2", "x=true", "y=0.5", "g=(4, 6)"]
    assert parse_options(given) == {
        "conv": "none", "normalizer": "none", "stream": None, "p": 2, "x": True, "y": 0.5,
        "g": (4, 6),
    }  # fmt: skip
