"""Starts processes on some of the GPUs, which measure cases, and ends them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import launch
from bench.launch import end, last_words
from bench.reports import TOO_SLOW
from bench.scaling.cases import Case, write_plan

_VISIBLE = "CUDA_VISIBLE_DEVICES"


def start(
    script: Sequence[str], processes: int, devices: Sequence[int] | None, output: Path
) -> subprocess.Popen[bytes]:
    """See ``bench.launch.start``.

    Args:
        script: Arguments of Python.
        processes: By torchrun where there are several.
        devices: GPUs that they see, counted among those of this process; None is a CPU.
        output: File for what they say.
    """
    cores, names = os.cpu_count() or 1, os.environ.get(_VISIBLE, "").split(",")
    names = [name for name in names if name]
    changed = {
        _VISIBLE: ",".join(names[device] if names else str(device) for device in devices or ()),
        # What torchrun would set, for one process too.
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": str(max(1, min(16, cores // max(1, processes)))),
    }
    return launch.start(script, processes, output, launch.ROOT, **changed)


class Launch:
    """One start of some processes, which measure cases one after the other.

    Args:
        cases: What is left to measure, all on as many GPUs.
        devices: Which ones; None is a CPU.
        folder: For this start alone; latents lie beside it.
        imports: Files or modules of a user's own mechanisms.
    """

    def __init__(
        self, cases: list[Case], devices: Sequence[int] | None, folder: Path,
        imports: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.cases, self.devices, self.folder = list(cases), devices, folder
        folder.mkdir()
        write_plan(folder, cases)
        self._output = folder / "output.txt"
        # Which are found from where this process is.
        script = ["-m", "bench.scaling.worker", str(folder), os.getcwd(), *imports]
        self._process = start(script, cases[0].gpus, devices, self._output)
        self._read = 0
        self._since = time.monotonic()

    def rows(self) -> list[dict[str, Any]]:
        """Those that have come since the last call; their cases are no longer left."""
        file = self.folder / "rows.jsonl"
        text = file.read_text("utf-8") if file.exists() else ""
        lines = text.split("\n")[:-1]  # what has no end is still being written
        found = [json.loads(line) for line in lines[self._read :]]
        self._read = len(lines)
        for _ in found:
            del self.cases[0]
            self._since = time.monotonic()
        return found

    def failure(self, patience: float) -> str | None:
        """Why the first of the cases left will not be measured; None while it may yet be.

        Args:
            patience: Seconds that a case may take.
        """
        if errors := sorted(self.folder.glob("error-*")):
            return errors[0].read_text("utf-8") or "it failed"
        if self._process.poll() is not None:
            return f"ended with {self._process.returncode}: {last_words(self._output)}"
        if time.monotonic() - self._since > patience:
            return f"{TOO_SLOW} {patience:.0f} s"
        return None

    def close(self) -> None:
        """Waits for processes that are done, and ends those that are not."""
        if not self.cases:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(20)
        # A process that waits for another one hears no signal but this.
        for file in self.folder.glob("process-*"):
            if self._process.poll() is None:
                with contextlib.suppress(ProcessLookupError, ValueError):
                    os.kill(int(file.read_text()), signal.SIGKILL)
        end(self._process)
