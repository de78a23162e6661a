"""The project's performance goals, each measured interleaved in a process of its own."""

from bench.cells import Cell
from bench.goals import measure_goal


def takes(cell: Cell) -> bool:
    """Which cells are measured here."""
    return cell.kind == "goal"


def test_goal(run):
    assert run(measure_goal)["rows"]
