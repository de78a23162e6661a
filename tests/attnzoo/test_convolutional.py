"""What focused, lit, edit and compressed attention share: reference, cost, precision, errors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import attnzoo
from attnzoo import build_attention
from attnzoo.layers.depthwise_conv import DepthwiseConv
from tests.attnzoo.formulas import GRIDS, assert_near, assert_same, build, tokens

OPTIONS: dict[str, list[dict]] = {
    "focused": [
        {},
        {"conv": "acnet", "num_heads": 4},
        {"conv": "none", "eps": 1e-15},
        {"focusing_factor": 4.5, "num_heads": 1, "conv": "acnet"},
    ],
    "lit": [
        {},
        {"conv": "3x3", "num_heads": 4},
        {"conv": "acnet", "num_heads": 1},
        {"conv": "none"},
    ],
    "edit": [
        {},
        {"bottleneck": 4, "stride": 1, "num_heads": 1},
        {"bottleneck": 1, "stride": 3},
    ],
    "compressed": [
        {},
        {"ratio": 4, "num_heads": 4},
        {"ratio": 3},
        {"ratio": 1},
    ],
}
VARIANTS = [(name, options) for name, variants in OPTIONS.items() for options in variants]
ERRORS: dict[str, list[tuple[dict, str]]] = {
    "focused": [
        ({"key_position": (4, 0)}, r"key_position must be a grid \(height, width\) or None"),
        ({"key_position": (4, 4, 4)}, "key_position must hold 2 values"),
        ({"focusing_factor": 0.0}, "focusing_factor must be positive"),
        ({"eps": -1.0}, "eps must be at least 1e-15"),
        ({"conv": "5x6"}, "did you mean '5x5'"),
    ],
    "lit": [
        ({"eps": -1.0}, "eps must be at least 1e-15"),
        ({"conv": "5x6"}, "did you mean '5x5'"),
        ({"num_heads": 5}, "choose one of"),
    ],
    "edit": [
        ({"bottleneck": 0}, "bottleneck must be at least 1"),
        ({"eps": -1.0}, "eps must be at least 1e-15"),
    ],
    "compressed": [
        ({"ratio": 0}, "ratio must be at least 1"),
        ({"layers": "second-hlaf"}, "did you mean 'second-half'"),
        ({"layers": (14,)}, r"names blocks \[14\], but depth=1; choose indices from 0 to 0"),
        ({"impl": "flsh"}, "did you mean 'flash'"),
    ],
}


def _compare(name: str, options: dict, grid: tuple[int, int], batch: int) -> None:
    fast, reference = build(name, **options), build(name, impl="reference", **options)
    reference.load_state_dict(fast.state_dict())
    x = tokens(grid, batch)
    assert_same(x, (fast, fast(x, grid)), (reference, reference(x, grid)))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_reference(name: str, grid: tuple[int, int], batch: int) -> None:
    _compare(name, {}, grid, batch)


@pytest.mark.parametrize(("name", "options"), [variant for variant in VARIANTS if variant[1]])
def test_reference_with_options(name: str, options: dict) -> None:
    _compare(name, options, (7, 13), 2)


@pytest.mark.parametrize("grid", [(8, 8), (7, 13)])
@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_closed_form_macs_equal_the_count(name: str, options: dict, grid: tuple[int, int]) -> None:
    # The CPU's fused softmax attention is not counted.
    with torch.device("meta" if name == "compressed" else "cpu"):
        layer = build_attention(name, 64, **options)
        x = torch.randn(1, grid[0] * grid[1], 64)
    with FlopCounterMode(display=False) as counter:
        layer(x, grid)
    assert counter.get_total_flops() == 2 * layer.macs(grid)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIONS)
def test_half_precision_is_finite_over_4096_tokens(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = build_attention(name, 64)
    x = (8 * torch.randn(1, 4096, 64)).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        out = layer(x, (64, 64))
    out.float().square().mean().backward()
    assert out.isfinite().all()
    assert all(z.grad.isfinite().all() for z in [x, *layer.parameters()])


@pytest.mark.parametrize(
    ("name", "options", "message"), [(name, *row) for name, rows in ERRORS.items() for row in rows]
)
def test_errors_name_the_remedy(name: str, options: dict, message: str) -> None:
    with pytest.raises(attnzoo.UsageError, match=message):
        build_attention(name, 64, **options)


@pytest.mark.parametrize("name", OPTIONS)
def test_wrong_grid_is_named(name: str) -> None:
    with pytest.raises(ValueError, match="grid=2x3 does not hold the 64 tokens"):
        build(name)(tokens((8, 8)), (2, 3))


@pytest.mark.parametrize("kind", ["acnet", "5x5"])
@pytest.mark.parametrize("name", ["focused", "lit"])
def test_fuse_keeps_the_output(name: str, kind: str) -> None:
    layer = build(name, conv=kind)
    x = tokens((7, 13), 2)
    layer(x, (7, 13))  # moves the batch norms' statistics
    fused = copy.deepcopy(layer.eval())
    changed = fused.fuse()
    assert changed == {"conv": "5x5" if kind == "5x5" else "3x3"}
    assert_near([fused(x, (7, 13))], [layer(x, (7, 13))])
    fresh = build(name, **changed).eval()
    fresh.load_state_dict(fused.state_dict())
    assert_near([fresh(x, (7, 13))], [layer(x, (7, 13))])


@pytest.mark.parametrize("name", ["focused", "lit"])
def test_attention_map_is_what_the_output_sums(name: str) -> None:
    layer = build(name, conv="none")
    x = tokens((7, 13))
    weights = layer.attention_map(x, (7, 13))
    value = layer.qkv(x).chunk(3, -1)[2].unflatten(-1, (2, 32)).transpose(1, 2)
    out = layer.proj((weights @ value).transpose(1, 2).flatten(2))
    assert_near([out], [layer(x, (7, 13))])


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (5, 4), (40, 40)])  # few tokens and many
@pytest.mark.parametrize("is_added", [False, True])
def test_branches_in_eval_mode_are_their_sum(grid: tuple[int, int], is_added: bool) -> None:
    torch.manual_seed(0)
    conv, x = DepthwiseConv(24, "acnet"), torch.randn(2, grid[0] * grid[1], 24)
    added = torch.randn_like(x) if is_added else None
    for norm in conv.norms:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    conv.eval()
    exact = copy.deepcopy(conv).double()
    wide = [None if z is None else z.double() for z in (x, added)]
    expected = exact(wide[0], grid, wide[1], impl="reference")
    torch.testing.assert_close(exact(wide[0], grid, wide[1]), expected)
    for is_differentiated in (False, True):
        with torch.set_grad_enabled(is_differentiated):
            out = conv(x, grid, added)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
