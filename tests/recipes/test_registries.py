"""A data set and a metric of one's own: one entry each, and every part knows it."""

import json

import numpy as np
import pytest
import torch

from recipes.lab.console import UserError
from recipes.lab.data import datasets
from recipes.lab.data.datasets import ArrayDataset, load_dataset, register_dataset
from recipes.lab.evaluation.evaluate import evaluate, table
from recipes.lab.evaluation.scores import METRICS, is_lower_better, register_metric
from recipes.lab.evaluation.shards import Plan
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.session import train
from recipes.lab.training.settings import Settings


@pytest.fixture
def stripes(monkeypatch):
    """A data set of stripes, across or down, in three lines of the width of the image."""
    monkeypatch.setattr(datasets, "DATASETS", dict(datasets.DATASETS))
    monkeypatch.setattr(datasets, "_KINDS", dict(datasets._KINDS))

    @register_dataset("stripes")
    class Stripes(ArrayDataset):
        resolutions = (4, 8)
        default_resolution = 8
        class_names = ("across", "down")
        levels = ("easy", "faint")
        accuracy_floor = 0.9
        classifier_steps = 30

        def __init__(self, request):
            generator = np.random.default_rng(len(request.split))
            labels = np.arange(64) % 2
            pixels = generator.integers(0, 9, (64, 8, 8)).astype(np.uint8)
            pixels[labels == 0, ::2] += 7 if request.level == "easy" else 4
            pixels[labels == 1, :, ::2] += 7 if request.level == "easy" else 4
            self._hold(request, pixels, labels.astype(np.int64), white=16)

    return Stripes


@pytest.fixture
def brightness():
    """A metric: how far the mean logit of the images is from that of the real ones."""
    seen = []

    @register_metric("shift", "shift_abs", lower_is_better=True, needs={"images"}, fewest=3)
    def shift(found):
        ours, real = found.pair("pool")
        seen.append((len(ours), len(real)))
        value = (ours.mean() - real.mean()).item()
        return [value, abs(value)]

    yield seen
    del METRICS["shift"]


def test_a_data_set_is_one_entry(stripes):
    found = load_dataset("stripes", level="faint")
    assert len(found) == 64 and found.resolution == 8 and found.class_names == ("across", "down")
    for wrong in ({"resolution": 16}, {"level": "hard"}, {"class_count": 1}):
        with pytest.raises(UserError):
            load_dataset("stripes", **wrong)
    with pytest.raises(UserError, match="stripes"):
        load_dataset("stripe")


def test_both_go_through_training_and_evaluation(stripes, brightness, tmp_path):
    run = Run(tmp_path / "run")
    settings = Settings(attn="sana", data="stripes", level="faint", steps=3, batch_size=8)
    assert train(settings, run) == 0
    data = run.config()["data"]
    assert data["class_names"] == ["across", "down"] and data["identity"]["kind"] == "stripes"
    result = evaluate(run, plan=Plan(samples=12, steps=2))
    found = result["results"]["1"]
    assert abs(found["shift[smallcnn]"]) == found["shift_abs[smallcnn]"]
    assert "shift[smallcnn]" in result["real_floor"] and "shift[smallcnn]" in table(result)
    assert result["evaluator"]["accuracy_floor"] == 0.9
    assert brightness[0] == (12, 64) and is_lower_better("shift[smallcnn]")
    assert json.loads(run.metrics_file.read_text())["data"] == "stripes"


def test_too_few_images_for_it_are_a_reason(stripes, brightness, tmp_path):
    run = Run(tmp_path / "run")
    assert train(Settings(attn="sana", data="stripes", steps=1, batch_size=8), run) == 0
    pixels = np.zeros((2, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "two.npz", arr_0=pixels)
    result = evaluate(run, plan=Plan(samples=12, steps=1), reference=tmp_path / "two.npz")
    assert "needs more than 2 samples, got 2" in result["not_measured"]["1"]["shift[smallcnn]"]
    assert not brightness


def test_identity_is_by_content(stripes):
    one, other = load_dataset("stripes"), load_dataset("stripes", level="faint")
    assert one.identity()["sha256"] != other.identity()["sha256"]
    images, labels = one.batch(torch.arange(2))
    assert images.shape == (2, 1, 8, 8) and labels.tolist() == [0, 1]
