"""The Triton kernels equal the eager operators: outputs and gradients, on a GPU or interpreted.

Without a GPU ``test_interpreted.py`` runs this file again under Triton's interpreter.
"""

import copy
import functools
import sys

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from attnzoo import InvalidValue, build_attention, list_attention
from attnzoo.counting import count_macs, measure_macs
from attnzoo.layers.depthwise_conv import DepthwiseConv
from attnzoo.mechanisms.dydila import ABLATION_STEPS
from attnzoo.ops import dispatch
from attnzoo.ops.depthwise_conv import depthwise_conv
from attnzoo.ops.gated_scan import fla, gated_linear_attention
from attnzoo.ops.linear_core import half_matmul, linear_attention
from attnzoo.ops.linear_core.torch import half_attention
from attnzoo.ops.map_difference import dynamic_map_attention
from attnzoo.ops.power_map import power_map
from attnzoo.ops.routed_linear import decide, pick, routed_linear
from attnzoo.ops.token_difference import Weights, dynamic_differential_attention
from attnzoo.ops.token_difference import reference as composed
from attnzoo.testing import DIM, build_scrambled, reference_of, tokens
from backbones import build_backbone
from tests.attnzoo.interpreted import CAN_RUN, DEVICE, HAS_TRITON, saved_once
from tests.attnzoo.two_parts import assert_equal, halves_and_whole


def test_asking_for_triton_without_it_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeError, match=r"attnzoo\[triton\]"):
        dispatch.require_triton()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"normalizer": "diff"}, "normalizer='diff'"),
        ({"num_heads": 4}, "heads of width 12"),
        ({"n_kernel_factors": 65}, "65 choices of a router, more than 64"),
    ],
)
@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_asking_for_triton_where_it_does_not_serve(options, said):
    with pytest.raises(ValueError, match=f"does not serve {said}"):
        build_attention("dydila", DIM, impl="triton", **options)


def test_asking_for_fla_without_it_names_the_extra(monkeypatch):
    for module in [name for name in sys.modules if name.split(".")[0] == "fla"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "fla", None)
    with pytest.raises(RuntimeError, match=r"attnzoo\[fla\]"):
        fla.require_fla()


def close(found, expected, dtype=torch.float32, scale=1.0):
    """Equal up to ``scale`` times the rounding of ``dtype``."""
    found, expected = found.double().cpu(), expected.double().cpu()
    assert found.shape == expected.shape
    if dtype == torch.float32:  # every entry, relative to the largest
        error, size = (found - expected).abs().amax(), expected.abs().amax()
    else:  # in all: a rounded logit may tip a choice
        error, size = (found - expected).norm(), expected.norm()
    budget = {torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype] * scale
    assert error <= budget * size.clamp_min(1e-30), (error / size).item()


def random(*shape, seed=0, dtype=torch.float32, grad=True):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype).requires_grad_(grad)


def test_diagnostics_are_numbers():
    layer = build_scrambled("dydila", gamma_form="clamp")
    said = layer.diagnostics(tokens((4, 4)), (4, 4))
    sana = build_attention("dydila", DIM, **ABLATION_STEPS["sana"])
    assert sana.diagnostics(tokens((4, 4)), (4, 4)) == {}
    assert said["gamma"] == layer.gamma.clamp_min(1).tolist()
    assert said["lambda"] == layer.lambda_.tolist()
    routes = layer.routes(tokens((4, 4)), (4, 4))
    for name, index in routes.items():
        usage = torch.bincount(index.flatten(), minlength=len(said[name]["usage"])) / 32
        assert said[name]["usage"] == usage.tolist()
        assert 0 < said[name]["entropy"] < 3


if CAN_RUN:

    @pytest.mark.parametrize("shape", [(2, 3, 40, 16), (2, 1, 5, 24)])
    def test_half_sums_of_linear_attention(shape):
        query, key = (random(*shape, seed=s, dtype=torch.bfloat16).abs() for s in range(2))
        value = random(*shape, seed=2, dtype=torch.bfloat16)
        exact = linear_attention(*(z.double() for z in (query, key, value)))
        found = linear_attention(query, key, value)
        assert found.dtype == torch.bfloat16 and dispatch.has_half_sums(query, key, value)
        close(found, exact, torch.bfloat16)

    def indices(kind, tokens, experts):
        generator = torch.Generator().manual_seed(1)
        return {
            "uniform": lambda: torch.randint(0, experts, (tokens,), generator=generator),
            "all to the last": lambda: torch.full((tokens,), experts - 1),
            "one empty": lambda: torch.randint(0, experts - 1, (tokens,), generator=generator) + 1,
        }[kind]().to(DEVICE)

    @pytest.mark.parametrize("kind", ["uniform", "all to the last", "one empty"])
    @pytest.mark.parametrize("tokens", [1, 37, 1300])
    def test_counting_sort_is_a_stable_argsort(kind, tokens):
        from attnzoo.ops.routed_linear.triton import sort_by_expert

        index = indices(kind, tokens, 3)
        order, ends = sort_by_expert(index, 3)
        assert torch.equal(order.long(), index.argsort(stable=True))
        assert ends.tolist()[:3] == torch.bincount(index, minlength=3).cumsum(0).tolist()

    @pytest.mark.parametrize("kind", ["uniform", "all to the last", "one empty"])
    @pytest.mark.parametrize("entries", [64, 4096])
    def test_counting_sort_in_parts_is_a_stable_argsort(kind, entries, monkeypatch):
        from attnzoo.ops.routed_linear import triton as grouped

        monkeypatch.setattr(grouped, "SORTED_ENTRIES", entries)
        index = indices(kind, 3000, 70)  # six blocks
        order, ends = grouped.sort_by_expert(index, 70)
        assert torch.equal(order.long(), index.argsort(stable=True))
        assert ends.tolist() == torch.bincount(index, minlength=70).cumsum(0).tolist()

    @pytest.mark.parametrize("kind", ["uniform", "all to the last", "one empty"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("tokens", "wide", "narrow"), [(37, 40, 24), (150, 48, 80)])
    def test_routed_linear(kind, dtype, tokens, wide, narrow):
        x, weight = random(tokens, wide, dtype=dtype), random(3, wide, narrow, seed=1, dtype=dtype)
        index, cotangent = indices(kind, tokens, 3), random(tokens, narrow, seed=2, dtype=dtype)
        expected = routed_linear(x, weight, index, impl="reference")
        grads = torch.autograd.grad(expected, (x, weight), cotangent)
        found = routed_linear(x, weight, index, impl="triton")
        found_grads = torch.autograd.grad(found, (x, weight), cotangent)
        close(found, expected, dtype)
        for mine, theirs in zip(found_grads, grads, strict=True):
            close(mine, theirs, dtype)

    def chosen_over_itself(routed):
        chosen = routed.probability.gather(-1, routed.index.unsqueeze(-1))
        return chosen / chosen.detach()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("shape", [(2, 19, 48), (1, 70, 130)])
    def test_routed_pair(shape, dtype):
        b, n, d = shape
        x = random(b, n, d, dtype=dtype)
        routers = [random(3, d, seed=s, dtype=dtype) for s in (1, 2)]
        weights = [random(3, d, 32, seed=s, dtype=dtype) for s in (3, 4)]
        operands = (x, *routers, *weights)
        cotangent = random(2, b, n, 32, seed=5, dtype=dtype, grad=False)
        from attnzoo.ops.routed_linear.triton import routed_pair

        out, index, gates = routed_pair(x, routers, weights)
        assert torch.equal(gates, torch.ones_like(gates))
        # Whoever uses the tokens owes the gates their gradient.
        of_gates = (out.detach().float() * cotangent.float()).sum(-1)
        found = torch.autograd.grad([out, gates], operands, [cotangent, of_gates])
        routed = [decide(router, [x], "ste") for router in routers]
        expected = torch.stack(
            [
                routed_linear(x, w, r.index, impl="reference") * chosen_over_itself(r).to(dtype)
                for w, r in zip(weights, routed, strict=True)
            ]
        )
        assert torch.equal(index, torch.stack([routed[0].index, routed[1].index + 3]))
        close(out, expected, dtype)
        for mine, theirs in zip(
            found, torch.autograd.grad(expected, operands, cotangent), strict=True
        ):
            close(mine, theirs, dtype, 4)

    @pytest.mark.parametrize("gradient", ["ste", "none"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(
        ("rows", "d", "choices", "parts"),
        [(37, 48, 9, 1), (150, 130, 5, 2), (1, 16, 1, 2), (600, 40, 17, 1), (0, 16, 3, 1)],
    )
    def test_routed_scalar(rows, d, choices, parts, dtype, gradient):
        together = random(2, rows, 3 * d, dtype=dtype)  # whose parts have rows far apart
        router, scalars = random(choices, parts * d, seed=1), random(choices, seed=2)
        cotangent, results = random(2, rows, 1, seed=3, grad=False), []
        # In bfloat16 products are exact, and only the logits' last digit is rounded.
        router = router.to(dtype).detach().requires_grad_()
        for impl in ("auto", "reference"):
            halves = together.split(d, -1)[:parts]
            if impl == "reference":
                halves = [z.float() for z in halves]
            weight = router if impl == "auto" else router.float()
            with saved_once():
                chosen, routed = pick(weight, halves, scalars, gradient, impl)
            assert chosen.shape == (2, rows, 1) and chosen.dtype == torch.float32
            inputs = (together, router, scalars)
            grads = torch.autograd.grad(chosen, inputs, cotangent, allow_unused=True)
            results.append((chosen, routed, grads))
        (found, routed, slopes), (expected, wanted, exact) = results
        assert (routed.logits is None) == (gradient == "none")
        if not rows:
            assert all(z is None or not z.any() for z in slopes)
            return
        assert (routed.index == wanted.index).double().mean() >= 0.98
        scale = 1 if dtype == torch.float32 else 8
        close(found, expected, dtype, scale)
        for mine, theirs in zip(slopes, exact, strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                close(mine, theirs, dtype, scale)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("rows", "d"), [(1, 16), (37, 48), (9, 130), (3, 1024)])
    def test_power_map(rows, d, dtype):
        z = random(rows, d, dtype=dtype)
        gamma = (random(rows, 1, seed=1, grad=False).abs() + 0.5).requires_grad_()
        cotangent = random(rows, d, seed=2, dtype=dtype, grad=False)
        results = []
        for operands, impl in (
            ((z.detach().double(), gamma.detach().double()), "reference"),
            ((z, gamma), "torch"),
            ((z, gamma), "triton"),
        ):
            operands = [operand.detach().requires_grad_() for operand in operands]
            out = power_map(*operands, impl=impl)
            results.append([out, *torch.autograd.grad(out, operands, cotangent.to(out.dtype))])
        for exact, eager, found in zip(*results, strict=True):
            error, other = ((y.double() - exact).norm() for y in (found, eager))
            # One row's gradient of gamma is a difference of large numbers, and the eager map
            # takes it from results rounded to half precision.
            assert error <= 1.5 * other + 4 * torch.finfo(found.dtype).eps * exact.norm()

    @pytest.mark.parametrize("gamma", [-3.0, -0.5, 0.0, 0.05, 0.2, 0.4, 3.0, 6.3])
    @pytest.mark.parametrize("scale", [1e-20, 1e-6, 1.0, 1e15])
    def test_power_map_at_any_scale(gamma, scale):
        z = (random(5, 40, grad=False) * scale).requires_grad_()
        gammas = torch.full((5, 1), gamma, device=DEVICE, requires_grad=True)
        found = power_map(z, gammas, impl="triton")
        expected = power_map(z.double(), gammas, impl="reference")
        close(found, expected)
        assert found[z <= 0].eq(0).all()
        cotangent = random(5, 40, seed=1, grad=False)
        grads = torch.autograd.grad(found, (z, gammas), cotangent)
        exact = torch.autograd.grad(expected, (z, gammas), cotangent.double())
        for mine, theirs in zip(grads, exact, strict=True):
            close(mine, theirs)

    def test_power_map_keeps_dead_rows_and_shows_nan():
        z = random(4, 7, 16, grad=False)
        z[1, 2] = -1
        z[3, 6, 5] = float("nan")
        z.requires_grad_()
        out = power_map(z, torch.full((1,), 3.0, device=DEVICE), impl="triton")
        assert out[1, 2].abs().sum() == 0
        assert out[3, 6].isnan().all() and out[:3].isfinite().all()
        (grad,) = torch.autograd.grad(out[:3].sum(), z)
        assert grad[:3].isfinite().all()

    def expected_difference(z1, z2, routers, gammas, rd, lambdas, key_sum, eps, gradient, heads):
        out, powered = composed.focused_difference(
            z1, z2, routers, gammas, rd, lambdas, gradient, impl="torch"
        )
        if key_sum is not None:
            parts = (powered * key_sum.unsqueeze(1)).unflatten(-1, (heads, -1))
            out = out.unflatten(-1, (heads, -1)) / (parts.sum(-1, keepdim=True) + eps)
            out = out.flatten(-2)
        return out, powered.sum(1)

    # Powers that are clamped, and half precision, where they meet what they change.
    @pytest.mark.parametrize(
        ("dtype", "powers", "gradient", "width"),  # of heads; None: keys, not normalized
        [
            *((torch.float32, (1.5, 4.0), g, w) for g in ("ste", "none") for w in (None, 0, 16)),
            *((torch.float32, (-0.5, 0.5), *case) for case in (("ste", None), ("none", 16))),
            *((torch.bfloat16, (1.5, 4.0), "ste", width) for width in (None, 0, 16)),
        ],
    )
    @pytest.mark.parametrize(
        ("b", "n", "d", "n_gamma", "n_lambda", "few"),  # which half precision asks for
        [(2, 37, 48, 9, 9, 0), (1, 70, 176, 21, 5, 70)],
    )
    def test_focused_difference(
        dtype, powers, gradient, width, b, n, d, n_gamma, n_lambda, few, monkeypatch
    ):
        """With the kernels for many rows and for few."""
        from attnzoo.ops.token_difference import triton_backward

        monkeypatch.setattr(triton_backward, "FEW_ROWS", few)
        is_normalized, heads = width is not None, d // width if width else 1
        wide = random(b, n, 2 * d, dtype=dtype, grad=False)
        # A slice of a wider tensor, as the shared projection gives it.
        z1 = wide[..., :d].detach().requires_grad_()
        z2 = random(b, n, d, seed=1, dtype=dtype)
        routers = [random(n_gamma, d, seed=s, dtype=dtype) for s in (2, 3)]
        rd = random(n_lambda, 2 * d, seed=4, dtype=dtype)
        gammas = torch.linspace(*powers, 2 * n_gamma).view(2, n_gamma).to(DEVICE)
        gammas.requires_grad_()
        lambdas = torch.linspace(-0.2, 0.5, n_lambda, device=DEVICE).requires_grad_()
        gates = torch.ones(b, n, device=DEVICE, requires_grad=True)
        key_sum = random(b, d, seed=5).detach().abs().requires_grad_() if is_normalized else None
        cotangent = random(b, n, d, seed=6, dtype=dtype, grad=False)
        sum_cotangent = random(b, d, seed=7, grad=False)

        from attnzoo.ops.token_difference.triton import focused_difference

        found = focused_difference(
            z1, z2, routers, gammas, rd, lambdas, gates, key_sum, 1e-6, gradient == "ste",
            heads,
        )  # fmt: skip
        operands = [z1, z2, gammas, lambdas, *routers, rd, gates, key_sum]
        # In float64: the eager operators in bfloat16 are off by more than the kernel.
        exact = [None if z is None else z.detach().double().requires_grad_() for z in operands]
        y1, y2, *scalars, s1, s2, sd, y_gates, y_sum = exact
        gated = y2 * y_gates.unsqueeze(-1) if gradient == "ste" else y2
        expected = expected_difference(
            y1, gated, (s1, s2), scalars[0], sd, scalars[1], y_sum, 1e-6, gradient, heads
        )
        outputs, cotangents = 1 if is_normalized else 2, [cotangent, sum_cotangent]
        has_gradient = [0, 1, 2, 3] + [4, 5, 6, 7] * (gradient == "ste") + [8] * is_normalized
        grads = [
            torch.autograd.grad(
                both[:outputs],
                [those[i] for i in has_gradient],
                [z.to(out.dtype) for z, out in zip(cotangents, both[:outputs], strict=False)],
            )
            for both, those in ((found, operands), (expected, exact))
        ]
        for mine, theirs in zip(found[:outputs], expected[:outputs], strict=True):
            close(mine, theirs, dtype, 2)
        for mine, theirs in zip(*grads, strict=True):
            close(mine, theirs, dtype, 4)

    def test_what_learns_alone_gets_its_gradient():
        """As of a frozen layer's routers, or of its keys: what a backward reads must be there."""
        sizes = [(1, 3, 16)] * 4 + [(2, 16)] * 6 + [(2, 16, 16)] * 2 + [(2, 32)] * 2 + [(1, 2)] * 2
        operands = [random(*size, seed=s, grad=False) for s, size in enumerate(sizes)]
        *qkv, first, second = operands[:6]
        weights = Weights(
            (first, second), operands[10:12], operands[6:10], operands[14], operands[12:14],
            operands[15],
        )  # fmt: skip
        leaves = [qkv[2], first, operands[11]]
        results = []
        for chosen in (leaves, *([z] for z in leaves)):
            for z in leaves:
                z.requires_grad_(any(z is one for one in chosen))
            out = dynamic_differential_attention(*qkv, weights, 1e-6, impl="triton")
            results.append(torch.autograd.grad(out.square().sum(), chosen))
        for mine, alone in zip(results[0], results[1:], strict=True):
            assert torch.equal(mine, alone[0])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("n", "d", "choices"), [(37, 24, 5), (18, 136, 16)])
    def test_map_difference(n, d, choices, dtype):
        """Of tokens that are a slice; fewer tokens than channels multiply in another order."""
        sizes = (2, n, d), (2, n, 3 * d), (3, d), (3, d), (3, d, d), (3, d, d)
        sizes += *[(choices, d)] * 4, (choices, 2 * d), (1, choices), (1, choices)
        operands = [random(*size, seed=i, dtype=dtype) for i, size in enumerate(sizes)]
        with torch.no_grad():
            for z in operands[4:6]:
                z /= d**0.5
            operands[-2].abs_().add_(1)
            operands[-2][0, 0] = -0.5  # a power that falls
        exact = [z.detach().double().requires_grad_() for z in operands]
        cotangent, results = random(2, n, d, seed=99, dtype=dtype, grad=False), []
        for those, impl in ((operands, "triton"), (exact, "reference")):
            x, qkv, p1, p2, m1, m2, *routers, rd, gammas, lambdas = those
            weights = Weights((p1, p2), (m1, m2), routers, gammas, (rd,), lambdas)
            out = dynamic_map_attention(x, *qkv.chunk(3, -1), weights, 1e-6, impl=impl)
            results.append([out, *torch.autograd.grad(out, those, cotangent.to(out.dtype))])
        for mine, theirs in zip(*results, strict=True):
            close(mine, theirs, dtype, 4)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_half_products(dtype):
        q, k, v = (random(2, 3, 40, 16, seed=s, dtype=dtype) for s in range(3))
        cotangent = random(2, 3, 40, 16, seed=4, dtype=dtype, grad=False)
        exact = [z.detach().double().requires_grad_() for z in (q, k, v)]
        expected = exact[0] @ (exact[1].mT @ exact[2])
        found = half_attention(q, k, v)
        close(found, expected, dtype)
        for mine, theirs in zip(
            torch.autograd.grad(found, (q, k, v), cotangent),
            torch.autograd.grad(expected, exact, cotangent.double()),
            strict=True,
        ):
            close(mine, theirs, dtype)
        wide = half_matmul(q, k.mT)
        assert wide.dtype == torch.float32
        close(wide, exact[0] @ exact[1].mT)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("grid", "has_bias"), [((1, 1), True), ((3, 8), False)])
    @pytest.mark.parametrize("size", [3, 5, 7])
    def test_stencil(size, dtype, grid, has_bias, monkeypatch):
        from attnzoo.ops.depthwise_conv import triton as convolution

        block = 2, 3, 16, 2, 1, 2, 255  # small, for the interpreter
        for name in ("STENCIL_BLOCK", "STENCIL_WEIGHT_BLOCK"):
            monkeypatch.setattr(convolution, name, {size: block})
        b, c = 2 if size == 3 else 1, 20 if has_bias else 32
        x = random(b, grid[0] * grid[1], c, dtype=dtype)
        weight = random(c, 1, size, size, seed=1, dtype=dtype)
        bias = random(c, seed=2, dtype=dtype) if has_bias else None
        added = random(*x.shape, seed=3, dtype=dtype)
        cotangent = random(*x.shape, seed=4, dtype=dtype, grad=False)
        image = x.float().unflatten(1, grid).permute(0, 3, 1, 2)
        offset = None if bias is None else bias.float()
        expected = F.conv2d(image, weight.float(), offset, padding=size // 2, groups=c)
        expected = expected.permute(0, 2, 3, 1).flatten(1, 2) + added
        found = depthwise_conv(x, grid, weight, bias, added, impl="triton")
        close(found, expected, dtype)
        operands = [x, weight, added] + ([bias] if has_bias else [])
        for mine, theirs in zip(
            torch.autograd.grad(found, operands, cotangent),
            torch.autograd.grad(expected, operands, cotangent.float()),
            strict=True,
        ):
            close(mine, theirs, dtype)

    @pytest.mark.parametrize("kind", ["acnet", "3x3"])
    def test_tokens_of_another_grid_are_refused(kind, monkeypatch):
        """As a convolution of compressed values has them; memory beyond them was read."""
        from attnzoo.ops.depthwise_conv import triton_branches

        monkeypatch.setattr(triton_branches, "_branch_moments_kernel", None)
        with pytest.raises(InvalidValue, match="6 tokens are no grid of 6 x 7"):
            DepthwiseConv(24, kind).to(DEVICE)(random(2, 6, 24), (6, 7))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("kind", ["acnet", "acnet-plain", "3x3"])
    def test_depthwise_convolution(kind, dtype, small_convolutions):
        """Of tokens that are a slice, with batch norms in training, against the library's."""
        grid, (theirs, mine) = (6, 7), (DepthwiseConv(24, kind).to(DEVICE) for _ in range(2))
        for parameter in theirs.parameters():
            torch.nn.init.normal_(parameter)
        mine.load_state_dict(theirs.state_dict())
        mine, theirs = mine.to(dtype), theirs.double()
        wide = random(2, 42, 72, dtype=dtype)
        added, cotangent = (random(2, 42, 24, seed=s, dtype=dtype, grad=False) for s in (1, 2))
        exact = theirs(wide.double()[..., 24:48], grid, added.double())
        expected = torch.autograd.grad(exact, [wide, *theirs.parameters()], cotangent.double())
        out = mine(wide[..., 24:48], grid, added)
        found = torch.autograd.grad(out, [wide, *mine.parameters()], cotangent)
        assert out.dtype == dtype
        assert len({grad.data_ptr() for grad in found}) == len(found)
        close(out, exact, dtype)
        largest = max(grad.norm() for grad in expected)
        for one, other in zip(found, expected, strict=True):
            # Of a kernel before a batch norm, and of the bias, little is left.
            assert (one - other).norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * largest
        for one, other in zip(mine.buffers(), theirs.buffers(), strict=True):
            close(one, other, dtype)

    @pytest.mark.parametrize(
        ("grid", "channels"), [((5, 9), 64), ((1, 17), 16), ((9, 2), 64), ((3, 3), None)]
    )
    def test_normed_branches_of_many_strips(grid, channels, small_convolutions, monkeypatch):
        """Moments of numbers far from 0, put together from parts of several images."""
        from attnzoo.ops.depthwise_conv import triton_branches as kernels

        if channels is None:  # the tiles that are used
            monkeypatch.undo()
        elif DEVICE == "cuda":
            grid = grid[0] * 4, grid[1] * 4
        elif channels == 16:  # and two tiles of channels
            for name in ("MOMENTS_BLOCK", "SUMS_BLOCK", "GRADIENT_BLOCK"):
                monkeypatch.setattr(kernels, name, (4, 4, channels, 2))
        torch.manual_seed(1)  # a branch that hardly varies enlarges rounding
        theirs, mine = (DepthwiseConv(20, "acnet").to(DEVICE) for _ in range(2))
        for parameter in theirs.parameters():
            torch.nn.init.normal_(parameter)
        mine.load_state_dict(theirs.state_dict())
        theirs, pixels = theirs.double(), grid[0] * grid[1]
        x = (random(2, pixels, 20, grad=False) + 5).requires_grad_()
        exact = theirs(x.double(), grid, impl="reference")
        out = mine(x, grid, impl="triton")
        close(out, exact)
        cotangent = random(2, pixels, 20, seed=1, grad=False)
        found = torch.autograd.grad(out, [x, *mine.parameters()], cotangent)
        expected = torch.autograd.grad(exact, [x, *theirs.parameters()], cotangent.double())
        largest = max(grad.norm() for grad in expected)
        for one, other in zip(found, expected, strict=True):
            assert (one - other).norm() <= 1e-5 * largest
        for one, other in zip(mine.buffers(), theirs.buffers(), strict=True):
            close(one, other, scale=0.1)

    def test_normed_branches_of_two_processes(small_convolutions, monkeypatch):
        """Each image by the kernels, with one collective forward and one backward."""
        from attnzoo.layers import depthwise_conv as layers

        torch.manual_seed(1)
        module, grid = DepthwiseConv(20, "acnet").to(DEVICE), (5, 7)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
        x = random(2, 35, 20, grad=False)
        x += torch.arange(2, device=DEVICE)[:, None, None]  # neither image is like both

        def convolve(module, x, impl="reference"):
            return module(x, grid, x, impl=impl)

        # "whole" is what one process computes of all images.
        wide = copy.deepcopy(module).double(), x.double()
        _, exact, _ = halves_and_whole(*wide, monkeypatch, convolve)
        monkeypatch.setattr(layers, "normed_sum", None)  # of PyTorch's operators
        found, _, calls = halves_and_whole(
            module, x, monkeypatch, functools.partial(convolve, impl="triton")
        )
        assert calls == ["gather", "reduce"]
        assert_equal(found, exact, 1e-5)

    @pytest.mark.parametrize("size", [(700, 5), (3, 4200), (1, 1), (0, 7)])
    def test_column_sum(size):
        from attnzoo.ops.triton_common import column_sum

        parts = random(*size, grad=False)
        close(column_sum(parts), parts.double().sum(0))

    @pytest.mark.parametrize(("name", "heads"), [("dydila", 1), ("dydila", 3), ("dydila-map", 1)])
    @pytest.mark.parametrize("gradient", ["ste", "none"])
    def test_whole_layer_equals_the_reference(name, heads, gradient, small_convolutions):
        conv = "3x3" if gradient == "ste" else "acnet"
        layer = build_scrambled(name, num_heads=heads, router_gradient=gradient, conv=conv).to(
            DEVICE
        )
        grid = (5, 8)
        x = tokens(grid).to(DEVICE).requires_grad_()
        assert layer.implementation(x) == "triton"
        cotangent = random(*x.shape, seed=3, grad=False)
        results = []
        for either in (layer, reference_of(layer)):
            operands = [x, *either.parameters()]
            out = either(x, grid)
            grads = torch.autograd.grad(out, operands, cotangent, allow_unused=True)
            results.append((out, grads))
        (out, found), (exact, expected) = results
        close(out, exact)
        largest = max(grad.abs().max() for grad in expected if grad is not None)
        for mine, theirs in zip(found, expected, strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                assert (mine - theirs).abs().max() <= 1e-4 * largest

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(("rows", "gradient"), [(2, "none"), (4, "ste")])
    def test_one_packed_gradient_is_the_sum_of_many(
        rows, gradient, dtype, small_convolutions, monkeypatch
    ):
        """Of one wide head, with fewer and with more tokens than channels."""
        from attnzoo.layers import token_difference
        from attnzoo.ops import linear_core

        monkeypatch.setattr(linear_core, "PLAIN_FASTER_UP_TO", 8)
        options = {"router_gradient": gradient, "conv": "acnet", "qkv_bias": True}
        layer = build_scrambled("dydila", 24, num_heads=1, **options).to(DEVICE, dtype).train()
        grid = (rows, 8)
        x = tokens(grid, dim=24).to(DEVICE, dtype).requires_grad_()
        cotangent, results = random(*x.shape, seed=3, grad=False).to(dtype), []
        for is_packed in (token_difference._is_packed, lambda *_: False):
            monkeypatch.setattr(token_difference, "_is_packed", is_packed)
            out = layer(x, grid)
            operands = [x, *layer.parameters()]
            grads = torch.autograd.grad(out, operands, cotangent, allow_unused=True)
            assert len({z.data_ptr() for z in grads if z is not None}) == sum(
                z is not None for z in grads
            )
            results.append([out, *grads])
        for mine, theirs in zip(*results, strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                budget = 1e-5 if dtype == torch.float32 else 2e-2
                assert (mine - theirs).norm() <= budget * theirs.norm()

    @pytest.mark.parametrize("way", ["cast", "autocast"])
    @pytest.mark.parametrize(("name", "heads"), [("dydila", 1), ("dydila", 3), ("dydila-map", 1)])
    def test_whole_layer_in_half_precision(name, heads, way, small_convolutions):
        layer = build_scrambled(name, num_heads=heads, conv="3x3").to(DEVICE)
        grid = (3, 5)
        x = tokens(grid).to(DEVICE)
        with torch.no_grad():
            exact = reference_of(layer).double()(x.double(), grid)
        if way == "cast":
            layer, x = layer.bfloat16(), x.bfloat16()
        layer.train()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=way == "autocast"):
            assert layer.implementation(x) == "triton"
            out = layer(x, grid)
        assert out.dtype == torch.bfloat16
        assert (out.double() - exact).norm() <= 0.1 * exact.norm()  # as of the contract
        out.float().square().sum().backward()
        assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in layer.parameters())

    @pytest.mark.parametrize(
        "name", ["dydila", pytest.param("dydila-map", marks=pytest.mark.slow)]
    )
    def test_compiles_into_one_graph(name, small_convolutions):
        layer, grid = build_scrambled(name, conv="3x3").to(DEVICE), (3, 4)
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(layer, backend=counter, fullgraph=True)
        for seed in range(2):  # the routing changes, the graph does not
            x = tokens(grid, seed=seed).to(DEVICE).requires_grad_()
            results = []
            for either in (compiled, layer):
                out = either(x, grid)
                results.append([out, *torch.autograd.grad(out.square().sum(), [x, layer.gamma])])
            torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
        assert counter.frame_count == 1

    WAITING = {
        "_local_scalar_dense", "item", "nonzero", "bincount", "masked_select", "unique",
        "_unique2", "unique_consecutive", "equal", "is_nonzero", "repeat_interleave",
    }  # fmt: skip

    @pytest.mark.parametrize("name", list_attention())
    def test_a_training_step_waits_for_nothing(name, small_convolutions):
        """No operator of a step, those inside custom operators too, needs a number on the host.

        And each reads what it saved once.
        """
        options = {"balance_coefficient": 0.1} if name == "dydila-map" else {}
        layer, grid = build_attention(name, DIM, **options).to(DEVICE).train(), (4, 4)
        x = tokens(grid, batch=1).to(DEVICE).requires_grad_()

        def step():
            out = layer(x, grid).square().sum()
            (out if layer.auxiliary_loss is None else out + layer.auxiliary_loss).backward()

        if DEVICE == "cuda":
            for _ in range(3):  # compiles kernels, and a library may settle its algorithms
                step()
            torch.cuda.set_sync_debug_mode("error")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        layer(x, grid)  # plans of a grid are made once
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as profile, saved_once():
            step()
        ran = {event.name.removeprefix("aten::") for event in profile.events()}
        assert not ran & WAITING
        own = {"dydila": "packed_difference", "dydila-map": "grouped_linear"}
        assert name not in own or f"attnzoo::{own[name]}" in ran

    @pytest.mark.parametrize(
        ("name", "gradient", "pixels"),  # fewer and more tokens than channels
        [
            *((name, "ste", pixels) for name in ("dydila", "dydila-map") for pixels in (64, 1024)),
            ("dydila", "none", 64),
        ],
    )
    def test_counts_are_those_of_the_eager_operators(name, gradient, pixels, small_convolutions):
        options = {"conv": "3x3", "router_gradient": gradient}
        models = [
            build_backbone(name, "tiny", resolution=pixels, attn_options=options | {"impl": impl})
            for impl in ("torch", "auto")
        ]
        assert count_macs(models[0], resolution=pixels) == count_macs(models[1], resolution=pixels)
        for train in (True, False):
            one, other = (
                measure_macs(model, resolution=pixels, run_backward=train) for model in models
            )
            assert one == other

    def test_torch_counts_the_kernels_by_itself():
        layer, grid = build_attention("dydila", DIM, conv="3x3").to(DEVICE), (6, 5)
        layer(tokens(grid, batch=1).to(DEVICE), grid)  # kernels are loaded when they are needed
        with FlopCounterMode(display=False) as counter:
            layer(tokens(grid, batch=1).to(DEVICE), grid)
        assert counter.get_total_flops() == 2 * layer.macs(grid)


@pytest.mark.skipif(
    DEVICE != "cuda" or fla.why_unavailable(DEVICE) is not None, reason="needs a GPU and fla"
)
class TestFla:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("strength", [1, 20])
    @pytest.mark.parametrize("n", [1, 60, 300])
    def test_equals_the_chunkwise_form(self, n, strength, dtype):
        query, key, value = (random(2, 3, n, 32, seed=s, dtype=dtype) for s in range(3))
        log_gate = (-strength * random(2, 3, n, 32, seed=3, grad=False).abs()).requires_grad_()
        cotangent = random(2, 3, n, 32, seed=4, dtype=dtype, grad=False)
        operands = (query, key, value, log_gate)
        results = []
        for impl, cast in (("fla", lambda z: z), ("torch", torch.Tensor.double)):
            out = gated_linear_attention(*map(cast, operands), impl=impl)
            results.append([out, *torch.autograd.grad(out, operands, cotangent.to(out.dtype))])
        for found, expected in zip(*results, strict=True):
            error = (found.double() - expected.double()).norm() / expected.double().norm()
            assert error <= (5e-3 if dtype == torch.float32 else 2e-2)  # products are TF32

    @pytest.mark.parametrize("name", ["gated", "dig"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_whole_layer(self, name, dtype):
        """Every direction, and half precision by autocast."""
        layer = build_scrambled(name).to(DEVICE)
        grid = (9, 8)
        assert layer(tokens(grid, batch=0).to(DEVICE), grid).numel() == 0
        results = []
        for impl in ("fla", "torch"):
            layer = build_scrambled(name, impl=impl).to(DEVICE)
            x = tokens(grid).to(DEVICE).requires_grad_()
            with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32 and impl == "fla"):
                out = layer(x, grid).float()
            grads = torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])
            results.append([out, *grads])
        for found, expected in zip(*results, strict=True):
            error = (found - expected).norm() / expected.norm().clamp_min(1e-6)
            assert error <= (1e-2 if dtype == torch.float32 else 1e-1)
