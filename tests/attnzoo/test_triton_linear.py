"""Linear attention's core in Triton equals its reference: outputs, gradients, whole layers.

On a GPU, or as ``test_interpreted.py`` runs it.
"""

import pytest
import torch
import torch._dynamo.testing

from attnzoo import build_attention
from attnzoo.errors import InvalidValue, Unavailable
from attnzoo.layers.linear import windows_linear
from attnzoo.ops import dispatch
from attnzoo.ops.agent_core import agent_core
from attnzoo.ops.block_core import TokenBlocks, block_core
from attnzoo.ops.causal_conv import causal_conv
from attnzoo.ops.depthwise_conv import depthwise_conv, gated_depthwise_conv
from attnzoo.ops.dispatch import linear
from attnzoo.ops.downsample import downsample
from attnzoo.ops.fixation_core import fixation_core
from attnzoo.ops.gated_norm import gated_norm
from attnzoo.ops.group_norm import group_norm
from attnzoo.ops.linear_core import linear_tokens
from attnzoo.ops.normed_difference import normed_difference
from attnzoo.ops.power_map import scaled_power_map
from attnzoo.ops.rotary_core import rotary_core
from attnzoo.ops.windows import from_windows, to_windows
from attnzoo.testing import build_scrambled, reference_of, tokens
from tests.attnzoo.interpreted import (
    BUDGETS,
    CAN_RUN,
    DEVICE,
    HALF,
    HAS_TRITON,
    IMPLEMENTATIONS,
    IS_INTERPRETED,
    errors,
    random,
)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "budget"), BUDGETS, ids=str)
@pytest.mark.parametrize(
    ("grid", "cells", "has_conv"),
    [
        ((4, 6), (2, 2), True), ((1, 1), (1, 1), True),
        # Two parts of the tokens, the first of two tiles; cells of more than a tile.
        ((9, 4), (1, 2), True), ((9, 4), (1, 2), False),
    ],
    ids=str,
)  # fmt: skip
def test_agent_core(impl, dtype, budget, grid, cells, has_conv, small_convolutions, monkeypatch):
    if impl == "triton" and IS_INTERPRETED:
        from attnzoo.ops.agent_core import triton as kernels

        monkeypatch.setattr(kernels, "PROGRAMS", 12)
        monkeypatch.setattr(kernels, "BLOCKS", dict.fromkeys(kernels.BLOCKS, (16, 4)))
    n = grid[0] * grid[1]
    operands = [random(2, n, 72, seed=1)]
    if has_conv:
        operands += random(24, 1, 3, 3, seed=2), random(24, seed=3)

    def run(qkv, weight=None, bias=None, **options):
        return agent_core(qkv, weight, bias, 3, grid, cells, **options)

    assert max(errors(run, operands, (2, n, 24), dtype, impl)) < budget


@pytest.fixture
def rounding(monkeypatch):
    """The interpreter rounds to bfloat16 as a GPU does: a bias shows where numbers cancel."""
    if not IS_INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(x, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(x, source, target, mode)
        wide = torch.from_numpy(x.copy().view("float32"))
        return wide.to(HALF).view(torch.uint16).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


@pytest.fixture
def small_turns(rounding, small_convolutions, monkeypatch):
    if IS_INTERPRETED:
        from attnzoo.ops.rotary_core import triton as kernels

        block = kernels.Block(8, 8, 4, 1)
        monkeypatch.setattr(kernels, "BLOCKS", dict.fromkeys(kernels.BLOCKS, block))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("is_weighed", [False, True])
@pytest.mark.parametrize(
    ("grid", "d", "size", "is_rotated"),
    # Two parts of the tokens, the first of two tiles; channels beyond those that turn.
    [((5, 4), 10, 5, True), ((3, 6), 8, 3, False), ((1, 1), 16, 0, True), ((2, 3), 3, 0, True)],
    ids=str,
)
def test_rotary_core(impl, dtype, is_weighed, grid, d, size, is_rotated, small_turns):
    n, heads = grid[0] * grid[1], 2
    operands = [random(2, n, 3 * heads * d, seed=1), random(2, n, heads * d, seed=4)]
    if size:
        operands += random(heads * d, 1, size, size, seed=2), random(heads * d, seed=3)

    def run(qkv, gate, weight=None, bias=None, **options):
        kind = heads, grid, is_rotated, is_weighed, 1e-3
        return rotary_core(qkv, gate, weight, bias, *kind, **options)

    shape = 2, n, heads * d
    if dtype == torch.float32:
        # A GPU found 1.2e-6 of one token, whose products are split into three.
        assert max(errors(run, operands, shape, dtype, impl)) < 2e-6
        return
    for error, other in zip(
        *(errors(run, operands, shape, dtype, either) for either in (impl, "torch")), strict=True
    ):
        assert error < max(2**-7, 2 * other) < 0.05


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("is_weighed", [False, True])
def test_a_nan_of_rotary_core_stays_in_its_image(impl, is_weighed, small_turns):
    clean, gate = random(2, 20, 3 * 16, seed=1), random(2, 20, 16, seed=2)
    results = []
    for place in (None, 7, 23, 40):  # of a query, a key, a value
        qkv = clean.clone()
        if place is not None:
            qkv[0, 3, place] = torch.nan
        qkv.requires_grad_()
        out = rotary_core(qkv, gate, None, None, 2, (4, 5), True, is_weighed, 1e-6, impl=impl)
        results.append((out, *torch.autograd.grad(out.sum(), qkv)))
        assert place is None or out[0, 3].isnan().any()
    for z in zip(*results, strict=True):
        assert z[0].isfinite().all()
        assert all(torch.equal(other[1], z[0][1]) for other in z[1:])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "budget"), BUDGETS, ids=str)
@pytest.mark.parametrize(
    ("grid", "side", "d", "size"),
    # Two parts of a block, the first of two tiles; blocks that are cut off, below and aside.
    [((8, 12), 2, 10, 3), ((5, 7), 2, 16, 5), ((9, 7), 4, 8, 0), ((3, 1), 4, 3, 0)],
    ids=str,
)
@pytest.mark.parametrize("way", ["states", "pairs"])
def test_block_core(
    impl, dtype, budget, grid, side, d, size, way, rounding, small_convolutions, monkeypatch
):
    if impl == "triton":
        from attnzoo.ops.block_core import triton_pairs as pairs

        monkeypatch.setattr(pairs, "is_worth", lambda *_: way == "pairs")
    if IS_INTERPRETED:
        from attnzoo.ops.block_core import triton as kernels

        tile = pairs.Tile(32, 16, 4, 1)
        monkeypatch.setattr(pairs, "TILES", dict.fromkeys(pairs.TILES, (tile, tile)))
        block = kernels.Block(8, 12, 4, 1)
        monkeypatch.setattr(kernels, "BLOCKS", dict.fromkeys(kernels.BLOCKS, block))
        tiles = dict.fromkeys(kernels.MIXED, (1024, 4))  # several tiles of the states
        monkeypatch.setattr(kernels, "MIXED", tiles)
    n, heads, blocks = grid[0] * grid[1], 2, TokenBlocks.of(grid, side)
    mixing = random(blocks.count, blocks.count, seed=4).abs()
    operands = [random(2, n, 3 * heads * d, seed=1), mixing]
    if size:
        operands += random(heads * d, 1, size, size, seed=2), random(heads * d, seed=3)

    def run(qkv, mixing, weight=None, bias=None, **options):
        return block_core(qkv, mixing, weight, bias, heads, blocks, 1e-3, **options)

    assert max(errors(run, operands, (2, n, heads * d), dtype, impl)) < budget


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_few_tokens_are_multiplied_in_pairs():
    from attnzoo.ops.block_core.triton_pairs import is_worth

    # Few: states are as many as the blocks, and as wide as heads squared.
    for grid, side, d, few in ((16, 4, 64, True), (32, 4, 64, False), (16, 2, 32, False)):
        assert is_worth(HALF, d, TokenBlocks.of((grid, grid), side)) == few
    assert not is_worth(torch.float32, 64, TokenBlocks.of((16, 16), 4))  # products take longer
    assert not is_worth(HALF, 64, TokenBlocks.of((16, 16), 8))  # the most blocks


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("way", ["states", "pairs"])
def test_a_nan_of_block_core_stays_in_its_image(impl, way, monkeypatch):
    if impl == "triton":
        from attnzoo.ops.block_core import triton_pairs as pairs

        monkeypatch.setattr(pairs, "is_worth", lambda *_: way == "pairs")
    clean, blocks, results = random(2, 20, 3 * 16, seed=1), TokenBlocks.of((4, 5), 2), []
    mixing = random(4, 4, seed=2).abs()
    for place in (None, 7, 23, 40):  # of a query, a key, a value
        qkv = clean.clone()
        if place is not None:
            qkv[0, 3, place] = torch.nan
        qkv.requires_grad_()
        out = block_core(qkv, mixing, None, None, 2, blocks, 1e-6, impl=impl)
        results.append((out, *torch.autograd.grad(out.sum(), qkv)))
        assert place is None or out[0, 3].isnan().any()
    for z in zip(*results, strict=True):
        assert z[0].isfinite().all()
        assert all(torch.equal(other[1], z[0][1]) for other in z[1:])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "budget"), BUDGETS, ids=str)
@pytest.mark.parametrize(
    ("grid", "heads", "d", "is_shifted"),
    # Two parts of the tokens, the first of two tiles; channels beyond a multiple of 16; too few.
    [
        ((4, 7), 2, 24, True), ((7, 3), 3, 11, True), ((3, 5), 2, 24, False),
        ((1, 1), 1, 16, True), ((1, 6), 2, 5, True),
    ],
    ids=str,
)  # fmt: skip
def test_fixation_core(impl, dtype, budget, grid, heads, d, is_shifted, rounding, monkeypatch):
    if IS_INTERPRETED:
        from attnzoo.ops.fixation_core import triton as kernels

        for name in ("FOLD", "GRADIENT"):
            monkeypatch.setattr(kernels, name, kernels.Block(8, 4 * heads, 4, 1, 255))
        monkeypatch.setattr(kernels, "FLOAT32_ROWS", 8)
        monkeypatch.setattr(kernels, "SHIFT_TILE", (16, 16))
    n = grid[0] * grid[1]
    operands = [random(2, n, 3 * heads * d, seed=1), random(d, 3 * d, seed=2) * d**-0.5]
    operands += [random(d, seed=3)]

    def run(qkv, weight, bias, **options):
        return fixation_core(qkv, weight, bias, heads, grid, is_shifted, 1.0, **options)

    assert max(errors(run, operands, (2, n, heads * d), dtype, impl)) < budget


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "budget"), BUDGETS, ids=str)
@pytest.mark.parametrize(
    ("grid", "window"),
    [((4, 6), (2, 2, 0)), ((5, 7), (3, 2, 1)), ((1, 1), (3, 2, 1)), ((6, 9), (3, 3, 0))],
    ids=str,
)
@pytest.mark.parametrize("parts", [1, 2])
def test_downsample(impl, dtype, budget, grid, window, parts):
    size, *steps = window
    operands = [
        random(2, grid[0] * grid[1], 20 * parts, seed=1),
        random(20, 1, size, size, seed=2),
        random(20, seed=3),
    ]
    shape = 2, -(-grid[0] // steps[0]) * -(-grid[1] // steps[0]), 20 * parts

    def run(x, weight, bias, **options):
        return downsample(x, grid, weight, bias, *steps, **options)

    if impl == "triton" or dtype == torch.float32:  # PyTorch's own in half precision is its own
        assert max(errors(run, operands, shape, dtype, impl)) < budget


def test_a_window_that_hangs_over_the_edge_is_a_mean_of_what_is_there():
    x = random(1, 35, 4)
    weight, bias = torch.full((4, 1, 2, 2), 0.25, device=DEVICE), random(4, seed=1)
    expected = torch.nn.functional.avg_pool2d(
        x.mT.unflatten(2, (5, 7)), 2, ceil_mode=True, count_include_pad=False
    )
    for impl in ("auto", "torch", "reference"):
        found = downsample(x, (5, 7), weight, bias, 2, 0, impl=impl)
        torch.testing.assert_close(found, expected.flatten(2).mT + bias)
    with pytest.raises(RuntimeError, match=r"hang over the edge|Triton|runs on a GPU"):
        downsample(x, (5, 7), weight, bias, 2, 0, impl="triton")


@pytest.mark.parametrize("grid", [(4, 6), (12, 12)], ids=str)
@pytest.mark.parametrize("size", [(2, 2), (4, 3)], ids=str)
def test_windows(grid, size):
    (height, width), (p, q) = grid, size
    x = random(2, height * width, 3 * 140)[..., 140:280].requires_grad_()
    image = x.unflatten(1, grid).permute(0, 3, 1, 2)
    expected = torch.nn.functional.unfold(image, size, stride=size).mT
    for impl in {"torch", IMPLEMENTATIONS[-1]}:
        found = to_windows(x, grid, size, impl=impl)
        assert torch.equal(found, expected)
        wide = random(*found.shape, seed=1).repeat(1, 1, 2)[..., : 140 * p * q]
        (of_tokens,) = torch.autograd.grad(found, x, wide)
        assert torch.equal(of_tokens, torch.autograd.grad(expected, x, wide, True)[0])
        windows = found.detach().requires_grad_()
        again = from_windows(windows, grid, size, impl=impl)
        assert torch.equal(again, x)
        (of_windows,) = torch.autograd.grad(again, windows, of_tokens)
        assert torch.equal(of_windows, wide)


@pytest.mark.parametrize("size", [(2, 3), (1, 1)], ids=str)
def test_a_product_of_windows_is_their_convolution(size):
    conv, x = torch.nn.Conv2d(20, 7, size, stride=size).to(DEVICE), random(2, 24, 20)
    cotangent, results = random(2, 24 // (size[0] * size[1]), 7, seed=1), []
    for call in (
        lambda z: conv(z.unflatten(1, (4, 6)).permute(0, 3, 1, 2)).flatten(2).mT,
        lambda z: windows_linear(conv, z, (4, 6)),
    ):
        operands = x.clone().requires_grad_(), *conv.parameters()
        out = call(operands[0])
        results.append([out, *torch.autograd.grad(out, operands, cotangent)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("b", [2, 1])
@pytest.mark.parametrize(("n", "width", "groups"), [(37, 48, 4), (300, 130, 5), (1, 16, 2)])
def test_group_norm(impl, b, n, width, groups):
    operands = [random(b, n, width, seed=1) * 2 + 3, *random(3, width, seed=2)]

    def run(x, shift, weight, bias, **options):
        return group_norm(x, shift, groups, weight, bias, 1e-5, 0.01, **options)

    assert max(errors(run, operands, (b, n, width), torch.float32, impl)) < 1e-6
    # The shift rounds the sum, and what is near 0 has another slope then.
    if impl == "triton":
        assert max(errors(run, operands, (b, n, width), HALF, impl)) < 2**-6


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "budget"), BUDGETS, ids=str)
@pytest.mark.parametrize(("n", "d"), [(37, 24), (1, 8), (300, 64)])
def test_gated_norm(impl, dtype, budget, n, d):
    both = random(2, n, 2 * 3 * d).unflatten(-1, (2, 3, d))
    operands = [*both.unbind(2), random(d, seed=1)]

    def run(x, gate, weight, **options):
        return gated_norm(x, gate, weight, 1e-5, **options)

    assert max(errors(run, operands, (2, n, 3 * d), dtype, impl)) < budget


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", [3, 5, 7])
@pytest.mark.parametrize("kernels", [12, 4])
def test_kernels_of_a_convolution_that_parts_share(impl, size, kernels, small_convolutions):
    operands = [
        random(2, 54, 12, seed=1),
        random(kernels, 1, size, size, seed=2),
        random(kernels, seed=3),
    ]

    def run(x, weight, bias, **options):
        return depthwise_conv(x, (9, 6), weight, bias, **options)

    assert max(errors(run, operands, (2, 54, 12), torch.float32, impl)) < 1e-6


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "budget"), BUDGETS, ids=str)
@pytest.mark.parametrize(
    ("grid", "kernels", "size", "has_bias"),
    [((5, 4), 12, 7, True), ((3, 9), 6, 3, False), ((1, 1), 12, 5, True)],
    ids=str,
)
def test_gated_convolution(
    impl, dtype, budget, grid, kernels, size, has_bias, small_convolutions
):  # fmt: skip
    n = grid[0] * grid[1]
    operands = [random(2, n, 24), random(kernels, 1, size, size, seed=1)]
    operands += [random(kernels, seed=2)] * has_bias

    def run(packed, weight, bias=None, **options):
        return gated_depthwise_conv(packed, grid, weight, bias, **options)

    assert max(errors(run, operands, (2, n, 12), dtype, impl)) < budget
    with torch.no_grad():  # stores nothing for a backward
        inputs = [z.to(dtype) for z in operands]
        exact = run(*[z.double() for z in inputs], impl="reference")
        assert (run(*inputs, impl=impl) - exact).norm() < budget * exact.norm()


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("is_normalized", [True, False])
@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize("activation", ["relu", "elu"])
def test_tokens_are_heads_side_by_side(impl, activation, is_normalized, is_packed):
    whole = random(2, 7, 36)
    feature = torch.relu if activation == "relu" else lambda z: torch.nn.functional.elu(z) + 1
    query, key, value = (feature(z.view(2, 7, 3, 4).transpose(1, 2)) for z in whole.split(12, -1))
    value = whole[..., 24:].view(2, 7, 3, 4).transpose(1, 2)
    weights = query @ key.mT
    if is_normalized:
        weights = weights / (weights.sum(-1, keepdim=True) + 0.1)
    operands = (whole, None, None) if is_packed else whole.split(12, -1)
    found = linear_tokens(*operands, 3, activation, is_normalized, 0.1, impl=impl)
    torch.testing.assert_close(found, (weights @ value).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("activation", [True, "gelu"])
def test_an_unknown_kernel_function_is_refused(impl, activation):
    with pytest.raises(InvalidValue, match=f"activation={activation!r}; give 'relu', 'elu'"):
        linear_tokens(random(1, 3, 24), None, None, 2, activation, impl=impl)
    with pytest.raises(InvalidValue, match="'softmax' needs no normalizer"):
        linear_tokens(random(1, 3, 24), None, None, 2, "softmax", impl=impl)


if CAN_RUN:

    def small_tiles(monkeypatch, programs=3):
        """More than one part and tile of small inputs."""
        from attnzoo.ops.linear_core import triton as kernels

        if IS_INTERPRETED:
            blocks = {
                name: tuple(
                    block._replace(width=width, rows=32, programs=programs * bool(block.programs))
                    for block, width in zip(kinds, (32, 32, 32), strict=True)
                )
                for name, kinds in kernels.BLOCKS.items()
            }
            monkeypatch.setattr(kernels, "BLOCKS", blocks)
            monkeypatch.setattr(kernels, "NARROW", 16)
            monkeypatch.setattr(kernels, "MEDIUM", 32)

    def operands_of(b, n, m, heads, width, dtype, is_packed):
        if is_packed:
            return [random(b, n, 3 * heads * width, dtype=dtype)]
        wide = random(b, m, 3 * heads * width, seed=1, dtype=dtype)  # rows of a longer row
        _, key, value = wide.chunk(3, dim=-1)
        return [random(b, n, heads * width, seed=2, dtype=dtype), key, value]

    def run(impl, operands, heads, activation, is_normalized, eps, cotangent):
        operands = [z.detach().requires_grad_() for z in operands]
        filled = operands if len(operands) == 3 else [*operands, None, None]
        out = linear_tokens(*filled, heads, activation, is_normalized, eps, impl=impl)
        return out, *torch.autograd.grad(out, operands, cotangent.to(out.dtype))

    def check(operands, heads, activation="relu", is_normalized=True, eps=1e-6):
        """Outputs and gradients, in norm: 1e-6, or twice the reference's error in bfloat16."""
        first, width = operands[0], operands[0].shape[-1] // (3 if len(operands) == 1 else 1)
        if activation == "none":
            operands = [z.abs() for z in operands]
        cotangent = random(*first.shape[:2], width, seed=9, dtype=first.dtype)
        options = heads, activation, is_normalized, eps, cotangent
        if first.shape[1] <= 100:
            exact = run("reference", [z.double() for z in operands], *options)
            own = run("reference", operands, *options)
        else:  # the reference's map would fill the memory; it too computes in float32
            exact = run("torch", [z.double() for z in operands], *options)
            own = run("torch", [z.float() for z in operands], *options)
            own = [z.to(first.dtype) for z in own]
        found = run("triton", operands, *options)
        largest = max(true.norm() for true in exact[1:])
        sizes = exact[0].norm(), *[largest] * len(operands)
        is_half = first.dtype == HALF
        # The interpreter cuts bfloat16 off where a GPU rounds: the errors are four times as large,
        # and all in one direction.
        times, least = (10 if IS_INTERPRETED else 2, 0.0) if is_half else (2, 1e-6)
        for mine, theirs, true, size in zip(found, own, exact, sizes, strict=True):
            assert mine.shape == true.shape and mine.dtype == theirs.dtype
            error, other = (((z.double() - true).norm() / size).item() for z in (mine, theirs))
            if is_half:  # the reference of few tokens is nearly exact; their state is rounded too
                other = max(other, 2**-8)
            assert error <= max(times * other, least), (error, other)

    @pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
    @pytest.mark.parametrize(
        ("activation", "is_normalized", "is_packed"),
        [
            ("relu", True, True),
            ("relu", True, False),
            ("none", True, True),
            ("relu", False, False),
            ("elu", True, True),
            ("elu", False, False),
            ("softmax", False, True),
        ],
    )
    @pytest.mark.parametrize(
        ("b", "n", "heads", "width"),
        [(2, 37, 5, 8), (1, 21, 2, 24), (1, 70, 2, 40), (1, 5, 1, 36)],
    )
    def test_outputs_and_gradients(
        b, n, heads, width, activation, is_normalized, is_packed, dtype, monkeypatch
    ):
        small_tiles(monkeypatch)
        operands = operands_of(b, n, n, heads, width, dtype, is_packed)
        check(operands, heads, activation, is_normalized)

    @pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
    @pytest.mark.parametrize("width", [8, 24, 40])
    @pytest.mark.parametrize(("n", "m"), [(50, 9), (1, 1), (3, 40)])
    def test_other_keys_than_queries(n, m, width, dtype, monkeypatch):
        small_tiles(monkeypatch)
        check(operands_of(2, n, m, 3, width, dtype, False), 3)

    @pytest.mark.parametrize("width", [32, 64, 96, 160])
    def test_the_tiles_that_are_used(width):
        check(operands_of(1, 70, 70, 3, width, HALF, True), 3)

    @pytest.mark.parametrize("size", [3, 5, 7])
    def test_the_tiles_that_are_used_for_a_convolution(size):
        operands = [random(1, 18, 66), random(66, 1, size, size, seed=1), random(66, seed=2)]

        def run(x, weight, bias, **options):
            return depthwise_conv(x, (9, 2), weight, bias, **options)

        assert max(errors(run, operands, (1, 18, 66), torch.float32, "triton")) < 1e-6

    @pytest.mark.parametrize(("side", "c", "rows"), [(64, 1024, 22), (64, 512, 11), (8, 64, 8)])
    def test_programs_of_a_7x7_convolution_end_together(side, c, rows):
        from attnzoo.ops.depthwise_conv import triton as kernels

        block = kernels._filled(kernels.STENCIL_BLOCK[7], (side, side), 1, c)
        assert block == (rows, *kernels.STENCIL_BLOCK[7][1:])
        assert kernels._parts((side, side), 1, c, block)[3] <= kernels.TOGETHER

    @pytest.mark.parametrize("size", [3, 5, 7])
    def test_the_tiles_that_are_used_for_a_gated_convolution(size):
        packed, weight = random(1, 2, 8), random(4, 1, size, size, seed=1)
        found, exact = (
            gated_depthwise_conv(packed, (1, 2), weight, None, impl=impl)
            for impl in ("triton", "reference")
        )
        torch.testing.assert_close(found, exact)

    @pytest.mark.parametrize("kernel_size", [3, 7])
    def test_the_gated_convolution_takes_its_kernels(kernel_size, small_convolutions, monkeypatch):
        layer = build_attention("conv", 24, kernel_size=kernel_size).to(DEVICE)
        x, exact = tokens((3, 4), 1, 24), reference_of(layer)
        monkeypatch.setattr("torch.nn.functional.conv2d", None)
        out = layer(x.to(DEVICE), (3, 4))
        monkeypatch.undo()
        torch.testing.assert_close(out, exact(x.to(DEVICE), (3, 4)))

    @pytest.mark.skipif(IS_INTERPRETED, reason="too slow for the interpreter")
    @pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
    @pytest.mark.parametrize(
        ("heads", "width"), [(24, 32), (12, 64), (6, 128), (2, 384), (1, 768)]
    )
    @pytest.mark.parametrize(("b", "n"), [(2, 4096), (64, 100)])
    def test_real_sizes(b, n, heads, width, dtype):
        check(operands_of(b, n, n, heads, width, dtype, True), heads)

    @pytest.mark.parametrize("width", [4, 160])
    def test_65537_tokens(width, monkeypatch):
        from attnzoo.ops.linear_core import triton as kernels

        n = 65537 if DEVICE == "cuda" or width == 4 else 4097
        if IS_INTERPRETED:
            monkeypatch.setattr(kernels, "FLOAT32_ROWS", 4096)
        whole = random(1, n, 3 * width)
        packed = linear_tokens(whole, None, None, 1, "relu", True, 1e-6, impl="triton")
        query, key, value = whole.double().split(width, -1)
        query, key = query.relu(), key.relu()
        norm = query @ key.sum(1).unsqueeze(-1) + 1e-6
        exact = query @ (key.mT @ value) / norm
        assert (packed - exact).norm() <= 1e-6 * exact.norm()

    @pytest.mark.parametrize(
        ("width", "activation"),
        [(8, "relu"), (24, "relu"), (40, "relu"), (24, "elu"), (40, "elu"), (8, "softmax")],
    )
    def test_a_nan_stays_in_its_image(width, activation, monkeypatch):
        small_tiles(monkeypatch)
        whole = random(3, 11, 3 * 2 * width)
        for place in (0, 2 * width + 1, 4 * width + 1):  # of a query, a key, a value
            broken = whole.clone()
            broken[1, 3, place] = float("nan")
            results = []
            for z in (whole, broken):
                z.requires_grad_()
                divides = activation != "softmax"
                out = linear_tokens(z, None, None, 2, activation, divides, 1e-6, impl="triton")
                results.append((out, *torch.autograd.grad(out.square().sum(), z)))
            for clean, found in zip(*results, strict=True):
                assert torch.equal(clean[::2], found[::2])
                assert found[1].isnan().any()

    # Parts of several tiles, or more parts than are added up at a time.
    @pytest.mark.parametrize("programs", [3, 12])
    def test_softmaxes_of_any_spread(programs, monkeypatch):
        """A channel's largest key in the first, a middle and the last part; keys of -inf."""
        small_tiles(monkeypatch, programs)
        n, c = 300, 32
        whole = random(1, n, 3 * c) * 30
        keys = whole[0, :, c : 2 * c]
        for channel, token in enumerate((0, 150, 299)):
            keys[token, channel] = 1e30
        keys[:, 3] += 1e4
        keys[:, 4] = -1e30 - 1e27 * torch.arange(n, device=DEVICE)
        keys[:290, 5] = -torch.inf
        whole[0, 7, :2] = 1e30  # a query's
        found, exact = (
            run(impl, [z], 2, "softmax", False, 0.0, random(1, n, c, seed=9))
            for impl, z in (("triton", whole), ("reference", whole.double()))
        )
        pairs = zip(*((out, *grad.chunk(3, dim=-1)) for out, grad in (found, exact)), strict=True)
        for mine, true in pairs:
            assert (mine - true).abs().max() <= 2e-6 * true.abs().max()

    def test_a_mean_of_the_values_costs_a_softmax_no_digits(rounding):
        whole = random(1, 300, 3 * 32)
        whole[..., 64:] += 8
        whole, cotangent = whole.to(HALF), random(1, 300, 32, seed=9)
        found, exact = (
            run(impl, [z], 1, "softmax", False, 0.0, cotangent)[1]
            for impl, z in (("triton", whole), ("reference", whole.double()))
        )
        for mine, true in zip(found.chunk(3, -1), exact.chunk(3, -1), strict=True):
            assert (mine - true).norm() <= 2**-7 * true.norm()

    def test_a_query_similar_to_no_key_gives_zero():
        whole = random(1, 9, 24).requires_grad_()
        operands = whole.detach().clone()
        operands[0, 4, :8] = -1.0
        operands.requires_grad_()
        out = linear_tokens(operands, None, None, 2, "relu", True, 1e-15, impl="triton")
        assert out[0, 4].eq(0).all()
        (grad,) = torch.autograd.grad(out.sum(), operands)
        assert grad.isfinite().all() and grad[0, 4, :8].eq(0).all()

    def test_nothing_in_nothing_out():
        for shape in ((0, 5, 24), (2, 0, 24)):
            whole = torch.zeros(*shape, device=DEVICE, requires_grad=True)
            out = linear_tokens(whole, None, None, 2, "relu", True, 1e-6, impl="triton")
            (grad,) = torch.autograd.grad(out.sum(), whole)
            assert out.shape == (*shape[:2], 8) and grad.shape == shape
        none = random(1, 0, 8)
        out = linear_tokens(random(1, 3, 8), none, none, 2, "softmax", False, impl="triton")
        assert out.eq(0).all()

    LAYERS = [
        ("sana", {}), ("sana", {"qk_norm": True}), ("sana", {"num_heads": 1}), ("focused", {}),
        ("focused", {"conv": "none", "key_position": (3, 5)}), ("lit", {}), ("edit", {}),
        ("linfusion", {}), ("efficient", {}), ("fixation", {}), ("mhla", {}),
        ("fixation", {"num_heads": 2}),
        ("lit", {"conv": "3x3"}), ("lit", {"conv": "acnet"}),
    ]  # fmt: skip

    @pytest.mark.parametrize(("name", "options"), LAYERS)
    def test_whole_layer_equals_the_reference(name, options, small_convolutions):
        layer, grid = build_scrambled(name, **options).to(DEVICE), (3, 5)
        x = tokens(grid).to(DEVICE).requires_grad_()
        assert layer.implementation(x) == "triton"
        cotangent = random(*x.shape, seed=3)
        results = []
        for either in (layer, reference_of(layer)):
            operands = [x, *either.parameters()]
            out = either(x, grid)
            grads = torch.autograd.grad(out, operands, cotangent, allow_unused=True)
            results.append((out, grads))
        (out, found), (exact, expected) = results
        assert (out - exact).abs().max() <= 1e-5 * exact.abs().max()
        largest = max(grad.abs().max() for grad in expected if grad is not None)
        for mine, theirs in zip(found, expected, strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                assert (mine - theirs).abs().max() <= 1e-5 * largest

    @pytest.mark.parametrize("way", ["cast", "autocast"])
    @pytest.mark.parametrize(("name", "options"), LAYERS[:-2])
    def test_whole_layer_in_half_precision(name, options, way, small_convolutions):
        layer, grid = build_scrambled(name, **options).to(DEVICE), (3, 5)
        x = tokens(grid).to(DEVICE)
        with torch.no_grad():
            exact = reference_of(layer).double()(x.double(), grid)
        if way == "cast":
            layer, x = layer.bfloat16(), x.bfloat16()
        with torch.autocast(DEVICE, HALF, enabled=way == "autocast"):
            assert layer.implementation(x) == "triton"
            out = layer(x, grid)
        assert out.dtype == HALF
        assert (out.double() - exact).norm() <= 0.1 * exact.norm()  # as of the contract
        out.float().square().sum().backward()
        for parameter in layer.parameters():
            assert parameter.grad.dtype == parameter.dtype and parameter.grad.isfinite().all()

    @pytest.mark.parametrize(
        ("name", "operator"),
        [
            ("sana", "linear_core"),
            ("efficient", "linear_core"),
            ("lit", "packed_core"),
            ("focused", "packed_core"),
            ("agent", "agent_core"),
            ("linformer", "few_keys"),
            ("mala", "rotary_core"),
            ("mhla", "block_core"),
            ("rala", "rotary_core"),
            ("compressed", "downsample"),
            ("fixation", "fixation_core"),
            ("edit", "group_norm"),
        ],
    )
    def test_compiles_into_one_graph(name, operator, small_convolutions):
        # Few and narrow enough in float32.
        options = {"linformer": {"landmarks": 16}, "fixation": {"num_heads": 2}}.get(name, {})
        layer, grid = build_scrambled(name, **options).to(DEVICE), (4, 4)
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(layer, backend=counter, fullgraph=True)
        x = tokens(grid).to(DEVICE).requires_grad_()
        results = []
        for either in (compiled, layer):
            out = either(x, grid)
            results.append([out, *torch.autograd.grad(out.square().sum(), [x, layer.proj.bias])])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
        assert counter.frame_count == 1
        graphs = str([graph.code for graph in counter.graphs])
        assert f"attnzoo.{operator}" in graphs

    @pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
    @pytest.mark.parametrize(("n", "d"), [(37, 24), (1, 8), (70, 768)])
    def test_scaled_power_map(n, d, dtype):
        z = random(2, n, 3 * d, dtype=dtype)[..., d : 2 * d]  # rows of a longer row
        z[0, 0] = -1.0  # all its entries are the offset
        scale, cotangent = random(d, seed=1).abs().add(0.1).to(dtype), random(2, n, d, seed=2)
        results = []
        for impl, wide in (("reference", torch.float64), ("triton", dtype)):
            operands = [x.to(wide).requires_grad_() for x in (z, scale)]
            out = scaled_power_map(*operands, 3.0, 1e-6, impl=impl)
            assert out.dtype == wide
            grads = torch.autograd.grad(out, operands, cotangent.to(wide))
            results.append([out, *grads])
        for exact, found in zip(*results, strict=True):
            budget = 2e-6 if dtype == torch.float32 else 2**-7
            assert (found - exact).norm() <= budget * exact.norm()

    @pytest.mark.parametrize("gamma", [1.0, 2.5, 12.0, -1.5])
    def test_scaled_power_map_of_any_exponent(gamma):
        z, scale = random(9, 40).add(0.1), random(40, seed=1).abs().add(0.5)
        results = []
        for impl, wide in (("reference", torch.float64), ("triton", torch.float32)):
            operands = [x.to(wide).requires_grad_() for x in (z, scale)]
            out = scaled_power_map(*operands, gamma, 1e-2, impl=impl)
            grads = torch.autograd.grad(out, operands, random(9, 40, seed=2).to(wide))
            results.append([out, *grads])
        for exact, found in zip(*results, strict=True):
            assert (found - exact).norm() <= 2e-6 * exact.norm()

    @pytest.mark.parametrize(("dtype", "budget"), [(torch.float32, 2e-6), (HALF, 2**-6)], ids=str)
    @pytest.mark.parametrize(
        ("heads", "width", "activation", "size", "is_mapped"),
        # One tile a head, and several; the convolution alone, the map alone, and both.
        [(2, 40, "relu", 3, False), (4, 8, "none", 3, True), (2, 80, "none", 0, True)],
    )
    def test_packed_tokens_with_what_surrounds_them(
        heads, width, activation, size, is_mapped, dtype, budget, small_convolutions, monkeypatch
    ):
        from attnzoo.ops.linear_core.triton_packed import packed_tokens

        small_tiles(monkeypatch)
        grid, c, gamma = (5, 7), heads * width, 3.0
        operands = {"qkv": random(2, 35, 3 * c)}
        if size:
            operands["weight"] = random(width, 1, size, size, seed=1) * 0.2
            operands["bias"] = random(width, seed=2)
        if is_mapped:
            operands["scale"] = random(c, seed=3) * 0.3

        def exact(qkv, weight=None, bias=None, scale=None):
            query, key, value = qkv.chunk(3, dim=-1)
            if scale is not None:
                soft = torch.nn.functional.softplus(scale)
                query, key = (
                    scaled_power_map(z, soft, gamma, 1e-6, impl="reference") for z in (query, key)
                )
            out = linear_tokens(query, key, value, heads, activation, True, 1e-3, impl="reference")
            return out if weight is None else depthwise_conv(value, grid, weight, bias, out)

        def kernels(qkv, weight=None, bias=None, scale=None):
            kernel = None if weight is None else (weight, bias)
            mapped = None if scale is None else (scale, gamma, 1e-6)
            return packed_tokens(qkv, heads, grid, activation, True, 1e-3, kernel, mapped)

        results = []
        for function, wide in ((exact, torch.float64), (kernels, dtype)):
            inputs = {k: z.to(dtype).to(wide).requires_grad_() for k, z in operands.items()}
            out = function(**inputs)
            cotangent = random(2, 35, c, seed=4, dtype=dtype).to(wide)
            results.append([out, *torch.autograd.grad(out, list(inputs.values()), cotangent)])
        for wanted, found in zip(*results, strict=True):
            assert found.shape == wanted.shape
            assert (found - wanted).norm() <= budget * wanted.norm()

    @pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
    @pytest.mark.parametrize(
        "shape",
        [
            (5, 7), (1, 9), (1500, 40), (2049, 13), (9000, 2, 10), (100, 4100), (0, 3),
            (64, 32), (2048, 128), (8192, 128),  # tiles that are full
        ],
        ids=str,
    )  # fmt: skip
    def test_column_sum(shape, dtype):
        from attnzoo.ops.triton_common import column_sum

        parts = random(*shape, dtype=dtype)
        exact = parts.double().sum(0)
        torch.testing.assert_close(column_sum(parts), exact.float(), rtol=1e-5, atol=1e-4)
        found = column_sum(parts, dtype)
        assert found.dtype == dtype and found.shape == exact.shape
        torch.testing.assert_close(found, exact.to(dtype), rtol=2**-7, atol=1e-4)

    def test_a_biased_layer_is_torchs_and_differentiated_twice(monkeypatch):
        monkeypatch.setattr(dispatch, "_MANY", 0)
        layer = torch.nn.Linear(6, 5).to(DEVICE)
        x = random(2, 7, 6).requires_grad_()
        results = []
        for call in (layer, lambda z: linear(layer, z)):
            out = call(x)
            assert (type(out.grad_fn).__name__ == "BiasedLinearBackward") == (call is not layer)
            operands = x, layer.weight, layer.bias
            grads = torch.autograd.grad(out.square().sum(), operands, create_graph=True)
            twice = torch.autograd.grad(sum(z.square().sum() for z in grads), operands)
            results.append([out, *grads, *twice])
        torch.testing.assert_close(*results)

    def test_second_derivatives_of_kernels_are_refused():
        x = random(2, 7, 8).requires_grad_()
        out = linear_tokens(x, x * 2, x + 1, 2, impl="triton") * x
        [slope] = torch.autograd.grad(out.sum(), x, create_graph=True)
        with pytest.raises(Unavailable, match="reference"):
            slope.square().sum().backward()

    @pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
    @pytest.mark.parametrize(("n", "d"), [(37, 24), (1, 8), (300, 128)])
    def test_normed_difference(n, d, dtype):
        heads = 3
        first = random(2, n, heads, d, dtype=dtype).transpose(1, 2)
        second = random(2, heads, n, d, seed=1, dtype=dtype)
        factor, weight = random(1, seed=2).squeeze(), random(d, seed=3, dtype=dtype)
        cotangent = random(2, n, heads * d, seed=4)
        results = []
        for impl, wide in (("reference", torch.float64), ("triton", dtype)):
            tokens_ = [z.to(wide).requires_grad_() for z in (first, second)]
            numbers = [factor.to(torch.promote_types(wide, torch.float32)), weight.to(wide)]
            operands = [*tokens_, *(z.requires_grad_() for z in numbers)]
            out = normed_difference(*operands, 1e-5, 0.4, impl=impl)
            assert out.dtype == wide
            grads = torch.autograd.grad(out, operands, cotangent.to(wide))
            results.append([out, *grads])
        for exact, found in zip(*results, strict=True):
            budget = 2e-6 if dtype == torch.float32 else 2**-7
            assert found.shape == exact.shape
            assert (found - exact).norm() <= budget * exact.norm()

    @pytest.mark.parametrize(
        ("operator", "shapes"),
        [
            (lambda x, w, z, **o: depthwise_conv(x, (1, 1), w, z, **o), [(8, 1, 3, 3), (8,)]),
            (lambda x, w, z, **o: downsample(x, (1, 1), w, z, 2, 1, **o), [(8, 1, 3, 3), (8,)]),
            (lambda x, w, z, **o: causal_conv(x, w, z, **o), [(8, 1, 4), (8,)]),
            (lambda x, *z, **o: group_norm(x, z[0], 2, *z[1:], 1e-5, **o), [(8,), (8,), (8,)]),
            (lambda x, w, **o: scaled_power_map(x, w.abs() + 1, 3.0, 1e-6, **o), [(8,)]),
            (lambda x, w, **o: gated_norm(x, x, w, 1e-5, **o), [(4,)]),
        ],
        ids=["depthwise", "downsample", "causal", "group_norm", "power_map", "gated_norm"],
    )
    def test_the_spacing_of_one_token_and_parameters_between_others(operator, shapes):
        """As a convolution of PyTorch and attention leave a token: its stride means nothing."""
        is_headed = shapes == [(4,)]
        x = random(3, 2, 1, 4).transpose(1, 2) if is_headed else random(3, 8, 1).mT
        parameters = [random(*shape, 2, seed=s)[..., 0] for s, shape in enumerate(shapes)]
        cotangents = random(3, 1, 8, seed=9), random(1, 1, 1, seed=9).expand(3, 1, 8)
        results = []
        for impl, wide in (("reference", torch.float64), ("triton", torch.float32)):
            inputs = [z.to(wide).requires_grad_() for z in (x, *parameters)]
            out = operator(*inputs, impl=impl)
            grads = (
                torch.autograd.grad(out, inputs, z.to(wide), retain_graph=True) for z in cotangents
            )
            results.append([out, *(z for some in grads for z in some)])
        for exact, found in zip(*results, strict=True):
            torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)

    def test_results_are_the_same_every_time():
        whole = random(2, 300, 96, dtype=HALF).requires_grad_()
        results = []
        for _ in range(2):
            out = linear_tokens(whole, None, None, 1, "relu", True, 1e-6, impl="triton")
            results.append((out, *torch.autograd.grad(out.float().square().sum(), whole)))
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)
