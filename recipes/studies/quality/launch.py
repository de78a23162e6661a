"""Many small runs under one GPU: each in a process that is forked from one that has all loaded.

The launcher imports and opens the data once, has no threads and never touches a GPU, so a fork of
it may do both. A run that ends, however it ends, takes nothing with it; one that time cuts off has
saved its state, and the next call goes on exactly.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from recipes.lab.console import UserError
from recipes.studies.comparison.execution import (
    GRACE_SECONDS,
    STOPPED,
    Result,
    ended,
    run_one,
    signals,
)
from recipes.studies.comparison.planned import OK, read_result, set_aside

SAVE_SECONDS = 20.0  # at the end of a call, for running ones to save
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
START_SECONDS = 20.0  # what is left for less than this is not begun


def gpus_to_use(asked: str) -> list[str]:
    """The GPUs of ``--gpus``: "all", "0,1" or "none"; none where the machine has none.

    Afterwards this process sees no GPU and has one thread, so that it can be forked.

    Raises:
        UserError: One is named that is not there.
    """
    pid = os.fork()
    if not pid:  # whoever counts GPUs may have touched one
        os._exit(torch.cuda.device_count())
    count = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    visible = shown.split(",") if shown else list(map(str, range(count)))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)  # a pool of threads would be lost in a fork, and waited for
    if asked in ("all", "none"):
        return visible[:count] if asked == "all" else []
    if not all(one.strip().isdecimal() and int(one) < count for one in asked.split(",")):
        there = f"all, none or numbers below {count}" if count else "none here: there is no GPU"
        raise UserError(f"--gpus takes {there}, got {asked!r}")
    return [visible[int(one)] for one in asked.split(",")]


def forked(work: Callable[[], Any], gpu: str | None, threads: int, output: Path) -> int:
    """Starts ``work`` in a process of its own; returns its number.

    Args:
        work: What to do; its result is the exit status.
        gpu: The one it sees, or None.
        threads: Of its operators on the CPU.
        output: File that gets what it says.
    """
    assert not torch.cuda.is_initialized(), "a forked process could not use the GPU any more"
    sys.stdout.flush()
    sys.stderr.flush()
    launcher, pid = os.getpid(), os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()  # Ctrl-C reaches it as one signal, from the launcher
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's
                signal.signal(number, signal.SIG_DFL)
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for target, source in ((0, nothing), (1, file), (2, file)):
            os.dup2(source, target)
        _end_with(launcher)
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu or ""
        torch.set_num_threads(threads)
        status = int(work() or 0)
    except BaseException as error:  # nothing of the launcher may go on in here
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _end_with(launcher: int) -> None:
    """Lets this process save and end when its launcher is killed: it holds the study's lock."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != launcher:
            raise SystemExit("the launcher has ended")


def run_forked(
    folders: Sequence[Path],
    slots: Sequence[str | None],
    threads: int,
    minutes: float,
    report: Callable[[Path, Result | None], None],
) -> None:
    """Runs what is prepared, one on each slot at a time, until all are done or time is up.

    SIGTERM, SIGHUP and Ctrl-C end it as the time does: running ones save, others wait.

    Args:
        folders: Of prepared runs, most important first.
        slots: The GPU of each slot, None for the CPU.
        threads: Of each run on the CPU.
        minutes: After which everything has been saved.
        report: Gets each run's result, None for one that was not started.
    """
    deadline = time.monotonic() + 60 * minutes - SAVE_SECONDS
    waiting, free = deque(folders), list(slots)
    running: dict[int, tuple[Path, str | None, float]] = {}
    told: float | None = None  # when running ones were asked to save
    with signals() as stop:
        while waiting or running:
            now = time.monotonic()
            if told is None and (stop.is_set() or now > deadline):
                told = now
                for pid in running:
                    os.kill(pid, signal.SIGTERM)
            if told is not None and now - told > GRACE_SECONDS:
                for pid in running:
                    os.killpg(pid, signal.SIGKILL)
            while waiting and free and told is None and now < deadline - START_SECONDS:
                folder, slot = waiting.popleft(), free.pop(0)
                set_aside(folder)
                work = _work(folder)
                pid = forked(work, slot, threads, folder / "output.txt")
                running[pid] = folder, slot, time.monotonic()
            for pid in list(running):
                is_over, status = os.waitpid(pid, os.WNOHANG)
                if is_over:
                    folder, slot, started = running.pop(pid)
                    free.append(slot)
                    report(folder, _result(folder, status, told is not None, started))
            if not running and (told is not None or now >= deadline - START_SECONDS):
                break
            time.sleep(0.05)
    for folder in waiting:
        report(folder, None)


def _work(folder: Path) -> Callable[[], bool]:
    def work() -> bool:
        if torch.cuda._is_in_bad_fork():  # an import has asked for GPUs: a new interpreter has not
            module = "recipes.studies.comparison.execution"
            os.execv(sys.executable, [sys.executable, "-m", module, str(folder.resolve())])
        return run_one(folder)["state"] != OK

    return work


def _result(folder: Path, status: int, is_cut: bool, started: float) -> Result:
    result = read_result(folder)
    if result is None:
        code = os.waitstatus_to_exitcode(status)
        how = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
        crashed = {"state": "crashed", "error": f"{how}; its last words are in output.txt"}
        return ended(folder, STOPPED if is_cut else crashed, started)
    return result
