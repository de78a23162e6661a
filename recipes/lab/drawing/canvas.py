"""Figures without pyplot's global state: made, written whole, and safe from what users name.

This is the one module that imports matplotlib and seaborn for the recipes. matplotlib reads
MPLBACKEND while it is imported and refuses a value that it does not know, such as a notebook's.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # must stand before the imports below

import numpy as np
import seaborn as sns
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from recipes.lab.console import one_line
from recipes.lab.files import write_bytes

__all__ = [
    "Figure",
    "ListedColormap",
    "Rectangle",
    "new_figure",
    "panels",
    "plain",
    "png",
    "save_figure",
    "sns",
]


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches that no global list holds."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def panels(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """A figure with axes (rows, columns), each of this size in inches."""
    # Large letters against the width: the pictures are to be read at half their size.
    with sns.plotting_context("notebook", font_scale=1.05), sns.axes_style("whitegrid"):
        figure = new_figure(width * columns, height * rows)
        return figure, figure.subplots(rows, columns, squeeze=False)


def png(figure: Figure, dpi: int) -> bytes:
    """The figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def save_figure(figure: Figure, path: Path, dpi: int) -> None:
    """Writes the figure as a PNG, whole or not at all.

    Raises:
        CannotWrite: The system refuses.
    """
    write_bytes(path, png(figure, dpi))


def plain(name: str) -> str:
    """A user's name as matplotlib shows it literally, also in a legend."""
    # Dollars would begin a formula; a legend leaves out what begins with an underscore.
    text = one_line(name).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
