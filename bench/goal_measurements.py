"""How the goals of ``thresholds.toml`` are measured: contests, their contestants, and the rest.

Every figure is made in one way: one thread, process CPU time, all contestants in turn in one
process, at least 7 rounds, median of the ratios of each round, after a check against the
reference. On a GPU the clock is CUDA events, over replays of a CUDA graph where one can be
recorded.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import attnzoo
from attnzoo.command.fits import crossover
from attnzoo.command.units import memory
from attnzoo.layers.depthwise_conv import DepthwiseConv
from attnzoo.ops.gated_scan import gated_linear_attention, mean_of_scans_by_kernels
from attnzoo.ops.power_map import power_map
from attnzoo.ops.routed_linear import grouped_linear, routed_linear
from bench.cases import PIXELS_PER_TOKEN, Case, is_quadratic
from bench.checks import WrongResult, check_gradients, check_layer, require_close
from bench.fits import exponent
from bench.isolate import one_line
from bench.peak_memory import peak_memory
from bench.peers import optional
from bench.thresholds import GOALS, GoalFigure
from bench.timing import Calls, Race, race, spread
from bench.worker import build, layer_options, peer_steps, step_of, subject

Step = Callable[[], Any]
MODES = ("forward", "train")
SHORT = {"float32": "fp32", "bfloat16": "bf16"}
# n_P of the paper's model of a width.
PROJECTORS = {384: 3, 512: 5, 768: 7}
# Relative error of an operator that sums in float32.
ALLOWED = {"float32": 2e-6, "bfloat16": 2e-2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contestant:
    """One contestant of a goal, at one point of its sweep."""

    build: str = "layer"  # the function of ``BUILDERS`` that makes its step
    mechanism: str = ""  # of a layer, a backbone or a peer
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    is_papers: bool = False  # whether to take the paper's number of projectors at this width, too
    kind: Any = "layer"  # or "backbone"
    impl: str = "auto"  # of an operator, or the name of a peer
    dim: int = 384
    side: int = 64  # tokens along one side
    mode: str = "forward"
    dtype: str = "float32"
    compiled: bool = False
    backend: str = ""  # of SDPA, a name of ``SDPBackend``
    sets: int = 1  # of tensors that one call walks through: one alone stays in a GPU's L2 cache
    skewed: bool = False  # whether each expert has half of the tokens of the one before
    # Of a scan: images, heads, width of values, and whether heads come after tokens in memory.
    batch: int = 1
    heads: int = 6
    value_dim: int = 32
    by_token: bool = False

    @property
    def tokens(self) -> int:
        """Of one image."""
        return self.side**2

    @property
    def case(self) -> Case:
        """The case of ``bench.worker`` that a layer or a backbone is, on a CPU."""
        options = dict(self.options)
        if self.is_papers:
            n = PROJECTORS[self.dim]
            options |= {"n_projectors": n, "n_kernel_factors": 3 * n}
            options |= {"n_differential_factors": 3 * n}
        return Case(
            kind=self.kind, mechanism=self.mechanism, options=tuple(sorted(options.items())),
            resolution=self.side * PIXELS_PER_TOKEN, width=self.dim, dtype=self.dtype,
            mode=self.mode, compiled=self.compiled,
        )  # fmt: skip


class Recorder:
    """Collects the figures of one goal, and the checks that stood before them.

    ``sizes`` are numbers to take instead of those of the goal's sweep, for tests.
    """

    def __init__(self, goal: str, device: str, sizes: Mapping[int, int] | None = None) -> None:
        self.goal, self.device, self.sizes = goal, device, dict(sizes or {})
        self.figures: list[GoalFigure] = []
        self.rounds: list[float] = []
        self.checks: dict[str, Any] = {}
        # (tokens, the lower time over the upper) by figure, over the sweep, compiled or not.
        self.curves: dict[tuple[str, bool], list[tuple[float, float]]] = {}

    def sweep(self) -> Iterator[dict[str, Any]]:
        """The points of the goal."""
        for table in GOALS[self.goal].sweep:
            lists = [v if isinstance(v, list) else [v] for v in table.values()]
            for values in itertools.product(*lists):
                yield self.resized(dict(zip(table, values, strict=True)))

    def resized(self, point: dict[str, Any]) -> dict[str, Any]:
        """The same with a test's sizes."""
        return {k: self.sizes.get(v, v) if type(v) is int else v for k, v in point.items()}

    def contest(self, point: dict[str, Any]) -> None:
        """Times the contestants at one point, and gives the figures that belong there."""
        goal, at = GOALS[self.goal], Contestant(**point)

        def belongs(entry: dict[str, Any]) -> bool:
            where = self.resized(entry.get("where", {}))
            return all(getattr(at, name) == value for name, value in where.items())

        contestants = {}
        for name, entry in goal.contestants.items():
            if belongs(entry):
                own = self.resized({k: v for k, v in entry.items() if k != "where"})
                contestants[name] = Contestant(**{**point, **own})
        if any(contestant.compiled for contestant in contestants.values()):
            torch._dynamo.reset()  # it refuses to compile one forward for many layers
        calls, failed = self.started(contestants)
        figures = {key: f for key, f in goal.figures.items() if "over" in f}
        is_timed = any(f.get("of") != "memory" for f in figures.values())
        times = self.race(calls if is_timed else {}, failed)
        for key, figure in figures.items():
            upper, lower = (times.fastest(names) for names in figure["over"])
            value, note = times.over(upper, lower)
            curve = self.curves.setdefault((key, at.compiled), [])
            if value is not None:
                curve.append((at.tokens, 1 / value["median"]))
            if not belongs(figure):
                continue
            if not isinstance(figure["over"][0], str):
                note = f"{upper}; {note}"
            match figure.get("of"):
                case "memory" if upper in calls and lower in calls:
                    peaks = [peak_memory(calls[name], self.device)["peak_memory"]
                             for name in (upper, lower)]  # fmt: skip
                    value, note = peaks[0] / peaks[1], " and ".join(map(memory, peaks))
                case "time per MAC" if value is not None:
                    macs = [build(contestants[n].case).macs((at.side,) * 2)
                            for n in (upper, lower)]  # fmt: skip
                    note = f"ratio of MACs {macs[0] / macs[1]:.2f}"
                    value = {name: share * macs[1] / macs[0] for name, share in value.items()}
                case "crossover":
                    value, note = start_of(curve), "interpolated between the sizes measured"
                case "time from" if start := start_of(curve):
                    note = f"faster from {start**0.5 * PIXELS_PER_TOKEN:.0f} px on; {note}"
            names = {"upper": upper, "lower": lower, "mode": at.mode, "dim": at.dim,
                     "n": at.tokens, "px": at.side * PIXELS_PER_TOKEN}  # fmt: skip
            self.add(key, value, note, dtype=SHORT[at.dtype], **names)

    def started(self, contestants: Mapping[str, Contestant]) -> tuple[Calls, dict[str, str]]:
        """The steps that could be made and called once, and why others could not."""
        calls: dict[str, Step] = {}
        failed: dict[str, str] = {}
        for name, contestant in contestants.items():
            try:
                build = BUILDERS[contestant.build]
                steps = [build(self, contestant) for _ in range(contestant.sets)]
                step = steps[0] if len(steps) == 1 else functools.partial(_all, steps)
                step()
            except WrongResult:
                raise
            except Exception as error:  # of a compiler or another's package, anything
                failed[name] = one_line(error)[:120]
            else:
                calls[name] = step
        return calls, failed

    def race(self, calls: Calls, failed: Mapping[str, str] | None = None) -> Race:
        """Times calls in turn; ``failed`` says why others could not start."""
        is_gpu = self.device == "cuda"
        rounds, seconds = (25, 0.6) if is_gpu else (GOALS[self.goal].rounds, 40.0)
        found = race(calls, self.device, 1, failed or {}, rounds=rounds, seconds=seconds, least=7)
        self.rounds = self.rounds or next(iter(found.launched.values()), [])
        return found

    def add(
        self, key: str, value: dict[str, float] | float | None, note: str = "", **names: Any
    ) -> None:
        """Gives a figure its value, or what ``spread`` returned; ``names`` fill its braces."""
        found = value if isinstance(value, dict) else {"median": value}
        figure = GOALS[self.goal].figures[key]
        own = {name: figure[name] for name in ("better", "minimum", "target")}
        self.figures.append(
            GoalFigure(goal=self.goal, what=figure["what"].format(**names), note=note,
                       value=found["median"], q1=found.get("q1"), q3=found.get("q3"), **own)
        )  # fmt: skip

    def check(self, case: Case) -> None:
        """Compares a case's layer with its reference, unless it was compared before."""
        if case.check_key in self.checks:
            return
        name, options = case.mechanism, layer_options(case)
        if "stream" in options:  # the small sibling has several of these blocks
            options["stream"] = 32
        self.checks[case.check_key] = check_layer(name, options, case.width, case.dtype,
                                                  self.device, case.side)  # fmt: skip
        if self.device == "cuda":
            error = check_gradients(name, options, case.width, self.device)
            self.checks[f"{case.check_key}, training step in float32"] = error

    def check_operator(
        self, name: str, found: Tensor, exact: Tensor, allowed: float | None = None
    ) -> None:
        """Raises WrongResult if an operator differs from its reference in float64."""
        limit = ALLOWED[str(found.dtype).removeprefix("torch.")] if allowed is None else allowed
        self.checks[name] = require_close(name, found, exact, limit)

    def tensor(self, c: Contestant, *shape: int, std: float = 1.0) -> Tensor:
        """Random numbers, which a training step learns."""
        x = std * torch.randn(*shape, device=self.device)
        return x.to(getattr(torch, c.dtype)).requires_grad_(c.mode == "train")


def measure(goal: str, device: str, sizes: Mapping[int, int] | None = None) -> Recorder:
    """Measures one goal; see ``Recorder``."""
    recorder = Recorder(goal, device, sizes)
    if GOALS[goal].contestants:
        for point in recorder.sweep():
            recorder.contest(point)
    if GOALS[goal].also:
        {f.__name__: f for f in (scales, scan_errors, exponents, recompilations)}[
            GOALS[goal].also
        ](recorder)
    return recorder


def start_of(curve: list[tuple[float, float]]) -> float | None:
    """Tokens from which a ratio of times, by tokens, is below 1; None if it never is."""
    shares = sorted(curve)
    found = crossover(shares, [(n, 1.0) for n, _ in shares])
    return found[0] if found else next((n for n, share in shares[:1] if share <= 1), None)


def _all(steps: list[Step]) -> None:
    for step in steps:
        step()


def _layer(goal: Recorder, c: Contestant) -> Step:
    case = dataclasses.replace(c.case, device=goal.device)
    goal.check(case)
    step = subject(case)[1]
    if not c.backend:
        return step

    def by_backend() -> None:
        with sdpa_kernel(getattr(SDPBackend, c.backend)):
            step()

    return by_backend


def _peer(goal: Recorder, c: Contestant) -> Step:
    case = dataclasses.replace(c.case, device=goal.device)
    steps, found = peer_steps(case, subject(case)[0], [c.impl])
    goal.checks |= found["peer_errors"]
    return steps[c.impl]


def _linear(goal: Recorder, c: Contestant) -> Step:
    """nn.Linear(d, d), the unit "linear"."""
    layer = torch.nn.Linear(c.dim, c.dim, bias=False).to(goal.device, getattr(torch, c.dtype))
    return step_of(layer, (goal.tensor(c, c.tokens, c.dim),), c.mode)


def _routed_operands(goal: Recorder, c: Contestant) -> tuple[Tensor, Tensor, Tensor]:
    experts = PROJECTORS[c.dim]
    shares = (0.5 if c.skewed else 1.0) ** torch.arange(1.0, experts + 1)
    index = torch.multinomial(shares, c.tokens, replacement=True).to(goal.device)
    weight = goal.tensor(c, experts, c.dim, c.dim, std=c.dim**-0.5)
    return goal.tensor(c, c.tokens, c.dim), weight, index


def _routed(goal: Recorder, c: Contestant) -> Step:
    project = _all_projectors if c.impl == "all" else routed_linear
    x, weight, index = _routed_operands(goal, c)
    with torch.no_grad():
        few, some = x[:256], index[:256]
        exact = routed_linear(few.double(), weight.double(), some, impl="reference")
        goal.check_operator(f"routed projection, {c.impl}", project(few, weight, some), exact)
    return step_of(lambda x, weight: project(x, weight, index), (x, weight), c.mode)


def _all_projectors(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """One product with all weights side by side, then a gather: the fastest dense form."""
    everything = (x @ weight.transpose(0, 1).flatten(1)).unflatten(1, (weight.shape[0], -1))
    chosen = index[:, None, None].expand(-1, 1, weight.shape[2])
    return everything.gather(1, chosen).squeeze(1)


def _grouped(goal: Recorder, c: Contestant) -> Step:
    """DyDiLA's two routed projections, of one input."""
    (x, first, one), (_, second, other) = (_routed_operands(goal, c) for _ in range(2))
    few, experts = x[:512], len(first)
    choices = torch.stack([one, other + experts]).int()
    found = grouped_linear(few, first, second, choices[:, :512].flatten())
    for weight, out, index in zip((first, second), found, (one, other), strict=True):
        exact = routed_linear(few.double(), weight.double(), index[:512], impl="reference")
        goal.check_operator("grouped projections", out, exact)
    return step_of(grouped_linear, (x, first, second, choices.flatten()), c.mode)


def _power(goal: Recorder, c: Contestant) -> Step:
    function = _autograd_pow if c.impl == "pow" else functools.partial(power_map, impl=c.impl)  # pyright: ignore
    x = goal.tensor(c, 1, c.tokens, c.dim)
    gamma = torch.full((1, c.tokens, 1), 3.0, device=goal.device)
    with torch.no_grad():
        few = x[:, :512].relu(), gamma[:, :512]
        exact = power_map(*(z.double() for z in few), impl="reference")
        goal.check_operator(f"power map, {c.impl}", function(*few), exact)
    x = x.detach().relu().requires_grad_(x.requires_grad)
    return step_of(function, (x, gamma.requires_grad_(x.requires_grad)), c.mode)


def _autograd_pow(x: Tensor, gamma: Tensor) -> Tensor:
    """The formula as it stands, differentiated by autograd."""
    power = (x + 1e-6).pow(gamma)
    return power / power.norm(dim=-1, keepdim=True) * x.norm(dim=-1, keepdim=True)


def _copy(goal: Recorder, c: Contestant) -> Step:
    source = goal.tensor(c, 1, c.tokens, c.dim)
    return functools.partial(torch.empty_like(source).copy_, source)


def _tensor(goal: Recorder, c: Contestant) -> Step:
    """Makes a tensor of tokens."""
    return lambda: torch.empty(c.tokens, c.dim, device=goal.device)


def _convolution(goal: Recorder, c: Contestant) -> Step:
    conv = DepthwiseConv(c.dim, "3x3").to(goal.device).eval()
    return step_of(conv, (goal.tensor(c, 1, c.tokens, c.dim), (c.side, c.side)), c.mode)


def _compression(goal: Recorder, c: Contestant) -> Step:
    """What the mechanism "compressed" does to keys and values."""
    layer: Any = attnzoo.build_attention("compressed", c.dim, layers="all").to(goal.device)
    return step_of(layer.compress, (goal.tensor(c, 1, c.tokens, c.dim), (c.side, c.side)), c.mode)


def _scan(goal: Recorder, c: Contestant) -> Step:
    def tensor(width: int) -> Tensor:
        order = (c.tokens, c.heads) if c.by_token else (c.heads, c.tokens)
        return goal.tensor(c, c.batch, *order, width)

    gate = F.logsigmoid(tensor(32).float()) / 16
    operands = (tensor(32), tensor(32), tensor(c.value_dim), gate.detach())
    gate = operands[3].requires_grad_(c.mode == "train")
    kernel: Any = optional("chunk_gla", "fla.ops.gla") if c.impl == "library" else None

    def function(*operands: Tensor, impl: Any = c.impl) -> Tensor:
        if impl == "library":
            return kernel(*operands, scale=1.0)[0]
        if not c.by_token:
            return gated_linear_attention(*operands, impl=impl)
        by_head = [z.transpose(1, 2) for z in operands]
        return gated_linear_attention(*by_head, impl=impl).transpose(1, 2)

    if c.impl != "reference":
        few = [z.detach().narrow(1 if c.by_token else 2, 0, min(c.tokens, 256)) for z in operands]
        exact = function(*(z.double() for z in few), impl="reference")
        goal.check_operator(f"scan, {c.impl}", function(*few), exact)
    return step_of(function, operands, c.mode)


def _both_scans(goal: Recorder, c: Contestant) -> Step:
    """The mean of both directions, from gates before their sigmoid."""

    def tensor(width: int) -> Tensor:
        return goal.tensor(c, c.batch, c.tokens, c.heads, width)

    def twice(scan: Callable[..., Tensor], *operands: Tensor) -> Tensor:
        *others, logit = operands
        log_gate = F.logsigmoid(logit.to(torch.promote_types(logit.dtype, torch.float32))) / 16
        forward = scan(*others, log_gate)
        return (forward + scan(*(z.flip(1) for z in (*others, log_gate))).flip(1)) / 2

    def plain(query: Tensor, *others: Tensor) -> Tensor:
        function = functools.partial(gated_linear_attention, impl="reference")
        return _swapped(function, query * query.shape[-1] ** -0.5, *others)

    def by_kernels(query: Tensor, key: Tensor, value: Tensor, logit: Tensor) -> Tensor:
        found = mean_of_scans_by_kernels(
            query, key, value, logit, 16.0, (query.shape[1], 1), ("forward", "backward"), "triton"
        )
        assert found is not None
        return found

    operands = tensor(32), tensor(32), tensor(c.value_dim), tensor(32)
    function: Callable[..., Tensor] = by_kernels
    if c.impl == "library":
        kernel = functools.partial(optional("chunk_gla", "fla.ops.gla"), scale=32**-0.5)
        function = functools.partial(twice, functools.partial(_first, kernel))
    few = [z[:, :256].detach() for z in operands]
    exact = twice(plain, *(z.double() for z in few))
    goal.check_operator(f"both scans, {c.impl}", function(*few), exact)
    return step_of(function, operands, c.mode)


def _first(function: Callable[..., tuple[Tensor, ...]], *operands: Tensor) -> Tensor:
    return function(*operands)[0]


def _swapped(function: Callable[..., Tensor], *operands: Tensor) -> Tensor:
    """Of operands whose heads come after tokens."""
    return function(*(z.transpose(1, 2) for z in operands)).transpose(1, 2)


BUILDERS: dict[str, Callable[[Recorder, Contestant], Step]] = {
    "layer": _layer, "peer": _peer, "linear": _linear, "routed": _routed, "grouped": _grouped,
    "power": _power, "copy": _copy, "tensor": _tensor, "convolution": _convolution,
    "compression": _compression, "scan": _scan, "both scans": _both_scans,
}  # fmt: skip


def scales(goal: Recorder) -> None:
    """At how many scales the power map or its gradient is not finite."""
    x = torch.randn(1, 64, 384, device=goal.device).relu()
    bad = 0
    for power in range(-20, 16):
        z = (10.0**power * x).requires_grad_()
        gamma = torch.full((1, 64, 1), 3.0, device=goal.device, requires_grad=True)
        out = power_map(z, gamma)
        found = (out, *torch.autograd.grad(out.sum(), (z, gamma)))
        bad += not all(bool(value.isfinite().all()) for value in found)
    goal.add("scales", float(bad))


def scan_errors(goal: Recorder) -> None:
    """Errors against the recurrence in float64, on gates from 0 to -100 per token."""
    operands = [torch.randn(1, 6, 256, 32, device=goal.device) for _ in range(3)]
    operands.append(-100 * torch.rand(1, 6, 256, 32, device=goal.device) ** 8)
    exact = gated_linear_attention(*(z.double() for z in operands), impl="reference")
    for impl in ("torch", "auto"):
        name = f"scan, {impl}, steep gates"
        found = gated_linear_attention(*operands, impl=impl)
        goal.check_operator(name, found, exact, math.inf)
        goal.add("error", goal.checks[name], impl=impl)


def exponents(goal: Recorder) -> None:
    """Slopes over three sizes, of every mechanism that is linear by its class."""
    sides = (32, 64, 128)

    def slope(values: Any) -> float:
        return exponent([(s**2, v) for s, v in zip(sides, values, strict=True)]) or math.nan

    linear = [name for name in attnzoo.list_attention() if not is_quadratic(name)]
    for name, mode in itertools.product(linear, MODES):
        calls = {str(side): _layer(goal, Contestant(mechanism=name, side=side, mode=mode))
                 for side in sides}  # fmt: skip
        times = goal.race(calls).launched
        slopes = [slope(rounds) for rounds in zip(*times.values(), strict=True)]
        goal.add("time", spread(slopes), mechanism=name, mode=mode)
        if mode == "forward":
            peaks = [peak_memory(call, goal.device)["peak_memory"] for call in calls.values()]
            goal.add("memory", slope(peaks), mechanism=name)


def recompilations(goal: Recorder) -> None:
    """Graph breaks and recompilations over inputs that are routed otherwise."""
    from torch._dynamo.utils import counters

    goal.check(Contestant(mechanism="dydila", dim=96).case)
    for mode in MODES:
        torch._dynamo.reset()
        layer = attnzoo.build_attention("dydila", 96).to(goal.device).train(mode == "train")
        run = torch.compile(layer, fullgraph=True)
        counters.clear()
        for seed in range(4):
            torch.manual_seed(seed)
            x = 10.0**seed * torch.randn(1, 64, 96, device=goal.device)
            with torch.set_grad_enabled(mode == "train"):
                out = run(x.requires_grad_(mode == "train"), (8, 8))
            if mode == "train":
                out.sum().backward()
        breaks = sum(counters["graph_break"].values())
        again = max(0, counters["stats"]["unique_graphs"] - 1)
        goal.add("breaks", float(breaks + again), "fullgraph=True, one grid, 4 routings",
                 mode=mode)  # fmt: skip
