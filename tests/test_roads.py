"""The roads of the pages, each walked end to end through its command lines, in tiny settings."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.commands import HEAVY, Commands
from tests.markdown_pages import ROOT, commands, named_code

ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
PYTEST = Path(pytest.__file__).with_name("__main__.py")
TINY = ("--steps", "2", "--batch-size", "4")
FEW = ("--samples", "20", "--steps", "2", "--batch-size", "10")
# What the pages print, and what stands for it here: another VAE, fewer pixels, images and steps.
SMALLER = {
    "stabilityai/sd-vae-ft-ema": "vae", "256": "8", "100000": "2", "5000": "20", "100": "20",
    "S": "tiny",
}  # fmt: skip
SHORTER = {
    "train": ("--steps", "2", "--batch-size", "4"),
    "sample": ("--steps", "2"),
    "evaluate": ("--steps", "2", "--batch-size", "10"),
    "compare": ("--seeds", "1", "--samples", "20", *TINY),
    "pytest": ("--resolutions", "128", "--widths", "96", "-k", "latency and layer and forward",
               "--benchmark-json", "out.json"),
}  # fmt: skip


@pytest.fixture(scope="module")
def recipes():
    started = Commands([*HEAVY, "recipes.studies.comparison.study", "pytest"], ENVIRONMENT)
    yield started
    started.close()


@pytest.fixture(scope="module")
def evaluators(tmp_path_factory):
    """What is trained to look at images, once for all roads over the same ones."""
    return tmp_path_factory.mktemp("evaluators")


@pytest.fixture
def walk(tmp_path, recipes, evaluators):
    """Runs one command line in the road's folder; it has to end well."""
    for name in ("", "runs"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / ".evaluators").symlink_to(evaluators)
    for name in ("comparison", "compare-mean"):  # refuses links
        shutil.copytree(evaluators, tmp_path / "runs" / name / ".evaluators")

    def step(script, *arguments):
        file = ROOT / "recipes" / f"{script}.py" if isinstance(script, str) else script
        status, written = recipes.run(file, *arguments, cwd=tmp_path)
        assert status == 0, f"{script} {arguments}\n{written}"
        return written

    return step


def class_folders(root, classes=2, images=40, pixels=8):
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
    walk("train", "--attn", "dydila", "--data", "pictures", "--resolution", "8", "--out", "run",
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
        sample_size=8,
    ).save_pretrained(tmp_path / "vae")
    return "vae"


@pytest.fixture
def follow(walk):
    """Runs a command line of a page, smaller and shorter."""

    def step(words):
        program, script, *words = [SMALLER.get(word, word) for word in words]
        if program == "pytest":
            more = SHORTER["pytest"] if script == "bench/" else ()
            place = ROOT / script if script == "bench/" else script
            return walk(PYTEST, "-q", "-p", "no:cacheprovider", place, *words, *more)
        assert program == "python", program
        return walk(ROOT / script, *words, *SHORTER.get(Path(script).stem, ()))

    return step


def test_own_data_from_a_folder_to_a_comparison(follow, walk, tmp_path, vae):
    """All commands of docs/own-data.md but the last, which tests/test_examples.py runs."""
    class_folders(tmp_path / "pictures")
    *lines, script = commands((ROOT / "docs" / "own-data.md").read_text("utf-8"))
    assert script[1] == "examples/own_data_256.py"
    names = [Path(words[1]).stem for words in lines]
    assert names == ["encode", "train", "sample", "evaluate", "read_results", "compare"]
    said = [follow(words) for words in lines]
    assert "FID[smallcnn]" in said[4]
    walk("figures", "runs/mine", "--out", "figures", "--per-class", "4")
    (picture,) = (tmp_path / "runs" / "mine" / "samples").glob("cfg-1.5-*.png")
    with Image.open(picture) as image:
        assert image.mode == "RGB"  # images, not the first channel of latents
    check_results(tmp_path / "runs" / "mine")
    assert any((tmp_path / "figures").iterdir())
    assert (tmp_path / "runs" / "comparison" / "report.html").stat().st_size > 1000


def test_own_mechanism(follow, tmp_path):
    """The files and commands of docs/write-a-mechanism.md."""
    page = (ROOT / "docs" / "write-a-mechanism.md").read_text("utf-8")
    files = named_code(page)
    assert list(files) == ["mean.py", "cross.py", "elu.py", "test_own.py"]
    for name, code in files.items():
        (tmp_path / name).write_text(code, "utf-8")
    lines = commands(page)
    assert [words[1] for words in lines] == [
        *(f"recipes/{name}.py" for name in ("train", "sample", "evaluate", "compare")),
        "bench/", "test_own.py",
    ]  # fmt: skip
    *recipes, suite, contract = lines
    for words in (*recipes, suite):
        follow(words)
    assert " passed" in follow(contract)
    check_results(tmp_path / "runs" / "mean")
    report = tmp_path / "runs" / "compare-mean" / "report.html"
    assert "mean" in report.read_text("utf-8")
    cases = json.loads((tmp_path / "out.json").read_text("utf-8"))["benchmarks"]
    assert {case["extra_info"]["mechanism"] for case in cases} == {"softmax", "mean"}
