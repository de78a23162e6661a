"""Fast functions against their references, at the places where they are likely to differ."""

import importlib
import typing

import pytest
import torch

from attnzoo import build_attention, get_attention, list_attention
from attnzoo.errors import InvalidValue, Unavailable
from attnzoo.ops import dispatch
from attnzoo.ops.depthwise_conv import depthwise_conv
from attnzoo.ops.linear_core import linear_attention
from attnzoo.ops.linear_core.native import linear_core
from attnzoo.ops.power_map import power_map
from attnzoo.ops.routed_linear import (
    Route,
    balance_loss,
    decide,
    gated,
    pick,
    routed_linear,
)
from tests.attnzoo.interpreted import IS_INTERPRETED

HAS_NATIVE = dispatch._native_works()
# Every sign, and what a floor under the entries would show itself at.
POWERS = [-3.0, -0.5, 0.0, 0.05, 0.2, 0.4, 1.0, 3.0, 6.3]


needs_native = pytest.mark.skipif(not HAS_NATIVE, reason="no C compiler, or ATTNZOO_NATIVE=0")
IMPLEMENTATIONS = [pytest.param("native", marks=needs_native), "torch"]


@pytest.mark.parametrize("gamma", POWERS)
@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1.0, 1e15])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_power_map_is_the_formula_at_any_scale(gamma, scale, impl):
    torch.manual_seed(0)
    x = (torch.randn(5, 32) * scale).requires_grad_()
    gammas = torch.full((5, 1), gamma, requires_grad=True)
    cotangent = torch.randn(5, 32)
    out = power_map(x, gammas, impl=impl)
    found = torch.autograd.grad(out, (x, gammas), cotangent)
    expected = power_map(x.double(), gammas, impl="reference")
    exact = torch.autograd.grad(expected, (x, gammas), cotangent.double())
    difference = (out - power_map(x, gammas, impl="reference")).abs().max()
    assert difference <= 2e-6 * x.max()
    relative = (found[0] - exact[0]).abs().max() / exact[0].abs().max()
    # Below 0 the smallest entries, of the steepest slopes, lead, and their sum cancels.
    assert relative < (5e-6 if gamma >= 0 else 2e-4)
    torch.testing.assert_close(
        found[1], exact[1], rtol=(2e-5 if gamma >= 0 else 2e-4), atol=1e-5 * scale
    )


@pytest.mark.parametrize("gamma", POWERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, "reference"])
def test_a_dead_entry_is_exactly_0_at_every_power(impl, gamma, dtype):
    if impl == "native" and dtype in (torch.float64, torch.float16):
        impl = "auto"
    z = torch.tensor([[1, 0.5, 0, -1], [0, -2, -0.0, -1e-30]], dtype=dtype, requires_grad=True)
    gammas = torch.full((2, 1), gamma, requires_grad=True)
    out = power_map(z, gammas, impl=impl)
    grads = torch.autograd.grad(out, (z, gammas), torch.ones_like(out))
    by_hand = torch.tensor([1, 0.5**gamma, 0, 0])
    by_hand *= 1.25**0.5 / (1 + 0.25**gamma) ** 0.5
    torch.testing.assert_close(out[0].float(), by_hand, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
    assert out[0, 2:].eq(0).all() and out[1].eq(0).all()
    assert grads[0][0, 2:].eq(0).all() and grads[0][1].eq(0).all() and grads[1][1].eq(0).all()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_an_entry_far_below_the_largest_still_counts(impl):
    z = torch.tensor([[1.0, 1e-35, 1e-31, 0.0]], requires_grad=True)
    gamma = torch.tensor([0.05], requires_grad=True)
    out = power_map(z, gamma, impl=impl)
    torch.testing.assert_close(out, power_map(z, gamma, impl="reference"))
    assert out[0, 1] > 0.017
    grads = torch.autograd.grad(out.sum(), (z, gamma))
    exact = torch.autograd.grad(power_map(z, gamma, impl="reference").sum(), (z, gamma))
    torch.testing.assert_close(grads, exact, rtol=1e-4, atol=0)


def test_power_map_keeps_norms_and_dead_rows():
    x = torch.randn(4, 7, 16).relu()
    x[1, 2] = 0
    out = power_map(x, torch.tensor([3.0]))
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))
    assert out[1, 2].abs().sum() == 0
    assert power_map(torch.full((1, 4), float("nan")), torch.tensor([2.0])).isnan().all()


def _both_ways(z, gamma, cotangent):
    """Output and gradients of the C kernel, without it, and without it in float64."""
    results = []
    for impl, dtype in (("native", z.dtype), ("torch", z.dtype), ("torch", torch.float64)):
        # Not a copy: rows of longer rows stay such.
        z, gamma = (x.detach().to(dtype).requires_grad_() for x in (z, gamma))
        out = power_map(z, gamma, impl=impl)
        grads = torch.autograd.grad(out, (z, gamma), cotangent.to(dtype))
        results.append([x.double() for x in (out.detach(), *grads)])
    return results


@needs_native
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_c_kernel_is_as_exact_as_torch(dtype, threads):
    torch.manual_seed(0)
    rows = 700  # more than one thread's worth, and no multiple of anything
    z = torch.randn(rows, 3, 197) * torch.logspace(-18, 15, rows)[:, None, None]
    z[5], z[6] = 0, -1
    z = z.to(dtype)[:, 1]
    gamma = (6 * torch.rand(rows, 1) - 0.5).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = _both_ways(z, gamma, torch.randn(rows, 197).to(dtype))
    finally:
        torch.set_num_threads(before)
    for native, plain, exact in zip(*found, strict=True):
        scale = exact.abs().amax(-1, keepdim=True).clamp_min(1e-37)
        own, allowed = (((x - exact).abs() / scale).amax(-1) for x in (native, plain))
        # On the mean over rows: in single rows the gradient of gamma cancels almost to nothing.
        assert own.mean() <= 2 * allowed.mean() + torch.finfo(torch.float32).eps
        assert own.max() <= 4 * allowed.max() + 4 * torch.finfo(torch.float32).eps


@needs_native
def test_nan_comes_out_of_the_c_kernel_in_its_row_alone():
    z = torch.randn(4, 40)
    z[2, 7] = float("nan")
    results = _both_ways(z, torch.full((4, 1), 3.0), torch.ones(4, 40))
    for out, grad_z, _ in results:
        assert out.isnan().all(-1).tolist() == [False, False, True, False]
        assert grad_z.isnan().any(-1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("suffix", ["", "_backward"])
@pytest.mark.parametrize(
    "name", ["power_map", pytest.param("power_map_native", marks=needs_native)]
)
def test_power_map_is_a_sound_custom_operator(name, suffix):
    z, gamma = torch.randn(6, 16), torch.full((6, 1), 2.0)
    arguments, forward = (z, gamma), getattr(torch.ops.attnzoo, name)
    if suffix:
        arguments = (torch.randn(6, 16), *arguments, *forward(z, gamma))
    torch.library.opcheck(getattr(torch.ops.attnzoo, name + suffix).default, arguments)


def test_power_map_gradients_by_finite_differences():
    torch.manual_seed(1)
    x = (torch.rand(3, 6, dtype=torch.float64) + 0.1).requires_grad_()
    gamma = (2 + torch.rand(3, 1, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(power_map, (x, gamma))


@pytest.mark.parametrize("tokens", [4, 64])  # below and above the width: both orders
def test_linear_attention_is_its_reference_in_either_order(tokens):
    torch.manual_seed(0)
    q, k, v = (torch.rand(2, 3, tokens, 16, dtype=torch.float64) for _ in range(3))
    expected = linear_attention(q, k, v, impl="reference")
    torch.testing.assert_close(linear_attention(q, k, v), expected)


@needs_native
@pytest.mark.parametrize("tokens", [1, 4, 30])
def test_a_few_tokens_linear_attention_in_c_is_its_reference(tokens):
    torch.manual_seed(0)
    q, k, v = torch.rand(3, 2, tokens, 3, 8).transpose(2, 3).unbind(0)
    strided = q.mT.contiguous().mT
    for query in (q, strided, q.double()):
        found = linear_core(query, query, k, k, v, 1e-15)
        torch.testing.assert_close(found, linear_attention(q, k, v, impl="reference"))
    with pytest.raises(InvalidValue, match="one width"):
        linear_core(q, q, k[..., :4], k[..., :4], v, 1e-15)


@pytest.mark.parametrize("counts", [[5, 0, 9], [14, 0, 0], [1, 12, 1]])
def test_routed_linear_is_its_reference_with_empty_and_full_projectors(counts):
    torch.manual_seed(0)
    index = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))[torch.randperm(14)]
    x = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 6, 5, dtype=torch.float64, requires_grad=True)
    index = index.view(2, 7)
    cotangent = torch.randn(2, 7, 5, dtype=torch.float64)
    fast = routed_linear(x, weight, index)
    expected = routed_linear(x, weight, index, impl="reference")
    torch.testing.assert_close(fast, expected)
    torch.testing.assert_close(
        torch.autograd.grad(fast, (x, weight), cotangent),
        torch.autograd.grad(expected, (x, weight), cotangent),
    )
    with torch.no_grad():  # a few tokens meet every projector then
        torch.testing.assert_close(routed_linear(x, weight, index), expected)


def test_routed_linear_is_a_sound_custom_operator():
    index = torch.tensor([0, 2, 2, 1])
    arguments = (
        torch.randn(4, 6, requires_grad=True),
        torch.randn(3, 6, 5, requires_grad=True),
        index,
    )
    torch.library.opcheck(torch.ops.attnzoo.routed_linear.default, arguments)


def test_routed_linear_does_each_token_once():
    """The useful work is one projection per token, whatever the number of projectors."""
    from torch.profiler import profile

    x, weight = torch.randn(64, 8), torch.randn(5, 8, 8)
    with profile(record_shapes=True) as profiled:
        routed_linear(x, weight, torch.arange(64) % 5)
    rows = [e.input_shapes[0][0] for e in profiled.events() if e.name == "aten::mm"]
    assert sum(rows) == 64


@pytest.mark.parametrize("gradient", ["ste", "none"])
def test_router_gradients(gradient):
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    scalars = torch.arange(4, dtype=torch.float64).requires_grad_()
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    cotangents = torch.randn(2, 3, 1).double(), torch.randn(2, 3, 5).double()
    router = torch.eye(4, dtype=torch.float64)
    picked, routed = pick(router, [logits], scalars, gradient)
    assert torch.equal(routed.index, logits.argmax(-1))
    fast = picked, gated(x, routed, gradient)
    plain = (
        pick(router, [logits], scalars, gradient, impl="reference")[0],
        gated(x, routed, gradient, impl="reference"),
    )
    assert torch.equal(fast[0], routed.index.unsqueeze(-1).double()), "exactly the argmax"
    assert torch.equal(fast[1], x)
    torch.testing.assert_close(fast, plain)
    inputs = (logits, scalars, x)
    found, expected = (
        torch.autograd.grad(outs, inputs, cotangents, allow_unused=True, retain_graph=True)
        for outs in (fast, plain)
    )
    assert (found[0] is None) == (gradient == "none")
    assert gradient == "none" or found[0].abs().max() > 0
    torch.testing.assert_close(found, expected)


def test_ties_go_to_the_first():
    assert decide(torch.ones(9, 2), [torch.ones(5, 2)], "ste").index.eq(0).all()


def test_balance_loss_is_one_when_uniform_and_most_when_collapsed():
    uniform = Route(torch.arange(9) % 3, torch.zeros(9, 3))
    torch.testing.assert_close(balance_loss(uniform), torch.tensor(1.0))
    collapsed = Route(torch.zeros(9, dtype=torch.long), 100 * torch.eye(3)[0].expand(9, 3))
    torch.testing.assert_close(balance_loss(collapsed), torch.tensor(3.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decision_of_parts_is_that_of_the_whole(dtype):
    parts = [torch.randn(2, 5, d).to(dtype) for d in (3, 4)]
    weight = torch.randn(6, 7).to(dtype)
    expected = (torch.cat(parts, -1).double() @ weight.double().t()).argmax(-1)
    assert torch.equal(decide(weight, parts, "ste").index, expected)


@pytest.mark.parametrize("size", [(3, 3), (3, 1), (1, 3), (5, 5), (7, 7)])
def test_depthwise_convolution_is_its_reference(size):
    x, weight = torch.randn(2, 30, 6), torch.randn(6, 1, *size)
    bias, added = torch.randn(6), torch.randn(2, 30, 6)
    operands = x, (5, 6), weight, bias, added
    expected = depthwise_conv(*operands, impl="reference")
    torch.testing.assert_close(depthwise_conv(*operands, impl="torch"), expected)
    torch.testing.assert_close(depthwise_conv(*operands), expected)


class TestDispatch:
    def test_what_auto_picks_on_a_cpu(self):
        x = torch.ones(1)
        assert dispatch.choose("power_map", "auto", x) == ("native" if HAS_NATIVE else "torch")
        assert dispatch.choose("power_map", "auto", x.double()) == "torch"
        assert dispatch.choose("power_map", "auto", x.to("meta")) == "torch"
        for name, offered in dispatch.TABLE.items():
            best = "native" if "native" in offered and HAS_NATIVE else "torch"
            assert dispatch.choose(name, "auto", x) == best

    def test_an_explicit_choice_is_taken_or_refused_with_what_fits(self):
        x = torch.ones(1)
        for impl in ("torch", "reference"):
            assert dispatch.choose("power_map", impl, x) == impl
        with pytest.raises(Unavailable, match=r"'native' takes .*not torch\.float64"):
            dispatch.choose("power_map", "native", x.double())
        with pytest.raises(Unavailable, match=r"'triton' .*, or choose 'torch' or 'reference'$"):
            dispatch.choose("power_map", "triton", x.double().to("meta"))
        # Of a library nobody knows until it is loaded.
        with pytest.raises(Unavailable, match=r"'flex' .*, or choose 'torch' or 'reference'$"):
            dispatch.choose("neighborhood_attention", "flex", x)

    def test_what_nobody_offers_names_what_is_offered(self):
        with pytest.raises(
            InvalidValue, match=r"impl='fla' of power_map is not one of .*'native'"
        ):
            power_map(torch.ones(1, 2), torch.ones(1), impl="fla")

    def test_limits_are_asked_for_only_where_the_kernels_may_run(self):
        dispatch.choose("depthwise_conv", "auto", torch.ones(1), None, pytest.fail)

    def test_kernels_are_for_a_gpu_of_a_type_that_they_know(self):
        class Pretender(torch.Tensor):
            is_cuda = True

        x = torch.zeros(1).as_subclass(Pretender)
        for dtype, expected in ((torch.float32, "triton"), (torch.bfloat16, "triton"),
                                (torch.float16, "torch"), (torch.float64, "torch")):  # fmt: skip
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(dispatch, "_try_triton", lambda: True)
                assert dispatch.choose("routed_linear", "auto", x, dtype) == expected
                limited = dispatch.choose("routed_linear", "auto", x, dtype, lambda: "this")
                assert limited == "torch"
                patch.setattr(dispatch, "_try_triton", lambda: False)
                assert dispatch.choose("routed_linear", "auto", x, dtype) == "torch"


@pytest.mark.skipif(IS_INTERPRETED, reason="kernels run here")
@pytest.mark.parametrize("name", list_attention())
def test_kernels_that_are_asked_for_where_they_cannot_run_are_refused_in_one_line(name):
    hints = typing.get_type_hints(get_attention(name).Config)
    if "triton" not in typing.get_args(hints["impl"]):
        pytest.skip("has no kernels of its own")
    with pytest.raises(Unavailable, match=r"^impl='triton' .*impl='auto'.*$"):
        build_attention(name, 48, impl="triton")(torch.randn(1, 16, 48), (4, 4))


def test_an_operator_of_ones_own_needs_a_row_and_runs_with_it(tmp_path, monkeypatch):
    for name, text in {
        "__init__": "from attnzoo.ops.dispatch import operator\n\n\n"
        "@operator\ndef my_half(x, *, impl='auto'): ...\n",
        "torch": "def my_half(x):\n    return x * 0.5\n",
        "reference": "def my_half(x):\n    return x / 2\n",
    }.items():
        (tmp_path / "own_ops").mkdir(exist_ok=True)
        (tmp_path / "own_ops" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InvalidValue, match=r"TABLE\['my_half'\] = "):
        importlib.import_module("own_ops")
    monkeypatch.setitem(dispatch.TABLE, "my_half", ("torch", "reference"))
    half = importlib.import_module("own_ops").my_half
    for impl in ("auto", "torch", "reference"):
        assert half(torch.ones(1), impl=impl) == 0.5
