"""Does the jobs of ``bench.whole_models``: in this process, or in one that may break.

What another process has to import, or to unpickle, stands here: a package's ``__main__`` is not
imported there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from backbones.pattern import names_in
from backbones.recorded import recording_stream
from bench import machine
from bench.checks import SIBLING_SIDE, check_layer
from bench.isolate import one_line
from bench.machine import free, quiet
from bench.reports import TOO_SLOW
from bench.whole_models.by_recipe import measure_recipe, rehearse_recipe
from bench.whole_models.cases import Calls, Case, Layer, Setup, compile_ahead, dtype_of
from bench.whole_models.measures import (
    measure_case,
    measure_launch,
    measure_layer,
    measure_over_before,
    measure_scans,
)
from bench.whole_models.older import BEFORE
from bench.whole_models.profiles import measure_profile
from recipes.lab.imports import import_all


@dataclasses.dataclass(frozen=True)
class Job:
    """One thing to measure.

    Attributes:
        part: Of the report; or "peaks" or "check". Of "before" it is softmax's model, held to an
            older checkout's; of "profile" a model alone, of "layer-profile" a layer.
        mechanism: Whose.
        case: A whole model, or a layer.
        softmax: The same case of softmax, where ``case`` is a model of another mechanism.
        mode: Of scans.
        recipe: Its name and the way it is started.
        peaks: Of the machine, for a layer's floor.
        seconds: That a training may take.
    """

    part: str
    mechanism: str = ""
    case: Case | Layer | None = None
    softmax: Case | None = None
    mode: str = ""
    recipe: tuple[str, str] = ("", "")
    peaks: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = 170.0

    @property
    def is_compiled(self) -> bool:
        """Whether there is something to compile before it is timed."""
        if self.case is not None:
            return "compiled" in self.case.treatments
        # By the other ways nothing is compiled but kernels, by an older checkout its own.
        return self.recipe[0] in ("train", "sample") and self.recipe[1] in ("compiled", BEFORE)

    @property
    def name(self) -> str:
        if self.case is not None:
            of = {"before": f" over {BEFORE}", "profile": " profile", "layer-profile": " profile"}
            return self.case.name + of.get(self.part, "")
        return {
            "launches": f"launch {self.mechanism}", "check": f"check of {self.mechanism}",
            "recipes": " ".join((*self.recipe, self.mechanism)), "scans": f"scans {self.mode}",
        }.get(self.part, self.part)  # fmt: skip


def compile_job(job: Job, setup: Setup) -> None:
    """Compiles what a job will need, so that compilers' caches on disk have it.

    Raises:
        RuntimeError: It fails; in words, since not every error can be sent to another process.
    """
    try:
        import_all(setup.imports)
        if job.case is not None:
            compile_ahead(job.case, setup)
        else:
            rehearse_recipe(job.recipe[0], job.mechanism, job.recipe[1], setup)
    except Exception as error:  # of a compiler, anything
        raise RuntimeError(one_line(error)) from None


class Bench:
    """Measures jobs one after the other in this process, and keeps softmax for the next one."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self._group: Case | None = None  # of softmax, which the others are compared with
        self._softmax: Calls | None = None

    def measure(self, job: Job) -> dict[str, Any]:
        """What the report has of a job."""
        device = self.setup.device
        if job.part == "check":
            for name in names_in(job.mechanism):
                check_layer(name, {}, 384, dtype_of(device), device, SIBLING_SIDE)
            return {}
        if job.part == "peaks":
            return machine.measure_peaks(device, (dtype_of(device),), torch.get_num_threads())
        if job.part == "launches":
            return measure_launch(job.mechanism, self.setup)
        if job.part == "layer-profile":
            assert job.case is not None
            return measure_profile(job.case, self.setup)
        if isinstance(job.case, Layer):
            return measure_layer(job.case, self.setup, job.peaks)
        if job.part == "recipes":
            recipe, way = job.recipe
            return measure_recipe(recipe, job.mechanism, way, self.setup, job.seconds)
        if job.part == "scans":
            return measure_scans(job.mode, self.setup)
        assert job.case is not None
        group = job.softmax or job.case
        if group != self._group:
            self._softmax = None
            free()
            self._group = group
        if job.part == "before":
            return measure_over_before(job.case, self.setup)
        if job.part == "profile":
            return measure_profile(job.case, self.setup)
        if job.softmax is None:
            return measure_case(job.case, self.setup)
        if self._softmax is None:
            self._softmax = Calls(group, self.setup)
        return measure_case(job.case, self.setup, self._softmax)

    def answer(self, job: Job) -> tuple[dict[str, Any] | None, str]:
        """What ``measure`` returns, or None and what was raised."""
        try:
            return self.measure(job), ""
        except Exception as error:  # of a mechanism or a compiler, anything
            return None, one_line(error)
        finally:
            free()

    def close(self) -> None:
        """Nothing to do."""


def _serve(connection: Connection, setup: Setup, compile_threads: int | None) -> None:
    """Answers jobs until one has left the device unusable, or the other side hangs up."""
    quiet()
    import_all(setup.imports)
    if compile_threads is not None:
        from torch._inductor import config

        config.compile_threads = compile_threads
    # Everything of this process runs on one stream, recordings too: what an eager backward has
    # left alive then belongs to no other.
    is_gpu = setup.device == "cuda"
    with torch.cuda.stream(recording_stream()) if is_gpu else contextlib.nullcontext():
        bench = Bench(setup)
        with contextlib.suppress(EOFError, BrokenPipeError):
            while True:
                row, reason = bench.answer(connection.recv())
                is_whole = row is not None and not row.get("missing")
                is_sound = is_whole or usable(setup)
                connection.send((row, reason, is_sound))
                if not is_sound:
                    return


def usable(setup: Setup) -> bool:
    """Whether the process can still record: a recording that failed may have left it unable to."""
    if setup.device == "cpu":
        return True
    try:
        graph = torch.cuda.CUDAGraph()
        torch.rand(1, device="cuda")
        with torch.cuda.graph(graph):
            torch.rand(1, device="cuda")
        graph.replay()
        torch.cuda.synchronize()
    except Exception:  # whatever it is
        return False
    return True


class Elsewhere:
    """``Bench`` in a process of its own, started again where a job has broken it.

    Args:
        setup: Of the bench.
        compile_threads: Of the compiler there; None for its own choice.
        serve: What runs there.
    """

    def __init__(
        self, setup: Setup, compile_threads: int | None, serve: Callable[..., None] = _serve
    ) -> None:
        self._arguments = setup, compile_threads
        self._serve = serve
        self._process: Any = None
        self._connection: Any = None

    def answer(self, job: Job, seconds: float) -> tuple[dict[str, Any] | None, str]:
        """See ``Bench.answer``; after ``seconds`` the process is ended."""
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._connection, other = context.Pipe()
            self._process = context.Process(
                target=self._serve, args=(other, *self._arguments), daemon=False
            )
            self._process.start()
            other.close()
        is_sound = False
        try:
            # A training ends in time to be cut off there, where its processes are known.
            self._connection.send(dataclasses.replace(job, seconds=max(1.0, seconds - 5)))
            if not self._connection.poll(max(0.0, seconds)):
                return None, f"{TOO_SLOW} {seconds:.0f} s"
            row, reason, is_sound = self._connection.recv()
            return row, reason
        except (EOFError, OSError):
            self._process.join(5)
            return None, f"the process died with exit code {self._process.exitcode}"
        finally:
            if not is_sound:
                self.close()

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._connection.close()
            self._process.join(0.5)
            self._process.kill()
            self._process.join()
            self._process = None
