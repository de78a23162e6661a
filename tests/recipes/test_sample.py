"""Sampling and judging a run."""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import attnzoo
from recipes import sample as sample_module
from recipes.lab import sampling
from recipes.lab.console import NON_FINITE, UserError
from recipes.lab.drawing.pictures import check_grid, save_grid
from recipes.lab.evaluation.evaluate import classify
from recipes.lab.sampling import RunSampler
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.session import train
from recipes.lab.training.settings import Settings
from tests.recipes.reliability import draw


def test_an_image_does_not_depend_on_the_batch_size(trained):
    labels = torch.arange(7)
    images = [
        RunSampler(trained)(labels, cfg=2.0, steps=8, batch_size=size) for size in (1, 3, 64)
    ]
    for other in images[1:]:
        torch.testing.assert_close(images[0], other, rtol=1e-4, atol=1e-4)
    again = RunSampler(trained)(labels[:4], cfg=2.0, steps=8)
    torch.testing.assert_close(again, images[0][:4], rtol=1e-4, atol=1e-4)


def test_the_seed_and_the_weights_matter(trained):
    labels = torch.arange(2)
    base = RunSampler(trained)(labels, steps=4)
    assert not torch.allclose(base, RunSampler(trained)(labels, steps=4, seed=1), atol=0.1)
    assert not torch.equal(base, RunSampler(trained, "model")(labels, steps=4))


def test_command_line_writes_one_column_per_class(trained, tmp_path, capsys):
    out = tmp_path / "grid.png"
    arguments = [str(trained.folder), "--classes", "0,1,2", "--cfg", "4.0", "--steps", "3"]
    assert sample_module.main([*arguments, "--per-class", "2", "--out", str(out)]) == 0
    assert Image.open(out).size == (3 * 66 + 2, 2 * 66 + 2)
    assert str(out) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--classes", "0,11"], "0..10"),
        (["--cfg", "nan"], "finite"),
        (["--cfg", "-inf"], "finite"),
        (["--steps", "1001"], "1 to 999"),
        (["--sampler", "euler-flow"], "v_prediction"),
        (["--classes", ","], "at least one class"),
        (["--cfg-channels", "2"], "1..1"),
        (["--out", "a.xyz"], "no picture's name"),
        (["--out", f"{__file__}/a.png"], "cannot write"),
        (["--per-class", "249", "--out", "a.webp"], "16436 pixels long, and a .webp holds 16383"),
        (["--per-class", "993", "--out", "a.JPG"], "65540 pixels long, and a .jpg holds 65500"),
        (["--per-class", "993", "--out", "a.gif"], "65540 pixels long, and a .gif holds 65535"),
        (["--device", "mps"], "backend; take cpu"),
    ],
)
def test_bad_input_is_one_clear_line(trained, arguments, fragment, monkeypatch):
    monkeypatch.setattr(sampling.RunSampler, "__call__", None)
    with pytest.raises(UserError, match=r".") as caught:
        sample_module.main([str(trained.folder), *arguments])
    assert fragment in str(caught.value)


def test_the_largest_grids_of_each_kind_of_file_are_written(tmp_path):
    for name, count in {"a.webp": 248, "a.jpg": 992, "a.gif": 992, "a.png": 1000}.items():
        check_grid(count, 1, 8, tmp_path / name)
        save_grid(torch.zeros(count, 1, 8, 8), tmp_path / name, 1)
        assert Image.open(tmp_path / name).size == (68, count * 66 + 2)


def test_the_command_that_a_run_ends_with_samples_a_single_class(tmp_path, capsys):
    draw(tmp_path / "images" / "ant" / "0.png", np.random.default_rng(0))
    settings = Settings(data=str(tmp_path / "images"), attn="sana", resolution=8, steps=1)
    run = Run(tmp_path / "run")
    for options in ({}, {"resume": True}):
        assert train(settings, run, **options) == 0
        said = capsys.readouterr().out
        [words] = re.findall("python recipes/sample.py (.*)", said)
        assert sample_module.main([*shlex.split(words), "--steps", "1"]) == 0


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(UserError, match=r"holds no run.*train\.py"):
        sample_module.main([str(tmp_path)])


def test_a_run_without_a_checkpoint_is_named(trained, tmp_path):
    run = Run(tmp_path / "run")
    run.create(trained.config(), overwrite=False)
    with pytest.raises(UserError, match="no whole checkpoint"):
        RunSampler(run)(torch.tensor([0]))


def test_the_classifier_knows_real_digits_and_counts_what_it_accepts(trained):
    result = classify(trained, samples=20)
    assert result == json.loads((trained.folder / "classifier.json").read_text())
    assert result["accuracy_on_real"] > 0.95
    assert result["samples"] == 20 and result["accepted"] < 15  # thirty steps draw no digits


def test_image_i_is_the_same_alone_or_among_others(trained):
    draw = RunSampler(trained)
    labels = torch.arange(6)
    together = draw(labels, steps=4)
    alone = draw(labels[4:5], torch.tensor([4]), steps=4)
    torch.testing.assert_close(alone[0], together[4], rtol=1e-4, atol=1e-4)


def test_images_that_are_not_finite_are_no_picture(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sampling.RunSampler, "__call__",
        lambda self, labels, **_: torch.full((len(labels), 1, 8, 8), float("nan")),
    )  # fmt: skip
    out = tmp_path / "grid.png"
    assert sample_module.main([str(trained.folder), "--out", str(out)]) == NON_FINITE
    said = capsys.readouterr().err
    assert "40 of 40 images are not finite" in said and "cfg" not in said and not out.exists()
    assert sample_module.main([str(trained.folder), "--out", str(out), "--cfg", "9"]) == NON_FINITE
    assert "--cfg 9 is too strong, or the model" in capsys.readouterr().err


def copy_of(trained, tmp_path):
    shutil.copytree(trained.folder, tmp_path / "run")
    run = Run(tmp_path / "run")
    return run, run.newest_checkpoint(print)[1] / "ema"


def test_only_what_the_manifest_lists_is_loaded(trained, tmp_path):
    wanted = sampling.read_checkpoint(trained)
    run, folder = copy_of(trained, tmp_path)
    other = {name: torch.zeros_like(z) for name, z in wanted.tensors.items()}
    save_file(other, folder / "other.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(other, "other.safetensors")}
    name = "diffusion_pytorch_model"
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index))
    torch.save(other, folder / f"{name}.bin")
    found = sampling.read_checkpoint(run)
    assert found.digest == wanted.digest
    loaded = RunSampler(run, device="cpu").model.state_dict()
    assert all(torch.equal(loaded[key], wanted.tensors[key]) for key in loaded)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attn": "mean"}, "'mean', which is not registered: pass .*--import"),
        ({"widgets": 3}, "option 'widgets'"),
        ({"depth": "nine"}, "'depth' is 'nine'"),
        ({"attn_options": {"widgets": 3}}, "widgets"),
    ],
)
def test_a_config_that_does_not_fit_is_named(trained, tmp_path, change, words):
    run, folder = copy_of(trained, tmp_path)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    manifest = json.loads((folder.parent / "manifest.json").read_text())
    content = file.read_bytes()
    manifest["files"]["ema/config.json"] = [len(content), hashlib.sha256(content).hexdigest()]
    (folder.parent / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises((UserError, attnzoo.InvalidType), match=words) as caught:
        RunSampler(run, device="cpu")
    assert "delete" not in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"data": []}, {"settings": None}, {"imports": []}, {"data": {"channels": "x"}}]
)
def test_a_damaged_configuration_is_one_line(trained, tmp_path, change):
    run, _ = copy_of(trained, tmp_path)
    run.config_file.write_text(json.dumps(json.loads(run.config_file.read_text()) | change))
    with pytest.raises(UserError, match="damaged"):
        RunSampler(run, device="cpu")


def test_a_mechanism_of_the_users_is_named_with_what_to_pass(trained, tmp_path):
    """A run remembers it, and nothing advises to delete what is whole."""
    run, _ = copy_of(trained, tmp_path)
    config = json.loads(run.config_file.read_text())
    config["imports"] = {"mean": {"source": str(tmp_path / "mean.py"), "sha256": "0"}}
    run.config_file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"attention 'mean'.*missing: pass .*--import"):
        RunSampler(run, device="cpu")
    (tmp_path / "mean.py").write_text("changed")
    with pytest.raises(UserError, match=r"has changed since: pass --import"):
        RunSampler(run, device="cpu")


def test_tqdm_can_be_disabled():
    code = (
        "from recipes.lab.console import progress_bar as bar;"
        "assert bar([1]).disable and bar([1], shown=False).disable"
    )
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.parametrize("impl", ["triton", "flash"])
def test_an_implementation_for_gpus_is_refused_on_a_cpu(trained, monkeypatch, impl):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    checkpoint = sampling.read_checkpoint(trained)
    config = {**checkpoint.config, "attn_options": {"impl": impl}}
    with pytest.raises(UserError, match=f"impl={impl}, which needs a GPU"):
        RunSampler(trained, device="cpu", checkpoint=checkpoint._replace(config=config))
