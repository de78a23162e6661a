"""The kernels of gated linear attention equal its reference, on a GPU or interpreted.

``test_interpreted.py`` runs this file again under Triton's interpreter.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from attnzoo import build_attention
from attnzoo.layers.gated_linear import _mean_of_scans
from attnzoo.ops.gated_scan import (
    gated_linear_attention,
    gated_linear_attention_macs,
    mean_of_scans_by_kernels,
    tokens_by_kernels,
)
from attnzoo.testing import DIM, build_scrambled, tokens
from tests.attnzoo.adapters import (
    adapt,
    operators_alone_and_tracked,
    projections,
    quantize,
)
from tests.attnzoo.interpreted import (
    CAN_RUN,
    DEVICE,
    HAS_TRITON,
    IS_INTERPRETED,
    random,
    with_gradients,
)
from tests.attnzoo.interpreted import relative_errors as errors

FOUR = ("forward", "backward", "columns-forward", "columns-backward")
# 16 times the default gates, by which a chunk still forgets little, and what shuts most of them.
STRENGTHS = {"default": 1.0, "strong": 16.0, "shut": 1e6}


@pytest.mark.skipif(not HAS_TRITON or CAN_RUN, reason="needs Triton and no GPU")
def test_asking_for_triton_where_it_does_not_serve():
    with pytest.raises(RuntimeError, match=r"runs on a GPU, not on 'cpu'"):
        build_attention("gated", 48, impl="triton")(torch.ones(1, 4, 48), (2, 2))


def operands(n, key_dim=16, value_dim=24, dtype=torch.float32, images=2):
    """Queries, keys, values and gate logits, and a cotangent."""
    widths = (key_dim, key_dim, value_dim, key_dim, value_dim)
    return [random(images, n, 2, d, seed=s, dtype=dtype) for s, d in enumerate(widths)]


def kernels(*inputs: Any) -> Any:
    return mean_of_scans_by_kernels(*inputs, impl="triton")


def reference(*inputs: Any, impl: Any = "reference") -> Any:
    query, key, value, logit, normalizer, grid, directions = inputs
    logit = logit.to(torch.promote_types(logit.dtype, torch.float32))
    out = _mean_of_scans(logit, query, key, value, normalizer, grid, directions, impl, query.dtype)
    return out.to(query.dtype)


def torch_path(*inputs: Any) -> Any:
    return reference(*inputs, impl="torch")


if CAN_RUN:

    @pytest.mark.parametrize(
        ("grid", "directions", "strength"),
        [
            ((1, 1), FOUR, "default"), ((1, 7), FOUR[:2], "default"), ((1, 7), FOUR[3:], "strong"),
            ((7, 13), FOUR[:1], "strong"), ((7, 13), FOUR[1:2], "strong"),
            ((7, 13), FOUR[:2], "default"), *(((7, 13), FOUR, strength) for strength in STRENGTHS),
        ],
    )  # fmt: skip
    def test_equals_the_reference(grid, directions, strength):
        inputs = operands(grid[0] * grid[1])
        options = 16 / STRENGTHS[strength], grid, directions
        exact = with_gradients(reference, [z.double() for z in inputs], *options)
        found = with_gradients(kernels, inputs, *options)
        assert all(z.isfinite().all() for z in found)
        for which, error in enumerate(errors(found, exact)):
            # Of shut gates the gradients are differences of what is left.
            is_left_over = which == 4 and (strength == "shut" or grid == (1, 1))
            assert error < (1 if is_left_over else 1e-6), which

    @pytest.mark.parametrize("strength", STRENGTHS)
    def test_half_precision(strength):
        inputs = operands(91, dtype=torch.bfloat16)
        options = 16 / STRENGTHS[strength], (7, 13), FOUR
        exact = with_gradients(reference, [z.double() for z in inputs], *options)
        own = errors(with_gradients(reference, inputs, *options), exact)
        found = errors(with_gradients(kernels, inputs, *options), exact)
        # The interpreter cuts bfloat16 off where a GPU rounds.
        budget = 8 if IS_INTERPRETED else 2
        which = 4 if strength == "shut" else 5
        assert all(f < budget * o for f, o in zip(found[:which], own[:which], strict=True))

    def test_larger_image():
        inputs = operands(16 * 24, value_dim=16, images=1)
        options = 16.0, (16, 24), FOUR[:2]
        exact = with_gradients(torch_path, [z.double() for z in inputs], *options)
        assert max(errors(with_gradients(kernels, inputs, *options), exact)) < 1e-6

    @pytest.mark.parametrize(("key_dim", "value_dim"), [(5, 3), (40, 72)])
    def test_any_width(key_dim, value_dim):
        inputs = operands(35, key_dim, value_dim, images=1)
        options = 16.0, (5, 7), FOUR
        exact = with_gradients(reference, [z.double() for z in inputs], *options)
        assert max(errors(with_gradients(kernels, inputs, *options), exact)) < 1e-6

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_gates_of_any_strength_side_by_side(dtype):
        """Shut, open and ordinary gates in one chunk, and -inf."""
        inputs = operands(70, dtype=dtype)
        inputs[3] = (random(70, 1, 1, seed=7, dtype=dtype) * 3).exp() * inputs[3] * 10
        inputs[3][:, 3::17] = -torch.inf
        inputs[3][:, 5::11] = 90.0
        options = 2.0, (10, 7), FOUR[:2]
        found = with_gradients(kernels, inputs, *options)
        exact = with_gradients(reference, [z.double() for z in inputs], *options)
        assert all(z.isfinite().all() for z in found)
        budget = 1e-6 if dtype == torch.float32 else (2e-2 if IS_INTERPRETED else 5e-3)
        assert max(errors(found[:4], exact[:4])) < budget
        assert errors(found, exact)[4] < 10 * budget

    def test_a_gate_of_no_decay_is_remembered():
        """A logit of 20 forgets 1e-10 per token: the sum of 1 and that would be 1."""
        logit = torch.full((1, 64, 1, 16), 20.0, device=DEVICE, requires_grad=True)
        ones = torch.ones(1, 64, 1, 16, device=DEVICE)
        out = kernels(ones, ones, ones, logit, 1e-6, (64, 1), ("forward",))
        exact = reference(*(z.double() for z in (ones, ones, ones, logit)), 1e-6, (64, 1),
                          ("forward",))  # fmt: skip
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_nan_stays_in_its_image(dtype):
        inputs = operands(35, dtype=dtype)
        options = 16.0, (5, 7), FOUR
        clean = with_gradients(kernels, inputs, *options)
        for z in inputs[:4]:
            z[0, 17, 0, 3] = torch.nan
        found = with_gradients(kernels, inputs, *options)
        assert found[0][0].isnan().any()
        for mine, before in zip(found, clean, strict=True):
            assert torch.equal(mine[1], before[1])

    def test_operands_in_any_layout():
        """Views of one projection, an expanded cotangent, and heads before tokens."""
        joint = random(2, 12, 2, 16 + 16 + 24 + 16).requires_grad_()
        results = []
        for layout in (lambda z: z, torch.Tensor.contiguous):
            parts = [layout(z) for z in joint.split((16, 16, 24, 16), -1)]
            out = kernels(*parts, 16.0, (3, 4), FOUR[:2])
            results.append([out, *torch.autograd.grad(out.sum(), joint)])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)

    def test_packed_tokens_in_any_layout():
        """Channels before tokens, and parameters between others."""
        operands = [random(2, 33, 6).mT, random(6, 5, seed=1)]
        operands += [random(size, 2, seed=2)[:, 0] for size in (6, 4)]
        results = []
        for layout in (lambda z: z, torch.Tensor.contiguous):
            inputs = [layout(z).requires_grad_() for z in operands]
            out = tokens_by_kernels(*inputs, 2, 1e-5, 16.0, (2, 3), FOUR)
            results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)

    def test_images_of_one_packed_token():
        weights = random(6, 5, seed=1), random(6, seed=2), random(4, seed=3)
        packed, results = random(2, 1, 33), []
        for images in (packed, packed[1:]):
            x = images.clone().requires_grad_()
            out = tokens_by_kernels(x, *weights, 2, 1e-5, 16.0, (1, 1), FOUR[:1])
            results.append([out[-1], torch.autograd.grad(out.sum(), x)[0][-1]])
        torch.testing.assert_close(*results)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_one_scan_of_heads_before_tokens(dtype):
        query, key, value, logit, _ = (z.transpose(1, 2).to(dtype) for z in operands(37))
        log_gate = F.logsigmoid(logit)
        found = gated_linear_attention(query, key, value, log_gate, impl="triton")
        wide = (z.double() for z in (query, key, value, log_gate))
        expected = gated_linear_attention(*wide, impl="reference")
        assert found.dtype == dtype
        assert errors([found.double()], [expected])[0] < (1e-6 if dtype == torch.float32 else 1e-3)

    @pytest.mark.parametrize(
        ("name", "options"),
        [("gated", {}), ("gated", {"direction": "four"}), ("dig", {"schedule": "two"})],
    )
    def test_whole_layer(name, options):
        grid = (5, 8)
        results = []
        layer: Any = build_scrambled(name, impl="triton", **options).to(DEVICE)
        exact: Any = build_scrambled(name, impl="reference", **options).to(DEVICE).double()
        for module in (layer, exact):
            x = tokens(grid).to(DEVICE, next(module.parameters()).dtype).requires_grad_()
            out = module(x, grid)
            weights = [x, *module.layer.parameters()]
            grads = torch.autograd.grad(out.square().sum(), weights)
            results.append([z.double() for z in (out, *grads)])
        assert max(errors(*results)) < 3e-6
        assert layer(tokens(grid, batch=0).to(DEVICE), grid).shape == (0, 40, DIM)

    @pytest.mark.parametrize("way", ["hook", "forward", "adapter"])
    @pytest.mark.parametrize("name", ["gated", "dig"])
    def test_what_stands_around_projections_is_run(name, way):
        layers = [build_scrambled(name, impl="triton").to(DEVICE) for _ in range(2)]
        wanted, found = adapt(layers[0], "weights"), adapt(layers[1], way)
        x, grid = tokens((4, 5)).to(DEVICE), (4, 5)
        torch.testing.assert_close(found(x, grid), wanted(x, grid), rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("name", ["gated", "dig"])
    def test_each_projection_is_looked_at(name):
        x, grid = tokens((4, 5)).to(DEVICE), (4, 5)
        layer: Any = build_scrambled(name, impl="triton").to(DEVICE)
        layer(x, grid)  # what is made once
        alone, tracked = operators_alone_and_tracked(lambda: layer(x, grid))
        assert alone == tracked
        for only in projections(build_scrambled(name)):
            layers = [build_scrambled(name, impl="triton").to(DEVICE) for _ in range(2)]
            wanted, found = adapt(layers[0], "weights", only), adapt(layers[1], "hook", only)
            exact = wanted(x, grid)
            torch.testing.assert_close(found(x, grid), exact, rtol=1e-3, atol=1e-4)
            quantize(wanted, only)
            torch.testing.assert_close(wanted(x, grid), exact, rtol=1e-3, atol=1e-4)

    def test_auto_takes_the_kernels(monkeypatch):
        from attnzoo.ops.gated_scan import triton as module

        taken = []
        forward = module.gated_scans_forward
        monkeypatch.setattr(
            module, "gated_scans_forward", lambda *z: taken.append(1) or forward(*z)
        )
        auto: Any = mean_of_scans_by_kernels
        inputs = operands(4)[:4]
        monkeypatch.setattr("attnzoo.ops.dispatch._IS_FORCED", DEVICE == "cpu")
        assert auto(*inputs, 16.0, (2, 2), FOUR) is not None
        wide = [z.double() for z in inputs]
        assert auto(*wide, 16.0, (2, 2), FOUR) is None
        broad = operands(4, 16, 144)[:4]
        assert auto(*broad, 16.0, (2, 2), FOUR) is None
        assert taken == [1]
        with pytest.raises(RuntimeError, match="values of 144 channels a head, more than 128"):
            kernels(*broad, 16.0, (2, 2), FOUR)

    def test_counted_as_the_recurrence():
        inputs = [z.requires_grad_() for z in operands(6)[:4]]
        with FlopCounterMode(display=False) as counter:
            out = kernels(*inputs, 16.0, (2, 3), FOUR)
            forward = counter.get_total_flops()
            out.sum().backward()
        one = 2 * gated_linear_attention_macs(6, 16, 24)
        assert forward == 2 * 2 * 4 * one
        assert counter.get_total_flops() == 3 * forward

    def test_compiles_whole():
        torch._dynamo.reset()
        inputs = operands(70, images=1)
        compiled = torch.compile(kernels, fullgraph=True, backend="aot_eager")
        options = 16.0, (7, 10), FOUR
        expected = with_gradients(kernels, inputs, *options)
        for found, before in zip(
            with_gradients(compiled, inputs, *options), expected, strict=True
        ):
            torch.testing.assert_close(found, before)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_65537_tokens(dtype):
    grid = (65537, 1)
    inputs = operands(65537, 32, 64, images=1, dtype=dtype)
    options = 16.0, grid, FOUR[:2]
    exact = with_gradients(torch_path, [z.double() for z in inputs], *options)
    found = errors(with_gradients(kernels, inputs, *options), exact)
    assert max(found) < (3e-6 if dtype == torch.float32 else 5e-3)
