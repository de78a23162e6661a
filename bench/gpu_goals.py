"""The goals of a GPU: bfloat16, d = 768, device times where a step can be recorded as a graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import attnzoo
from attnzoo.ops import dispatch
from attnzoo.ops.gated_scan import gated_linear_attention
from attnzoo.ops.gated_scan.reference import gated_linear_attention as recurrence
from attnzoo.ops.power_map import power_map
from attnzoo.ops.routed_linear import grouped_linear, routed_linear
from bench.cells import PIXELS_PER_TOKEN, Cell
from bench.checks import HALF_PRECISION_BUDGET, WrongResult, check_equal, relative_error
from bench.fits import crossover
from bench.goal_tools import Calls, Found, dydila_options, projectors
from bench.peak_memory import peak_memory
from bench.peers import contestants_of, optional
from bench.tables import memory
from bench.worker import layer_options, step_of, subject

DIM, DTYPE = 768, torch.bfloat16
# Tokens along one side: 4,096 tokens, and the 16,384 of 2048 px.
SMALL, LARGE = 64, 128
# Pixels of the backbone, for the crossover; the last is the goal's.
RESOLUTIONS = (512, 1024, 1536, 2048)
# Sets of tensors that a single operator walks through: one alone would stay in the L2 cache.
SETS = 4


def _nowhere(*_: Any) -> bool:
    return False


def _by_torch(build: Callable[[], Callable[[], Any]]) -> Callable[[], Any]:
    """A step computed by PyTorch's operators alone, as where Triton is not installed."""
    switch = functools.partial(mock.patch.object, dispatch, "_triton_works", _nowhere)
    with switch():  # a training step runs once when it is made
        step = build()
    return _within(switch, step)


def _within(manager: Callable[[], Any], call: Callable[[], Any]) -> Callable[[], Any]:
    def inside() -> Any:
        with manager():
            return call()

    return inside


def _started(builds: dict[str, Callable[[], Callable[[], Any]]]) -> tuple[Calls, dict[str, str]]:
    """The steps that could be made and called once, and why others could not."""
    calls: Calls = {}
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


def _cell(found: Found, side: int, mode: str, kind: Any = "layer") -> Cell:
    resolution = side * PIXELS_PER_TOKEN
    return Cell(kind=kind, resolution=resolution, width=DIM, dtype="bfloat16", mode=mode,
                device=found.device)  # fmt: skip


def _step(cell: Cell, mechanism: str, compiled: bool = False, **options: Any) -> Callable[[], Any]:
    return subject(cell, mechanism, options, DTYPE, compiled)[1]


# --------------------------------------------------------------------------------------- layers


def dydila_against_sana(found: Found) -> None:
    options = dydila_options(DIM)
    found.check("dydila", DIM, "bfloat16", **options)
    found.check("sana", DIM, "bfloat16")
    for mode in ("forward", "train"):
        torch._dynamo.reset()  # it refuses to compile one forward for many layers
        cell = _cell(found, SMALL, mode)
        step = functools.partial(_step, cell, "dydila", **options)
        calls, failed = _started({
            "Sana": lambda cell=cell: _step(cell, "sana"),
            "Sana, compiled": lambda cell=cell: _step(cell, "sana", compiled=True),
            "eager": lambda step=step: _by_torch(step),
            "compiled": lambda step=step: _by_torch(functools.partial(step, compiled=True)),
            "fused": step,
            "fused, compiled": functools.partial(step, compiled=True),
        })  # fmt: skip
        race = found.race(calls, failed)
        for ours, theirs, owed in (
            ("eager", "Sana", 6.0),
            ("compiled", "Sana, compiled", 3.0),
            ("fused", "Sana", 2.4),
            ("fused", "Sana, compiled", 2.4),
            ("fused, compiled", "Sana, compiled", 2.4),
        ):
            found.compare(f"DyDiLA {ours}, over {theirs}, time, n={SMALL**2}, {mode}",
                          race, ours, theirs, "lower", owed, 2.05)  # fmt: skip


def sana_against_peers(found: Found) -> None:
    found.check("sana", DIM, "bfloat16")
    for side in (SMALL, LARGE):
        for mode in ("forward", "train"):
            layer = attnzoo.build_attention("sana", DIM).to(found.device, DTYPE)
            ours, peers, _ = contestants_of(layer.train(mode == "train"))
            x = torch.randn(1, side**2, DIM, device=found.device, dtype=DTYPE)
            inputs = (x.requires_grad_(mode == "train"), (side, side))
            # A whole map in memory is the slowest by far, and for many tokens does not fit.
            models = {n: p for n, p in peers.items() if side == SMALL or not n.startswith("naive")}
            if not models:
                found.add(f"Sana's speed over the best peer, n={side**2}, {mode}", None, "higher",
                          1.0, 1.0, note="no peer is installed")  # fmt: skip
                continue
            with torch.no_grad():
                small = (x[:, : 4 * side].detach(), (4, side))
                for name, peer in models.items():
                    found.checks[name] = check_equal(name, peer(*small), ours(*small))
            calls = {name: step_of(model, inputs, mode) for name, model in models.items()}
            race = found.race({"ours": step_of(ours, inputs, mode)} | calls)
            best = min(calls, key=race.median)
            found.compare(f"Sana's speed over the best peer, n={side**2}, {mode}", race, best,
                          "ours", "higher", 1.0, 1.0, note=best)  # fmt: skip


def peak_of_training(found: Found) -> None:
    options = dydila_options(DIM)
    found.check("dydila", DIM, "bfloat16", **options)
    found.check("sana", DIM, "bfloat16")
    cell, peaks = _cell(found, LARGE, "train"), {}
    for name, chosen in (("dydila", options), ("sana", {})):
        call = _step(cell, name, **chosen)
        call()
        peaks[name] = peak_memory(call, found.device).bytes
    sizes = " and ".join(memory(peaks[name]) for name in ("dydila", "sana"))
    found.add(f"peak memory over Sana's, training step, n={LARGE**2}",
              peaks["dydila"] / peaks["sana"], "lower", 1.6, 1.2, note=sizes)  # fmt: skip


# ------------------------------------------------------------------------------------- backbone


_SOFTMAX = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_PACKAGES = ("flash", "xformers")  # values of the softmax mechanism's impl


def backbone_against_softmax(found: Found) -> None:
    for name in ("dydila", "softmax"):
        cell = Cell(kind="backbone", mechanism=name, resolution=RESOLUTIONS[0], width=DIM)
        found.check(name, DIM, "bfloat16", **layer_options(cell))
    best = ""
    for compiled, resolutions in ((False, RESOLUTIONS), (True, RESOLUTIONS[1::2])):
        curves: dict[str, list[tuple[float, float]]] = {"dydila": [], "softmax": []}
        for resolution in resolutions:
            torch._dynamo.reset()
            cell = _cell(found, resolution // PIXELS_PER_TOKEN, "forward", "backbone")
            # Compiling takes long: only with the backend that was fastest without.
            softmax = _softmax_steps(cell, compiled, best if compiled else "")
            race = found.race({"dydila": _step(cell, "dydila", compiled)} | softmax)
            best = min(softmax, key=race.median)
            for name, contestant in (("dydila", "dydila"), ("softmax", best)):
                curves[name].append((cell.tokens, race.median(contestant)))
        found.compare(
            f"DyDiLA's backbone{', blocks compiled' if compiled else ''}, times faster than the "
            f"fastest softmax, forward, {resolutions[-1]} px",
            race, best, "dydila", "higher", 2.0, 3.4,
            note=f"{_crossover(curves, resolutions[0])}; {best} of {', '.join(softmax)}",
        )  # fmt: skip


def _crossover(curves: dict[str, list[tuple[float, float]]], least: int) -> str:
    if cross := crossover(curves["dydila"], curves["softmax"]):
        return f"faster from {cross[0] ** 0.5 * PIXELS_PER_TOKEN:.0f} px on"
    is_faster = curves["dydila"][0][1] < curves["softmax"][0][1]
    return f"{'faster' if is_faster else 'slower'} from {least} px on"


def _softmax_steps(cell: Cell, compiled: bool, only: str) -> Calls:
    """The backends that run here, or one, on one set of weights where they can share it."""
    shared, steps = _step(cell, "softmax", compiled), {}
    for name in [only] if only else [*_SOFTMAX, *_PACKAGES]:
        try:
            if name in _SOFTMAX:
                step = _within(functools.partial(sdpa_kernel, _SOFTMAX[name]), shared)
            else:
                step = _step(cell, "softmax", compiled, impl=name)
            step()
        except (ImportError, NotImplementedError, RuntimeError):
            continue
        steps[name] = step
    if not steps:
        raise RuntimeError("no backend of softmax attention runs on this device")
    return steps


# ------------------------------------------------------------------------------------ operators


def _rotated(build: Callable[[], Callable[[], Any]]) -> Callable[[], Any]:
    """One call runs all of ``SETS`` sets of tensors, so that none is in the cache when read."""
    steps = [build() for _ in range(SETS)]

    def run() -> None:
        for step in steps:
            step()

    return run


def routed_against_linear(found: Found) -> None:
    tokens, experts = LARGE**2, projectors(DIM)

    def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        weight = torch.randn(experts, DIM, DIM, device=found.device, dtype=DTYPE) * DIM**-0.5
        x = torch.randn(tokens, DIM, device=found.device, dtype=DTYPE)
        return x, weight, torch.randint(experts, (tokens,), device=found.device)

    x, weight, index = tensors()
    few = slice(0, 512)
    exact = routed_linear(x[few].double(), weight.double(), index[few], impl="reference")
    _require("routed_linear", routed_linear(x[few], weight, index[few]), exact, found)

    def linear() -> Callable[[], Any]:
        layer = torch.nn.Linear(DIM, DIM, bias=False, device=found.device, dtype=DTYPE)
        return step_of(layer, (tensors()[0],), "forward")

    race = found.race({
        "linear": _rotated(linear),
        "routed": _rotated(lambda: step_of(routed_linear, tensors(), "forward")),
    })  # fmt: skip
    found.compare(f"routed over nn.Linear, speed, n={tokens}, n_P={experts}, forward, with its "
                  f"sort", race, "linear", "routed", "higher", 0.75, 0.90)  # fmt: skip

    def pair() -> tuple[torch.Tensor, ...]:
        (x, first, one), (_, second, other) = tensors(), tensors()
        return x, first, second, torch.cat([one, other + experts]).int()

    x, first, second, index = pair()
    both = grouped_linear(x[few], first, second, index.view(2, -1)[:, few].flatten())
    for weight, mine, choice in zip((first, second), both, index.view(2, -1), strict=True):
        choice = choice[few].long() % experts
        exact = routed_linear(x[few].double(), weight.double(), choice, impl="reference")
        _require("grouped_linear", mine, exact, found)

    def two() -> Callable[[], Any]:
        layers = [torch.nn.Linear(DIM, DIM, bias=False, dtype=DTYPE) for _ in range(2)]
        layers = [layer.to(found.device) for layer in layers]
        return step_of(lambda x: [layer(x) for layer in layers][1], (tensors()[0],), "forward")

    race = found.race({
        "linears": _rotated(two),
        "pair": _rotated(lambda: step_of(grouped_linear, pair(), "forward")),
    })  # fmt: skip
    found.compare(f"DyDiLA's two routed projections over two of nn.Linear, speed, n={tokens}, "
                  f"n_P={experts}, forward, with their sort", race, "linears", "pair", "higher",
                  0.75, 0.90)  # fmt: skip


def power_map_against_copy(found: Found) -> None:
    tokens = LARGE**2

    def tensors() -> tuple[torch.Tensor, torch.Tensor]:
        z = torch.randn(1, tokens, DIM, device=found.device, dtype=DTYPE)
        return z, torch.full((1, tokens, 1), 3.0, device=found.device)

    z, gamma = tensors()
    exact = power_map(z[:, :512].double(), gamma[:, :512].double(), impl="reference")
    _require("power_map", power_map(z[:, :512], gamma[:, :512]), exact, found)

    def copying() -> Callable[[], Any]:
        source = tensors()[0]
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    def eager(z: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        return power_map(z, gamma, impl="torch")

    race = found.race({
        "copy": _rotated(copying),
        "fused": _rotated(lambda: step_of(power_map, tensors(), "forward")),
        "eager": _rotated(lambda: step_of(eager, tensors(), "forward")),
    })  # fmt: skip
    found.compare(f"fused power map, share of a copy's bandwidth, n={tokens}, forward", race,
                  "copy", "fused", "higher", 0.60, 0.85)  # fmt: skip
    found.compare(f"fused power map, times faster than eager, n={tokens}, forward", race,
                  "eager", "fused", "higher", 6.0, 6.0)  # fmt: skip


def gated_against_fla(found: Found) -> None:
    chunk_gla = optional("chunk_gla", "fla.ops.gla")

    def theirs(*operands: torch.Tensor) -> torch.Tensor:
        return chunk_gla(*operands, scale=1.0)[0]

    def ours(impl: Any) -> Callable[..., torch.Tensor]:
        def run(*operands: torch.Tensor) -> torch.Tensor:
            query, key, value, gate = (z.transpose(1, 2) for z in operands)
            return gated_linear_attention(query, key, value, gate, impl).transpose(1, 2)

        return run

    def tensors(tokens: int) -> list[torch.Tensor]:
        # Heads and widths of the layer "gated" at d = 768, in the order that the layer has.
        shape = (1, tokens, 12)
        query, key, gate = (torch.randn(*shape, 32, device=found.device) for _ in range(3))
        value = torch.randn(*shape, 64, device=found.device)
        return [*(z.to(DTYPE) for z in (query, key, value)), F.logsigmoid(gate) / 16]

    contestants = {"fla": theirs, "impl='fla'": ours("fla"), "PyTorch": ours("torch")}
    operands = tensors(256)
    twin: Any = recurrence
    exact = twin(*(z.double().transpose(1, 2) for z in operands)).transpose(1, 2)
    for name, function in contestants.items():
        _require(name, function(*operands), exact, found)
    for tokens in (SMALL**2, LARGE**2):
        for mode in ("forward", "train"):
            inputs = tuple(z.requires_grad_(mode == "train") for z in tensors(tokens))
            race = found.race({n: step_of(f, inputs, mode) for n, f in contestants.items()})
            for name, owed, aim in (("impl='fla'", 1.3, 1.0), ("PyTorch", 10.0, 1.3)):
                what = f"gated linear attention by {name} over fla's, time, n={tokens}, {mode}"
                found.compare(what, race, name, "fla", "lower", owed, aim)


def _require(name: str, output: torch.Tensor, exact: torch.Tensor, found: Found) -> None:
    """Raises WrongResult if an operator differs from its twin in float64."""
    error = relative_error(output, exact)
    if not error <= HALF_PRECISION_BUDGET["bfloat16"] / 5:
        raise WrongResult(f"{name} is off by {error:.1e}")
    found.checks[name] = error
