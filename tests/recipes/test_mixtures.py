"""Mixtures over depth in the recipes: trained, resumed, sampled, drawn and compared."""

import json
import shutil

import numpy as np
import pytest
import torch

import attnzoo
from attnzoo import registry
from recipes import demo as demo_module
from recipes import figures as figures_module
from recipes import sample as sample_module
from recipes import train as train_module
from recipes.lab.console import UserError
from recipes.lab.drawing.drawn import Drawn
from recipes.lab.drawing.palette import color_of, marker_of
from recipes.lab.evaluation.evaluate import classify
from recipes.lab.sampling import RunSampler
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.session import train
from recipes.lab.training.settings import Settings
from recipes.studies import demo as demo_study
from recipes.studies.comparison.plan import parse_variants, plan_runs
from recipes.studies.comparison.planned import PlannedRun
from recipes.studies.dydila.figures import FIGURES
from recipes.studies.dydila.paper import chosen_variants

MIXED = "sana+dydila+sana+softmax"
SMALL = ["--batch-size", "8", "--sample-every", "1000", "--checkpoint-every", "2"]
OWN = """
import attnzoo
import torch.nn as nn


@attnzoo.register_attention("mixed-mean")
class MeanAttention(attnzoo.Attention):
    def __init__(self, context, config):
        super().__init__(context, config)
        self.value = nn.Linear(self.dim, self.dim)

    def forward(self, x, grid):
        self.check_tokens(x, grid)
        return self.value(x).mean(1, keepdim=True).expand_as(x)
"""


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A run of four steps on digits by the command line, in the folder that it chooses itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("mixed"))
        arguments = ["--attn", MIXED, "--set", "sana.qk_norm=true", "--set", "dydila.conv=none"]
        assert train_module.main([*arguments, "--steps", "4", *SMALL]) == 0
        return Run(next(iter(Run("runs").folder.absolute().iterdir())))


def test_a_run_has_a_name_that_no_shell_expands_and_says_what_it_is(mixed):
    assert mixed.folder.name == "digits-sana-dydila-sana-softmax"
    settings = mixed.config()["settings"]
    assert settings["attn"] == MIXED
    assert settings["attn_options"] == {"sana": {"qk_norm": True}, "dydila": {"conv": "none"}}
    model = RunSampler(mixed).model
    assert [b.attention.name for b in model.blocks] == ["sana", "dydila", "sana", "softmax"]
    assert model.config.attn_options["dydila"]["conv"] == "none"


def test_it_is_resumed_exactly(mixed, tmp_path):
    part = tmp_path / "part"
    shutil.copytree(mixed.folder, part)
    shutil.rmtree(part / "checkpoints" / "step-00000004")
    assert train_module.main(["--resume", "--out", str(part)]) == 0
    for one, other in zip(Run(part).read_log(), mixed.read_log(), strict=True):
        assert one["loss"] == other["loss"]
    with pytest.raises(UserError, match=r"attn: 'sana\+dydila\+sana\+softmax' -> 'sana\*3"):
        train_module.main(["--out", str(part), "--attn", "sana*3+softmax"])


def test_it_is_sampled_and_classified(mixed, tmp_path):
    out = tmp_path / "grid.png"
    assert sample_module.main([str(mixed.folder), "--steps", "2", "--out", str(out)]) == 0
    assert out.is_file() and 0 <= classify(mixed)["accepted"] <= 100


def test_diagnostics_come_from_the_blocks_that_have_any(tmp_path):
    run = Run(tmp_path / "run")
    settings = Settings(attn="dydila+sana", steps=2, batch_size=4, diagnose_every=1)
    assert train(settings, run) == 0
    speakers = set(run.read_log()[-1]["blocks"])
    assert speakers == {"0", "2"}


def test_figures_show_the_blocks_that_have_what_they_show(mixed, capsys):
    drawn = Drawn(mixed, cfg=2.0, per_class=4)
    assert drawn.label == f"{MIXED} (sana.qk_norm=True, dydila.conv=none)"
    lines = FIGURES["factors"]([drawn]).axes[0].get_lines()
    assert [np.asarray(line.get_xdata()).tolist() for line in lines] == [
        [2],
        [2],
    ]  # the second block alone
    titles = [axis.get_title().replace("\n", " ") for axis in FIGURES["maps"]([drawn]).axes]
    for block in ("block 2: dydila", "block 3: sana", "block 4: softmax"):
        assert any(block in title for title in titles)
    routes = FIGURES["projectors"]([drawn]).axes[0]
    assert [label.get_text() for label in routes.get_yticklabels()] == ["2"]


def test_figures_are_written(mixed, tmp_path):
    arguments = [str(mixed.folder), "--only", "maps,factors", "--out", str(tmp_path)]
    assert figures_module.main(arguments) == 0
    assert {file.name for file in tmp_path.glob("*.png")} == {"maps.png", "factors.png"}


def test_its_color_is_its_own_however_it_is_spelled():
    spellings = ("sana*3+softmax", "sana+sana*2+softmax")
    (color,), (marker,) = ({of(name) for name in spellings} for of in (color_of, marker_of))
    assert color not in {color_of("sana"), color_of("softmax")} and marker


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--attn", "sana*3+softmxa"], "block 3 of 'sana\\*3\\+softmxa': unknown attention"),
        (["--attn", "sana*0+softmax"], "needs a count"),
        (["--attn", "sana*3+softmax", "--set", "qk_norm=true"], "--set sana.qk_norm="),
        (["--attn", "sana*3+softmax", "--set", "lit.eps=1"], "has no 'lit'"),
        (["--attn", "sana*4+softmax"], "take a depth of 5 or more"),
        (["--attn", "sana", "--set", "sana.qk_norm=true"], "is no mixture"),
    ],
)
def test_bad_patterns_are_one_line_and_leave_nothing(arguments, words, tmp_path):
    with pytest.raises((UserError, attnzoo.UsageError), match=words) as caught:
        train_module.main([*arguments, "--out", str(tmp_path / "run")])
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_mechanism_of_ones_own_is_remembered(tmp_path):
    file, out = tmp_path / "mine.py", tmp_path / "run"
    file.write_text(OWN)
    arguments = ["--attn", "mixed-mean+sana", "--import", str(file), "--steps", "2", *SMALL]
    assert train_module.main([*arguments, "--out", str(out)]) == 0
    assert Run(out).config()["imports"].keys() == {"mixed-mean"}
    del registry._REGISTRY["mixed-mean"]
    file.write_text(OWN + "\n# changed\n")
    with pytest.raises(UserError, match="which has changed since"):
        RunSampler(Run(out))


def test_variants_of_a_comparison_may_be_mixtures():
    text = "sana*3+softmax:sana.qk_norm=true,softmax,lit*2+softmax"
    variants, _ = chosen_variants(text, None, None)
    assert variants == parse_variants(text)
    assert variants[0].options == {"sana": {"qk_norm": True}}
    with pytest.raises(attnzoo.InvalidValue, match=r"block 3 of 'sana\*3\+softmxa'"):
        chosen_variants("sana*3+softmxa", None, None)
    like = PlannedRun(label="", settings=Settings(steps=2), cfgs=(1.0,), samples=10,
                      sampling_steps=2, imports=("mine.py",))  # fmt: skip
    runs = plan_runs(variants, [("digits", None)], seeds=1, protocols=["controlled"], like=like)
    assert runs[0].settings.attn == "sana*3+softmax"
    assert runs[0].name.startswith("digits-easy-native-sana-3-softmax-sana-qk-norm-true-seed-0-")
    assert not set("*+?[]'\" ") & set("".join(run.name for run in runs))


def test_the_demo_shows_mixtures(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(demo_study, "_draw", lambda runs, picture: drawn.append(runs))
    flags = ["--steps", "1", "--out", str(tmp_path)]
    assert demo_module.main(["--attn", "sana*3+softmax,sana", *flags]) == 0
    assert [run.folder.name for run in drawn[0].values()] == ["sana-3-softmax", "sana"]
    for text, words in (("sana*3+softmx,sana", "block 3 of"), ("sana", "two mechanisms")):
        with pytest.raises((UserError, attnzoo.UsageError), match=words):
            demo_module.main(["--attn", text, *flags])


def test_what_is_saved_is_what_was_asked_for(mixed):
    config = json.loads((mixed.folder / "config.json").read_text())
    last = sorted((mixed.folder / "checkpoints").iterdir())[-1]
    saved = json.loads((last / "ema" / "config.json").read_text())
    assert saved["attn"] == config["settings"]["attn"]
    assert saved["attn_options"]["sana"] == config["settings"]["attn_options"]["sana"]
    weights = [p.norm().item() for p in RunSampler(mixed).model.parameters()]
    assert np.isfinite(weights).all() and torch.tensor(weights).max() > 0
