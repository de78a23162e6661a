"""The kernels of test-time training equal their reference, on a GPU or interpreted.

``test_interpreted.py`` runs this file again under Triton's interpreter.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from attnzoo import build_attention
from attnzoo.ops.inner_loop import conv_tokens, unit_tokens
from attnzoo.testing import build_scrambled, tokens
from tests.attnzoo.interpreted import CAN_RUN, DEVICE, HAS_TRITON, IMPLEMENTATIONS, IS_INTERPRETED

HALF = torch.bfloat16


@pytest.mark.skipif(not HAS_TRITON or CAN_RUN, reason="needs Triton and no GPU")
def test_asking_for_triton_where_it_does_not_serve():
    with pytest.raises(RuntimeError, match=r"runs on a GPU, not on 'cpu'"):
        build_attention("ttt", 32, impl="triton")(torch.ones(1, 4, 32), (2, 2))


def random(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def unit_operands(b, n, heads, width, has_local, dtype=torch.float32):
    """Tokens, both matrices, perhaps what comes behind the heads; and a cotangent."""
    found = [random(b, n, 3 * heads * width, dtype=dtype)]
    found += [random(heads, width, width, seed=s, dtype=dtype) / width**0.5 for s in (1, 2)]
    found += [random(b, n, width, seed=3, dtype=dtype)] * has_local
    # Long values, so that a step is not small beside its matrix.
    found[0][..., 2 * heads * width :] *= 30
    return [*found, random(b, n, (heads + has_local) * width, seed=4, dtype=dtype)]


def unit(heads, impl, rate=0.7):
    def call(qkv, first, second, *local):
        return unit_tokens(qkv, first, second, heads, rate, *local, impl=impl)

    return call


def conv_operands(b, grid, channels, dtype=torch.float32):
    n = grid[0] * grid[1]
    found = [random(b, n, 3 * channels, dtype=dtype), random(channels, 1, 3, 3, seed=1)]
    found[0][..., 2 * channels :] *= 30
    return [found[0], found[1].to(dtype), random(b, n, channels, seed=4, dtype=dtype)]


def conv(grid, impl, rate=0.7):
    return lambda qkv, taps: conv_tokens(qkv, grid, taps, rate, impl=impl)


def with_gradients(function, inputs):
    """The output and the gradients of all operands, in float64."""
    *inputs, cotangent = inputs
    inputs = [z.detach().clone().requires_grad_() for z in inputs]
    out = function(*inputs)
    assert out.dtype == inputs[0].dtype
    found = [out, *torch.autograd.grad(out, inputs, cotangent)]
    assert all(f.dtype == z.dtype for f, z in zip(found[1:], inputs, strict=True))
    return [z.detach().double() for z in found]


def errors(found, exact):
    pairs = zip(found, exact, strict=True)
    return [((f - e).norm() / e.norm().clamp_min(1e-30)).item() for f, e in pairs]


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
    ("b", "n", "heads", "width", "has_local"),
    [(2, 37, 3, 8, True), (1, 1, 1, 24, False), (1, 150, 2, 40, True), (2, 70, 1, 64, False)],
)
def test_the_unit_equals_the_reference(b, n, heads, width, has_local, dtype, impl):
    if impl == "triton" and dtype == torch.float32:
        width = min(width, 32)  # wider ones are PyTorch's
    inputs = unit_operands(b, n, heads, width, has_local, dtype)
    check(inputs, lambda impl: unit(heads, impl), impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize(
    ("b", "grid", "channels"), [(2, (5, 7), 5), (1, (1, 1), 3), (1, (3, 40), 70), (1, (40, 1), 16)]
)
def test_the_convolution_equals_the_reference(b, grid, channels, dtype, impl):
    check(conv_operands(b, grid, channels, dtype), lambda impl: conv(grid, impl), impl)


if CAN_RUN:

    def test_wide_heads_are_left_to_pytorch():
        *inputs, _ = unit_operands(1, 5, 1, 40, False)
        with pytest.raises(RuntimeError, match=r"heads of width 40 in torch.float32, only up to"):
            unit(1, "triton")(*inputs)
        assert torch.equal(unit(1, "auto")(*inputs), unit(1, "torch")(*inputs))

    def test_values_that_train_nothing_have_finite_gradients():
        inputs = unit_operands(1, 20, 2, 8, False)
        inputs[0][..., 32:] = 0
        check(inputs, lambda impl: unit(2, impl), "triton")

    def test_a_nan_stays_in_its_image():
        *inputs, _ = unit_operands(3, 20, 2, 8, True)
        broken = [inputs[0].clone(), *inputs[1:]]
        broken[0][1, 3, 20] = float("nan")
        clean, found = (unit(2, "triton")(*z) for z in (inputs, broken))
        assert torch.equal(clean[::2], found[::2]) and found[1].isnan().any()

    def test_float16_keeps_small_gradients():
        inputs = [z.half() for z in unit_operands(1, 150, 2, 8, True)]
        exact = with_gradients(unit(2, "reference"), [z.double() for z in inputs])
        assert max(errors(with_gradients(unit(2, "triton"), inputs), exact)) < 2e-3

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
