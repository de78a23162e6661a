"""Time, memory and arithmetic of one layer and of the whole backbone."""

from bench import worker
from bench.cells import Cell


def takes(cell: Cell) -> bool:
    """Which cells are measured here."""
    return cell.kind in ("layer", "backbone") and cell.seconds > 0


def test_latency(run):
    record = run(worker.measure)
    assert record["macs"] > 0
