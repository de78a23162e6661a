"""The goals of whole layers, and where each goal of ``bench.goals`` is measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo as dynamo
from torch._dynamo.utils import counters

import attnzoo
from bench import gpu_goals
from bench.goal_parts import (
    compressed_against_softmax,
    gated_against_recurrence,
    power_map_against_linear,
    routed_against_all,
    routed_against_linear,
)
from bench.goal_tools import (
    LINEAR,
    Calls,
    Found,
    N,
    dydila_options,
    layer_call,
    slope,
)
from bench.peak_memory import peak_memory
from bench.peers import contestants_of
from bench.timing import quartiles, ratio
from bench.worker import step_of


def _dydila_over_sana(found: Found) -> None:
    for dim in (384, 768):
        options = dydila_options(dim)
        found.check("dydila", dim, **options)
        found.check("sana", dim)
        for mode in ("forward", "train"):
            dydila = attnzoo.build_attention("dydila", dim, **options)
            sana = attnzoo.build_attention("sana", dim)
            calls = {"dydila": layer_call(found, dydila, N, mode),
                     "sana": layer_call(found, sana, N, mode)}  # fmt: skip
            times = found.time(calls)
            times_sana = ratio(times["dydila"], times["sana"])
            macs = dydila.macs((64, 64)) / sana.macs((64, 64))
            found.add(f"DyDiLA over Sana, time, {mode}, d={dim}", times_sana, "lower", 2.3, 1.97)
            over = {key: v / macs if key != "rounds" else v for key, v in times_sana.items()}
            found.add(f"that over the ratio of MACs, {mode}, d={dim}", over, "lower", 1.16, 1.0,
                      note=f"ratio of MACs {macs:.2f}")  # fmt: skip


def _token_over_map(found: Found) -> None:
    for dim in (384, 768):
        calls: Calls = {}
        for name in ("dydila", "dydila-map"):
            found.check(name, dim, **dydila_options(dim))
            layer = attnzoo.build_attention(name, dim, **dydila_options(dim))
            calls[name] = layer_call(found, layer, N)
        times = found.time(calls)
        found.add(f"times faster, forward, d={dim}", ratio(times["dydila-map"], times["dydila"]),
                  "higher", 1.15, 1.24)  # fmt: skip


def _exponents(found: Found) -> None:
    sizes = (1024, 4096, 16384)
    for name in LINEAR:
        found.check(name, 384)
        for mode in ("forward", "train"):
            calls = {
                str(n): layer_call(found, attnzoo.build_attention(name, 384), n, mode)
                for n in sizes
            }
            times = found.time(calls, rounds=7)
            slopes = [slope(sizes, [times[str(n)][i] for n in sizes]) for i in range(7)]
            low, middle, high = quartiles(slopes)
            found.add(f"exponent of time, {name}, {mode}",
                      {"median": middle, "q1": low, "q3": high}, "lower", 1.05, 1.0)  # fmt: skip
            if mode == "forward":
                peaks = [peak_memory(calls[str(n)], found.device).bytes for n in sizes]
                found.add(f"exponent of peak memory, {name}, forward", slope(sizes, peaks),
                          "lower", 1.02, 1.0)  # fmt: skip


def _peak_of_dydila(found: Found) -> None:
    found.check("dydila", 384)
    for mode, owed, aim in (("forward", 10.5, 7.0), ("train", 17.0, 12.0)):
        call = layer_call(found, attnzoo.build_attention("dydila", 384), N, mode)
        call()
        peak = peak_memory(call, found.device)
        found.add(f"peak memory in tensors of n x d, {mode}", peak.bytes / (N * 384 * 4),
                  "lower", owed, aim, note=peak.method)  # fmt: skip


def _streaming(found: Found) -> None:
    n = 16384
    bars = (("peak over one-shot Sana", 0.35, 0.21), ("time over one-shot DyDiLA", 1.05, 0.90))
    found.check("dydila", 384, stream=32)
    calls = {
        "one-shot": layer_call(found, attnzoo.build_attention("dydila", 384), n),
        "streaming": layer_call(found, attnzoo.build_attention("dydila", 384, stream=2048), n),
        "sana": layer_call(found, attnzoo.build_attention("sana", 384), n),
    }
    peaks = {name: peak_memory(call, found.device).bytes for name, call in calls.items()}
    found.add(bars[0][0], peaks["streaming"] / peaks["sana"], "lower", *bars[0][1:],
              note=f"{peaks['streaming'] / (n * 384 * 4):.2f} tensors of n x d")  # fmt: skip
    times = found.time({name: calls[name] for name in ("one-shot", "streaming")})
    found.add(bars[1][0], ratio(times["streaming"], times["one-shot"]), "lower", *bars[1][1:])


def _against_softmax(found: Found) -> None:
    found.check("dydila", 384)
    medians: dict[int, float] = {}
    for n, rounds in ((576, 15), (1024, 15), (1600, 11), (4096, 9), (16384, 7)):
        calls = {
            name: layer_call(found, attnzoo.build_attention(name, 384), n)
            for name in ("softmax", "dydila")
        }
        times = found.time(calls, rounds)
        faster = ratio(times["softmax"], times["dydila"])
        medians[n] = faster["median"]
        if n in (4096, 16384):
            owed, aim = {4096: (2.5, 3.1), 16384: (9.0, 11.0)}[n]
            found.add(
                f"times faster than SDPA, n={n}, forward, d=384", faster, "higher", owed, aim
            )
    found.add("crossover: tokens from which DyDiLA is faster", _crossover(medians), "lower",
              1300, 1000, note="interpolated between the sizes measured")  # fmt: skip


def _crossover(faster: dict[int, float]) -> float | None:
    """Where the ratio passes 1, by interpolation of its logarithm over log n."""
    points = sorted(faster.items())
    if points[0][1] >= 1:
        return float(points[0][0])
    for (n0, r0), (n1, r1) in itertools.pairwise(points):
        if r0 < 1 <= r1:
            share = -math.log(r0) / (math.log(r1) - math.log(r0))
            return math.exp(math.log(n0) + share * (math.log(n1) - math.log(n0)))
    return None


def _against_diffusers(found: Found) -> None:
    folded = {"impl": "folded"}
    for dim in (384, 768):
        found.check("sana", dim)
        for dtype, owed in ((torch.float32, 1.0), (torch.bfloat16, 0.93)):
            for n in (1024, N) if dtype == torch.float32 else (N,):
                short = "bf16" if dtype == torch.bfloat16 else "fp32"
                what = f"over diffusers' processor, forward, n={n}, d={dim}, {short}"
                found.add(what, _sana_ratio(found, dim, n, dtype, {}), "lower", owed, 0.85)
        found.check("sana", dim, **folded)
        found.add(f"the same with the output projection folded, n={N}, d={dim}, fp32",
                  _sana_ratio(found, dim, N, torch.float32, folded), "lower", 0.96, 0.85,
                  note=f"{folded}")  # fmt: skip


def _sana_ratio(
    found: Found, dim: int, n: int, dtype: torch.dtype, options: dict[str, Any]
) -> dict[str, float]:
    layer = attnzoo.build_attention("sana", dim, **options).to(found.device, dtype).eval()
    ours, peers, missing = contestants_of(layer)
    if "diffusers Sana processor" not in peers:
        raise ImportError(missing["diffusers Sana processor"])
    inputs = (torch.randn(1, n, dim, device=found.device, dtype=dtype), (math.isqrt(n),) * 2)
    theirs = peers["diffusers Sana processor"]
    calls = {name: step_of(f, inputs, "forward") for name, f in (("ours", ours), ("them", theirs))}
    times = found.time(calls, rounds=11)
    return ratio(times["ours"], times["them"])


def _compile(found: Found) -> None:
    found.check("dydila", 96)
    for mode in ("forward", "train"):
        dynamo.reset()
        layer = attnzoo.build_attention("dydila", 96).to(found.device).train(mode == "train")
        run = torch.compile(layer, fullgraph=True)
        counters.clear()
        for seed in range(4):  # other tokens are routed otherwise
            torch.manual_seed(seed)
            x = torch.randn(1, 64, 96, device=found.device).requires_grad_(mode == "train")
            step_of(
                run, (x * 10**seed if seed else x, (8, 8)), "forward"
            )() if mode == "forward" else run(x, (8, 8)).sum().backward()
        breaks = sum(counters["graph_break"].values())
        graphs = counters["stats"]["unique_graphs"]
        found.add(f"graph breaks plus recompilations, {mode}", float(breaks + max(0, graphs - 1)),
                  "lower", 0, 0, note="fullgraph=True, one grid, 4 routings")  # fmt: skip


def _softmax_layer(found: Found) -> None:
    for dim in (384, 768):
        found.check("softmax", dim)
        layer = attnzoo.build_attention("softmax", dim).to(found.device).eval()
        ours, peers, _ = contestants_of(layer)
        inputs = (torch.randn(1, 1024, dim, device=found.device), (32, 32))
        times = found.time(
            {"ours": step_of(ours, inputs, "forward"),
             "bare": step_of(peers["bare SDPA"], inputs, "forward")}, rounds=21,
        )  # fmt: skip
        found.add(f"speed over bare SDPA, n=1024, forward, d={dim}",
                  ratio(times["bare"], times["ours"]), "higher", 0.98, 1.0)  # fmt: skip


_MEASUREMENTS: dict[str, Callable[[Found], None]] = {
    "G1": routed_against_linear,
    "G2": routed_against_all,
    "G3": power_map_against_linear,
    "G4": _dydila_over_sana,
    "G5": _token_over_map,
    "G6": _exponents,
    "G7": _peak_of_dydila,
    "G8": _streaming,
    "G9": _against_softmax,
    "G10": _against_diffusers,
    "G11": gated_against_recurrence,
    "G12": compressed_against_softmax,
    "G13": _compile,
    "G14": _softmax_layer,
    "U1": gpu_goals.dydila_against_sana,
    "U2": gpu_goals.routed_against_linear,
    "U3": gpu_goals.power_map_against_copy,
    "U4": gpu_goals.sana_against_peers,
    "U5": gpu_goals.gated_against_fla,
    "U6": gpu_goals.backbone_against_softmax,
    "U7": gpu_goals.peak_of_training,
}


def measure(goal: str, device: str) -> Found:
    """Measures one goal."""
    found = Found(goal, device)
    _MEASUREMENTS[goal](found)
    return found
