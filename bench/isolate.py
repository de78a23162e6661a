"""Runs a function in a process of its own, under a memory cap and a time limit."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing import reduction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from recipes.lab.console import UserError
from recipes.lab.files import locked

State = Literal["measured", "out-of-memory", "unsupported", "timeout", "interrupted", "error"]
# Address space that the allocator reserves ahead and libraries take as scratch.
_SLACK = 2**29
# The temporary folders of runs, each with a lock that goes with the run's process.
_SCRATCH, _LOCK = "attnzoo-bench-", ".lock"
# Seconds: a younger folder may belong to a run that has not locked it yet.
_YOUNG = 60.0
# Processes that start while an earlier case is measured: CUDA takes half a second to start.
_AHEAD = {"cpu": 0, "cuda": 2}
# With this variable torch counts GPUs by the driver's management library. Whoever asks CUDA itself
# breaks it in all later forks of the process, and libraries ask when they are imported.
ASK_NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"


class Unsupported(Exception):
    """What was asked for cannot run here; the message says what is missing."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a case ended."""

    state: State  # "measured", or why not; "interrupted" if the run ended before it
    reason: str = ""  # why it was not measured, in one line
    result: Any = None  # what the function returned


@functools.cache
def _scratch() -> None:
    """Gives this run a temporary folder, ``multiprocessing.util.get_temp_dir`` in its processes.

    It goes with the run; what a killed run could not remove is removed when the next one starts.
    """
    # The server's socket lies in it, and the path of a socket has 107 bytes at most.
    place = tempfile.gettempdir()
    place = place if len(os.fsencode(place)) <= 60 else "/tmp"
    _sweep(Path(place))
    folder = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=place))
    holder = contextlib.ExitStack()
    holder.enter_context(locked(folder / _LOCK))
    atexit.register(holder.close)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    multiprocessing.current_process()._config.setdefault("tempdir", str(folder))  # type: ignore[attr-defined]


def _sweep(root: Path) -> None:
    for old in root.glob(f"{_SCRATCH}*"):
        with contextlib.suppress(OSError, UserError):  # another user's, or of a run that goes on
            found = old.lstat()
            is_ours = found.st_uid == os.getuid() and not old.is_symlink()
            if is_ours and time.time() - found.st_mtime > _YOUNG:
                with locked(old / _LOCK):
                    shutil.rmtree(old)


@functools.cache
def _context() -> Any:
    """A server that has imported everything once, from which processes are forked."""
    import torch

    os.environ[ASK_NVML] = "1"
    context = multiprocessing.get_context("forkserver")
    preload = "bench.preload" if torch.cuda.is_available() else "bench.worker"
    context.set_forkserver_preload([preload])
    return context


class _Worker:
    """A process that waits for functions to call."""

    def __init__(self, memory: int, device: str) -> None:
        _scratch()
        self.connection, other = _context().Pipe()
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - it has no name, so nothing stays
        # Daemons end with this process, also one that still waits.
        self.process = _context().Process(target=_child, args=(other, memory, device), daemon=True)
        self.process.start()
        other.close()
        with contextlib.suppress(OSError):  # of one that died already, which is found out later
            reduction.send_handle(self.connection, self.errors.fileno(), self.process.pid)

    def call(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], timeout: float
    ) -> Outcome:
        try:
            self.connection.send((function, arguments))
            if not self.connection.poll(timeout):
                return Outcome("timeout", f"took longer than {timeout:g} s; raise --case-timeout")
            return Outcome(*self.connection.recv())
        except (EOFError, OSError):
            self.process.join()
        code = self.process.exitcode
        if code in (-signal.SIGKILL, -signal.SIGABRT):
            # The kernel kills what exceeds the machine; a failed C++ allocation aborts.
            return Outcome("out-of-memory", f"the process died of {signal.Signals(-code).name}")
        self.errors.seek(0)
        lines = self.errors.read().decode("utf-8", "replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        return Outcome("error", f"the process died with exit status {code}: {last[:300]}")

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()
        self.errors.close()


_waiting: dict[tuple[int, str, bool], list[_Worker]] = {}


@atexit.register
def end_all() -> None:
    """Ends the processes that still wait."""
    for pool in _waiting.values():
        while pool:
            pool.pop().end()


def run_isolated(
    function: Callable[..., Any],
    *arguments: Any,
    memory: int,
    timeout: float,
    device: str = "cpu",
    is_shared: bool = False,
) -> Outcome:
    """Calls ``function(*arguments)`` in a new process.

    Args:
        function: A function of an importable module.
        *arguments: Picklable.
        memory: Bytes that the process may take on top of what it starts with; on CUDA, of the
            device's memory.
        timeout: Seconds.
        device: "cpu" or "cuda": whose memory is capped.
        is_shared: Whether the process serves the next shared call too, for calls that time
            nothing and leave nothing behind.

    Returns:
        The outcome; this process survives every one of them.
    """
    pool = _waiting.setdefault((memory, device, is_shared), [])
    for dead in [worker for worker in pool if not worker.process.is_alive()]:
        pool.remove(dead)
        dead.end()
    worker = pool.pop(0) if pool else _Worker(memory, device)
    while len(pool) < (0 if is_shared else _AHEAD[device]):
        pool.append(_Worker(memory, device))
    outcome = None
    try:
        outcome = worker.call(function, arguments, timeout)
        return outcome
    finally:
        if is_shared and outcome and outcome.state != "timeout":
            pool.append(worker)
        else:
            worker.end()


def _child(connection: Connection, memory: int, device: str) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # What libraries and the profiler write is stored for the case that this process dies of it.
    errors = reduction.recv_handle(connection)
    os.dup2(errors, 2)
    os.close(errors)
    failure: Exception | None = None
    try:
        _cap(memory, device)  # before the first message: this starts CUDA
    except Exception as error:
        failure = error
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:  # nobody wants this process any more
            return
        try:
            if failure is not None:
                raise failure
            function, arguments = pickle.loads(message)
            answer: tuple[State, str, Any] = ("measured", "", function(*arguments))
        except Exception as error:
            answer = (_classify(error), one_line(error), None)
        connection.send(answer)


def _end_with_parent() -> None:
    """Ends this process when the suite's is gone, also if that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)


def _cap(memory: int, device: str) -> None:
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise Unsupported("no CUDA device is visible; leave --device out for the CPU")
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory / total))
        torch.zeros(1, device="cuda")  # starts CUDA
        return
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    limit, hard = now + memory + _SLACK, resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _classify(error: Exception) -> State:
    text = str(error)
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(w in text for w in ("can't allocate memory", "not enough memory", "bad_alloc"))
    ):
        return "out-of-memory"
    if (
        isinstance(error, Unsupported | NotImplementedError | ImportError)
        or "not implemented for" in text
        or text.startswith("impl=")  # what attnzoo says of a backend that is not there
    ):
        return "unsupported"
    return "error"


def one_line(error: BaseException) -> str:
    """The error's kind and words, at most 300 characters."""
    text = " ".join(str(error).split())
    if isinstance(error, Unsupported):
        return text[:300]
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__
