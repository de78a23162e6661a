"""Ours against other libraries' code for the same mathematics, interleaved in one process."""

from bench import worker
from bench.cells import Cell


def takes(cell: Cell) -> bool:
    """Which cells are measured here."""
    return cell.kind == "peers"


def test_peers(run):
    assert run(worker.measure)["best_peer"]
