"""Closed form, fvcore and the meta device agree; what is wrong is refused, what lacks is measured.

The 64x64 grid with every preset at full width is counted on the meta device; fvcore runs what it
counts, and gets two blocks and fewer tokens.
"""

import dataclasses
import subprocess
import sys
import typing

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from attnzoo import (
    Attention,
    InvalidType,
    InvalidValue,
    build_attention,
    get_attention,
    list_attention,
    register_attention,
    registry,
    testing,
)
from attnzoo.command import show
from attnzoo.counting import PAPER_RULES, count_macs, fvcore_macs, measure_macs
from attnzoo.ops import gated_scan as gated
from attnzoo.ops.gated_scan.reference import gated_linear_attention as recurrence
from backbones import DiT, build_backbone, list_presets
from backbones.presets import PAPER_MODELS

GRIDS = ((8, 8), (7, 13), (64, 64))
# Options that change what a mechanism multiplies.
VARIANTS = [
    *((name, {}) for name in list_attention()),
    ("softmax", {"impl": "reference"}),
    ("sana", {"impl": "reference", "qk_norm": True}),
    ("dydila", {"impl": "reference"}),
    ("dydila", {"conv": "5x5", "normalizer": "none"}),
    ("dydila", {"projection": "replace", "differential": "none", "kernel": "fixed"}),
    ("dydila", {"normalizer": "diff", "conv": "3x3"}),
    ("dydila-map", {"map_router": "image", "conv": "none"}),
    ("zigma", {"state": "ssd"}),
    ("dis", {"impl": "reference"}),
    ("diffussm", {"reduction": 3}),
    ("deltanet", {"direction": "four", "conv": "causal"}),
    ("sla", {"linear": "all", "block": 16}),
    ("ttt", {"conv": False}),
]


def on_meta(build, *args, **kwargs):
    with torch.device("meta"):
        return build(*args, **kwargs)


@pytest.fixture
def register():
    """Registers mechanisms for one test."""
    before = dict(registry._REGISTRY)
    yield register_attention
    registry._REGISTRY.clear()
    registry._REGISTRY.update(before)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_three_ways_agree_for_every_mechanism(name, options, grid):
    layer = build_attention(name, 48, layer_index=1, depth=2, **options)
    counted = count_macs(layer, grid=grid)
    assert counted.total == layer.macs(grid) == sum(counted.parts.values())
    assert {k: v for k, v in layer.macs_parts(grid).items() if v} == {
        k: v for k, v in measure_macs(layer, grid=grid).parts.items() if v
    }
    assert fvcore_macs(layer, grid=grid) == counted.total
    assert counted.measured == ()


@pytest.mark.parametrize("name", list_attention())
def test_a_trace_is_counted_though_its_sizes_are_tensors(name):
    layer = build_attention(name, 48, layer_index=1, depth=2, impl="torch")
    assert fvcore_macs(layer, grid=(6, 6)) == layer.macs((6, 6))


@pytest.mark.parametrize("name", list_attention())
def test_how_a_layer_computes_is_not_counted(name):
    """Neither in blocks, which make what they need twice, nor by kernels that are not here."""
    hints = typing.get_type_hints(get_attention(name).Config)
    ways = [{"impl": impl} for impl in typing.get_args(hints.get("impl", ()))]
    for options in ways + [{"stream": 5}] * ("stream" in hints):
        try:
            layer = build_attention(name, 48, layer_index=1, depth=2, **options)
        except InvalidValue:
            continue
        stated = layer.macs((4, 6))
        is_twice = name == "differential" and options == {"impl": "reference"}
        counted = count_macs(layer, grid=(4, 6)).total if not is_twice else stated
        assert (options, counted) == (options, stated)
        if not is_twice:
            assert (options, fvcore_macs(layer, grid=(4, 6))) == (options, stated)


@pytest.mark.parametrize("name", list_attention())
def test_the_parts_of_small_grids_agree(name):
    """Where mechanisms cut what they have for larger ones, or merge what is cheaper together."""
    layer = build_attention(name, 48, layer_index=1, depth=3).eval()
    for grid in ((1, 1), (1, 7), (2, 2), (3, 5)):
        stated = {k: v for k, v in layer.macs_parts(grid).items() if v}
        measured = {k: v for k, v in measure_macs(layer, grid=grid).parts.items() if v}
        assert (grid, stated) == (grid, measured)


@pytest.mark.parametrize("preset", list_presets())
def test_closed_form_is_the_meta_count_for_every_preset(preset):
    model = on_meta(build_backbone, preset)
    for grid in GRIDS:
        counted = count_macs(model, grid=grid)  # refuses a difference
        stated = model.macs_parts(grid).values()
        assert counted.total == sum(sum(parts.values()) for parts in stated)
    if preset.endswith("-S/2"):  # block by block, where count_macs counts equal blocks once
        measured = measure_macs(model, grid=grid)
        assert counted.total == measured.total
        assert (counted.backward, counted.active_parameters) == (
            measured.backward,
            measured.active_parameters,
        )


@pytest.mark.parametrize("model", PAPER_MODELS)
def test_closed_form_is_fvcores_count_for_every_preset(model):
    built = build_backbone(model, "S", depth=2)
    for grid in ((7, 13), (24, 24)):
        assert fvcore_macs(built, grid=grid) == count_macs(built, grid=grid).total


@pytest.mark.parametrize("preset", [p for p in list_presets() if "-S/" in p])
def test_backward_agrees_with_autograd_on_the_meta_device(preset):
    model = on_meta(build_backbone, preset, depth=2)
    for grid in GRIDS[1:]:
        counted = count_macs(model, grid=grid)
        ran = measure_macs(model, grid=grid, run_backward=True)
        assert counted.backward == pytest.approx(ran.backward, rel=0.01)
        assert counted.training_step == counted.total + counted.backward
        # Each product twice, but no gradient of the input.
        assert counted.backward == pytest.approx(2 * counted.total, rel=0.01)


def test_parts_and_blocks_add_up():
    model = on_meta(build_backbone, "DyDi-LiT-S/2")
    counted = count_macs(model, resolution=256)
    assert set(counted.parts) == {
        "projections", "core", "routing", "conv", "feed-forward", "modulation", "embedding",
        "final",
    }  # fmt: skip
    assert sum(counted.parts.values()) == counted.total
    assert sum(sum(parts.values()) for parts in counted.blocks.values()) == counted.total
    assert len([name for name in counted.blocks if name.startswith("blocks.")]) == 9
    # Section 4d^2 n + 2d^2 n of one block, written out.
    assert counted.blocks["blocks.8"]["projections"] == 6 * 384**2 * 256
    assert counted.grid == (16, 16) and counted.convention == "full"
    # Two of three projectors of Q' and of K' do not act on a token.
    assert counted.parameters - counted.active_parameters == 9 * 2 * 2 * 384**2
    assert counted.parameters == sum(p.numel() for p in model.parameters())


def test_a_linear_scan_counts_as_its_recurrence():
    query, key, value = (torch.rand(1, 2, 6, width) for width in (3, 3, 5))
    gate = -torch.rand(1, 2, 6, 3)
    expected = 2 * gated.gated_linear_attention_macs(6, 3, 5)
    with FlopCounterMode(display=False) as counter:
        recurrence(query, key, value, gate)
    assert counter.get_total_flops() // 2 == expected
    before = gated.gated_linear_attention(query, key, value, gate)
    for impl in ("auto", "torch", "reference"):
        with gated.counted_as_recurrence(), FlopCounterMode(display=False) as counter:
            gated.gated_linear_attention(query, key, value, gate, impl)
        assert counter.get_total_flops() // 2 == expected
    assert torch.equal(gated.gated_linear_attention(query, key, value, gate), before)


def test_einsum_is_counted_to_the_last_product(register):
    class Einsum(HalfSoftmax):
        def forward(self, x, grid):
            weights = torch.einsum("b n d, ...md -> bnm", x, x[0])
            return super().forward(torch.einsum("bnm,bmd->bnd", weights, x), grid)

    register("einsum")(Einsum)
    layer = build_attention("einsum", 8)
    assert fvcore_macs(layer, grid=(4, 4)) == sum(TRUE_PARTS.values()) + TRUE_PARTS["core"]
    assert count_macs(layer, grid=(4, 4)).total == fvcore_macs(layer, grid=(4, 4))


class HalfSoftmax(Attention):
    """A user's mechanism without closed form: each token's mixture, projected."""

    def __init__(self, context, config):
        super().__init__(context, config)
        self.value = nn.Linear(self.dim, self.dim)
        self.router = nn.Linear(self.dim, 3, bias=False)
        self.conv = nn.Conv1d(self.dim, self.dim, 3, padding=1, groups=self.dim)

    def forward(self, x, grid):
        weights = (x @ x.transpose(1, 2)).softmax(-1)
        out = weights @ self.value(x) * self.router(x).amax(-1, keepdim=True)
        return self.conv(out.transpose(1, 2)).transpose(1, 2)


TRUE_PARTS = {
    "projections": 16 * 8 * 8,
    "core": 2 * 16 * 16 * 8,
    "routing": 16 * 8 * 3,
    "conv": 16 * 8 * 3,
}


def test_a_mechanism_without_closed_form_is_measured(register):
    register("half-softmax")(HalfSoftmax)
    counted = count_macs(build_attention("half-softmax", 8), grid=(4, 4))
    assert counted.parts == TRUE_PARTS
    assert counted.measured == ("half-softmax",)
    model = DiT("half-softmax", dim=8, depth=2, num_classes=3)
    counted = count_macs(model, resolution=64)
    assert counted.measured == ("half-softmax",)
    assert counted.parts["core"] == 2 * TRUE_PARTS["core"]
    assert counted.total == fvcore_macs(model, resolution=64)


@pytest.mark.parametrize("look", [Tensor.item, Tensor.numpy], ids=["item", "numpy"])
def test_a_mechanism_that_looks_at_numbers_is_measured_on_cpu(look, register):
    class Looks(HalfSoftmax):
        def forward(self, x, grid):
            return super().forward(x, grid) if look(x.detach().sum()) == 0 else x

    register("looks")(Looks)
    layer = build_attention("looks", 8)
    assert count_macs(layer, grid=(4, 4)).parts == TRUE_PARTS
    with pytest.raises(ValueError, match="build it on CPU"):
        count_macs(layer.to("meta"), grid=(4, 4))


@pytest.mark.parametrize(
    "stated", [7, {"core": 7.0}, {"core": True}, {"core": -7}, {"core": None}]
)
def test_a_closed_form_that_is_no_dict_of_integers_is_refused(stated, register):
    class Wrong(HalfSoftmax):
        def macs_parts(self, grid):
            return stated

    register("wrong")(Wrong)
    layer = build_attention("wrong", 8)
    for ask in (
        lambda: layer.macs((4, 4)),
        lambda: count_macs(layer, grid=(4, 4)),
        lambda: show.cost("wrong"),
    ):
        with pytest.raises(InvalidType, match="macs_parts of 'wrong' must be a dict of integers"):
            ask()


@pytest.mark.parametrize("part", TRUE_PARTS)
def test_a_wrong_closed_form_is_refused(part, register):
    class Wrong(HalfSoftmax):
        def macs_parts(self, grid):
            return TRUE_PARTS | {part: TRUE_PARTS[part] + 1}

    register("wrong")(Wrong)
    for model, where in (
        (build_attention("wrong", 8), "attention"),
        (DiT("wrong", dim=8, depth=2, num_classes=3), "blocks.0"),
    ):
        with pytest.raises(ValueError, match="closed form of 'wrong'") as error:
            count_macs(model, grid=(4, 4))
        for told in (where, repr(part), str(TRUE_PARTS[part]), str(TRUE_PARTS[part] + 1)):
            assert told in str(error.value), told


def test_a_closed_form_that_is_wrong_in_one_block_is_refused(register):
    class LastIsWrong(HalfSoftmax):
        def macs_parts(self, grid):
            return TRUE_PARTS | {"core": TRUE_PARTS["core"] + self.context.layer_index // 2}

    register("last-is-wrong")(LastIsWrong)
    with pytest.raises(ValueError, match=r"wrong in blocks.2: its part 'core'"):
        count_macs(DiT("last-is-wrong", dim=8, depth=3, num_classes=3), grid=(4, 4))


def test_layers_that_differ_by_position_are_each_measured(register):
    class Alternating(HalfSoftmax):
        def __init__(self, context, config):
            super().__init__(context, config)
            self.is_mixing = context.layer_index % 2 == 0

        def forward(self, x, grid):
            return super().forward(x, grid) if self.is_mixing else x

        def macs_parts(self, grid):
            return TRUE_PARTS

    register("alternating")(Alternating)
    with pytest.raises(ValueError, match=r"wrong in blocks.1"):
        count_macs(DiT("alternating", dim=8, depth=3, num_classes=3), grid=(4, 4))


def test_a_part_under_the_wrong_name_is_refused(register):
    class Renamed(HalfSoftmax):
        def macs_parts(self, grid):
            return {"core": sum(TRUE_PARTS.values())}

    register("renamed")(Renamed)
    with pytest.raises(ValueError, match="products with a parameter as projections"):
        count_macs(build_attention("renamed", 8), grid=(4, 4))
    Renamed.macs_parts = lambda self, grid: {"mixing": 1, **TRUE_PARTS}
    with pytest.raises(ValueError, match=r"form of 'renamed' is wrong in attention: .*'mixing'"):
        count_macs(build_attention("renamed", 8), grid=(4, 4))
    with pytest.raises(ValueError, match="form of 'renamed' is wrong in attention"):
        testing.check_macs("renamed")


def test_a_wrong_backbone_is_refused(monkeypatch):
    model = on_meta(build_backbone, "softmax", "tiny")
    monkeypatch.setattr(type(model.blocks[0].feedforward), "macs", lambda self, grid: 7)
    with pytest.raises(ValueError, match=r"the backbone is wrong in blocks.0.*'feed-forward'"):
        count_macs(model, resolution=256)


def test_the_model_is_left_as_it_was():
    model = build_backbone("dydila", "tiny").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.enable_gradient_checkpointing()
    counted = count_macs(model, resolution=64)
    fvcore_macs(model, resolution=64)
    assert model.training and model.gradient_checkpointing
    assert all(not module._forward_hooks for module in model.modules())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert counted.total == count_macs(model.to(torch.bfloat16), resolution=64).total


def test_an_auxiliary_loss_left_by_a_forward_does_not_disturb():
    layer = build_attention("dydila", 48, balance_coefficient=0.1).train()
    layer(torch.randn(1, 16, 48), (4, 4))
    assert layer.auxiliary_loss is not None
    assert count_macs(layer, grid=(4, 4)).total == layer.macs((4, 4))


# Prints seconds of CPU and bytes of the peak: kilobytes of the kernel, on macOS bytes.
ALL_PRESETS = """
import resource, sys, time
import torch
from attnzoo.counting import count_macs
from backbones import build_backbone, list_presets

start = time.process_time()
for preset in list_presets():
    with torch.device("meta"):
        model = build_backbone(preset, resolution=4096)
    assert count_macs(model, resolution=4096).grid == (256, 256)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(time.process_time() - start, peak * (1 if sys.platform == "darwin" else 1024))
"""


def test_all_presets_at_4096_pixels_are_quick_and_small():
    # In a process of its own: the peak is the process's, of all that it ran before.
    done = subprocess.run(
        [sys.executable, "-c", ALL_PRESETS], capture_output=True, text=True, check=True
    )
    seconds, peak = map(float, done.stdout.split())
    assert seconds < 10
    assert peak < 2 * 2**30


def test_bad_arguments_name_the_value_and_the_remedy():
    layer = build_attention("softmax", 48)
    model = on_meta(build_backbone, "softmax", "tiny")
    for call, kind, message in (
        (lambda: count_macs(layer, resolution=256), InvalidType, r"pass grid=\(height, width\)"),
        (lambda: count_macs(layer), InvalidValue, "either grid"),
        (
            lambda: count_macs(model, resolution=256, grid=(4, 4)),
            InvalidValue,
            "either resolution",
        ),
        (lambda: count_macs(model, resolution=250), InvalidValue, "nearest that does is 248x248"),
        (lambda: count_macs(model, resolution=248), InvalidValue, "patches of 2x2"),
        (lambda: count_macs(model, grid=(0, 4)), InvalidValue, "both positive"),
        (lambda: count_macs(model, grid=4), InvalidValue, "both positive"),
        *(
            (lambda count=count, grid=grid: count(grid), InvalidValue, "both positive")
            for count in (layer.macs, lambda grid: layer.bytes_crossed(grid, torch.float32))
            for grid in ((-1, 4), (0, 4), (2.0, 3), (True, 4), (4,), 4, None)
        ),
        (
            lambda: count_macs(model, resolution=256, convention="papr"),
            InvalidValue,
            "did you mean 'paper'",
        ),
        *(
            (lambda count=count, subject=subject: count(subject, (16, 16)), InvalidType, said)
            for count in (count_macs, measure_macs, fvcore_macs)
            for subject, said in (
                (layer, r"say what \(16, 16\) is: grid=\(height, width\) in tokens$"),
                (model, r"say what \(16, 16\) is: resolution=.* in image pixels, or grid="),
            )
        ),
        (
            lambda: count_macs(nn.Linear(2, 2), resolution=256),
            InvalidType,
            "cannot count a Linear",
        ),
        (lambda: fvcore_macs(model, resolution=256), InvalidValue, "build it on CPU"),
    ):
        with pytest.raises(kind, match=message):
            call()


def test_the_resolution_may_be_oblong_and_of_pixels():
    model = on_meta(build_backbone, "sana", "tiny")
    assert count_macs(model, resolution=(256, 128)).grid == (16, 8)
    pixels = on_meta(build_backbone, "sana", "tiny", resolution=32, latent_factor=1)
    assert count_macs(pixels, resolution=32).grid == (16, 16)


def test_paper_convention_keeps_to_what_the_paper_prints():
    model = on_meta(build_backbone, "DyDi-LiT-S/2")
    paper = count_macs(model, resolution=256, convention="paper")
    assert paper.parts["routing"] == 0 and paper.backward is None
    assert paper.training_step is None
    assert paper.parts["norm"] == (9 * 2 + 1) * 2 * 256 * 384
    with pytest.raises(InvalidValue, match="prints no figure for 'half'"):
        layer = build_attention("softmax", 48)
        layer.name = "half"
        count_macs(layer, grid=(4, 4), convention="paper")


@pytest.mark.parametrize("name", PAPER_RULES)
def test_paper_rules_name_parts_and_reasons(name):
    assert name in {row.attn for row in PAPER_MODELS.values()}
    for rule in PAPER_RULES[name]:
        assert rule.part in ("projections", "core", "routing", "conv", "norm") and rule.why


def test_macs_are_frozen():
    counted = count_macs(build_attention("softmax", 48), grid=(4, 4))
    with pytest.raises(dataclasses.FrozenInstanceError):
        counted.total = 1


def test_an_implementation_that_this_device_lacks_is_counted():
    libraries = {"softmax": ("flash", "xformers"), "gated": ("fla",), "dis": ("mamba",)}
    for name, impls in libraries.items():
        for impl in impls:
            layer = build_attention(name, 48, impl=impl)
            assert count_macs(layer, grid=(4, 4)).total == layer.macs((4, 4))


@pytest.mark.parametrize("name", ["dydila", "gated", "sana"])
def test_quantized_weights_are_not_counted(name):
    """Of some there was an AttributeError, of gated a number without its projections."""
    layer = build_attention(name, 32)
    torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, inplace=True)
    for count in (
        lambda: layer.macs((4, 4)),
        lambda: count_macs(layer, grid=(4, 4)),
        lambda: layer.bytes_crossed((4, 4), torch.float32),
    ):
        with pytest.raises(InvalidType, match="quantized Linear"):
            count()
