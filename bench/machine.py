"""The machine under the measurements: allocator, threads, versions, and what it can do at best."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from bench.timing import interleave, stopwatch_for

PACKAGES = ("torch", "attnzoo", "diffusers", "xformers", "flash-attn", "fla-core", "triton")


def keep_freed_memory() -> str:
    """Tells glibc to keep freed memory; returns the setting in words.

    By default it maps tensors of 32 MB and more anew each time and faults in every page, which
    costs up to a quarter of a linear mechanism's time and nothing of a quadratic one's.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h.
        settings = ((-4, 0), (-1, 2**31 - 1), (-2, 2**28))
        if not all(libc.mallopt(option, value) for option, value in settings):
            return "default (mallopt refused)"
    except (OSError, AttributeError):
        return "default (no glibc)"
    return "glibc, no mmap, no trim, top pad 256 MiB"


def commit(folder: Path = Path(__file__).parent) -> str:
    """A working tree's commit, with "+" if it was changed; "unknown" outside git."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=folder, capture_output=True, text=True, timeout=20,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() or "unknown"


def versions() -> dict[str, str]:
    """Versions of Python and of what computes."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = str(importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            continue
        except Exception as error:  # a half-removed package has metadata that cannot be read
            found[package] = f"unreadable ({type(error).__name__})"
    return found


def describe(device: str, threads: int) -> dict[str, Any]:
    """Where the figures come from."""
    name = platform.processor() or platform.machine()
    if device == "cuda":
        name = torch.cuda.get_device_name()
    elif (cpuinfo := Path("/proc/cpuinfo")).exists():
        lines = cpuinfo.read_text("utf-8", "replace").splitlines()
        models = (line.partition(":")[2].strip() for line in lines if "model name" in line)
        name = next(models, name)
    load = round(os.getloadavg()[0], 2)
    return {"device_name": name, "threads": threads, "load": load, "versions": versions()}


def measure_peaks(device: str, dtypes: tuple[str, ...], threads: int) -> dict[str, float]:
    """GFLOP/s of a square matmul by dtype, and GB/s of a copy ("copy"), read plus write."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    stopwatch, _ = stopwatch_for(device, threads)
    side = 8192 if device == "cuda" else 2048
    peaks: dict[str, float] = {}
    for dtype in dtypes:
        left, right = (
            torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in range(2)
        )
        times = interleave({"mm": lambda a=left, b=right: a @ b}, stopwatch, 5, 4.0)["mm"]
        peaks[dtype] = 2 * side**3 / min(times) / 1e9
    source = torch.randn(2**28 if device == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    times = interleave({"copy": lambda: target.copy_(source)}, stopwatch, 5, 2.0)["copy"]
    peaks["copy"] = 2 * source.nbytes / min(times) / 1e9
    return peaks
