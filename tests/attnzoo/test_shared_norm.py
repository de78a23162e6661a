"""Batch norms over all processes: two halves of a batch compute what the whole computes."""

import pytest
import torch
from torch import nn

from attnzoo.layers.depthwise_conv import DepthwiseConv, ValueConv
from tests.attnzoo.two_parts import TwoParts, assert_equal, halves_and_whole, shared

GRID = (3, 5)


@pytest.fixture(autouse=True)
def seeded():
    """A branch that hardly varies enlarges rounding."""
    torch.manual_seed(0)


def scrambled(module, dtype=torch.float32):
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.to(dtype)


@pytest.mark.parametrize(
    ("make", "grid"),
    [
        (lambda: DepthwiseConv(6, "acnet"), GRID),
        (lambda: DepthwiseConv(6, "acnet"), (1, 2)),
        (lambda: ValueConv(6, 2, "acnet"), GRID),
    ],
    ids=["tokens", "two", "heads"],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_branches_share_one_collective_forward_and_one_backward(
    make, grid, dtype, tolerance, monkeypatch
):
    module, x = scrambled(make(), dtype), torch.randn(4, grid[0] * grid[1], 6, dtype=dtype) + 3
    found, whole, calls = halves_and_whole(module, x, monkeypatch, lambda m, x: m(x, grid))
    assert_equal(found, whole, tolerance)
    assert calls == ["gather", "reduce"]


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"momentum": None}])
def test_a_norm_by_itself(options, monkeypatch):
    norm, x = scrambled(nn.BatchNorm2d(5, **options)), torch.randn(4, 5, 3, 2)
    found, whole, calls = halves_and_whole(norm, x, monkeypatch, lambda m, x: m(x))
    assert_equal(found, whole, 2e-6)
    assert calls == ["gather", "reduce"]


def test_half_precision_is_normed_in_float32(monkeypatch):
    conv, x = scrambled(DepthwiseConv(6, "acnet")), torch.randn(4, 15, 6)
    _, exact, _ = halves_and_whole(conv, x, monkeypatch, lambda m, x: m(x, GRID))

    def lowered(module, x):
        with torch.autocast("cpu", torch.bfloat16):
            return module(x, GRID)

    found, _, _ = halves_and_whole(conv, x, monkeypatch, lowered)
    assert (found[0] - exact[0]).norm() <= 2e-2 * exact[0].norm()
    for mine, theirs in zip(found[2], exact[2], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)


def test_without_other_processes_nothing_is_exchanged_and_nothing_changes(monkeypatch):
    def refuse(*_):
        raise AssertionError("nobody is there to exchange with")

    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", refuse)
    conv, x = scrambled(DepthwiseConv(6, "acnet")), torch.randn(2, 15, 6)
    assert torch.equal(shared(conv)(x, GRID), conv(x, GRID))
    # Inference takes the running statistics, whoever else is there.
    parts = TwoParts(monkeypatch)
    one, other = parts(lambda _: shared(conv).eval()(x, GRID))
    assert torch.equal(one, conv.eval()(x, GRID)) and torch.equal(one, other)
    assert parts.calls == []


def test_compiled_without_a_break(monkeypatch):
    """The same numbers and the same collectives as launched one by one."""
    conv, x = scrambled(DepthwiseConv(6, "acnet")), torch.randn(4, 15, 6)
    eager, _, calls = halves_and_whole(conv, x, monkeypatch, lambda m, x: m(x, GRID))
    call = torch.compile(lambda m, x: m(x, GRID), backend="aot_eager", fullgraph=True)
    found, _, compiled_calls = halves_and_whole(conv, x, monkeypatch, call)
    assert_equal(found, eager, 1e-5)
    assert compiled_calls == calls == ["gather", "reduce"]
