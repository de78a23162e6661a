"""Exact peak memory of one call, and the operators it ran."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# The operators that tell which implementation ran; the rest are shared by all.
_TELLING = re.compile(
    r"_?scaled_dot_product_\w+|_flash_attention\w*|_efficient_attention\w*|_grouped_mm"
    r"|(attnzoo|flash_attn|xformers\w*|fla)::\w+"
)


@dataclasses.dataclass(frozen=True)
class Peak:
    """What one call took."""

    bytes: int  # largest sum of live tensors, above what lived before the call
    allocated: int  # bytes of all tensors that the call made, one after the other
    method: str  # how it was found
    operators: tuple[str, ...]  # attention kernels and custom operators among those that ran


def peak_memory(call: Callable[[], Any], device: str) -> Peak:
    """Runs ``call`` once.

    On CPU the profiler reports every allocation of every operator, which is exact to the byte and
    free of the noise of resident memory; on CUDA the caching allocator keeps the maximum itself.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        total = torch.cuda.memory_stats()["allocated_bytes.all.allocated"]
        call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        total = torch.cuda.memory_stats()["allocated_bytes.all.allocated"] - total
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            call()
        return Peak(peak, total, "torch.cuda.max_memory_allocated", _operators(profiler))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [e for e in _events(profiler) if e.name() == "[memory]"]
    now = peak = total = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
        total += max(0, event.nbytes())
    return Peak(peak, total, "profiler, every allocation", _operators(profiler))


def _events(profiler: profile) -> list[Any]:
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    return profiler.profiler.kineto_results.events()


def _operators(profiler: profile) -> tuple[str, ...]:
    names = {event.name().removeprefix("aten::") for event in _events(profiler)}
    telling = {name for name in names if _TELLING.fullmatch(name)}
    telling.discard("scaled_dot_product_attention")  # the front door, not what ran
    return tuple(sorted(telling))
