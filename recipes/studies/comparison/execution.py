"""Runs of a comparison, each in a process of its own that can be stopped and goes on.

python -m recipes.studies.comparison.execution FOLDER
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch

from recipes.lab.console import (
    DONE,
    INTERRUPTED,
    NON_FINITE,
    is_users_mistake,
    printable,
    run_script,
)
from recipes.lab.data.latents import canonical_settings, load_vae
from recipes.lab.evaluation.evaluate import evaluate
from recipes.lab.evaluation.shards import Plan
from recipes.lab.files import CannotWrite, read_json, write_json
from recipes.lab.imports import import_all
from recipes.lab.training.build import load_training_data
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.session import train
from recipes.lab.training.settings import Settings
from recipes.studies.comparison.costs import cost_of
from recipes.studies.comparison.planned import EVALUATORS, OK, known_as, read_result

STOPPED = {"state": "interrupted", "error": "stopped by a signal; run the comparison again"}
NOT_FINITE = {"state": "not finite", "error": "training stopped: the loss is not finite"}
GRACE_SECONDS = 60.0  # between asking a run to save and end, and ending it
_ROOT = Path(__file__).absolute().parents[3]
# Sets where modules come from before any is imported that is not built in: this project's own
# from where this file lies, whichever other checkout is installed.
_START = """import sys
root, sys.path[:] = sys.argv[2], sys.argv[3:]
del sys.argv[2:]
from importlib.machinery import PathFinder
class Own:
    def find_spec(name, path=None, target=None):
        if name in ("attnzoo", "backbones", "recipes"):
            return PathFinder.find_spec(name, [root])
sys.meta_path.insert(0, Own)
from recipes.lab.console import run_script
from recipes.studies.comparison.execution import main
run_script(main)"""

Report = Callable[[Path, "dict[str, Any] | None"], None]


def run_one(folder: Path, progress: bool = False) -> dict[str, Any]:
    """Trains, measures and times one prepared run, going on from wherever it was stopped.

    Returns:
        What result.json holds: "state" is "ok", "error", "not finite", "out of memory" or
        "interrupted", with "error" in one line.
    """
    started = time.time()
    try:
        result = _run_one(folder, progress)
    except Exception as error:
        if is_users_mistake(error):
            print(f"error: {printable(str(error))}")
        else:
            traceback.print_exc()
        line = " ".join(str(error).split()) or type(error).__name__
        state = "out of memory" if "out of memory" in line.lower() else "error"
        result = {"state": state, "error": f"{type(error).__name__}: {line}"[:500]}
    result = result | {"wall_seconds": round(time.time() - started, 1)}
    write_json(folder / "result.json", result)
    return result


def _run_one(folder: Path, progress: bool) -> dict[str, Any]:
    stored = read_json(known_as(folder, "planned.json"), "planned run")
    import_all(stored["imports"])
    settings = Settings(**canonical_settings(stored["settings"]))
    run = Run(folder / "run")
    found = run.newest_checkpoint(warn=print) if run.config_file.exists() else None
    if found is None or found[0] < settings.steps:
        status = train(
            settings,
            run,
            resume=found is not None,
            overwrite=run.config_file.exists(),
            imports=stored["imports"],
        )
        if status != DONE:
            other = {"state": "error", "error": f"training ended with status {status}"}
            return {INTERRUPTED: STOPPED, NON_FINITE: NOT_FINITE}.get(status, other)
    vae = load_vae(settings.vae) if settings.vae else None
    cost = cost_of(settings, load_training_data(settings, vae))
    measured = evaluate(
        run,
        cfgs=stored["cfgs"],
        plan=Plan(samples=stored["samples"], steps=stored["sampling_steps"]),
        cache=folder.parents[1] / EVALUATORS,
        vae=stored["vae"],
        real=stored["real"],
        imports=stored["imports"],
        progress=progress,
    )
    return {"state": OK, "error": None, "cost": cost, "metrics": measured, "curve": _curve(run)}


def _curve(run: Run, points: int = 100) -> list[tuple[int, float]]:
    """(step, mean loss of the steps since the point before)."""
    entries = losses_of(run.read_log())
    size = max(1, len(entries) // points)
    chunks = [entries[start : start + size] for start in range(0, len(entries), size)]
    return [(c[-1][0], sum(loss for _, loss in c) / len(c)) for c in chunks]


def losses_of(log: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """(step, loss) of the entries of a log; a step that was skipped has no loss."""
    found = [(entry["step"], entry.get("loss")) for entry in log]
    return [(n, x) for n, x in found if isinstance(x, int | float) and math.isfinite(x)]


def run_locally(
    folders: Sequence[Path],
    jobs: int,
    may_start: Callable[[], bool],
    report: Report,
    minutes: float = math.inf,
) -> None:
    """Runs what is prepared in processes of their own, ``jobs`` at a time.

    SIGTERM, SIGHUP and Ctrl-C let the running ones save and end, and start no other.

    Args:
        folders: Of prepared runs.
        jobs: Runs at the same time; with several GPUs they take turns on them.
        may_start: Asked before each run; False leaves the rest for another day.
        report: Gets each run's result, None for one that was not started.
        minutes: Limit of one run, which is then asked to save and end.
    """
    waiting, running = list(folders), dict[int, _Process]()
    with _signals() as received:
        try:
            while waiting or running:
                for slot in sorted(set(range(jobs)) - running.keys()):
                    if waiting and (received or not may_start()):
                        for folder in waiting:
                            report(folder, None)
                        waiting.clear()
                    if waiting:
                        running[slot] = _Process(waiting.pop(0), slot, jobs, minutes)
                for slot, process in list(running.items()):
                    if received:
                        process.stop()
                    if process.has_ended():
                        del running[slot]
                        report(process.folder, process.result())
                time.sleep(0.05)
        finally:
            for process in running.values():
                process.stop()
            while not all(process.has_ended() for process in running.values()):
                time.sleep(0.05)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals to stop that have come meanwhile."""
    received: list[int] = []
    before = {}
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's
            before[number] = signal.signal(number, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Process:
    """The process of one run."""

    def __init__(self, folder: Path, slot: int, jobs: int, minutes: float) -> None:
        self.folder = folder
        self._minutes = minutes
        self._deadline = time.monotonic() + 60 * minutes
        self._is_late = self._is_stopped = False
        environment = dict(os.environ)
        affinity = getattr(os, "sched_getaffinity", None)
        cores = len(affinity(0)) if affinity else os.cpu_count()
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (cores or 1) // jobs)))
        environment.pop("PYTHONPATH", None)
        environment["PYTHONSAFEPATH"] = "1"  # for what this process starts in turn
        if torch.cuda.device_count() > 1:
            environment["CUDA_VISIBLE_DEVICES"] = str(slot % torch.cuda.device_count())
        command = [sys.executable, "-c", _START, str(folder.resolve()), str(_ROOT), *import_path()]
        try:
            (folder / "result.json").unlink(missing_ok=True)
            with (folder / "output.txt").open("ab") as output:
                # A session of its own: Ctrl-C reaches it as one signal, from here.
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                    env=environment, start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            raise CannotWrite(folder, error) from error

    def stop(self) -> None:
        """Asks the process to save and end; it is ended if it does not."""
        if not self._is_stopped:
            self._is_stopped = True
            self._deadline = time.monotonic() + GRACE_SECONDS
            self._process.terminate()

    def has_ended(self) -> bool:
        """Looks after the process, and whether it has ended."""
        if self._process.poll() is not None:
            return True
        if time.monotonic() > self._deadline:
            if self._is_stopped:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._is_late = True
                self.stop()
        return False

    def result(self) -> dict[str, Any]:
        """What the run has come to, now that its process has ended."""
        status = self._process.returncode
        result = read_result(self.folder)
        has_stopped = result is None or result["state"] == STOPPED["state"]
        if has_stopped and self._is_late:
            error = (
                f"it took longer than --run-minutes {self._minutes:g}; run the comparison again "
                f"with more, and it goes on"
            )
            result = {"state": "timed out", "error": error}
        elif has_stopped and self._is_stopped:
            result = dict(STOPPED)
        elif result is None:
            how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
            result = {"state": "crashed", "error": f"{how}; its last words are in output.txt"}
        else:
            return result
        with contextlib.suppress(CannotWrite):  # a full disk; without it the run is not done
            write_json(self.folder / "result.json", result)
        return result


def import_path() -> list[str]:
    """Where a run's process finds modules: where this one does, and in the working folder last.

    A file of the working folder must not stand in for a package, whatever PYTHONPATH says.
    """
    last = [str(_ROOT), os.getcwd()]
    later = {Path(path).resolve() for path in (*last, _ROOT / "recipes")}
    first = [path for path in sys.path if path and Path(path).resolve() not in later]
    shown = [str(Path(path).absolute()) if Path(path).exists() else path for path in first]
    return list(dict.fromkeys([*shown, *last]))


def run_by_submitit(
    folders: Sequence[Path],
    jobs: int,
    may_start: Callable[[], bool],
    report: Report,
    cluster: str,
    log: Path,
    parameters: dict[str, Any],
) -> None:
    """The same through submitit, on this machine (cluster "local") or by SLURM."""
    import submitit  # pyright: ignore[reportMissingImports]

    # The jobs inherit both; Python 3.10 knows only the first.
    path = import_path()
    found = PathFinder.find_spec("recipes", path)
    if found is None or Path(found.origin or "").parents[1] != _ROOT:  # another checkout's
        path.insert(0, str(_ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join(path)
    os.environ["PYTHONSAFEPATH"] = "1"
    executor = submitit.AutoExecutor(folder=log, cluster=cluster)
    executor.update_parameters(name="attnzoo-compare", **parameters)
    waiting, running = list(folders), {}
    while waiting or running:
        # The local executor would start everything at once.
        while waiting and len(running) < jobs:
            folder = waiting.pop(0)
            if not may_start():
                report(folder, None)
                continue
            (folder / "result.json").unlink(missing_ok=True)
            running[folder] = executor.submit(_Submitted(), folder.resolve())
        for folder, job in list(running.items()):
            if job.done():
                del running[folder]
                result = read_result(folder)
                if result is None:
                    last = str(job.exception() or "").strip() or "it ended without a result"
                    last = last.splitlines()[-1]
                    result = {"state": "crashed", "error": f"submitit job {job.job_id}: {last}"}
                    write_json(folder / "result.json", result)
                report(folder, result)
        time.sleep(0.5)


class _Submitted:
    def __call__(self, folder: Path) -> str:
        return run_one(folder)["state"]

    def checkpoint(self, folder: Path) -> Any:
        """What submitit queues again on preemption: the run goes on from its checkpoint."""
        import submitit  # pyright: ignore[reportMissingImports]

        return submitit.helpers.DelayedSubmission(self, folder)


def main(arguments: list[str]) -> int:
    """Runs what is planned in the given folder; returns the exit status."""
    return DONE if run_one(Path(arguments[0]))["state"] == OK else 1


if __name__ == "__main__":
    run_script(main)
