"""ONNX: mechanisms export by PyTorch's operators or as their reference, or are listed."""

import re
from pathlib import Path

import pytest
import torch

from attnzoo import list_attention
from attnzoo.testing import build_scrambled, tokens
from backbones import DiT

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
GRID, DIM = (4, 4), 16
PAGE = Path(__file__).parents[2] / "docs" / "ecosystem.md"
# What impl="torch" has no ONNX for: operators of ours, and a triangular system.
NO_TORCH = {
    "deltanet": "linalg_solve_triangular",
    "diffussm": "selective_scan",
    "dis": "selective_scan",
    "dydila": "routed_linear",
    "dydila-map": "routed_linear",
    "local": "neighborhood",
    "zigma": "selective_scan",
}
# TTT's reference asks autograd for the gradient of its inner loss.
NO_REFERENCE = {"ttt": "autograd"}


class Layer(torch.nn.Module):
    """A mechanism with the grid as a constant, which ONNX has no type for."""

    def __init__(self, name, impl):
        super().__init__()
        self.layer = build_scrambled(name, DIM, impl=impl)

    def forward(self, x):
        return self.layer(x, GRID)


def compare(module, *inputs):
    """Exports, runs in ONNX's own reference evaluator, and compares."""
    from onnx.reference import ReferenceEvaluator

    with torch.no_grad():
        expected = module(*inputs)
        model = torch.onnx.export(module, inputs, dynamo=True, verbose=False).model_proto
        torch.testing.assert_close(module(*inputs), expected)  # tracing leaves nothing behind
    assert {node.domain for node in model.graph.node} <= {""}
    feed = {one.name: z.numpy() for one, z in zip(model.graph.input, inputs, strict=True)}
    [found] = ReferenceEvaluator(model).run(None, feed)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


def check(name, impl):
    module, x = Layer(name, impl), tokens(GRID, 2, DIM)
    if name in (NO_TORCH if impl == "torch" else NO_REFERENCE):
        said = NO_TORCH[name] if impl == "torch" else "trace"
        with pytest.raises(Exception, match=said):
            torch.onnx.export(module, (x,), dynamo=True, verbose=False)
    else:
        compare(module, x)


@pytest.mark.parametrize(("name", "impl"), [("sana", "torch"), ("linformer", "torch")])
def test_a_mechanism_exports(name, impl):
    check(name, impl)


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("name", list_attention())
def test_every_mechanism_exports_or_is_listed(name, impl):
    check(name, impl)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = DiT("softmax", dim=16, depth=1, num_classes=10, in_channels=3).eval()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))

    def forward(self, x, timestep, labels):
        return self.model(x, timestep, labels, return_dict=False)[0]


def test_a_whole_model_exports():
    compare(Model(), torch.randn(2, 3, 4, 4), torch.tensor([1, 500]), torch.tensor([0, 1000]))


def test_the_page_lists_what_does_not_export():
    text = PAGE.read_text("utf-8").split("## ONNX\n")[1].split("\n## ")[0]
    rows = re.findall(r'^\| `([\w-]+)` \| `"(\w+)"` \| `(\w+)` \|$', text, re.MULTILINE)
    ways = (("torch", NO_TORCH), ("reference", NO_REFERENCE))
    assert sorted(rows) == sorted(
        (name, impl, operator) for impl, refused in ways for name, operator in refused.items()
    )
