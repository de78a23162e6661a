"""The kernels of test-time training equal their reference, on a GPU or interpreted.

``test_interpreted.py`` runs this file again under Triton's interpreter.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from attnzoo import build_attention
from attnzoo.ops.inner_loop import inner_tokens
from attnzoo.testing import build_scrambled, tokens
from tests.attnzoo.interpreted import (
    CAN_RUN,
    DEVICE,
    HAS_TRITON,
    IMPLEMENTATIONS,
    IS_INTERPRETED,
    random,
    with_gradients,
)
from tests.attnzoo.interpreted import relative_errors as errors

HALF = torch.bfloat16


@pytest.mark.skipif(not HAS_TRITON or CAN_RUN, reason="needs Triton and no GPU")
def test_asking_for_triton_where_it_does_not_serve():
    with pytest.raises(RuntimeError, match=r"runs on a GPU, not on 'cpu'"):
        build_attention("ttt", 32, impl="triton")(torch.ones(1, 4, 32), (2, 2))


def operands(b, grid, heads, width, has_taps, dtype=torch.float32):
    """Tokens, both matrices, perhaps taps, a bias; and a cotangent."""
    n, columns = grid[0] * grid[1], (heads + has_taps) * width
    found = [random(b, n, 3 * columns, dtype=dtype)]
    found += [random(heads, width, width, seed=s, dtype=dtype) / width**0.5 for s in (1, 2)]
    found += [random(width, 1, 3, 3, seed=3, dtype=dtype)] * has_taps
    found += [random(3 * columns, seed=5, dtype=dtype)]
    # Long values, so that a step is not small beside its matrix.
    for start in (2 * heads * width, 3 * heads * width + 2 * width):
        found[0][..., start : start + (heads if start < 3 * heads * width else 1) * width] *= 30
    return [*found, random(b, n, columns, seed=4, dtype=dtype)]


def inner(grid, impl, rate=0.7):
    def call(qkv, first, second, *others):
        taps = others[0] if len(others) == 2 else None
        return inner_tokens(qkv, grid, first, second, taps, rate, others[-1], impl=impl)

    return call


def check(inputs, function_of, impl):
    exact = with_gradients(function_of("reference"), [z.double() for z in inputs])
    found = errors(with_gradients(function_of(impl), inputs), exact)
    if inputs[0].dtype == torch.float32:
        assert max(found) < 2e-6, found
        return
    # The interpreter cuts bfloat16 off where a GPU rounds: the errors are four times as large.
    times = 10 if IS_INTERPRETED else 2
    own = errors(with_gradients(function_of("reference"), inputs), exact)
    for error, other in zip(found, own, strict=True):
        assert error <= times * max(other, 2**-8), (found, own)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize(
    ("b", "grid", "heads", "width", "has_taps"),
    [
        (2, (1, 37), 3, 8, False),
        (2, (5, 7), 3, 5, True),
        (1, (1, 1), 1, 24, True),
        (1, (3, 50), 2, 40, True),
        (2, (70, 1), 1, 64, True),
        (1, (9, 4), 0, 16, True),
    ],
    ids=str,
)
def test_the_inner_loop_equals_the_reference(b, grid, heads, width, has_taps, dtype, impl):
    if impl == "triton" and dtype == torch.float32:
        width = min(width, 32)  # wider ones are PyTorch's
    inputs = operands(b, grid, heads, width, has_taps, dtype)
    check(inputs, lambda impl: inner(grid, impl), impl)


if CAN_RUN:

    def test_wide_heads_are_left_to_pytorch():
        *inputs, _ = operands(1, (1, 5), 1, 40, False)
        with pytest.raises(RuntimeError, match=r"heads of width 40 in torch.float32, only up to"):
            inner((1, 5), "triton")(*inputs)
        assert torch.equal(*(inner((1, 5), impl)(*inputs) for impl in ("auto", "torch")))

    def test_values_that_train_nothing_have_finite_gradients():
        inputs = operands(1, (4, 5), 2, 8, True)
        inputs[0][..., 32:48] = inputs[0][..., 64:] = 0
        check(inputs, lambda impl: inner((4, 5), impl), "triton")

    def test_a_nan_stays_in_its_image():
        *inputs, _ = operands(3, (4, 5), 2, 8, True)
        broken = [inputs[0].clone(), *inputs[1:]]
        broken[0][1, 3, 20] = float("nan")
        clean, found = (inner((4, 5), "triton")(*z) for z in (inputs, broken))
        assert torch.equal(clean[::2], found[::2]) and found[1].isnan().any()

    def test_float16_keeps_small_gradients():
        inputs = [z.half() for z in operands(1, (3, 50), 2, 8, True)]
        exact = with_gradients(inner((3, 50), "reference"), [z.double() for z in inputs])
        assert max(errors(with_gradients(inner((3, 50), "triton"), inputs), exact)) < 2e-3

    @pytest.mark.parametrize("options", [{}, {"conv": False}], ids=str)
    @pytest.mark.parametrize("way", ["float32", "cast", "autocast"])
    def test_whole_layer_equals_the_reference(options, way):
        layer, grid = build_scrambled("ttt", **options).to(DEVICE), (3, 5)
        x = tokens(grid).to(DEVICE)
        exact = build_scrambled("ttt", impl="reference", **options).to(DEVICE).double()
        exact.load_state_dict(layer.state_dict())
        expected = [exact(x.double(), grid)]
        expected += torch.autograd.grad(expected[0].square().sum(), list(exact.parameters()))
        if way == "cast":
            layer, x = layer.bfloat16(), x.bfloat16()
        with torch.autocast(DEVICE, HALF, enabled=way == "autocast"):
            found = [layer(x, grid)]
        found += torch.autograd.grad(found[0].float().square().sum(), list(layer.parameters()))
        assert max(errors(found, expected)) < (1e-5 if way == "float32" else 0.1)

    def test_compiles_into_one_graph_and_is_counted():
        layer, grid = build_scrambled("ttt").to(DEVICE), (4, 4)
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(layer, backend=counter, fullgraph=True)
        x = tokens(grid).to(DEVICE).requires_grad_()
        results = []
        for either in (compiled, layer):
            out = either(x, grid)
            operands = [x, *layer.parameters()]
            results.append([out, *torch.autograd.grad(out.square().sum(), operands)])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
        assert counter.frame_count == 1
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            layer(x, grid)
        assert flops.get_total_flops() == 2 * len(x) * sum(layer.macs_parts(grid).values())
