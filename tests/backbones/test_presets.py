"""Presets: the paper's models, the controlled and the matched comparison, and their names."""

import functools

import pytest
import torch
from torch import nn

from attnzoo import (
    Attention,
    InvalidValue,
    UsageError,
    list_attention,
    register_attention,
    registry,
)
from attnzoo.counting import count_macs
from backbones import build_backbone, list_presets
from backbones.__main__ import main
from backbones.presets import PAPER_MODELS, SIZES, preset_table


def build(*args, **kwargs):
    with torch.device("meta"):
        return build_backbone(*args, **kwargs)


# From section 12.2 of the fact sheet on the paper's figures, written out again.
@pytest.mark.parametrize(
    ("name", "attn", "dim", "depth", "feedforward", "num_heads", "options"),
    [
        ("DiT-L/2", "softmax", 768, 12, "mlp", None, {}),
        ("DiG-S/2", "dig", 384, 15, "swiglu", None, {}),
        ("DiG-B/2", "dig", 512, 14, "swiglu", None, {}),
        ("PixArt-Sigma-B/2", "compressed", 512, 12, "mlp", None, {"ratio": 4}),
        ("EDiT-S/2", "edit", 384, 9, "mlp", 1, {}),
        ("Sana-L/2", "sana", 768, 9, "mix-ffn", 1, {}),
        ("DyDi-LiT-S/2", "dydila", 384, 9, "mix-ffn", 1, {"n_projectors": 3}),
        ("DyDi-LiT-L/2", "dydila", 768, 9, "mix-ffn", 1, {"n_kernel_factors": 21}),
        ("DyDi-LiT-map-S/2", "dydila-map", 384, 9, "mix-ffn", 1, {"n_projectors": 3}),
        ("MoH-DiT-S/2", "moh", 384, 12, "mlp", None, {}),
        ("LiT-S/2", "lit", 384, 12, "mlp", None, {}),
    ],
)
def test_the_papers_models(name, attn, dim, depth, feedforward, num_heads, options):
    config = build(name).config
    assert (config.attn, config.dim, config.depth) == (attn, dim, depth)
    assert (config.feedforward, config.num_heads) == (feedforward, num_heads)
    assert options.items() <= config.attn_options.items()
    assert config.provenance["protocol"] == "paper" and config.provenance["source"]


def test_half_of_pixart_sigmas_blocks_compress():
    blocks = build("PixArt-Sigma-S/2").blocks
    assert sum(block.attention.compress is not None for block in blocks) == 6


@pytest.mark.parametrize("name", list_presets())
def test_a_name_and_its_mechanism_give_the_same_model(name):
    model = name.rsplit("-", 1)[0]
    by_name, by_mechanism = build(name), build(PAPER_MODELS[model].attn, name[-3])
    assert dict(by_name.config) == dict(by_mechanism.config)


@pytest.mark.parametrize("size", ["tiny", "L"])
def test_controlled_models_differ_in_attention_only(size):
    fields = ("dim", "depth", "num_heads", "feedforward", "feedforward_ratio", "position")
    seen = set()
    for name in list_attention():
        config = build(name, size, "controlled").config
        seen.add(tuple(config[field] for field in fields))
    assert len(seen) == 1


@functools.cache
def macs(model, size, resolution, **overrides):
    return count_macs(build(model, size, **overrides), resolution=resolution).total


# PixArt-Sigma's blocks cost differently, so that its first guess at 1024 pixels is too shallow.
@pytest.mark.parametrize(
    ("model", "size", "resolution"),
    [*((model, "S", 256) for model in PAPER_MODELS), ("PixArt-Sigma", "L", 1024)],
)
def test_matched_depth_is_the_nearest(model, size, resolution):
    matched = build(model, size, "matched", resolution)
    match = matched.config.provenance["match"]
    target = macs("DiT", size, resolution)
    assert match["dit_macs"] == target
    assert match["macs"] == count_macs(matched, resolution=resolution).total
    assert match["residual"] == pytest.approx(match["macs"] / target - 1)
    for other in (-1, 1):
        neighbor = macs(model, size, resolution, depth=matched.config.depth + other)
        assert abs(neighbor - target) >= abs(match["macs"] - target)


@pytest.mark.parametrize("size", ["S", "B", "L"])
def test_dydila_matches_dit_at_eight_blocks(size):
    assert build("dydila", size, "matched").config.depth == 8
    assert build("softmax", size, "matched").config.depth == SIZES[size].depth
    assert build("softmax", size, "matched").config.provenance["match"]["residual"] == 0


def test_matching_follows_the_resolution():
    at_256 = build("sana", "L", "matched").config
    at_1024 = build("sana", "L", "matched", resolution=1024).config
    assert at_1024.provenance["match"]["resolution"] == 1024
    assert at_1024.depth > at_256.depth


def test_overrides_win_and_are_recorded():
    config = build(
        "DyDi-LiT-S/2", protocol="matched", depth=3, attn_options={"n_projectors": 2}
    ).config
    assert config.depth == 3 and "match" not in config.provenance
    assert config.attn_options["n_projectors"] == 2
    assert config.attn_options["n_kernel_factors"] == 9
    assert config.provenance["overridden"] == ["attn_options", "depth"]


def test_wrong_names_suggest_the_right_ones():
    for arguments, message in (
        (("DyDiLiT-S/2",), "did you mean 'DyDi-LiT'"),
        (("DyDi-LiT-M/2",), "unknown size 'M'"),
        (("dydilla",), "did you mean 'dydila'"),
        (("sana", "S", "machted"), "did you mean 'matched'"),
    ):
        with pytest.raises(ValueError, match=message):
            build(*arguments)


def test_the_table_lists_every_model(monkeypatch, capsys):
    table = preset_table()
    assert all(model in table for model in PAPER_MODELS)
    assert "15/14/15" in table and "n_projectors=3/5/7" in table
    monkeypatch.setattr("sys.argv", ["backbones"])
    main()
    assert capsys.readouterr().out.strip() == table.strip()
    assert len(list_presets()) == 3 * len(PAPER_MODELS)


def test_a_mechanism_of_your_own_is_matched_by_what_it_costs(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

    class Values(Attention):
        def __init__(self, context, config):
            super().__init__(context, config)
            self.value = nn.Linear(self.dim, self.dim)

        def forward(self, x, grid):
            return self.value(x) * x.mean().item()

    register_attention("values")(Values)
    torch.manual_seed(0)
    model = build_backbone("values", "tiny", "matched", 64)
    match = model.config.provenance["match"]
    assert match["macs"] == count_macs(model, resolution=64).total
    torch.manual_seed(0)
    again = build_backbone("values", "tiny", resolution=64, depth=model.config.depth)
    weights = (z.blocks[0].attention.value.weight for z in (model, again))
    assert torch.equal(*weights)  # the search takes nothing of the seed

    monkeypatch.setattr(Values, "macs_parts", lambda self, grid: {"projections": 1})
    with pytest.raises(InvalidValue, match="closed form of 'values' is wrong"):
        build_backbone("values", "tiny", "matched", 64)
    monkeypatch.delattr(Values, "macs_parts")
    monkeypatch.setattr(Values, "forward", lambda self, x, grid: x @ x)
    with pytest.raises(RuntimeError) as caught:
        build_backbone("values", "tiny", "matched", 64)
    assert not isinstance(caught.value, UsageError), "a bug shows its traceback"
