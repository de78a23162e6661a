"""Interleaved rounds, a clock that waits for the device, and the spread of what they give."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from backbones.recorded import captured

# A round shorter than this repeats its call, so that the clock's own cost vanishes.
SHORTEST_ROUND = 2e-3

Calls = Mapping[str, Callable[[], Any]]
# Calls a function that often and returns the seconds of one call.
Stopwatch = Callable[[Callable[[], Any], int], float]


def stopwatch_for(device: str, threads: int) -> tuple[Stopwatch, str]:
    """The stopwatch and the name of its clock.

    On a CPU with one thread the clock is the process's CPU time, which other processes on the
    machine disturb far less than they disturb wall time.
    """
    if device == "cuda":
        return between_events, "CUDA events"
    clock = time.process_time if threads == 1 else time.perf_counter

    def watch(call: Callable[[], Any], repeats: int) -> float:
        start = clock()
        for _ in range(repeats):
            call()
        return (clock() - start) / repeats

    return watch, "process CPU time" if threads == 1 else "wall time"


def between_events(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of one call on a GPU, of so many in a row, as in a loop of steps.

    A call before the first event keeps the device busy while the host starts the next one:
    else a step that fills a round by itself would be timed with the host's part.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    call()
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def recorded(contestants: Calls) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Each call as a CUDA graph, whose replay takes the device's own time, without the host's.

    Returns:
        The replays by name, and why others cannot be recorded: a call that waits for the host,
        for instance.
    """
    replays: dict[str, Callable[[], Any]] = {}
    missing: dict[str, str] = {}
    for name, call in contestants.items():
        try:
            graph, _ = captured(call)
            graph.replay()
            torch.cuda.synchronize()
        except RuntimeError as error:
            missing[name] = " ".join(str(error).split())[:120] or type(error).__name__
        else:
            replays[name] = graph.replay
    return replays, missing


def interleave(
    contestants: Calls,
    stopwatch: Stopwatch,
    rounds: int = 7,
    seconds: float = float("inf"),
    least: int = 3,
) -> dict[str, list[float]]:
    """Times every contestant once per round, in turn, so that all see the same machine.

    Args:
        contestants: What to call, by name.
        stopwatch: See ``stopwatch_for``.
        rounds: Most rounds.
        seconds: Wall time after which no round beyond ``least`` starts.
        least: Fewest rounds.

    Returns:
        For each contestant its seconds per call, one number per round.
    """
    repeats = {}
    for name, call in contestants.items():
        call()  # allocates, compiles, picks kernels
        taken = max(stopwatch(call, 1), 1e-9)
        repeats[name] = max(1, min(1000, round(SHORTEST_ROUND / taken)))
    durations: dict[str, list[float]] = {name: [] for name in contestants}
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= least and time.perf_counter() - begin > seconds:
            break
        for name, call in contestants.items():
            durations[name].append(stopwatch(call, repeats[name]))
    return durations


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    found = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return dict(zip(("q1", "median", "q3"), found, strict=True))


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratios of each round."""
    return {**spread(np.divide(numerator, denominator).tolist()), "rounds": len(numerator)}


@dataclasses.dataclass(frozen=True)
class Race:
    """Seconds of every round of calls timed in turn."""

    launched: dict[str, list[float]]  # with the host's part
    device: dict[str, list[float]]  # the device's own time, of those that could be recorded
    missing: dict[str, str]  # why others could not be recorded, or not even started

    def over(self, upper: str, lower: str) -> tuple[dict[str, float] | None, str]:
        """The ratio of two times, of the device where both are known, and which it is in words."""
        reasons = [f"{n}: {self.missing[n]}" for n in (upper, lower) if n in self.missing]
        if upper not in self.launched or lower not in self.launched:
            return None, "; ".join(reasons)
        launched = ratio(self.launched[upper], self.launched[lower])
        if upper in self.device and lower in self.device:
            on_device = ratio(self.device[upper], self.device[lower])
            return on_device, f"device time; launched {launched['median']:.3g}"
        return launched, "; ".join(["launched", *reasons] if self.device or reasons else [])

    def fastest(self, names: str | list[str]) -> str:
        """Of several contestants the fastest that ran, by the device's time where it is known."""
        several = [names] if isinstance(names, str) else names
        ran = [name for name in several if name in self.launched]
        times = {n: statistics.median(self.device.get(n, self.launched[n])) for n in ran}
        return min(times, key=lambda name: times[name]) if times else several[0]


def race(calls: Calls, device: str, threads: int, missing: Mapping[str, str], **pace: Any) -> Race:
    """``interleave``, and on a GPU once more without the host, as replays of CUDA graphs.

    ``missing`` says why other contestants could not start.
    """
    stopwatch, _ = stopwatch_for(device, threads)
    launched = interleave(calls, stopwatch, **pace)
    replays, unrecorded = recorded(calls) if device == "cuda" else ({}, {})
    return Race(launched, interleave(replays, stopwatch, **pace), {**missing, **unrecorded})


class ReplayClock:
    """Lets pytest-benchmark store rounds that were timed in another process.

    pytest-benchmark reads the clock around each call of its target; the target here only moves
    the clock on by the round's duration.
    """

    __name__ = "rounds of the case's own process"
    now = 0.0

    def __call__(self) -> float:
        return self.now

    def replay(self, benchmark: Any, durations: Sequence[float]) -> None:
        """Gives ``benchmark`` these rounds."""
        left = iter(durations)

        def restart() -> None:  # a large clock would round a small duration off
            self.now = 0.0

        def advance() -> None:
            self.now += next(left)

        benchmark.pedantic(advance, setup=restart, rounds=len(durations))


replay_clock = ReplayClock()
