"""Exact peak memory of one call, and the operators it ran."""

from __future__ import annotations

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


def peak_memory(call: Callable[[], Any], device: str) -> dict[str, Any]:
    """Runs ``call`` once, on CUDA twice.

    On CPU the profiler reports every allocation of every operator, which is exact to the byte and
    free of the noise of resident memory; on CUDA the caching allocator keeps the maximum itself.

    Returns:
        "peak_memory": the largest sum of live tensors, above what lived before, in bytes;
        "allocated": bytes of all tensors that were made, one after the other; "memory_method";
        "operators": attention kernels and custom operators among those that ran.
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
        return _found(peak, total, "torch.cuda.max_memory_allocated", profiler)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [e for e in _events(profiler) if e.name() == "[memory]"]
    now = peak = total = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
        total += max(0, event.nbytes())
    return _found(peak, total, "profiler, every allocation", profiler)


def _events(profiler: profile) -> list[Any]:
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    return profiler.profiler.kineto_results.events()


def _found(peak: int, total: int, method: str, profiler: profile) -> dict[str, Any]:
    names = {event.name().removeprefix("aten::") for event in _events(profiler)}
    # The first is the front door, not what ran.
    telling = {n for n in names - {"scaled_dot_product_attention"} if _TELLING.fullmatch(n)}
    return {"peak_memory": peak, "allocated": total, "memory_method": method,
            "operators": sorted(telling)}  # fmt: skip
