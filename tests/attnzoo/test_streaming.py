"""Inference in two passes over blocks of tokens: the same numbers, hardly any memory."""

import dataclasses

import pytest
import torch
from torch import nn

from attnzoo import build_attention
from attnzoo.ops.streaming import linear_parts
from attnzoo.testing import build_scrambled, check_twin, tokens

STREAMED = [
    ("sana", {}),
    ("sana", {"qk_norm": True, "qkv_bias": True}),
    ("focused", {}),
    ("focused", {"conv": "acnet", "conv_scope": "token", "norm_scope": "head"}),
    ("focused", {"conv": "none", "key_position": (7, 13)}),
    ("dydila", {}),
    ("dydila", {"num_heads": 3, "normalizer": "diff", "qkv_bias": True}),
    ("dydila", {"conv": "5x5", "key_position": (7, 13)}),
    ("dydila", {"projection": "replace", "differential": "none"}),
    ("dydila", {"projection": "none", "differential": "none", "conv": "none"}),
    ("dydila-map", {}),
    ("dydila-map", {"normalizer": "mean"}),
]


def _streamed(layer, block):
    layer.config = dataclasses.replace(layer.config, stream=block)
    return layer


# Less than a row; one row, which is less than a 5x5 kernel looks; rows with a rest; everything.
@pytest.mark.parametrize("block", [1, 13, 40, 10_000])
@pytest.mark.parametrize(("name", "options"), STREAMED)
@torch.no_grad()
def test_streaming_changes_no_number(name, options, block):
    layer, x = build_scrambled(name, **options).double(), tokens((7, 13)).double()
    exact = layer(x, (7, 13))
    torch.testing.assert_close(_streamed(layer, block)(x, (7, 13)), exact)


@pytest.mark.parametrize("name", ["sana", "focused", "dydila", "dydila-map"])
def test_a_gradient_is_not_streamed(name):
    layer, x = build_scrambled(name), tokens((4, 4))
    exact = torch.autograd.grad(layer(x, (4, 4)).sum(), layer.proj.weight)
    found = torch.autograd.grad(_streamed(layer, 4)(x, (4, 4)).sum(), layer.proj.weight)
    torch.testing.assert_close(found, exact)


@torch.no_grad()
def test_training_is_not_streamed():
    """A batch norm wants the statistics of the whole grid."""
    layer, x = build_scrambled("dydila").train(), tokens((4, 4))
    exact = layer(x, (4, 4))
    torch.testing.assert_close(_streamed(layer, 4)(x, (4, 4)), exact)


@pytest.mark.parametrize("name", ["sana", "focused", "dydila"])
@torch.no_grad()
def test_streaming_under_autocast(name):
    layer, x = build_scrambled(name), tokens((8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        exact, streamed = layer(x, (8, 8)), _streamed(layer, 16)(x, (8, 8))
    assert streamed.dtype == exact.dtype == torch.bfloat16
    assert (streamed - exact).norm() < 0.05 * exact.norm()


def test_an_adapter_around_a_linear_layer_is_used():
    class Doubled(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return 2 * self.layer(x)

    layer, x = build_scrambled("sana"), tokens((4, 4))
    expected = Doubled(layer.qkv)(x).chunk(3, -1)
    torch.testing.assert_close(linear_parts(Doubled(layer.qkv), x, 48), list(expected))
    torch.testing.assert_close(linear_parts(layer.qkv, x, 48, slice(1))[0] * 2, expected[0])


def test_errors_name_the_remedy():
    with pytest.raises(ValueError, match="stream must be at least 1, got 0"):
        build_attention("sana", 48, stream=0)
    with pytest.raises(ValueError, match=r"set stream=None or map_router='token'"):
        build_attention("dydila-map", 48, stream=64, map_router="image")


@pytest.mark.parametrize("options", [{}, {"num_heads": 1}, {"qkv_bias": True}])
def test_folding_the_projection_changes_no_number(options):
    check_twin("sana", impl="folded", **options)
