"""The goals of single operators: routing, power map, gated scan, convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import attnzoo
from attnzoo.layers.depthwise_conv import DepthwiseConv
from attnzoo.ops.gated_scan import gated_linear_attention
from attnzoo.ops.gated_scan import reference as recurrences
from attnzoo.ops.power_map import power_map
from attnzoo.ops.routed_linear import routed_linear
from bench.checks import WrongResult, relative_error
from bench.goal_tools import Calls, Found, Function, N, layer_call, linear_call, projectors
from bench.timing import ratio
from bench.worker import step_of


def routed_against_linear(found: Found) -> None:
    for dim in (384, 768):
        for mode, dtype, owed, aim in (
            ("forward", torch.float32, 0.88, 0.96),
            ("train", torch.float32, 0.88, 0.96),
            ("forward", torch.bfloat16, 0.70, 0.88),
        ):
            calls: Calls = {"linear": linear_call(found, dim, N, mode, dtype)}
            for kind in ("uniform", "skewed"):
                index = _index(kind, projectors(dim)).to(found.device)
                calls[kind] = _routed_call(found, dim, mode, dtype, index, routed_linear)
            times = found.time(calls)
            short = "bf16" if dtype == torch.bfloat16 else "fp32"
            what = f"routed over nn.Linear, speed, {mode}, d={dim}, {short}"
            found.add(what, ratio(times["linear"], times["uniform"]), "higher", owed, aim)
            found.add(f"skewed over uniform routing, time, {mode}, d={dim}, {short}",
                      ratio(times["skewed"], times["uniform"]), "lower", 1.05, 1.02)  # fmt: skip


def _index(kind: str, experts: int) -> torch.Tensor:
    if kind == "uniform":
        return torch.randint(experts, (N,))
    shares = 0.5 ** torch.arange(1.0, experts + 1)
    return torch.multinomial(shares, N, replacement=True)


def _routed_call(
    found: Found, dim: int, mode: str, dtype: Any, index: torch.Tensor, project: Any
) -> Callable[[], Any]:
    weight = torch.randn(projectors(dim), dim, dim, device=found.device, dtype=dtype) * dim**-0.5
    x = torch.randn(N, dim, device=found.device, dtype=dtype).requires_grad_(mode == "train")
    if project is routed_linear:
        with torch.no_grad():
            small = slice(0, 256)
            exact = routed_linear(
                x[small].double(), weight.double(), index[small], impl="reference"
            )
            error = relative_error(routed_linear(x[small], weight, index[small]), exact)
        if not error < 5 * torch.finfo(dtype).eps:
            raise WrongResult(f"routed_linear is off by {error:.1e}")
        found.checks[f"routed_linear d{dim} {dtype}"] = error
    module = Function(lambda x, weight: project(x, weight, index), weight=weight)
    return step_of(module, (x,), mode)


def routed_against_all(found: Found) -> None:
    for dim, owed, aim in ((384, 2.6, 2.9), (768, 5.8, 6.7)):
        index = _index("uniform", projectors(dim)).to(found.device)
        calls = {
            name: _routed_call(found, dim, "forward", torch.float32, index, project)
            for name, project in (("all", _all_projectors), ("routed", routed_linear))
        }
        times = found.time(calls)
        what = f"times faster than all {projectors(dim)} projectors, forward, d={dim}"
        found.add(what, ratio(times["all"], times["routed"]), "higher", owed, aim)


def _all_projectors(x: torch.Tensor, weight: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """One product with all weights side by side, then a gather: the fastest dense form."""
    everything = (x @ weight.transpose(0, 1).flatten(1)).unflatten(1, (weight.shape[0], -1))
    chosen = index[:, None, None].expand(-1, 1, weight.shape[2])
    return everything.gather(1, chosen).squeeze(1)


def power_map_against_linear(found: Found) -> None:
    dim = 384
    x = F.relu(torch.randn(1, N, dim, device=found.device))
    gamma = torch.full((1, N, 1), 3.0, device=found.device)
    error = relative_error(
        power_map(x, gamma), power_map(x.double(), gamma.double(), impl="reference")
    )
    if not error < 2e-6:
        raise WrongResult(f"power_map is off by {error:.1e}")
    found.checks["power_map"] = error
    for mode in ("forward", "train"):
        calls: Calls = {"linear": linear_call(found, dim, N, mode, torch.float32)}
        for name, function in (("map", power_map), ("pow", _autograd_pow)):
            module = Function(lambda z, g, f=function: f(z, g), g=gamma.clone())
            z = x.clone().requires_grad_(mode == "train")
            calls[name] = step_of(module, (z,), mode)
        times = found.time(calls)
        found.add(f"power map in linears, {mode}", ratio(times["map"], times["linear"]),
                  "lower", 0.30, 0.07)  # fmt: skip
        if mode == "train":
            found.add("times faster than autograd's pow, train",
                      ratio(times["pow"], times["map"]), "higher", 3.0, 3.0)  # fmt: skip
    found.add("scales from 1e-20 to 1e15 with a non-finite value or gradient",
              float(sum(not _is_finite(10.0**power, x) for power in range(-20, 16))),
              "lower", 0, 0)  # fmt: skip


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


def gated_against_recurrence(found: Found) -> None:
    recurrence: Any = recurrences.gated_linear_attention
    scan: Any = gated_linear_attention
    operands = [torch.randn(1, 6, 4096, 32, device=found.device) for _ in range(3)]
    mild = F.logsigmoid(torch.randn(1, 6, 4096, 32, device=found.device)) / 16
    # The recurrence in float64 on gates from 0 to -100 per token tells the error.
    steep = -100 * torch.rand(1, 6, 256, 32, device=found.device) ** 8
    short = [z[:, :, :256] for z in operands]
    exact = recurrence(*(z.double() for z in (*short, steep)))
    for impl in ("torch", "auto"):
        error = relative_error(scan(*short, steep, impl), exact)
        found.add(f"relative error, log-gates down to -100, {impl}", error, "lower", 2e-6, 2e-6)
    calls: Calls = {"recurrence": step_of(recurrence, (*operands, mild), "forward")}
    for impl in ("torch", "auto"):
        calls[impl] = step_of(lambda *z, impl=impl: scan(*z, impl), (*operands, mild), "forward")
    times = found.time(calls, rounds=7)
    for impl, owed, aim in (("torch", 5.0, 9.0), ("auto", 8.0, 9.0)):
        found.add(f"times faster than the recurrence, {impl}, B1 H6 T4096 K32, forward",
                  ratio(times["recurrence"], times[impl]), "higher", owed, aim)  # fmt: skip
    inputs = [z[:, :, :1024].repeat(2, 1, 1, 1).requires_grad_() for z in (*operands, mild)]
    times = found.time(
        {"recurrence": step_of(recurrence, tuple(inputs), "train"),
         "auto": step_of(scan, tuple(inputs), "train")}, rounds=7,
    )  # fmt: skip
    found.add("times faster than the O(T) recurrence, auto, B2 H6 T1024 K32, train",
              ratio(times["recurrence"], times["auto"]), "higher", 8.0, 12.0)  # fmt: skip


def compressed_against_softmax(found: Found) -> None:
    dim, grid = 384, (64, 64)
    found.check("compressed", dim, layers="all")
    compressed: Any = attnzoo.build_attention("compressed", dim, layers="all")
    calls = {"softmax": layer_call(found, attnzoo.build_attention("softmax", dim), N),
             "compressed": layer_call(found, compressed, N)}  # fmt: skip
    times = found.time(calls)
    found.add("times faster than SDPA, n=4096, forward, d=384",
              ratio(times["softmax"], times["compressed"]), "higher", 2.5, 2.75)  # fmt: skip
    x = torch.randn(1, N, dim, device=found.device)
    conv = DepthwiseConv(dim, "3x3").to(found.device).eval()
    times = found.time(
        {"linear": linear_call(found, dim, N, "forward", torch.float32),
         "conv": step_of(conv, (x, grid), "forward"),
         "compression": step_of(compressed.compress, (x, grid), "forward")}, rounds=15,
    )  # fmt: skip
    for name, what in (("conv", "3x3 depthwise convolution"), ("compression", "compression")):
        found.add(f"{what} in linears, forward, d=384", ratio(times[name], times["linear"]),
                  "lower", 0.06, 0.03)  # fmt: skip
