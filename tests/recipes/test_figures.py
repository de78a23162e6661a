"""The paper's figures are drawn from runs, and show what the runs hold."""

import numpy as np
import pytest
import torch
from PIL import Image

from recipes import figures as figures_module
from recipes.lab.console import UserError
from recipes.lab.drawing.drawn import Drawn
from recipes.lab.evaluation.features import Features
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.session import train
from recipes.lab.training.settings import Settings
from recipes.studies.dydila.figures import FIGURES, confusable_classes, map_with, stages


@pytest.fixture(scope="module")
def sana(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("figures") / "sana")
    settings = Settings(attn="sana", steps=2, batch_size=4, sample_every=2)
    assert train(settings, run) == 0
    return run


@pytest.fixture(scope="module")
def drawn(trained):
    return Drawn(trained, cfg=2.0, per_class=6)


def test_every_figure_is_written(trained, sana, tmp_path):
    out = tmp_path / "figures"
    folders = [str(sana.folder), str(trained.folder)]
    assert figures_module.main([*folders, "--out", str(out), "--per-class", "6"]) == 0
    for name in FIGURES:
        with Image.open(out / f"{name}.png") as picture:
            assert picture.width > 500 and np.asarray(picture.convert("L")).std() > 5


def test_what_the_runs_cannot_show_is_left_out_and_said(sana, tmp_path, capsys):
    arguments = [str(sana.folder), "--only", "projectors,factors", "--out", str(tmp_path)]
    assert figures_module.main(arguments) == 0
    text = capsys.readouterr().out
    assert "projectors: left out, it needs a run of dydila" in text
    assert "factors: left out" in text and not list(tmp_path.glob("*.png"))


def test_an_unknown_figure_is_named(tmp_path):
    with pytest.raises(UserError, match=r"unknown figure 'costs'; there are cost, projectors"):
        figures_module.main(["--only", "costs", "--out", str(tmp_path)])


def test_cost_grows_quadratically_for_softmax_alone():
    axis = FIGURES["cost"]([]).axes[0]
    lines = {line.get_label(): line.get_ydata() for line in axis.get_lines()}
    last = {name: values[-1] / values[-2] for name, values in lines.items()}
    assert last["DiT"] > 8 > 4.05 > last["Sana"] > 3.9
    assert last["DyDi-LiT"] == pytest.approx(4, rel=0.02)


def test_the_stages_are_those_of_the_same_weights(drawn):
    layer = drawn.layers[0]
    _, noisy, labels = drawn.noisy_images(2)
    x, grid = drawn.inputs_of_layers(noisy, labels)[0]
    own = layer.config
    maps = [map_with(layer, config, x, grid) for _, config in stages(layer)]
    assert len(maps) == 3 and layer.config is own
    torch.testing.assert_close(maps[-1], layer.attention_map(x, grid))
    plain = torch.einsum("bhnd,bhmd->bhnm", *map(torch.relu, heads_of_q_and_k(layer, x)))
    plain = plain / (plain.sum(-1, keepdim=True) + own.eps)
    torch.testing.assert_close(maps[0], plain, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(maps[1], maps[2])


def heads_of_q_and_k(layer, x):
    query, key, _ = layer.shared(x).split(layer.dim, dim=-1)
    return [z.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for z in (query, key)]


def test_factors_are_those_that_tokens_chose(drawn):
    figure = FIGURES["factors"]([drawn])
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].get_lines()}
    assert lines.keys() == {"dydila: query", "dydila: key"}
    _, noisy, labels = drawn.noisy_images(16)
    for index, (x, grid) in enumerate(drawn.inputs_of_layers(noisy, labels)):
        layer = drawn.layers[index]
        chosen = layer.lambda_[0][layer.routes(x, grid)["differential.query"]]
        assert lines["dydila: query"][index] == pytest.approx(chosen.mean().item(), rel=1e-5)


def test_confusable_classes_are_those_the_evaluator_mixes_up(drawn):
    class Sees8As3:
        def __call__(self, images):
            labels = self.labels
            logits = 20 * torch.nn.functional.one_hot(labels, 10).double()
            logits[labels == 8, 3] = 19.0
            logits[labels == 3, 5] = 18.0
            return Features(logits, logits, logits)

    _, _, test = drawn.real
    see = Sees8As3()
    see.labels = test.batch(torch.arange(len(test)))[1]
    assert set(confusable_classes(drawn, see, size=3)) == {3, 5, 8}
