"""The paper's recipe to its end: latents are compared and drawn as the images they decode to."""

import numpy as np
import pytest
from PIL import Image

from recipes import compare as compare_module
from recipes import figures as figures_module
from recipes.lab.console import UserError
from recipes.lab.data import encoding
from recipes.lab.data.datasets import entry_of
from recipes.lab.drawing.drawn import Drawn
from recipes.lab.training.checkpoint import Run
from recipes.studies.comparison import execution, study
from recipes.studies.comparison.execution import run_one
from recipes.studies.comparison.tables import read_table
from tests.recipes.reliability import make_vae

COLORS = {"ant": (220, 30, 30), "bee": (30, 220, 30), "cät": (30, 30, 220)}
SMALL = ["--seeds", "1", "--steps", "3", "--batch-size", "4", "--samples", "12", "--cfg", "1",
         "--sampling-steps", "2"]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quick():
    """An evaluator of few steps, which only this process knows of."""
    patch = pytest.MonkeyPatch()
    patch.setattr(entry_of("folder"), "classifier_steps", 60)
    patch.setattr(execution, "locally", lambda *_: lambda folder, *_: run_one(folder))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def place(tmp_path_factory, quick):
    """Images of plain colors, a VAE, the latents of the one by the other, and a comparison."""
    root = tmp_path_factory.mktemp("latents")
    generator = np.random.default_rng(0)
    for name, color in COLORS.items():
        (root / "images" / name).mkdir(parents=True)
        for number in range(12):
            pixels = np.clip(generator.normal(color, 20, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / "images" / name / f"{number}.png")
    vae = make_vae(root / "vae")
    assert encoding.encode(root / "images", root / "latents", vae=vae, resolution=16) == 0
    arguments = ["--attn", "dydila", "--data", str(root / "latents") + "/", *SMALL]
    status = compare_module.main([*arguments, "--out", str(root / "out")])
    return root, status


def run_of(root):
    return Run(next((root / "out" / "runs").iterdir()) / "run")


def test_a_comparison_of_latents_measures_images(place):
    root, status = place
    frame = read_table(root / "out" / "runs.csv")
    assert status == 0, frame.error.tolist()
    assert frame.resolution.tolist() == [16] and frame.classes.tolist() == [3]
    assert np.isfinite(frame["FID[smallcnn]"]).all() and frame.macs[0] > 0
    page = (root / "out" / "report.html").read_text(encoding="utf-8")
    assert "latents 16 px" in page and "samples of dydila" in page
    config = run_of(root).config()
    assert config["data"]["latent"]["factor"] == 2 and config["data"]["resolution"] == 8


def test_the_figures_of_a_run_of_latents(place, tmp_path):
    root, _ = place
    run = run_of(root)
    names = ["projectors", "maps", "factors", "tsne"]
    arguments = [str(run.folder), "--only", ",".join(names), "--per-class", "2"]
    assert figures_module.main([*arguments, "--out", str(tmp_path)]) == 0
    for name in names:
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert np.asarray(picture.convert("L")).std() > 3
    drawn = Drawn(run, cfg=1.0, per_class=2)
    images, noisy, labels = drawn.noisy_images(100)
    assert images.shape[1:] == (3, 16, 16) and noisy.shape[1:] == (4, 8, 8)
    assert 0 < len(images) == len(noisy) == len(labels) < 100


@pytest.mark.parametrize(
    ("gone", "words"), [("images", "--real FOLDER"), ("vae", "--vae FOLDER_OR_ID")]
)
def test_what_is_missing_is_said_before_anything_runs(place, tmp_path, monkeypatch, gone, words):
    root, _ = place
    monkeypatch.setattr(study, "_run_missing", None)
    (root / gone).rename(root / "away")
    arguments = ["--attn", "sana", "--data", str(root / "latents"), *SMALL, "--out", str(tmp_path)]
    try:
        with pytest.raises(UserError, match=words):
            compare_module.main(arguments)
        option = {"images": "--real", "vae": "--vae"}[gone]
        assert compare_module.main([*arguments, option, str(root / "away"), "--dry-run"]) == 0
    finally:
        (root / "away").rename(root / gone)
    assert not list(tmp_path.iterdir())


def test_a_resolution_that_the_latents_do_not_have(place, tmp_path, capsys):
    root, _ = place
    arguments = ["--attn", "sana", *SMALL, "--dry-run", "--out", str(tmp_path), "--data"]
    with pytest.raises(UserError, match="of resolution 16"):
        compare_module.main([*arguments, f"{root / 'latents'}@32"])
    both = ["--resolutions", "8,16"]
    assert compare_module.main([*arguments, f"digits,{root / 'latents'}", *both]) == 0
    captured = capsys.readouterr()
    assert "at 8 px is left out" in captured.err and "latents" in captured.out
