"""``python -m attnzoo``: the zoo as a table, the backends that run here, the versions.

``--table`` prints the README's table of mechanisms instead.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import inspect
import platform
import typing
import warnings

import torch

import attnzoo
from attnzoo.console import printing
from attnzoo.contract import Attention
from attnzoo.ops import softmax
from attnzoo.ops.gated_scan import fla
from attnzoo.ops.optional import load
from attnzoo.ops.selective_scan import mamba
from attnzoo.registry import offered

DIM = 384
GRIDS = ((16, 16), (64, 64))
PACKAGES = (
    "torch",
    "einops",
    "diffusers",
    "xformers",
    "flash-attn",
    "flash-attn-4",
    "fla-core",
    "mamba-ssm",
    "triton",
)


def main() -> None:
    """Prints what the command line asks for."""
    parser = argparse.ArgumentParser("python -m attnzoo")
    parser.add_argument("--table", action="store_true", help="print the README's table")
    print(table()) if parser.parse_args().table else everything()


def table() -> str:
    """The zoo's own mechanisms as Markdown, by what their classes say of themselves."""
    rows = ["| name | mechanism | core grows as | source |", "|---|---|---|---|"]
    own = [name for name in attnzoo.list_attention() if name not in offered()]
    classes = [attnzoo.get_attention(name) for name in own if attnzoo.source_of(name) is None]
    for cls in sorted(classes, key=lambda cls: (cls.complexity, cls.name)):
        summary = (inspect.getdoc(cls) or "").partition("\n")[0].rstrip(".")
        title, _, number = cls.paper.rpartition(", ")
        paper = f"[{title}](https://arxiv.org/abs/{number})" if title else cls.paper
        rows.append(f"| `{cls.name}` | {summary} | {cls.complexity} | {paper} |")
    return "\n".join(rows)


def everything() -> None:
    """Prints every mechanism with its cost, the backends that run here, the versions."""
    heading = ["name", "paper", "core grows as", "parameters"]
    rows = [[*heading, *(f"MMACs {height}x{width}" for height, width in GRIDS)]]
    packages = offered()
    for name in attnzoo.list_attention():
        if name in packages:  # loaded only for who asks for it
            continue
        cls = attnzoo.get_attention(name)
        with torch.device("meta"):
            layer = attnzoo.build_attention(name, DIM)
        parameters = sum(parameter.numel() for parameter in layer.parameters())
        row = [name, cls.paper, cls.complexity, f"{parameters:,}"]
        for grid in GRIDS:
            has_form = cls.macs_parts is not Attention.macs_parts
            row.append(f"{layer.macs(grid) / 1e6:,.1f}" if has_form else "measure")
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:3], widths, strict=False)]
        right = [cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True)]
        print("  ".join(left + right).rstrip())
    for name, points in packages.items():
        print(f"{name}  offered by {' and '.join(point.value for point in points)}")
    print(f"\none layer of width {DIM}, per sample, every multiply-accumulate counted\n")

    backends()
    print(f"\nattnzoo {attnzoo.__version__}, Python {platform.python_version()}", end="")
    for package in PACKAGES:
        try:
            print(f", {package} {importlib.metadata.version(package)}", end="")
        except importlib.metadata.PackageNotFoundError:
            print(f", no {package}", end="")
        except Exception:  # an installation may be broken in any way
            print(f", {package} of unknown version", end="")
    print()


def backends() -> None:
    """Prints which implementations run here, and what the others lack."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    print(f"softmax backends on {device} with {dtype}:")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for impl in typing.get_args(softmax.SoftmaxImpl):
            _report(impl, softmax.why_unavailable(impl, device, dtype))
        print("other backends:")
        _report("fla", fla.why_unavailable(device))
        _report("mamba", mamba.why_unavailable(device))
        _report("triton", _why_no_triton(device))


def _report(impl: str, reason: str | None) -> None:
    print(f"  {impl:9} {'runs' if reason is None else reason}")


def _why_no_triton(device: str) -> str | None:
    try:
        load("triton")
    except ImportError as error:
        return f"{error} (pip install 'attnzoo[triton]')"
    return None if device == "cuda" else "needs a GPU"


if __name__ == "__main__":
    printing(main)
