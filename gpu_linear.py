"""Sweeps the blocks of linear attention's kernels, then times layers and stencils (not shipped)."""

import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time

import torch

from attnzoo import build_attention
from attnzoo.ops.depthwise_conv import depthwise_conv
from attnzoo.ops.depthwise_conv import triton as stencils
from attnzoo.ops.linear_core import linear_tokens
from attnzoo.ops.linear_core import triton as kernels
from attnzoo.ops.linear_core.triton import Block

HALF, DEVICE, D = torch.bfloat16, "cuda", 768
PEAK, COPY = 782e12, 3.0e12
START = time.time()
OUT = os.environ.get("OUT", "/tmp")
KINDS = {"narrow": (24, 0), "medium": (6, 1), "wide": (2, 2)}  # heads of 32, 128, 384


def time_us(function, calls=4, budget=0.02):
    """Median device time of one call, replayed from a graph."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    times = []
    stop = time.time() + budget
    while len(times) < 3 or (time.time() < stop and len(times) < 15):
        events[0].record()
        graph.replay()
        events[1].record()
        torch.cuda.synchronize()
        times.append(events[0].elapsed_time(events[1]) * 1e3 / calls)
    return statistics.median(times)


def candidates(kernel, kind):
    if kind == "narrow":
        tiles = [(64, 32, 4), (64, 64, 4), (64, 128, 4), (64, 64, 8), (128, 32, 8), (128, 64, 8)]
    elif kind == "medium":
        tiles = [(128, 32, 4), (128, 32, 8), (128, 64, 8)]
    else:
        tiles = [(128, 64, 4), (128, 64, 8), (128, 128, 8)]
    stages = (1, 2, 3) if kind != "wide" else (2, 3)
    return [Block(w, r, 0, p, s) for (w, r, p), s in itertools.product(tiles, stages)]


def launchers(kind, b, n):
    """Of each kernel: a call of it alone, or nearly."""
    heads, _ = KINDS[kind]
    packed = torch.randn(b, n, 3 * D, device=DEVICE, dtype=HALF)
    q, k, v = packed.chunk(3, -1)
    g = torch.randn(b, n, D, device=DEVICE, dtype=HALF)
    out, state, inverse = kernels._linear_core.function(packed, None, None, heads, True, True, 1e-6)
    calls = {
        "fold": lambda: kernels._fold(k, v, heads, True, HALF),
        "read": lambda: kernels._read(q, state, out, heads, True, True, 1e-6, HALF),
    }
    options = heads, True, True, 1e-6
    both = lambda: kernels._linear_core_backward.function(  # noqa: E731
        g, out, state, inverse, packed, None, None, *options
    )
    return calls | {"query_gradient": both, "key_gradient": both}


def use(kernel, kind, block):
    kinds = list(kernels.BLOCKS[kernel])
    kinds[KINDS[kind][1]] = block
    kernels.BLOCKS[kernel] = tuple(kinds)


def compile_some(jobs):
    for kernel, kind, block in jobs:
        try:
            use(kernel, kind, block._replace(programs=0 if kind == "wide" else 528))
            launchers(kind, 1, 4096)[kernel]()
            torch.cuda.synchronize()
        except Exception:
            pass


def sweep(report):
    names = list(kernels.BLOCKS)
    jobs = [(k, kind, c) for k in names for kind in KINDS for c in candidates(k, kind)]
    pool = multiprocessing.get_context("spawn").Pool(12)
    pool.map(compile_some, [jobs[i::12] for i in range(12)])
    pool.close()
    print(f"compiled {len(jobs)} in {time.time() - START:.0f} s", flush=True)
    shapes = [(1, 4096), (1, 16384), (16, 4096)]
    for kind, kernel in itertools.product(KINDS, names):
        default = kernels.BLOCKS[kernel][KINDS[kind][1]]
        calls = {shape: launchers(kind, *shape)[kernel] for shape in shapes}
        found = []
        splits = [0] if kind == "wide" and kernel != "fold" else [264, 528, 1056, 2112]
        for block, programs in itertools.product([default, *candidates(kernel, kind)], splits):
            block = block._replace(programs=programs)
            use(kernel, kind, block)
            try:
                times = [time_us(calls[s], 3, 0.002) for s in shapes]
            except Exception:
                torch.cuda.synchronize()
                continue
            found.append((times, tuple(block)))
        if not found:
            print(kind, kernel, "nothing runs", flush=True)
            continue
        base = [min(t[i] for t, _ in found) for i in range(3)]
        found.sort(key=lambda f: sum(x / y for x, y in zip(f[0], base, strict=True)))
        use(kernel, kind, Block(*found[0][1]))
        report[f"{kind} {kernel}"] = found
        same = [t for t, b in found if b[:2] == default[:2] and b[3:] == default[3:]]
        mine = same[0] if same else [float("nan")] * 3
        said = "; ".join(f"{b} {' '.join(f'{x:.1f}' for x in t)}" for t, b in found[:3])
        print(f"{kind} {kernel}: best {' '.join(f'{x:.1f}' for x in base)}; default "
              f"{' '.join(f'{x:.1f}' for x in mine)}; {said}", flush=True)


def core_against_torch():
    print("core alone, us: heads n b | forward torch, ours, floor | forward+backward the same")
    for heads, (b, n) in itertools.product((24, 12, 6, 2, 1), ((1, 4096), (1, 16384), (16, 4096))):
        packed = torch.randn(b, n, 3 * D, device=DEVICE, dtype=HALF, requires_grad=True)
        g = torch.randn(b, n, D, device=DEVICE, dtype=HALF)
        row = []
        for train in (False, True):
            for impl in ("torch", "triton"):

                def step(impl=impl, train=train):
                    with torch.set_grad_enabled(train):
                        out = linear_tokens(packed, None, None, heads, True, True, 1e-6, impl=impl)
                    if train:
                        torch.autograd.grad(out, packed, g)

                row.append(time_us(step, 2))
            unit, flops = b * n * D * 2, 4 * b * n * D * D // heads
            row.append(max((11 if train else 4) * unit / COPY, flops * (3 if train else 1) / PEAK)
                       * 1e6)
        print(heads, n, b, "|", *(f"{x:.1f}" for x in row[:3]), "|", *(f"{x:.1f}" for x in row[3:]),
              flush=True)


def layers(report):
    print("layer, us: name n b | forward torch, ours, x floor | forward+backward the same")
    names = [("sana", {}), ("sana", {"num_heads": 1}), ("lit", {}), ("focused", {}), ("edit", {})]
    for (name, options), (b, n) in itertools.product(
        names, ((1, 1024), (1, 4096), (1, 16384), (16, 1024), (16, 4096), (16, 16384))
    ):
        if time.time() - START > 92 or (b * n > 70000 and name != "sana"):
            continue
        side = int(n**0.5)
        grid, row = (side, side), []
        x = torch.randn(b, n, D, device=DEVICE, dtype=HALF, requires_grad=True)
        g = torch.randn_like(x)
        made = [
            build_attention(name, D, impl=impl, **options).to(DEVICE, HALF)
            for impl in ("torch", "triton")
        ]
        macs = made[0].macs(grid) * b
        for train in (False, True):
            for layer in made:

                def step(layer=layer, train=train):
                    with torch.set_grad_enabled(train):
                        out = layer(x, grid)
                    if train:
                        torch.autograd.grad(out, [x, *layer.parameters()], g)

                try:
                    row.append(time_us(step, 2))
                except torch.OutOfMemoryError:
                    row.append(float("nan"))
            passes = 24 if train else 9
            floor = max(2 * macs * (3 if train else 1) / PEAK, passes * b * n * D * 2 / COPY) * 1e6
            row.append(row[-1] / floor)
        report[f"{name} {options} {n} {b}"] = row
        print(name, options or "", n, b, "|", *(f"{z:.1f}" for z in row[:3]), "|",
              *(f"{z:.1f}" for z in row[3:]), flush=True)


def depthwise(report):
    print("depthwise, us: channels side size | forward torch (channels last), reference, ours, "
          "floor | forward+backward")
    for c, side, size in ((6144, 128, 3), (3072, 64, 3), (768, 64, 5), (768, 128, 5)):
        x = torch.randn(1, side * side, c, device=DEVICE, dtype=HALF, requires_grad=True)
        w = torch.randn(c, 1, size, size, device=DEVICE, dtype=HALF, requires_grad=True)
        bias = torch.randn(c, device=DEVICE, dtype=HALF, requires_grad=True)
        g = torch.randn_like(x)

        def timed(impl, train, x=x, w=w, bias=bias, g=g, side=side):
            def step():
                with torch.set_grad_enabled(train):
                    out = depthwise_conv(x, (side, side), w, bias, impl=impl)
                if train:
                    torch.autograd.grad(out, [x, w, bias], g)

            return time_us(step, 2, 0.01)

        row = [[timed(i, t) for i in ("torch", "reference", "triton")] for t in (False, True)]
        unit = x.numel() * 2 / COPY * 1e6
        print(c, side, size, "|", *(f"{z:.0f}" for z in [*row[0], 2 * unit]), "|",
              *(f"{z:.0f}" for z in [*row[1], 6 * unit]), flush=True)
        names = (("WIDE_STENCIL_BLOCK", "WIDE_STENCIL_WEIGHT_BLOCK") if size == 5
                 else ("STENCIL_BLOCK", "STENCIL_WEIGHT_BLOCK"))
        for attribute in names:
            default, found = getattr(stencils, attribute), []
            if (c, side) == (3072, 64) or (size, side) == (5, 64):
                continue
            for rows, wide, channels, warps in (
                (8, 8, 64, 4), (16, 8, 64, 4), (8, 16, 32, 4), (16, 16, 32, 4), (8, 16, 64, 4),
                (8, 16, 64, 8), (16, 8, 32, 2), (8, 8, 128, 4), (4, 16, 64, 4), (8, 32, 64, 8),
            ):
                setattr(stencils, attribute, (rows, wide, channels, warps))
                took = timed("triton", "WEIGHT" in attribute)
                found.append((took, (rows, wide, channels, warps)))
            setattr(stencils, attribute, min(found)[1])
            report[f"{attribute} {c}"] = sorted(found)
            print("  ", attribute, default, "best", [f"{t:.0f} {b}" for t, b in sorted(found)[:3]])


if __name__ == "__main__":
    print(torch.cuda.get_device_name(), torch.__version__)
    report = {}
    sweep(report)
    core_against_torch()
    depthwise(report)
    layers(report)
    json.dump(report, open(f"{OUT}/linear.json", "w"))
    print(f"done in {time.time() - START:.0f} s")
    sys.exit(0)
