"""Interleaved rounds, a clock that waits for the device, and the spread of what they give."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

# A round shorter than this repeats its call, so that the clock's own cost vanishes.
SHORTEST_ROUND = 2e-3


def clock_for(device: str, threads: int) -> tuple[Callable[[], float], str]:
    """The clock and its name.

    On CUDA it waits for the queued work. On a CPU with one thread it is the process's CPU time,
    which other processes on the machine disturb far less than they disturb wall time.
    """
    if device == "cuda":

        def synchronised() -> float:
            torch.cuda.synchronize()
            return time.perf_counter()

        return synchronised, "wall time, synchronised"
    if threads == 1:
        return time.process_time, "process CPU time"
    return time.perf_counter, "wall time"


def interleave(
    contestants: Mapping[str, Callable[[], Any]],
    clock: Callable[[], float],
    rounds: int = 7,
    seconds: float = float("inf"),
    least: int = 3,
) -> dict[str, list[float]]:
    """Times every contestant once per round, in turn, so that all see the same machine.

    Args:
        contestants: What to call, by name.
        clock: See ``clock_for``.
        rounds: Most rounds.
        seconds: Wall time after which no round beyond ``least`` starts.
        least: Fewest rounds.

    Returns:
        For each contestant its seconds per call, one number per round.
    """
    repeats = {}
    for name, call in contestants.items():
        call()  # allocates, compiles, picks kernels
        start = clock()
        call()
        taken = max(clock() - start, 1e-9)
        repeats[name] = max(1, min(1000, round(SHORTEST_ROUND / taken)))
    durations: dict[str, list[float]] = {name: [] for name in contestants}
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= least and time.perf_counter() - begin > seconds:
            break
        for name, call in contestants.items():
            start = clock()
            for _ in range(repeats[name]):
                call()
            durations[name].append((clock() - start) / repeats[name])
    return durations


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratios of each round."""
    values = [a / b for a, b in zip(numerator, denominator, strict=True)]
    low, middle, high = quartiles(values)
    return {"median": middle, "q1": low, "q3": high, "rounds": len(values)}


class ReplayClock:
    """Lets pytest-benchmark store rounds that were timed in another process.

    pytest-benchmark reads the clock around each call of its target; the target here only moves
    the clock on by the round's duration.
    """

    __name__ = "rounds of the cell's own process"

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def replay(self, benchmark: Any, durations: Sequence[float]) -> None:
        """Gives ``benchmark`` these rounds."""
        left = iter(durations)

        def advance() -> None:
            self.now += next(left)

        # From 0 each time: a large clock would round a small duration off.
        benchmark.pedantic(advance, setup=self._restart, rounds=len(durations))

    def _restart(self) -> None:
        self.now = 0.0


replay_clock = ReplayClock()
