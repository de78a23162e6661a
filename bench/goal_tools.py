"""What the measurements of the goals share."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch

import attnzoo
from attnzoo.contract import Attention
from bench.checks import check_layer
from bench.goals import Row
from bench.timing import clock_for, interleave
from bench.worker import step_of

N = 4096
LINEAR = ("agent", "dig", "dydila", "dydila-map", "edit", "focused", "gated", "lit", "sana")
Calls = dict[str, Callable[[], Any]]


class Found:
    """Collects the rows of one goal, and the checks that stood before them."""

    def __init__(self, goal: str, device: str) -> None:
        self.goal, self.device = goal, device
        self.clock, self.timer = clock_for(device, threads=1)
        self.rows: list[Row] = []
        self.rounds: list[float] = []
        self.checks: dict[str, Any] = {}

    def time(self, calls: Mapping[str, Callable[[], Any]], rounds: int = 9) -> dict[str, Any]:
        """Seconds of every round, interleaved."""
        times = interleave(calls, self.clock, rounds, seconds=40.0, least=7)
        self.rounds = self.rounds or next(iter(times.values()))
        return times

    def check(self, mechanism: str, dim: int, **options: Any) -> None:
        """The twin check; raises if the fast path is wrong."""
        found = check_layer(mechanism, options, dim, "float32", self.device, 12)
        self.checks[f"{mechanism} d{dim}"] = found

    def add(
        self,
        what: str,
        value: dict[str, float] | float | None,
        better: Literal["higher", "lower"],
        owed: float,
        aim: float,
        note: str = "",
    ) -> None:
        """Adds a row; a dictionary is what ``ratio`` gives."""
        spread = value if isinstance(value, dict) else {}
        middle = value["median"] if isinstance(value, dict) else value
        self.rows.append(
            Row(goal=self.goal, what=what, value=middle, q1=spread.get("q1"),
                q3=spread.get("q3"), owed=owed, aim=aim, better=better, note=note)
        )  # fmt: skip


def projectors(dim: int) -> int:
    """n_P of the paper's model of this width."""
    return {384: 3, 512: 5, 768: 7}[dim]


def dydila_options(dim: int) -> dict[str, int]:
    """The paper's options at this width."""
    count = projectors(dim)
    return {
        "n_projectors": count, "n_kernel_factors": 3 * count, "n_differential_factors": 3 * count,
    }  # fmt: skip


def layer_call(
    found: Found, layer: Attention, n: int, mode: str = "forward", dtype: Any = torch.float32
) -> Callable[[], Any]:
    """One forward or training step of a layer on n tokens of one square image."""
    layer = layer.to(found.device, dtype).train(mode == "train")
    if mode == "forward":
        layer.fuse()
    x = torch.randn(1, n, layer.dim, device=found.device, dtype=dtype)
    side = math.isqrt(n)
    return step_of(layer, (x.requires_grad_(mode == "train"), (side, n // side)), mode)


def linear_call(found: Found, dim: int, n: int, mode: str, dtype: Any) -> Callable[[], Any]:
    """nn.Linear(d, d): the unit "linear"."""
    layer = torch.nn.Linear(dim, dim, bias=False).to(found.device, dtype)
    x = torch.randn(n, dim, device=found.device, dtype=dtype).requires_grad_(mode == "train")
    return step_of(layer, (x,), mode)


class Function(torch.nn.Module):
    """A function and the tensors whose gradients it needs."""

    def __init__(self, function: Callable[..., Any], **parameters: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        self.held = torch.nn.ParameterDict(parameters)

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs, **dict(self.held.items()))


def slope(sizes: typing.Sequence[float], values: typing.Sequence[float]) -> float:
    """Least-squares slope of log value over log size."""
    xs, ys = [math.log(n) for n in sizes], [math.log(v) for v in values]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    covariance = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True))
    return covariance / sum((a - x) ** 2 for a in xs)


def option_named(mechanism: str, word: str) -> dict[str, Any] | None:
    """The option that asks for an implementation, by part of its name; None if there is none."""
    config = attnzoo.get_attention(mechanism).Config
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        values = [v for v in typing.get_args(hints[field.name]) if isinstance(v, str)]
        for value in values:
            if field.name == "impl" and word in value:
                return {"impl": value}
        if word in field.name:
            return {field.name: True if hints[field.name] is bool else 1024}
    return None
