"""The held-out loss: same problems for every model, images that no run has seen, and its log."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from recipes import evaluate as evaluate_module
from recipes.lab.console import UserError
from recipes.lab.data.datasets import Part, divided, load_dataset
from recipes.lab.diffusion import Diffusion
from recipes.lab.evaluation.evaluate import compared_by_image, evaluate, table
from recipes.lab.evaluation.shards import Plan
from recipes.lab.files import write_json
from recipes.lab.training import held_out
from recipes.lab.training.batches import Batches
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.held_out import (
    TIMES,
    held_out_losses,
    held_out_numbers,
    images_needed,
    open_held_out,
)
from recipes.lab.training.session import train
from recipes.lab.training.settings import Settings
from recipes.studies.comparison.verdicts import compare_variants

SMALL = {"attn": "softmax", "steps": 4, "batch_size": 8, "seed": 3}


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """Sixteen images of two classes, each another one."""
    root = tmp_path_factory.mktemp("images")
    draws = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)
    for index, pixels in enumerate(draws):
        folder = root / "ab"[index % 2]
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


class Shrunk(nn.Module):
    """Answers with a share of what it sees, plus noise of its own that a seed chooses."""

    def __init__(self, share: float, noise: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        self.share, self.noise, self.seed = share, noise, seed

    def forward(self, hidden_states: Tensor, **_: object) -> tuple[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        own = torch.randn(hidden_states.shape[1:], generator=generator)
        return (self.share * hidden_states + self.noise * own,)


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon", "flow"])
def test_it_is_the_mean_over_images_and_times_of_the_training_loss(prediction):
    diffusion, digits = Diffusion(prediction=prediction), load_dataset("digits", split="test")
    found = held_out_losses(Shrunk(0.3), diffusion, digits, images=20)
    assert found.shape == (20, TIMES)
    # Many draws of time and noise estimate the same number.
    images, labels = digits.batch(torch.arange(20).repeat_interleave(200))
    generator = torch.Generator().manual_seed(5)
    many = diffusion.training_losses(
        Shrunk(0.3),
        images,
        labels,
        timesteps=diffusion.sample_timesteps(4000, generator),
        noise=torch.randn(images.shape, generator=generator),
    )["mse"]
    error = (found.mean(1).std() / 20**0.5 + many.std() / 4000**0.5).item()
    assert held_out_numbers(found)["held_out_loss"] == pytest.approx(
        many.mean().item(), abs=4 * error
    )


def test_each_part_of_the_time_axis_holds_one_time_of_each_image():
    seen: list[Tensor] = []

    class Note(nn.Module):
        def forward(self, hidden_states: Tensor, timestep: Tensor, **_: object) -> tuple[Tensor]:
            seen.append(timestep)
            return (torch.zeros_like(hidden_states),)

    digits = load_dataset("digits", split="test")
    held_out_losses(Note(), Diffusion(), digits, images=12)
    times = torch.stack(seen, dim=1)  # (images, TIMES)
    assert torch.equal(times * TIMES // 1000, torch.arange(TIMES).expand(12, -1))
    assert len(times[:, 0].unique()) > 6


def test_images_do_not_depend_on_how_many_are_measured_or_how_many_at_once(monkeypatch):
    digits = load_dataset("digits", split="test")
    together = held_out_losses(Shrunk(0.3), Diffusion(), digits, images=30)
    few = held_out_losses(Shrunk(0.3), Diffusion(), digits, images=10)
    monkeypatch.setattr(held_out, "_AT_ONCE", 1)  # not 64
    one_by_one = held_out_losses(Shrunk(0.3), Diffusion(), digits, images=30)
    assert torch.equal(few, together[:10])
    torch.testing.assert_close(one_by_one, together, rtol=1e-6, atol=0)


def test_a_planted_difference_of_one_percent_is_found_with_three_seeds_and_a_tie_is_not():
    import pandas as pd

    digits, diffusion = load_dataset("digits", split="test"), Diffusion()

    def loss(scale: float, seed: int) -> Tensor:
        # Every seed has a spread of its own, which both variants share.
        spread = 1 + 0.05 * torch.rand((), generator=torch.Generator().manual_seed(seed)).item()
        return scale * spread * held_out_losses(Shrunk(0.3, 0.1, seed), diffusion, digits, 64)

    rows = [
        {"variant": name, "seed": seed, "held_out_loss[ema]": loss(scale, seed).mean().item()}
        for seed in range(3)
        for name, scale in (("plain", 1.0), ("same", 1.0), ("better", 0.99))
    ]
    runs = pd.DataFrame(rows)
    assert compare_variants(runs, "better", "plain", "held_out_loss[ema]").kind == "better"
    assert compare_variants(runs, "same", "plain", "held_out_loss[ema]").kind == "same"
    # A tenth of the planted difference as its own error takes few images, as they are paired.
    assert images_needed(loss(0.99, 0), loss(1.0, 0)) < 64
    assert images_needed(loss(1.0, 0), loss(1.0, 0)) == math.inf


def test_training_logs_it_without_another_step_and_evaluation_finds_the_same(tmp_path, capsys):
    often = Settings(**SMALL, held_out_every=2, held_out_images=64)
    logged = Run(tmp_path / "logged")
    train(often, logged)
    plain = Run(tmp_path / "plain")
    train(Settings(**SMALL), plain)
    # A run that is stopped and goes on has the same: the images, times and noise are.
    stopped = Run(tmp_path / "stopped")
    train(often, stopped, should_stop=lambda step: step == 2)
    train(often, stopped, resume=True)
    both = [[step.get("held_out_loss") for step in run.read_log()] for run in (stopped, logged)]
    assert both[0] == both[1] and both[0][3] is not None
    entries = logged.read_log()
    assert [step["step"] for step in entries if "held_out_loss" in step] == [2, 4]
    losses = [[step["loss"] for step in run.read_log()] for run in (logged, plain)]
    assert losses[0] == losses[1]
    measured = evaluate(plain, plan=Plan(samples=10, steps=2), cache=tmp_path, held_out=64)
    found = measured["results"]["1"]
    assert found["held_out_loss[ema]"] == pytest.approx(entries[-1]["held_out_loss"], rel=1e-6)
    assert measured["held_out"]["images"] == len(measured["held_out"]["by_image"])
    json.dumps(measured["held_out"], allow_nan=False)
    assert "its own error over them" in table(measured)
    # Against itself, then against one whose images are all a hundredth better or so.
    assert "no number of images" in compared_by_image(measured, plain)
    facts = measured["held_out"]
    shares = [0.99, 0.9899] * (len(facts["by_image"]) // 2 + 1)
    by_image = [loss * share for loss, share in zip(facts["by_image"], shares, strict=False)]
    better = measured | {"held_out": facts | {"by_image": by_image}}
    assert re.search(r": -1 % ± 0\.\d+ \(.*; \d+ images would", compared_by_image(better, plain))
    other = measured | {"held_out": facts | {"sha256": "0"}}
    with pytest.raises(UserError, match="are of different images"):
        compared_by_image(other, plain)
    for flags, words in (
        (["--held-out", "0", "--against", str(plain.folder)], "--held-out 0 leaves out"),
        (["--held-out", "5"], "--held-out: must be 0 or at least 10, got 5"),
        (["--against", str(logged.folder)], "has not been evaluated yet"),
    ):
        with pytest.raises((UserError, SystemExit)) as raised:
            evaluate_module.main([str(plain.folder), *flags])
        said = capsys.readouterr().err if raised.type is SystemExit else str(raised.value)
        assert words in said
    write_json(logged.metrics_file, measured | {"held_out": None})
    before = plain.metrics_file.read_bytes()
    with pytest.raises(UserError, match="has no held-out loss: evaluate it without --held-out 0"):
        evaluate_module.main([str(plain.folder), "--against", str(logged.folder)])
    assert plain.metrics_file.read_bytes() == before
    for damage in ("[]", '{"held_out": {"sha256": ""}}', "{"):
        plain.metrics_file.write_text(damage)
        with pytest.raises(UserError, match=r"metrics\.json' .* damaged.*; evaluate .* again"):
            compared_by_image(measured, plain)


def test_what_is_held_out_is_never_trained_on(image_folder):
    settings = Settings(**SMALL, data=str(image_folder), resolution=8, hold_out=0.25)
    whole = load_dataset(str(image_folder), resolution=8)
    kept, left_out = divided(len(whole), 0.25)
    assert sorted([*kept.tolist(), *left_out.tolist()]) == list(range(len(whole)))
    held = open_held_out(settings)
    assert torch.equal(held.batch(torch.arange(len(held)))[0], whole.batch(left_out)[0])
    batches = Batches(settings, whole, Diffusion(), 0, 1, torch.device("cpu"))
    seen = torch.cat([batches.at(step)[0] for step in range(12)])  # all of them, and again
    for image in held.batch(torch.arange(len(held)))[0]:
        same = [(seen == shown).flatten(1).all(1).any() for shown in (image, image.flip(-1))]
        assert not any(same)
    assert isinstance(held, Part) and held.identity() != whole.identity()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"held_out_every": 1, "data": "FOLDER"}, "--hold-out 0.1"),
        ({"hold_out": 0.1}, "drop --hold-out"),
        ({"hold_out": 0.1, "held_out_every": 1, "data": "FOLDER"}, "too few"),
        ({"hold_out": 1.0}, "--hold-out must be"),
    ],
)
def test_what_cannot_be_held_out_is_one_line_before_the_first_step(
    image_folder, tmp_path, settings, words
):
    if settings.get("data") == "FOLDER":
        settings |= {"data": str(image_folder), "resolution": 8}
    with pytest.raises(UserError, match=words):
        train(Settings(**SMALL | settings), Run(tmp_path / "run"))
    assert not (tmp_path / "run" / "log.jsonl").exists()
