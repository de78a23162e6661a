"""``python -m bench.paper_table``: every published GFLOPs figure, as printed and as counted here.

The paper is arXiv 2601.13683 (Tables 1, 2 and 5); docs/gflops.md explains each difference.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch

from attnzoo.counting import count_macs
from backbones import build_backbone
from recipes.lab.console import DONE, run_script
from recipes.lab.files import require_writable, write_text
from recipes.lab.pages import markdown_table

# (size, resolution): Table 1 has S, B, L at 256 pixels, Table 2 has L at 512.
COLUMNS = (("S", 256), ("B", 256), ("L", 256), ("L", 512))
TABLES_1_AND_2: dict[str, tuple[str, ...]] = {
    "DiT": ("6.06", "10.50", "23.01", "106.42"),
    "DiG": ("5.92", "10.43", "23.58", "94.15"),
    "PixArt-Sigma": ("5.78", "10.13", "22.45", "97.38"),
    "EDiT": ("5.91", "10.45", "23.39", "96.17"),
    "Sana": ("5.97", "10.38", "22.83", "98.46"),
    "DyDi-LiT": ("5.98", "10.39", "22.85", "98.55"),
}
# (model, size, resolution, GFLOPs); Table 5 adds the map-wise model.
PRINTED: tuple[tuple[str, str, int, str], ...] = (
    *(
        (model, size, resolution, figure)
        for model, figures in TABLES_1_AND_2.items()
        for (size, resolution), figure in zip(COLUMNS, figures, strict=True)
    ),
    ("DyDi-LiT-map", "S", 256, "6.45"),
)


class PaperFigure(NamedTuple):
    """One published figure; GFLOPs are 10^9 multiply-accumulates, as in the paper."""

    model: str  # of ``backbones.presets.PAPER_MODELS``
    size: str
    resolution: int  # in image pixels
    paper: str  # as printed
    ours_paper: str  # in the paper's convention
    ours_full: str  # with every multiply-accumulate
    parameters: str  # in millions
    active_parameters: str  # those that act on one token, in millions
    residual: str  # of ``ours_paper``, in percent of the printed figure
    same_digits: str  # "yes" if ``ours_paper`` prints as the paper does
    how: str  # "closed form", or "measured" for a mechanism that states none


HEADINGS = (
    "model", "size", "px", "paper GFLOPs", "ours, paper's convention", "ours, full",
    "parameters (M)", "active per token (M)", "residual (%)", "same digits", "counted by",
)  # fmt: skip


def counted(model: str, size: str, resolution: int, printed: str) -> PaperFigure:
    """Counts one model both ways; nothing is run."""
    with torch.device("meta"):
        built = build_backbone(model, size, "paper", resolution)
    full = count_macs(built, resolution=resolution)
    ours = count_macs(built, resolution=resolution, convention="paper").total / 1e9
    return PaperFigure(
        model, size, resolution, printed, f"{ours:.4f}", f"{full.total / 1e9:.4f}",
        parameters=f"{full.parameters / 1e6:.2f}",
        active_parameters=f"{full.active_parameters / 1e6:.2f}",
        residual=f"{100 * (ours / float(printed) - 1):+.3f}",
        same_digits="yes" if f"{ours:.2f}" == printed else "no",
        how="measured" if full.measured else "closed form",
    )  # fmt: skip


def short_table(figures: list[PaperFigure]) -> str:
    """The table of docs/gflops.md: paper / ours as the paper counts / ours in full."""
    found: dict[str, dict[tuple[str, int], str]] = {}
    for figure in figures:
        ours = f"{float(figure.ours_paper):.2f} / {float(figure.ours_full):.2f}"
        row = found.setdefault(figure.model, {})
        row[figure.size, figure.resolution] = f"{figure.paper} / {ours}"
    return markdown_table(
        ["model", *(f"{size}, {resolution} px" for size, resolution in COLUMNS)],
        [[model, *(row.get(column, "-") for column in COLUMNS)] for model, row in found.items()],
        padded=True,
    )


def main(arguments: list[str] | None = None) -> list[PaperFigure]:
    """Prints the table; writes paper_table.csv, paper_table.md and a short form of it."""
    parser = argparse.ArgumentParser(prog="python -m bench.paper_table", description=main.__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("plots"), help="folder to write to (default: plots)"
    )
    options = parser.parse_args(arguments)
    require_writable(options.out / "paper_table.csv")
    figures = [counted(*printed) for printed in PRINTED]
    text = markdown_table(HEADINGS, figures, padded=True)
    print(text)
    same = sum(figure.same_digits == "yes" for figure in figures)
    print(f"\n{same} of {len(figures)} figures print the paper's digits.")
    sheet = pd.DataFrame(figures).to_csv(index=False)
    write_text(options.out / "paper_table.csv", sheet)
    write_text(options.out / "paper_table.md", f"{text}\n")
    write_text(options.out / "paper_table_short.md", f"{short_table(figures)}\n")
    return figures


def _script(arguments: list[str]) -> int:
    main(arguments)
    return DONE


if __name__ == "__main__":
    run_script(_script)
