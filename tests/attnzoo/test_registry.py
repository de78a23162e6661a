"""Names, options and contexts: what is refused, and what the refusal says."""

import copy
import dataclasses
import enum
import json
import pickle
import sys
from pathlib import Path
from typing import Any, Literal

import numpy
import pytest
import torch
from torch import nn

import attnzoo
from attnzoo import (
    Attention,
    AttentionConfig,
    AttentionContext,
    InvalidType,
    InvalidValue,
    UsageError,
    build_attention,
    get_attention,
    list_attention,
    register_attention,
    registry,
    source_of,
)
from attnzoo.contract import as_tuples, check_option
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
        (lambda: build_attention("dydila", 8, conv=3), TypeError, ["'acnet', '3x3'", "3 (int)"]),
        (lambda: build_attention("sana", 8)(torch.zeros(1, 6, 8), None), TypeError, ["grid"]),
        (lambda: build_attention("sana", 8)(torch.zeros(1, 6, 8), (6,)), TypeError, ["(6,)"]),
        (lambda: build_attention("softmax", 8)(torch.zeros(1, 6, 8), 6), TypeError, ["grid", "6"]),
        (
            lambda: type(build_attention("sana", 8))(AttentionContext(dim=8), AttentionConfig()),
            TypeError,
            ["LinearConfig"],
        ),
        (lambda: check_option("sizes", (1, 2), list[int]), TypeError, ["sizes", "tuple"]),
        (lambda: check_option("sizes", (1,), tuple[()]), TypeError, ["sizes", "0 values", "(1,)"]),
        (lambda: build_attention("edit", 8, stride=2.0), TypeError, ["[1, 2, 3]", "2.0 (float)"]),
        (lambda: build_attention("edit", 8, stride=True), TypeError, ["[1, 2, 3]", "True (bool)"]),
        (lambda: build_attention("edit", 8, stride=numpy.ones(2)), TypeError, ["[1, 2, 3]"]),
        (
            lambda: build_attention("lit", 8, qkv_bias=1),
            ValueError,
            ["qkv_bias=1", "True is left"],
        ),
        (lambda: build_attention("lit", 8, qkv_bias=numpy.ones(2)), ValueError, ["True is left"]),
        (lambda: build_attention("edit", 8, stride="2"), ValueError, ["stride='2'", "[1, 2, 3]"]),
        (lambda: build_attention("dydila", 8, n_projectors=0), ValueError, ["n_projectors", "0"]),
        (lambda: build_attention("dydila", 8, n_projectors="3"), TypeError, ["int", "'3'"]),
        (lambda: build_attention("dydila", 8, qkv_bias=1), TypeError, ["bool", "1"]),
        (lambda: build_attention("dydila", 8, eps=-1.0), ValueError, ["eps", "-1"]),
        (lambda: build_attention("softmax", 8, num_heads=3), ValueError, ["3", "[1, 2, 4, 8]"]),
        (lambda: build_attention("softmax", 8, layer_index=2, depth=2), ValueError, ["depth=2"]),
        (lambda: build_attention("softmax", "8"), TypeError, ["dim", "'8'"]),
        (lambda: build_attention("softmax", 8.0), TypeError, ["dim", "8.0"]),
        (lambda: build_attention("softmax", 0), ValueError, ["dim", "0"]),
        (lambda: build_attention("softmax", 8, num_heads="2"), TypeError, ["num_heads", "'2'"]),
        (lambda: build_attention("softmax", 8, depth=None), TypeError, ["depth", "None"]),
        (lambda: get_attention(["sana"]), TypeError, ["['sana']"]),
        (lambda: register_attention(Attention), TypeError, ["@register_attention('mine')"]),
        (lambda: register_attention(""), TypeError, ["''"]),
        (lambda: attnzoo.heads_of_width(0, 64), ValueError, ["dim", "0"]),
        (lambda: attnzoo.heads_of_width(64, 2.5), TypeError, ["head_dim", "2.5"]),
        *(
            (lambda name=name: register_attention(name), ValueError, [repr(name), repr(other)])
            for name, other in {
                "a+b": "a-b",
                "a*2": "a-2",
                "mine-S/2": "mine-S-2",
                "a:b": "a-b",
                "a b": "a-b",
                "-a": "a",
                "a,b": "a-b",
                "a=b": "a-b",
                "*": "mine",
            }.items()
        ),
        (lambda: register_attention("all")(Attention), TypeError, ["define forward"]),
        (lambda: build_attention("agent", 8).set_agents("x"), TypeError, ["int", "'x'"]),
        (lambda: build_attention("agent", 8).set_agents(4.0), TypeError, ["int", "4.0"]),
        (lambda: build_attention("agent", 8).set_agents(True), TypeError, ["int", "True"]),
        (lambda: attnzoo.import_mechanisms("~no.such.user/x.py"), ValueError, ["no.such.user"]),
        (lambda: attnzoo.import_mechanisms(3), TypeError, ["3"]),
        (lambda: attnzoo.import_mechanisms(""), ValueError, ["''"]),
        (lambda: attnzoo.import_mechanisms("."), ValueError, ["'.'"]),
        (lambda: attnzoo.import_mechanisms("a..b"), ValueError, ["'a..b'"]),
        (lambda: attnzoo.import_mechanisms("no/such.py"), ValueError, ["no/such.py"]),
        (lambda: build_attention("dydila", 8, eps=float("nan")), ValueError, ["eps", "nan"]),
        (lambda: build_attention("dydila", 8, eps=float("inf")), ValueError, ["eps", "inf"]),
        (lambda: build_attention("sana", 8, eps=-1.0), ValueError, ["eps", "-1"]),
        (lambda: build_attention("sla", 8, eps=0), ValueError, ["eps", "at least 1e-15", "0"]),
        (lambda: build_attention("sana", 8, eps=1e-300), ValueError, ["at least 1e-15", "1e-300"]),
        (lambda: build_attention("gated", 8, gate_normalizer=1e-300), ValueError, ["1e-15"]),
        (lambda: build_attention("focused", 8, key_position=(4,)), TypeError, ["key_position"]),
        (lambda: build_attention("focused", 8, key_position=(4, "4")), TypeError, ["'4'"]),
        (lambda: build_attention("compressed", 8, layers=[0, 1.5]), TypeError, ["layers", "1.5"]),
        (lambda: build_attention("moh", 8, shared_heads=1), ValueError, ["routed_heads=None"]),
        (
            lambda: build_attention("moh", 8, shared_heads=9, routed_heads=0),
            ValueError,
            ["shared_heads=9"],
        ),
    ],
)
def test_refusals_name_the_value_and_the_remedy(call, kind, fragments):
    with pytest.raises(kind) as caught:
        call()
    assert isinstance(caught.value, UsageError)
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize(
    "grid",
    [
        (4.0, 6.0), (2.5, 9.6), ("4", "6"), (True, 24), (None, 24), (4j, 6), ([4], 6),
        (numpy.float32(4), 6), (torch.tensor(True), 24), (torch.tensor(4.0), 6),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", list_attention())
def test_sides_of_a_grid_are_integers(name, grid):
    with pytest.raises(InvalidType, match=r"^grid must be \(height, width\) in tokens, two ints"):
        build_attention(name, 8)(torch.zeros(1, 24, 8), grid)


class OfImage(nn.Module):
    """A layer whose grid is an image's, which a compiler may not know."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, image):
        return self.layer(image.flatten(2).transpose(1, 2), tuple(image.shape[2:]))


@pytest.mark.parametrize("name", ["softmax", "sana", "local", "dydila"])
def test_sides_may_be_integers_of_others_and_symbols(name):
    torch._dynamo.reset()
    layer, x = build_attention(name, 16).eval(), torch.randn(1, 35, 16)
    expected = layer(x, (5, 7))
    for kind in (numpy.int64, torch.tensor):
        torch.testing.assert_close(layer(x, (kind(5), kind(7))), expected)
    sides = {
        2: torch.export.Dim("height", min=2, max=9),
        3: torch.export.Dim("width", min=2, max=9),
    }
    image = x.transpose(1, 2).unflatten(2, (5, 7))
    for strict in (False, True):
        whole = torch.zeros(1, 16, 6, 8)
        program = torch.export.export(
            OfImage(layer), (whole,), dynamic_shapes={"image": sides}, strict=strict
        )
        torch.testing.assert_close(program.module()(image), expected)
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(layer, dynamic=True, fullgraph=True, backend="aot_eager")
    compiled(torch.zeros(1, 24, 16), (4, 6))
    torch.testing.assert_close(compiled(x, (5, 7)), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_options_that_exclude_each_other_name_the_way_out():
    with pytest.raises(ValueError, match="differential='none'"):
        build_attention("dydila", 8, projection="none")


@pytest.mark.parametrize("name", list_attention())
def test_a_meta_device_a_default_type_and_a_list_of_sides_are_taken(name):
    with torch.device("meta"):
        layer = build_attention(name, 16)
    with torch.no_grad():
        assert layer.eval()(torch.empty(2, 15, 16, device="meta"), (3, 5)).is_meta
        with torch.device("meta"):
            assert layer(torch.empty(2, 21, 16), (3, 7)).is_meta
    torch.set_default_dtype(torch.float64)
    try:
        layer, x = build_attention(name, 16).eval(), torch.randn(2, 15, 16)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {z.dtype for z in layer.parameters()} == {torch.float64}
    assert torch.equal(layer(x, [3, 5]), layer(x, (3, 5)))


def test_an_integer_is_a_float_and_a_number_may_stand_for_a_schedule():
    layer = build_attention("dydila", 8, gamma_init=2, lambda_init=0)
    assert layer.config.gamma_init == 2 and layer.lambda_.is_floating_point()
    increasing = build_attention("dydila", 8, lambda_init="increasing", layer_index=3, depth=4)
    torch.testing.assert_close(
        increasing.lambda_, torch.full((1, 9), 0.8 - 0.6 * 2.718281828459045**-0.9)
    )


def test_a_class_is_registered_once():
    for _ in range(2):
        with pytest.raises(InvalidValue, match="is attention 'softmax' already; subclass it"):
            register_attention("alias")(get_attention("softmax"))
    assert get_attention("softmax").name == "softmax" and "alias" not in list_attention()


def test_a_name_can_be_registered_once():
    with pytest.raises(ValueError, match="already registered"):
        register_attention("sana")(get_attention("softmax"))
    with pytest.raises(TypeError, match="must subclass"):
        register_attention("module")(nn.Linear)


@pytest.mark.parametrize("base", [object, AttentionConfig])
def test_a_config_that_is_no_dataclass_of_options_is_refused(base):
    """Whose options nobody would see, or which cannot be built from them."""
    own = type("Config", (base,), {"__annotations__": {"gate": int}, "gate": 1})
    with pytest.raises(InvalidType, match=r"AttentionConfig, decorated by @dataclass\("):
        register_attention("own")(type("Own", (get_attention("softmax"),), {"Config": own}))
    assert "own" not in list_attention()


@pytest.mark.parametrize(
    "name",
    ["name", "dim", "num_heads", "layer_index", "depth", "removed", "at_least", "from_options"],
)
def test_an_option_that_is_an_argument_of_every_mechanism_is_refused(name):
    """It would never be given, or end in a TypeError."""
    own = dataclasses.make_dataclass(
        "Config", [(name, int, 1)], bases=(AttentionConfig,), frozen=True, kw_only=True
    )
    with pytest.raises(InvalidType, match=f"has an option '{name}'.*rename it.*'own_{name}'"):
        register_attention("own")(type("Own", (get_attention("softmax"),), {"Config": own}))
    assert "own" not in list_attention()


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        *(("plot_style", z) for z in ("red", "#o", ("red", "o"), ("#1F77B4", "x"), (), ("", ""))),
        *(("plot_style", z) for z in (("#1F77B4", ""), ("#1F77B4", "oo"), ("#1F77B4", 4), 3)),
        ("paper", None),
        ("complexity", 2),
    ],
)
def test_what_no_picture_or_table_can_show_is_refused_before_anything_is_trained(attribute, value):
    own = type("Own", (get_attention("softmax"),), {attribute: value})
    with pytest.raises(UsageError, match=f"{attribute} of attention 'own' must be") as caught:
        register_attention("own")(own)
    assert str(caught.value).endswith(f"got {value!r}") and "own" not in list_attention()


def test_a_subclass_does_not_look_like_its_registered_parent(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    parent: Any = get_attention("softmax")
    assert register_attention("own")(type("Own", (parent,), {})).plot_style is None
    style = ("#1F77B4", "o")
    own = register_attention("styled")(type("Own", (parent,), {"plot_style": style}))
    base = type("Base", (Attention,), {"plot_style": style, "forward": lambda self, x, grid: x})
    of_base = register_attention("of-base")(type("Own", (base,), {}))
    assert own.plot_style == of_base.plot_style == style


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


class Always(Attention):
    """Gives its loss in every forward, whatever kind of forward it is."""

    def __init__(self, context, config):
        super().__init__(context, config)
        self.linear = nn.Linear(context.dim, context.dim)

    def forward(self, x, grid):
        out = self.linear(x)
        self.auxiliary_loss = out.square().mean()
        return self.linear(out)  # a recomputation stops once nothing more is needed


@pytest.fixture
def always():
    return Always(attnzoo.AttentionContext(dim=8), AttentionConfig())


def test_an_auxiliary_loss_is_of_a_training_forward_only(always):
    x = torch.randn(2, 4, 8)
    always.eval()(x, (2, 2))
    assert attnzoo.auxiliary_loss(always) is None
    always.train()
    with torch.no_grad():
        always(x, (2, 2))
    assert attnzoo.auxiliary_loss(always) is None
    always(x, (2, 2))
    always.eval()(3 * x, (2, 2))  # a look at the model between forward and reading
    torch.testing.assert_close(always.auxiliary_loss, always.linear(x).square().mean())


def test_two_forwards_leave_the_loss_of_the_second(always):
    x = torch.randn(2, 4, 8)
    always(x, (2, 2))
    always(2 * x, (2, 2))
    torch.testing.assert_close(
        attnzoo.auxiliary_loss(always), always.linear(2 * x).square().mean()
    )
    assert attnzoo.auxiliary_loss(always) is None


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputed_forward_leaves_no_auxiliary_loss(always, use_reentrant):
    x = torch.randn(2, 4, 8, requires_grad=True)
    out = torch.utils.checkpoint.checkpoint(always, x, (2, 2), use_reentrant=use_reentrant)
    loss = attnzoo.auxiliary_loss(always)
    assert (loss is None) == use_reentrant  # its forward makes no graph
    out.sum().backward()
    assert attnzoo.auxiliary_loss(always) is None


def test_an_auxiliary_loss_survives_compiling(always):
    x = torch.randn(2, 4, 8)
    compiled = torch.compile(always, fullgraph=True, backend="aot_eager")
    compiled(x, (2, 2))
    loss = attnzoo.auxiliary_loss(always)
    torch.testing.assert_close(loss, always.linear(x).square().mean())
    loss.backward()
    assert always.linear.weight.grad.abs().sum() > 0
    compiled.eval()(x, (2, 2))
    assert attnzoo.auxiliary_loss(always) is None


def test_copies_have_no_auxiliary_loss(always):
    always(torch.randn(2, 4, 8), (2, 2))
    for copied in (copy.deepcopy(always), pickle.loads(pickle.dumps(always)), copy.copy(always)):
        assert attnzoo.auxiliary_loss(copied) is None
    assert attnzoo.auxiliary_loss(always) is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nested(AttentionConfig):
    pairs: tuple[tuple[int, int], ...] = ()
    nothing: tuple[()] = ()
    anything: Any = None
    ratios: tuple[float, float] | None = None


def test_a_tuple_option_equals_itself_after_json():
    given = {"pairs": ((1, 2), (3, 4)), "ratios": (0.5, 2), "anything": (1, "a")}
    config = Nested.from_options("nested", given)
    again = Nested.from_options("nested", json.loads(json.dumps(given)))
    assert config == again == Nested(**json.loads(json.dumps(given)))
    assert hash(config) == hash(again)
    assert Nested(anything=[Kind.TWO]).anything == (Kind.TWO,)
    with pytest.raises(InvalidType, match=r"pairs\[1\]\[0\]"):
        Nested.from_options("nested", {"pairs": [[1, 2], ["3", 4]]})


class Kind(enum.Enum):
    FAST = "fast"
    TWO = 2
    PAIR = (1, 2)


class Level(enum.IntEnum):
    NONE = 0


class Share(float, enum.Enum):
    HALF = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfWords(AttentionConfig):
    kind: Kind = Kind.FAST
    level: Level | None = None
    kinds: tuple[Kind, ...] = ()
    file: Path | None = None
    text: str | Kind = ""
    listed: Literal[Kind.FAST, Kind.TWO] | None = None
    half: float = 1.0
    count: int = 1
    nested: AttentionContext | None = None


@pytest.mark.parametrize(
    ("option", "given", "wanted"),
    [
        ("kind", "fast", Kind.FAST),
        ("kind", "FAST", Kind.FAST),
        ("kind", 2, Kind.TWO),
        ("kind", [1, 2], Kind.PAIR),
        ("level", 0, Level.NONE),
        ("kinds", ["fast", "PAIR"], (Kind.FAST, Kind.PAIR)),
        ("file", "here", Path("here")),
        ("text", "fast", "fast"),
        ("listed", "fast", Kind.FAST),
        ("listed", "TWO", Kind.TWO),
        ("half", Share.HALF, Share.HALF),
        ("count", Level.NONE, Level.NONE),
    ],
)
def test_what_no_flag_and_no_file_can_hold_is_made_of_what_they_can(option, given, wanted):
    made = OfWords.from_options("mine", {option: given})
    assert made == OfWords(**{option: wanted})
    assert type(getattr(made, option)) is type(wanted)
    held = json.loads(json.dumps(as_tuples({option: wanted}, in_words=True)))
    assert OfWords.from_options("mine", held) == made


@pytest.mark.parametrize(
    ("option", "given", "words"),
    [
        (
            "kind",
            "fats",
            r"kind='fats' is not valid; did you mean 'fast'\? Choose one of",
        ),
        ("kind", 2.0, r"kind must be one of \['fast', 'TWO', 'PAIR'\], got 2\.0"),
        ("level", False, r"level must be one of \['NONE'\] or NoneType, got False"),
        ("kinds", ["fast", 3], r"kinds\[1\] must be one of"),
        ("listed", "PAIR", r"Choose one of \['fast', 'TWO'\]"),
        ("nested", {"dim": 4}, "--set and config files hold none: make its fields options"),
    ],
)
def test_what_stands_for_no_option_is_refused_with_what_would(option, given, words):
    with pytest.raises(UsageError, match=words):
        OfWords.from_options("mine", {option: given})


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Installs a package that offers mechanisms: ``package(entry points, module's text)``."""
    before = dict(registry._REGISTRY), dict(registry._SOURCES)

    def install(points, text, name="shared_attention"):
        (tmp_path / f"{name}.py").write_text(text)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = [f"{key} = {value}" for key, value in points.items()]
        (info / "entry_points.txt").write_text("\n".join(["[attnzoo.mechanisms]", *lines]))

    monkeypatch.syspath_prepend(str(tmp_path))
    yield install
    for now, then in zip((registry._REGISTRY, registry._SOURCES), before, strict=True):
        now.clear()
        now.update(then)
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(file.stem, None)


MEAN = """
import attnzoo
class Mean(attnzoo.Attention):
    def forward(self, x, grid):
        return x.mean(1, keepdim=True).expand_as(x)
"""


@pytest.mark.parametrize("way", ["class", "module", "registered class"])
def test_an_installed_package_offers_a_mechanism(package, way):
    value = "shared_attention" if way == "module" else "shared_attention:Mean"
    text = MEAN if way == "class" else MEAN + "attnzoo.register_attention('mean')(Mean)\n"
    package({"mean": value}, text)
    assert "mean" in list_attention() and "sana" in list_attention()
    assert "shared_attention" not in sys.modules
    with pytest.raises(InvalidValue, match="did you mean 'mean'"):
        get_attention("maen")
    assert "shared_attention" not in sys.modules
    layer = build_attention("mean", 8)
    assert layer.name == "mean" and layer(torch.ones(1, 4, 8), (2, 2)).shape == (1, 4, 8)
    assert source_of("mean") == "shared_attention"
    assert list_attention().count("mean") == 1


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("1 / 0", ZeroDivisionError),
        ("import no_such_package", ModuleNotFoundError),
        ("raise ValueError('bug')", ValueError),
        (MEAN + "attnzoo.register_attention('mean')(Mean)\nraise TypeError('bug')", TypeError),
        (MEAN + "Mean = 3", InvalidType),
        ("", AttributeError),
    ],
)
def test_a_broken_package_shows_only_to_who_asks(package, text, kind):
    package({"mean": "shared_attention:Mean", "sana": "shared_attention:Mean"}, text)
    assert "mean" in list_attention()
    assert build_attention("sana", 8).name == "sana"  # the zoo's own comes first
    for _ in range(2):
        with pytest.raises(kind) as caught:
            get_attention("mean")
        assert (kind is InvalidType) == isinstance(caught.value, UsageError)
        assert source_of("mean") is None


def test_a_name_that_two_packages_offer_is_refused(package):
    package({"mean": "shared_attention:Mean"}, MEAN)
    package({"mean": "other_attention:Mean"}, MEAN, "other_attention")
    with pytest.raises(InvalidValue, match=r"other_attention:Mean|shared_attention:Mean"):
        get_attention("mean")


def test_softmax_backends_that_are_missing_are_not_replaced():
    for impl in ("flash", "xformers"):
        layer = build_attention("softmax", 32, impl=impl)
        with pytest.raises(InvalidValue, match=f"impl='{impl}'.*torch") as caught:
            layer(tokens((4, 4), dim=32), (4, 4))
        assert isinstance(caught.value, RuntimeError)
    with pytest.raises(InvalidValue, match=r"impl='fla'.*attnzoo\[fla\]"):
        build_attention("gated", 32, impl="fla")(tokens((4, 4), dim=32), (4, 4))


@pytest.mark.parametrize("name", list_attention())
def test_options_of_earlier_versions_load_at_their_defaults_only(name):
    config = get_attention(name).Config
    for option, gone in config.removed.items():
        if gone.values:
            for value in gone.values:
                with pytest.raises(InvalidValue, match=f"{option}=.* {gone.version}"):
                    build_attention(name, 48, **{option: value})
            continue
        assert option not in config.__dataclass_fields__
        assert build_attention(name, 48, **{option: gone.default}).config == config()
        with pytest.raises(InvalidValue, match=f"{option}=.* removed in version {gone.version}"):
            build_attention(name, 48, **{option: "other"})


@pytest.mark.parametrize(
    ("name", "former", "word"),
    [
        ("softmax", "naive", "reference"),
        ("moh", "sdpa", "torch"),
        ("gated", "safe", "torch"),
        ("sana", "folded", "torch"),
    ],
)
def test_former_words_of_impl_load(name, former, word):
    assert build_attention(name, 48, impl=former).config.impl == word


@pytest.mark.parametrize("name", list_attention())
def test_an_unknown_impl_lists_the_valid_words(name):
    with pytest.raises(InvalidValue, match=r"Choose one of \['auto', 'reference', 'torch'"):
        build_attention(name, 48, impl="fast")


def test_an_option_without_a_default_is_asked_for(monkeypatch):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        width: int
        sizes: tuple[int, ...] = dataclasses.field(default_factory=tuple)

    with pytest.raises(InvalidType, match="'mine' has no default of its option 'width'"):
        Config.from_options("mine", {"sizes": (1,)})
    assert Config.from_options("mine", {"width": 3}) == Config(width=3)
