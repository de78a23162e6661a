"""What a case of ``bench.whole_models`` is: a model or a layer, built, treated and checked."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import attnzoo
from backbones import DiT, build_backbone, compile_blocks, record
from backbones.cast_once import CastWeights, cast_once
from backbones.recorded import captured, compile_modules
from bench.cases import PIXELS_PER_TOKEN
from bench.checks import WrongStep, relative_error
from bench.isolate import one_line
from bench.machine import free, quiet
from bench.whole_models.before import Step, open_gates
from bench.whole_models.figures import LAYER_TREATMENTS, TREATMENTS, layer_name

# Images of a training step and of a forward, by tokens of one; size L takes half of them. From
# 4,096 tokens on its training step takes a quarter, which are 16,384 tokens as at 1,024: softmax's
# and another's step, eager, recorded and compiled, each recording with memory of its own, did not
# fit into 79 GiB together with half.
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
        if self.size == "tiny":
            return 2
        is_long = self.mode == "train" and self.tokens >= 4096
        return max(1, images // ((4 if is_long else 2) if self.size == "L" else 1))

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
        imports: Files or modules of a user's own mechanisms, for other processes.
    """

    device: str
    backend: str
    seconds: float = 1.5
    before: Path | None = None
    before_commit: str = ""
    imports: tuple[str, ...] = ()


class Subject(Step):
    """A model in one state of treatment, with one step of it that takes no arguments.

    Args:
        case: What to build.
        setup: Where.
        model: Its weights; None draws them anew.
    """

    def __init__(self, case: Case, setup: Setup, model: DiT | None = None) -> None:
        self.case, self.setup = case, setup
        self.model: DiT
        model = build_model(case, setup.device) if model is None else model
        super().__init__(
            model, case.mode, case.batch, 2 * case.side, attnzoo.auxiliary_loss, CastWeights
        )

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


def build_model(case: Case, device: str, **changed: Any) -> DiT:
    """The model of a case, in whose blocks every gate is open; ``changed`` is of the backbone."""
    torch.manual_seed(0)
    with torch.device(device):
        model = build_backbone(case.mechanism, case.size, "controlled", case.resolution, **changed)
        open_gates(model)
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
    model = compile_blocks(build_model(case, setup.device, depth=2), backend=setup.backend)
    subject = Subject(case, setup, model)
    is_frozen = case.mode == "forward" and setup.device == "cuda"
    with cast_once(model, subject.step) if is_frozen else contextlib.nullcontext():
        subject.step()
    return case.name


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


def dtype_of(device: str) -> str:
    """What whole models compute in on a device."""
    return "bfloat16" if device == "cuda" else "float32"


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
