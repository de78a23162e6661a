"""The run's folder: crashes, broken files, full disks, strangers' files, two writers."""

import contextlib
import json
import os
import pickle
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from recipes import sample as sample_module
from recipes import train as train_module
from recipes.lab.console import INTERRUPTED, NON_FINITE, UserError
from recipes.lab.files import sha256
from recipes.lab.sampling import read_checkpoint
from recipes.lab.training import checkpoint as checkpoint_module
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.session import train
from recipes.lab.training.settings import Settings
from recipes.lab.training.status import claimed, describe, noted_checkpoint
from recipes.lab.training.trainer import Trainer
from tests.recipes import two_processes
from tests.recipes.reliability import crashes, kills

pytestmark = pytest.mark.usefixtures("no_pictures")

SMALL = {"attn": "sana", "batch_size": 4, "checkpoint_every": 2, "sample_every": 1000}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def child(commands, tmp_path):
    def run(*arguments):
        status, said = commands.run(*arguments, cwd=tmp_path)
        assert status == 0, said
        return said

    return run


def test_a_crash_at_any_act_of_a_save_loses_nothing(tmp_path, child):
    result = crashes(tmp_path, 12, child)
    assert result["failures"] == [] and result["survived"] == result["tried"] >= 12


def test_a_save_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    acts, sync, replace = [], checkpoint_module.files.sync, os.replace

    def synced(path):
        acts.append(path.name)
        sync(path)

    def named(old, new):
        acts.append(Path(new).name)
        replace(old, new)

    monkeypatch.setattr(checkpoint_module.files, "sync", synced)
    monkeypatch.setattr(os, "replace", named)
    run = Run(tmp_path)
    parts = {"model/a.safetensors": {"a": torch.ones(9)}, "b.safetensors": {"b": torch.ones(2)}}
    run.save(1, parts, {"model/config.json": "{}"}, {})
    at = acts.index("step-00000001")
    assert {"a.safetensors", "b.safetensors", "config.json", "model"} <= {*acts[:at]}
    assert acts[at + 1] == "checkpoints"


def test_kills_at_random_moments_lose_nothing(tmp_path, child):
    result = kills(tmp_path, 3, child)
    assert result["killed"] == 3
    assert result["equal"] == result["runs"] and result["unloadable"] == 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "sample_grid", lambda self, path: None)
        run = Run(tmp_path_factory.mktemp("finished") / "run")
        assert train(Settings(**SMALL, steps=4), run) == 0
    return run


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "run")
    return Run(tmp_path / "run")


@pytest.mark.parametrize("damage", ["truncate", "zero", "flip", "delete"])
@pytest.mark.parametrize("file", ["model", "ema", "optimizer", "manifest", "config"])
def test_a_broken_checkpoint_is_named_and_passed_over(copy, damage, file):
    name = {
        "optimizer": "optimizer.safetensors",
        "manifest": "manifest.json",
        "config": "model/config.json",
    }.get(file, f"{file}/{WEIGHTS}")
    victim = copy.checkpoints / "step-00000004" / name
    content = bytearray(victim.read_bytes())
    if damage == "delete":
        victim.unlink()
    elif damage == "flip" and file != "manifest":
        content[-5] ^= 1
        victim.write_bytes(content)
    else:
        victim.write_bytes(b"" if damage == "zero" else content[: len(content) // 2])
    said = []
    assert copy.newest_checkpoint(warn=said.append)[0] == 2
    assert "step-00000004" in said[0]


def test_a_run_goes_on_from_the_checkpoint_before_a_broken_one(copy, finished):
    victim = copy.checkpoints / "step-00000004" / "optimizer.safetensors"
    victim.write_bytes(victim.read_bytes()[:-10])
    assert train(Settings(**SMALL, steps=4), copy, resume=True) == 0
    one, other = (run.checkpoints / "step-00000004" for run in (copy, finished))
    assert one.joinpath("model", WEIGHTS).read_bytes() == (other / "model" / WEIGHTS).read_bytes()


def test_a_run_without_a_whole_checkpoint_does_not_start_from_nothing(copy):
    for file in copy.checkpoints.rglob("optimizer.safetensors"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match="no whole checkpoint"):
        train(Settings(**SMALL, steps=4), copy, resume=True)
    assert len(copy.read_log()) == 4
    with pytest.raises(UserError, match="no whole checkpoint; train it anew with --overwrite"):
        read_checkpoint(copy)


def test_a_first_checkpoint_that_finds_no_room_names_no_step_of_another(tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.lab.training.loop.save_checkpoint", lambda *_, **__: "no space")
    with pytest.raises(UserError, match=r"step 1 \(no space\); there is no other: make room"):
        train(Settings(**SMALL, steps=1), Run(tmp_path / "run"))


def test_broken_later_checkpoints_do_not_push_out_whole_ones(tmp_path):
    run = Run(tmp_path)
    for step in (2, 4, 6, 8):
        run.save(step, {"a.safetensors": {"x": torch.ones(1)}}, {}, {})
    assert [folder.name[-1] for folder in run._checkpoint_folders()] == ["6", "8"]
    run.save(3, {"a.safetensors": {"x": torch.ones(1)}}, {}, {})
    assert [folder.name[-1] for folder in run._checkpoint_folders()] == ["3", "6", "8"]


def test_every_nth_checkpoint_is_kept(tmp_path):
    run = Run(tmp_path)
    for step in range(1, 10):
        run.save(step, {"a.safetensors": {"x": torch.ones(1)}}, {}, {}, keep_every=4)
    assert [int(folder.name[-1]) for folder in run._checkpoint_folders()] == [4, 8, 9]


@pytest.fixture
def no_room(monkeypatch):
    """Half of what is written to a log arrives, then the disk is full."""
    real = os.open

    def half(path, flags, *args, **options):
        descriptor = real(path, flags, *args, **options)
        if str(path).endswith("log.jsonl") and flags & os.O_APPEND:
            os.write(descriptor, b'{"step"')
            os.close(descriptor)
            descriptor = real("/dev/full", os.O_WRONLY | os.O_APPEND)
        return descriptor

    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", lambda descriptor, size: os.truncate(log[0], log[1]))
        log: list = [None, None]

        def begin(run):
            log[:] = [run.log_file, run.log_file.stat().st_size]
            patch.setattr(os, "open", half)
            return patch.undo

        yield begin


def test_a_log_line_that_finds_no_room_waits(tmp_path, no_room):
    run = Run(tmp_path)
    run.append_log({"step": 1})
    undo = no_room(run)
    with pytest.raises(OSError):
        run.append_log({"step": 2})
    assert [entry["step"] for entry in run.read_log()] == [1]
    undo()
    run.append_log({"step": 3})
    assert [entry["step"] for entry in run.read_log()] == [1, 2, 3]


@pytest.mark.parametrize("whole", ["", '{"step": 1}\n'])
def test_half_a_line_does_not_spoil_the_next(tmp_path, whole):
    run = Run(tmp_path)
    run.log_file.write_text(whole + '{"st')
    run.cut_log(9)
    run.append_log({"step": 2})
    assert run.log_file.read_text() == whole + '{"step": 2}\n'


def test_lines_that_never_found_room_are_kept_beside_and_put_back(tmp_path, no_room):
    run = Run(tmp_path)
    run.append_log({"step": 1})
    undo = no_room(run)
    with pytest.raises(OSError):
        run.append_log({"step": 2})
    assert "last 1 lines" in run.keep_waiting_log() and str(run.held_file) in (
        run.keep_waiting_log()
    )
    undo()
    again = Run(tmp_path)
    again.cut_log(2)
    assert [entry["step"] for entry in again.read_log()] == [1, 2]
    assert not again.held_file.exists()


def tmpfs(folder, size):
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(tmp_path, capfd):
    disk = tmp_path / "disk"
    tmpfs(disk, "40m")
    try:
        run = Run(disk / "run")
        ballast = disk / "ballast"

        def fill(step):
            if step == 3:  # room for a part of the next checkpoint
                ballast.write_bytes(b"x" * (shutil.disk_usage(disk).free - 4_000_000))
            return False

        with pytest.raises(UserError, match=r"no checkpoint of step 8.*No space.*of step 2"):
            train(Settings(**SMALL, steps=20), run, should_stop=fill)
        assert capfd.readouterr().out.count("training goes on") == 2
        assert run.newest_checkpoint(warn=pytest.fail)[0] == 2
        assert not list(run.checkpoints.glob(".tmp-*"))
        assert "No space" in describe(run)
        ballast.unlink()
        assert train(Settings(**SMALL, steps=20), run, resume=True) == 0
        assert [entry["step"] for entry in run.read_log()] == list(range(1, 21))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(28, "No space left on device"), UserError),
        (RuntimeError("No space"), RuntimeError),
    ],
)
def test_a_write_that_fails_midway_leaves_nothing(copy, error, raised, monkeypatch):
    def broken(tensors, path, metadata):
        path.write_bytes(b"half")
        if "ema" in str(path):
            raise error

    monkeypatch.setattr(checkpoint_module, "save_tensors", broken)
    settings = Settings(**SMALL, steps=6)
    with pytest.raises(raised, match="No space"):
        train(settings, copy, resume=True)
    assert sorted(path.name for path in copy.checkpoints.iterdir()) == [
        "step-00000002",
        "step-00000004",
    ]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot write to /proc/.*another --out"):
        train_module.main(["--attn", "sana", "--steps", "1", "--out", "/proc/attnzoo/run"])
    disk = tmp_path / "disk"
    tmpfs(disk, "1m")
    try:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(UserError, match=r"cannot write to .*Read-only.*another --out"):
            train_module.main(["--attn", "sana", "--steps", "1", "--out", str(disk / "run")])
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_signal_during_a_save_waits_for_it(tmp_path, monkeypatch):
    run, own = Run(tmp_path / "run"), checkpoint_module.save_tensors

    def signalled(tensors, path, metadata):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        own(tensors, path, metadata)

    monkeypatch.setattr(checkpoint_module, "save_tensors", signalled)
    assert train(Settings(**SMALL, steps=20), run) == INTERRUPTED
    assert run.newest_checkpoint(warn=pytest.fail)[0] == 3  # one step after that save
    assert not list(run.checkpoints.glob(".tmp-*"))
    assert "SIGTERM, SIGUSR1" in describe(run)


def test_two_writers_are_refused(copy):
    said = rf"being written to by process {os.getpid()} on"
    with claimed(copy), pytest.raises(UserError, match=said):
        train(Settings(**SMALL, steps=6), copy, resume=True)
    assert train(Settings(**SMALL, steps=6), copy, resume=True) == 0


def test_a_lock_that_is_a_folder_is_one_line(copy):
    copy.lock_file.unlink(missing_ok=True)
    copy.lock_file.mkdir()
    with pytest.raises(UserError, match=r"cannot write '.*\.lock': Is a directory"):
        train(Settings(**SMALL, steps=6), copy, resume=True)


def test_a_run_that_has_lost_its_checkpoints_does_not_begin_anew_unasked(copy):
    log = copy.log_file.read_text()
    shutil.rmtree(copy.checkpoints)
    with pytest.raises(
        UserError, match=r"had a checkpoint of step 4 and holds none: .*--overwrite"
    ):
        train(Settings(**SMALL, steps=4), copy, resume=True)
    assert copy.log_file.read_text() == log
    for damaged in ("{", "{}", "[]"):  # as far as anyone knows, it was stopped before its first
        copy.status_file.write_text(damaged)
        assert noted_checkpoint(copy) is None
    copy.status_file.unlink()
    assert train(Settings(**SMALL, steps=1), copy, resume=True) == 0


def test_status_tells_running_crashed_and_done(copy, capsys):
    assert train_module.main(["--status", str(copy.folder)]) == 0
    assert "done" in capsys.readouterr().out
    status = json.loads(copy.status_file.read_text())
    assert (status["state"], status["step"], status["checkpoint"]) == ("done", 4, 4)
    copy.status_file.write_text(json.dumps({**status, "state": "running"}))
    assert "crashed" in describe(copy)
    with claimed(copy):
        assert "running" in describe(copy) and "crashed" not in describe(copy)
    copy.status_file.write_text("{")
    with pytest.raises(UserError, match=r"status .*status\.json' is damaged"):
        train_module.main(["--status", str(copy.folder)])


class TestPoison:
    """Steps that are not finite."""

    def test_weights_average_and_statistics_stay(self):
        undo = two_processes.poison(step=1, rank=0)
        try:
            trainer = Trainer(Settings(attn="dydila", batch_size=4))
            trainer.train_step()
            before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
            average = {name: tensor.clone() for name, tensor in trainer.average.shadow.items()}
            entry, _ = trainer.train_step()
        finally:
            undo()
        assert entry["loss"] is None and trainer.skipped == 1 and trainer.step == 2
        for name, tensor in trainer.model.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        for name, tensor in trainer.average.shadow.items():
            assert torch.equal(tensor, average[name]), name

    def test_too_many_in_a_row_stop_the_run(self, tmp_path, monkeypatch, capsys):
        original = Trainer._batch

        def poisoned(self):
            images, *rest = original(self)
            return (images * float("nan") if self.step in (2, 5, 6, 7, 8) else images, *rest)

        monkeypatch.setattr(Trainer, "_batch", poisoned)
        run = Run(tmp_path / "run")
        settings = Settings(**SMALL | {"checkpoint_every": 5}, steps=12, skip_limit=3)
        assert train(settings, run) == NON_FINITE
        assert run.newest_checkpoint(warn=pytest.fail)[0] == 5
        said = capsys.readouterr().out
        assert "step 3 skipped, not finite: loss nan" in said
        assert "not finite 3 times in a row" in said and "checkpoint of step 5 is whole" in said
        assert "failed" in describe(run)
        # Resumed, it counts on from the checkpoint and meets the same batches.
        assert train(settings, run, resume=True) == NON_FINITE
        assert [entry["step"] for entry in run.read_log()] == list(range(1, 9))


class Canary:
    """A pickle that leaves a trace when it is loaded."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("file", [f"model/{WEIGHTS}", f"ema/{WEIGHTS}", "optimizer.safetensors"])
@pytest.mark.parametrize("form", ["pickle", "torch", "legacy"])
def test_a_malicious_checkpoint_is_not_executed(copy, tmp_path, file, form):
    trace = tmp_path / "executed"
    folder = copy.checkpoints / "step-00000004"
    victim = folder / file
    if form == "pickle":
        victim.write_bytes(pickle.dumps(Canary(trace)))
    else:
        torch.save({"x": Canary(trace)}, victim, _use_new_zipfile_serialization=form == "torch")
    shutil.copy(victim, victim.with_suffix(".bin"))
    # The attacker makes the manifest agree.
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][file] = [victim.stat().st_size, checkpoint_module.sha256(victim)]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="no safetensors file"):
        train(Settings(**SMALL, steps=6), copy, resume=True)
    if file != "optimizer.safetensors":
        weights = file.split("/")[0]
        with pytest.raises(UserError, match="no safetensors file"):
            sample_module.main([str(copy.folder), "--steps", "2", "--weights", weights])
        # Left out of the manifest and away, it does not let diffusers take the pickle beside it.
        victim.unlink()
        del manifest["files"][file]
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError, match="lists no model"):
            sample_module.main([str(copy.folder), "--steps", "2", "--weights", weights])
        shutil.copy(victim.with_suffix(".bin"), victim)
    assert not trace.exists()
    # Where nothing guards, the canary does sing.
    if form == "pickle":
        pickle.loads(victim.read_bytes())
    else:
        torch.load(victim.with_suffix(".bin"), weights_only=False)
    assert trace.exists()


def test_weights_of_another_model_are_refused(copy):
    arguments = ["--attn", "softmax", "--steps", "6", "--out", str(copy.folder)]
    with pytest.raises(UserError, match="is of another model"):
        train_module.main([*arguments, "--allow-change", "steps", "--allow-change", "attn"])


def test_a_manifest_cannot_point_out_of_its_folder(copy):
    folder = copy.checkpoints / "step-00000004"
    manifest = json.loads((folder / "manifest.json").read_text())
    config = copy.config_file
    manifest["files"]["../../config.json"] = [
        config.stat().st_size,
        checkpoint_module.sha256(config),
    ]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    said = []
    assert copy.newest_checkpoint(warn=said.append)[0] == 2 and "outside" in said[0]


def test_checkpoints_are_safetensors_only(finished):
    suffixes = {path.suffix for path in finished.checkpoints.rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json"}
    optimizer = load_file(finished.checkpoints / "step-00000004" / "optimizer.safetensors")
    assert "blocks.0.attention.proj.weight/exp_avg" in optimizer or len(optimizer) > 10


@pytest.mark.parametrize("form", ["file", "dangling link"])
def test_checkpoints_that_cannot_be_read_stop_the_run(copy, form):
    moved = copy.checkpoints.rename(copy.folder / "elsewhere")
    if form == "file":
        copy.checkpoints.write_text("")
    else:
        copy.checkpoints.symlink_to(copy.folder / "nowhere")
    before = copy.log_file.read_bytes()
    with pytest.raises(UserError, match=r"checkpoints' (cannot be read|is a link)"):
        train(Settings(**SMALL, steps=6), copy, resume=True)
    with pytest.raises(UserError, match="cannot be read"):
        copy.newest_checkpoint(warn=pytest.fail)
    assert copy.log_file.read_bytes() == before and moved.is_dir()


@pytest.mark.parametrize("what", ["folder", "manifest", "weights"])
def test_what_may_not_be_read_is_not_passed_over_as_broken(copy, what, monkeypatch):
    victim = {"folder": "checkpoints", "manifest": "manifest.json", "weights": WEIGHTS}[what]

    def forbid(action):
        def act(self, *args, **options):
            if self.name == victim:
                raise PermissionError(13, "Permission denied", str(self))
            return action(self, *args, **options)

        return act

    for name in ("iterdir", "read_bytes", "open"):
        monkeypatch.setattr(Path, name, forbid(getattr(Path, name)))
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\)"):
        copy.newest_checkpoint(warn=pytest.fail)


@pytest.mark.parametrize(
    "change",
    [
        {"step": 1e400}, {"step": "4"}, {"step": 3}, {"step": None}, {"skipped": "many"},
        {"skipped_in_a_row": -1}, {"files": []}, {"files": {"a": 1}}, {"files": {"a": ["1", 2]}},
        {"files": {}},
    ],
)  # fmt: skip
def test_a_manifest_that_says_nonsense_is_passed_over(copy, change):
    file = copy.checkpoints / "step-00000004" / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    said = []
    assert copy.newest_checkpoint(warn=said.append)[0] == 2
    assert "manifest.json is damaged" in said[0]


def edited(run, file, change):
    """Changes tensors of the newest checkpoint, under a manifest that agrees."""
    folder = run.checkpoints / run.checkpoint_names()[-1]
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][file] = [(folder / file).stat().st_size, sha256(folder / file)]
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("step", torch.tensor(9.0)), ("step", torch.tensor(float("nan"))),
        ("step", torch.tensor(-1.0)), ("step", torch.zeros(2)), ("exp_avg", torch.tensor(1.0)),
        ("exp_avg", None), ("step", None), ("exp_more", torch.tensor(1.0)),
    ],
)  # fmt: skip
def test_a_state_of_the_optimizer_that_cannot_be_is_one_line(copy, kind, value):
    def change(tensors):
        name = next(key for key in tensors if key.endswith("/exp_avg")).rpartition("/")[0]
        tensors.pop(f"{name}/{kind}", None)
        if value is not None:
            tensors[f"{name}/{kind}"] = value

    edited(copy, "optimizer.safetensors", change)
    with pytest.raises(UserError, match=r"or damaged|not finite"):
        train(Settings(**SMALL, steps=6), copy, resume=True)


@pytest.mark.parametrize("part", ["model", "ema"])
def test_weights_that_are_not_finite_are_not_gone_on_from(copy, part):
    edited(
        copy, f"{part}/{WEIGHTS}", lambda tensors: next(iter(tensors.values())).fill_(torch.nan)
    )
    with pytest.raises(UserError, match=r"not finite.*move .*step-00000004 away"):
        train(Settings(**SMALL, steps=6), copy, resume=True)


class TestDivergence:
    """A run that goes wrong keeps what was right."""

    def poisoned(self, monkeypatch, first):
        original = Trainer._batch

        def batch(self):
            images, *rest = original(self)
            return (images * float("nan") if self.step >= first else images, *rest)

        monkeypatch.setattr(Trainer, "_batch", batch)

    def test_skipped_steps_push_no_checkpoint_out(self, tmp_path, monkeypatch):
        self.poisoned(monkeypatch, 4)
        run = Run(tmp_path / "run")
        assert train(Settings(**SMALL, steps=40, skip_limit=20), run) == NON_FINITE
        assert run.checkpoint_names() == ["step-00000002", "step-00000004"]
        assert "checkpoint of step 4 is whole" in describe(run)

    def test_a_stop_among_skipped_steps_saves_and_deletes_nothing(self, tmp_path, monkeypatch):
        self.poisoned(monkeypatch, 4)
        run = Run(tmp_path / "run")
        settings = Settings(**SMALL, steps=40, skip_limit=20)
        assert train(settings, run, should_stop=lambda step: step == 7) == INTERRUPTED
        assert run.checkpoint_names() == ["step-00000002", "step-00000004", "step-00000007"]

    def test_a_run_of_skipped_steps_is_not_done(self, tmp_path, monkeypatch):
        self.poisoned(monkeypatch, 0)
        run = Run(tmp_path / "run")
        assert train(Settings(**SMALL, steps=4), run) == NON_FINITE
        assert "failed" in describe(run) and "not finite in any step" in describe(run)
        assert "there is no checkpoint" in describe(run)
        assert not run.checkpoint_names()

    def test_a_run_that_ends_in_skipped_steps_is_not_done(self, tmp_path, monkeypatch):
        self.poisoned(monkeypatch, 2)
        run = Run(tmp_path / "run")
        assert train(Settings(**SMALL, steps=14, skip_limit=99), run) == NON_FINITE
        assert "not finite in the last 12 steps" in describe(run)

    @pytest.mark.parametrize("part", ["weights", "average", "optimizer"])
    def test_a_state_that_is_not_finite_is_not_saved(self, tmp_path, part, monkeypatch):
        run = Run(tmp_path / "run")
        trainers = []

        def spoil(step):
            if step == 4:
                trainer = trainers[0]
                weight = trainer.model.blocks[0].attention.proj.weight
                victim = {
                    "weights": weight.data,
                    "average": next(iter(trainer.average.shadow.values())),
                    "optimizer": trainer.optimizer.state[weight]["exp_avg"],
                }[part]
                victim[0] = torch.inf
            return False

        own = Trainer.__init__

        def remember(self, *args, **options):
            trainers.append(self)
            own(self, *args, **options)

        monkeypatch.setattr(Trainer, "__init__", remember)
        assert train(Settings(**SMALL, steps=8), run, should_stop=spoil) == NON_FINITE
        assert run.checkpoint_names() == ["step-00000002"]
        assert "not finite" in describe(run) and "step 2 is whole" in describe(run)


def test_overwrite_takes_only_a_run(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"_class_name": "UNet2DModel", "attn": "x"}')
    (folder / "weights.safetensors").write_bytes(b"years of work")
    for arguments in (["--overwrite"], [], ["--resume"]):
        with pytest.raises(UserError, match=r"not a run|not the configuration of a run"):
            train_module.main(["--attn", "sana", "--steps", "1", "--out", str(folder), *arguments])
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "weights.safetensors"]


def test_overwrite_leaves_nothing_of_the_old_run(copy):
    (copy.folder / "evaluation").mkdir()
    for name in (
        "metrics.json",
        "judge.json",
        "classifier.json",
        "evaluation/shard.npz",
        "notes.txt",
    ):
        (copy.folder / name).write_text("old")
    assert train(Settings(**SMALL | {"checkpoint_every": 9}, steps=1), copy, overwrite=True) == 0
    left = {path.name for path in copy.folder.iterdir()}
    assert left <= {"config.json", "log.jsonl", "status.json", ".lock", "checkpoints", "notes.txt"}
    assert copy.checkpoint_names() == ["step-00000001"]


def test_overwrite_waits_for_no_one(copy):
    before = copy.config_file.read_bytes()
    with claimed(copy), pytest.raises(UserError, match="being written to by process"):
        train(Settings(**SMALL, steps=1), copy, overwrite=True)
    assert copy.config_file.read_bytes() == before and copy.checkpoint_names()


@pytest.mark.parametrize("start", ["new", "resume"])
def test_a_disk_that_is_full_from_the_start_is_one_line(copy, tmp_path, start):
    disk = tmp_path / "disk"
    tmpfs(disk, "60m")
    try:
        run = Run(disk / "run")
        if start == "resume":
            shutil.copytree(copy.folder, run.folder)
            run.append_log({"step": 5, "loss": 1.0})
        with (disk / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"x" * 4096)
        with pytest.raises(UserError, match="No space") as caught:
            train(Settings(**SMALL, steps=6), run, resume=start == "resume")
        assert "\n" not in str(caught.value)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
