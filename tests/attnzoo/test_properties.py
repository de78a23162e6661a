"""What the mathematics says about order, and what the compiler makes of every mechanism."""

import pytest
import torch
import torch._dynamo.testing

from attnzoo import list_attention
from attnzoo.testing import build_scrambled, tokens

# Options that leave pure attention: no convolution, no position, no scan.
EQUIVARIANT = {
    "softmax": {},
    "sana": {},
    "focused": {"conv": "none"},
    "lit": {"conv": "none"},
    "linfusion": {},
    "efficient": {},
    "fixation": {"shift": False},
    "mala": {"conv": "none", "rope": False},
    "rala": {"conv": "none", "rope": False},
    "moh": {},
    "ttt": {"conv": False},
    "differential": {},
    "dydila": {"conv": "none"},
    "dydila-map": {"conv": "none"},
}
# By default the neighborhood on the grid, or the order of a scan, matters.
ORDERED = (
    "focused", "lit", "compressed", "edit", "agent", "gated", "dig", "dydila", "dydila-map",
    "fixation", "mhla", "mala", "rala", "zigma", "dis", "diffussm",
    "local", "pvt", "linformer", "conv", "deltanet", "ttt",
)  # fmt: skip
# A data-dependent choice between two exact forms breaks the graph; this form has none.
COMPILABLE = {"gated": {"impl": "torch"}, "dig": {"impl": "torch"}}


def _permuted_difference(layer, grid=(6, 8)):
    x = tokens(grid)
    order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(3))
    straight, permuted = layer(x, grid)[:, order], layer(x[:, order], grid)
    return (straight - permuted).abs().max() / straight.abs().max()


@pytest.mark.parametrize("name", EQUIVARIANT)
def test_permuting_tokens_permutes_the_output(name):
    assert _permuted_difference(build_scrambled(name, **EQUIVARIANT[name])) < 1e-5


@pytest.mark.parametrize("name", ORDERED)
def test_order_matters_where_it_must(name):
    if name in list_attention():
        assert _permuted_difference(build_scrambled(name)) > 1e-3


# Of "gated" and "dig", which are one layer, the first has two scans.
@pytest.mark.parametrize(
    "name",
    [pytest.param(z, marks=pytest.mark.slow) if z == "dig" else z for z in list_attention()],
)
def test_compiles_into_one_graph(name):
    layer = build_scrambled(name, **COMPILABLE.get(name, {})).train()
    if name.startswith("dydila"):
        layer.eval()  # batch norm would move between the two calls
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for seed in (1, 2):
        x = tokens((6, 8), seed=seed).requires_grad_()
        y = x.detach().clone().requires_grad_()
        out, eager = compiled(x, (6, 8)), layer(y, (6, 8))
        torch.testing.assert_close(out, eager, rtol=1e-5, atol=1e-5)
        out.square().sum().backward()
        eager.square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1, "a change of data must not compile again"
