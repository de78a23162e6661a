"""What the measurements of the goals share."""

from __future__ import annotations

import dataclasses
import math
import statistics
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch

from attnzoo.contract import Attention
from bench.checks import check_gradients, check_layer
from bench.goals import Row
from bench.timing import interleave, ratio, recorded, stopwatch_for
from bench.worker import step_of

N = 4096
LINEAR = ("agent", "dig", "dydila", "dydila-map", "edit", "focused", "gated", "lit", "sana")
Calls = dict[str, Callable[[], Any]]


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
        if upper not in self.launched or lower not in self.launched:
            return None, "; ".join(self._reasons(upper, lower))
        launched = ratio(self.launched[upper], self.launched[lower])
        if upper in self.device and lower in self.device:
            told = f"device time; launched {launched['median']:.3g}"
            return ratio(self.device[upper], self.device[lower]), told
        return launched, "; ".join(["launched", *self._reasons(upper, lower)])

    def _reasons(self, *names: str) -> list[str]:
        return [f"{name}: {self.missing[name]}" for name in names if name in self.missing]

    def median(self, name: str) -> float:
        """Of the device's time if it is known, else of the launched one."""
        return statistics.median(self.device.get(name, self.launched[name]))


class Found:
    """Collects the rows of one goal, and the checks that stood before them."""

    def __init__(self, goal: str, device: str) -> None:
        self.goal, self.device = goal, device
        self.stopwatch, self.timer = stopwatch_for(device, threads=1)
        self.rows: list[Row] = []
        self.rounds: list[float] = []
        self.checks: dict[str, Any] = {}

    def time(self, calls: Mapping[str, Callable[[], Any]], rounds: int = 9) -> dict[str, Any]:
        """Seconds of every round, interleaved."""
        times = interleave(calls, self.stopwatch, rounds, seconds=40.0, least=7)
        self.rounds = self.rounds or next(iter(times.values()))
        return times

    def race(
        self, calls: Mapping[str, Callable[[], Any]], failed: Mapping[str, str] | None = None
    ) -> Race:
        """Launched times, and the device's own of what can be recorded as a CUDA graph.

        Args:
            calls: The contestants.
            failed: Why others could not start.
        """
        launched = interleave(calls, self.stopwatch, rounds=25, seconds=0.6, least=7)
        self.rounds = self.rounds or next(iter(launched.values()), [])
        if self.device != "cuda":
            return Race(launched, {}, dict(failed or {}))
        replays, missing = recorded(calls)
        device = interleave(replays, self.stopwatch, rounds=25, seconds=0.6, least=7)
        return Race(launched, device, {**(failed or {}), **missing})

    def check(self, mechanism: str, dim: int, dtype: str = "float32", **options: Any) -> None:
        """The twin check; raises if the fast path is wrong."""
        found = check_layer(mechanism, options, dim, dtype, self.device, 12)
        self.checks[f"{mechanism} d{dim}"] = found
        if self.device == "cuda":
            error = check_gradients(mechanism, options, dim, self.device)
            self.checks[f"{mechanism} d{dim}, training step in float32"] = error

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

    def compare(
        self,
        what: str,
        race: Race,
        upper: str,
        lower: str,
        better: Literal["higher", "lower"],
        owed: float,
        aim: float,
        note: str = "",
    ) -> None:
        """Adds a row of one contestant's time over another's, and says which time it is."""
        value, told = race.over(upper, lower)
        self.add(what, value, better, owed, aim, "; ".join(text for text in (note, told) if text))


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
