"""Linear mechanisms stay linear in memory at 16,384 tokens, under a cap, in their own process."""

import pytest

import attnzoo
from bench.cases import Case, Conditions, is_quadratic
from bench.isolate import run_isolated
from bench.worker import measure

TOKENS, DIM = 16384, 384
# Tensors of n x d alive at the peak of a forward, as measured when the budget was set and rounded
# up; DyDiLA's and Sana's are goal G7's and what the operators of the layer add up to.
TENSORS = {
    "agent": 6, "conv": 7, "deltanet": 26, "diffussm": 11, "dig": 13, "dis": 17, "dydila": 10,
    "dydila-map": 14, "edit": 5, "efficient": 7, "fixation": 9, "focused": 10, "gated": 23,
    "linformer": 6, "linfusion": 7, "lit": 8, "local": 7, "mala": 10, "mhla": 9, "rala": 10,
    "sana": 7, "ttt": 11, "zigma": 14,
}  # fmt: skip


def is_of_the_zoo(name):
    """Other tests of this process may have registered mechanisms of their own."""
    return attnzoo.get_attention(name).__module__.startswith("attnzoo.")


def test_every_linear_mechanism_has_a_budget():
    ours = [name for name in attnzoo.list_attention() if is_of_the_zoo(name)]
    linear = {name for name in ours if not is_quadratic(name)}
    assert linear == set(TENSORS)


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", sorted(TENSORS))
def test_peak_memory_stays_within_its_budget(mechanism):
    budget = int(1.5 * TENSORS[mechanism] * TOKENS * DIM * 4)
    cell = Case(mechanism=mechanism, resolution=2048, width=DIM, seconds=0.0)
    outcome = run_isolated(measure, cell, Conditions(), memory=budget + 2**29, timeout=300)
    assert outcome.state == "measured", outcome.reason
    assert outcome.result["peak_memory"] <= budget
