"""One cell of a comparison: a resumable run in a folder, and processes that run many of them.

    python -m recipes.studies.comparison.cells FOLDER

A cell's folder holds cell.json (what it is), run/ (the ordinary run), output.txt and, once it has
ended, result.json. Whatever happens to one cell happens in its own process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from recipes.evaluate import evaluate
from recipes.lab.console import DONE, INTERRUPTED, NON_FINITE, run_script
from recipes.lab.evaluation.shards import Plan
from recipes.lab.files import write_json
from recipes.lab.training.checkpoint import Run
from recipes.studies.comparison.costs import cost_of
from recipes.train import Settings, train

OK = "ok"
STOPPED = {"state": "interrupted", "error": "stopped by a signal; run the comparison again"}
EVALUATORS = ".evaluators"  # folder beside cells/, shared by all of them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a comparison.

    Attributes:
        label: Name of the mechanism or of the variant of it.
        settings: Of the run.
        cfgs: Guidance scales to measure.
        samples: Images per scale.
        sampling_steps: Model evaluations per image.
        imports: Modules to import first, which register mechanisms of the user's own.
    """

    label: str
    settings: Settings
    cfgs: tuple[float, ...]
    samples: int
    sampling_steps: int
    imports: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the folder, which another setting would change."""
        settings = self.settings
        text = json.dumps(dataclasses.asdict(self), sort_keys=True, default=list)
        place = [Path(settings.data).name, settings.level, str(settings.resolution or "native")]
        if settings.protocol != "controlled":
            place.append(settings.protocol)
        readable = re.sub(r"[^A-Za-z0-9]+", "-", "-".join([*place, self.label])).strip("-")
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return f"{readable}-seed-{settings.seed}-{digest}"

    def prepare(self, out: Path) -> Path:
        """Makes the cell's folder under ``out``."""
        folder = out / "cells" / self.name
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "cell.json", dataclasses.asdict(self))
        return folder


def read_result(folder: Path) -> dict[str, Any] | None:
    """What a cell has come to, or None where it has not ended."""
    try:
        return json.loads((folder / "result.json").read_text())
    except (OSError, ValueError):
        return None


def run_cell(folder: Path, progress: bool = False) -> dict[str, Any]:
    """Trains, measures and times one cell, going on from wherever it was stopped.

    Returns:
        What result.json holds: "state" is "ok", "error", "not finite", "out of memory" or
        "interrupted", with "error" in one line.
    """
    started = time.time()
    try:
        result = {"state": OK, "error": None, **_run_cell(folder, progress)}
    except _Stopped as stopped:
        result = {"state": stopped.state, "error": str(stopped)}
    except Exception as error:
        traceback.print_exc()
        line = " ".join(str(error).split()) or type(error).__name__
        state = "out of memory" if "out of memory" in line.lower() else "error"
        result = {"state": state, "error": f"{type(error).__name__}: {line}"[:500]}
    result["wall_seconds"] = round(time.time() - started, 1)
    write_json(folder / "result.json", result)
    return result


class _Stopped(Exception):
    def __init__(self, state: str, error: str) -> None:
        super().__init__(error)
        self.state = state


def _run_cell(folder: Path, progress: bool) -> dict[str, Any]:
    stored = json.loads((folder / "cell.json").read_text())
    for module in stored["imports"]:
        importlib.import_module(module)
    settings = Settings(**stored["settings"])
    run = Run(folder / "run")
    found = run.newest_checkpoint(warn=print) if run.config_file.exists() else None
    if found is None or found[0] < settings.steps:
        status = train(settings, run, resume=found is not None, overwrite=run.config_file.exists())
        if status == INTERRUPTED:
            raise _Stopped(**STOPPED)
        if status == NON_FINITE:
            raise _Stopped("not finite", "training stopped: the loss is not finite")
        if status != DONE:
            raise _Stopped("error", f"training ended with status {status}")
    cost = cost_of(settings)
    measured = evaluate(
        run,
        cfgs=stored["cfgs"],
        plan=Plan(samples=stored["samples"], steps=stored["sampling_steps"]),
        cache=folder.parents[1] / EVALUATORS,
        progress=progress,
    )
    return {"cost": cost, "metrics": measured, "curve": _curve(run)}


def _curve(run: Run, points: int = 100) -> list[tuple[int, float]]:
    """(step, mean loss of the steps since the point before)."""
    entries = [entry for entry in run.read_log() if "loss" in entry]
    size = max(1, len(entries) // points)
    chunks = [entries[start : start + size] for start in range(0, len(entries), size)]
    return [(c[-1]["step"], sum(e["loss"] for e in c) / len(c)) for c in chunks]


def run_locally(
    folders: Sequence[Path],
    jobs: int,
    may_start: Callable[[], bool],
    report: Callable[[Path, dict[str, Any] | None], None],
) -> None:
    """Runs cells in processes of their own, ``jobs`` at a time.

    Args:
        folders: Of prepared cells.
        jobs: Cells at the same time; with several GPUs they take turns on them.
        may_start: Asked before each cell; False leaves the rest for another day.
        report: Told each cell's result, None for one that was not started.
    """
    slots: queue.Queue[int] = queue.Queue()
    for slot in range(jobs):
        slots.put(slot)
    children = _Children()

    def work(folder: Path) -> None:
        if children.are_stopped or not may_start():
            report(folder, None)
            return
        slot = slots.get()
        try:
            report(folder, _in_own_process(folder, slot, jobs, children))
        finally:
            slots.put(slot)

    with children.stopped_by_signals(), ThreadPoolExecutor(jobs) as pool:
        for done in [pool.submit(work, folder) for folder in folders]:
            done.result()


class _Children:
    """Processes of the cells that run now; a signal to this one lets them save and end."""

    def __init__(self) -> None:
        self.are_stopped = False
        self._running: set[subprocess.Popen[bytes]] = set()

    def run(self, command: list[str], **options: Any) -> int:
        """Runs a command to its end; returns its status."""
        process = subprocess.Popen(command, **options)
        self._running.add(process)
        if self.are_stopped:  # just now
            process.terminate()
        try:
            return process.wait()
        finally:
            self._running.discard(process)

    def _stop(self, *_: Any) -> None:
        self.are_stopped = True
        for process in list(self._running):
            process.terminate()

    @contextlib.contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        """Stops them all on SIGTERM and Ctrl-C."""
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self._stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _in_own_process(folder: Path, slot: int, jobs: int, children: _Children) -> dict[str, Any]:
    (folder / "result.json").unlink(missing_ok=True)
    environment = dict(os.environ)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (cores or 1) // jobs)))
    # The folder of recipes/, and the caller's own, where --import finds its modules.
    paths = [environment.get("PYTHONPATH"), str(Path(__file__).absolute().parents[3]), os.getcwd()]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    if torch.cuda.device_count() > 1:
        environment["CUDA_VISIBLE_DEVICES"] = str(slot % torch.cuda.device_count())
    with (folder / "output.txt").open("ab") as output:
        status = children.run(
            [sys.executable, "-m", "recipes.studies.comparison.cells", str(folder.resolve())],
            stdout=output, stderr=subprocess.STDOUT, env=environment,
        )  # fmt: skip
    result = read_result(folder)
    if result is None and status == -signal.SIGTERM:
        result = dict(STOPPED)
        write_json(folder / "result.json", result)
    elif result is None:
        how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        result = {"state": "crashed", "error": f"{how}; its last words are in output.txt"}
        write_json(folder / "result.json", result)
    return result


def run_by_submitit(
    folders: Sequence[Path],
    jobs: int,
    may_start: Callable[[], bool],
    report: Callable[[Path, dict[str, Any] | None], None],
    cluster: str,
    log: Path,
    parameters: dict[str, Any],
) -> None:
    """The same through submitit, on this machine (cluster "local") or by SLURM."""
    import submitit

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
            running[folder] = executor.submit(_SubmittedCell(), folder.resolve())
        for folder, job in list(running.items()):
            if job.done():
                del running[folder]
                result = read_result(folder)
                if result is None:
                    last = (job.exception() or "it ended without a result").__str__()
                    last = last.strip().splitlines()[-1]
                    result = {"state": "crashed", "error": f"submitit job {job.job_id}: {last}"}
                    write_json(folder / "result.json", result)
                report(folder, result)
        time.sleep(0.5)


class _SubmittedCell:
    def __call__(self, folder: Path) -> str:
        return run_cell(folder)["state"]

    def checkpoint(self, folder: Path) -> Any:
        """What submitit queues again on preemption: the cell goes on from its checkpoint."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, folder)


def main(arguments: list[str]) -> int:
    """Runs the cell in the given folder; returns the exit status."""
    return DONE if run_cell(Path(arguments[0]))["state"] == OK else 1


if __name__ == "__main__":
    run_script(main)
