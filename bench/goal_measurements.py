"""How each goal of ``thresholds.toml`` is measured: one function per goal, named there.

Every figure is made in one way: one thread, process CPU time, all contestants in turn in one
process, at least 7 rounds, median of the ratios of each round, after a check against the
reference. On a GPU (functions ``gpu_...``: bfloat16, d = 768) the clock is CUDA events, over
replays of a CUDA graph where one can be recorded.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import attnzoo
from attnzoo.contract import Attention
from attnzoo.layers.depthwise_conv import DepthwiseConv
from attnzoo.ops import routed_linear as routing
from attnzoo.ops.gated_scan import gated_linear_attention
from attnzoo.ops.gated_scan import reference as gated_reference
from attnzoo.ops.power_map import power_map
from attnzoo.ops.routed_linear import routed_linear
from bench.cases import PIXELS_PER_TOKEN, Case
from bench.checks import (
    HALF_PRECISION_BUDGET,
    check_equal,
    check_gradients,
    check_layer,
    require_close,
)
from bench.fits import crossover, exponent
from bench.peak_memory import peak_memory
from bench.peers import contestants_of, optional
from bench.tables import memory
from bench.thresholds import GOALS, GoalFigure
from bench.timing import Calls, interleave, quartiles, ratio, recorded, stopwatch_for
from bench.worker import layer_options, step_of, subject

N, GRID = 4096, (64, 64)
LINEAR = ("agent", "dig", "dydila", "dydila-map", "edit", "focused", "gated", "lit", "sana")
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}

GPU_DIM, GPU_DTYPE = 768, torch.bfloat16
# Tokens along one side: 4,096 tokens, and the 16,384 of 2048 px.
SMALL, LARGE = 64, 128
# Pixels of the backbone, for the crossover; the last is the goal's.
RESOLUTIONS = (512, 1024, 1536, 2048)
# Sets of tensors that a single operator walks through: one alone would stay in the L2 cache.
SETS = 4
BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclasses.dataclass(frozen=True)
class Race:
    """Seconds of every round of calls timed in turn.

    Attributes:
        launched: With the host's part.
        device: The device's own time, of those that could be recorded.
        missing: Why others could not be recorded, or not even started.
    """

    launched: dict[str, list[float]]
    device: dict[str, list[float]]
    missing: dict[str, str]

    def over(self, upper: str, lower: str) -> tuple[dict[str, float] | None, str]:
        """The ratio of two times, of the device where both are known, and which it is in words."""
        reasons = [f"{name}: {self.missing[name]}" for name in (upper, lower)
                   if name in self.missing]  # fmt: skip
        if upper not in self.launched or lower not in self.launched:
            return None, "; ".join(reasons)
        launched = ratio(self.launched[upper], self.launched[lower])
        if upper in self.device and lower in self.device:
            on_device = ratio(self.device[upper], self.device[lower])
            return on_device, f"device time; launched {launched['median']:.3g}"
        return launched, "; ".join(["launched", *reasons])

    def median(self, name: str) -> float:
        """Of the device's time if it is known, else of the launched one."""
        return statistics.median(self.device.get(name, self.launched[name]))


class Recorder:
    """Collects the figures of one goal, and the checks that stood before them."""

    def __init__(self, goal: str, device: str) -> None:
        self.goal, self.device = goal, device
        self.stopwatch, self.timer = stopwatch_for(device, threads=1)
        self.figures: list[GoalFigure] = []
        self.rounds: list[float] = []
        self.checks: dict[str, Any] = {}

    def time(self, calls: Calls, rounds: int = 9) -> dict[str, list[float]]:
        """Seconds of every round, interleaved."""
        times = interleave(calls, self.stopwatch, rounds, seconds=40.0, least=7)
        self.rounds = self.rounds or next(iter(times.values()))
        return times

    def race(self, calls: Calls, failed: Mapping[str, str] | None = None) -> Race:
        """Launched times, and the device's own of what can be recorded as a CUDA graph.

        Args:
            calls: The contestants.
            failed: Why others could not start.
        """
        launched = interleave(calls, self.stopwatch, rounds=25, seconds=0.6, least=7)
        self.rounds = self.rounds or next(iter(launched.values()), [])
        replays, missing = recorded(calls) if self.device == "cuda" else ({}, {})
        device = interleave(replays, self.stopwatch, rounds=25, seconds=0.6, least=7)
        return Race(launched, device, {**(failed or {}), **missing})

    def check(self, mechanism: str, dim: int, dtype: str = "float32", **options: Any) -> None:
        """Compares with the reference; raises WrongResult if the fast path is wrong."""
        found = check_layer(mechanism, options, dim, dtype, self.device, 12)
        self.checks[f"{mechanism} d{dim}"] = found
        if self.device == "cuda":
            error = check_gradients(mechanism, options, dim, self.device)
            self.checks[f"{mechanism} d{dim}, training step in float32"] = error

    def check_operator(
        self, name: str, output: torch.Tensor, exact: torch.Tensor, allowed: float
    ) -> None:
        """Raises WrongResult if an operator differs from its reference in float64."""
        self.checks[name] = require_close(name, output, exact, allowed)

    def add(
        self, key: str, value: dict[str, float] | float | None, note: str = "", **names: Any
    ) -> None:
        """Gives a figure its value, or what ``ratio`` returned; ``names`` fill its braces."""
        spread = value if isinstance(value, dict) else {"median": value}
        figure = GOALS[self.goal].figures[key]
        self.figures.append(
            GoalFigure(goal=self.goal, value=spread["median"], q1=spread.get("q1"),
                       q3=spread.get("q3"), note=note,
                       **(figure | {"what": figure["what"].format(**names)}))
        )  # fmt: skip

    def compare(
        self, key: str, race: Race, upper: str, lower: str, note: str = "", **names: Any
    ) -> None:
        """Gives one contestant's time over another's, and notes which time it is."""
        value, which = race.over(upper, lower)
        self.add(key, value, "; ".join(text for text in (note, which) if text), **names)

    def tensor(self, *shape: int, dtype: Any = torch.float32, learns: bool = False) -> Any:
        """Random numbers."""
        return torch.randn(*shape, device=self.device, dtype=dtype).requires_grad_(learns)


def measure(goal: str, device: str) -> Recorder:
    """Measures one goal."""
    recorder = Recorder(goal, device)
    globals()[GOALS[goal].measurement](recorder)
    return recorder


# ------------------------------------------------------------------------------ what they share


def projectors(dim: int) -> int:
    """n_P of the paper's model of this width."""
    return {384: 3, 512: 5, 768: 7}[dim]


def dydila_options(dim: int) -> dict[str, Any]:
    """The paper's options at this width."""
    count = projectors(dim)
    return {
        "n_projectors": count, "n_kernel_factors": 3 * count, "n_differential_factors": 3 * count,
    }  # fmt: skip


def layer_call(
    recorder: Recorder, layer: Attention, n: int = N, mode: str = "forward"
) -> Callable[[], Any]:
    """One forward or training step of a layer on n tokens of one square image."""
    layer = layer.to(recorder.device).train(mode == "train")
    if mode == "forward":
        layer.fuse()
    side = math.isqrt(n)
    x = recorder.tensor(1, n, layer.dim, learns=mode == "train")
    return step_of(layer, (x, (side, n // side)), mode)


def linear_call(
    recorder: Recorder, dim: int, mode: str = "forward", dtype: Any = torch.float32
) -> Callable[[], Any]:
    """nn.Linear(d, d) on N tokens: the unit "linear"."""
    layer = torch.nn.Linear(dim, dim, bias=False).to(recorder.device, dtype)
    return step_of(layer, (recorder.tensor(N, dim, dtype=dtype, learns=mode == "train"),), mode)


class Function(torch.nn.Module):
    """A function and the tensors whose gradients it needs."""

    def __init__(self, function: Callable[..., Any], **parameters: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        self.held = torch.nn.ParameterDict(parameters)

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs, **dict(self.held.items()))


# ------------------------------------------------------------------------- operators, on a CPU


def routed_against_linear(recorder: Recorder) -> None:
    for dim in (384, 768):
        for mode, dtype in (
            ("forward", torch.float32), ("train", torch.float32), ("forward", torch.bfloat16),
        ):  # fmt: skip
            calls: Calls = {"linear": linear_call(recorder, dim, mode, dtype)}
            for kind in ("uniform", "skewed"):
                index = _index(kind, projectors(dim)).to(recorder.device)
                calls[kind] = _routed_call(recorder, dim, mode, dtype, index, routed_linear)
            times, short = recorder.time(calls), SHORT[dtype]
            speed = ratio(times["linear"], times["uniform"])
            recorder.add(f"speed_{short}", speed, mode=mode, dim=dim)
            skewed = ratio(times["skewed"], times["uniform"])
            recorder.add("skewed", skewed, mode=mode, dim=dim, dtype=short)


def _index(kind: str, experts: int) -> torch.Tensor:
    if kind == "uniform":
        return torch.randint(experts, (N,))
    shares = 0.5 ** torch.arange(1.0, experts + 1)
    return torch.multinomial(shares, N, replacement=True)


def _routed_call(
    recorder: Recorder, dim: int, mode: str, dtype: Any, index: torch.Tensor, project: Any
) -> Callable[[], Any]:
    weight = recorder.tensor(projectors(dim), dim, dim, dtype=dtype) * dim**-0.5
    x = recorder.tensor(N, dim, dtype=dtype, learns=mode == "train")
    if project is routed_linear:
        with torch.no_grad():
            few, some = x[:256], index[:256]
            exact = routed_linear(few.double(), weight.double(), some, impl="reference")
            recorder.check_operator(f"routed_linear d{dim} {dtype}",
                                    routed_linear(few, weight, some), exact,
                                    5 * torch.finfo(dtype).eps)  # fmt: skip
    module = Function(lambda x, weight: project(x, weight, index), weight=weight)
    return step_of(module, (x,), mode)


def routed_against_all(recorder: Recorder) -> None:
    for dim in (384, 768):
        index = _index("uniform", projectors(dim)).to(recorder.device)
        times = recorder.time({
            name: _routed_call(recorder, dim, "forward", torch.float32, index, project)
            for name, project in (("all", _all_projectors), ("routed", routed_linear))
        })  # fmt: skip
        recorder.add(f"d{dim}", ratio(times["all"], times["routed"]))


def _all_projectors(x: torch.Tensor, weight: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """One product with all weights side by side, then a gather: the fastest dense form."""
    everything = (x @ weight.transpose(0, 1).flatten(1)).unflatten(1, (weight.shape[0], -1))
    chosen = index[:, None, None].expand(-1, 1, weight.shape[2])
    return everything.gather(1, chosen).squeeze(1)


def power_map_against_linear(recorder: Recorder) -> None:
    dim = 384
    x = F.relu(recorder.tensor(1, N, dim))
    gamma = torch.full((1, N, 1), 3.0, device=recorder.device)
    exact = power_map(x.double(), gamma.double(), impl="reference")
    recorder.check_operator("power_map", power_map(x, gamma), exact, 2e-6)
    for mode in ("forward", "train"):
        calls: Calls = {"linear": linear_call(recorder, dim, mode)}
        for name, function in (("map", power_map), ("pow", _autograd_pow)):
            module = Function(lambda z, g, f=function: f(z, g), g=gamma.clone())
            calls[name] = step_of(module, (x.clone().requires_grad_(mode == "train"),), mode)
        times = recorder.time(calls)
        recorder.add("time", ratio(times["map"], times["linear"]), mode=mode)
        if mode == "train":
            recorder.add("pow", ratio(times["pow"], times["map"]))
    scales = (10.0**power for power in range(-20, 16))
    recorder.add("scales", float(sum(not _is_finite(scale, x) for scale in scales)))


def _autograd_pow(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """The formula as it stands, differentiated by autograd."""
    power = (x + 1e-6).pow(gamma)
    return power / power.norm(dim=-1, keepdim=True) * x.norm(dim=-1, keepdim=True)


def _is_finite(scale: float, x: torch.Tensor) -> bool:
    z = (scale * x[:, :64]).requires_grad_()
    gamma = torch.full((1, 64, 1), 3.0, device=x.device, requires_grad=True)
    out = power_map(z, gamma)
    gradients = torch.autograd.grad(out.sum(), (z, gamma))
    return all(bool(value.isfinite().all()) for value in (out, *gradients))


def gated_against_recurrence(recorder: Recorder) -> None:
    recurrence, scan = gated_reference.gated_linear_attention, gated_linear_attention
    operands = [recorder.tensor(1, 6, 4096, 32) for _ in range(3)]
    mild = F.logsigmoid(recorder.tensor(1, 6, 4096, 32)) / 16
    # The recurrence in float64 on gates from 0 to -100 per token shows the error.
    steep = -100 * torch.rand(1, 6, 256, 32, device=recorder.device) ** 8
    short = [*(z[:, :, :256] for z in operands), steep]
    exact = recurrence(*(z.double() for z in short))
    calls: Calls = {"recurrence": step_of(recurrence, (*operands, mild), "forward")}
    for impl in ("torch", "auto"):
        run = functools.partial(scan, impl=impl)
        error = require_close(impl, run(*short), exact, math.inf)
        recorder.add("error", error, impl=impl)
        calls[impl] = step_of(run, (*operands, mild), "forward")
    times = recorder.time(calls, rounds=7)
    for impl in ("torch", "auto"):
        recorder.add(impl, ratio(times["recurrence"], times[impl]))
    inputs = tuple(z[:, :, :1024].repeat(2, 1, 1, 1).requires_grad_() for z in (*operands, mild))
    calls = {"recurrence": step_of(recurrence, inputs, "train"),
             "auto": step_of(scan, inputs, "train")}  # fmt: skip
    times = recorder.time(calls, rounds=7)
    recorder.add("train", ratio(times["recurrence"], times["auto"]))


def compressed_against_softmax(recorder: Recorder) -> None:
    dim = 384
    recorder.check("compressed", dim, layers="all")
    compressed: Any = attnzoo.build_attention("compressed", dim, layers="all")
    softmax = attnzoo.build_attention("softmax", dim)
    times = recorder.time({"softmax": layer_call(recorder, softmax),
                           "compressed": layer_call(recorder, compressed)})  # fmt: skip
    recorder.add("speed", ratio(times["softmax"], times["compressed"]))
    inputs = (recorder.tensor(1, N, dim), GRID)
    conv = DepthwiseConv(dim, "3x3").to(recorder.device).eval()
    parts = {"3x3 depthwise convolution": conv, "compression": compressed.compress}
    calls = {name: step_of(part, inputs, "forward") for name, part in parts.items()}
    times = recorder.time({"linear": linear_call(recorder, dim), **calls}, rounds=15)
    for name in parts:
        recorder.add("part", ratio(times[name], times["linear"]), part=name)


# ---------------------------------------------------------------------------- layers, on a CPU


def dydila_against_sana(recorder: Recorder) -> None:
    for dim in (384, 768):
        options = dydila_options(dim)
        recorder.check("dydila", dim, **options)
        recorder.check("sana", dim)
        for mode in ("forward", "train"):
            dydila = attnzoo.build_attention("dydila", dim, **options)
            sana = attnzoo.build_attention("sana", dim)
            times = recorder.time({"dydila": layer_call(recorder, dydila, mode=mode),
                                   "sana": layer_call(recorder, sana, mode=mode)})  # fmt: skip
            over = ratio(times["dydila"], times["sana"])
            recorder.add("time", over, mode=mode, dim=dim)
            macs = dydila.macs(GRID) / sana.macs(GRID)
            per_mac = {key: value / macs for key, value in over.items()}
            recorder.add("per_mac", per_mac, f"ratio of MACs {macs:.2f}", mode=mode, dim=dim)


def token_against_map(recorder: Recorder) -> None:
    for dim in (384, 768):
        calls: Calls = {}
        for name in ("dydila", "dydila-map"):
            recorder.check(name, dim, **dydila_options(dim))
            layer = attnzoo.build_attention(name, dim, **dydila_options(dim))
            calls[name] = layer_call(recorder, layer)
        times = recorder.time(calls)
        recorder.add("speed", ratio(times["dydila-map"], times["dydila"]), dim=dim)


def exponents(recorder: Recorder) -> None:
    sizes = (1024, 4096, 16384)

    def slope(values: Iterable[float]) -> float:
        return exponent(list(zip(sizes, values, strict=True))) or math.nan

    for name in LINEAR:
        recorder.check(name, 384)
        for mode in ("forward", "train"):
            calls = {str(n): layer_call(recorder, attnzoo.build_attention(name, 384), n, mode)
                     for n in sizes}  # fmt: skip
            times = recorder.time(calls, rounds=7)
            slopes = [slope(rounds) for rounds in zip(*times.values(), strict=True)]
            low, middle, high = quartiles(slopes)
            spread = {"median": middle, "q1": low, "q3": high}
            recorder.add("time", spread, mechanism=name, mode=mode)
            if mode == "forward":
                peaks = [peak_memory(call, recorder.device).bytes for call in calls.values()]
                recorder.add("memory", slope(peaks), mechanism=name)


def peak_of_dydila(recorder: Recorder) -> None:
    recorder.check("dydila", 384)
    for mode in ("forward", "train"):
        call = layer_call(recorder, attnzoo.build_attention("dydila", 384), mode=mode)
        call()
        peak = peak_memory(call, recorder.device)
        recorder.add(mode, peak.bytes / (N * 384 * 4), peak.method)


def streaming(recorder: Recorder) -> None:
    n = 16384
    recorder.check("dydila", 384, stream=32)
    layers = {"one-shot": attnzoo.build_attention("dydila", 384),
              "streaming": attnzoo.build_attention("dydila", 384, stream=2048),
              "sana": attnzoo.build_attention("sana", 384)}  # fmt: skip
    calls = {name: layer_call(recorder, layer, n) for name, layer in layers.items()}
    peaks = {name: peak_memory(call, recorder.device).bytes for name, call in calls.items()}
    recorder.add("peak", peaks["streaming"] / peaks["sana"],
                 f"{peaks['streaming'] / (n * 384 * 4):.2f} tensors of n x d")  # fmt: skip
    del calls["sana"]
    times = recorder.time(calls)
    recorder.add("time", ratio(times["streaming"], times["one-shot"]))


def dydila_against_softmax(recorder: Recorder) -> None:
    recorder.check("dydila", 384)
    shares: list[tuple[float, float]] = []
    for n, rounds in ((576, 15), (1024, 15), (1600, 11), (4096, 9), (16384, 7)):
        calls = {name: layer_call(recorder, attnzoo.build_attention(name, 384), n)
                 for name in ("softmax", "dydila")}  # fmt: skip
        times = recorder.time(calls, rounds)
        faster = ratio(times["softmax"], times["dydila"])
        shares.append((n, 1 / faster["median"]))
        if n >= 4096:
            recorder.add(f"n{n}", faster)
    cross = crossover(shares, [(n, 1.0) for n, _ in shares])
    least = shares[0][0] if shares[0][1] <= 1 else None
    recorder.add("crossover", cross[0] if cross else least,
                 "interpolated between the sizes measured")  # fmt: skip


def sana_against_diffusers(recorder: Recorder) -> None:
    name = "diffusers Sana processor"
    for dim in (384, 768):
        recorder.check("sana", dim)
        for dtype, n in ((torch.float32, 1024), (torch.float32, N), (torch.bfloat16, N)):
            layer = attnzoo.build_attention("sana", dim).to(recorder.device, dtype).eval()
            ours, peers, missing = contestants_of(layer)
            if name not in peers:
                raise ImportError(missing[name])
            inputs = (recorder.tensor(1, n, dim, dtype=dtype), (math.isqrt(n),) * 2)
            calls = {"ours": step_of(ours, inputs, "forward"),
                     "theirs": step_of(peers[name], inputs, "forward")}  # fmt: skip
            times = recorder.time(calls, rounds=11)
            over = ratio(times["ours"], times["theirs"])
            recorder.add(SHORT[dtype], over, n=n, dim=dim)


def recompilations(recorder: Recorder) -> None:
    from torch._dynamo.utils import counters

    recorder.check("dydila", 96)
    for mode in ("forward", "train"):
        torch._dynamo.reset()
        layer = attnzoo.build_attention("dydila", 96).to(recorder.device).train(mode == "train")
        run = torch.compile(layer, fullgraph=True)
        counters.clear()
        for seed in range(4):  # other tokens are routed otherwise
            torch.manual_seed(seed)
            x = (10**seed * recorder.tensor(1, 64, 96)).requires_grad_(mode == "train")
            step = functools.partial(run, x, (8, 8))
            if mode == "train":
                step().sum().backward()
            else:
                with torch.no_grad():
                    step()
        breaks = sum(counters["graph_break"].values())
        again = max(0, counters["stats"]["unique_graphs"] - 1)
        recorder.add("breaks", float(breaks + again),
                     "fullgraph=True, one grid, 4 routings", mode=mode)  # fmt: skip


def softmax_against_bare(recorder: Recorder) -> None:
    for dim in (384, 768):
        recorder.check("softmax", dim)
        layer = attnzoo.build_attention("softmax", dim).to(recorder.device).eval()
        ours, peers, _ = contestants_of(layer)
        inputs = (recorder.tensor(1, 1024, dim), (32, 32))
        calls = {"ours": step_of(ours, inputs, "forward"),
                 "bare": step_of(peers["bare SDPA"], inputs, "forward")}  # fmt: skip
        times = recorder.time(calls, rounds=21)
        recorder.add("speed", ratio(times["bare"], times["ours"]), dim=dim)


# --------------------------------------------------------------------------- layers, on a GPU


def _case(recorder: Recorder, side: int, mode: str, kind: Any = "layer") -> Case:
    return Case(kind=kind, resolution=side * PIXELS_PER_TOKEN, width=GPU_DIM, dtype="bfloat16",
                mode=mode, device=recorder.device)  # fmt: skip


def _step(case: Case, mechanism: str, compiled: bool = False, **options: Any) -> Callable[[], Any]:
    return subject(case, mechanism, options, GPU_DTYPE, compiled)[1]


def _started(builds: dict[str, Callable[[], Callable[[], Any]]]) -> tuple[Calls, dict[str, str]]:
    """The steps that could be made and called once, and why others could not."""
    calls: dict[str, Callable[[], Any]] = {}
    failed: dict[str, str] = {}
    for name, build in builds.items():
        try:
            step = build()
            step()
        except Exception as error:  # of a compiler, anything
            failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:120]
        else:
            calls[name] = step
    return calls, failed


def gpu_dydila_against_sana(recorder: Recorder) -> None:
    options = dydila_options(GPU_DIM)
    recorder.check("dydila", GPU_DIM, "bfloat16", **options)
    recorder.check("sana", GPU_DIM, "bfloat16")
    for mode in ("forward", "train"):
        torch._dynamo.reset()  # it refuses to compile one forward for many layers
        case = _case(recorder, SMALL, mode)
        sana = functools.partial(_step, case, "sana")
        ours = functools.partial(_step, case, "dydila", **options)
        race = recorder.race(*_started({
            "Sana": sana,
            "Sana, compiled": functools.partial(sana, compiled=True),
            "eager": functools.partial(ours, impl="torch"),
            "compiled": functools.partial(ours, impl="torch", compiled=True),
            "fused": ours,
            "fused, compiled": functools.partial(ours, compiled=True),
        }))  # fmt: skip
        for key, mine, theirs in (
            ("eager", "eager", "Sana"),
            ("compiled", "compiled", "Sana, compiled"),
            ("fused", "fused", "Sana"),
            ("fused", "fused", "Sana, compiled"),
            ("fused", "fused, compiled", "Sana, compiled"),
        ):
            recorder.compare(key, race, mine, theirs, ours=mine, theirs=theirs, n=SMALL**2,
                             mode=mode)  # fmt: skip


def gpu_sana_against_peers(recorder: Recorder) -> None:
    recorder.check("sana", GPU_DIM, "bfloat16")
    for side in (SMALL, LARGE):
        for mode in ("forward", "train"):
            names = {"n": side**2, "mode": mode}
            layer = attnzoo.build_attention("sana", GPU_DIM).to(recorder.device, GPU_DTYPE)
            ours, peers, _ = contestants_of(layer.train(mode == "train"))
            x = recorder.tensor(1, side**2, GPU_DIM, dtype=GPU_DTYPE, learns=mode == "train")
            # A whole map in memory is the slowest by far, and for many tokens does not fit.
            models = {n: p for n, p in peers.items() if side == SMALL or not n.endswith(" map")}
            if not models:
                recorder.add("speed", None, "no peer is installed", **names)
                continue
            with torch.no_grad():
                small = (x[:, : 4 * side].detach(), (4, side))
                for name, peer in models.items():
                    recorder.checks[name] = check_equal(name, peer(*small), ours(*small))
            calls = {n: step_of(model, (x, (side, side)), mode) for n, model in models.items()}
            race = recorder.race({"ours": step_of(ours, (x, (side, side)), mode)} | calls)
            best = min(calls, key=race.median)
            recorder.compare("speed", race, best, "ours", best, **names)


def gpu_peak_of_training(recorder: Recorder) -> None:
    options, peaks = {"dydila": dydila_options(GPU_DIM), "sana": {}}, {}
    for name, chosen in options.items():
        recorder.check(name, GPU_DIM, "bfloat16", **chosen)
    for name, chosen in options.items():
        call = _step(_case(recorder, LARGE, "train"), name, **chosen)
        call()
        peaks[name] = peak_memory(call, recorder.device).bytes
    sizes = " and ".join(memory(peak) for peak in peaks.values())
    recorder.add("peak", peaks["dydila"] / peaks["sana"], sizes, n=LARGE**2)


def gpu_backbone_against_softmax(recorder: Recorder) -> None:
    for name in ("dydila", "softmax"):
        case = Case(kind="backbone", mechanism=name, resolution=RESOLUTIONS[0], width=GPU_DIM)
        recorder.check(name, GPU_DIM, "bfloat16", **layer_options(case))
    best = ""
    for compiled, resolutions in ((False, RESOLUTIONS), (True, RESOLUTIONS[1::2])):
        ours, theirs = [], []
        for resolution in resolutions:
            torch._dynamo.reset()
            case = _case(recorder, resolution // PIXELS_PER_TOKEN, "forward", "backbone")
            # Compiling takes long: only with the backend that was fastest without.
            softmax = _softmax_steps(case, compiled, best if compiled else "")
            race = recorder.race({"dydila": _step(case, "dydila", compiled), **softmax})
            best = min(softmax, key=race.median)
            ours.append((case.tokens, race.median("dydila")))
            theirs.append((case.tokens, race.median(best)))
        cross, is_faster = crossover(ours, theirs), ours[0][1] < theirs[0][1]
        px = cross[0] ** 0.5 * PIXELS_PER_TOKEN if cross else resolutions[0]
        recorder.compare(
            "speed", race, best, "dydila",
            f"{'faster' if cross or is_faster else 'slower'} from {px:.0f} px on; {best} of "
            f"{', '.join(softmax)}",
            how=", blocks compiled" if compiled else "", px=resolutions[-1],
        )  # fmt: skip


def _softmax_steps(case: Case, compiled: bool, only: str) -> dict[str, Callable[[], Any]]:
    """The backends that run here, or one, on one set of weights where they can share it."""
    shared, steps = _step(case, "softmax", compiled), {}

    def by(backend: SDPBackend) -> None:
        with sdpa_kernel(backend):
            shared()

    for name in [only] if only else [*BACKENDS, "flash", "xformers"]:
        try:
            if name in BACKENDS:
                step = functools.partial(by, BACKENDS[name])
            else:
                step = _step(case, "softmax", compiled, impl=name)
            step()
        except (ImportError, NotImplementedError, RuntimeError):
            continue
        steps[name] = step
    if not steps:
        raise RuntimeError("no backend of softmax attention runs on this device")
    return steps


# ------------------------------------------------------------------------ operators, on a GPU


def _rotated(build: Callable[[], Callable[[], Any]]) -> Callable[[], Any]:
    """One call runs all of ``SETS`` sets of tensors, so that none is in the cache when read."""
    steps = [build() for _ in range(SETS)]

    def run() -> None:
        for step in steps:
            step()

    return run


def gpu_routed_against_linear(recorder: Recorder) -> None:
    tokens, experts = LARGE**2, projectors(GPU_DIM)
    names: dict[str, Any] = {"n": tokens, "projectors": experts}
    allowed = HALF_PRECISION_BUDGET["bfloat16"] / 5
    few = slice(0, 512)

    def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        weight = recorder.tensor(experts, GPU_DIM, GPU_DIM, dtype=GPU_DTYPE) * GPU_DIM**-0.5
        x = recorder.tensor(tokens, GPU_DIM, dtype=GPU_DTYPE)
        return x, weight, torch.randint(experts, (tokens,), device=recorder.device)

    def pair() -> tuple[torch.Tensor, ...]:
        (x, first, one), (_, second, other) = tensors(), tensors()
        return x, first, second, torch.cat([one, other + experts]).int()

    def linears(count: int) -> Callable[[], Any]:
        layers = [torch.nn.Linear(GPU_DIM, GPU_DIM, bias=False, dtype=GPU_DTYPE)
                  .to(recorder.device) for _ in range(count)]  # fmt: skip
        return step_of(lambda x: [layer(x) for layer in layers][-1], tensors()[:1], "forward")

    x, weight, index = tensors()
    exact = routed_linear(x[few].double(), weight.double(), index[few], impl="reference")
    found = routed_linear(x[few], weight, index[few])
    recorder.check_operator("routed_linear", found, exact, allowed)
    race = recorder.race({
        "linear": _rotated(lambda: linears(1)),
        "routed": _rotated(lambda: step_of(routed_linear, tensors(), "forward")),
    })  # fmt: skip
    recorder.compare("one", race, "linear", "routed", **names)

    x, first, second, index = pair()
    choices = index.view(2, -1)[:, few]
    both = routing.grouped_linear(x[few], first, second, choices.flatten())
    for weight, found, choice in zip((first, second), both, choices.long(), strict=True):
        exact = routed_linear(x[few].double(), weight.double(), choice % experts, impl="reference")
        recorder.check_operator("grouped_linear", found, exact, allowed)
    race = recorder.race({
        "linears": _rotated(lambda: linears(2)),
        "pair": _rotated(lambda: step_of(routing.grouped_linear, pair(), "forward")),
    })  # fmt: skip
    recorder.compare("pair", race, "linears", "pair", **names)


def gpu_power_map_against_copy(recorder: Recorder) -> None:
    tokens = LARGE**2

    def tensors() -> tuple[torch.Tensor, torch.Tensor]:
        z = recorder.tensor(1, tokens, GPU_DIM, dtype=GPU_DTYPE)
        return z, torch.full((1, tokens, 1), 3.0, device=recorder.device)

    z, gamma = (x[:, :512] for x in tensors())
    exact = power_map(z.double(), gamma.double(), impl="reference")
    recorder.check_operator("power_map", power_map(z, gamma), exact,
                            HALF_PRECISION_BUDGET["bfloat16"] / 5)  # fmt: skip

    def copying() -> Callable[[], Any]:
        source = tensors()[0]
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    eager = functools.partial(power_map, impl="torch")
    race = recorder.race({
        "copy": _rotated(copying),
        "fused": _rotated(lambda: step_of(power_map, tensors(), "forward")),
        "eager": _rotated(lambda: step_of(eager, tensors(), "forward")),
    })  # fmt: skip
    recorder.compare("copy", race, "copy", "fused", n=tokens)
    recorder.compare("eager", race, "eager", "fused", n=tokens)


def gpu_gated_against_fla(recorder: Recorder) -> None:
    chunk_gla = optional("chunk_gla", "fla.ops.gla")

    def theirs(*operands: torch.Tensor) -> torch.Tensor:
        return chunk_gla(*operands, scale=1.0)[0]

    def swapped(run: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *operands: run(*(z.transpose(1, 2) for z in operands)).transpose(1, 2)

    def tensors(tokens: int) -> list[torch.Tensor]:
        # Heads and widths of the layer "gated" at d = 768, in the order that the layer has.
        query, key, gate = (recorder.tensor(1, tokens, 12, 32) for _ in range(3))
        value = recorder.tensor(1, tokens, 12, 64)
        return [*(z.to(GPU_DTYPE) for z in (query, key, value)), F.logsigmoid(gate) / 16]

    contestants: dict[str, Callable[..., torch.Tensor]] = {"theirs": theirs}
    for impl in ("fla", "torch"):
        contestants[impl] = swapped(functools.partial(gated_linear_attention, impl=impl))
    operands = tensors(256)
    exact = swapped(gated_reference.gated_linear_attention)(*(z.double() for z in operands))
    for name, function in contestants.items():
        recorder.check_operator(name, function(*operands), exact,
                                HALF_PRECISION_BUDGET["bfloat16"] / 5)  # fmt: skip
    for tokens in (SMALL**2, LARGE**2):
        for mode in ("forward", "train"):
            inputs = tuple(z.requires_grad_(mode == "train") for z in tensors(tokens))
            race = recorder.race({n: step_of(f, inputs, mode) for n, f in contestants.items()})
            for impl in ("fla", "torch"):
                recorder.compare(impl, race, impl, "theirs", n=tokens, mode=mode)
