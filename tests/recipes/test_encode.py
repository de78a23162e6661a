"""Latents: the cache equals encoding on the fly, resumes, and refuses what is not safe."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from recipes import encode as encode_module
from recipes import train as train_module
from recipes.lab.console import DATA_BUDGET, UserError
from recipes.lab.data.datasets import DataError
from recipes.lab.data.latents import CachedDataset, load_vae
from recipes.lab.files import sha256
from recipes.lab.training.build import load_training_data
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.settings import Settings
from recipes.lab.training.status import describe
from recipes.lab.training.trainer import Trainer
from recipes.train import train
from tests.recipes.reliability import draw, make_vae
from tests.recipes.test_checkpoint import Canary

COMMON = {"attn": "sana", "batch_size": 4, "steps": 4, "sample_every": 1000}


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return make_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """ImageNet's layout: splits, with class folders inside."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for name in ("ant", "bee", "cat", "dög"):
        for number in range(3):
            draw(root / "train" / name / f"{number}.png", generator)
        draw(root / "val" / name / "0.png", generator)
    return root


@pytest.fixture(scope="module")
def cache(images, vae, tmp_path_factory):
    """Latents in float32, in three shards."""
    folder = tmp_path_factory.mktemp("cache") / "latents"
    encode(images, folder, vae, dtype="fp32")
    return folder


def encode(images, folder, vae, **options):
    options = {"resolution": 16, "shard_size": 5, "batch_size": 2} | options
    assert encode_module.encode(images, folder, vae=vae, **options) == 0
    return CachedDataset(folder)


@pytest.fixture
def copy(cache, tmp_path):
    shutil.copytree(cache, tmp_path / "latents")
    return tmp_path / "latents"


def losses(run, **settings):
    assert train(Settings(**COMMON | settings), run) == 0
    return torch.tensor([entry["loss"] for entry in run.read_log()])


@pytest.mark.parametrize(("dtype", "limit"), [("fp32", 1e-5), ("fp16", 1e-4)])
def test_cached_latents_train_as_encoding_on_the_fly(dtype, limit, images, vae, tmp_path):
    encode(images, tmp_path / "latents", vae, dtype=dtype)
    cached = losses(Run(tmp_path / "cached"), data=str(tmp_path / "latents"))
    fresh = Run(tmp_path / "fresh")
    other = losses(fresh, data=str(images), vae=vae, resolution=16)
    assert (cached - other).abs().max() < limit
    seeded = losses(Run(tmp_path / "seed"), data=str(tmp_path / "latents"), seed=1)
    assert not torch.equal(cached, seeded)
    grid = Image.open(fresh.samples / "step-00000004.png")
    assert grid.size == (4 * 66 + 2, 2 * 66 + 2)  # decoded: 16 pixels, enlarged four times
    assert fresh.config()["data"]["latent"]["factor"] == 2
    assert fresh.config()["data"]["resolution"] == 8


def test_latents_are_the_posterior_scaled(cache, images, vae):
    dataset = CachedDataset(cache)
    assert len(dataset) == 12 and dataset.class_names == ("ant", "bee", "cat", "dög")
    settings = Settings(data=str(images), resolution=16)
    pictures, labels = load_training_data(settings).batch(torch.tensor([7]))
    model = load_vae(vae)
    for side, picture in enumerate((pictures, pictures.flip(-1))):
        expected = model.encode(picture).latent_dist
        noise = torch.full_like(expected.mean, 2.0)
        latents, label = dataset.draw(torch.tensor([7]), torch.tensor([bool(side)]), noise)
        wanted = (expected.mean + expected.std * 2) * model.config["scaling_factor"]
        assert torch.allclose(latents, wanted, atol=1e-5) and torch.equal(label, labels)


def test_only_what_is_missing_is_made_again(copy, images, vae, capsys):
    shards = sorted(copy.glob("*.safetensors"))
    assert len(shards) == 3
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in shards}
    shards[1].unlink()
    with pytest.raises(DataError, match=r"unfinished.*recipes/encode\.py again"):
        CachedDataset(copy)
    encode(images, copy, vae, dtype="fp32")
    assert shards[1].read_bytes() == before[shards[1]][0]
    for path in (shards[0], shards[2]):
        assert path.stat().st_mtime_ns == before[path][1]


@pytest.mark.parametrize("change", [{"resolution": 32}, {"dtype": "fp16"}, {"class_count": 2}])
def test_other_latents_in_the_folder_are_refused(copy, images, vae, change):
    with pytest.raises(UserError, match=f"{next(iter(change))}.* differ"):
        encode(images, copy, vae, **{"dtype": "fp32"} | change)


def test_classes_are_drawn_by_seed_and_listed(images, vae, tmp_path):
    drawn = [
        encode(images, tmp_path / f"{number}", vae, class_count=2, class_seed=seed).class_names
        for number, seed in enumerate((0, 0, 1, 2, 3))
    ]
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1
    assert all(len(names) == 2 and list(names) == sorted(names) for names in drawn)
    assert json.loads((tmp_path / "0" / "manifest.json").read_text())["class_names"]
    settings = Settings(data=str(images), resolution=16, class_count=2)
    assert load_training_data(settings).class_names == drawn[0]
    with pytest.raises(UserError, match="class count 5 is out of range"):
        encode(images, tmp_path / "many", vae, class_count=5)


def test_a_flipped_byte_is_named_and_keeps_the_last_checkpoint(copy, images, vae, tmp_path):
    victim = sorted(copy.glob("*.safetensors"))[2]
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    run = Run(tmp_path / "run")
    settings = Settings(**COMMON | {"batch_size": 1, "checkpoint_every": 1}, data=str(copy))
    with pytest.raises(UserError, match=rf"{victim.name}.*is damaged"):
        train(settings, run)
    assert "failed" in describe(run) and victim.name in describe(run)
    found = run.newest_checkpoint(warn=pytest.fail)
    assert (found[0] if found else 0) == len(run.read_log())
    # Encoding again repairs the shard, and the run goes on.
    encode(images, copy, vae, dtype="fp32")
    assert victim.read_bytes() == whole
    assert train(settings, run, resume=True) == 0


def test_unreadable_images_are_counted_against_a_budget(images, vae, tmp_path, capsys):
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images" / "train" / "ant" / "0.png").write_bytes(b"<html>")
    arguments = [str(tmp_path / "images"), str(tmp_path / "out"), "--vae", vae]
    arguments += ["--resolution", "16"]
    assert encode_module.main(arguments) == DATA_BUDGET
    said = capsys.readouterr().out
    assert "ant/0.png" in said and "--skip-bad 1" in said
    assert encode_module.main([*arguments, "--skip-bad", "1"]) == 0
    assert len(CachedDataset(tmp_path / "out")) == 11


def test_a_malicious_vae_is_not_executed(vae, images, tmp_path):
    trace, folder = tmp_path / "executed", tmp_path / "vae"
    shutil.copytree(vae, folder)
    weights = folder / "diffusion_pytorch_model.safetensors"
    torch.save({"x": Canary(trace)}, folder / "diffusion_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(DataError, match="no VAE with safetensors"):
        load_vae(str(folder))
    for evil in (
        pickle.dumps(Canary(trace)),
        (folder / "diffusion_pytorch_model.bin").read_bytes(),
    ):
        weights.write_bytes(evil)
        with pytest.raises(DataError, match="no VAE with safetensors"):
            load_vae(str(folder))
    with pytest.raises(UserError, match="no VAE with safetensors"):
        encode(images, tmp_path / "out", str(folder))
    assert not trace.exists()


def test_malicious_latents_are_not_executed(copy, images, vae, tmp_path):
    trace = tmp_path / "executed"
    victim = sorted(copy.glob("*.safetensors"))[0]
    victim.write_bytes(pickle.dumps(Canary(trace)))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["shards"][0] |= {"bytes": victim.stat().st_size, "sha256": sha256(victim)}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="cannot be read"):
        train(Settings(**COMMON, data=str(copy)), Run(tmp_path / "run"))
    with pytest.raises(UserError, match=victim.name):
        encode(images, copy, vae, dtype="fp32")
    manifest["shards"][0]["file"] = "../plan.json"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="outside"):
        CachedDataset(copy)
    assert not trace.exists()


def test_the_papers_recipe_trains_on_latents(cache, tmp_path):
    run = Run(tmp_path / "run")
    arguments = ["--preset", "dit", "--data", str(cache), "--size", "tiny", "--steps", "2"]
    arguments += ["--batch-size", "4", "--diagnose-every", "1", "--out", str(run.folder)]
    assert train_module.main(arguments) == 0
    settings = run.config()["settings"]
    assert settings["precision"] == "bf16" and settings["ema_decay"] == 0.9999
    entry = run.read_log()[-1]
    assert entry["vb"] > 0 and entry["blocks"]["0"]["gamma"]
    assert any(name.startswith("mse_quarter") for name in entry)
    trainer = Trainer(Settings(**settings))
    assert {tensor.dtype for tensor in trainer.average.shadow.values()} == {
        torch.float32,
        torch.int64,
    }
    assert trainer.optimizer.param_groups[0]["weight_decay"] == 0


def test_settings_that_do_not_fit_the_latents_are_refused(cache, vae, tmp_path):
    for wrong, fragment in (({"resolution": 64}, "64"), ({"class_count": 3}, "class-count")):
        with pytest.raises(UserError, match=fragment):
            train(Settings(**COMMON, data=str(cache), **wrong), Run(tmp_path / "run"))
    with pytest.raises(UserError, match="takes 3 channels"):
        train(Settings(**COMMON, data="digits", vae=vae, resolution=8), Run(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
