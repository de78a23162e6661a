"""The shared backbone: shapes, initialization, saving, refusals."""

import copy
import dataclasses
import enum
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.sana_transformer import GLUMBConv

import attnzoo
from attnzoo import InvalidType, InvalidValue, UsageError, list_attention
from attnzoo.counting import count_macs, measure_macs
from attnzoo.ops.depthwise_conv import to_image, to_tokens
from backbones import DiT, build_backbone, parse_pattern, record
from backbones.dit import _sincos_positions
from backbones.feedforward import build_feedforward
from tests.backbones.weights import scrambled

TINY = {"dim": 32, "depth": 2, "num_classes": 10, "in_channels": 3}


def inputs(height=8, width=12, batch=2):
    torch.manual_seed(1)
    return torch.randn(batch, 3, height, width), torch.tensor([3, 999][:batch])


@pytest.mark.parametrize("attn", list_attention())
def test_every_mechanism_runs_on_a_non_square_input_with_ten_classes(attn):
    model = scrambled(DiT(attn=attn, **TINY))
    x, t = inputs()
    out = model(x, t, torch.tensor([0, 10]))
    assert out.sample.shape == x.shape
    assert out.sample.isfinite().all()
    assert torch.equal(model(x, t, torch.tensor([0, 10]), return_dict=False)[0], out.sample)


@pytest.mark.parametrize("attn", list_attention())
def test_saved_weights_come_back_with_their_config(attn, tmp_path):
    model = scrambled(DiT(attn=attn, feedforward="mix-ffn", **TINY))
    model.save_pretrained(tmp_path)
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".safetensors"}
    loaded = DiT.from_pretrained(tmp_path).eval()
    x, t = inputs()
    labels = torch.tensor([1, 2])
    assert torch.equal(model(x, t, labels).sample, loaded(x, t, labels).sample)
    assert dict(loaded.config)["attn"] == attn


def test_options_survive_saving(tmp_path):
    options = {"normalizer": "diff", "lambda_init": 0.2, "n_projectors": 2}
    DiT(attn="dydila", attn_options=options, **TINY).save_pretrained(tmp_path)
    assert DiT.from_pretrained(tmp_path).blocks[1].attention.config.n_projectors == 2


def test_weights_of_another_mechanism_are_refused_by_both_names(tmp_path):
    # dydila stripped of everything has the very shapes of sana with one head.
    lit = {"projection": "none", "kernel": "relu", "differential": "none", "conv": "none"}
    dydila = DiT(attn="dydila", attn_options=lit, num_heads=1, **TINY)
    sana = DiT(attn="sana", num_heads=1, **TINY)
    with pytest.raises(ValueError, match=r"'dydila'.*'sana'"):
        sana.load_state_dict(dydila.state_dict())
    dydila.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'dydila'.*'sana'"):
        DiT.from_pretrained(tmp_path, attn="sana")


def test_missing_weights_are_refused(tmp_path):
    DiT(attn="sana", **TINY).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="do not fit"):
        DiT.from_pretrained(tmp_path, depth=3)


def test_starts_as_zero_with_identity_blocks():
    model = DiT(attn="softmax", **TINY)
    x, t = inputs()
    assert model(x, t, torch.tensor([0, 1])).sample.abs().max() == 0
    tokens = torch.randn(2, 24, 32)
    block = model.blocks[0]
    assert torch.equal(block(tokens, torch.randn(2, 32), (4, 6)), tokens)


def test_positions_follow_the_grid():
    square, wide = (_sincos_positions(16, grid, torch.device("cpu")) for grid in ((4, 4), (4, 6)))
    for row, column in itertools.product(range(4), range(4)):
        assert torch.equal(square[row * 4 + column], wide[row * 6 + column])
    assert torch.unique(wide, dim=0).shape[0] == 24
    # A transposed grid swaps the halves that hold column and row.
    tall = _sincos_positions(16, (6, 4), torch.device("cpu"))
    swapped = tall.view(6, 4, 16).transpose(0, 1).reshape(24, 16).roll(8, dims=1)
    torch.testing.assert_close(swapped, wide)


def test_position_none_makes_softmax_blind_to_order():
    model = scrambled(DiT(attn="softmax", position="none", **TINY))
    x, t = inputs()
    flipped = model(x.flip(-1).flip(-2), t, torch.tensor([0, 1])).sample
    patches = x.unflatten(-1, (6, 2)).unflatten(-3, (4, 2))
    turned = patches.flip(-2).flip(-4).flatten(-2).flatten(-3, -2)
    torch.testing.assert_close(
        model(turned, t, torch.tensor([0, 1])).sample.unflatten(-1, (6, 2)).unflatten(-3, (4, 2)),
        model(x, t, torch.tensor([0, 1]))
        .sample.unflatten(-1, (6, 2))
        .unflatten(-3, (4, 2))
        .flip(-2)
        .flip(-4),
        rtol=1e-4,
        atol=1e-4,
    )
    assert flipped.isfinite().all()


def test_gradient_checkpointing_changes_no_gradient():
    model = scrambled(DiT(attn="dydila", attn_options={"conv": "3x3"}, **TINY)).train()
    checkpointed = copy.deepcopy(model)
    checkpointed.enable_gradient_checkpointing()
    x, t = inputs()
    for each in (model, checkpointed):
        each(x, t, torch.tensor([0, 10])).sample.square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def plain_and_checkpointed(**options):
    """A model in training, and the same with gradient checkpointing."""
    model = scrambled(DiT(**TINY | options)).train()
    checkpointed = copy.deepcopy(model)
    checkpointed.enable_gradient_checkpointing()
    return model, checkpointed


def same_buffers(model, checkpointed):
    for (name, ours), theirs in zip(model.named_buffers(), checkpointed.buffers(), strict=True):
        assert torch.equal(ours, theirs), name


def test_gradient_checkpointing_moves_statistics_once():
    model, checkpointed = plain_and_checkpointed(attn="dydila", attn_options={"conv": "acnet"})
    start = copy.deepcopy(dict(model.named_buffers()))
    x, t = inputs()
    for step in range(3):
        for each in (model, checkpointed):
            loss = each(x + step, t, torch.tensor([0, 10])).sample.square().sum()
            loss.backward(retain_graph=True)
            loss.backward()  # computes every block a third time
        same_buffers(model, checkpointed)
    moved = [name for name, z in model.named_buffers() if not torch.equal(z, start[name])]
    assert any("running_mean" in name for name in moved)
    for (name, p), q in zip(
        model.named_parameters(), checkpointed.named_parameters(), strict=True
    ):
        torch.testing.assert_close(p.grad, q[1].grad, msg=name)


@pytest.mark.parametrize("is_fullgraph", [False, True])
def test_gradient_checkpointing_moves_statistics_once_when_compiled(is_fullgraph):
    model, checkpointed = plain_and_checkpointed(
        attn="dydila", attn_options={"conv": "acnet"}, depth=1
    )
    x, t = inputs()
    if is_fullgraph:
        step = torch.compile(checkpointed, fullgraph=True, backend="aot_eager")
    else:
        for block in checkpointed.blocks:
            block.compile(backend="aot_eager")
        step = checkpointed
    model(x, t, torch.tensor([0, 10])).sample.square().sum().backward()
    step(x, t, torch.tensor([0, 10])).sample.square().sum().backward()
    for (name, ours), theirs in zip(model.named_buffers(), checkpointed.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


class Counting(attnzoo.Attention):
    """Buffers and attributes that every forward moves, and a loss that it always gives."""

    def __init__(self, context, config):
        super().__init__(context, config)
        self.register_buffer("scale", torch.ones(()))
        self.calls = 0
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, x, grid):
        self.calls += 1
        self.last = x.detach()
        self.auxiliary_loss = x.square().mean()
        self.scale.mul_(1.5)
        return self.drop(x) * self.scale


def test_a_checkpointed_backward_leaves_what_one_forward_leaves():
    attnzoo.register_attention("counting")(Counting)
    try:
        model, checkpointed = plain_and_checkpointed(attn="counting")
        x, t = inputs()
        for each in (model, checkpointed):
            torch.manual_seed(0)
            out = each(x, t, torch.tensor([0, 10])).sample
            loss = attnzoo.auxiliary_loss(each)
            assert loss is not None
            (out.square().sum() + loss).backward()
            assert attnzoo.auxiliary_loss(each) is None
            assert [block.attention.calls for block in each.blocks] == [1, 1]
            assert each.blocks[0].attention.last.grad_fn is None
        same_buffers(model, checkpointed)
        for (name, p), q in zip(model.named_parameters(), checkpointed.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, msg=name)
    finally:
        del attnzoo.registry._REGISTRY["counting"]


@pytest.mark.parametrize("attn", ["moh", "dydila"])
def test_an_auxiliary_loss_is_of_one_training_forward(attn):
    options = {"dydila": {"balance_coefficient": 0.1}}.get(attn, {})
    _, model = plain_and_checkpointed(attn=attn, attn_options=options, num_heads=4)
    x, t = inputs()
    labels = torch.tensor([0, 10])
    model(x, t, labels).sample.sum().backward()
    first = attnzoo.auxiliary_loss(model)
    assert first is not None and attnzoo.auxiliary_loss(model) is None
    model.eval()(x, t, labels)
    with torch.no_grad():
        model.train()(x, t, labels)
    assert attnzoo.auxiliary_loss(model) is None
    model(2 * x, t, labels)
    model(x, t, labels)  # replaces the loss of the first
    torch.testing.assert_close(attnzoo.auxiliary_loss(model), first)


def test_fusing_keeps_the_output_and_can_be_saved(tmp_path):
    model = scrambled(DiT(attn="dydila", **TINY)).train()
    x, t = inputs()
    for _ in range(3):  # moves the batch-norm statistics
        model(x, t, torch.tensor([0, 1]))
    model.eval()
    before = model(x, t, torch.tensor([0, 1])).sample
    model.fuse().save_pretrained(tmp_path)
    torch.testing.assert_close(
        model(x, t, torch.tensor([0, 1])).sample, before, rtol=1e-5, atol=1e-5
    )
    loaded = DiT.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(
        loaded(x, t, torch.tensor([0, 1])).sample, before, rtol=1e-5, atol=1e-5
    )


def test_a_config_builds_the_same_model():
    """Also of arguments that came without their names."""
    model = DiT("sana", {"qk_norm": True}, 32, 2, num_classes=10)
    other = DiT.from_config(model.config)
    assert dict(other.config) == dict(model.config)
    other.load_state_dict(model.state_dict())


def test_mix_ffn_is_sanas():
    ours = build_feedforward("mix-ffn", 16, 2.5)
    theirs = GLUMBConv(16, 16, expand_ratio=2.5, residual_connection=False)
    with torch.no_grad():
        theirs.conv_inverted.weight.copy_(ours.expand.weight[:, :, None, None])
        theirs.conv_inverted.bias.copy_(ours.expand.bias)
        theirs.conv_depth.load_state_dict(ours.conv.state_dict())
        theirs.conv_point.weight.copy_(ours.contract.weight[:, :, None, None])
    x = torch.randn(2, 35, 16)
    torch.testing.assert_close(ours(x, (5, 7)), to_tokens(theirs(to_image(x, (5, 7)))))


def test_swiglu_has_digs_widths():
    for dim, hidden in ((384, 1024), (512, 1536), (768, 2048)):
        assert build_feedforward("swiglu", dim, 4.0).contract.in_features == hidden


@pytest.mark.parametrize(
    ("call", "kind", "fragments"),
    [
        (lambda m: m(torch.zeros(1, 3, 7, 8), 0, torch.tensor([0])), ValueError, ["7x8", "8x8"]),
        (lambda m: m(torch.zeros(1, 4, 8, 8), 0, torch.tensor([0])), ValueError, ["3 channels"]),
        (lambda m: m(torch.zeros(1, 3, 8, 8), 0, torch.tensor([11])), ValueError, ["10", "11"]),
        (lambda m: m(torch.zeros(1, 3, 8, 8), 0, torch.tensor([-1])), ValueError, ["-1"]),
        (lambda m: m(torch.zeros(1, 3, 8, 8), 0, torch.tensor([0, 1])), ValueError, ["(2,)"]),
        (lambda m: m(torch.zeros(1, 3, 8, 8), 0, torch.tensor([0.0])), ValueError, ["float"]),
        (lambda m: m(torch.zeros(1, 3, 8, 8), -5, torch.tensor([0])), ValueError, ["-5"]),
        (
            lambda m: m(torch.zeros(1, 3, 8, 8), float("nan"), torch.tensor([0])),
            ValueError,
            ["nan"],
        ),
        (lambda m: m(torch.zeros(3, 8, 8), 0, torch.tensor([0])), ValueError, ["(3, 8, 8)"]),
        (
            lambda m: m(torch.zeros(1, 3, 8, 8), torch.zeros(2), torch.tensor([0])),
            ValueError,
            ["timestep", "(2,)"],
        ),
        (lambda m: m(torch.zeros(1, 3, 8, 8), 0, [0]), TypeError, ["class_labels", "[0]"]),
        *(
            (
                lambda m, dtype=dtype: m(torch.zeros(1, 3, 8, 8), 0, torch.ones(1, dtype=dtype)),
                ValueError,
                ["class_labels", f"got {dtype}", "labels.long()"],
            )
            for dtype in (torch.uint8, torch.int8, torch.int16, torch.bool, torch.float32)
        ),
        *(
            (
                lambda m, time=time: m(torch.zeros(1, 3, 8, 8), time, torch.tensor([0])),
                kind,
                ["timestep", str(time)],
            )
            for time, kind in (
                (None, TypeError),
                ("5", TypeError),
                (1j, TypeError),
                ({}, TypeError),
                (torch.tensor(1j), TypeError),
                (float("inf"), ValueError),
            )
        ),
        (lambda m: parse_pattern(None), TypeError, ["attn", "None"]),
        (lambda m: record(m, "2"), TypeError, ["batch", "'2'"]),
        (lambda m: record(m, 2, (8, 8, 8)), TypeError, ["size", "(8, 8, 8)"]),
        (lambda m: count_macs(m, grid=(2, 2), convention=None), TypeError, ["convention"]),
        (lambda m: measure_macs(m, grid=(2, 2), device="cdu"), ValueError, ["'cdu'"]),
        (lambda m: DiT(depth=2.5), TypeError, ["depth", "2.5"]),
        (lambda m: DiT(attn_options=3), TypeError, ["attn_options", "3"]),
        (lambda m: DiT(dim=0), ValueError, ["dim", "0"]),
        (lambda m: build_backbone(attn_options=[1]), TypeError, ["attn_options"]),
        (lambda m: build_backbone(resolution="256"), TypeError, ["resolution", "'256'"]),
        (lambda m: build_backbone(latent_factor=0), ValueError, ["latent_factor=0"]),
        (lambda m: build_backbone(patch_size=0), ValueError, ["patch_size=0"]),
        (lambda m: build_backbone(3), TypeError, ["attn", "3"]),
        (lambda m: DiT(depth=0), ValueError, ["depth", "0"]),
        (lambda m: DiT(dim=30), ValueError, ["30", "multiple of 4"]),
        (lambda m: DiT(position="rope"), ValueError, ["'rope'", "sincos"]),
        (lambda m: DiT(feedforward="mlpp"), ValueError, ["'mlp'"]),
        (lambda m: build_backbone("dydlia"), ValueError, ["'dydila'"]),
        (lambda m: build_backbone("DyDiLiT-S/2"), ValueError, ["'DyDi-LiT'"]),
        (lambda m: build_backbone(size="XS"), ValueError, ["tiny, S, B, L"]),
        (lambda m: build_backbone(protocol="fair"), ValueError, ["controlled"]),
        (lambda m: build_backbone(resolution=100), ValueError, ["100", "96"]),
        (lambda m: build_backbone(depht=3), TypeError, ["'depth'"]),
        (lambda m: build_backbone(attn_options={"gama_init": 2.0}), TypeError, ["'gamma_init'"]),
    ],
)
def test_refusals_name_the_value_and_the_remedy(call, kind, fragments):
    model = DiT(attn="softmax", **TINY)
    with pytest.raises(kind) as caught:
        call(model)
    assert isinstance(caught.value, UsageError)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_an_empty_batch_passes():
    model = DiT(attn="dydila", **TINY).eval()
    out = model(torch.zeros(0, 3, 8, 8), torch.zeros(0), torch.zeros(0, dtype=torch.long))
    assert out.sample.shape == (0, 3, 8, 8)


def test_build_backbone_knows_the_papers_models():
    model = build_backbone("DyDi-LiT-S/2")
    attention = model.blocks[0].attention
    assert (len(model.blocks), attention.dim, attention.num_heads) == (9, 384, 1)
    assert attention.config.n_kernel_factors == 9
    assert sum(p.numel() for p in model.parameters()) == 38_774_978
    assert model.config.provenance["protocol"] == "paper"


def test_controlled_protocol_changes_nothing_but_the_attention():
    models = [build_backbone(a, "tiny", "controlled") for a in ("softmax", "sana", "dydila")]
    for name in ("depth", "dim", "feedforward", "num_heads", "position"):
        assert len({getattr(model.config, name) for model in models}) == 1, name


def test_a_mechanism_of_ones_own_is_at_once_in_the_backbone():
    @attnzoo.register_attention("mean-of-tokens")
    class MeanOfTokens(attnzoo.Attention):
        def forward(self, x, grid):
            self.check_tokens(x, grid)
            return x.mean(1, keepdim=True).expand_as(x)

    try:
        model = build_backbone("mean-of-tokens", "tiny", resolution=8, latent_factor=1)
        out = model(torch.randn(1, 4, 8, 8), 3, torch.tensor([5]))
        assert out.sample.shape == (1, 8, 8, 8)
    finally:
        from attnzoo import registry

        del registry._REGISTRY["mean-of-tokens"]


def test_parameters_that_a_forward_would_make_are_refused_by_name():
    class Late(attnzoo.get_attention("softmax")):
        def __init__(self, context, config):
            super().__init__(context, config)
            self.late = torch.nn.LazyLinear(self.dim)

    attnzoo.register_attention("late")(Late)
    try:
        with pytest.raises(TypeError, match=r"^blocks\.0\.attention\.late\.weight .* in __init__"):
            build_backbone("late", "tiny", resolution=8, latent_factor=1)
    finally:
        from attnzoo import registry

        del registry._REGISTRY["late"]


@pytest.fixture
def hub(tmp_path):
    """A hub's cache with a repository of two revisions, whose models are of two mechanisms."""
    repository = tmp_path / "models--somebody--dit"
    for revision, attn, digit in (("main", "softmax", "0"), ("v2", "sana", "1")):
        snapshot = repository / "snapshots" / (40 * digit)
        DiT(attn=attn, **TINY).save_pretrained(snapshot / "inner", variant="ema")
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(40 * digit)
    return tmp_path


def test_every_argument_of_the_hub_reaches_every_lookup(hub, monkeypatch):
    lookups = []
    load_config = DiT.load_config

    def recorded(*args, **kwargs):
        lookups.append(kwargs)
        return load_config(*args, **kwargs)

    monkeypatch.setattr(DiT, "load_config", recorded)
    wanted = {
        "cache_dir": hub,
        "force_download": False,
        "local_files_only": True,
        "proxies": {"https": "nowhere:1"},
        "revision": "v2",
        "subfolder": "inner",
        "token": "secret",
    }
    model = DiT.from_pretrained("somebody/dit", attn="sana", variant="ema", **wanted)
    assert model.config.attn == "sana"
    with pytest.raises(InvalidValue, match=r"'sana', not of 'softmax'"):
        DiT.from_pretrained("somebody/dit", attn="softmax", variant="ema", **wanted)
    with pytest.raises(InvalidValue, match=r"'softmax', not of 'sana'"):
        DiT.from_pretrained(
            "somebody/dit", attn="sana", variant="ema", **(wanted | {"revision": "main"})
        )
    ours = [seen for seen in lookups if "return_unused_kwargs" not in seen]
    assert [seen["revision"] for seen in ours] == ["v2", "v2", "main"]
    for seen in ours:
        assert {name: seen[name] for name in wanted} == wanted | {"revision": seen["revision"]}


@pytest.mark.parametrize(
    ("damage", "fragments"),
    [
        (lambda config: "", ["valid JSON"]),
        (lambda config: '{"attn": "so', ["valid JSON"]),
        (lambda config: "[1]", ["JSON object"]),
        (lambda config: '"text"', ["JSON object"]),
        (lambda config: json.dumps(config | {"attn": None}), ["attn=None"]),
        (lambda config: json.dumps({"_class_name": "UNet2DModel"}), ["UNet2DModel"]),
        (lambda config: json.dumps(config | {"dpeth": 3}), ["'dpeth'", "'depth'"]),
        (lambda config: json.dumps(config | {"depth": "2"}), ["depth", "'2'"]),
        (lambda config: json.dumps(config | {"depth": -1}), ["depth", "-1"]),
        (lambda config: json.dumps(config | {"depth": None}), ["depth", "None"]),
        (lambda config: json.dumps(config | {"num_heads": 2.0}), ["num_heads", "2.0"]),
        (lambda config: json.dumps(config | {"feedforward_ratio": 0.0}), ["feedforward_ratio"]),
        (lambda config: json.dumps(config | {"attn_options": [1]}), ["attn_options"]),
        (lambda config: json.dumps(config | {"attn_options": {"qk_nrom": True}}), ["'qk_norm'"]),
        (lambda config: json.dumps(config | {"attn": "sfotmax"}), ["'softmax'"]),
        (lambda config: json.dumps(config).encode() + b"\xff\xfe", ["valid JSON"]),
        (lambda config: None, ["config.json"]),
    ],
)
def test_a_damaged_config_is_named(damage, fragments, tmp_path):
    DiT(attn="softmax", **TINY).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    text = damage(json.loads(file.read_text()))
    file.unlink()
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError) as caught:
        DiT.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "missing", "empty", "other"])
def test_damaged_weights_are_named(damage, tmp_path):
    DiT(attn="softmax", **TINY).save_pretrained(tmp_path)
    [file] = tmp_path.glob("*.safetensors")
    data = file.read_bytes()
    file.unlink()
    if damage == "other":
        DiT(attn="softmax", **(TINY | {"dim": 64})).save_pretrained(tmp_path / "other")
        shutil.copy(tmp_path / "other" / file.name, file)
    elif damage != "missing":
        file.write_bytes(data[: len(data) // 2 if damage == "cut" else 0])
    with pytest.raises(UsageError, match=str(tmp_path)):
        DiT.from_pretrained(tmp_path)


def test_an_argument_that_does_not_exist_is_not_ignored(tmp_path):
    DiT(attn="softmax", **TINY).save_pretrained(tmp_path)
    with pytest.raises(InvalidType, match="'depth'"):
        DiT.from_pretrained(tmp_path, depht=2)


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (lambda x: (x, x @ x.mT), "returned a tuple"),
        (lambda x: x[:, :1], "keeps the shape"),
        (lambda x: x.double(), r"returned tokens of torch.float64.*x.dtype"),
        (lambda x: x.to("meta"), "keeps the device"),
    ],
)
@pytest.mark.parametrize("method", ["forward", "after_block"])
def test_what_returns_no_such_tokens_is_named(monkeypatch, method, result, said):
    known = attnzoo.registry._REGISTRY
    monkeypatch.setattr(attnzoo.registry, "_REGISTRY", dict(known))
    own = type("Own", (known["softmax"],), {method: lambda self, x, grid: result(x)})
    attnzoo.register_attention("own")(own)
    model = DiT(attn="own", **TINY)
    with pytest.raises((TypeError, ValueError), match=f"'own' .*{said}") as caught:
        model(*inputs(), torch.tensor([0, 1]))
    assert not isinstance(caught.value, UsageError)


def test_a_mechanism_may_return_what_is_narrower_or_narrowed_again(monkeypatch):
    known = attnzoo.registry._REGISTRY
    monkeypatch.setattr(attnzoo.registry, "_REGISTRY", dict(known))
    for dtype in (torch.float32, torch.bfloat16):
        forward = {"forward": lambda self, x, grid, dtype=dtype: x.to(dtype)}
        attnzoo.register_attention(f"own-{dtype}")(type("Own", (known["softmax"],), forward))
        with torch.autocast("cpu", torch.bfloat16):
            DiT(attn=f"own-{dtype}", **TINY)(*inputs(), torch.tensor([0, 1]))
    DiT(attn=f"own-{torch.bfloat16}", **TINY)(*inputs(), torch.tensor([0, 1]))


def test_a_bug_in_a_mechanism_is_no_mistake_of_the_user(tmp_path):
    class Broken(attnzoo.Attention):
        def forward(self, x, grid):
            return None + x

    attnzoo.register_attention("broken")(Broken)
    try:
        model = DiT(attn="broken", **TINY)
        with pytest.raises(TypeError) as caught:
            model(*inputs(), torch.tensor([0, 1]))
        assert not isinstance(caught.value, UsageError)
        model.save_pretrained(tmp_path)
        Broken.__init__ = lambda self, context, config: int("bug")
        with pytest.raises(ValueError, match="bug") as caught:
            DiT.from_pretrained(tmp_path)
        assert not isinstance(caught.value, UsageError)
    finally:
        del attnzoo.registry._REGISTRY["broken"]


def test_a_tuple_option_equals_itself_after_saving(tmp_path):
    given = {"key_position": (4, 6)}
    model = DiT(attn="focused", attn_options=given, **TINY)
    model.save_pretrained(tmp_path)
    as_list = DiT(attn="focused", attn_options={"key_position": [4, 6]}, **TINY)
    loaded = DiT.from_pretrained(tmp_path)
    for other in (as_list, loaded):
        assert other.config.attn_options == model.config.attn_options == given
        assert other.blocks[0].attention.config == model.blocks[0].attention.config


def test_an_options_member_is_saved_as_its_word(tmp_path, monkeypatch):
    monkeypatch.setattr(attnzoo.registry, "_REGISTRY", dict(attnzoo.registry._REGISTRY))
    kinds = enum.Enum("Kind", {"FAST": "fast", "PAIR": (1, 2)})  # type: ignore[misc]
    config = dataclasses.make_dataclass(
        "Config", [("kind", kinds), ("file", Path)],
        bases=(attnzoo.AttentionConfig,), frozen=True, kw_only=True,
    )  # fmt: skip
    attnzoo.register_attention("of-words")(type("OfWords", (Counting,), {"Config": config}))
    for member in kinds:
        options = {"kind": member, "file": Path("here")}
        DiT(attn="of-words", attn_options=options, **TINY).save_pretrained(tmp_path)
        loaded = DiT.from_pretrained(tmp_path)
        assert loaded.blocks[0].attention.config == config(**options)


def test_positions_are_computed_once_for_a_size_and_shared_by_no_copy(monkeypatch):
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return _sincos_positions(*arguments)

    monkeypatch.setattr("backbones.dit._sincos_positions", counted)
    model = scrambled(DiT(attn="softmax", **TINY))
    labels = torch.tensor([0, 10])
    with torch.inference_mode():
        wide = model(*inputs(), labels).sample
    out = model(*inputs(), labels).sample  # with gradients, after inference
    out.sum().backward()
    assert len(calls) == 1 and torch.equal(out, wide)
    tall = model(*inputs(12, 8), labels).sample
    assert len(calls) == 2 and tall.shape != wide.shape
    exact = copy.deepcopy(model).double()
    exact(*(z.double() for z in inputs(12, 8)), labels)
    assert len(calls) == 3
