"""Runs of a comparison, each in a process of its own that can be stopped and goes on.

python -m recipes.studies.comparison.execution FOLDER
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch

from attnzoo import source_of
from backbones.pattern import names_in
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
from recipes.lab.training.held_out import IMAGES, MODEL_NAME, NAMES
from recipes.lab.training.session import train
from recipes.lab.training.settings import Settings
from recipes.studies.comparison.costs import cost_of, counted
from recipes.studies.comparison.plan import facts_of
from recipes.studies.comparison.planned import (
    EARLIER,
    EVALUATORS,
    OK,
    SMALLCNN,
    known_as,
    read_result,
    set_aside,
)

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

Result = dict[str, Any]
RunOne = Callable[[Path, int, threading.Event], Result]  # folder, slot, whether to stop


def run_one(folder: Path, progress: bool = False) -> Result:
    """Trains, measures and times one prepared run, going on from wherever it was stopped.

    Returns:
        What result.json holds: "state" is "ok", "error", "not finite", "out of memory" or
        "interrupted", with "error" in one line; "wall_seconds" are of all attempts together.
    """
    earlier, started = read_result(folder, EARLIER), time.monotonic()
    try:
        result = _run_one(folder, earlier, progress)
    except Exception as error:
        if is_users_mistake(error):
            print(f"error: {printable(str(error))}")
        else:
            traceback.print_exc()
        line = " ".join(str(error).split()) or type(error).__name__
        state = "out of memory" if "out of memory" in line.lower() else "error"
        result = {"state": state, "error": f"{type(error).__name__}: {line}"[:500]}
    result = _timed(result, earlier, started)
    write_json(folder / "result.json", result)
    return result


def _timed(result: Result, earlier: Result | None, started: float) -> Result:
    before = (earlier or {}).get("wall_seconds") or 0.0
    return result | {"wall_seconds": round(before + time.monotonic() - started, 1)}


def _run_one(folder: Path, earlier: Result | None, progress: bool) -> Result:
    stored = read_json(known_as(folder, "planned.json"), "planned run")
    import_all(stored["imports"])
    settings = Settings(**canonical_settings(stored["settings"]))
    run = Run(folder / "run")
    found = run.newest_checkpoint(warn=print) if run.config_file.exists() else None
    if found is None or found[0] < settings.steps:
        if any(map(source_of, names_in(settings.attn))):
            counted(settings, facts_of(settings))  # what cannot be would fail after the training
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
    if earlier is not None and earlier["state"] != OK:
        earlier = None
    cost = earlier["cost"] if earlier else cost_of(settings, load_training_data(settings, vae))
    measured = _measured(run, stored, folder, earlier["metrics"] if earlier else None, progress)
    (folder / EARLIER).unlink(missing_ok=True)
    return {
        "state": OK,
        "error": None,
        "cost": cost,
        "metrics": measured,
        "curve": _curve(run),
        "held_out_curve": _held_out_curve(run),
    }


def _measured(
    run: Run,
    stored: Mapping[str, Any],
    folder: Path,
    found: dict[str, Any] | None,
    progress: bool,
) -> dict[str, Any]:
    """What each extractor says of one set of images, beside what has been found already."""
    if not stored["samples"]:  # what training has logged is all that is asked for
        return {"results": {}, "real_floor": {}, "extractors": []}
    seen = list(found.get("extractors", SMALLCNN)) if found else []
    for name in stored.get("extractors", SMALLCNN):
        if name in seen:
            continue
        weights = stored.get("extractor_weights") if name != SMALLCNN[0] else None
        more = evaluate(
            run,
            cfgs=stored["cfgs"],
            plan=Plan(samples=stored["samples"], steps=stored["sampling_steps"]),
            extractor=name,
            weights_file=None if weights is None else Path(weights),
            cache=folder.parents[1] / EVALUATORS,
            vae=stored["vae"],
            real=stored["real"],
            held_out=0 if found else stored.get("held_out", IMAGES),  # the same for extractors
            imports=stored["imports"],
            progress=progress,
        )
        seen.append(name)
        found = more if found is None else _joined(found, more)
    assert found is not None
    return {**found, "extractors": seen}


def _joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The numbers of two extractors; what both give, and all else, is the first one's."""
    groups = {
        name: {
            column: {**second[name].get(column, {}), **first[name].get(column, {})}
            for column in {**first.get(name, {}), **second.get(name, {})}
        }
        for name in ("results", "not_measured")
        if name in first and name in second
    }
    return {
        **first,
        **groups,
        "real_floor": {**second["real_floor"], **first["real_floor"]},
        "warnings": list(dict.fromkeys([*first.get("warnings", ()), *second["warnings"]])),
    }


def _curve(run: Run, points: int = 100) -> list[tuple[int, float]]:
    """(step, mean loss of the steps since the point before)."""
    entries = losses_of(run.read_log())
    size = max(1, len(entries) // points)
    chunks = [entries[start : start + size] for start in range(0, len(entries), size)]
    return [(c[-1][0], sum(loss for _, loss in c) / len(c)) for c in chunks]


def _held_out_curve(run: Run) -> list[dict[str, float]]:
    """The step and the held-out losses of every entry of a log that has them."""
    names = ("step", *NAMES, MODEL_NAME)
    points = [{n: entry[n] for n in names if n in entry} for entry in run.read_log()]
    return [
        point for point in points if NAMES[0] in point and all(map(math.isfinite, point.values()))
    ]


def losses_of(log: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """(step, loss) of the entries of a log; a step that was skipped has no loss."""
    found = [(entry["step"], entry.get("loss")) for entry in log]
    return [(n, x) for n, x in found if isinstance(x, int | float) and math.isfinite(x)]


def run_all(
    folders: Sequence[Path],
    jobs: int,
    may_start: Callable[[], bool],
    report: Callable[[Path, Result | None], None],
    run: RunOne,
) -> None:
    """Runs what is prepared, ``jobs`` at a time.

    SIGTERM, SIGHUP and Ctrl-C let the running ones save and end, and start no other.

    Args:
        folders: Of prepared runs.
        jobs: Runs at the same time.
        may_start: Asked before each run; False leaves it for another day.
        report: Gets each run's result, None for one that was not started.
        run: ``locally`` or ``by_submitit``.
    """
    slots: queue.SimpleQueue[int] = queue.SimpleQueue()
    for slot in range(jobs):
        slots.put(slot)

    def run_next(folder: Path) -> Result | None:
        if stop.is_set() or not may_start():
            return None
        slot = slots.get()
        try:
            return run(folder, slot, stop)
        finally:
            slots.put(slot)

    with signals() as stop, ThreadPoolExecutor(jobs) as pool:
        try:
            running = {pool.submit(run_next, folder): folder for folder in folders}
            for one in as_completed(running):
                report(running[one], one.result())
        finally:
            stop.set()


@contextlib.contextmanager
def signals() -> Iterator[threading.Event]:
    """Whether a signal to stop has come meanwhile."""
    received = threading.Event()
    before = {}
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's
            before[number] = signal.signal(number, lambda *_: received.set())
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def locally(jobs: int, minutes: float = math.inf) -> RunOne:
    """Runs each in a process of its own; with several GPUs they take turns on them.

    Args:
        jobs: Runs at the same time, which share the cores.
        minutes: Limit of one run, which is then asked to save and end.
    """

    def run(folder: Path, slot: int, stop: threading.Event) -> Result:
        process, started = _start(folder, slot, jobs), time.monotonic()
        deadline = time.monotonic() + 60 * minutes
        while process.poll() is None and not stop.is_set() and time.monotonic() < deadline:
            time.sleep(0.05)
        is_cut = process.poll() is None
        if is_cut:
            process.terminate()
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        result, status = read_result(folder), process.returncode
        if result is not None and result["state"] != STOPPED["state"]:
            return result
        if is_cut and not stop.is_set():
            error = (
                f"it took longer than --run-minutes {minutes:g}; run the comparison again with "
                f"more, and it goes on"
            )
            result = {"state": "timed out", "error": error}
        elif is_cut:
            result = dict(STOPPED)
        elif result is None:
            how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
            result = {"state": "crashed", "error": f"{how}; its last words are in output.txt"}
        else:
            return result
        return ended(folder, result, started)

    return run


def ended(folder: Path, result: Result, started: float) -> Result:
    """Writes what a launcher says of a run that it has ended, or that has died.

    Args:
        folder: Of the run.
        result: State and error.
        started: When this attempt was, by ``time.monotonic``.

    Returns:
        The result with the seconds of all attempts.
    """
    result = _timed(result, read_result(folder, EARLIER), started)
    with contextlib.suppress(CannotWrite):  # a full disk; without it the run is not done
        write_json(folder / "result.json", result)
    return result


def _start(folder: Path, slot: int, jobs: int) -> subprocess.Popen[bytes]:
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
        set_aside(folder)
        with (folder / "output.txt").open("ab") as output:
            # A session of its own: Ctrl-C reaches it as one signal, from here.
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env=environment, start_new_session=True,
            )  # fmt: skip
    except OSError as error:
        raise CannotWrite(folder, error) from error


def import_path() -> list[str]:
    """Where a run's process finds modules: where this one does, and in the working folder last.

    A file of the working folder must not stand in for a package, whatever PYTHONPATH says.
    """
    last = [str(_ROOT), os.getcwd()]
    later = {Path(path).resolve() for path in (*last, _ROOT / "recipes")}
    first = [path for path in sys.path if path and Path(path).resolve() not in later]
    shown = [str(Path(path).absolute()) if Path(path).exists() else path for path in first]
    return list(dict.fromkeys([*shown, *last]))


def by_submitit(cluster: str, log: Path, parameters: dict[str, Any]) -> RunOne:
    """The same through submitit, on this machine (cluster "local") or by SLURM.

    Args:
        cluster: Of submitit.
        log: Folder for what submitit writes.
        parameters: Of its executor.
    """
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
    one_at_a_time = threading.Lock()

    def run(folder: Path, slot: int, stop: threading.Event) -> Result:
        set_aside(folder)
        started = time.monotonic()
        with one_at_a_time:
            job = executor.submit(_Submitted(), folder.resolve())
        while not job.done():
            if stop.wait(0.5):
                error = f"submitit job {job.job_id} goes on; run the comparison again later"
                return {"state": "submitted", "error": error}
        result = read_result(folder)
        if result is None:
            last = str(job.exception() or "").strip() or "it ended without a result"
            error = f"submitit job {job.job_id}: {last.splitlines()[-1]}"
            return ended(folder, {"state": "crashed", "error": error}, started)
        return result

    return run


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
