"""Asks an older checkout, in a process of its own, what its sampling and its steps take."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.checks import WrongStep
from bench.isolate import one_line
from bench.launch import environment_of
from bench.whole_models.before import ANSWER
from bench.whole_models.cases import Case, Setup

BEFORE = "before"  # the way of an older checkout, whose recipes knew no flags for others


@contextlib.contextmanager
def asked(setup: Setup, what: str, **given: Any) -> Iterator[Callable[..., Any]]:
    """Runs ``before.py`` for the time of the with-statement.

    Args:
        setup: Where, and which checkout.
        what: A function of ``before.py``.
        **given: Its arguments, but for the device.

    Yields:
        What sends some text, and gives the next answer.
    """
    assert setup.before is not None
    script = Path(__file__).with_name("before.py")
    words = json.dumps({"what": what, "device": setup.device, **given})
    with tempfile.TemporaryFile("w+") as errors, subprocess.Popen(
        [sys.executable, str(script), str(setup.before), words], env=environment_of(setup.before),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        said, heard = process.stdin, process.stdout

        def answer(text: str = "") -> Any:
            with contextlib.suppress(BrokenPipeError):  # then it has ended, and said why
                said.write(text)
                said.flush()
            for line in heard:
                if line.startswith(ANSWER):
                    return json.loads(line.removeprefix(ANSWER))
            code = process.wait()
            errors.seek(0)
            reason = one_line(RuntimeError(errors.read()[-300:]))
            raise WrongStep(f"{script.name} ended with {code}: {reason}")

        try:
            yield answer
        finally:
            process.kill()


def sampling_speeds(mechanism: str, setup: Setup) -> dict[str, float]:
    """Images per second of the older checkout's sampling of DiT-S, by type."""
    given: dict[str, Any] = {"size": "S", "resolution": 256, "images": 16, "steps": 20}
    given["rounds"] = 3 if setup.seconds else 1
    with asked(setup, "sampling", mechanism=mechanism, **given) as answer:
        return answer()


@contextlib.contextmanager
def step_of(case: Case, setup: Setup) -> Iterator[Callable[[int], float]]:
    """Prepares the older checkout's step of a case.

    Yields:
        What takes so many in a row, and gives the seconds of one.
    """
    given = {name: getattr(case, name) for name in ("mechanism", "size", "mode", "batch")}
    with asked(setup, "step", resolution=case.resolution, **given) as answer:
        answer()
        yield lambda repeats: answer(f"{repeats}\n")
