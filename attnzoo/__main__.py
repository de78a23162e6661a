"""``python -m attnzoo``: the zoo as a table, the backends that run here, the versions."""

from __future__ import annotations

import importlib.metadata
import platform
import typing
import warnings

import torch

import attnzoo
from attnzoo.ops.softmax import SoftmaxImpl, why_unavailable

DIM = 384
GRIDS = ((16, 16), (64, 64))
PACKAGES = ("torch", "einops", "diffusers", "xformers", "flash-attn", "fla-core", "triton")


def main() -> None:
    """Prints everything."""
    heading = ["name", "paper", "core grows as", "parameters"]
    rows = [[*heading, *(f"MMACs {height}x{width}" for height, width in GRIDS)]]
    for name in attnzoo.list_attention():
        cls = attnzoo.get_attention(name)
        with torch.device("meta"):
            layer = attnzoo.build_attention(name, DIM)
        parameters = sum(parameter.numel() for parameter in layer.parameters())
        row = [name, cls.paper, cls.complexity, f"{parameters:,}"]
        for grid in GRIDS:
            try:
                row.append(f"{layer.macs(grid) / 1e6:,.1f}")
            except TypeError:
                row.append("measure")
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:3], widths, strict=False)]
        right = [cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True)]
        print("  ".join(left + right).rstrip())
    print(f"\none layer of width {DIM}, per sample, every multiply-accumulate counted\n")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    print(f"softmax backends on {device} with {dtype}:")
    for impl in typing.get_args(SoftmaxImpl):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reason = why_unavailable(impl, device, dtype)
        print(f"  {impl:9} {'runs' if reason is None else reason}")

    print(f"\nattnzoo {attnzoo.__version__}, Python {platform.python_version()}", end="")
    for package in PACKAGES:
        try:
            print(f", {package} {importlib.metadata.version(package)}", end="")
        except importlib.metadata.PackageNotFoundError:
            print(f", no {package}", end="")
    print()


if __name__ == "__main__":
    main()
