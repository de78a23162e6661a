"""Runs of latents: decoded when sampled, measured with the images that were encoded."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from recipes.lab.console import UserError
from recipes.lab.data.datasets import entry_of
from recipes.lab.evaluation.evaluate import evaluate
from recipes.lab.evaluation.features import CustomExtractor, Features, smallcnn_of
from recipes.lab.evaluation.real import RealImages, fresh_images, real_images
from recipes.lab.evaluation.shards import Plan
from recipes.lab.sampling import RunSampler
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.session import train
from recipes.lab.training.settings import Settings
from tests.recipes.reliability import make_vae
from tests.recipes.test_encode import encode

PLAN = Plan(samples=10, steps=1)
COLORS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30), (30, 200, 200)]


def draw_classes(root, count=5, images=12):
    generator = np.random.default_rng(0)
    for color, name in zip(COLORS[:count], ["ant", "bee", "cat", "dog", "eel"], strict=False):
        (root / name).mkdir(parents=True)
        for number in range(images):
            noise = generator.normal(0, 25, (16, 16, 3))
            pixels = np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Images, a VAE, latents of the images, and a run of each way to train on latents."""
    root = tmp_path_factory.mktemp("latents")
    images = draw_classes(root / "images")
    vae = make_vae(root / "vae")
    encode(images, root / "latents", vae)
    common = {"attn": "sana", "batch_size": 4, "steps": 1}
    assert train(Settings(data=str(root / "latents"), **common), Run(root / "cached")) == 0
    fly = Settings(data=str(images), vae=vae, resolution=16, **common)
    assert train(fly, Run(root / "fly")) == 0
    return root


def colors(images):
    x = images.double().mean((1, 2))
    return Features(x, x, x)


@pytest.fixture
def see():
    return CustomExtractor("colors", colors)


@pytest.mark.parametrize("name", ["cached", "fly"])
def test_images_are_decoded_and_measured_with_what_was_encoded(place, name, see):
    draw = RunSampler(Run(place / name), device="cpu")
    assert draw.image_shape == (3, 16, 16)
    assert draw(torch.arange(5), steps=1).shape == (5, 3, 16, 16)
    result = evaluate(Run(place / name), plan=PLAN, extractor=see)
    assert result["results"]["1"]["FID[colors]"] > result["real_floor"]["FID[colors]"]
    assert result["real"]["data"] == str(place / "images") and result["resolution"] == 16
    assert result["sampling"]["vae_sha256"]


def test_where_no_real_images_are_it_says_so_before_it_samples(place, see, monkeypatch, tmp_path):
    monkeypatch.setattr(RunSampler, "__call__", None)
    run = Run(place / "cached")
    hidden = place / "elsewhere"
    (place / "images").rename(hidden)
    try:
        with pytest.raises(UserError, match=r"is gone.*pass --real FOLDER"):
            evaluate(run, plan=PLAN, extractor=see)
        source, _ = real_images(run, run.config(), hidden)
        assert len(source.open()[0]) == 48
        # Statistics are enough for who needs no training.
        monkeypatch.undo()
        file = tmp_path / "statistics.npz"
        np.savez(file, mu=np.zeros(3), sigma=np.eye(3), mu_s=np.zeros(3), sigma_s=np.eye(3))
        result = evaluate(run, plan=PLAN, extractor=see, reference=file)
        assert result["real_floor"] == {} and "FID[colors]" in result["results"]["1"]
        with pytest.raises(UserError, match="small evaluator is trained on real images"):
            evaluate(run, plan=PLAN, reference=file)
    finally:
        hidden.rename(place / "images")


def test_images_that_have_changed_are_refused_and_may_be_named(place, see):
    run, extra = Run(place / "cached"), place / "images" / "ant" / "zz.png"
    extra.write_bytes((place / "images" / "bee" / "0.png").read_bytes())
    try:
        with pytest.raises(UserError, match=r"have changed since.*--real"):
            evaluate(run, plan=PLAN, extractor=see)
        evaluate(run, plan=PLAN, extractor=see, real=place / "images")
    finally:
        extra.unlink()


def test_another_vae_is_refused_and_one_without_need(place, trained, tmp_path):
    torch.manual_seed(1)
    other = tmp_path / "other"
    from diffusers import AutoencoderKL

    AutoencoderKL.from_config(AutoencoderKL.load_config(place / "vae")).save_pretrained(other)
    with pytest.raises(UserError, match="--vae"):
        RunSampler(Run(place / "cached"), vae=str(other))
    with pytest.raises(UserError, match="trained on pixels: drop --vae"):
        RunSampler(trained, vae=str(other))


def test_a_run_on_some_classes_is_measured_with_those(tmp_path, monkeypatch):
    """Its own real images, by the class numbers that the run has, are recognized."""
    monkeypatch.setattr(entry_of("folder"), "classifier_steps", 60)
    images = draw_classes(tmp_path / "images", images=30)
    settings = Settings(
        attn="sana", data=str(images), resolution=16, class_count=2, class_seed=1, steps=1,
        batch_size=4,
    )  # fmt: skip
    run = Run(tmp_path / "run")
    assert train(settings, run) == 0
    source, _ = real_images(run, run.config())
    part, _ = source.open()
    assert list(part.class_names) == json.loads(run.config_file.read_text())["data"]["class_names"]
    pixels, labels = fresh_images(part, 40)
    file = tmp_path / "real.npz"
    np.savez(file, arr_0=pixels.numpy(), labels=labels.numpy())
    found = evaluate(run, images=file)["results"]["images"]
    assert found["class_accuracy[smallcnn]"] == 1


def test_an_evaluator_is_cached_by_all_that_it_was_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(entry_of("folder"), "classifier_steps", 2)
    images = draw_classes(tmp_path / "images", count=2, images=60)
    real = RealImages(data=str(images), resolution=16)

    def files():
        smallcnn_of(*real.open(), "folder", cache=tmp_path / "cache")
        return {file.name for file in (tmp_path / "cache").glob("smallcnn-*")}

    first = files()
    assert files() == first
    # Neither of the first 64 images nor of another size.
    other = Image.fromarray(np.zeros((16, 16, 3), np.uint8))
    held = real.open()[0]._indices[64:].tolist()
    names = sorted(p for p in images.rglob("*.png"))
    other.save(names[held[-1]])
    assert len(files()) == 2
