"""``python -m bench.whole_models --out whole.json``: what a user runs, timed whole.

Training steps and sampling steps of whole models, each mechanism in turn with softmax under the
same treatment; what launching one layer costs the host; and how far one layer is from its floor.
``--table whole.json`` prints what a file holds, with the figures of ``thresholds.toml``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import gc
import itertools
import json
import logging
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnzoo
from attnzoo.contract import nearest
from attnzoo.counting import count_macs
from backbones import DiT, build_backbone, compile_blocks, record, refuse_waits
from backbones.pattern import names_in
from bench import machine
from bench.cases import PIXELS_PER_TOKEN
from bench.checks import SIBLING_SIDE, check_layer, relative_error
from bench.timing import interleave, ratio
from bench.whole_figures import MODES, TREATMENTS, read_whole, tables
from recipes.lab.console import DONE, UserError, run_script, whole
from recipes.lab.files import require_writable, write_json

# Images of a training step and of a forward, by tokens of one; size L takes half of them.
BATCHES = {256: (64, 16), 1024: (32, 16), 4096: (16, 8), 16384: (4, 2)}
# Those that goals name come first.
FIRST = ("softmax", "sana", "dydila", "focused")
LARGE = FIRST[:3]
DEFAULT_TOKENS = {"S": (256, 1024, 4096), "B": (256, 1024, 4096), "L": (1024, 4096, 16384)}
LAYER_WIDTH, LAYER_TOKENS = 768, (4096, 16384)
# Norm of a difference over the norm: what bfloat16 explains where another expert is chosen.
ALLOWED = {"cuda": 1e-1, "cpu": 1e-3}
# Softmax's crossovers lie between the first three of each size.
_ORDER = [("S", 4096), ("S", 256), ("S", 1024), ("L", 4096), ("L", 16384), ("L", 1024)]
_AHEAD = 0.4  # of the time, at most, goes to compiling in other processes
PARTS = ("cases", "layers", "launches")
TOO_SLOW = "took longer than"


@dataclasses.dataclass(frozen=True)
class Case:
    """A training step, or a forward, of one whole model.

    Attributes:
        mechanism: Its attention.
        size: Of the backbone, in the controlled protocol.
        tokens: Of one image.
        mode: "forward" or "train".
        treatments: What is timed, of ``TREATMENTS``: launched eagerly; recorded as a CUDA graph;
            or its blocks compiled first, and then recorded where there is a GPU.
    """

    mechanism: str
    size: str
    tokens: int
    mode: str
    treatments: tuple[str, ...] = TREATMENTS

    @property
    def side(self) -> int:
        """Tokens along one side."""
        return round(self.tokens**0.5)

    @property
    def resolution(self) -> int:
        """Pixels along one side, of a latent model."""
        return self.side * PIXELS_PER_TOKEN

    @property
    def batch(self) -> int:
        """Images of a step."""
        known = [BATCHES[n] for n in sorted(BATCHES) if n <= self.tokens] or [BATCHES[256]]
        images = known[-1][self.mode == "forward"]
        return max(1, images // (2 if self.size == "L" else 1)) if self.size != "tiny" else 2

    @property
    def name(self) -> str:
        return f"{self.mechanism} {self.size} {self.resolution}px {self.mode}"


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all cases of a run share.

    Attributes:
        device: "cuda" or "cpu".
        backend: Of torch.compile.
        seconds: Of the rounds of a case.
    """

    device: str
    backend: str
    seconds: float = 1.5


class Subject:
    """A model in one state of treatment, with one step of it that takes no arguments.

    Args:
        case: What to build.
        setup: Where.
        model: Its weights; None draws them anew.
    """

    def __init__(self, case: Case, setup: Setup, model: DiT | None = None) -> None:
        self.case, self.setup = case, setup
        self.model = _model(case, setup.device) if model is None else model
        generator = torch.Generator().manual_seed(1)
        shape = (case.batch, 4, 2 * case.side, 2 * case.side)
        self.images, self.noise = (
            torch.randn(shape, generator=generator).to(setup.device) for _ in range(2)
        )
        self.times = torch.linspace(1, 999, case.batch).to(setup.device)
        self.labels = (torch.arange(case.batch) % 1000).to(setup.device)
        self.step: Callable[[], Any] = self._forward
        if case.mode == "train":
            self._prepare_training()
            self.step = self._train

    def _autocast(self) -> torch.autocast:
        is_gpu = self.setup.device == "cuda"
        return torch.autocast(self.setup.device, torch.bfloat16, is_gpu, cache_enabled=False)

    def _forward(self) -> Tensor:
        with torch.no_grad(), self._autocast():
            return self.model(self.images, self.times, self.labels, return_dict=False)[0]

    def _prepare_training(self) -> None:
        is_gpu = self.setup.device == "cuda"
        self.parameters = list(self.model.parameters())
        # A rate that moves no weight visibly: every round sees the same model.
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=1e-9, weight_decay=0.0, fused=True, capturable=is_gpu
        )
        self.average = [parameter.detach().clone() for parameter in self.parameters]

    def _train(self) -> Tensor:
        self.optimizer.zero_grad()
        with self._autocast():
            out = self.model(self.images, self.times, self.labels, return_dict=False)[0]
        loss = F.mse_loss(out.chunk(2, dim=1)[0].float(), self.noise)
        auxiliary = attnzoo.auxiliary_loss(self.model)
        (loss if auxiliary is None else loss + auxiliary).backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        lerp: Any = torch._foreach_lerp_  # pyright: ignore[reportPrivateImportUsage]
        with torch.no_grad():  # else the averages hold every step's graph
            lerp(self.average, self.parameters, 1e-4)
        return loss.detach()

    def found(self, out: Any) -> Tensor:
        """What a step has computed: the output, or all gradients."""
        if self.case.mode == "forward":
            return out.detach().float().flatten()
        grads = [p.grad for p in self.parameters if p.grad is not None]
        return torch.cat([grad.flatten() for grad in grads])

    def recorded(self, pool: Any) -> Callable[[], Any]:
        """The step as one launch."""
        if self.case.mode == "forward":
            side = self.images.shape[-1]
            replay = record(self.model, self.case.batch, side, dtype=torch.bfloat16)
            return lambda: replay(self.images, self.times, self.labels, return_dict=False)[0]
        return recorded(self.step, pool)


def recorded(call: Callable[[], Any], pool: Any = None) -> Callable[[], Any]:
    """A call without arguments as a CUDA graph, in memory shared with others of the same pool."""
    # Nodes of an earlier backward that still live would run on the stream of that step.
    gc.collect()
    before = torch.cuda.current_stream()
    stream = torch.cuda.Stream() if before == torch.cuda.default_stream() else before
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        call()
        with refuse_waits():
            call()
        gc.collect()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            out = call()
    before.wait_stream(stream)

    # A graph reads its inputs where they lay, so that whoever replays it must hold their owner.
    def replay(_owner: Callable[[], Any] = call) -> Any:
        graph.replay()
        return out

    return replay


def _model(case: Case, device: str, **changed: Any) -> DiT:
    torch.manual_seed(0)
    with torch.device(device):
        model = build_backbone(case.mechanism, case.size, "controlled", case.resolution, **changed)
        with torch.no_grad():  # zeroed gates would make every block the identity
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.02)
    model.train(case.mode == "train")
    if case.mode == "forward":
        model.fuse()  # as whoever only samples does
    return model


def compile_ahead(case: Case, setup: Setup) -> str:
    """Compiles a block of a case, so that the compiler's cache on disk has it."""
    from torch._inductor import config

    _quiet()
    config.compile_threads = 1  # the other cores have cases of their own
    model = compile_blocks(_model(case, setup.device, depth=2), backend=setup.backend)
    Subject(case, setup, model).step()
    return case.name


class WrongStep(Exception):
    """A treatment computes something else than the eager step."""


class Calls:
    """Every treatment of a case that works here, checked; and why others do not."""

    def __init__(self, case: Case, setup: Setup, pool: Any) -> None:
        self.steps: dict[str, Callable[[], Any]] = {}
        self.errors: dict[str, float] = {}
        self.missing: dict[str, str] = {}
        plain = Subject(case, setup)
        self.peak_memory = _peak_of(plain.step, setup.device)
        wanted = plain.found(plain.step()).clone()
        compiled: Subject | None = None
        for treatment in case.treatments:
            try:
                if treatment == "eager":
                    step: Callable[[], Any] = plain.step
                elif treatment == "recorded":
                    step = plain.recorded(pool)
                    self._check(treatment, plain.found(step()), wanted, setup)
                else:
                    model = compile_blocks(copy.deepcopy(plain.model), backend=setup.backend)
                    compiled = Subject(case, setup, model)
                    compiled.step()
                    step = compiled.step if setup.device == "cpu" else compiled.recorded(pool)
                    self._check(treatment, compiled.found(step()), wanted, setup)
                self.steps[treatment] = step
            except Exception as error:  # of a compiler, anything
                self.missing[treatment] = f"{type(error).__name__}: {_one_line(error)}"
                _free()

    def _check(self, treatment: str, found: Tensor, wanted: Tensor, setup: Setup) -> None:
        error = relative_error(found, wanted)
        self.errors[treatment] = error
        if not error <= ALLOWED[setup.device]:
            raise WrongStep(f"differs from the eager step by {error:.1e}")


def measure_case(
    case: Case, setup: Setup, pool: Any = None, softmax: Calls | None = None
) -> dict[str, Any]:
    """Times a case, and softmax under the same treatments in the same rounds.

    Args:
        case: The case.
        setup: Where.
        pool: Memory of recordings.
        softmax: The same case of softmax; None where it is this one.
    """
    ours = Calls(case, setup, pool)
    if not ours.steps:
        raise WrongStep("; ".join(f"{name}: {why}" for name, why in ours.missing.items()))
    contestants = dict(ours.steps)
    if softmax is not None:
        contestants |= {f"softmax {name}": step for name, step in softmax.steps.items()}
    rounds = interleave(contestants, _stopwatch(setup.device), 15, setup.seconds)
    shared = [name for name in ours.steps if f"softmax {name}" in rounds]
    best = _fastest(rounds, ours.steps)
    over_fastest = None
    if softmax is not None and softmax.steps:
        theirs = _fastest(rounds, [f"softmax {name}" for name in softmax.steps])
        over_fastest = {"ours": best, "softmax": theirs.removeprefix("softmax "),
                        **ratio(rounds[best], rounds[theirs])}  # fmt: skip
    return {
        **dataclasses.asdict(case),
        "resolution": case.resolution,
        "batch": case.batch,
        "seconds": {name: _spread(rounds[name]) for name in ours.steps},
        "over_softmax": {name: ratio(rounds[name], rounds[f"softmax {name}"]) for name in shared},
        "over_fastest": over_fastest,
        "errors": ours.errors,
        "missing": ours.missing,
        "peak_memory": ours.peak_memory,
    }


def _fastest(rounds: dict[str, list[float]], names: Iterable[str]) -> str:
    return min(names, key=lambda name: statistics.median(rounds[name]))


# --- one layer ----------------------------------------------------------------------------------


def measure_layer(
    mechanism: str, tokens: int, mode: str, setup: Setup, peaks: dict[str, float],
    width: int = LAYER_WIDTH,
) -> dict[str, Any]:  # fmt: skip
    """Times one layer of one image on the device, over the least that its work can take there."""
    layer, step = _layer_step(mechanism, tokens, mode, setup, width)
    grid = (round(tokens**0.5),) * 2
    macs = count_macs(layer, grid=grid)
    products = macs.training_step if mode == "train" else macs.total
    dtype = next(layer.parameters()).dtype
    # A backward reads every tensor again and moves a gradient of each.
    crossing = layer.bytes_crossed(grid, dtype) * (3 if mode == "train" else 1)
    kind = str(dtype).removeprefix("torch.")
    assert products is not None
    floors = {
        "products": 2 * products / peaks[kind] / 1e9,
        "memory": crossing / peaks["copy"] / 1e9,
    }
    bound = max(floors, key=lambda name: floors[name])
    step()
    replay = recorded(step) if setup.device == "cuda" else step
    rounds = interleave({"layer": replay}, _stopwatch(setup.device), 9, setup.seconds / 3)
    return {
        "mechanism": mechanism, "tokens": tokens, "width": width, "mode": mode,
        "seconds": statistics.median(rounds["layer"]), "floor": floors[bound], "bound": bound,
        "macs": products, "bytes": crossing,
    }  # fmt: skip


def measure_launch(
    mechanism: str, setup: Setup, tokens: int = LAYER_TOKENS[0], width: int = LAYER_WIDTH
) -> dict[str, Any]:
    """Times what the host takes to launch a layer's forward, in launches of a ``torch.bmm``."""
    layer, step = _layer_step(mechanism, tokens, "forward", setup, width)
    left = torch.randn(1, 64, 64, device=setup.device, dtype=next(layer.parameters()).dtype)

    def product() -> None:
        torch.bmm(left, left)

    for _ in range(3):
        step()
        product()
    rounds: dict[str, list[float]] = {"layer": [], "bmm": []}
    for _ in range(15):
        for name, call, repeats in (("layer", step, 4), ("bmm", product, 50)):
            _wait(setup.device)
            start = time.perf_counter()
            for _ in range(repeats):  # few enough for the queue to take without waiting
                call()
            rounds[name].append((time.perf_counter() - start) / repeats)
    _wait(setup.device)
    return {
        "mechanism": mechanism, "tokens": tokens, "width": width,
        "seconds": statistics.median(rounds["layer"]),
        "bmm_seconds": statistics.median(rounds["bmm"]),
        "launches": ratio(rounds["layer"], rounds["bmm"]),
    }  # fmt: skip


def _layer_step(
    mechanism: str, tokens: int, mode: str, setup: Setup, width: int
) -> tuple[attnzoo.Attention, Callable[[], Any]]:
    torch.manual_seed(0)
    dtype = getattr(torch, _dtype(setup.device))
    layer = attnzoo.build_attention(mechanism, width).to(setup.device, dtype)
    layer.train(mode == "train")
    grid = (round(tokens**0.5),) * 2
    x = torch.randn(1, tokens, width, device=setup.device, dtype=dtype)
    if mode == "forward":
        layer.fuse()

        def forward() -> None:
            with torch.no_grad():
                layer.after_block(layer(x, grid), grid)

        return layer, forward
    x.requires_grad_()
    cotangent = torch.randn_like(x)

    def train() -> None:
        for tensor in (x, *layer.parameters()):
            tensor.grad = None
        layer.after_block(layer(x, grid), grid).backward(cotangent)
        layer.auxiliary_loss = None

    return layer, train


# --- the whole run ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Job:
    """One thing to measure.

    Attributes:
        part: Of the report: "cases", "layers" or "launches"; or "peaks" or "check".
        mechanism: Whose.
        case: Of a whole model.
        softmax: The same case of softmax, where ``case`` is of another mechanism.
        tokens: Of a layer.
        mode: Of a layer.
        peaks: Of the machine, for a layer's floor.
    """

    part: str
    mechanism: str = ""
    case: Case | None = None
    softmax: Case | None = None
    tokens: int = 0
    mode: str = ""
    peaks: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        if self.case is not None:
            return self.case.name
        if self.part == "layers":
            return f"layer {self.mechanism} n={self.tokens} {self.mode}"
        return {"launches": f"launch {self.mechanism}", "check": f"check of {self.mechanism}"}.get(
            self.part, self.part
        )


class Bench:
    """Measures jobs one after the other in this process, and keeps softmax for the next one."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self._group: Case | None = None  # of softmax, which the others are compared with
        self._softmax: Calls | None = None
        self._pool: Any = None

    def measure(self, job: Job) -> dict[str, Any]:
        """What the report has of a job."""
        device = self.setup.device
        if job.part == "check":
            for name in names_in(job.mechanism):
                check_layer(name, {}, 384, _dtype(device), device, SIBLING_SIDE)
            return {}
        if job.part == "peaks":
            return machine.measure_peaks(device, (_dtype(device),), torch.get_num_threads())
        if job.part == "launches":
            return measure_launch(job.mechanism, self.setup)
        if job.part == "layers":
            return measure_layer(job.mechanism, job.tokens, job.mode, self.setup, job.peaks)
        assert job.case is not None
        group = job.softmax or job.case
        if group != self._group:
            self._softmax = None
            _free()
            self._group, self._pool = group, None
            if device == "cuda":
                self._pool = torch.cuda.graph_pool_handle()
        if job.softmax is None:
            return measure_case(job.case, self.setup, self._pool)
        if self._softmax is None:
            self._softmax = Calls(group, self.setup, self._pool)
        return measure_case(job.case, self.setup, self._pool, self._softmax)

    def answer(self, job: Job) -> tuple[dict[str, Any] | None, str]:
        """What ``measure`` returns, or None and what was raised."""
        try:
            return self.measure(job), ""
        except Exception as error:  # of a mechanism or a compiler, anything
            return None, f"{type(error).__name__}: {_one_line(error)}"
        finally:
            _free()

    def close(self) -> None:
        """Nothing to do."""


def _serve(connection: Connection, setup: Setup, compile_threads: int | None) -> None:
    """Answers jobs until one has left the device unusable, or the other side hangs up."""
    _quiet()
    if compile_threads is not None:
        from torch._inductor import config

        config.compile_threads = compile_threads
    # Everything of this process runs on one stream, recordings too: what an eager backward has
    # left alive then belongs to no other.
    is_gpu = setup.device == "cuda"
    with torch.cuda.stream(torch.cuda.Stream()) if is_gpu else contextlib.nullcontext():
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
            self._connection.send(job)
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


class Run:
    """Measures in the order of importance, and writes what it has after every case.

    Args:
        options: Of the command line.
        report: Of an earlier run, which this one continues.
    """

    def __init__(self, options: argparse.Namespace, report: dict[str, Any] | None = None) -> None:
        self.options = options
        self.end = time.monotonic() + options.seconds
        self.setup = Setup(options.device, options.backend, options.round_seconds)
        self._wrong: dict[str, str | None] = {}  # by mechanism, why its results cannot be right
        self.report: dict[str, Any] = {
            "datetime": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": machine.commit(),
            **machine.describe(options.device, torch.get_num_threads()),
            "device": options.device,
            "cases": [],
            "layers": [],
            "launches": [],
            "missed": [],
        }
        if report is not None:
            self._continue(report)
        # On a CPU nothing that fails breaks what follows.
        self._bench: Bench | Elsewhere = Bench(self.setup)
        if options.device == "cuda":
            self._bench = Elsewhere(self.setup, 1 if options.processes > 1 else None)

    def _continue(self, report: dict[str, Any]) -> None:
        for what in ("device_name", "versions", "commit"):
            if report[what] != self.report[what]:
                raise UserError(
                    f"{self.options.out} has {what} {report[what]!r}, and this run "
                    f"{self.report[what]!r}; write into another --out, or run without --resume"
                )
        self.report |= {"missed": [], **{name: report[name] for name in (*PARTS, "datetime")}}
        if "peaks" in report:
            self.report["peaks"] = report["peaks"]

    def measure(self) -> dict[str, Any]:
        """Measures until the time is spent."""
        options = self.options
        cases = planned(options.mechanisms, options.models, options.device, options.large)
        complete = {
            _name_of_row(row) for row in self.report["cases"]
            if set(row["treatments"]) <= row["seconds"].keys()
        }  # fmt: skip
        begun = {_name_of_row(row) for row in self.report["cases"]}
        cases = [case for case in cases if case.name not in complete]
        # What an earlier run could not do in full comes after what it has not begun.
        cases.sort(key=lambda case: case.name in begun)
        late = self._compile_ahead(cases)
        try:
            if not options.no_layers and "peaks" not in self.report:
                peaks, reason = self._answer(Job("peaks"), 60.0)
                if peaks is None:
                    raise UserError(f"the peaks of this device could not be measured: {reason}")
                self.report["peaks"] = peaks
            # The layers' figures come after the first size, and before what may take all the time.
            last = sum(
                case.size == next(iter(options.models)) and case.mechanism in FIRST
                and case.name not in begun for case in cases
            )  # fmt: skip
            for case in cases[:last]:
                self._case(case, late)
            if not options.no_layers:
                self._layers()
            for case in cases[last:]:
                self._case(case, late)
        finally:
            self._bench.close()
        write_json(self.options.out, _rounded(self.report), indent=None)
        return self.report

    def _case(self, case: Case, late: dict[str, str]) -> None:
        def without(case: Case) -> Case:
            kept = tuple(name for name in case.treatments if name != "compiled")
            return dataclasses.replace(case, treatments=kept) if case.name in late else case

        softmax = dataclasses.replace(case, mechanism="softmax")
        theirs = None if case.mechanism == "softmax" else without(softmax)
        job = Job("cases", case.mechanism, without(case), theirs)
        row, reason = self._measured(job)
        if row is None and reason.startswith(TOO_SLOW) and case.name not in late:
            late[case.name] = reason
            row, reason = self._measured(dataclasses.replace(job, case=without(case)))
        if row is None:
            self._miss(case.name, reason)
            return
        row["treatments"] = case.treatments
        if case.name in late:
            row["missing"]["compiled"] = late[case.name]
        self._keep("cases", row, _name_of_row)

    def _layers(self) -> None:
        peaks = self.report["peaks"]
        names = [part for name in self.options.mechanisms for part in names_in(name)]
        for name in dict.fromkeys(names):
            jobs = [Job("launches", name)]
            jobs += [Job("layers", name, tokens=tokens, mode=mode, peaks=peaks)
                     for tokens, mode in itertools.product(LAYER_TOKENS, MODES)]  # fmt: skip
            for job in jobs:
                if job.name in {_name_of_layer(row) for row in self.report[job.part]}:
                    continue
                row, reason = self._measured(job)
                if row is None:
                    self._miss(job.name, reason)
                else:
                    self._keep(job.part, row, _name_of_layer)

    def _keep(
        self, part: str, row: dict[str, Any], name_of: Callable[[dict[str, Any]], str]
    ) -> None:
        kept = [old for old in self.report[part] if name_of(old) != name_of(row)]
        self.report[part] = [*kept, row]
        write_json(self.options.out, _rounded(self.report), indent=None)

    def _measured(self, job: Job) -> tuple[dict[str, Any] | None, str]:
        start = time.monotonic()
        if start >= self.end:
            return None, "the time was spent; raise --seconds, or go on with --resume"
        if reason := self._why_wrong(job.mechanism):
            return None, reason
        row, reason = self._answer(job, self.options.patience)
        if row is not None:
            lacking = f" without {', '.join(row['missing'])}" if row.get("missing") else ""
            print(f"{job.name}: {time.monotonic() - start:.1f} s{lacking}", flush=True)
        return row, reason

    def _answer(self, job: Job, seconds: float) -> tuple[dict[str, Any] | None, str]:
        if isinstance(self._bench, Bench):
            return self._bench.answer(job)
        return self._bench.answer(job, max(1.0, min(seconds, self.end - time.monotonic())))

    def _why_wrong(self, mechanism: str) -> str | None:
        if mechanism not in self._wrong:
            row, reason = self._answer(Job("check", mechanism), self.options.patience)
            self._wrong[mechanism] = None if row is not None else reason
        return self._wrong[mechanism]

    def _miss(self, what: str, reason: str) -> None:
        print(f"{what}: {reason}", flush=True)
        self.report["missed"].append({"what": what, "reason": reason})
        write_json(self.options.out, _rounded(self.report), indent=None)

    def _compile_ahead(self, cases: Sequence[Case]) -> dict[str, str]:
        """Compiles in other processes; by name of a case, why it is measured without."""
        skipped = {case.name: "left out by --skip-compiled" for case in cases
                   if case.mechanism in self.options.skip_compiled}  # fmt: skip
        cases = [case for case in cases if case.name not in skipped]
        processes = min(self.options.processes, len(cases))
        if processes < 2:
            return skipped
        # Those that are compared with softmax need softmax's from the compiler's cache, too.
        start, late = time.monotonic(), dict(skipped)
        context = multiprocessing.get_context("spawn")
        pool = context.Pool(processes, _quiet)
        finished = False
        try:
            found = [pool.apply_async(compile_ahead, (case, self.setup)) for case in cases]
            for case, result in zip(cases, found, strict=True):
                left = start + _AHEAD * self.options.seconds - time.monotonic()
                try:
                    result.get(max(0.0, left))
                except multiprocessing.TimeoutError:
                    late[case.name] = "was not compiled in time; go on with --resume"
                except Exception as error:  # of a compiler, anything
                    late[case.name] = f"{type(error).__name__}: {_one_line(error)}"
            finished = all(result.ready() for result in found)
        finally:
            pool.close() if finished else pool.terminate()
            pool.join()
        done = len(cases) + len(skipped) - len(late)
        taken = time.monotonic() - start
        print(f"{done} of {len(cases)} compiled ahead, {taken:.0f} s", flush=True)
        return late


def planned(
    mechanisms: Sequence[str],
    models: Mapping[str, Sequence[int]],
    device: str,
    large: Sequence[str] | None = None,
) -> list[Case]:
    """Every case, the most important first: those of the goals, then the other mechanisms.

    Args:
        mechanisms: Names.
        models: Tokens of one image, by size of the backbone.
        device: "cuda" or "cpu".
        large: Mechanisms that have more than the first size; None is all.
    """
    treatments = TREATMENTS if device == "cuda" else ("eager", "compiled")
    first = [name for name in FIRST if name in mechanisms]
    others = [name for name in mechanisms if name not in first]
    wanted = [(size, count) for size, counts in models.items() for count in counts]
    wanted.sort(key=lambda pair: _ORDER.index(pair) if pair in _ORDER else len(_ORDER))
    return [
        Case(name, size, count, mode, treatments)
        for names in (first, others)
        for size, count in wanted
        for mode in MODES
        for name in names
        if large is None or name in large or size == next(iter(models))
    ]


# --- small things -------------------------------------------------------------------------------


def _stopwatch(device: str) -> Callable[[Callable[[], Any], int], float]:
    def watch(call: Callable[[], Any], repeats: int) -> float:
        if device == "cpu":
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            return (time.perf_counter() - start) / repeats
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats

    return watch


def _quiet() -> None:
    """Leaves out, in a process of this module, warnings of what is known and meant."""
    for message in (
        "TensorFloat32 tensor cores", "Synchronization debug mode", "The AccumulateGrad node",
        "Online softmax is disabled", "Logical operators 'and' and 'or' are deprecated",
    ):  # fmt: skip
        warnings.filterwarnings("ignore", f".*{message}")
    logging.getLogger("torch._inductor").setLevel(logging.ERROR)


def _name_of_row(row: dict[str, Any]) -> str:
    return Case(row["mechanism"], row["size"], row["tokens"], row["mode"]).name


def _name_of_layer(row: dict[str, Any]) -> str:
    part = "layers" if "mode" in row else "launches"
    return Job(part, row["mechanism"], tokens=row["tokens"], mode=row.get("mode", "")).name


def _dtype(device: str) -> str:
    return "bfloat16" if device == "cuda" else "float32"


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _peak_of(call: Callable[[], Any], device: str) -> int:
    call()
    if device == "cpu":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _spread(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    quarter = [ordered[round(share * (len(ordered) - 1))] for share in (0.25, 0.75)]
    return {"median": statistics.median(values), "q1": quarter[0], "q3": quarter[1]}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.whole_models", description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON to write, after every case")
    parser.add_argument("--table", type=Path, help="JSON to print instead of measuring")
    parser.add_argument("--mechanisms", default="", help="names, by default all of the zoo")
    parser.add_argument(
        "--tokens", default=None, help="of one image (default: those that the goals need)"
    )
    parser.add_argument(
        "--sizes", default="S,L", help="of the backbone: tiny, S, B, L; without --mechanisms "
        f"only {', '.join(LARGE)} have more than the first",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=480.0, help="for everything")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None)
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument(
        "--processes", type=whole(1), default=None,
        help="that compile ahead, before anything is timed (default: all cores but two)",
    )  # fmt: skip
    parser.add_argument(
        "--resume", action="store_true", help="go on with what the JSON of --out lacks"
    )
    parser.add_argument(
        "--skip-compiled", default="", help="mechanisms measured without compiled blocks"
    )
    parser.add_argument(
        "--patience", type=float, default=60.0, help="seconds of one case, on a GPU"
    )
    parser.add_argument(
        "--round-seconds", type=float, default=0.6, help="of the rounds of one case"
    )
    parser.add_argument(
        "--no-layers", action="store_true", help="whole models only, as always on a CPU"
    )
    options = parser.parse_args(arguments)
    if (options.out is None) == (options.table is None):
        raise UserError("name either --out, a JSON to write, or --table, a JSON to print")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.no_layers |= options.device == "cpu"
    if options.processes is None:
        options.processes = max(1, (os.cpu_count() or 2) - 2) if options.device == "cuda" else 1
    options.sizes, known = _listed(options.sizes), attnzoo.list_attention()
    options.large = None if options.mechanisms else LARGE
    options.mechanisms = _listed(options.mechanisms) or known
    options.skip_compiled = _listed(options.skip_compiled)
    named = options.mechanisms + options.skip_compiled
    for name in (part for pattern in named for part in names_in(pattern)):
        if name not in known:
            raise UserError(f"unknown mechanism {name!r}{nearest(name, known)} Choose of "
                            f"{', '.join(known)}")  # fmt: skip
    for size in options.sizes:
        if size not in ("tiny", "S", "B", "L"):
            raise UserError(f"unknown size {size!r}; choose of tiny, S, B, L")
    if options.tokens is None:
        options.models = {size: DEFAULT_TOKENS.get(size, (256,)) for size in options.sizes}
        return options
    counts = _listed(options.tokens)
    if not all(
        count.isdigit() and round(int(count) ** 0.5) ** 2 == int(count) for count in counts
    ):
        raise UserError(f"--tokens {options.tokens} must be squares, such as 256,1024,4096,16384")
    options.models = {size: [int(count) for count in counts] for size in options.sizes}
    return options


def main(arguments: list[str]) -> int:
    """Measures, or prints what was measured."""
    options = _options(arguments)
    if options.table:
        print(tables(read_whole(options.table)))
        return DONE
    require_writable(options.out)
    _quiet()
    earlier = read_whole(options.out) if options.resume and options.out.exists() else None
    report = Run(options, earlier).measure()
    print(tables(json.loads(json.dumps(_rounded(report)))))
    return DONE


if __name__ == "__main__":
    run_script(main)
