"""What one process does for one cell: check, time, measure memory, count."""

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
from bench.cells import SIZES, Cell
from bench.checks import WrongResult, check_equal, check_key, check_layer
from bench.isolate import Unsupported, one_line
from bench.peak_memory import peak_memory
from bench.peers import contestants_of
from bench.timing import interleave, quartiles, ratio, recorded, stopwatch_for
from recipes.lab.imports import import_all


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all cells of a run share.

    Attributes:
        threads: Of torch, on the CPU.
        imports: Files or modules that register a user's own mechanisms.
        peaks: What ``machine.measure_peaks`` found.
        quality: Results of ``recipes/compare.py``, or None.
        checked: What earlier cells of the run found equal to their twins, by ``check_key``.
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


def prepare(settings: Settings) -> str:
    """Sets threads and allocator and imports the user's mechanisms; returns the allocator."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    import_all(settings.imports)
    return machine.keep_freed_memory()


def peaks(settings: Settings, device: str, dtypes: tuple[str, ...]) -> dict[str, float]:
    """See ``machine.measure_peaks``."""
    prepare(settings)
    return machine.measure_peaks(device, dtypes, settings.threads)


def measure(cell: Cell, settings: Settings) -> dict[str, Any]:
    """Measures a cell of kind layer, backbone or peers.

    Returns:
        "rounds": the seconds of each round; everything else is for the record.

    Raises:
        Unsupported: It cannot run here.
        WrongResult: A fast path differs from its twin; nothing was timed.
    """
    allocator = prepare(settings)
    dtype, device, options = getattr(torch, cell.dtype), cell.device, dict(cell.options)
    if "impl" in options:
        _require_impl(cell, dtype)
    check = settings.checked.get(check_key(cell)) or check_layer(
        cell.mechanism, layer_options(cell), cell.width, cell.dtype, device, cell.side
    )
    record: dict[str, Any] = {"check": check}
    if cell.kind == "peers":
        model, calls, found = _with_peers(cell, dtype)
        record |= found
    else:
        model, call = subject(cell, cell.mechanism, options, dtype)
        calls = {"attnzoo": call}
        for name in cell.against:
            if name != cell.mechanism or options or cell.compiled:
                calls[name] = subject(cell, name, {}, dtype, compiled=False)[1]
    is_half_on_cpu = device == "cpu" and cell.dtype != "float32"
    if is_half_on_cpu and cell.kind == "layer" and "softmax" in calls:
        # On a CPU SDPA is slower than three plain operators in half precision, no fair peer.
        calls["softmax, plain"] = _plain_softmax(cell, dtype)
    stopwatch, timer = stopwatch_for(device, settings.threads)
    least = 1 if cell.seconds == 0 else 3
    rounds = interleave(calls, stopwatch, cell.rounds, cell.seconds, least)
    if "softmax, plain" in rounds:
        plain = rounds.pop("softmax, plain")
        rounds["softmax"] = min(plain, rounds["softmax"], key=sum)
    peak = peak_memory(calls["attnzoo"], device)
    resident = sum(p.numel() * p.element_size() for p in model.parameters())
    record |= {
        **_costs(model, cell),
        "rounds": rounds["attnzoo"],
        "ratios": {n: ratio(rounds["attnzoo"], r) for n, r in rounds.items() if n != "attnzoo"},
        "peak_memory": peak.bytes,
        "allocated": peak.allocated,
        "parameter_memory": resident,
        "memory_method": peak.method,
        "impl": options.get("impl", getattr(_config(model), "impl", "only one")),
        "operators": list(peak.operators),
        "timer": timer,
        "allocator": allocator,
        "cell_cpu_seconds": time.process_time(),
        **machine.describe(device, settings.threads),
    }
    median = quartiles(rounds["attnzoo"])[1]
    step = record["macs_training"] if cell.mode == "train" else record["macs"]
    if step:
        record["gflops"] = 2 * step * cell.batch / median / 1e9
        if cell.dtype in settings.peaks:
            record["peak_gflops"] = settings.peaks[cell.dtype]
            record["share_of_peak"] = record["gflops"] / settings.peaks[cell.dtype]
    if cell.kind == "peers" and record["ratios"]:
        best = max(record["ratios"], key=lambda name: record["ratios"][name]["median"])
        record["best_peer"], record["ratio_to_best"] = best, record["ratios"][best]
    # Last, because a recording that fails may leave the device unwilling.
    return record | (_device_times(calls, cell) if device == "cuda" else {})


def _require_impl(cell: Cell, dtype: torch.dtype) -> None:
    """Runs a named implementation once on few tokens, whatever it raises where it cannot run."""
    side = min(cell.side, 4)
    try:
        layer = attnzoo.build_attention(cell.mechanism, cell.width, **dict(cell.options))
        layer = layer.to(cell.device, dtype).train(cell.mode == "train")
        x = torch.randn(1, side**2, cell.width, device=cell.device, dtype=dtype)
        step_of(layer, (x, (side, side)), cell.mode)()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise _unavailable(cell, f"{cell.device} with {dtype}", error) from error


def _unavailable(cell: Cell, where: str, error: Exception) -> Unsupported:
    text = " ".join(str(error).split())
    if text.startswith("impl="):
        return Unsupported(text)
    impl = dict(cell.options)["impl"]
    return Unsupported(f"{impl=} cannot run on {where}: {one_line(error)}")


def _device_times(calls: dict[str, Callable[[], Any]], cell: Cell) -> dict[str, Any]:
    """The same contest without the host: every call replayed from a CUDA graph."""
    replays, missing = recorded(calls)
    found: dict[str, Any] = {"not_recorded": missing} if missing else {}
    if "attnzoo" not in replays:
        return found
    rounds = interleave(replays, stopwatch_for("cuda", 1)[0], cell.rounds, cell.seconds / 2)
    ours = rounds.pop("attnzoo")
    low, middle, high = quartiles(ours)
    found["device_seconds"] = {"median": middle, "q1": low, "q3": high}
    found["device_ratios"] = {name: ratio(ours, theirs) for name, theirs in rounds.items()}
    if cell.kind == "peers" and rounds:
        best = max(rounds, key=lambda name: found["device_ratios"][name]["median"])
        found["best_peer_on_device"] = best
    return found


def count(cell: Cell, settings: Settings) -> dict[str, Any]:
    """Counts a layer's multiply-accumulates; nothing runs."""
    prepare(settings)
    start = time.process_time()
    with torch.device("meta"):
        layer = attnzoo.build_attention(cell.mechanism, cell.width, **dict(cell.options))
    try:
        costs = _costs(layer, cell)
    except Exception as error:
        if "impl" in dict(cell.options):
            raise _unavailable(cell, "the meta device", error) from error
        raise
    return {**costs, "rounds": [time.process_time() - start],
            "timer": "process CPU time", **machine.describe("cpu", settings.threads)}  # fmt: skip


def subject(
    cell: Cell,
    mechanism: str,
    options: dict[str, Any],
    dtype: torch.dtype,
    compiled: bool | None = None,
) -> tuple[torch.nn.Module, Callable[[], Any]]:
    """A model with trained-like weights, and one forward or training step of it."""
    with torch.device(cell.device):  # initialising a whole backbone on the CPU takes seconds
        model = build(cell.kind, mechanism, cell.width, options, cell.resolution)
    model = model.to(cell.device, dtype).train(cell.mode == "train")
    if cell.mode == "forward":
        model.fuse()  # as whoever only samples does
    inputs = _inputs(cell, model, dtype)
    run: Any = WholeLayer(model) if isinstance(model, Attention) else model
    if cell.compiled if compiled is None else compiled:
        if cell.kind == "backbone":  # blocks are alike: one graph serves all of them
            for block in run.blocks:
                block.compile(fullgraph=True)
        else:
            run = torch.compile(run, fullgraph=True)
    return model, step_of(run, inputs, cell.mode)


def _plain_softmax(cell: Cell, dtype: torch.dtype) -> Callable[[], Any]:
    layer, _ = subject(cell, "softmax", {}, dtype, compiled=False)
    peer = contestants_of(layer)[1]["matmul-softmax-matmul"]  # type: ignore[arg-type]
    return step_of(peer, _inputs(cell, layer, dtype), cell.mode)


def layer_options(cell: Cell) -> dict[str, Any]:
    """The options of the layer that a cell times, with those that a backbone's size brings."""
    options = dict(cell.options)
    if cell.kind != "backbone":
        return options
    with torch.device("meta"):
        model: Any = build(cell.kind, cell.mechanism, cell.width, options, cell.resolution)
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


def _inputs(cell: Cell, model: torch.nn.Module, dtype: torch.dtype) -> tuple[Any, ...]:
    if isinstance(model, Attention):
        x = torch.randn(cell.batch, cell.tokens, cell.width, device=cell.device, dtype=dtype)
        return x.requires_grad_(cell.mode == "train"), cell.grid
    side = cell.side * 2
    return (
        torch.randn(cell.batch, 4, side, side, device=cell.device, dtype=dtype),
        torch.full((cell.batch,), 500.0, device=cell.device),
        torch.zeros(cell.batch, dtype=torch.int64, device=cell.device),
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
    cell: Cell, dtype: torch.dtype
) -> tuple[torch.nn.Module, dict[str, Callable[[], Any]], dict[str, Any]]:
    """Our layer and its peers, on the same weights and inputs, each compared with ours."""
    layer = attnzoo.build_attention(cell.mechanism, cell.width, **dict(cell.options))
    layer = layer.to(cell.device, dtype).train(cell.mode == "train")
    ours, peers, missing = contestants_of(layer)
    small = min(cell.side, 8)
    errors = {}
    inputs = _inputs(cell, layer, dtype)
    calls = {"attnzoo": step_of(ours, inputs, cell.mode)}
    x = torch.randn(1, small**2, cell.width, device=cell.device, dtype=dtype)
    for name, peer in peers.items():
        try:
            with torch.no_grad():
                errors[name] = check_equal(name, peer(x, (small, small)), ours(x, (small, small)))
            call = step_of(peer, inputs, cell.mode)
            call()
        except WrongResult:
            raise
        except Exception as error:  # of other people's packages, anything
            missing[name] = one_line(error)
        else:
            calls[name] = call
    if len(calls) == 1:
        raise Unsupported(f"no peer of {cell.mechanism} runs here: {missing}")
    return layer, calls, {"peer_errors": errors, "peers_missing": missing}


def _config(model: torch.nn.Module) -> Any:
    layers = [m for m in model.modules() if isinstance(m, Attention)]
    return layers[0].config


def _costs(model: torch.nn.Module, cell: Cell) -> dict[str, Any]:
    full = count_macs(model, grid=cell.grid)
    try:
        paper = count_macs(model, grid=cell.grid, convention="paper").total
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
