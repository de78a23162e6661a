"""How ``bench.whole_models`` times cases, layers, launches and scans."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.counting import count_macs
from attnzoo.ops.gated_scan import mean_of_scans_by_kernels
from bench.checks import WrongStep, relative_error
from bench.peers import optional
from bench.timing import Stopwatch, interleave, ratio, spread, stopwatch_for
from bench.whole_models.before import seconds_of
from bench.whole_models.cases import (
    LAYER_TOKENS,
    LAYER_WIDTH,
    Calls,
    Case,
    Layer,
    LayerSubject,
    Setup,
    recorded,
)
from bench.whole_models.older import BEFORE, step_of

_TURNS = 5  # of each, held to an older checkout


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
    rounds = interleave(contestants, stopwatch(setup), 15, setup.seconds)
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


def measure_over_before(case: Case, setup: Setup) -> dict[str, Any]:
    """Times a case in turn with the same step of an older checkout, recorded without compiling.

    That checkout has a process of its own. Turns are long, because each begins with a device that
    another process has just left.
    """
    ours = Calls(case, setup)
    ours.require_one()
    with step_of(case, setup) as theirs:
        turns: dict[str, Callable[[int], float]] = {BEFORE: theirs}
        for name, step in ours.steps.items():
            turns[name] = functools.partial(seconds_of, step, device=setup.device)
        counts = {name: max(1, round(setup.seconds / 2 / turns[name](1))) for name in turns}
        rounds: dict[str, list[float]] = {name: [] for name in turns}
        for _ in range(_TURNS):
            for name, turn in turns.items():
                rounds[name].append(turn(counts[name]))
    best = _fastest(rounds, ours.steps)
    return {
        **dataclasses.asdict(case),
        "resolution": case.resolution, "batch": case.batch, "commit": setup.before_commit,
        "seconds": {name: spread(taken) for name, taken in rounds.items()},
        "over_before": {"ours": best, **ratio(rounds[best], rounds[BEFORE])},
        "errors": ours.errors, "missing": ours.missing,
    }  # fmt: skip


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
    rounds = interleave(ours.steps, stopwatch(setup), 9, setup.seconds / 3)
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
    rounds = interleave(replayed, stopwatch(setup), 15, setup.seconds)
    return {"mode": mode, "tokens": tokens, "over_fla": ratio(rounds["ours"], rounds["fla"])}


def stopwatch(setup: Setup) -> Stopwatch:
    """What times the calls of a bench."""
    return stopwatch_for(setup.device, torch.get_num_threads())[0]


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
