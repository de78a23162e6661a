"""Tokens in another order: the gradient is put back in order, and added up nowhere."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attnzoo import build_attention
from attnzoo.ops.reorder import reordered

ADDING = {"index_add", "index_add_", "index_put", "index_put_", "_index_put_impl_", "put_"}


class Ran(TorchDispatchMode):
    """The names of all operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


def test_is_an_index_with_its_gradients():
    order = torch.tensor([3, 0, 4, 1, 2])
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)

    def call(x):
        return reordered(x, 1, order, order.argsort())

    assert torch.equal(call(x), x[:, order])
    cotangent = torch.randn(2, 5, 3, dtype=torch.float64)
    found, expected = (torch.autograd.grad(out, x, cotangent)[0] for out in (call(x), x[:, order]))
    assert torch.equal(found, expected)
    assert torch.autograd.gradgradcheck(call, (x,))
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert torch.equal(torch.autograd.grad(compiled(x), x, cotangent)[0], expected)
    assert torch.equal(torch.func.grad(lambda x: (call(x) * cotangent).sum())(x), expected)


@pytest.mark.parametrize("name", ["zigma", "dydila", "dydila-map"])
def test_a_training_step_on_a_gpu_adds_up_nothing_by_index(name):
    # The meta device takes the way of a GPU without kernels.
    layer = build_attention(name, 32).to("meta").train()
    x = torch.randn(2, 24, 32, device="meta", requires_grad=True)
    with Ran() as ran:
        layer(x, (4, 6)).square().sum().backward()
    assert "mm" in ran.names and not ran.names & ADDING
