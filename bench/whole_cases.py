"""What ``bench.whole_models`` measures: models, layers, launches, recipes and scans."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnzoo
from attnzoo.counting import count_macs
from attnzoo.errors import Unavailable
from attnzoo.ops.gated_scan import mean_of_scans_by_kernels
from backbones import DiT, build_backbone, compile_blocks, record
from backbones.cast_once import cast_once
from backbones.recorded import captured, compile_modules
from bench.cases import PIXELS_PER_TOKEN
from bench.checks import relative_error
from bench.isolate import one_line
from bench.peers import optional
from bench.timing import interleave, ratio
from bench.whole_figures import LAYER_TREATMENTS, TREATMENTS, layer_name
from recipes.lab.diffusion import DIFFUSION_PRESETS, Recorder, sample

# Images of a training step and of a forward, by tokens of one; size L takes half of them.
BATCHES = {256: (64, 16), 1024: (32, 16), 4096: (16, 8), 16384: (4, 2)}
LAYER_WIDTH, LAYER_TOKENS = 768, (4096, 16384)
# Norm of a difference over the norm: what bfloat16 explains where another expert is chosen.
ALLOWED = {"cuda": 1e-1, "cpu": 1e-3}


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
class Layer:
    """A training step, or a forward, of one layer and one image.

    Attributes:
        mechanism: Its attention.
        tokens: Of the image.
        mode: "forward" or "train".
        treatments: What is timed: recorded as a CUDA graph, or compiled first.
        impl: Of the mechanism's options; "" leaves it alone.
        width: Of a token.
    """

    mechanism: str
    tokens: int
    mode: str
    treatments: tuple[str, ...] = LAYER_TREATMENTS
    impl: str = ""
    width: int = LAYER_WIDTH

    @property
    def grid(self) -> tuple[int, int]:
        return (round(self.tokens**0.5),) * 2

    @property
    def name(self) -> str:
        return f"layer {layer_name(dataclasses.asdict(self))}"


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all cases of a run share.

    Attributes:
        device: "cuda" or "cpu".
        backend: Of torch.compile.
        seconds: Of the rounds of a case.
        before: An older checkout, whose recipes are timed beside ours.
        before_commit: Its commit.
    """

    device: str
    backend: str
    seconds: float = 1.5
    before: Path | None = None
    before_commit: str = ""


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

    def recorded(self) -> Callable[[], Any]:
        """The step as one launch."""
        if self.case.mode == "forward":
            side = self.images.shape[-1]
            # Weights are cast once, as in recipes/sample.py.
            replay = record(self.model, self.case.batch, side, dtype=torch.bfloat16, frozen=True)
            return lambda: replay(self.images, self.times, self.labels, return_dict=False)[0]
        return recorded(self.step)

    def compiled(self) -> Subject:
        """The same with compiled blocks."""
        model = compile_blocks(copy.deepcopy(self.model), backend=self.setup.backend)
        return Subject(self.case, self.setup, model)


class _Alone(nn.Module):
    """A layer, compiled as one: what it does in a block and after it."""

    def __init__(self, layer: attnzoo.Attention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.layer.after_block(self.layer(x, grid), grid)


class LayerSubject:
    """One layer in one state of treatment, with one step of it that takes no arguments.

    Args:
        case: What to build.
        setup: Where.
        model: Its weights; None draws them anew.
    """

    def __init__(self, case: Layer, setup: Setup, model: _Alone | None = None) -> None:
        self.case, self.setup = case, setup
        dtype = getattr(torch, dtype_of(setup.device))
        if model is None:
            torch.manual_seed(0)
            options: dict[str, Any] = {"impl": case.impl} if case.impl else {}
            layer = attnzoo.build_attention(case.mechanism, case.width, **options)
            layer.to(setup.device, dtype).train(case.mode == "train")
            if case.mode == "forward":
                layer.fuse()
            model = _Alone(layer)
        self.model, self.layer = model, model.layer
        generator = torch.Generator().manual_seed(1)
        self.x, self.cotangent = (
            torch.randn(1, case.tokens, case.width, generator=generator).to(setup.device, dtype)
            for _ in range(2)
        )
        self.step: Callable[[], Any] = self._forward
        if case.mode == "train":
            self.x.requires_grad_()
            self.step = self._train

    def _forward(self) -> Tensor:
        with torch.no_grad():
            return self.model(self.x, self.case.grid)

    def _train(self) -> None:
        for tensor in (self.x, *self.layer.parameters()):
            tensor.grad = None
        self.model(self.x, self.case.grid).backward(self.cotangent)
        self.layer.auxiliary_loss = None

    def found(self, out: Any) -> Tensor:
        """What a step has computed: the output, or all gradients."""
        if self.case.mode == "forward":
            return out.detach().float().flatten()
        tensors = self.x, *self.layer.parameters()
        return torch.cat([z.grad.float().flatten() for z in tensors if z.grad is not None])

    def recorded(self) -> Callable[[], Any]:
        """The step as one launch."""
        return recorded(self.step)

    def compiled(self) -> LayerSubject:
        """The same, compiled."""
        model = copy.deepcopy(self.model)
        compile_modules([model], backend=self.setup.backend)
        return LayerSubject(self.case, self.setup, model)


def recorded(call: Callable[[], Any]) -> Callable[[], Any]:
    """A call without arguments as a CUDA graph."""
    graph, out = captured(call)

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


def compile_ahead(case: Case | Layer, setup: Setup) -> str:
    """Compiles a layer or a block of a case, so that the compiler's cache on disk has it."""
    from torch._inductor import config

    quiet()
    config.compile_threads = 1  # the other cores have cases of their own
    if isinstance(case, Layer):
        LayerSubject(case, setup).compiled().step()
        return case.name
    model = compile_blocks(_model(case, setup.device, depth=2), backend=setup.backend)
    subject = Subject(case, setup, model)
    is_frozen = case.mode == "forward" and setup.device == "cuda"
    with cast_once(model, subject.step) if is_frozen else contextlib.nullcontext():
        subject.step()
    return case.name


class WrongStep(Exception):
    """A treatment computes something else than the eager step."""


class Calls:
    """Every treatment of a case that works here, checked; and why others do not."""

    def __init__(self, case: Case | Layer, setup: Setup) -> None:
        self.steps: dict[str, Callable[[], Any]] = {}
        self.errors: dict[str, float] = {}
        self.missing: dict[str, str] = {}
        plain: Any = Subject(case, setup) if isinstance(case, Case) else LayerSubject(case, setup)
        self.subject = plain
        self.peak_memory = _peak_of(plain.step, setup.device)
        exact = plain
        if isinstance(case, Layer) and case.impl:  # held to what is taken without
            exact = LayerSubject(dataclasses.replace(case, impl=""), setup)
        wanted = exact.found(exact.step()).clone()
        for treatment in case.treatments:
            try:
                if treatment == "eager":
                    self.steps[treatment] = plain.step
                    continue
                subject = plain if treatment == "recorded" else plain.compiled()
                step = subject.step if setup.device == "cpu" else subject.recorded()
                self._check(treatment, subject.found(step()), wanted, setup)
                self.steps[treatment] = step
            except Exception as error:  # of a compiler, anything
                self.missing[treatment] = one_line(error)
                free()

    def require_one(self) -> None:
        """Raises WrongStep where no treatment works."""
        if not self.steps:
            raise WrongStep("; ".join(f"{name}: {why}" for name, why in self.missing.items()))

    def _check(self, treatment: str, found: Tensor, wanted: Tensor, setup: Setup) -> None:
        error = relative_error(found, wanted)
        self.errors[treatment] = error
        if not error <= ALLOWED[setup.device]:
            raise WrongStep(f"differs from the eager step by {error:.1e}")


def measure_case(case: Case, setup: Setup, softmax: Calls | None = None) -> dict[str, Any]:
    """Times a case, and softmax under the same treatments in the same rounds.

    Args:
        case: The case.
        setup: Where.
        softmax: The same case of softmax; None where it is this one.
    """
    ours = Calls(case, setup)
    ours.require_one()
    contestants = dict(ours.steps)
    if softmax is not None:
        contestants |= {f"softmax {name}": step for name, step in softmax.steps.items()}
    rounds = interleave(contestants, stopwatch(setup.device), 15, setup.seconds)
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
        "seconds": {name: spread(rounds[name]) for name in ours.steps},
        "over_softmax": {name: ratio(rounds[name], rounds[f"softmax {name}"]) for name in shared},
        "over_fastest": over_fastest,
        "errors": ours.errors,
        "missing": ours.missing,
        "peak_memory": ours.peak_memory,
    }


def _fastest(rounds: dict[str, list[float]], names: Iterable[str]) -> str:
    return min(names, key=lambda name: statistics.median(rounds[name]))


def measure_layer(case: Layer, setup: Setup, peaks: dict[str, float]) -> dict[str, Any]:
    """Times one layer of one image on the device, beside the least that its work can take there.

    Args:
        case: The layer.
        setup: Where.
        peaks: GFLOP/s of products by type, and GB/s of a "copy".
    """
    ours = Calls(case, setup)
    ours.require_one()
    layer = ours.subject.layer
    macs = count_macs(layer, grid=case.grid)
    products = macs.training_step if case.mode == "train" else macs.total
    dtype = next(layer.parameters()).dtype
    # A backward reads every tensor again and moves a gradient of each.
    crossing = layer.bytes_crossed(case.grid, dtype) * (3 if case.mode == "train" else 1)
    kind = str(dtype).removeprefix("torch.")
    assert products is not None
    floors = {
        "products": 2 * products / peaks[kind] / 1e9,
        "memory": crossing / peaks["copy"] / 1e9,
    }
    bound = max(floors, key=lambda name: floors[name])
    rounds = interleave(ours.steps, stopwatch(setup.device), 9, setup.seconds / 3)
    return {
        **dataclasses.asdict(case),
        "seconds": {name: spread(taken) for name, taken in rounds.items()},
        "errors": ours.errors, "missing": ours.missing,
        "floor": floors[bound], "bound": bound, "macs": products, "bytes": crossing,
    }  # fmt: skip


def measure_launch(
    mechanism: str, setup: Setup, tokens: int = LAYER_TOKENS[0], width: int = LAYER_WIDTH
) -> dict[str, Any]:
    """Times what the host takes to launch a layer's forward, in launches of a ``torch.bmm``."""
    subject = LayerSubject(Layer(mechanism, tokens, "forward", width=width), setup)
    layer, x, grid = subject.layer, subject.x, subject.case.grid

    def step() -> None:
        with torch.no_grad():
            layer.after_block(layer(x, grid), grid)

    left = torch.randn(1, 64, 64, device=setup.device, dtype=subject.x.dtype)

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


# Of a recipe, by way: --cuda-graph and --compile.
WAYS = {"compiled": ("on", "on"), "recorded": ("on", "off"), "eager": ("off", "off")}
BEFORE = "before"  # by the recipes of an older checkout, which knew no such flags
GPUS = {"one GPU": 1, "two GPUs": 2}
# Recipes whose images per second are compared by way, E2, E3 and E11: of which mechanisms.
RECIPES = {
    ("train", ("softmax", "dydila")): tuple(WAYS),
    ("sample", ("softmax", "dydila")): tuple(WAYS),
    ("train on GPUs", ("dydila",)): tuple(GPUS),
}
_STEPS = 60  # of a training, of which the first third does not count


def rehearse_recipe(recipe: str, mechanism: str, way: str, setup: Setup) -> None:
    """Runs a recipe shortly, so that compilers' caches on disk have what it takes."""
    from torch._inductor import config

    quiet()
    config.compile_threads = 1
    measure_recipe(recipe, mechanism, way, dataclasses.replace(setup, seconds=0.0), short=True)


def measure_recipe(
    recipe: str, mechanism: str, way: str, setup: Setup, short: bool = False
) -> dict[str, Any]:
    """Images per second of a recipe as a user starts it, DiT-S in bfloat16.

    Args:
        recipe: "train", of 256 tokens; "sample", likewise, with guidance; or "train on GPUs", of
            4096 tokens and as many images for each GPU.
        mechanism: The attention.
        way: Of ``WAYS``, or of ``GPUS``; or ``BEFORE``.
        setup: Where.
        short: Too few steps for a figure.
    """
    steps = 4 if short else _STEPS
    row: dict[str, Any] = {"recipe": recipe, "mechanism": mechanism, "way": way}
    if way == BEFORE:
        row["commit"] = setup.before_commit
    if recipe == "sample" and way == BEFORE:
        found = _sampling_before(mechanism, setup, rounds=1 if short else 3)
        row["float32_images_per_second"] = found["float32"]  # without the autocast that ours have
        speed = found["bfloat16"]
    elif recipe == "sample":
        speed = _sampling(mechanism, way, setup)
    elif recipe == "train":
        graph, compiled = WAYS.get(way, ("", ""))
        options = ["--resolution", "64"]
        if way != BEFORE:
            options += ["--cuda-graph", graph, "--compile", compiled]
        folder = setup.before if way == BEFORE else None
        speed = _training(mechanism, 64, options, steps, folder=folder)
    else:
        # One alone has nothing beside it.
        if (there := torch.cuda.device_count()) < (most := max(GPUS.values())):
            raise Unavailable(
                f"needs {most} GPUs, and there {'is' if there == 1 else 'are'} {there}"
            )
        options = ["--resolution", "128", "--patch-size", "2"]
        speed = _training(mechanism, 16 * GPUS[way], options, steps, GPUS[way])
    return row | {"images_per_second": speed}


def _training(
    mechanism: str,
    batch: int,
    options: Sequence[str],
    steps: int,
    processes: int = 1,
    folder: Path | None = None,
) -> float:
    root = folder or Path(__file__).parents[1]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    never = [f"--{what}-every={2 * steps}" for what in ("checkpoint", "sample", "diagnose")]
    with tempfile.TemporaryDirectory() as out:
        command = [
            sys.executable, *(launcher if processes > 1 else ()),
            str(root / "recipes" / "train.py"), "--attn", mechanism,
            "--size", "S", "--data", "shapes", "--precision", "bf16", "--steps", str(steps),
            "--batch-size", str(batch), "--out", f"{out}/run", *never, *options,
        ]  # fmt: skip
        _started(command, root)
        lines = Path(out, "run", "log.jsonl").read_text("utf-8").splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines][steps // 3 :]
    return batch / statistics.median(seconds)


def _started(command: Sequence[str], root: Path) -> str:
    """What a program prints that imports the packages of a tree."""
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=170, env=environment)
    if ended.returncode:
        program = next(Path(word).name for word in command if word.endswith(".py"))
        said = one_line(RuntimeError(ended.stderr[-300:]))
        raise WrongStep(f"{program} ended with {ended.returncode}: {said}")
    return ended.stdout


def _sampling_before(
    mechanism: str, setup: Setup, rounds: int, **changed: Any
) -> dict[str, float]:
    assert setup.before is not None
    asked = {"mechanism": mechanism, "size": "S", "resolution": 256, "images": 16, "steps": 20,
             "rounds": rounds, "device": setup.device} | changed  # fmt: skip
    script = Path(__file__).with_name("whole_before.py")
    command = [sys.executable, str(script), str(setup.before), json.dumps(asked)]
    return json.loads(_started(command, setup.before).splitlines()[-1])


def _sampling(mechanism: str, way: str, setup: Setup, images: int = 16) -> float:
    case = Case(mechanism, "S", 256, "forward")
    model, labels, side = _model(case, setup.device), torch.arange(images), 2 * case.side
    model.requires_grad_(False)

    def draw(recorder: Recorder | None) -> Tensor:
        return sample(
            model, DIFFUSION_PRESETS["dit"], labels=labels, indices=labels, seed=0,
            num_classes=1000, shape=(4, side, side), device=setup.device, recorder=recorder,
            cfg=4.0, sampler="dpm++", steps=20, batch_size=images, precision="bf16",
        )  # fmt: skip

    wanted, recorder = draw(None), Recorder("off" if way == "eager" else "on")
    if way == "compiled":
        compile_blocks(model, backend=setup.backend)
    # Twenty steps later a rounding that sent a token to another expert is no longer small.
    if not (error := relative_error(draw(recorder), wanted)) <= 0.2:
        raise WrongStep(f"its images differ from the eager ones by {error:.1e}")
    rounds = interleave({way: lambda: draw(recorder)}, stopwatch(setup.device), 5, setup.seconds)
    return images / statistics.median(rounds[way])


def measure_scans(mode: str, setup: Setup, tokens: int = LAYER_TOKENS[0]) -> dict[str, Any]:
    """Times gated linear attention in both directions, over two calls of fla's kernel."""
    heads, key_dim, value_dim, normalizer = 12, 32, 64, 16.0  # of a width of 768
    grid = (round(tokens**0.5),) * 2
    chunk_gla = optional("chunk_gla", "fla.ops.gla")
    generator = torch.Generator(setup.device).manual_seed(0)
    query, key, gate, value, cotangent = (
        torch.randn(1, tokens, heads, width, generator=generator, device=setup.device).bfloat16()
        for width in (key_dim, key_dim, key_dim, value_dim, value_dim)
    )
    operands = query, key, value, gate
    for z in operands:
        z.requires_grad_(mode == "train")

    def ours() -> Tensor | None:
        directions = ("forward", "backward")
        return mean_of_scans_by_kernels(
            query, key, value, gate, normalizer, grid, directions, "triton"
        )

    def two_calls() -> Tensor:
        log_gate = F.logsigmoid(gate.float()) / normalizer
        there = query, key, value, log_gate
        back = [z.flip(1) for z in there]
        scale = key_dim**-0.5
        out = chunk_gla(*there, scale=scale)[0] + chunk_gla(*back, scale=scale)[0].flip(1)
        return out / 2

    def stepping(attend: Callable[[], Any]) -> Callable[[], Any]:
        def step() -> Any:
            with torch.set_grad_enabled(mode == "train"):
                out = attend()
                if mode == "forward":
                    return (out,)
                return torch.autograd.grad(out, operands, cotangent.to(out.dtype))

        return step

    contestants = {"ours": stepping(ours), "fla": stepping(two_calls)}
    for one, other in zip(contestants["ours"](), contestants["fla"](), strict=True):
        if not (error := relative_error(one.float(), other.float())) <= 0.05:
            raise WrongStep(f"differs from fla's kernel by {error:.1e}")
    replayed = {name: recorded(step) for name, step in contestants.items()}
    rounds = interleave(replayed, stopwatch(setup.device), 15, setup.seconds)
    return {"mode": mode, "tokens": tokens, "over_fla": ratio(rounds["ours"], rounds["fla"])}


def stopwatch(device: str) -> Callable[[Callable[[], Any], int], float]:
    """Gives the seconds of one call, of so many in a row; on a GPU between events.

    Without the leading call of ``timing.stopwatch_for``, which would double what a step takes that
    fills a round by itself.
    """

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


def quiet() -> None:
    """Leaves out, in a process of this module, warnings of what is known and meant."""
    for message in (
        "TensorFloat32 tensor cores", "Synchronization debug mode", "The AccumulateGrad node",
        "Online softmax is disabled", "Logical operators 'and' and 'or' are deprecated",
    ):  # fmt: skip
        warnings.filterwarnings("ignore", f".*{message}")
    logging.getLogger("torch._inductor").setLevel(logging.ERROR)


def dtype_of(device: str) -> str:
    """What whole models compute in on a device."""
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


def free() -> None:
    """Gives memory that nothing holds any more back to the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    ordered = sorted(values)
    quarter = [ordered[round(share * (len(ordered) - 1))] for share in (0.25, 0.75)]
    return {"median": statistics.median(values), "q1": quarter[0], "q3": quarter[1]}
