"""Inputs at the edges: scales, zeros, equal tokens, precisions; and options in every pair."""

import contextlib
import itertools

import pytest
import torch

from attnzoo import InvalidValue, UsageError, build_attention, get_attention, list_attention
from attnzoo.contract import LEAST_DIVISOR
from attnzoo.mechanisms import agent
from attnzoo.testing import (
    build_scrambled,
    deviations,
    outputs_and_gradients,
    reference_of,
    tokens,
)

GRID, DIM = (4, 6), 48
SCALES = (1e-4, 1.0, 1e4)
STEEP = (
    "softmax", "agent", "moh", "differential", "compressed", "local", "pvt", "linformer",
)  # fmt: skip


def hard_inputs():
    x = torch.randn(2, 24, DIM, generator=torch.Generator().manual_seed(1))
    half = x.clone()
    half[:, ::2] = 0
    one_hot = torch.eye(DIM)[:24].repeat(2, 1, 1)
    return {
        "normal": x,
        "half the tokens zero": half,
        "all zero": torch.zeros_like(x),
        "one-hot": one_hot,
        "constant": torch.ones_like(x),
        "equal tokens": x[:, :1].repeat(1, 24, 1),
    }


def not_finite(layer, x, grid=GRID, **autocast):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", enabled=bool(autocast), **autocast):
        out = layer(x, grid)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    out.backward(cotangent.to(out.dtype))
    found = {"output": out, "grad x": x.grad}
    found |= {f"grad {n}": p.grad for n, p in layer.named_parameters() if p.grad is not None}
    return [name for name, value in found.items() if not value.isfinite().all()]


@pytest.mark.parametrize("name", list_attention())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mixed", [False, True], ids=["plain", "autocast"])
def test_outputs_and_gradients_are_finite(name, dtype, mixed):
    if mixed and dtype == torch.float32:
        pytest.skip("autocast has no float32")
    layer = build_scrambled(name).train()
    options = {"dtype": dtype} if mixed else {}
    if not mixed:
        layer = layer.to(dtype)
    # A weight's gradient sums token times gradient: in float16, whose largest number is 65504,
    # tokens of scale 1e4 are beyond it by the mathematics.
    scales = SCALES[:2] if dtype == torch.float16 else SCALES
    for kind, x in hard_inputs().items():
        for scale in scales if x.any() else scales[:1]:
            x_here = (x * scale).to(torch.float32 if mixed else dtype)
            assert not not_finite(layer, x_here, **options), (kind, scale)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("name", list_attention())
def test_the_least_divisor_gives_finite_outputs_and_gradients(name, impl):
    fields = get_attention(name).Config.__dataclass_fields__
    least = dict.fromkeys({"eps", "gate_normalizer"} & fields.keys(), LEAST_DIVISOR)
    if not least:
        pytest.skip("divides by no option")
    layer = build_attention(name, DIM, **least, impl=impl).train()
    for kind, x in hard_inputs().items():
        assert not not_finite(layer, x), kind


@pytest.mark.parametrize("name", STEEP)
@pytest.mark.parametrize("scale", [1e4, 1e5])
def test_steep_softmax_has_finite_gradients(name, scale):
    # Of many seeds, because an overflow is a matter of how the scores round.
    for seed in range(4):
        layer = build_scrambled(name, 32, seed=seed)
        assert not not_finite(layer, tokens((8, 8), dim=32, seed=seed) * scale, (8, 8))


def test_steep_softmax_with_learned_biases_has_finite_gradients():
    layer = build_scrambled("agent", bias="learned", n_agents=4, bias_grid=GRID)
    for seed in range(4):
        assert not not_finite(layer, tokens(GRID, seed=seed) * 1e5)


@pytest.mark.parametrize("name", list_attention())
@pytest.mark.parametrize("batch", [1, 2])
def test_one_token_trains(name, batch):
    layer = build_scrambled(name).train()
    assert not not_finite(layer, tokens((1, 1), batch), (1, 1))


@contextlib.contextmanager
def default_type(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


# Each with a grid for which nothing else has filled a cache.
CONTEXTS = {
    "meta": (lambda: torch.device("meta"), (3, 11)),
    "float64": (lambda: default_type(torch.float64), (11, 3)),
    "bfloat16": (lambda: default_type(torch.bfloat16), (2, 13)),
    "inference": (torch.inference_mode, (13, 2)),
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("impl", ["auto", "reference", "torch"])
@pytest.mark.parametrize("name", list_attention())
def test_a_default_device_or_type_is_not_the_layers(name, impl, context):
    """Nor does what is cached inside keep either, or what no gradient can read."""
    (enter, grid), layer = CONTEXTS[context], build_scrambled(name, impl=impl)
    x = tokens(grid)
    with enter(), torch.no_grad():
        inside = layer(x, grid)
    after = layer(x, grid)
    after.sum().backward()
    torch.testing.assert_close(inside.clone(), after.detach())


@pytest.mark.parametrize("part", ["norm", "bias", "weight"])
@pytest.mark.parametrize("name", list_attention())
def test_a_part_trains_alone_as_with_the_rest(name, part):
    """PyTorch's group norm crashed where its input wants no gradient."""
    layer, x = build_scrambled(name).train(), tokens(GRID)
    layer(x, GRID).square().sum().backward()
    own = [p for k, p in layer.named_parameters() if part in k and p.grad is not None]
    if not own:
        pytest.skip("has no such parameters")
    together = [p.grad for p in own]
    asked = torch.autograd.grad(layer(x, GRID).square().sum(), own)
    layer.zero_grad()
    layer.requires_grad_(False)
    for parameter in own:
        parameter.requires_grad_()
    layer(x, GRID).square().sum().backward()
    alone = [p.grad for p in own]
    for found in (asked, alone):
        torch.testing.assert_close(list(found), together, rtol=1e-4, atol=1e-4)


def test_one_token_takes_the_running_statistics_and_leaves_them():
    layer = build_scrambled("dydila").train()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    out = layer(tokens((1, 1), 1), (1, 1))
    torch.testing.assert_close(out, layer.eval()(tokens((1, 1), 1), (1, 1)))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("gamma", [0.05, 0.2])
@pytest.mark.parametrize("name", ["dydila", "dydila-map"])
@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_dydila_of_small_powers_is_its_reference(name, gamma, impl):
    # Not scrambled: the gammas are to stay where they start, but for their ties.
    torch.manual_seed(0)
    layer = build_attention(name, DIM, gamma_init=gamma, gamma_jitter=gamma / 5, impl=impl).eval()
    found = deviations(layer, tokens((7, 5)), (7, 5))
    for kind in ("output", "gradients"):
        assert found[kind] <= found[f"allowed {kind}"], found


OPTIONS = {
    "projection": ["redundancy", "replace", "none"],
    "kernel": ["routed", "fixed", "relu"],
    "differential": ["token", "map", "none"],
    "router_gradient": ["ste", "none"],
    "normalizer": ["base", "diff", "mean", "none"],
    "gamma_init": [0.05],
    "gamma_jitter": [0.01],
    "gamma_form": ["clamp"],
    "lambda_init": ["increasing"],
    "map_router": ["image"],
    "conv": ["3x3", "5x5", "none"],
    "qkv_bias": [True],
    "balance_coefficient": [0.1],
    "stream": [3],
    "impl": ["reference"],
}


def test_a_factors_gradient_beyond_float16_leaves_the_others_finite():
    layer = build_scrambled("dydila", 64, num_heads=2, seed=2).half()
    x, overflown = 2048 * tokens((1, 1), dim=64).half(), []
    for either in (layer, reference_of(layer)):
        grads = outputs_and_gradients(either, x, (1, 1))
        overflown.append({name for name, z in grads.items() if not z.isfinite().all()})
    assert overflown[0] <= overflown[1]


@pytest.mark.parametrize("first", OPTIONS)
def test_dydila_trains_with_every_pair_of_options(first):
    others = list(OPTIONS)[list(OPTIONS).index(first) :]
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1))
    for second in others:
        for pair in itertools.product(OPTIONS[first], OPTIONS[second]):
            options = dict(zip((first, second), pair, strict=True))
            # The one contradiction, and what its message advises.
            if options.get("projection", "redundancy") != "redundancy":
                if options.get("differential", "token") != "none":
                    with pytest.raises(InvalidValue, match="differential='none'"):
                        build_attention("dydila", 16, num_heads=2, **options)
                options["differential"] = "none"
            if options.get("stream") and options.get("map_router") == "image":
                options["differential"] = "token"
            torch.manual_seed(0)
            layer = build_attention("dydila", 16, num_heads=2, **options).train()
            assert not not_finite(layer, x, (2, 3)), options
            assert layer.macs((2, 3)) > 0
            with torch.no_grad():
                assert layer.eval()(x, (2, 3)).isfinite().all(), options


def test_without_a_difference_nothing_redundant_is_made():
    layer = build_attention("dydila", 48, differential="none")
    plain = build_attention("dydila", 48, differential="none", projection="none")
    assert layer.state_dict().keys() == plain.state_dict().keys()
    assert layer.macs((4, 4)) == plain.macs((4, 4))


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("dydila", {"gamma_init": 0.0}, "gamma_init must be positive"),
        ("dydila", {"gamma_init": -1.0}, "gamma_init must be positive"),
        ("dydila", {"gamma_init": float("nan")}, "gamma_init"),
        ("dydila", {"gamma_init": float("inf")}, "gamma_init"),
        ("dydila", {"gamma_jitter": 3.0}, "gamma_jitter=3.0 must be below gamma_init=3.0"),
        ("focused", {"focusing_factor": 0.0}, "focusing_factor must be positive"),
        ("focused", {"focusing_factor": float("nan")}, "focusing_factor"),
        ("agent", {"n_agents": 5}, "square number"),
        ("gated", {"expand_k": 0.3}, "do not divide"),
        ("differential", {"lambda_init": 2.0}, "must lie in"),
        ("compressed", {"layers": (7,)}, "names blocks"),
        ("moh", {"shared_heads": 1}, "set both"),
        ("lit", {"stream": 0}, "stream"),
    ],
)
def test_a_mistake_of_the_caller_is_told_from_a_bug(name, options, said):
    with pytest.raises(ValueError, match=said) as caught:
        build_attention(name, 48, **options)
    if options != {"stream": 0}:  # the contract's own check
        assert isinstance(caught.value, UsageError)


def test_agents_of_a_model_without_any():
    with pytest.raises(UsageError), agent.agents(build_attention("softmax", 16), 4):
        pass
