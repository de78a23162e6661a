"""``python -m bench.paper_table``: every published GFLOPs figure, as printed and as counted here.

The paper is arXiv 2601.13683 (Tables 1, 2 and 5); docs/gflops.md explains each difference.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
from pathlib import Path

import torch

from attnzoo.counting import count_macs
from backbones import build_backbone
from bench.tables import markdown
from recipes.lab.console import DONE, run_script
from recipes.lab.files import check_writable, write_text

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


@dataclasses.dataclass(frozen=True)
class Row:
    """One published figure; GFLOPs are 10^9 multiply-accumulates, as in the paper.

    Attributes:
        model: A model of ``backbones.presets.PAPER_MODELS``.
        size: "S", "B" or "L".
        resolution: In image pixels.
        paper: As printed.
        ours_paper: In the paper's convention.
        ours_full: With every multiply-accumulate.
        parameters: In millions.
        active_parameters: Those that act on one token, in millions.
        residual: Of ``ours_paper``, in percent of the printed figure.
        same_digits: Whether ``ours_paper`` prints as the paper does.
        how: "closed form", or "measured" for a mechanism that states none.
    """

    model: str
    size: str
    resolution: int
    paper: str
    ours_paper: str
    ours_full: str
    parameters: str
    active_parameters: str
    residual: str
    same_digits: str
    how: str


def table_row(model: str, size: str, resolution: int, printed: str) -> Row:
    """Counts one model both ways; nothing is run."""
    with torch.device("meta"):
        built = build_backbone(model, size, "paper", resolution)
    full, paper = (
        count_macs(built, resolution=resolution, convention=how) for how in ("full", "paper")
    )
    residual = 100 * (paper.total / 1e9 / float(printed) - 1)
    return Row(
        model=model,
        size=size,
        resolution=resolution,
        paper=printed,
        ours_paper=f"{paper.total / 1e9:.4f}",
        ours_full=f"{full.total / 1e9:.4f}",
        parameters=f"{full.parameters / 1e6:.2f}",
        active_parameters=f"{full.active_parameters / 1e6:.2f}",
        residual=f"{residual:+.3f}",
        same_digits="yes" if f"{paper.total / 1e9:.2f}" == printed else "no",
        how="measured" if full.measured else "closed form",
    )


HEADINGS = {
    "model": "model",
    "size": "size",
    "resolution": "px",
    "paper": "paper GFLOPs",
    "ours_paper": "ours, paper's convention",
    "ours_full": "ours, full",
    "parameters": "parameters (M)",
    "active_parameters": "active per token (M)",
    "residual": "residual (%)",
    "same_digits": "same digits",
    "how": "counted by",
}


def to_markdown(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    return markdown(list(HEADINGS.values()), [dataclasses.astuple(row) for row in rows])


def to_readme(rows: list[Row]) -> str:
    """The README's table: one line per model; paper / ours as the paper counts / ours in full."""
    cells: dict[str, dict[tuple[str, int], str]] = {}
    for row in rows:
        ours = f"{float(row.ours_paper):.2f} / {float(row.ours_full):.2f}"
        cells.setdefault(row.model, {})[row.size, row.resolution] = f"{row.paper} / {ours}"
    return markdown(
        ["model", *(f"{size}, {resolution} px" for size, resolution in COLUMNS)],
        [[model, *(found.get(c, "-") for c in COLUMNS)] for model, found in cells.items()],
    )


def main(arguments: list[str] | None = None) -> list[Row]:
    """Prints the table; writes paper_table.csv, paper_table.md and the README's short form."""
    parser = argparse.ArgumentParser(prog="python -m bench.paper_table", description=main.__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("plots"), help="folder to write to (default: plots)"
    )
    options = parser.parse_args(arguments)
    check_writable(options.out / "paper_table.csv")
    rows = [table_row(*printed) for printed in PRINTED]
    text = to_markdown(rows)
    print(text)
    same = sum(row.same_digits == "yes" for row in rows)
    print(f"\n{same} of {len(rows)} figures print the paper's digits.")
    sheet = io.StringIO(newline="")
    writer = csv.DictWriter(sheet, fieldnames=[f.name for f in dataclasses.fields(Row)])
    writer.writeheader()
    writer.writerows(map(dataclasses.asdict, rows))
    write_text(options.out / "paper_table.csv", sheet.getvalue())
    write_text(options.out / "paper_table.md", f"{text}\n")
    write_text(options.out / "paper_table_readme.md", f"{to_readme(rows)}\n")
    return rows


def _script(arguments: list[str]) -> int:
    main(arguments)
    return DONE


if __name__ == "__main__":
    run_script(_script)
