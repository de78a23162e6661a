"""The scripts in examples/ run as their docstrings print them, on tiny data."""

import json
import os

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from tests.commands import Commands
from tests.markdown_pages import ROOT

SIDE = 8


@pytest.fixture(scope="module")
def run():
    """Runs a script of the repository in a folder of its own; returns what it printed."""
    modules = ("attnzoo.testing", "diffusers", "pandas", "recipes.lab.evaluation.evaluate",
               "recipes.lab.sampling", "recipes.lab.training.session")  # fmt: skip
    started = Commands(modules, {**os.environ, "OMP_NUM_THREADS": "1"})

    def step(script, *arguments, cwd):
        status, written = started.run(ROOT / script, *arguments, cwd=cwd)
        assert status == 0, written
        return written

    yield step
    started.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, run):
    """What own_data_256.py makes of two classes of colored noise and an untrained VAE."""
    folder = tmp_path_factory.mktemp("own-data")
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=2,
        norm_num_groups=4,
        sample_size=SIDE,
    ).save_pretrained(folder / "vae")
    generator = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green")):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(12):
            pixels = generator.integers(0, 100, (SIDE, SIDE, 3), dtype=np.uint8)
            pixels[..., channel] += 150
            Image.fromarray(pixels).save(folder / "images" / name / f"{number}.png")
    tiny = {"resolution": SIDE, "size": "tiny", "steps": 3, "batch-size": 4, "samples": 10}
    flags = [word for name, value in tiny.items() for word in (f"--{name}", value)]
    printed = run("examples/own_data_256.py", "images", "--vae", "vae", *flags, cwd=folder)
    return folder / "own-data" / "run", printed


def test_own_data_goes_from_images_to_metrics(trained):
    run_folder, printed = trained
    steps = [line.split()[2] for line in printed.splitlines() if line.startswith("$ python")]
    assert steps == [f"recipes/{name}.py" for name in ("encode", "train", "sample", "evaluate")]
    with Image.open(next((run_folder / "samples").glob("cfg-1.5-*.png"))) as grid:
        assert grid.mode == "RGB"  # decoded, not the first channel of a latent
    metrics = json.loads((run_folder / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["results"]["1.5"]["count"] == 10
    assert metrics["resolution"] == SIDE


def test_results_of_a_run_are_read(trained, tmp_path, run):
    printed = run("examples/read_results.py", "--run", trained[0], cwd=tmp_path)
    assert "loss" in printed and "FID[smallcnn]" in printed and "real images" in printed


def test_the_published_benchmark_is_read(tmp_path, run):
    head, *rows = run("examples/read_results.py", cwd=tmp_path).strip().splitlines()
    assert head.split()[0] == "resolution" and "1024" in head
    assert {"softmax", "sana", "dydila"} <= {row.split()[0] for row in rows}


def test_own_mechanism_keeps_the_contract(tmp_path, run):
    printed = run("examples/own_mechanism.py", cwd=tmp_path)
    assert "check_macs: passed" in printed and "113,246,208" in printed


def test_own_mechanism_trains_by_its_file(tmp_path, run):
    flags = ["--attn", "cross-mean", "--import", ROOT / "examples" / "own_mechanism.py"]
    run("recipes/train.py", *flags, "--set", "gate=sigmoid", "--steps", 2, cwd=tmp_path)
    config = (tmp_path / "runs" / "digits-cross-mean" / "config.json").read_text(encoding="utf-8")
    assert json.loads(config)["settings"]["attn"] == "cross-mean"


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda s: s.stem)
def test_an_example_is_short_and_says_how_to_start_it(script):
    text = script.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    assert f"python examples/{script.name}" in text.split('"""')[1]
