"""What one process does for one case: check, time, measure memory, count."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

import attnzoo
from attnzoo.contract import Attention
from attnzoo.counting import count_macs
from backbones import build_backbone, parse_pattern
from backbones.pattern import names_in, nested
from bench import machine
from bench.cases import SIZES, Case, Conditions
from bench.checks import WrongResult, check_layer, require_close
from bench.isolate import Unsupported, one_line
from bench.peak_memory import peak_memory
from bench.peers import PEERS
from bench.timing import race, ratio, spread, stopwatch_for
from recipes.lab.imports import import_all

Steps = dict[str, Callable[[], Any]]


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


def measure(case: Case, conditions: Conditions) -> dict[str, Any]:
    """Measures a case of kind layer, backbone or peers.

    Returns:
        "rounds": the seconds of each round; everything else is for the record.

    Raises:
        Unsupported: It cannot run here.
        WrongResult: A fast path differs from its reference; nothing was timed.
    """
    allocator = prepare(conditions)
    is_gpu = case.device == "cuda"
    check = conditions.checked.get(case.check_key) or check_layers(case)
    model, call = subject(case)
    calls, found = {"attnzoo": call}, {}
    if case.kind == "peers":
        others, found = peer_steps(case, model, PEERS[case.mechanism])
        calls |= others
    is_half_on_cpu = not is_gpu and case.dtype != "float32"
    for name in case.against:
        rival = dataclasses.replace(case, mechanism=name, options=(), compiled=False)
        other, calls[name] = subject(rival)
        if name == "softmax" and is_half_on_cpu:
            # On a CPU SDPA is slower than three plain operators in half precision, no fair peer.
            plain = PEERS["softmax"]["matmul-softmax-matmul"](other)
            calls["softmax, plain"] = step_of(plain, _inputs(case, other), case.mode)
    if is_gpu:  # before a recording, which may fail and leave the device unwilling
        call()
        peak = peak_memory(call, case.device)
    least = max(3 if case.seconds else 1, conditions.min_rounds)
    times = race(calls, case.device, conditions.threads, {}, rounds=max(case.rounds, least),
                 seconds=case.seconds, least=least)  # fmt: skip
    if not is_gpu:
        peak = peak_memory(call, case.device)
    rounds, on_device = times.launched, times.device
    if "softmax, plain" in rounds:
        rounds["softmax"] = min(rounds.pop("softmax, plain"), rounds["softmax"], key=sum)
    ours = rounds.pop("attnzoo")
    layer = next(module for module in model.modules() if isinstance(module, Attention))
    record: dict[str, Any] = {
        "check": check,
        **found,
        **_costs(model, case),
        "rounds": ours,
        "ratios": {name: ratio(ours, theirs) for name, theirs in rounds.items()},
        **peak,
        "parameter_memory": sum(p.numel() * p.element_size() for p in model.parameters()),
        "impl": getattr(layer.config, "impl", "only one"),
        "timer": stopwatch_for(case.device, conditions.threads)[1],
        "allocator": allocator,
        "cell_cpu_seconds": time.process_time(),
        **machine.describe(case.device, conditions.threads),
    }
    if step := record["macs_training" if case.mode == "train" else "macs"]:
        record["gflops"] = 2 * step / spread(ours)["median"] / 1e9
        if case.dtype in conditions.peaks:
            record["peak_gflops"] = conditions.peaks[case.dtype]
            record["share_of_peak"] = record["gflops"] / conditions.peaks[case.dtype]
    if case.kind == "peers":
        record["best_peer"] = _best(record["ratios"])
        record["ratio_to_best"] = record["ratios"][record["best_peer"]]
    if times.missing:
        record["not_recorded"] = times.missing
    if "attnzoo" in on_device:
        ours = on_device.pop("attnzoo")
        record["device_seconds"] = spread(ours)
        ratios = record["device_ratios"] = {n: ratio(ours, z) for n, z in on_device.items()}
        if case.kind == "peers" and ratios:
            record["best_peer_on_device"] = _best(ratios)
    return record


def _best(ratios: dict[str, dict[str, float]]) -> str:
    """Over whom our time is the longest."""
    return max(ratios, key=lambda name: ratios[name]["median"])


def count(case: Case, conditions: Conditions) -> dict[str, Any]:
    """Counts a layer's multiply-accumulates; nothing runs."""
    prepare(conditions)
    start = time.process_time()
    return {
        **_costs(_on_meta(case), case),
        "rounds": [time.process_time() - start],
        "timer": "process CPU time",
        **machine.describe("cpu", conditions.threads),
    }


def subject(case: Case) -> tuple[Any, Callable[[], Any]]:
    """A case's model with trained-like weights, and one forward or training step of it."""
    with torch.device(case.device):  # initializing a whole backbone on the CPU takes seconds
        model = build(case)
    model = model.to(case.device, getattr(torch, case.dtype)).train(case.mode == "train")
    if case.mode == "forward":
        model.fuse()  # as whoever only samples does
    run: Any = WholeLayer(model) if isinstance(model, Attention) else model
    if case.compiled:
        if case.kind == "backbone":  # blocks are alike: one graph serves all of them
            for block in run.blocks:
                block.compile(fullgraph=True)
        else:
            run = torch.compile(run, fullgraph=True)
    return model, step_of(run, _inputs(case, model), case.mode)


def check_layers(case: Case) -> dict[str, Any]:
    """``check_layer`` for the layer that a case times; of a mixture the worst of each figure."""
    found: dict[str, Any] = {}
    for name in names_in(case.mechanism):
        options = layer_options(case, name)
        one = check_layer(name, options, case.width, case.dtype, case.device, case.side)
        found |= {key: max(z, found[key]) if key in found else z for key, z in one.items()}
    return found


def layer_options(case: Case, name: str | None = None) -> dict[str, Any]:
    """The options of the layer that a case times, with those that a backbone's size brings.

    Args:
        case: Which.
        name: Of a mixture, the mechanism.
    """
    if case.kind != "backbone":
        return dict(case.options)
    config = _on_meta(case).config
    pattern, name = parse_pattern(config.attn), name or case.mechanism
    own = pattern.options_of(config.attn_options)[name]
    return {**own, "num_heads": pattern.heads_of(config.num_heads)[name]}


def _on_meta(case: Case) -> Any:
    with torch.device("meta"):
        return build(case)


def build(case: Case) -> Any:
    """A layer, or the shared backbone of the controlled protocol: equal depth, heads and MLP."""
    options = nested(dict(case.options))
    if case.kind != "backbone":
        return attnzoo.build_attention(case.mechanism, case.width, **options)
    model = build_backbone(
        case.mechanism, SIZES[case.width], "controlled", case.resolution, attn_options=options
    )
    with torch.no_grad():  # zeroed gates would make every block the identity
        for parameter in model.parameters():
            if not parameter.is_meta and not parameter.any():
                parameter.normal_(std=0.02)
    return model


def _inputs(case: Case, model: torch.nn.Module) -> tuple[Any, ...]:
    like: dict[str, Any] = {"device": case.device, "dtype": getattr(torch, case.dtype)}
    if isinstance(model, Attention):
        x = torch.randn(1, case.tokens, case.width, **like)
        return x.requires_grad_(case.mode == "train"), case.grid
    return (
        torch.randn(1, 4, case.side * 2, case.side * 2, **like),
        torch.full((1,), 500.0, device=case.device),
        torch.zeros(1, dtype=torch.int64, device=case.device),
        False,
    )


def step_of(run: Callable[..., Any], inputs: tuple[Any, ...], mode: str) -> Callable[[], Any]:
    """One forward under no_grad, or one forward and backward from clean gradients."""

    def forward() -> Tensor:
        out = run(*inputs)
        return out[0] if isinstance(out, tuple) else out

    if mode == "forward":
        return torch.no_grad()(forward)
    # With gradients, or torch.compile would compile a forward that nobody wants.
    cotangent = torch.randn_like(forward()).detach()
    learned = list(run.parameters()) if isinstance(run, torch.nn.Module) else []
    learned += [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]

    def train() -> None:
        for tensor in learned:
            tensor.grad = None
        forward().backward(cotangent)

    return train


def peer_steps(case: Case, layer: Attention, names: Iterable[str]) -> tuple[Steps, dict[str, Any]]:
    """Steps of these peers of a layer, on its weights, each compared with it.

    Whether a peer runs is found by calling it: a package that imports may have no kernel here,
    and one in a state that nobody foresaw may raise anything.

    Returns:
        The steps, and for the record "peer_errors" and, with reasons, "peers_missing".

    Raises:
        WrongResult: A peer computes something else.
        Unsupported: None of them runs here.
    """
    inputs, side = _inputs(case, layer), min(case.side, 8)
    x = inputs[0][:, : side**2].detach()
    calls: Steps = {}
    errors: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name in names:
        try:
            peer = PEERS[layer.name][name](layer)
            with torch.no_grad():
                found, expected = (model(x, (side, side)) for model in (peer, layer))
            errors[name] = require_close(name, found, expected)
            step = step_of(peer, inputs, case.mode)
            step()
        except WrongResult:
            raise
        except (Exception, SystemExit) as error:
            missing[name] = one_line(error)
        else:
            calls[name] = step
    if not calls:
        raise Unsupported(f"no peer of {case.mechanism} runs here: {missing}")
    return calls, {"peer_errors": errors, "peers_missing": missing}


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
