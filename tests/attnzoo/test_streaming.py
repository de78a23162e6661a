"""Inference block by block: the same numbers, hardly any memory."""

import copy
import dataclasses

import pytest
import torch

from attnzoo import build_attention, get_attention, list_attention
from attnzoo.testing import build_scrambled, outputs_and_gradients, tokens

# One grid is for options that fix it.
GRID = (7, 13)
STREAMED = [
    ("sana", {}),
    ("sana", {"qk_norm": True, "qkv_bias": True}),
    ("focused", {}),
    ("focused", {"conv": "acnet", "num_heads": 4}),
    ("focused", {"conv": "none", "key_position": GRID}),
    ("lit", {}),
    ("lit", {"conv": "acnet", "num_heads": 1}),
    ("lit", {"conv": "none"}),
    ("edit", {}),
    ("edit", {"stride": 1, "bottleneck": 1}),
    ("edit", {"stride": 3, "bottleneck": 4}),
    ("linfusion", {}),
    ("linfusion", {"middle_dim": 20, "num_heads": 3}),
    ("efficient", {}),
    ("efficient", {"num_heads": 4}),
    ("fixation", {}),
    ("fixation", {"share_gate": False, "num_heads": 3}),
    ("fixation", {"shift": False}),
    ("mhla", {}),
    ("mhla", {"n_blocks": 4, "conv": "5x5", "num_heads": 3}),
    ("mhla", {"n_blocks": 9, "conv": "none"}),
    ("mala", {}),
    ("mala", {"rope": False, "conv": "none", "num_heads": 3}),
    ("rala", {}),
    ("rala", {"rope": False, "conv": "none", "num_heads": 3}),
    ("agent", {}),
    ("agent", {"n_agents": 9, "num_heads": 4, "conv": False}),
    ("agent", {"n_agents": 16, "bias": "learned", "bias_grid": GRID}),
    *(
        ("gated", {"direction": direction})
        for direction in (
            "forward", "backward", "columns-forward", "columns-backward", "both", "four",
        )
    ),
    ("gated", {"expand_v": 2.0, "impl": "torch"}),
    ("gated", {"expand_v": 0.5, "gate_normalizer": 0.1}),
    ("dig", {}),
    ("dig", {"schedule": "two"}),
    *(("deltanet", {"direction": direction}) for direction in ("both", "four")),
    *(("deltanet", {"conv": conv}) for conv in ("causal", "none")),
    ("ttt", {}),
    ("ttt", {"conv": False, "rate": 0.5}),
    ("dydila", {}),
    ("dydila", {"num_heads": 3, "normalizer": "diff", "qkv_bias": True}),
    ("dydila", {"conv": "5x5"}),
    ("dydila", {"projection": "replace", "differential": "none"}),
    ("dydila", {"projection": "none", "differential": "none", "conv": "none"}),
    ("dydila-map", {}),
    ("dydila-map", {"normalizer": "mean"}),
    ("zigma", {}),
    ("zigma", {"state": "ssd", "paths": 1}),
    ("dis", {}),
    ("diffussm", {}),
    ("diffussm", {"reduction": 5}),
]  # fmt: skip
# Their forward reads tokens where they lie, and stores a few tensors of the tokens' size anyway.
UNSTREAMED = {"conv", "linformer", "local"}
LINEAR = [
    name
    for name in list_attention()
    if "n²" not in get_attention(name).complexity and name not in UNSTREAMED
]


def _streamed(layer, block):
    """The layer, which from now on streams, wherever it looks for its options."""
    for module in layer.modules():
        if hasattr(module, "config"):
            module.config = dataclasses.replace(module.config, stream=block)
    return layer


@pytest.mark.parametrize("name", LINEAR)
def test_every_linear_mechanism_streams(name):
    assert name in dict(STREAMED)


# Less than a row; one row, which is less than a 5x5 kernel looks; rows with a rest; everything.
BLOCKS = (1, 13, 40, 10_000)


@pytest.mark.parametrize(("name", "options"), STREAMED)
@torch.no_grad()
def test_streaming_changes_no_number(name, options):
    whole = build_scrambled(name, **options).double()
    streamed = {block: _streamed(copy.deepcopy(whole), block) for block in BLOCKS}
    grids = [GRID] if GRID in options.values() else [GRID, (5, 4), (1, 7), (9, 1)]
    for grid in grids:
        x = tokens(grid, 1 if grid == (5, 4) else 3).double()
        exact = whole(x, grid)
        for block, layer in streamed.items():
            torch.testing.assert_close(layer(x, grid), exact, msg=f"{block} {grid}")


@pytest.mark.parametrize("name", LINEAR)
def test_a_gradient_is_not_streamed(name):
    layer, x = build_scrambled(name), tokens((4, 4))
    exact = outputs_and_gradients(layer, x, (4, 4))
    found = outputs_and_gradients(_streamed(layer, 4), x, (4, 4))
    torch.testing.assert_close(found, exact)


@pytest.mark.parametrize(("name", "options"), [("dydila", {}), ("lit", {"conv": "acnet"})])
@torch.no_grad()
def test_training_is_not_streamed(name, options):
    """A batch norm wants the statistics of the whole grid."""
    layer, x = build_scrambled(name, **options).train(), tokens((4, 4))
    exact = layer(x, (4, 4))
    torch.testing.assert_close(_streamed(layer, 4)(x, (4, 4)), exact)


@pytest.mark.parametrize("name", LINEAR)
@torch.no_grad()
def test_streaming_in_half_precision(name):
    layer, x = build_scrambled(name), tokens((8, 8))
    streamed = _streamed(copy.deepcopy(layer), 16)
    with torch.autocast("cpu", torch.bfloat16):
        exact, found = layer(x, (8, 8)), streamed(x, (8, 8))
    assert found.dtype == exact.dtype == torch.bfloat16
    assert (found - exact).norm() < 0.05 * exact.norm()
    exact, x = layer(x, (8, 8)), x.bfloat16()
    found = streamed.bfloat16()(x, (8, 8))
    assert found.dtype == torch.bfloat16
    assert (found - exact).norm() < 0.1 * exact.norm()


@torch.no_grad()
def test_streaming_takes_an_empty_batch():
    for name, options in [*((name, {}) for name in LINEAR), ("gated", {"expand_v": 2.0})]:
        x = tokens((4, 4), batch=0)
        assert _streamed(build_scrambled(name, **options), 4)(x, (4, 4)).shape == x.shape


def test_errors_name_the_remedy():
    with pytest.raises(ValueError, match="stream must be at least 1, got 0"):
        build_attention("sana", 48, stream=0)
    for name, impl in (("agent", "flash"), ("gated", "fla")):
        with pytest.raises(ValueError, match=f"impl='{impl}' .*; set stream=None or impl='auto'"):
            build_attention(name, 48, stream=64, impl=impl)
    with pytest.raises(ValueError, match=r"set stream=None or map_router='token'"):
        build_attention("dydila-map", 48, stream=64, map_router="image")
