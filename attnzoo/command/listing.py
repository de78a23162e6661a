"""``attnzoo list``: the zoo as a table, the backends that run here, the versions."""

from __future__ import annotations

import inspect
import platform

import attnzoo
from attnzoo.command import Parser
from attnzoo.command.doctor import backends, version_of
from attnzoo.console import aligned
from attnzoo.contract import Attention
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
    "natten",
    "triton",
)


def main(arguments: list[str]) -> None:
    """Prints what the command line asks for."""
    parser = Parser("attnzoo list", description=__doc__)
    parser.add_argument("--table", action="store_true", help="print the README's table instead")
    print(table()) if parser.parse_args(arguments).table else everything()


def table() -> str:
    """The zoo's own mechanisms as Markdown, by what their classes say of themselves."""
    rows = ["| name | mechanism | core grows as | source |", "|---|---|---|---|"]
    own = [name for name in attnzoo.list_attention() if name not in offered()]
    classes = [attnzoo.get_attention(name) for name in own if attnzoo.source_of(name) is None]
    for cls in sorted(classes, key=lambda cls: (cls.complexity, cls.name)):
        paper, link = source_of_class(cls)
        shown = f"[{paper}]({link})" if link else paper
        rows.append(f"| `{cls.name}` | {summary(cls)} | {cls.complexity} | {shown} |")
    return "\n".join(rows)


def summary(cls: type[Attention]) -> str:
    """The first line of a class's docstring, which no parent's stands for."""
    return inspect.cleandoc(cls.__doc__ or "").partition("\n")[0].rstrip(".")


def source_of_class(cls: type[Attention]) -> tuple[str, str]:
    """What a mechanism is from, and its address or ""."""
    title, _, number = cls.paper.rpartition(", ")
    return (title, f"https://arxiv.org/abs/{number}") if title else (cls.paper, "")


def everything() -> None:
    """Prints every mechanism with its cost, the backends that run here, the versions."""
    heading = ["name", "paper", "core grows as", "parameters"]
    rows = [[*heading, *(f"MMACs {height}x{width}" for height, width in GRIDS)]]
    packages = offered()
    for name in attnzoo.list_attention():
        if name in packages:  # loaded only for who asks for it
            continue
        cls = attnzoo.get_attention(name)
        # On the meta device some random numbers import torch's compiler, for seconds.
        layer = attnzoo.build_attention(name, DIM)
        parameters = sum(parameter.numel() for parameter in layer.parameters())
        row = [name, cls.paper, cls.complexity, f"{parameters:,}"]
        for grid in GRIDS:
            has_form = cls.macs_parts is not Attention.macs_parts
            row.append(f"{layer.macs(grid) / 1e6:,.1f}" if has_form else "measure")
        rows.append(row)
    print(aligned(rows, left=3))
    for name, points in packages.items():
        print(f"{name}  offered by {' and '.join(point.value for point in points)}")
    print(f"\none layer of width {DIM}, per sample, every multiply-accumulate counted\n")

    backends()
    versions = ", ".join(map(version_of, PACKAGES))
    print(f"\nattnzoo {attnzoo.__version__}, Python {platform.python_version()}, {versions}")
