"""Kills training in forked processes, resumes it, and compares with a run left alone.

    python tests/recipes/crash.py points FOLDER     a crash at every write, sync, rename, delete
    python tests/recipes/crash.py kills FOLDER 20   SIGKILL at random moments

Prints one JSON line. Forking saves the import of torch for each of the many processes; nothing of
autograd has run in the parent.
"""

import contextlib
import gc
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import peft  # noqa: E402, F401 - once here instead of in every child, by Accelerate
import sklearn.datasets  # noqa: E402, F401 - likewise
import torch  # noqa: E402

from recipes.lab import files  # noqa: E402
from recipes.lab.training import checkpoint  # noqa: E402
from recipes.lab.training.checkpoint import Run  # noqa: E402
from recipes.lab.training.session import train  # noqa: E402
from recipes.lab.training.settings import Settings  # noqa: E402
from recipes.lab.training.trainer import Trainer  # noqa: E402

CRASHED = 9
SMALL = {"attn": "dydila", "batch_size": 4, "sample_every": 10_000, "decay": "constant"}
POINTS = Settings(**SMALL, steps=6, checkpoint_every=2)


def digest(run: Run) -> str:
    """Of weights, average, optimizer and log of a finished run."""
    found = run.newest_checkpoint(warn=lambda line: None)
    assert found is not None
    total = hashlib.sha256(str(found[0]).encode())
    for path in sorted(found[1].rglob("*.safetensors")):
        total.update(path.read_bytes())
    for entry in run.read_log():
        entry.pop("seconds")
        total.update(json.dumps(entry).encode())
    return total.hexdigest()


def fork(settings: Settings, run: Run, resume: bool, before=lambda: None) -> int:
    """Trains in a child; returns its process number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        Trainer.sample_grid = lambda self, path: None  # the most of a short run's time
        before()
        code = train(settings, run, resume=resume)
    finally:
        os._exit(code)


def finish(settings: Settings, run: Run) -> int:
    return os.waitstatus_to_exitcode(
        os.waitpid(fork(settings, run, run.config_file.exists()), 0)[1]
    )


class Saboteur:
    """Counts what the checkpoint protocol does to the disk, and crashes at one of its acts."""

    def __init__(self, crash_at: int | None = None, inside: bool = False) -> None:
        self.crash_at, self.inside, self.acts = crash_at, inside, []

    def install(self) -> None:
        for module, name, kind in (
            (checkpoint, "save_tensors", "write"),
            (files, "write_bytes", "write"),
            (files, "sync", "sync"),
            (os, "replace", "rename"),
            (shutil, "rmtree", "delete"),
        ):
            setattr(module, name, self._wrap(getattr(module, name), kind))

    def _wrap(self, action, kind):
        def act(*args, **kwargs):
            if any(getattr(argument, "name", "").endswith("status.json") for argument in args):
                return action(*args, **kwargs)  # written by the clock, so not at a fixed place
            if len(self.acts) == self.crash_at:
                if self.inside:
                    self._half(kind, args)
                os._exit(CRASHED)
            self.acts.append(kind)
            return action(*args, **kwargs)

        return act

    @staticmethod
    def _half(kind, args) -> None:
        if kind == "write":
            target = next(a for a in args if isinstance(a, Path))
            if target is args[0]:  # of files.write_bytes, which writes beside it first
                target = target.with_name(f"{files.TEMPORARY}1-half-{target.name}")
            with target.open("wb") as file:
                file.write(b"half a file")
        elif kind == "delete":
            found = [path for path in Path(args[0]).rglob("*") if path.is_file()]
            for path in found[: len(found) // 2]:
                path.unlink()


def points(folder: Path) -> dict:
    assert finish(POINTS, Run(folder / "alone")) == 0
    expected = digest(Run(folder / "alone"))
    counter = Saboteur()
    counting = os.fork()
    if not counting:
        Trainer.sample_grid = lambda self, path: None
        counter.install()
        with contextlib.redirect_stdout(None):
            train(POINTS, Run(folder / "counted"))
        with (folder / "acts.json").open("w") as file:
            file.write(json.dumps(counter.acts))
        os._exit(0)
    os.waitpid(counting, 0)
    acts = json.loads((folder / "acts.json").read_text())
    plans = [(i, False) for i in range(len(acts))]
    plans += [(i, True) for i, kind in enumerate(acts) if kind in ("write", "delete")]
    if len(sys.argv) > 3:  # the acts of the last save only, which also deletes
        first = len(acts) - int(sys.argv[3])
        plans = [plan for plan in plans if plan[0] >= first]
    survived, failures = 0, []
    for act, inside in plans:
        run = Run(folder / f"crash-{act}-{inside}")
        child = fork(POINTS, run, False, before=Saboteur(act, inside).install)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        whole = code == CRASHED and finish(POINTS, run) == 0 and digest(run) == expected
        if whole and not list(run.folder.rglob(f"{files.TEMPORARY}*")):
            survived += 1
            shutil.rmtree(run.folder)
        else:
            failures.append([act, acts[act], inside, code])
    kinds = {kind: acts.count(kind) for kind in sorted(set(acts))}
    return {"tried": len(plans), "survived": survived, "failures": failures, "acts": kinds}


def kills(folder: Path, count: int) -> dict:
    settings = Settings(**SMALL, steps=10 + 7 * count, checkpoint_every=2)
    assert finish(settings, Run(folder / "alone")) == 0
    expected = digest(Run(folder / "alone"))
    chance = random.Random(int.from_bytes(os.urandom(4), "little"))
    killed, rounds, equal, unloadable = 0, 0, 0, 0
    while killed < count:
        rounds += 1
        run = Run(folder / f"round-{rounds}")
        while True:
            child = fork(settings, run, run.config_file.exists())
            if killed < count:
                time.sleep(chance.uniform(0.02, 2.0))
                os.kill(child, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            killed += code == -signal.SIGKILL
            unloadable += code not in (0, -signal.SIGKILL)
            if code == 0 or code not in (0, -signal.SIGKILL):
                break
        equal += code == 0 and digest(run) == expected
    return {"killed": killed, "runs": rounds, "equal": equal, "unloadable": unloadable}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    gc.freeze()  # or every child would look at all of it, and so copy it
    target = Path(sys.argv[2])
    result = points(target) if sys.argv[1] == "points" else kills(target, int(sys.argv[3]))
    print(json.dumps(result))
