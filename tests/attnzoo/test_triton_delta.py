"""The kernels of the gated delta rule equal its reference, on a GPU or interpreted.

``test_interpreted.py`` runs this file again under Triton's interpreter.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from attnzoo import build_attention
from attnzoo.ops.delta_rule import gated_delta_rule, gated_delta_rule_macs
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
def test_asking_for_triton_where_it_does_not_serve():
    with pytest.raises(RuntimeError, match=r"runs on a GPU, not on 'cpu'"):
        build_attention("deltanet", 48, impl="triton")(torch.ones(1, 4, 48), (2, 2))


def operands(n, key_dim=5, value_dim=3, dtype=torch.float32, images=2, heads=1, decay=0.3):
    """Queries, keys, values, log decays and strengths, and a cotangent."""
    shape = images, heads, n
    q, k, v, w = (
        random(*shape, d, seed=s) for s, d in enumerate((key_dim, key_dim, value_dim, value_dim))
    )
    gates = -decay * random(*shape, seed=5).exp(), random(*shape, seed=6).sigmoid()
    q, k, v, w = (z.to(dtype) for z in (q, F.normalize(k, dim=-1), v, w))
    return [q, k, v, *gates, w]


def kernels(*inputs: Any) -> Any:
    return gated_delta_rule(*inputs, impl="triton")


def reference(*inputs: Any) -> Any:
    return gated_delta_rule(*inputs, impl="reference")


def torch_path(*inputs: Any) -> Any:
    return gated_delta_rule(*inputs, impl="torch")


if CAN_RUN:

    @pytest.mark.parametrize(
        ("n", "decay"), [(1, 1.0), (7, 1.0), (16, 0.0), (37, 1e-3), (37, 1.0), (70, 30.0)]
    )
    def test_equals_the_reference(n, decay):
        inputs = operands(n, decay=decay)
        exact = with_gradients(reference, doubled(inputs))
        found = with_gradients(kernels, inputs)
        assert all(z.isfinite().all() for z in found)
        for which, error in enumerate(errors(found, exact)):
            # Of strong decays the gradients are what underflows; of one token there are none.
            if which != 4 or (decay <= 1 and n > 1):
                assert error < 1e-6, which

    def test_keys_that_are_all_alike():
        """Powers of the system would have 19 digits, and cancel."""
        inputs = operands(64, decay=0.0)
        inputs[1] = inputs[1][:, :, :1].expand_as(inputs[1])
        inputs[4] = torch.ones_like(inputs[4])
        exact = with_gradients(reference, doubled(inputs))
        assert max(errors(with_gradients(kernels, inputs), exact)[:4]) < 2e-6

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_decays_of_any_strength_side_by_side(dtype):
        inputs = operands(70, dtype=dtype)
        inputs[3] = inputs[3] * (random(2, 1, 70, seed=9) * 4).exp()
        inputs[3][..., 3::17] = -torch.inf
        inputs[3][..., 5::11] = -3e4
        exact = with_gradients(torch_path, doubled(inputs))
        found = with_gradients(kernels, inputs)
        assert all(z.isfinite().all() for z in found)
        budget = 1e-6 if dtype == torch.float32 else (1e-2 if IS_INTERPRETED else 5e-3)
        assert max(errors(found[:4], exact[:4])) < budget

    # Narrow heads, and tiles as wide as there are.
    @pytest.mark.parametrize(("chunk", "widths"), [(16, (20, 24)), (64, (20, 24)), (64, (40, 48))])
    def test_half_precision(chunk, widths, monkeypatch):
        from attnzoo.ops.delta_rule import triton as module

        blocks = module.BLOCKS[torch.bfloat16]._replace(chunk=chunk)
        monkeypatch.setitem(module.BLOCKS, torch.bfloat16, blocks)
        inputs = operands(100, *widths, torch.bfloat16)
        exact = with_gradients(torch_path, doubled(inputs))
        own = errors(with_gradients(torch_path, inputs), exact)
        found = errors(with_gradients(kernels, inputs), exact)
        # The interpreter cuts bfloat16 off where a GPU rounds.
        budget = 4 if IS_INTERPRETED else 2
        assert all(f < budget * o for f, o in zip(found[:4], own[:4], strict=True))
        assert max(found[4:]) < 4e-3

    def test_a_nan_stays_in_its_image():
        inputs = operands(35)
        clean = with_gradients(kernels, inputs)
        for z in inputs[:5]:
            z[0, 0, 17] = torch.nan
        found = with_gradients(kernels, inputs)
        assert found[0][0, 0, 17:].isnan().all()
        for mine, before in zip(found, clean, strict=True):
            assert torch.equal(mine[1], before[1])

    @pytest.mark.parametrize("which", [3, 4])
    def test_a_nan_of_a_gate_is_seen(which):
        inputs = operands(7)[:5]
        inputs[which][0, 0, 2] = torch.nan
        assert kernels(*inputs)[0, 0, 2:].isnan().all()

    def test_float16_is_computed_in_float32():
        inputs = operands(7, dtype=torch.float16)
        exact = with_gradients(reference, doubled(inputs))
        assert max(errors(with_gradients(kernels, inputs), exact)[:4]) < 1e-3

    @pytest.mark.parametrize(
        "options",
        [{}, {"direction": "four"}, {"direction": "backward", "conv": "causal"},
         {"direction": "columns-backward", "conv": "none"}],
        ids=str,
    )  # fmt: skip
    def test_whole_layer(options):
        grid, results = (5, 8), []
        layer: Any = build_scrambled("deltanet", 24, num_heads=2, impl="triton", **options)
        exact: Any = build_scrambled("deltanet", 24, num_heads=2, impl="reference", **options)
        for module in (layer.to(DEVICE), exact.to(DEVICE).double()):
            x = tokens(grid, 1, 24).to(DEVICE, next(module.parameters()).dtype).requires_grad_()
            out = module(x, grid)
            grads = torch.autograd.grad(out.square().sum(), [x, *module.parameters()])
            results.append([z.double() for z in (out, *grads)])
        assert max(errors(*results)) < 3e-6
        assert layer(tokens(grid, batch=0, dim=24).to(DEVICE), grid).shape == (0, 40, 24)

    def test_keys_of_zeros_have_finite_gradients():
        layer: Any = build_scrambled("deltanet", 24, impl="triton", conv="none").to(DEVICE)
        x = torch.zeros(1, 6, 24, device=DEVICE, requires_grad=True)
        grads = torch.autograd.grad(layer(x, (2, 3)).sum(), [x, *layer.parameters()])
        assert all(z.isfinite().all() for z in grads)

    def test_auto_takes_the_kernels(monkeypatch):
        from attnzoo.ops.delta_rule import triton as module

        taken = []
        forward = module.delta_scans_forward
        monkeypatch.setattr(
            module, "delta_scans_forward", lambda *z: taken.append(1) or forward(*z)
        )
        monkeypatch.setattr("attnzoo.ops.dispatch._IS_FORCED", DEVICE == "cpu")
        layer: Any = build_attention("deltanet", 16).to(DEVICE)
        x = tokens((1, 2), dim=16).to(DEVICE)
        layer(x, (1, 2))
        assert taken == [1]
        layer.double()(x.double(), (1, 2))
        build_attention("deltanet", 72, num_heads=1).to(DEVICE)(tokens((1, 2), dim=72).to(DEVICE),
                                                                (1, 2))  # fmt: skip
        assert taken == [1]
        with pytest.raises(RuntimeError, match="keys of 72 channels a head, more than 64"):
            kernels(*operands(4, 72)[:5])

    def test_counted_as_the_recurrence():
        inputs = [z.requires_grad_() for z in operands(6)[:5]]
        with FlopCounterMode(display=False) as counter:
            out = kernels(*inputs)
            forward = counter.get_total_flops()
            out.sum().backward()
        assert forward == 2 * 2 * gated_delta_rule_macs(6, 5, 3)
        assert counter.get_total_flops() == 3 * forward

    def test_compiles_whole():
        torch._dynamo.reset()
        layer: Any = build_scrambled("deltanet", 24, num_heads=2, impl="triton").to(DEVICE)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        grid, results = (5, 7), []
        for function in (layer, compiled):
            x = tokens(grid, 1, 24).to(DEVICE).requires_grad_()
            out = function(x, grid)
            results.append([out, *torch.autograd.grad(out.sum(), [x, *layer.parameters()])])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_65537_tokens(dtype):
    inputs = operands(65537, 64, 64, dtype, images=1, heads=2, decay=0.01)
    exact = with_gradients(torch_path, doubled(inputs))
    found = errors(with_gradients(kernels, inputs), exact)
    assert max(found) < (5e-6 if dtype == torch.float32 else 5e-3)
