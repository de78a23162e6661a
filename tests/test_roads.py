"""The roads of the README, each walked end to end through its command lines, in tiny settings."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.commands import Commands

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
TINY = ("--steps", "2", "--batch-size", "4")
FEW = ("--samples", "20", "--steps", "2", "--batch-size", "10")
OWN = """
import attnzoo
import torch.nn as nn


@attnzoo.register_attention("mean")
class MeanAttention(attnzoo.Attention):
    def __init__(self, context, config):
        super().__init__(context, config)
        self.value = nn.Linear(self.dim, self.dim)

    def forward(self, x, grid):
        self.check_tokens(x, grid)
        return self.value(x).mean(1, keepdim=True).expand_as(x)
"""


@pytest.fixture(scope="module")
def commands():
    scripts = ("encode", "train", "sample", "evaluate", "figures", "compare")
    started = Commands([f"recipes.{name}" for name in scripts], ENVIRONMENT)
    yield started
    started.close()


@pytest.fixture(scope="module")
def evaluators(tmp_path_factory):
    """What the runs of all roads are measured with, trained by whoever comes first."""
    return tmp_path_factory.mktemp("evaluators")


@pytest.fixture
def walk(tmp_path, commands, evaluators):
    """Runs one command line in the road's folder; it has to end well."""
    (tmp_path / ".evaluators").symlink_to(evaluators)

    def step(script, *arguments):
        status, written = commands.run(ROOT / "recipes" / f"{script}.py", *arguments, cwd=tmp_path)
        assert status == 0, f"{script} {arguments}\n{written}"
        return written

    return step


def class_folders(root, classes=2, images=40, pixels=16):
    """Noise by class, dark and bright: the evaluator has to tell real classes apart."""
    generator = np.random.default_rng(0)
    for name in range(classes):
        (root / f"class {name}").mkdir(parents=True)
        for number in range(images):
            low = 128 * name
            noise = generator.integers(low, low + 128, (pixels, pixels, 3), dtype=np.uint8)
            Image.fromarray(noise).save(root / f"class {name}" / f"{number}.png")
    return root


def check_results(run):
    """The metrics of a run are there, and are numbers."""
    metrics = json.loads((run / "metrics.json").read_text("utf-8"))
    assert metrics["results"], metrics
    assert np.isfinite(json.loads((run / "status.json").read_text("utf-8"))["step"])


def check_picture(path):
    with Image.open(path) as picture:
        assert min(picture.size) > 8 and np.asarray(picture).std() > 0


def test_digits(walk, tmp_path):
    walk("train", "--attn", "sana", "--out", "run", *TINY)
    walk("sample", "run", "--classes", "0,1,2", "--cfg", "4.0", "--steps", "2", "--out", "s.png")
    walk("evaluate", "run", *FEW)
    check_picture(tmp_path / "s.png")
    check_results(tmp_path / "run")


def test_own_images(walk, tmp_path):
    class_folders(tmp_path / "pictures")
    walk("train", "--attn", "dydila", "--data", "pictures", "--resolution", "16", "--out", "run",
         *TINY)  # fmt: skip
    walk("sample", "run", "--classes", "0,1", "--steps", "2", "--out", "s.png")
    walk("evaluate", "run", *FEW)
    check_picture(tmp_path / "s.png")
    check_results(tmp_path / "run")


@pytest.fixture
def vae(tmp_path):
    """A saved VAE with two channels, width 8, and one halving."""
    from diffusers import AutoencoderKL

    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=2,
        norm_num_groups=4,
        sample_size=16,
    ).save_pretrained(tmp_path / "vae")
    return "vae"


def test_from_encoding_to_a_comparison(walk, tmp_path, vae):
    class_folders(tmp_path / "pictures")
    walk("encode", "pictures", "latents", "--vae", vae, "--resolution", "16")
    walk("train", "--attn", "sana", "--data", "latents", "--out", "run", *TINY)
    walk("sample", "run", "--classes", "0,1", "--steps", "2", "--out", "s.png")
    walk("evaluate", "run", *FEW)
    walk("figures", "run", "--out", "figures", "--per-class", "4")
    walk("compare", "--attn", "softmax,sana", "--data", "latents", "--seeds", "1", "--samples",
         "20", "--out", "comparison", *TINY)  # fmt: skip
    with Image.open(tmp_path / "s.png") as picture:
        assert picture.mode == "RGB"  # images, not the first channel of latents
    check_results(tmp_path / "run")
    assert any((tmp_path / "figures").iterdir())
    assert (tmp_path / "comparison" / "report.html").stat().st_size > 1000


def test_own_mechanism(walk, tmp_path):
    (tmp_path / "mean.py").write_text(OWN, "utf-8")
    walk("train", "--import", "mean.py", "--attn", "mean", "--out", "run", *TINY)
    walk("sample", "run", "--classes", "0", "--steps", "2", "--out", "s.png")
    walk("evaluate", "run", *FEW)
    walk("compare", "--import", "mean.py", "--attn", "softmax,mean", "--data", "digits", "--seeds",
         "1", "--samples", "20", "--out", "comparison", *TINY)  # fmt: skip
    suite = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "bench"),
         "--import", "mean.py", "--mechanisms", "mean", "--resolutions", "128", "--widths", "96",
         "-k", "latency and layer and forward", "--benchmark-json", "out.json"],
        cwd=tmp_path, env=ENVIRONMENT, text=True, capture_output=True, timeout=300,
    )  # fmt: skip
    assert suite.returncode == 0, suite.stdout + suite.stderr
    check_results(tmp_path / "run")
    assert "mean" in (tmp_path / "comparison" / "report.html").read_text("utf-8")
    (case,) = json.loads((tmp_path / "out.json").read_text("utf-8"))["benchmarks"]
    assert case["extra_info"]["mechanism"] == "mean"
