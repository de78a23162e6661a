"""Every case of the suite, measured in a process of its own; ``conftest.py`` says how."""

from bench import worker
from bench.goals import measure_goal
from bench.quality import measure_quality


def test_flops(run):
    """Multiply-accumulates in both conventions; the closed form is refused if it is wrong."""
    record = run(worker.count)
    assert record["macs"] == sum(record["macs_parts"].values())


def test_goal(run):
    """The project's performance goals."""
    assert run(measure_goal)["rows"]


def test_latency(run):
    """Time, memory and arithmetic of one layer and of the whole backbone."""
    assert run(worker.measure)["macs"] > 0


def test_memory(run):
    """Peak memory where one round of time must do: resolutions that are large for the machine."""
    assert run(worker.measure)["peak_memory"] > 0


def test_peers(run):
    """Ours against other libraries' code for the same mathematics."""
    assert run(worker.measure)["best_peer"]


def test_quality(run):
    """Quality against resolution: the results of a comparison, or a short training."""
    assert run(measure_quality)["quality"]
