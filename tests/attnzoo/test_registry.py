"""Names, options and contexts: what is refused, and what the refusal says."""

import pytest
import torch
from torch import nn

import attnzoo
from attnzoo import Attention, AttentionConfig, build_attention, get_attention, register_attention
from attnzoo.testing import build_scrambled, tokens


def test_list_is_sorted_and_holds_the_main_mechanisms():
    names = attnzoo.list_attention()
    assert names == sorted(names)
    assert {"softmax", "sana", "dydila", "dydila-map"} <= set(names)


@pytest.mark.parametrize(
    ("call", "kind", "fragments"),
    [
        (lambda: get_attention("snaa"), ValueError, ["'snaa'", "'sana'", "softmax"]),
        (lambda: build_attention("dydila", 8, n_projector=3), TypeError, ["'n_projectors'"]),
        (lambda: build_attention("dydila", 8, conv="acnett"), ValueError, ["'acnet'", "'3x3'"]),
        (lambda: build_attention("dydila", 8, n_projectors=0), ValueError, ["n_projectors", "0"]),
        (lambda: build_attention("dydila", 8, n_projectors="3"), TypeError, ["int", "'3'"]),
        (lambda: build_attention("dydila", 8, share_gamma=1), TypeError, ["bool", "1"]),
        (lambda: build_attention("dydila", 8, eps=-1.0), ValueError, ["eps", "-1"]),
        (
            lambda: build_attention("dydila", 8, projection="none"),
            ValueError,
            ["differential='none'"],
        ),
        (lambda: build_attention("softmax", 8, num_heads=3), ValueError, ["3", "[1, 2, 4, 8]"]),
        (lambda: build_attention("softmax", 8, layer_index=2, depth=2), ValueError, ["depth=2"]),
    ],
)
def test_refusals_name_the_value_and_the_remedy(call, kind, fragments):
    with pytest.raises(kind) as caught:
        call()
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_an_integer_is_a_float_and_a_number_may_stand_for_a_schedule():
    assert build_attention("dydila", 8, gamma_init=2).config.gamma_init == 2
    increasing = build_attention("dydila", 8, lambda_init="increasing", layer_index=3, depth=4)
    torch.testing.assert_close(
        increasing.lambda_, torch.full((1, 9), 0.8 - 0.6 * 2.718281828459045**-0.9)
    )


def test_a_name_can_be_registered_once():
    with pytest.raises(ValueError, match="already registered"):
        register_attention("sana")(get_attention("softmax"))
    with pytest.raises(TypeError, match="must subclass"):
        register_attention("module")(nn.Linear)


def test_repr_shows_the_choices():
    shown = repr(build_attention("dydila", 8, normalizer="diff"))
    assert "normalizer='diff'" in shown
    assert "dydila" in shown


def test_what_a_mechanism_does_not_give_is_a_clear_error():
    class Identity(Attention):
        def forward(self, x, grid):
            return x

    layer = Identity(attnzoo.AttentionContext(dim=8), AttentionConfig())
    with pytest.raises(TypeError, match="closed form"):
        layer.macs((2, 2))
    with pytest.raises(TypeError, match="attention_map"):
        layer.attention_map(torch.zeros(1, 4, 8), (2, 2))


def test_auxiliary_losses_are_summed_and_cleared():
    layers = nn.ModuleList(build_scrambled("dydila", balance_coefficient=0.5) for _ in range(2))
    assert attnzoo.auxiliary_loss(layers.train()) is None
    for layer in layers:
        layer(tokens((4, 4)), (4, 4))
    loss = attnzoo.auxiliary_loss(layers)
    assert loss.item() > 0.9  # each layer's is at least its coefficient, about
    loss.backward()
    assert layers[0].projector_routers["query"].weight.grad.abs().sum() > 0
    assert attnzoo.auxiliary_loss(layers) is None


def test_softmax_backends_that_are_missing_are_not_replaced():
    for impl in ("flash", "xformers"):
        layer = build_attention("softmax", 32, impl=impl)
        with pytest.raises(RuntimeError, match=f"impl='{impl}'.*sdpa"):
            layer(tokens((4, 4), dim=32), (4, 4))
