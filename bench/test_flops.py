"""Multiply-accumulates in both conventions; the closed form is refused if it is wrong."""

from bench import worker
from bench.cells import Cell


def takes(cell: Cell) -> bool:
    """Which cells are counted here."""
    return cell.kind == "count"


def test_flops(run):
    record = run(worker.count)
    assert record["macs"] == sum(record["macs_parts"].values())
