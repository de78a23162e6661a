"""Nothing n x n, and no more tensors of n x d than each linear mechanism's budget."""

import math
import subprocess
import sys

import pytest

DIM = 384
# Peak of a forward without gradients and of a training step, in tensors of n x d beyond the
# input, as the mechanisms' steps say: what is kept, and the few tensors in passing.
CLOSED_FORM = {
    ("sana", ()): (6, 9),
    ("focused", ()): (7, 16),
    ("lit", ()): (8, 10.5),
    ("dydila", ()): (7, 15.5),
    ("dydila-map", ()): (9, 16.5),
    ("linfusion", ()): (6, 22),
    ("efficient", ()): (6, 9),
    ("fixation", ()): (8, 16),
    ("mhla", ()): (8, 14),
    ("mala", ()): (9, 18),
    ("rala", ()): (9, 21),
}
CLOSED_FORM |= {
    (name, (("stream", 1024),)): (budget, None)
    for budget, names in (
        (1.4, ("sana", "focused", "lit", "edit", "agent")),
        (1.4, ("linfusion", "efficient", "fixation", "mala", "rala")),
        (1.6, ("gated", "dig", "dydila", "dydila-map", "mhla")),
    )
    for name in names
}

SCRIPT = """
import torch
from torch.profiler import ProfilerActivity, profile
from attnzoo import build_attention

torch.set_num_threads(1)

def measure(name, options, side, train):
    layer = build_attention(name, {dim}, **dict(options)).train(train)
    x = torch.randn(1, side * side, {dim}, requires_grad=train)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        with torch.set_grad_enabled(train):
            out = layer(x, (side, side))
        if train:
            out.sum().backward()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    print(peak / (4 * side * side * {dim}))

for case in {cases}:
    measure(*case)
"""


def _peaks(*cases: tuple[str, tuple, int, bool]) -> list[float]:
    """Peaks of (mechanism, options, side, training) in one process: its allocations are counted,
    not its size."""
    script = SCRIPT.format(cases=cases, dim=DIM)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [float(line) for line in done.stdout.split()]


CELLS = [
    (name, options, train, budget)
    for (name, options), budgets in CLOSED_FORM.items()
    for train, budget in zip((False, True), budgets, strict=True)
    if budget is not None
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options", "train", "budget"), CELLS)
def test_peak_memory_stays_in_its_budget(name, options, train, budget):
    assert _peaks((name, options, 128, train))[0] < 1.5 * budget


def test_dydila_keeps_to_the_goal_and_edit_lets_go_of_queries_whose_features_are_made():
    inference, training, edit = _peaks(
        ("dydila", (), 64, False), ("dydila", (), 64, True), ("edit", (), 64, False)
    )
    assert inference < 10.5 and training < 17
    assert edit < 4  # 4.5 with them


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *(name for name, options in CLOSED_FORM if not options),
        *("zigma", "dis", "diffussm", "deltanet", "ttt"),
    ],
)
def test_peak_memory_grows_with_n_alone(name):
    small, large = _peaks(*((name, (), side, False) for side in (32, 128)))  # over their n
    assert math.log(16 * large / small) / math.log(16) < 1.02
