"""Peak memory where one round of time must do: resolutions that are large for the machine."""

from bench import worker
from bench.cells import Cell


def takes(cell: Cell) -> bool:
    """Which cells are measured here."""
    return cell.kind in ("layer", "backbone") and cell.seconds == 0


def test_memory(run):
    assert run(worker.measure)["peak_memory"] > 0
