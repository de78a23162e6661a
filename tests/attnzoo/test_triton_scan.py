"""The kernels of Mamba's layers equal their references, on a GPU or interpreted.

``test_interpreted.py`` runs this file again under Triton's interpreter.
"""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from attnzoo import build_attention
from attnzoo.ops.causal_conv import causal_conv
from attnzoo.ops.hourglass import group_means, hourglass
from attnzoo.ops.selective_scan import selective_scan, selective_scan_macs
from attnzoo.ops.silu_gate import silu_gate
from attnzoo.testing import build_scrambled, tokens
from tests.attnzoo.interpreted import (
    CAN_RUN,
    DEVICE,
    HAS_TRITON,
    IS_INTERPRETED,
    doubled,
    random,
    with_gradients,
)
from tests.attnzoo.interpreted import relative_errors as errors


@pytest.mark.skipif(not HAS_TRITON or CAN_RUN, reason="needs Triton and no GPU")
@pytest.mark.parametrize("name", ["dis", "zigma", "diffussm"])
def test_asking_for_triton_where_it_does_not_serve(name):
    with pytest.raises(RuntimeError, match=r"runs on a GPU, not on 'cpu'"):
        build_attention(name, 32, impl="triton")(torch.ones(1, 4, 32), (2, 2))


def operands(n, channels=5, states=3, dtype=torch.float32, images=2, strength=1.0):
    """Tokens, steps before their bias, rates, b, c, bias and skip; and a cotangent."""
    shapes = [(images, n, d) for d in (channels, channels, states, states, channels)]
    x, step, b, c, cotangent = (
        random(*shape, seed=s, dtype=dtype) for s, shape in enumerate(shapes)
    )
    rates = -strength * random(channels, states, seed=7).exp()
    bias, skip = random(2, channels, seed=8)
    return [x, step, rates, b, c, bias - 2, skip, cotangent]


def kernels(*inputs: Any, reverse=False) -> Any:
    from attnzoo.ops.selective_scan.triton import scan_by_kernels

    return scan_by_kernels(*inputs, reverse)


def reference(x, step, rates, b, c, bias, skip, reverse=False, impl: Any = "reference") -> Any:
    if reverse:
        x, step, b, c = (z.flip(1) for z in (x, step, b, c))
    wide = torch.promote_types(x.dtype, torch.float32)
    steps = F.softplus(step.to(wide) + bias)
    out = selective_scan(x, steps, rates, b, c, impl=impl)
    out = (out.to(wide) + skip * x.to(wide)).to(x.dtype)
    return out.flip(1) if reverse else out


def torch_path(*inputs: Any, **options: Any) -> Any:
    return reference(*inputs, impl="torch", **options)


if CAN_RUN:

    @pytest.mark.parametrize(
        ("n", "reverse", "strength"),
        [(1, False, 1.0), (7, True, 1.0), (35, False, 1.0), (35, True, 1.0), (35, False, 1e-6),
         (18, True, 1e4), (18, False, 1e30)],
    )  # fmt: skip
    def test_equals_the_reference(n, reverse, strength):
        inputs = operands(n, strength=strength)
        exact = with_gradients(reference, doubled(inputs), reverse=reverse)
        found = with_gradients(kernels, inputs, reverse=reverse)
        assert all(z.isfinite().all() for z in found)
        for which, error in enumerate(errors(found, exact)):
            # Of strong decays the rates' gradients are what underflows.
            if which != 3 or (strength <= 1 and n > 1):
                assert error < 1e-6, which

    def test_half_precision():
        inputs = operands(35, dtype=torch.bfloat16)
        exact = with_gradients(reference, doubled(inputs))
        own = errors(with_gradients(reference, inputs), exact)
        found = errors(with_gradients(kernels, inputs), exact)
        # The interpreter cuts bfloat16 off where a GPU rounds.
        budget = 4 if IS_INTERPRETED else 2
        assert all(f < budget * max(o, 1e-6) for f, o in zip(found, own, strict=True))

    @pytest.mark.parametrize(("channels", "states"), [(40, 1), (3, 16)])
    def test_any_width(channels, states):
        inputs = operands(18, channels, states, images=1)
        exact = with_gradients(reference, doubled(inputs))
        assert max(errors(with_gradients(kernels, inputs), exact)) < 1e-6

    @pytest.mark.parametrize(("programs", "reverse"), [(1, False), (4, True), (4, False)])
    def test_several_tiles_a_chunk(programs, reverse, monkeypatch):
        """As of long images, and of many."""
        monkeypatch.setattr("attnzoo.ops.selective_scan.triton.PROGRAMS", programs)
        inputs = operands(70, 3, 2)
        exact = with_gradients(torch_path, doubled(inputs), reverse=reverse)
        assert max(errors(with_gradients(kernels, inputs, reverse=reverse), exact)) < 1e-6

    def test_states_that_are_not_stored_are_the_same():
        inputs = operands(70, 3, 2, images=1)[:-1]
        with torch.no_grad():
            alone = kernels(*inputs)
        stored = kernels(*(z.requires_grad_() for z in inputs))
        torch.testing.assert_close(alone, stored)

    def test_short_steps_keep_their_digits():
        """softplus(-12) is 6e-6: of log(1 + 6e-6) in float32 two digits would be left."""
        inputs = operands(4)
        inputs[5].fill_(-12.0)
        inputs[6].zero_()
        exact = with_gradients(reference, doubled(inputs))
        assert max(errors(with_gradients(kernels, inputs)[:2], exact[:2])) < 1e-6

    def test_the_plain_scan():
        """Without what surrounds it in a layer, through the public operator."""
        x, step, *rest, _, _, cotangent = operands(35)
        inputs = [x, F.softplus(step), *rest, cotangent]
        exact = with_gradients(selective_scan, doubled(inputs), impl="reference")
        found = with_gradients(selective_scan, inputs, impl="triton")
        assert max(errors(found, exact)) < 1e-6
        none = [z[:0] if z.dim() == 3 else z for z in inputs]
        assert selective_scan(*none[:-1], impl="triton").shape == (0, 35, 5)

    def test_a_nan_stays_in_its_image():
        inputs = operands(20)
        clean = with_gradients(kernels, inputs)
        for which in (0, 1, 3, 4):
            inputs[which][0, 9, 1] = torch.nan
        found = with_gradients(kernels, inputs)
        assert found[0][0].isnan().any() and not found[0][0].isnan().all()
        for which in (0, 1, 2, 4, 5):
            assert torch.equal(found[which][1], clean[which][1])

    def test_operands_in_any_layout():
        """Views of one projection, channels before tokens, and an expanded cotangent."""
        joint = random(2, 9, 5 + 5 + 3 + 3).requires_grad_()
        _, _, rates, _, _, bias, skip, _ = operands(9)
        results = []
        for layout in (lambda z: z, torch.Tensor.contiguous, lambda z: z.mT.contiguous().mT):
            x, step, b, c = (layout(z) for z in joint.split((5, 5, 3, 3), -1))
            out = kernels(x, step, rates, b, c, bias, skip)
            results.append([out, *torch.autograd.grad(out.sum(), joint)])
        for other in results[1:]:
            for one, two in zip(results[0], other, strict=True):
                torch.testing.assert_close(one, two)

    @pytest.mark.parametrize("name", ["dis", "zigma", "diffussm"])
    def test_whole_layer(name):
        grid, results = (2, 3), []
        layer: Any = build_scrambled(name, 16, impl="triton").to(DEVICE)
        exact: Any = build_scrambled(name, 16, impl="reference").to(DEVICE).double()
        for module in (layer, exact):
            x = tokens(grid, dim=16).to(DEVICE, next(module.parameters()).dtype).requires_grad_()
            out = module(x, grid)
            grads = torch.autograd.grad(out.square().sum(), [x, *module.parameters()])
            results.append([z.double() for z in (out, *grads)])
        assert max(errors(*results)) < 3e-6
        assert layer(tokens(grid, batch=0, dim=16).to(DEVICE), grid).shape[0] == 0

    def test_auto_takes_the_kernels(monkeypatch):
        from attnzoo.ops.selective_scan import triton as module

        taken = []
        forward = module.scan_forward
        monkeypatch.setattr(module, "scan_forward", lambda *z: taken.append(1) or forward(*z))
        monkeypatch.setattr("attnzoo.ops.dispatch._IS_FORCED", DEVICE == "cpu")
        layer = build_attention("dis", 16).to(DEVICE)
        layer(tokens((1, 2), dim=16).to(DEVICE), (1, 2))
        assert len(taken) == 2
        layer.double()(tokens((1, 2), dim=16).to(DEVICE).double(), (1, 2))
        assert len(taken) == 2

    def test_counted_as_the_recurrence():
        inputs = [z.requires_grad_() for z in operands(6)[:-1]]
        with FlopCounterMode(display=False) as counter:
            out = kernels(*inputs)
            forward = counter.get_total_flops()
            out.sum().backward()
        assert forward == 2 * 2 * selective_scan_macs(6, 5, 3)
        assert counter.get_total_flops() == 3 * forward

    def test_compiles_whole():
        def layer(x, step, rates, b, c, bias, skip):
            x = causal_conv(x, rates[:, None], bias, impl="triton")
            return silu_gate(x, kernels(x, step, rates, b, c, bias, skip), impl="triton")

        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        inputs = operands(18, images=1)
        expected = with_gradients(layer, inputs)
        for found, before in zip(with_gradients(compiled, inputs), expected, strict=True):
            torch.testing.assert_close(found, before)

    @pytest.mark.parametrize("reverse", [False, True])
    @pytest.mark.parametrize(("n", "channels", "taps"), [(1, 5, 4), (9, 5, 3), (70, 66, 4)])
    def test_causal_convolution(n, channels, taps, reverse):
        inputs = [random(2, n, channels), random(channels, 1, taps, seed=1)]
        inputs += [random(channels, seed=2), random(2, n, channels, seed=3)]
        options = {"reverse": reverse}
        exact = with_gradients(causal_conv, doubled(inputs), impl="reference", **options)
        for impl in ("torch", "triton"):
            found = with_gradients(causal_conv, inputs, impl=impl, **options)
            assert max(errors(found, exact)) < 1e-6, impl

    @pytest.mark.parametrize("count", [3, 2])
    def test_gate(count):
        inputs = [random(2, 9, 150, seed=s) for s in (*range(count), 9)]
        exact = with_gradients(silu_gate, doubled(inputs), impl="reference")
        for impl in ("torch", "triton"):
            assert max(errors(with_gradients(silu_gate, inputs, impl=impl), exact)) < 1e-6, impl

    @pytest.mark.parametrize(
        ("n", "size", "halves", "is_active", "count"),
        # More groups than a tile's; a last group that is smaller; all that is asked for at once.
        [(40, 2, 1, False, 2), (9, 2, 2, True, 2), (11, 3, 1, True, 3)],
    )
    def test_hourglass(n, size, halves, is_active, count):
        shapes = [(2, n, halves * 300), (2, -(-n // size), 300), (2, n, 300)][:count]
        inputs = [random(*shape, seed=s) for s, shape in enumerate((*shapes, (2, n, 300)))]

        def run(x, rows, *factor, impl):
            return hourglass(
                x, group_means(x, size, impl=impl), rows, size, is_active, *factor, impl=impl
            )

        exact = with_gradients(run, doubled(inputs), impl="reference")
        for impl in ("torch", "triton"):
            assert max(errors(with_gradients(run, inputs, impl=impl), exact)) < 1e-6, impl

    def test_group_means():
        inputs = random(2, 9, 300), random(2, 5, 300, seed=1)
        exact = with_gradients(partial(group_means, size=2), doubled(inputs), impl="reference")
        for impl in ("torch", "triton"):
            found = with_gradients(partial(group_means, size=2), inputs, impl=impl)
            assert max(errors(found, exact)) < 1e-6, impl


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("reverse", [False, True])
def test_65537_tokens(reverse):
    inputs = operands(65537, 64, 16, images=1)
    exact = with_gradients(torch_path, doubled(inputs), reverse=reverse)
    assert max(errors(with_gradients(kernels, inputs, reverse=reverse), exact)) < 5e-6
