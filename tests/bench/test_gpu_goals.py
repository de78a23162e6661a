"""The goals of a GPU at a small size on a CPU: all but the device itself."""

import sys
import types
from unittest import mock

import pytest
import torch

from attnzoo.ops import routed_linear as routing
from attnzoo.ops.gated_scan import gated_linear_attention
from bench import checks, goal_measurements
from bench.thresholds import GOALS


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(goal_measurements, "GPU_DIM", 384)
    monkeypatch.setattr(goal_measurements, "SMALL", 4)
    monkeypatch.setattr(goal_measurements, "LARGE", 8)
    monkeypatch.setattr(goal_measurements, "RESOLUTIONS", (64, 128))
    backends = {"SDPA": torch.nn.attention.SDPBackend.MATH}
    monkeypatch.setattr(goal_measurements, "BACKENDS", backends)
    monkeypatch.setattr(torch, "compile", lambda run, **_: run)

    # What only a GPU has: Triton's grouped product, and flash-linear-attention.
    def grouped(x, first, second, index):
        choices = index.view(2, -1).long()
        pair = ((first, choices[0]), (second, choices[1] - len(first)))
        return torch.stack([routing.routed_linear(x, *mine, impl="reference") for mine in pair])

    def chunk_gla(*operands, scale):
        swapped = (z.transpose(1, 2) for z in operands)
        return gated_linear_attention(*swapped).transpose(1, 2), None

    monkeypatch.setattr(routing, "grouped_linear", grouped, raising=False)
    monkeypatch.setattr(
        goal_measurements, "gated_linear_attention", lambda *z, impl: gated_linear_attention(*z)
    )
    package = {"fla": types.ModuleType("fla"), "fla.ops": types.ModuleType("fla.ops")}
    package["fla.ops.gla"] = types.SimpleNamespace(chunk_gla=chunk_gla)
    with mock.patch.dict(sys.modules, package):
        yield


@pytest.mark.parametrize("goal", [name for name in GOALS if name.startswith("U")])
def test_every_figure_has_a_value_and_stands_on_a_check(small, goal):
    found = goal_measurements.measure(goal, "cpu")
    assert found.figures and found.checks
    for figure in found.figures:
        assert figure.value is not None and figure.value > 0, figure
        assert figure.goal == goal and figure.minimum is not None


def test_a_contestant_that_cannot_start_loses_its_own_figures_only(small, monkeypatch):
    def broken(run, **_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    rows = goal_measurements.measure("U1", "cpu").figures
    missing = [row for row in rows if row.value is None]
    assert len(rows) == 10 and len(missing) == 6
    assert all("no compiler" in row.note for row in missing)


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


def test_the_device_time_counts_where_both_could_be_recorded():
    race = goal_measurements.Race(
        launched={"a": [2.0, 2.0], "b": [1.0, 1.0], "c": [8.0, 8.0]},
        device={"a": [3.0, 3.0], "b": [1.0, 1.0]},
        missing={"c": "it waits"},
    )
    value, told = race.over("a", "b")
    assert value["median"] == 3.0 and told == "device time; launched 2"
    value, told = race.over("c", "b")
    assert value["median"] == 8.0 and told == "launched; c: it waits"
    assert race.over("d", "b") == (None, "")
    assert race.median("a") == 3.0 and race.median("c") == 8.0
