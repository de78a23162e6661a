"""The VAE of latents: remembered, found again, and undone exactly on decoding."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from recipes.lab.console import UserError
from recipes.lab.data import folder as folder_module
from recipes.lab.data import images as images_module
from recipes.lab.data.datasets import load_dataset
from recipes.lab.data.latents import (
    CachedDataset,
    EncodedDataset,
    decode,
    differing_facts,
    load_vae,
    open_vae,
    vae_facts,
)
from tests.recipes.reliability import draw, make_vae
from tests.recipes.test_encode import encode


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return make_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for name in ("ant", "bee"):
        for number in range(3):
            draw(root / name / f"{number}.png", generator)
    return root


def changed(vae, folder, **fields):
    """A copy of the VAE with other fields in its config."""
    shutil.copytree(vae, folder)
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


PER_CHANNEL = {"latents_mean": [1.0, -2.0, 0.5, 9.0], "latents_std": [2.0, 0.5, 3.0, 0.1]}


@pytest.mark.parametrize(
    "fields", [{}, {"shift_factor": 0.7}, {"scaling_factor": 3.0}, PER_CHANNEL], ids=str
)
def test_decoding_undoes_what_training_sees(fields, vae, images, tmp_path):
    place = changed(vae, tmp_path / "vae", **fields)
    model = load_vae(place)
    dataset = EncodedDataset(load_dataset(str(images), resolution=16), model)
    cached = encode(images, tmp_path / "latents", place, dtype="fp32")
    indices = torch.arange(6)
    seen, _ = dataset.batch(indices)
    assert torch.allclose(seen, cached.batch(indices)[0], atol=1e-5)
    pictures = load_dataset(str(images), resolution=16).batch(indices)[0]
    raw = model.encode(pictures).latent_dist.mean
    expected = (raw - fields.get("shift_factor", 0)) * model.config["scaling_factor"]
    if "latents_mean" in fields:
        mean, deviation = (torch.tensor(values)[:, None, None] for values in fields.values())
        expected = (raw - mean) / deviation * model.config["scaling_factor"]
    assert torch.allclose(seen, expected, atol=1e-5)
    assert torch.allclose(decode(model, seen), model.decode(raw).sample, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "fragment"),
    [
        ({"latents_mean": [0.0] * 4}, "latents_std"),
        ({"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3}, "4 numbers"),
        ({"latents_mean": [0.0] * 4, "latents_std": [0.0] * 4}, "cannot be used"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0, 1.0, 1.0, float("nan")]}, "cannot be"),
        (PER_CHANNEL | {"shift_factor": 0.1}, "both"),
        ({"scaling_factor": 0}, "scaling_factor"),
        ({"scaling_factor": float("inf")}, "scaling_factor"),
        ({"shift_factor": float("nan")}, "shift_factor"),
        ({"bn_momentum": 0.1, "patch_size": 2}, "bn_momentum, patch_size"),
        ({"quantization_config": {"quant_method": "x"}}, "quantization_config"),
        ({"_class_name": "AutoencoderDC"}, "AutoencoderDC"),
        ({"_class_name": "AsymmetricAutoencoderKL"}, "AsymmetricAutoencoderKL"),
        ({"use_quant_conv": False}, "quant_conv"),
        ({"mid_block_add_attention": False}, "do not fit"),
        ({"latent_channels": 8}, "no VAE"),
        ({"out_channels": 1}, "no VAE"),
        ({"block_out_channels": "x"}, "no VAE"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_honoured_is_refused_by_name(fields, fragment, vae, tmp_path):
    with pytest.raises(UserError, match=fragment) as caught:
        load_vae(changed(vae, tmp_path / "vae", **fields))
    assert "\n" not in str(caught.value)


def test_weights_that_are_missing_are_not_drawn_at_random(vae, tmp_path):
    config = {**AutoencoderKL.load_config(vae), "use_quant_conv": False}
    AutoencoderKL.from_config(config).save_pretrained(tmp_path / "vae")
    assert load_vae(str(tmp_path / "vae")).quant_conv is None
    wrong = changed(tmp_path / "vae", tmp_path / "wrong", use_quant_conv=True)
    with pytest.raises(UserError, match=r"do not fit.*quant_conv"):
        load_vae(wrong)


def test_the_vae_of_a_run_is_found_again(vae, images, tmp_path, monkeypatch):
    folder = shutil.copytree(vae, tmp_path / "vae")
    monkeypatch.chdir(tmp_path)
    facts = vae_facts(load_vae("vae"))
    assert facts["place"] == str(folder)
    monkeypatch.chdir("/")
    assert vae_facts(open_vae(facts))["sha256"] == facts["sha256"]
    # Where it lies does not count.
    folder.rename(tmp_path / "moved")
    assert not differing_facts(facts, vae_facts(open_vae(facts, str(tmp_path / "moved"))))
    with pytest.raises(UserError, match=r"pass it with --vae FOLDER_OR_ID"):
        open_vae(facts)
    with pytest.raises(UserError, match=r"place was not noted: pass it with --vae"):
        open_vae({name: value for name, value in facts.items() if name != "place"})
    torch.manual_seed(1)
    other = AutoencoderKL.from_config(AutoencoderKL.load_config(vae))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=rf"{facts['sha256'][:16]}.*sha256 differ.*--vae"):
        open_vae(facts, str(tmp_path / "other"))
    rescaled = changed(vae, tmp_path / "rescaled", scaling_factor=3.0)
    with pytest.raises(UserError, match="scaling_factor differ"):
        open_vae(facts, rescaled)


def test_a_cache_remembers_what_was_encoded(vae, images, tmp_path):
    cached = encode(images, tmp_path / "latents", vae, class_count=1, class_seed=3)
    options = {"resolution": 16, "class_count": 1, "class_seed": 3}
    source = load_dataset(str(images), **options)
    assert cached.source == {
        "folder": str(images),
        "sha256": source.identity()["sha256"],
        **options,
    }
    manifest = json.loads((tmp_path / "latents" / "manifest.json").read_text())
    assert manifest["vae"]["place"] == vae
    # A cache from before this was noted is read as ever.
    del manifest["source"], manifest["vae"]["place"]
    (tmp_path / "latents" / "manifest.json").write_text(json.dumps(manifest))
    older = CachedDataset(tmp_path / "latents")
    assert older.source is None
    assert older.identity() == cached.identity()


def test_identities_go_by_content(vae, images, tmp_path):
    copy = shutil.copytree(images, tmp_path / "copy")

    def identity(folder=copy, **options):
        found = load_dataset(str(folder), resolution=16, **options).identity()
        assert json.loads(json.dumps(found)) == found
        return found

    first = identity()
    assert first == identity(images) and first["images"] == 6
    assert first["class_names"] == ["ant", "bee"] and first["hashed"] == "contents"
    assert identity(class_count=1) != first
    model = load_vae(vae)
    encoded = EncodedDataset(load_dataset(str(copy), resolution=16), model).identity()
    assert encoded["sha256"] != first["sha256"] and encoded["images"] == 6
    (copy / "bee" / "0.png").write_bytes((copy / "bee" / "1.png").read_bytes())
    changed = identity()
    assert changed["sha256"] != first["sha256"]
    (copy / "bee").rename(copy / "aaa")
    assert identity()["sha256"] != changed["sha256"]


@pytest.mark.parametrize("data", ["digits", "shapes"])
def test_built_in_sets_have_identities(data):
    first, test = load_dataset(data).identity(), load_dataset(data, split="test").identity()
    assert first == load_dataset(data, seed=5).identity() and first["sha256"] != test["sha256"]
    assert first["images"] == (1438 if data == "digits" else None)
    assert len(first["class_names"]) == 10 and json.dumps(first)


def test_large_folders_are_identified_by_the_ends_of_their_files(images, tmp_path, monkeypatch):
    whole = load_dataset(str(images), resolution=16).identity()
    for module in (folder_module, images_module):
        monkeypatch.setattr(module, "WHOLE_BYTES", 0)
    ends = load_dataset(str(images), resolution=16).identity()
    assert ends["hashed"] == "ends" and ends["sha256"] != whole["sha256"]
