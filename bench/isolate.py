"""Runs a function in a process of its own, under a memory cap and a time limit."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import resource
import signal
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


class _Worker:
    """A process that waits for one function to call."""

    def __init__(self, memory: int, device: str) -> None:
        # The server imports torch once; each child is a fork of it. CUDA starts in the child only.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["bench.worker"])
        self.connection, other = context.Pipe()
        # Daemons end with this process, also one that still waits.
        self.process = context.Process(target=_child, args=(other, memory, device), daemon=True)
        self.process.start()
        other.close()

    def end(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.connection.close()


# Starting CUDA takes seconds, so the process of the next cell starts it during this one.
_spares: dict[tuple[int, str], _Worker] = {}


def run_isolated(
    function: Callable[..., Any],
    *arguments: Any,
    memory: int,
    timeout: float,
    device: str = "cpu",
) -> Outcome:
    """Calls ``function(*arguments)`` in a new process.

    Args:
        function: A function of an importable module.
        *arguments: Picklable.
        memory: Bytes that the process may take on top of what it starts with; on CUDA, of the
            device's memory.
        timeout: Seconds.
        device: "cpu" or "cuda": whose memory is capped.

    Returns:
        The outcome; this process survives every one of them.
    """
    worker = _spares.pop((memory, device), None)
    if worker is None or not worker.process.is_alive():
        worker = _Worker(memory, device)
    if device == "cuda":
        _spares[memory, device] = _Worker(memory, device)
    try:
        worker.connection.send((function, arguments))
        return _await(worker.process, worker.connection, timeout)
    finally:
        worker.end()


def _await(process: Any, receiver: Connection, timeout: float) -> Outcome:
    if not receiver.poll(timeout):
        return Outcome("timeout", f"took longer than {timeout:g} s; raise --cell-timeout")
    try:
        return Outcome(*receiver.recv())
    except EOFError:
        process.join()
    code = process.exitcode
    if code in (-signal.SIGKILL, -signal.SIGABRT):
        # The kernel kills what exceeds the machine; a failed C++ allocation aborts.
        return Outcome("out-of-memory", f"the process died of {signal.Signals(-code).name}")
    return Outcome("error", f"the process died with exit status {code}")


def _child(connection: Connection, memory: int, device: str) -> None:
    with open(os.devnull, "w") as nowhere:  # the profiler writes notes of its own
        os.dup2(nowhere.fileno(), 2)
    failure: Exception | None = None
    try:
        _cap(memory, device)
    except Exception as error:
        failure = error
    try:
        function, arguments = connection.recv()
    except EOFError:  # nobody wants this process any more
        return
    try:
        if failure is not None:
            raise failure
        answer: tuple[State, str, Any] = ("measured", "", function(*arguments))
    except Exception as error:
        answer = (_classify(error), _line(error), None)
    connection.send(answer)
    connection.close()


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
