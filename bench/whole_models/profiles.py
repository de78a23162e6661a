"""What a step of ``bench.whole_models`` consists of: kernels, by name, and the gaps between."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from attnzoo.errors import Unavailable
from bench.timing import interleave, spread
from bench.whole_models.cases import Calls, Case, Layer, Setup
from bench.whole_models.measures import stopwatch

_REPLAYS = 4
_LONGEST = 12  # kernels that are named
_NAME = 160  # letters; a template's arguments may fill a page


def measure_profile(case: Case | Layer, setup: Setup) -> dict[str, Any]:
    """Times a step under each treatment, and its kernels one by one.

    On a CPU, which has no kernels, operators stand for them, each without those that it calls.

    Args:
        case: A whole model, or a layer.
        setup: Where.

    Raises:
        WrongStep: No treatment works.
        Unavailable: The profiler sees nothing.
    """
    # A first start of the profiler takes long, and is over before anything is recorded.
    _spent(lambda: torch.zeros(1, device=setup.device), setup.device)
    calls = Calls(case, setup)
    calls.require_one()
    # Without the profiler, which adds to what a launch costs.
    rounds = interleave(calls.steps, stopwatch(setup), 9, setup.seconds / 3)
    seconds = {name: spread(taken) for name, taken in rounds.items()}
    return {
        **dataclasses.asdict(case), "seconds": seconds,
        **({"resolution": case.resolution, "batch": case.batch} if isinstance(case, Case) else {}),
        "profiles": {
            name: _parts(step, seconds[name]["median"], setup.device)
            for name, step in calls.steps.items()
        },
        "errors": calls.errors, "missing": calls.missing,
    }  # fmt: skip


def _parts(step: Callable[[], Any], total: float, device: str) -> dict[str, Any]:
    seen = _spent(step, device)
    if not seen:
        raise Unavailable("the profiler sees no kernel; the driver may keep counters from users")
    kinds = {"memsets": "Memset", "copies": "Memcpy"}
    found: dict[str, Any] = {
        kind: sum(count for name, (count, _) in seen.items() if name.startswith(start))
        for kind, start in kinds.items()
    }
    busy = sum(spent for _, spent in seen.values())
    longest = sorted(seen.items(), key=lambda item: -item[1][1])[:_LONGEST]
    return found | {
        "kernels": sum(count for count, _ in seen.values()) - sum(found.values()),
        # On one stream nothing overlaps, so that what is left of the total is waiting.
        "busy": busy, "gaps": total - busy,
        "longest": [(name[:_NAME], *both) for name, both in longest],
    }  # fmt: skip


def _spent(step: Callable[[], Any], device: str) -> dict[str, tuple[float, float]]:
    """How often one step runs what, and for how many seconds, by name."""
    is_gpu = device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if is_gpu else ProfilerActivity.CPU]) as seen:
        for _ in range(_REPLAYS):
            step()
        if is_gpu:  # what still runs when the profiler stops is lost
            torch.cuda.synchronize()
    found: dict[str, tuple[float, float]] = {}
    for event in seen.events() or ():
        # The host's calls into CUDA are events of the CPU; ranges that a program names are none.
        if event.device_type.name != device.upper():
            continue
        if not event.is_user_annotation:
            micros = event.time_range.elapsed_us() if is_gpu else event.self_cpu_time_total
            count, spent = found.get(event.name, (0.0, 0.0))
            found[event.name] = count + 1 / _REPLAYS, spent + micros * 1e-6 / _REPLAYS
    return found
