"""What one process does for one case: check, time, measure memory, count."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import attnzoo
from attnzoo.contract import Attention
from attnzoo.counting import count_macs
from backbones import build_backbone
from bench import machine
from bench.cases import SIZES, Case
from bench.checks import WrongResult, check_equal, check_key, check_layer
from bench.isolate import Unsupported, one_line
from bench.peak_memory import peak_memory
from bench.peers import contestants_of
from bench.timing import Calls, interleave, quartiles, ratio, recorded, stopwatch_for
from recipes.lab.imports import import_all


@dataclasses.dataclass(frozen=True)
class Conditions:
    """What all cases of a run share.

    Attributes:
        threads: Of torch, on the CPU.
        imports: Files or modules that register a user's own mechanisms.
        peaks: What ``machine.measure_peaks`` found.
        quality: Results of ``recipes/compare.py``, or None.
        checked: What earlier cases of the run found equal to their references, by ``check_key``.
    """

    threads: int = 1
    imports: tuple[str, ...] = ()
    peaks: dict[str, float] = dataclasses.field(default_factory=dict)
    quality: str | None = None
    checked: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


class WholeLayer(torch.nn.Module):
    """A layer with what its mechanism does at the end of the block, which its cost includes."""

    def __init__(self, layer: Attention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See ``Attention.forward``."""
        return self.layer.after_block(self.layer(x, grid), grid)


def prepare(conditions: Conditions) -> str:
    """Sets threads and allocator and imports the user's mechanisms; returns the allocator."""
    torch.set_num_threads(conditions.threads)
    torch.manual_seed(0)
    import_all(conditions.imports)
    return machine.keep_freed_memory()


def peaks(conditions: Conditions, device: str, dtypes: tuple[str, ...]) -> dict[str, float]:
    """See ``machine.measure_peaks``."""
    prepare(conditions)
    return machine.measure_peaks(device, dtypes, conditions.threads)


def measure(case: Case, conditions: Conditions) -> dict[str, Any]:
    """Measures a case of kind layer, backbone or peers.

    Returns:
        "rounds": the seconds of each round; everything else is for the record.

    Raises:
        Unsupported: It cannot run here.
        WrongResult: A fast path differs from its reference; nothing was timed.
    """
    allocator = prepare(conditions)
    dtype, device, options = getattr(torch, case.dtype), case.device, dict(case.options)
    if "impl" in options:
        _require_impl(case, dtype)
    check = conditions.checked.get(check_key(case)) or check_layer(
        case.mechanism, layer_options(case), case.width, case.dtype, device, case.side
    )
    record: dict[str, Any] = {"check": check}
    if case.kind == "peers":
        model, calls, found = _with_peers(case, dtype)
        record |= found
    else:
        model, call = subject(case, case.mechanism, options, dtype)
        calls = {"attnzoo": call}
        for name in case.against:
            if name != case.mechanism or options or case.compiled:
                calls[name] = subject(case, name, {}, dtype, compiled=False)[1]
    is_half_on_cpu = device == "cpu" and case.dtype != "float32"
    if is_half_on_cpu and case.kind == "layer" and "softmax" in calls:
        # On a CPU SDPA is slower than three plain operators in half precision, no fair peer.
        layer: Any = subject(case, "softmax", {}, dtype, compiled=False)[0]
        plain = contestants_of(layer)[1]["matmul-softmax-matmul"]
        calls["softmax, plain"] = step_of(plain, _inputs(case, layer, dtype), case.mode)
    stopwatch, timer = stopwatch_for(device, conditions.threads)
    rounds = interleave(calls, stopwatch, case.rounds, case.seconds, 3 if case.seconds else 1)
    if "softmax, plain" in rounds:
        plain = rounds.pop("softmax, plain")
        rounds["softmax"] = min(plain, rounds["softmax"], key=sum)
    peak = peak_memory(calls["attnzoo"], device)
    record |= {
        **_costs(model, case),
        "rounds": rounds["attnzoo"],
        "ratios": {n: ratio(rounds["attnzoo"], r) for n, r in rounds.items() if n != "attnzoo"},
        "peak_memory": peak.bytes,
        "allocated": peak.allocated,
        "parameter_memory": sum(p.numel() * p.element_size() for p in model.parameters()),
        "memory_method": peak.method,
        "impl": options.get("impl", getattr(_layer_of(model).config, "impl", "only one")),
        "operators": list(peak.operators),
        "timer": timer,
        "allocator": allocator,
        "cell_cpu_seconds": time.process_time(),
        **machine.describe(device, conditions.threads),
    }
    median = quartiles(rounds["attnzoo"])[1]
    step = record["macs_training"] if case.mode == "train" else record["macs"]
    if step:
        record["gflops"] = 2 * step * case.batch / median / 1e9
        if case.dtype in conditions.peaks:
            record["peak_gflops"] = conditions.peaks[case.dtype]
            record["share_of_peak"] = record["gflops"] / conditions.peaks[case.dtype]
    if case.kind == "peers" and record["ratios"]:
        best = max(record["ratios"], key=lambda name: record["ratios"][name]["median"])
        record["best_peer"], record["ratio_to_best"] = best, record["ratios"][best]
    # Last, because a recording that fails may leave the device unwilling.
    return record | (_device_times(calls, case) if device == "cuda" else {})


def _require_impl(case: Case, dtype: torch.dtype) -> None:
    """Runs a named implementation once on few tokens, whatever it raises where it cannot run."""
    side = min(case.side, 4)
    try:
        layer = attnzoo.build_attention(case.mechanism, case.width, **dict(case.options))
        layer = layer.to(case.device, dtype).train(case.mode == "train")
        x = torch.randn(1, side**2, case.width, device=case.device, dtype=dtype)
        step_of(layer, (x, (side, side)), case.mode)()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise _unavailable(case, f"{case.device} with {dtype}", error) from error


def _unavailable(case: Case, where: str, error: Exception) -> Unsupported:
    text = " ".join(str(error).split())
    if text.startswith("impl="):
        return Unsupported(text)
    impl = dict(case.options)["impl"]
    return Unsupported(f"{impl=} cannot run on {where}: {one_line(error)}")


def _device_times(calls: Calls, case: Case) -> dict[str, Any]:
    """The same contest without the host: every call replayed from a CUDA graph."""
    replays, missing = recorded(calls)
    found: dict[str, Any] = {"not_recorded": missing} if missing else {}
    if "attnzoo" not in replays:
        return found
    rounds = interleave(replays, stopwatch_for("cuda", 1)[0], case.rounds, case.seconds / 2)
    ours = rounds.pop("attnzoo")
    low, middle, high = quartiles(ours)
    found["device_seconds"] = {"median": middle, "q1": low, "q3": high}
    found["device_ratios"] = {name: ratio(ours, theirs) for name, theirs in rounds.items()}
    if case.kind == "peers" and rounds:
        best = max(rounds, key=lambda name: found["device_ratios"][name]["median"])
        found["best_peer_on_device"] = best
    return found


def count(case: Case, conditions: Conditions) -> dict[str, Any]:
    """Counts a layer's multiply-accumulates; nothing runs."""
    prepare(conditions)
    start = time.process_time()
    with torch.device("meta"):
        layer = attnzoo.build_attention(case.mechanism, case.width, **dict(case.options))
    try:
        costs = _costs(layer, case)
    except Exception as error:
        if "impl" in dict(case.options):
            raise _unavailable(case, "the meta device", error) from error
        raise
    return {
        **costs,
        "rounds": [time.process_time() - start],
        "timer": "process CPU time",
        **machine.describe("cpu", conditions.threads),
    }


def subject(
    case: Case,
    mechanism: str,
    options: dict[str, Any],
    dtype: torch.dtype,
    compiled: bool | None = None,
) -> tuple[torch.nn.Module, Callable[[], Any]]:
    """A model with trained-like weights, and one forward or training step of it."""
    with torch.device(case.device):  # initialising a whole backbone on the CPU takes seconds
        model: Any = build(case.kind, mechanism, case.width, options, case.resolution)
    model = model.to(case.device, dtype).train(case.mode == "train")
    if case.mode == "forward":
        model.fuse()  # as whoever only samples does
    inputs = _inputs(case, model, dtype)
    run: Any = WholeLayer(model) if isinstance(model, Attention) else model
    if case.compiled if compiled is None else compiled:
        if case.kind == "backbone":  # blocks are alike: one graph serves all of them
            for block in run.blocks:
                block.compile(fullgraph=True)
        else:
            run = torch.compile(run, fullgraph=True)
    return model, step_of(run, inputs, case.mode)


def layer_options(case: Case) -> dict[str, Any]:
    """The options of the layer that a case times, with those that a backbone's size brings."""
    options = dict(case.options)
    if case.kind != "backbone":
        return options
    with torch.device("meta"):
        model: Any = build(case.kind, case.mechanism, case.width, options, case.resolution)
    return {**model.config.attn_options, "num_heads": model.config.num_heads}


def build(
    kind: str, mechanism: str, width: int, options: dict[str, Any], resolution: int
) -> torch.nn.Module:
    """A layer, or the shared backbone of the controlled protocol: equal depth, heads and MLP."""
    if kind != "backbone":
        return attnzoo.build_attention(mechanism, width, **options)
    model = build_backbone(mechanism, SIZES[width], "controlled", resolution, attn_options=options)
    with torch.no_grad():  # zeroed gates would make every block the identity
        for parameter in model.parameters():
            if not parameter.is_meta and not parameter.any():
                parameter.normal_(std=0.02)
    return model


def _inputs(case: Case, model: torch.nn.Module, dtype: torch.dtype) -> tuple[Any, ...]:
    if isinstance(model, Attention):
        x = torch.randn(case.batch, case.tokens, case.width, device=case.device, dtype=dtype)
        return x.requires_grad_(case.mode == "train"), case.grid
    side = case.side * 2
    return (
        torch.randn(case.batch, 4, side, side, device=case.device, dtype=dtype),
        torch.full((case.batch,), 500.0, device=case.device),
        torch.zeros(case.batch, dtype=torch.int64, device=case.device),
        False,
    )


def step_of(run: Callable[..., Any], inputs: tuple[Any, ...], mode: str) -> Callable[[], Any]:
    """One forward under no_grad, or one forward and backward from clean gradients."""

    def forward() -> Tensor:
        out = run(*inputs)
        return out[0] if isinstance(out, tuple) else out

    def inference() -> None:
        with torch.no_grad():
            forward()

    if mode == "forward":
        return inference
    # With gradients, or torch.compile would compile a forward that nobody wants.
    cotangent = torch.randn_like(forward()).detach()
    parameters = list(run.parameters()) if isinstance(run, torch.nn.Module) else []
    tensors = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]

    def train() -> None:
        for tensor in (*parameters, *tensors):
            tensor.grad = None
        forward().backward(cotangent)

    return train


def _with_peers(
    case: Case, dtype: torch.dtype
) -> tuple[torch.nn.Module, dict[str, Callable[[], Any]], dict[str, Any]]:
    """Our layer and its peers, on the same weights and inputs, each compared with ours."""
    layer = attnzoo.build_attention(case.mechanism, case.width, **dict(case.options))
    layer = layer.to(case.device, dtype).train(case.mode == "train")
    ours, peers, missing = contestants_of(layer)
    small = min(case.side, 8)
    errors = {}
    inputs = _inputs(case, layer, dtype)
    calls = {"attnzoo": step_of(ours, inputs, case.mode)}
    x = torch.randn(1, small**2, case.width, device=case.device, dtype=dtype)
    for name, peer in peers.items():
        try:
            with torch.no_grad():
                errors[name] = check_equal(name, peer(x, (small, small)), ours(x, (small, small)))
            call = step_of(peer, inputs, case.mode)
            call()
        except WrongResult:
            raise
        except Exception as error:  # of other people's packages, anything
            missing[name] = one_line(error)
        else:
            calls[name] = call
    if len(calls) == 1:
        raise Unsupported(f"no peer of {case.mechanism} runs here: {missing}")
    return layer, calls, {"peer_errors": errors, "peers_missing": missing}


def _layer_of(model: torch.nn.Module) -> Attention:
    return next(module for module in model.modules() if isinstance(module, Attention))


def _costs(model: torch.nn.Module, case: Case) -> dict[str, Any]:
    full = count_macs(model, grid=case.grid)
    try:
        paper = count_macs(model, grid=case.grid, convention="paper").total
    except ValueError:  # the paper prints no figure for this mechanism
        paper = None
    return {
        "macs": full.total,
        "macs_training": full.training_step,
        "macs_paper": paper,
        "macs_parts": full.parts,
        "parameters": full.parameters,
        "active_parameters": full.active_parameters,
        "macs_measured": list(full.measured),
    }
