"""What stands around a projection (a hook, another forward, an adapter) is run."""

import pytest
import torch

from attnzoo import get_attention, list_attention
from attnzoo.testing import build_scrambled, tokens
from tests.attnzoo.adapters import adapt, operators_alone_and_tracked, quantize

GRID = (4, 5)
CASES = [
    (name, stream)
    for name in list_attention()
    for stream in (None, 3)
    if not stream or "stream" in get_attention(name).Config.__dataclass_fields__
]


@pytest.mark.parametrize("way", ["hook", "forward", "adapter"])
@pytest.mark.parametrize(("name", "stream"), CASES)
def test_what_stands_around_projections_is_run(name, stream, way):
    options: dict = {"stream": stream} if stream else {}
    options |= {"block": 4} if name == "sla" else {}
    layers = [build_scrambled(name, **options) for _ in range(2)]
    x, wanted, found = tokens(GRID), adapt(layers[0], "weights"), adapt(layers[1], way)
    for has_gradient in (False, True):
        with torch.set_grad_enabled(has_gradient):
            torch.testing.assert_close(found(x, GRID), wanted(x, GRID), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", list_attention())
def test_hooks_of_a_backward_are_run(name):
    layer, seen = build_scrambled(name), set()
    linears = {z for z in layer.modules() if isinstance(z, torch.nn.Linear)}
    for linear in linears:
        linear.register_full_backward_hook(lambda linear, *_: seen.add(linear))
    layer(tokens(GRID).requires_grad_(), GRID).sum().backward()
    assert seen == linears


@pytest.mark.parametrize(("name", "stream"), CASES)
def test_quantized_weights_are_only_multiplied(name, stream):
    layer, x = build_scrambled(name, **({"stream": stream} if stream else {})), tokens(GRID)
    exact = layer(x, GRID)
    quantize(layer)
    for has_gradient in (False, True):
        with torch.set_grad_enabled(has_gradient):
            torch.testing.assert_close(layer(x, GRID), exact, rtol=1e-4, atol=1e-4)


def replica_of(module):
    """As ``torch.nn.parallel.replicate`` makes one on each GPU, with weights as attributes."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else replica_of(child)
    for name, parameter in module._parameters.items():
        if parameter is None:
            replica._parameters[name] = None
        else:
            setattr(replica, name, parameter.view_as(parameter))
    return replica


@pytest.mark.parametrize("name", list_attention())
def test_replicas_of_data_parallel_compute_the_same(name):
    layer, x = build_scrambled(name), tokens(GRID)
    for has_gradient in (False, True):
        with torch.set_grad_enabled(has_gradient):
            torch.testing.assert_close(replica_of(layer)(x, GRID), layer(x, GRID))


@pytest.mark.parametrize("name", list_attention())
def test_what_counts_operators_changes_none(name):
    layer, x = build_scrambled(name), tokens(GRID)
    layer(x, GRID)  # what is made once
    alone, tracked = operators_alone_and_tracked(lambda: layer(x, GRID))
    assert alone == tracked
