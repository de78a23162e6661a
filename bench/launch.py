"""Starts scripts in processes of their own, by torchrun where there are several, and ends them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment_of(root: Path, **changed: str) -> dict[str, str]:
    """This process's environment, in which Python imports the packages of a tree."""
    paths = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": paths, **changed}


def start(
    script: Sequence[str], processes: int, output: Path, root: Path = ROOT, **changed: str
) -> subprocess.Popen[bytes]:
    """Starts a script as a user would, in the folder of ``output``.

    Args:
        script: Arguments of Python.
        processes: By torchrun where there are several.
        output: File for what they say.
        root: The tree whose packages they import.
        **changed: Variables of the environment.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else ()), *script]
    with output.open("wb") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT,
            env=environment_of(root, **changed), cwd=output.parent,
        )  # fmt: skip


def last_words(output: Path) -> str:
    """The last lines of what processes said, as one."""
    return " ".join(output.read_text("utf-8", "replace").split())[-200:]


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a script and, where it is torchrun, what that has started."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(40)  # torchrun grants its own thirty
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
