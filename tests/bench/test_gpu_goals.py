"""The goals of a GPU at a small size on a CPU: all but the device itself."""

import functools
import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from bench import checks, goal_measurements, timing
from bench.goal_measurements import Race
from bench.thresholds import GOALS

# Instead of the width, the sides and the sets of tensors of thresholds.toml. The paper has numbers
# of projectors for widths from 384 on.
SMALL = {768: 384, 32: 2, 64: 4, 96: 6, 128: 8, 4: 2}
NARROW = dict.fromkeys(("U4", "U6"), SMALL | {768: 96})
ON_A_GPU = {"U2", "U5"}  # Triton's grouped product, and flash-linear-attention


def one_round(calls, device, threads, missing, **_):
    """A contest whose times nobody asks for."""
    return timing.race(calls, device, threads, missing, rounds=1, least=1)


@pytest.fixture(autouse=True)
def small_and_once(monkeypatch):
    """Where a sweep names no side, that is small too."""
    contestant = functools.partial(goal_measurements.Contestant, side=SMALL[64])
    monkeypatch.setattr(goal_measurements, "Contestant", contestant)
    monkeypatch.setattr(goal_measurements, "race", one_round)


@pytest.fixture
def eager():
    """Compiled modules run as they are, which takes no compiler's time."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def check_figures(goal):
    found = goal_measurements.measure(goal, "cpu", NARROW.get(goal, SMALL))
    assert found.figures and found.checks
    for figure in found.figures:
        assert figure.goal == goal and figure.minimum is not None
        if goal == "U6" and "compiled" in figure.what:  # with a backend that only a GPU has
            assert figure.value is None and "SDPA cuDNN" in figure.note
        else:
            assert figure.value is not None and figure.value > 0, figure


@pytest.mark.parametrize("goal", sorted({n for n in GOALS if n.startswith("U")} - ON_A_GPU))
def test_every_figure_has_a_value_and_stands_on_a_check(eager, goal):
    check_figures(goal)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton's interpreter")
def test_the_goal_of_a_triton_kernel_is_measured_by_its_interpreter():
    code = (
        "from tests.attnzoo.quick_interpreter import quicken; quicken()\n"
        "from tests.bench import test_gpu_goals as here\n"
        "here.goal_measurements.race = here.one_round; here.check_figures('U2')"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "ATTNZOO_TRITON": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True,
                          text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_what_cannot_start_loses_its_own_figures_only(eager):
    rows = goal_measurements.measure("U5", "cpu", SMALL).figures
    assert len(rows) == 16 and all(row.value is None for row in rows)
    assert all("theirs: " in row.note for row in rows)
    assert sum("two of theirs: " in row.note for row in rows) == 4


def test_a_compiler_that_fails_loses_the_compiled_figures_only(monkeypatch):
    def broken(run, **_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    rows = goal_measurements.measure("U1", "cpu", SMALL).figures
    missing = [row for row in rows if row.value is None]
    assert len(rows) == 10 and len(missing) == 6
    assert all("no compiler" in row.note for row in missing)


def test_graph_breaks_and_recompilations_are_counted(monkeypatch):
    # What a compiler makes of the graphs is not counted.
    by_dynamo_alone = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", by_dynamo_alone)
    monkeypatch.setattr(goal_measurements, "check_layer", lambda *_: {})
    rows = goal_measurements.measure("G13", "cpu").figures
    assert [row.value for row in rows] == [0, 0]

    def guarded(layer, **options):
        scale = [1]
        run = by_dynamo_alone(lambda x, grid: layer(x, grid) * scale[0], **options)

        def call(x, grid):
            scale[0] += 1
            return run(x, grid)

        return call

    monkeypatch.setattr(torch, "compile", guarded)
    monkeypatch.setattr(goal_measurements, "MODES", ("forward",))
    assert all(row.value > 0 for row in goal_measurements.measure("G13", "cpu").figures)


def test_a_wrong_training_step_is_told_from_a_right_one(monkeypatch):
    assert checks.check_gradients("sana", {}, 96, "cpu") < 1e-3
    fast = checks.testing.build_scrambled

    def wrong(name, width, **options):
        layer = fast(name, width, **options)
        layer.proj.weight.register_hook(lambda grad: 1.1 * grad)
        return layer

    monkeypatch.setattr(checks.testing, "build_scrambled", wrong)
    with pytest.raises(checks.WrongResult, match="training step differs"):
        checks.check_gradients("sana", {}, 96, "cpu")


def test_a_small_gradient_that_is_wrong_does_not_hide_among_others(monkeypatch):
    found, calls = checks.testing.outputs_and_gradients, []

    def wrong(*arguments):
        results = found(*arguments)
        calls.append(results)
        if len(calls) == 3:  # after the reference, exact and not
            results["grad proj.bias"] = -results["grad proj.bias"]
        return results

    assert checks.check_layer("sana", {}, 96, "bfloat16", "cpu", 4)["gradients"] < 0.05
    monkeypatch.setattr(checks.testing, "outputs_and_gradients", wrong)
    with pytest.raises(checks.WrongResult, match="gradients by 2"):
        checks.check_layer("sana", {}, 96, "bfloat16", "cpu", 4)
    assert len(calls) == 3


def test_a_gradient_of_which_the_reference_knows_nothing_is_not_compared(monkeypatch):
    """As of a router's whose choices rounding turns: of two threads it was off by twice itself."""
    one = torch.ones(3)

    def of(own, fast):
        results = iter([{"router": one, "proj": one}, {"router": 1.3 * one, "proj": own * one},
                        {"router": 9 * one, "proj": fast * one}])  # fmt: skip
        monkeypatch.setattr(checks.testing, "outputs_and_gradients", lambda *_: next(results))
        return checks._gradients(torch.nn.Identity(), torch.nn.Identity(), one, (1, 3), 0.2)

    assert of(1.01, 1.02)["gradients"] < 0.03 and of(1.01, 2)["gradients"] == 1
    assert of(1.3, 1.3)["gradients"] == float("inf")  # nothing was compared


def test_the_device_time_counts_where_both_could_be_recorded():
    race = Race(
        launched={"a": [2.0, 2.0], "b": [1.0, 1.0], "c": [8.0, 8.0]},
        device={"a": [3.0, 3.0], "b": [1.0, 1.0]},
        missing={"c": "it waits"},
    )
    value, told = race.over("a", "b")
    assert value["median"] == 3.0 and told == "device time; launched 2"
    value, told = race.over("c", "b")
    assert value["median"] == 8.0 and told == "launched; c: it waits"
    assert race.over("d", "b") == (None, "")
    assert race.fastest(["a", "c", "d"]) == "a" and race.fastest(["d"]) == "d"
