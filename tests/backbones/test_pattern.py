"""Mixtures of mechanisms over depth: how a pattern is read, and what is built from it."""

from typing import Any

import pytest
import torch

import attnzoo
from attnzoo import registry
from attnzoo.counting import count_macs
from attnzoo.mechanisms.agent import agents
from backbones import DiT, build_backbone, compile_blocks, parse_pattern
from backbones.__main__ import block_table
from backbones.pattern import dotted, file_name, nested

TINY = {"size": "tiny", "protocol": "controlled", "resolution": 32, "latent_factor": 1}
MIXED = "sana*3+softmax"


def mixture(attn=MIXED, depth=6, **options):
    torch.manual_seed(0)
    model = build_backbone(attn, dim=16, depth=depth, num_heads=2, in_channels=1, num_classes=3,
                           attn_options=options, **TINY)  # fmt: skip
    with torch.no_grad():  # zeroed gates would make every block the identity
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model.eval()


def inputs(batch=2, side=8):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 1, side, side, generator=generator)
    return images, torch.arange(batch) * 100 + 7, torch.arange(batch) % 3


def layers_of(model) -> Any:
    return [block.attention for block in model.blocks]


def names_of(model):
    return [layer.name for layer in layers_of(model)]


@pytest.mark.parametrize(
    ("text", "canonical", "blocks"),
    [
        ("sana", "sana", ["sana"] * 6),
        ("sana*3+softmax", "sana*3+softmax", ["sana"] * 3 + ["softmax"] + ["sana"] * 2),
        ("sana+sana*1+sana+softmax", "sana*3+softmax", ["sana"] * 3 + ["softmax"] + ["sana"] * 2),
        ("lit+sana*02", "lit+sana*2", ["lit", "sana", "sana"] * 2),
        ("lit+sana+lit", "lit+sana+lit", ["lit", "sana", "lit"] * 2),
    ],
)
def test_a_pattern_repeats_over_the_blocks(text, canonical, blocks):
    pattern = parse_pattern(text)
    assert pattern.text == canonical and parse_pattern(canonical) == pattern
    assert [pattern.name_of(index) for index in range(6)] == blocks
    model = mixture(text)
    assert names_of(model) == blocks and model.config.attn == canonical
    assert [b.attention.context.layer_index for b in model.blocks] == list(range(6))
    assert {b.attention.context.depth for b in model.blocks} == {6}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sana*0+softmax", "'sana*0' in 'sana*0+softmax' needs a count from 1"),
        ("sana*", "'sana*' in 'sana*' needs a count"),
        ("sana*x+softmax", "needs a count"),
        ("sana*-1+softmax", "needs a count"),
        ("sana*2*3+softmax", "needs a count"),
        ("sana*²+softmax", "needs a count"),
        (f"sana*{'9' * 5000}+softmax", "needs a count"),
        ("+softmax", "lacks a mechanism"),
        ("sana++softmax", "lacks a mechanism"),
        ("sana*3+", "lacks a mechanism"),
        ("*3", "lacks a mechanism"),
        ("sana * 3 + softmax", "holds white space"),
        ("sana*3+softmax\n", "holds white space"),
        ("sana*3", "has one mechanism, which every block gets anyway: write 'sana'"),
        (
            "sana*3+softmxa",
            r"block 3 of 'sana*3+softmxa': unknown attention 'softmxa'; did you mean 'softmax'?",
        ),
        ("sana*6+softmax", "has its first 'softmax' in block 6, which a model of depth=6"),
    ],
)
def test_a_bad_pattern_is_one_line(text, message):
    with pytest.raises(attnzoo.InvalidValue) as caught:
        mixture(text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qk_norm": True}, "--set sana.qk_norm=...; got qk_norm=True"),
        ({"gate": "head"}, "as {'softmax': {'gate': ...}} or --set softmax.gate=...; got gate="),
        ({"sana.qk_norm": True}, "as {'sana': {'qk_norm': ...}} or --set sana.qk_norm=...; got"),
        ({"lit.eps": 1}, "has no 'lit', for which options are given"),
        ({"sana": None}, "options of 'sana' in 'sana*3+softmax' are a dict, as {'sana': {}}, got"),
        ({"softmax": {"num_heads": 2}}, "block 3 of 'sana*3+softmax': num_heads=2 stands among"),
        ({"dydila": {"conv": "none"}}, "has no 'dydila', for which options are given"),
        ({"sofmax": {}}, "did you mean 'softmax'"),
        ({"sana": {"qk_nrom": True}}, "block 0 of 'sana*3+softmax': 'sana' has no option"),
        ({"softmax": {"impl": "flsh"}}, "block 3 of 'sana*3+softmax': impl='flsh'"),
    ],
)
def test_options_that_do_not_fit_are_one_line(options, message):
    with pytest.raises(attnzoo.UsageError) as caught:
        mixture(**options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_single_mechanism_keeps_its_flat_options():
    model = build_backbone("sana", attn_options={"qk_norm": True}, **TINY)
    assert model.config.attn_options == {"qk_norm": True}
    with pytest.raises(attnzoo.InvalidType, match=r"'sana' is no mixture: its options stand"):
        build_backbone("sana", attn_options={"sana": {"qk_norm": True}}, **TINY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 2}, "num_heads=2 stands among the options of 'sana': give it beside them"),
        ({"dim": 2}, "dim=2 stands among the options of 'sana'"),
        ({"depth": 2}, "depth=2 stands among the options of 'sana'"),
        ({"layer_index": 2}, "'sana' has no option 'layer_index'"),
        ({"name": 2}, "'sana' has no option 'name'"),
        ({3: 2}, "'sana' has no option 3"),
        (0, "attn_options must be dict or NoneType, got 0"),
        (False, "attn_options must be dict or NoneType, got False"),
        ([], "attn_options must be dict or NoneType, got []"),
    ],
)
@pytest.mark.parametrize("build", [DiT, build_backbone])
def test_what_is_no_option_is_one_line(build, options, message):
    with pytest.raises(attnzoo.InvalidType) as caught:
        build("sana", attn_options=options)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_each_mechanism_has_its_own_options_and_heads():
    model = mixture(sana={"qk_norm": True})
    assert [getattr(b.attention.config, "qk_norm", None) for b in model.blocks] == (
        [True] * 3 + [False] + [True] * 2
    )
    other = DiT(MIXED, dim=16, depth=4, num_heads={"softmax": 4})
    assert [b.attention.num_heads for b in other.blocks] == [1, 1, 1, 4]
    with pytest.raises(attnzoo.InvalidValue, match="num_heads names 'lit'"):
        DiT(MIXED, dim=16, depth=4, num_heads={"lit": 4})


def test_the_papers_protocol_gives_each_its_models_heads_and_options():
    with torch.device("meta"):
        model = build_backbone("dydila*3+compressed", "B")
    of_dydila, of_compressed = (layers_of(model)[index] for index in (0, 3))
    assert len(model.blocks) == 9 and model.config.feedforward == "mix-ffn"  # DyDi-LiT's
    assert (of_dydila.num_heads, of_compressed.num_heads) == (1, 8)
    assert of_dydila.config.n_projectors == 5 and of_compressed.config.ratio == 4
    assert "depth and feed-forward of dydila's model" in model.config.provenance["source"]
    with torch.device("meta"):
        matched = build_backbone(MIXED, "S", "matched")
    match = matched.config.provenance["match"]
    assert match["macs"] == count_macs(matched, resolution=256).total
    assert abs(match["residual"]) < 0.06


def test_it_is_saved_and_loaded(tmp_path):
    model = mixture("dydila*2+softmax", dydila={"conv": "none"})
    model.save_pretrained(tmp_path)
    again = DiT.from_pretrained(tmp_path, attn="dydila+dydila+softmax")
    assert again.config.attn == "dydila*2+softmax" and names_of(again) == names_of(model)
    torch.testing.assert_close(again.eval()(*inputs()).sample, model(*inputs()).sample)
    with pytest.raises(attnzoo.InvalidValue, match=r"holds the weights of attention 'dydila\*2"):
        DiT.from_pretrained(tmp_path, attn="dydila*3+softmax")
    with pytest.raises(attnzoo.InvalidValue, match="these are the weights of attention"):
        mixture("softmax+dydila").load_state_dict(model.state_dict())


def test_fusing_changes_the_options_of_the_one_that_is_fused(tmp_path):
    model = mixture("dydila+softmax", depth=2)
    before = model(*inputs()).sample
    model.fuse()
    assert model.config.attn_options.keys() == {"dydila", "softmax"}
    torch.testing.assert_close(model(*inputs()).sample, before, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = DiT.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(*inputs()).sample, before, rtol=1e-4, atol=1e-5)


def test_costs_are_sums_over_the_blocks():
    macs = count_macs(mixture(), grid=(2, 2))
    alone = {name: count_macs(mixture(name), grid=(2, 2)) for name in ("sana", "softmax")}
    for index, name in enumerate(names_of(mixture())):
        assert macs.blocks[f"blocks.{index}"] == alone[name].blocks[f"blocks.{index}"]
    assert macs.total == sum(sum(parts.values()) for parts in macs.blocks.values())
    table = block_table(MIXED, "tiny", "paper", 256)
    assert "blocks.2  " in table and table.splitlines()[7].split()[:2] == ["blocks.3", "softmax"]
    with torch.device("meta"):
        total = count_macs(build_backbone(MIXED, "tiny"), resolution=256).total
    assert table.split()[-1] == f"{total / 1e6:.2f}"


@pytest.mark.parametrize("stream", [3, 64])
def test_streaming_gives_the_same(stream):
    whole, streamed = mixture("dydila+gated+softmax"), mixture(
        "dydila+gated+softmax", dydila={"stream": stream}, gated={"stream": stream}
    )  # fmt: skip
    streamed.load_state_dict(whole.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(
            streamed(*inputs()).sample, whole(*inputs()).sample, rtol=1e-4, atol=1e-5
        )


def test_agents_are_set_in_the_blocks_that_have_them():
    model = mixture("agent*2+sana", agent={"n_agents": 4})
    before = model(*inputs(side=32)).sample
    with agents(model, 16):
        assert [getattr(b.attention, "n_agents", None) for b in model.blocks] == (
            [16, 16, None] * 2
        )
        assert not torch.allclose(model(*inputs(side=32)).sample, before)
    torch.testing.assert_close(model(*inputs(side=32)).sample, before)


def test_gradients_and_auxiliary_losses_of_a_checkpointed_mixture():
    def gradients(is_checkpointed):
        model = mixture("moh+sana", depth=2).train()
        if is_checkpointed:
            model.enable_gradient_checkpointing()
        loss = model(*inputs()).sample.square().mean() + attnzoo.auxiliary_loss(model)
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    torch.testing.assert_close(gradients(True), gradients(False))


def test_compiled_blocks_give_the_same():
    model = mixture(depth=4)
    with torch.no_grad():
        plain = model(*inputs()).sample
        compile_blocks(model, backend="aot_eager")
        torch.testing.assert_close(model(*inputs()).sample, plain, rtol=1e-4, atol=1e-5)


class Mean(attnzoo.Attention):
    def forward(self, x, grid):
        self.check_tokens(x, grid)
        return x.mean(1, keepdim=True).expand_as(x)


@pytest.fixture
def own(monkeypatch):
    """Registers a mechanism under any name that is free."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    return lambda name: attnzoo.register_attention(name)(type("Own", (Mean,), {}))


def test_a_mechanism_of_ones_own_is_part_of_a_pattern(own):
    own("odd_name-2.0")
    assert names_of(mixture("odd_name-2.0*2+sana")) == (["odd_name-2.0"] * 2 + ["sana"]) * 2


def test_a_mechanism_comes_before_a_model_of_its_name(own):
    own("DiT")
    assert names_of(mixture("DiT", depth=2)) == ["DiT"] * 2
    assert names_of(build_backbone("DiT-S/2", resolution=64))[:1] == ["softmax"]


def test_options_are_nested_by_their_dots():
    flat = {"sana.qk_norm": True, "sana.eps": 1e-6, "softmax.impl": "torch"}
    assert nested(flat) == {"sana": {"qk_norm": True, "eps": 1e-6}, "softmax": {"impl": "torch"}}
    assert dotted(nested(flat)) == flat and nested({"eps": 1}) == {"eps": 1}
    with pytest.raises(attnzoo.InvalidValue, match="exclude each other"):
        nested({"sana": 1, "sana.eps": 2})


def test_a_files_name_holds_nothing_that_a_shell_expands():
    assert file_name("sana*3+softmax") == "sana-3-softmax"
    assert file_name("DyDi-LiT-S/2") == "DyDi-LiT-S-2"
