"""What a user changes of a linear mechanism, in a derived class or one layer, is computed so.

On a GPU, or as ``test_interpreted.py`` runs it.
"""

import copy
import dataclasses
from functools import partial

import pytest
import torch
from torch.utils._pytree import tree_map_only

from attnzoo import build_attention
from attnzoo.errors import InvalidValue, Unavailable
from attnzoo.layers.depthwise_conv import DepthwiseConv
from attnzoo.layers.key_position import KeyPosition
from attnzoo.layers.linear_attention import LinearAttention
from attnzoo.ops.linear_core import slower
from attnzoo.testing import DIM, build_scrambled, tokens
from tests.attnzoo.interpreted import CAN_RUN, DEVICE, HAS_TRITON


class OwnFeatures(LinearAttention):
    def queries(self, query, x, grid, span=slice(None)):
        return super().queries(query, x, grid, span)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_a_layer_with_features_of_its_own_is_refused():
    layer = build_attention("sana", DIM)
    with pytest.raises(InvalidValue, match="features as OwnFeatures makes them"):
        OwnFeatures(layer.context, type(layer.config)(impl="triton"))


STEPS = [
    "project", "query_kernel", "key_kernel", "queries", "keys", "activated", "fold", "attended",
    "attend", "finish", "measured", "factor",
]  # fmt: skip


def with_a_step_of_its_own(layer, step):
    """The layer, of a class that a user derived."""
    kind, layer = type(layer), copy.deepcopy(layer)
    vars(layer).pop("_chosen", None)

    def own(*operands, **options):
        return tree_map_only(torch.Tensor, changed, getattr(kind, step)(*operands, **options))

    def changed(z):
        return 1.5 * z + 0.25 if z.is_floating_point() else z

    layer.__class__ = type("Own", (kind,), {step: own})
    return layer


def with_impl(layer, impl):
    layer.config = dataclasses.replace(layer.config, impl=impl)
    return layer


@torch.no_grad()
@pytest.mark.parametrize("step", ["query_kernel", "key_kernel", "fold", "attended"])
def test_few_tokens_are_read_as_a_derived_class_reads_them(step):
    layer, x, grid = build_attention("sana", 32), tokens((2, 3), dim=32), (2, 3)
    derived = with_a_step_of_its_own(layer, step)
    out = derived(x, grid)
    torch.testing.assert_close(out, with_impl(derived, "torch")(x, grid), rtol=1e-4, atol=1e-4)
    assert (out - layer(x, grid)).norm() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("step", ["query_kernel", "fold", "attended"])
def test_few_tokens_are_read_as_a_layer_itself_reads_them(step):
    layer, x, grid = build_attention("sana", 32), tokens((2, 3), dim=32), (2, 3)
    before, method = layer(x, grid), getattr(layer, step)
    setattr(layer, step, lambda *z, **options: tree_map_only(torch.Tensor, twice, method(*z)))
    out = layer(x, grid)
    torch.testing.assert_close(out, with_impl(layer, "torch")(x, grid), rtol=1e-4, atol=1e-4)
    assert (out - before).norm() > 1e-2


def twice(z):
    return 2 * z + 0.25


if CAN_RUN:

    def test_what_changes_no_step_takes_kernels():
        x, grid = tokens((2, 3), dim=32).to(DEVICE), (2, 3)
        for name in ("dydila", "fixation", "mala", "mhla", "rala", "sana"):
            layer = build_scrambled(name, 32, num_heads=2).to(DEVICE)
            expected = layer(x, grid)
            layer.__class__ = type("Own", (type(layer),), {"extra_repr": lambda self: "own"})
            vars(layer).pop("_chosen")
            assert layer.implementation(x) == "triton"
            torch.testing.assert_close(layer(x, grid), expected)

    def test_a_mechanism_of_ones_own_takes_kernels():
        def kernel(self, z):
            return 0.5 * z

        own = {"query_kernel": kernel, "key_kernel": kernel, "activation": "elu"}
        layer = build_attention("linfusion", 32).to(DEVICE)
        layer.__class__ = type("Own", (LinearAttention,), own | {"project": type(layer).project})
        vars(layer).update(project_query=lambda x: x, project_key_value=lambda x: (x, x))
        x = tokens((2, 3), dim=32).to(DEVICE)
        assert layer.implementation(x) == "triton"
        torch.testing.assert_close(layer(x, (2, 3)), with_impl(layer, "torch")(x, (2, 3)))

    def test_a_core_has_its_own_widest_heads():
        width = next(z for z in (64, 128, 256, 512) if slower(z))
        layer = build_attention("dydila", width, num_heads=1).to(DEVICE)
        assert layer.implementation(tokens((2, 3), dim=width).to(DEVICE)) == "triton"

    def test_a_kernel_of_ones_own_serves_its_class():
        def fused(self, x, grid):
            return x

        x = tokens((2, 3), dim=32).to(DEVICE)
        layer = build_attention("lit", 32).to(DEVICE)
        layer.__class__ = type(
            "Own", (type(layer),), {"fused": fused, "query_kernel": lambda self, query: query}
        )
        assert layer(x, (2, 3)) is x

    @pytest.mark.parametrize("name", ["efficient", "fixation", "lit", "mala", "mhla", "sana"])
    def test_kernels_pass_over_nothing_that_a_layer_is_given(name, small_convolutions):
        x, grid = tokens((2, 3), dim=32).to(DEVICE), (2, 3)
        base = build_scrambled(name, 32, num_heads=2).to(DEVICE).eval()
        before = base(x, grid)
        position = KeyPosition(grid, 32)
        torch.nn.init.normal_(next(position.parameters()))
        given = {
            "conv": DepthwiseConv(32, "acnet"),
            "key_position": position,
            "query_norm": torch.nn.LayerNorm(32),
            "key_norm": torch.nn.LayerNorm(32),
        }
        steps = {z: lambda *operands: 1.5 * operands[0] + 0.25 for z in ("query_kernel", "finish")}
        for part, value in (given | steps).items():
            if part.endswith("_norm") and name != "sana":
                continue
            layer = copy.deepcopy(base)
            if isinstance(value, torch.nn.Module):
                value = value.to(DEVICE).eval()
            setattr(layer, part, value)
            out = layer(x, grid)
            assert (out - before).norm() > 1e-2, part
            expected = with_impl(layer, "reference")(x, grid)
            torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3, msg=part)

    @pytest.mark.parametrize(
        ("name", "options"),
        [("sana", {"activation": "elu"}), ("dydila", {"divides_by_mean": True})],
    )
    def test_kernels_leave_out_no_option_of_a_class(name, options):
        layer = build_attention(name, 32, eps=0.3).to(DEVICE)
        layer.__class__ = type("Own", (type(layer),), options)
        x = tokens((2, 3), dim=32).to(DEVICE)
        expected = with_impl(copy.deepcopy(layer), "reference")(x, (2, 3))
        torch.testing.assert_close(layer(x, (2, 3)), expected, rtol=1e-3, atol=1e-3)

    def test_a_mean_leaves_the_convolution_whole(small_convolutions):
        layer = build_scrambled("lit", 32, num_heads=2).to(DEVICE)
        layer.normalizer, x = "mean", tokens((2, 3), dim=32).to(DEVICE)
        expected = with_impl(copy.deepcopy(layer), "reference")(x, (2, 3))
        torch.testing.assert_close(layer(x, (2, 3)), expected, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("name", ["lit", "mala", "mhla"])
    def test_a_hook_of_the_convolution_is_called(name, small_convolutions):
        layer, called = build_scrambled(name, 32, num_heads=2).to(DEVICE), []
        x = tokens((2, 3), dim=32).to(DEVICE)
        expected = layer(x, (2, 3))
        layer.conv.register_forward_hook(lambda *z: called.append(1))
        torch.testing.assert_close(layer(x, (2, 3)), expected, rtol=1e-3, atol=1e-3)
        assert called

    @pytest.mark.parametrize(
        "name",
        [
            "dydila",
            "dydila-map",
            "edit",
            "efficient",
            "fixation",
            "focused",
            "lit",
            "mala",
            "mhla",
            "sana",
        ],
    )
    def test_kernels_pass_over_no_step_of_a_derived_class(name, small_convolutions):
        x, grid = tokens((2, 3), dim=32).to(DEVICE), (2, 3)
        layer = build_scrambled(name, 32, num_heads=2).to(DEVICE)
        assert layer.implementation(x) == "triton" or name == "dydila-map"
        for step in filter(partial(hasattr, layer), STEPS):
            derived = with_a_step_of_its_own(layer, step)
            out, is_served = derived(x, grid), derived.implementation(x) == "triton"
            slow = "torch" if step in ("fold", "attended") else "reference"
            expected = with_impl(derived, slow)(x, grid)
            torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3, msg=step)
            if not is_served and name != "dydila-map":
                with pytest.raises(Unavailable, match="features as Own makes them"):
                    with_impl(derived, "triton")(x, grid)

    @pytest.mark.parametrize(
        ("name", "value", "unserved"),
        [("is_rotated", True, "rotary positions"), ("normalizer", "diff", "normalizer='diff'")],
    )
    def test_kernels_that_are_asked_for_refuse_what_a_class_sets_later(name, value, unserved):
        layer = build_attention("linfusion", 32, impl="triton").to(DEVICE)
        setattr(layer, name, value)
        with pytest.raises(Unavailable, match=f"does not serve {unserved}; leave impl='auto'"):
            layer(tokens((2, 3), dim=32).to(DEVICE), (2, 3))
