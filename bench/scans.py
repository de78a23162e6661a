"""Times the scans of state-space mechanisms against each other: ``python -m bench.scans``.

Mamba's selective scan by PyTorch's operators, its loop over tokens, and Mamba-2's scan, in turn in
one process; the widths are those inside a layer of width 384.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.ops.selective_scan import selective_scan
from attnzoo.ops.ssd_scan import ssd_scan
from bench.machine import commit, describe, keep_freed_memory
from bench.timing import interleave, ratio, spread, stopwatch_for
from recipes.lab.files import write_json

SIZES = ((64, 8), (256, 4), (1024, 1), (4096, 1))  # tokens, images
WIDTH, HEAD = 768, 64


def main(arguments: list[str] | None = None) -> list[dict]:
    """Prints a table of times and ratios; returns its rows."""
    parser = argparse.ArgumentParser("python -m bench.scans", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    rows = []
    print("| tokens x images | mode | torch | loop / torch | torch / SSD |\n|---|---|---|---|---|")
    for tokens, images in SIZES:
        for train in (False, True):
            calls = _calls(tokens, images, train, options.device)
            stopwatch, clock = stopwatch_for(options.device, options.threads)
            seconds = interleave(calls, stopwatch, options.rounds)
            row = {"tokens": tokens, "images": images, "mode": "train" if train else "forward"}
            row |= {f"{name} seconds": spread(times) for name, times in seconds.items()}
            row["loop / torch"] = ratio(seconds["loop"], seconds["torch"])
            row["torch / SSD"] = ratio(seconds["torch"], seconds["SSD"])
            rows.append(row | {"clock": clock})
            shown = [f"{row[name]['median']:.2f}" for name in ("loop / torch", "torch / SSD")]
            milliseconds = f"{1e3 * row['torch seconds']['median']:.1f} ms"
            print(f"| {tokens} x {images} | {row['mode']} | {milliseconds} | {shown[0]} | "
                  f"{shown[1]} |", flush=True)  # fmt: skip
    if options.out:
        about = describe(options.device, options.threads)
        write_json(options.out, {**about, "commit": commit(), "width": WIDTH, "rows": rows})
    return rows


def _calls(tokens: int, images: int, train: bool, device: str) -> dict[str, Callable[[], None]]:
    draw = torch.Generator().manual_seed(0)

    def normal(*widths: int) -> Tensor:
        return torch.randn(images, tokens, *widths, generator=draw).to(device)

    rates = torch.arange(1.0, 17).expand(WIDTH, -1).to(device)
    steps, heads = F.softplus(normal(WIDTH) - 4), WIDTH // HEAD
    selective = normal(WIDTH), steps, -rates, normal(16), normal(16)
    gates = -F.softplus(normal(heads) - 2)
    dual = normal(heads, HEAD), gates, normal(128), normal(128)

    def step(scan: Callable[..., Tensor], operands: tuple[Tensor, ...]) -> None:
        leaves = [z.detach().requires_grad_(train) for z in operands]
        with torch.set_grad_enabled(train):
            out = scan(*leaves)
        if train:
            out.sum().backward()

    loop = functools.partial(selective_scan, impl="reference")
    calls = {"torch": (selective_scan, selective), "loop": (loop, selective)}
    calls["SSD"] = (ssd_scan, dual)
    return {name: functools.partial(step, *pair) for name, pair in calls.items()}


if __name__ == "__main__":
    main()
