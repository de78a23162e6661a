"""Runs a function in a process of its own, under a memory cap and a time limit."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import multiprocessing
import os
import pickle
import resource
import signal
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Literal

State = Literal["measured", "out-of-memory", "unsupported", "timeout", "error"]
# Address space that the allocator reserves ahead and libraries take as scratch.
_SLACK = 2**29
STATES: tuple[State, ...] = ("measured", "out-of-memory", "unsupported", "timeout", "error")


class Unsupported(Exception):
    """What was asked for cannot run here; the message says what is missing."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a cell ended.

    Attributes:
        state: One of ``STATES``.
        reason: Why it was not measured, in one line.
        result: What the function returned.
    """

    state: State
    reason: str = ""
    result: Any = None


# Processes that start while an earlier cell is measured: CUDA takes half a second to start.
_AHEAD = {"cpu": 0, "cuda": 2}


def preloaded() -> list[str]:
    """What the server imports once, before every process is forked from it."""
    import torch

    return ["bench.preload" if torch.cuda.is_available() else "bench.worker"]


class _Worker:
    """A process that waits for functions to call."""

    def __init__(self, memory: int, device: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(preloaded())
        self.connection, other = context.Pipe()
        handle, self.errors = tempfile.mkstemp(prefix="attnzoo-bench-")
        os.close(handle)
        # Daemons end with this process, also one that still waits.
        self.process = context.Process(
            target=_child, args=(other, memory, device, self.errors), daemon=True
        )
        self.process.start()
        other.close()

    def call(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], timeout: float
    ) -> Outcome:
        try:
            self.connection.send((function, arguments))
            if not self.connection.poll(timeout):
                return Outcome("timeout", f"took longer than {timeout:g} s; raise --cell-timeout")
            return Outcome(*self.connection.recv())
        except (EOFError, OSError):
            self.process.join()
        code = self.process.exitcode
        if code in (-signal.SIGKILL, -signal.SIGABRT):
            # The kernel kills what exceeds the machine; a failed C++ allocation aborts.
            return Outcome("out-of-memory", f"the process died of {signal.Signals(-code).name}")
        return Outcome("error", f"the process died with exit status {code}: {self._last_words()}")

    def _last_words(self) -> str:
        with open(self.errors, errors="replace") as file:
            lines = [line.strip() for line in file if line.strip()]
        return lines[-1][:300] if lines else "it said nothing"

    def end(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.connection.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.errors)


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


def _child(connection: Connection, memory: int, device: str, errors: str) -> None:
    # What libraries and the profiler write is kept for the case that this process dies of it.
    with open(errors, "w") as file:
        os.dup2(file.fileno(), 2)
    failure: Exception | None = None
    try:
        _cap(memory, device)
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
            answer = (_classify(error), _line(error), None)
        connection.send(answer)


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
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = now + memory + _SLACK
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _classify(error: Exception) -> State:
    text = str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out-of-memory"
    if any(words in text for words in ("can't allocate memory", "not enough memory", "bad_alloc")):
        return "out-of-memory"
    if (
        isinstance(error, Unsupported | NotImplementedError | ImportError)
        or "not implemented for" in text
    ):
        return "unsupported"
    # What attnzoo says of a backend that was named and is not there.
    if text.startswith("impl=") and "cannot run" in text:
        return "unsupported"
    return "error"


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, Unsupported):
        return text[:300]
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__
