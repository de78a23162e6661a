"""One cell of a comparison: a resumable run in a folder, and processes that run many of them.

    python -m recipes.studies.comparison.cells FOLDER

A cell's folder holds cell.json (what it is), run/ (the ordinary run), output.txt and, once it has
ended, result.json. Whatever happens to one cell happens in its own process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
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
from recipes.lab.files import CannotWrite, read_json, refuse_links, write_json
from recipes.lab.imports import import_all, origins
from recipes.lab.training.build import load_training_data
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.session import train
from recipes.lab.training.settings import Settings
from recipes.studies.comparison.costs import cost_of

OK = "ok"
STOPPED = {"state": "interrupted", "error": "stopped by a signal; run the comparison again"}
EVALUATORS = ".evaluators"  # folder beside cells/, shared by all of them
GRACE_SECONDS = 60.0  # between asking a run to save and end, and ending it
# A setting that is added later is part of a run's name only where it is not at its default, so
# that the runs of an earlier version are found.
_FIRST_SETTINGS = (
    "accumulate", "adam_beta2", "attn", "attn_options", "batch_size", "checkpoint_every",
    "class_count", "class_seed", "compile", "data", "decay", "diagnose_every", "ema_decay",
    "ema_ramp", "gradient_checkpointing", "gradient_clip", "keep_every", "label_dropout",
    "learning_rate", "level", "patch_size", "precision", "preset", "protocol", "resolution",
    "sample_every", "seed", "sharded", "size", "skip_limit", "steps", "strict", "vae",
)  # fmt: skip
_DEFAULTS = dataclasses.asdict(Settings())
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
from recipes.studies.comparison.cells import main
run_script(main)"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a comparison.

    Attributes:
        label: Name of the mechanism or of the variant of it.
        settings: Of the run.
        cfgs: Guidance scales to measure.
        samples: Images per scale.
        sampling_steps: Model evaluations per image.
        imports: Files (absolute) or modules that register mechanisms of the user's own.
        vae: Folder or hub id of what decodes latents; None takes what these remember.
        real: Folder of real images to measure with; None takes the data's own.
    """

    label: str
    settings: Settings
    cfgs: tuple[float, ...]
    samples: int
    sampling_steps: int
    imports: tuple[str, ...] = ()
    vae: str | None = None
    real: str | None = None

    @property
    def name(self) -> str:
        """Name of the folder, which another setting would change."""
        settings = self.settings
        key = dataclasses.asdict(self)
        del key["vae"]  # only the one that made the latents is taken
        if self.real is None:
            del key["real"]
        key["settings"] = {
            name: value
            for name, value in key["settings"].items()
            if name in _FIRST_SETTINGS or value != _DEFAULTS.get(name)
        }
        # The same folder has the same name in every locale.
        data = os.fsencode(settings.data).decode("utf-8", "surrogateescape")
        key["settings"]["data"] = data
        # Where a file lies does not count, and what it holds counts for its own mechanisms.
        files = [source for source in self.imports if is_file(source)]
        key["imports"] = [source for source in self.imports if source not in files]
        if files and (own := origins([settings.attn])):
            key["code"] = own[settings.attn]["sha256"]
        text = json.dumps(key, sort_keys=True, default=list)
        place = [Path(data).name, settings.level, str(settings.resolution or "native")]
        if settings.protocol != "controlled":
            place.append(settings.protocol)
        readable = re.sub(r"[^A-Za-z0-9]+", "-", "-".join([*place, self.label])).strip("-")
        digest = hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:8]
        return f"{readable[:150]}-seed-{settings.seed}-{digest}"

    def folder(self, out: Path) -> Path:
        """Where the cell lives under ``out``."""
        return out / "cells" / self.name

    def prepare(self, out: Path) -> Path:
        """Makes the cell's folder under ``out``.

        Raises:
            UserError: Something in it is a link, which would lead writing out of it.
            CannotWrite: The system refuses.
        """
        folder = self.folder(out)
        for name in ("cell.json", "result.json", "output.txt", "run"):
            refuse_links(out, folder / name)
        write_json(folder / "cell.json", dataclasses.asdict(self))
        return folder


def is_file(source: str) -> bool:
    """Whether a value of ``--import`` is a file, not a module."""
    return source.endswith(".py") or os.sep in source


def read_result(folder: Path) -> dict[str, Any] | None:
    """What a cell has come to, or None where it has not ended or the file is damaged."""
    file = folder / "result.json"
    if not file.is_file():
        return None
    try:
        found = read_json(file, "result")
        if not _is_result(found):
            raise ValueError(f"result {str(file)!r} is damaged: it is not what a run leaves")
    except ValueError as error:
        print(f"{printable(str(error))}; the run counts as not done", file=sys.stderr)
        return None
    return found


def _is_result(found: Any) -> bool:
    def is_number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    def is_text(value: Any) -> bool:
        return value is None or isinstance(value, str)

    def is_group(value: Any) -> bool:
        return isinstance(value, Mapping)

    if not (is_group(found) and isinstance(found.get("state"), str)):
        return False
    wall = found.get("wall_seconds")
    if not (is_text(found.get("error")) and (wall is None or is_number(wall))):
        return False
    if found["state"] != OK:
        return "metrics" not in found
    cost, metrics, curve = found.get("cost"), found.get("metrics"), found.get("curve")
    if not (is_group(cost) and is_group(metrics) and isinstance(curve, list)):
        return False
    results, floor = metrics.get("results"), metrics.get("real_floor")
    evaluator, versions = metrics.get("evaluator"), metrics.get("versions", {})
    return (
        all(value is None or is_number(value) for value in cost.values())
        and is_group(results)
        and all(_is_float(cfg) and is_group(numbers) for cfg, numbers in results.items())
        and is_group(floor)
        and is_number(metrics.get("resolution", 0))
        and is_text(metrics.get("device"))
        and is_group(versions)
        and is_text(versions.get("torch"))
        and (
            evaluator is None
            or (
                is_group(evaluator)
                and isinstance(evaluator.get("name"), str)
                and isinstance(evaluator.get("sha256"), str)
            )
        )
        and all(
            isinstance(point, list) and len(point) == 2 and all(map(is_number, point))
            for point in curve
        )
    )


def _is_float(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


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
        if is_users_mistake(error):
            print(f"error: {printable(str(error))}")
        else:
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
    stored = read_json(folder / "cell.json", "cell")
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
        if status == INTERRUPTED:
            raise _Stopped(**STOPPED)
        if status == NON_FINITE:
            raise _Stopped("not finite", "training stopped: the loss is not finite")
        if status != DONE:
            raise _Stopped("error", f"training ended with status {status}")
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
    return {"cost": cost, "metrics": measured, "curve": _curve(run)}


def _curve(run: Run, points: int = 100) -> list[tuple[int, float]]:
    """(step, mean loss of the steps since the point before)."""
    # A step that was skipped has no loss.
    entries = [
        (entry["step"], entry["loss"]) for entry in run.read_log() if is_loss(entry.get("loss"))
    ]
    size = max(1, len(entries) // points)
    chunks = [entries[start : start + size] for start in range(0, len(entries), size)]
    return [(c[-1][0], sum(loss for _, loss in c) / len(c)) for c in chunks]


def is_loss(value: Any) -> bool:
    """Whether a log's "loss" is one: a skipped step has None."""
    return isinstance(value, int | float) and math.isfinite(value)


Report = Callable[[Path, "dict[str, Any] | None"], None]


def run_locally(
    folders: Sequence[Path],
    jobs: int,
    may_start: Callable[[], bool],
    report: Report,
    minutes: float = math.inf,
) -> None:
    """Runs cells in processes of their own, ``jobs`` at a time.

    SIGTERM, SIGHUP and Ctrl-C let the running ones save and end, and start no other.

    Args:
        folders: Of prepared cells.
        jobs: Cells at the same time; with several GPUs they take turns on them.
        may_start: Asked before each cell; False leaves the rest for another day.
        report: Told each cell's result, None for one that was not started.
        minutes: Limit of one cell, which is then asked to save and end.
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
            for process in running.values():
                process.wait()


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
    """The process of one cell."""

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
        try:
            (folder / "result.json").unlink(missing_ok=True)
            with (folder / "output.txt").open("ab") as output:
                # A session of its own: Ctrl-C reaches it as one signal, from here.
                self._process = subprocess.Popen(
                    [
                        sys.executable, "-c", _START, str(folder.resolve()), str(_ROOT),
                        *import_path(),
                    ],
                    stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
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

    def wait(self) -> None:
        """Until the process has ended."""
        while not self.has_ended():
            time.sleep(0.05)

    def result(self) -> dict[str, Any]:
        """What the cell has come to, now that its process has ended."""
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
        with contextlib.suppress(CannotWrite):  # a full disk; without it the cell is not done
            write_json(self.folder / "result.json", result)
        return result


def import_path() -> list[str]:
    """Where a cell's process finds modules: where this one does, and in the working folder last.

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
    import submitit

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
            running[folder] = executor.submit(_SubmittedCell(), folder.resolve())
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
