"""Who writes to a run's folder, and where the run stands."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import resource
import time
from collections.abc import Iterator
from typing import Any

import torch

from recipes.lab.console import UserError, printable, warn
from recipes.lab.files import CannotWrite, check_unlocked, locked, read_json, write_json
from recipes.lab.training.checkpoint import Run

_SECONDS_BETWEEN_WRITES = 2.0
_INSTEAD = "log.jsonl beside it lists the steps"


@contextlib.contextmanager
def claimed(run: Run) -> Iterator[None]:
    """Holds the run's folder; a second process that trains into it is refused.

    The lock goes with the process, however it ends. Where the file system knows no locks, there
    is none.

    Raises:
        UserError: Another process holds the folder, or it cannot be written to.
    """
    run.make()
    with locked(run.lock_file, warn=warn):
        yield


class Status:
    """Keeps a run's status.json.

    Args:
        run: The run.
        steps: Where it ends.
        batch_size: Images of a step.
    """

    def __init__(self, run: Run, steps: int, batch_size: int) -> None:
        self.run = run
        self.steps = steps
        self.batch_size = batch_size
        self.rate: float | None = None  # steps per second, over the last dozen or so
        self._written = 0.0

    def update(self, step: int, seconds: float, entry: dict[str, Any], saved: int | None) -> None:
        """Notes a step that took ``seconds``; writes every few seconds."""
        self.rate = 1 / seconds if self.rate is None else 0.9 * self.rate + 0.1 / seconds
        if time.monotonic() - self._written > _SECONDS_BETWEEN_WRITES:
            self.write("running", step, entry, saved)

    def write(
        self, state: str, step: int, entry: dict[str, Any], saved: int | None, reason: str = ""
    ) -> None:
        """Writes "running", "preempted", "done" or "failed" now, unless the disk is full."""
        self._written = time.monotonic()
        content = {
            "state": state,
            "reason": reason,
            "step": step,
            "steps": self.steps,
            "checkpoint": saved,
            "loss": entry.get("loss"),
            "skipped": entry.get("skipped_in_all", 0),
            "images_per_second": self.rate and round(self.rate * self.batch_size, 1),
            "seconds_left": self.rate and round((self.steps - step) / self.rate),
            "memory_mb": round(memory_mb()),
            "process": os.getpid(),
            "host": platform.node(),
            "updated": _now(),
        }
        with contextlib.suppress(CannotWrite):
            write_json(self.run.status_file, content)


def noted_checkpoint(run: Run) -> int | None:
    """The step of the newest checkpoint by status.json, or None where that does not say."""
    with contextlib.suppress(UserError, KeyError, TypeError):
        return read_json(run.status_file)["checkpoint"]
    return None


def describe(run: Run) -> str:
    """Where a run stands, for a person.

    Raises:
        UserError: There is no status in the folder, or it is damaged.
    """
    try:
        return printable(_describe(run, read_json(run.status_file, "the status", _INSTEAD)))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{run.folder} has no readable status.json: the status {str(run.status_file)!r} is "
            f"damaged; {_INSTEAD}"
        ) from error


def _describe(run: Run, status: dict[str, Any]) -> str:
    state = status["state"]
    if state == "running":
        with contextlib.suppress(UserError):
            check_unlocked(run.lock_file)
            state = "crashed (it says running, but no process holds it)"
    lines = [
        f"{run.folder}: {state}" + (f", {status['reason']}" if status["reason"] else ""),
        f"  step {status['step']} of {status['steps']}, newest checkpoint {status['checkpoint']}",
    ]
    if status["loss"] is not None:
        lines.append(f"  loss {status['loss']:.4f}, {status['skipped']} steps skipped")
    if status["images_per_second"]:
        left = datetime.timedelta(seconds=status["seconds_left"])
        lines.append(
            f"  {status['images_per_second']} images per second, {left} left, "
            f"{status['memory_mb']} MB"
        )
    lines.append(f"  process {status['process']} on {status['host']}, {status['updated']}")
    return "\n".join(lines)


def memory_mb() -> float:
    """The most memory this process has held, in MB: of the GPU, or resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
