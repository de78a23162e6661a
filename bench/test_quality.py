"""Quality against resolution: the results of a comparison, or a short training."""

from bench.cells import Cell
from bench.quality import measure_quality


def takes(cell: Cell) -> bool:
    """Which cells are measured here."""
    return cell.kind == "quality"


def test_quality(run):
    assert run(measure_quality)["quality"]
