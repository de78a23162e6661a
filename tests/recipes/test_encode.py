"""Latents: the cache equals encoding on the fly, resumes, and refuses what is not safe."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from recipes import encode as encode_script
from recipes import train as train_module
from recipes.lab.console import DATA_BUDGET, UserError
from recipes.lab.data import encoding
from recipes.lab.data.datasets import DataError, load_dataset
from recipes.lab.data.latents import CachedDataset, load_vae
from recipes.lab.files import locked, sha256
from recipes.lab.training.build import load_training_data
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.session import train
from recipes.lab.training.settings import Settings
from recipes.lab.training.status import describe
from recipes.lab.training.trainer import Trainer
from tests.recipes.reliability import ROOT, draw, make_vae
from tests.recipes.test_checkpoint import Canary

SCRIPT = ROOT / "recipes" / "encode.py"
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
    assert encoding.encode(images, folder, vae=vae, **options) == 0
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


@pytest.mark.parametrize("noted", [True, False], ids=["noted", "of before"])
@pytest.mark.parametrize("named", ["dtype", "resolution", "vae", "crop", "images"])
def test_shards_of_two_encodings_are_not_mixed(copy, images, vae, tmp_path, named, noted):
    if not noted and named in ("vae", "crop"):
        return  # which only a note tells
    options = {"dtype": {"dtype": "fp16"}, "resolution": {"resolution": 32}}.get(named, {})
    if named == "vae":
        vae_of_other = AutoencoderKL.from_pretrained(vae)
        vae_of_other.encoder.conv_out.bias.data += 1
        vae_of_other.save_pretrained(tmp_path / "vae")
    if named == "images":
        images_of_other = shutil.copytree(images, tmp_path / "images")
        (images_of_other / "train/bee/2.png").rename(images_of_other / "train/bee/20.png")
    encode(
        tmp_path / "images" if named == "images" else images, tmp_path / "other",
        str(tmp_path / "vae") if named == "vae" else vae, **{"dtype": "fp32"} | options,
    )  # fmt: skip
    victim = copy / "latents-000001.safetensors"
    shutil.copy(tmp_path / "other" / victim.name, victim)
    with safe_open(victim, framework="pt") as file:
        made = json.loads(file.metadata()["made"])
    if not noted:
        del made["encoding"]
    if named == "crop":
        made["encoding"]["crop"] = "none"
    save_file(load_file(victim), victim, metadata={"made": json.dumps(made)})
    (copy / "manifest.json").unlink()

    def held():
        return {path: path.read_bytes() for path in copy.glob("[!.]*")}

    before = held()
    with pytest.raises(UserError, match=rf"{victim.name}.*\({named}.* differ\): move it"):
        encode(images, copy, vae, dtype="fp32")
    assert held() == before
    victim.unlink()
    encode(images, copy, vae, dtype="fp32")


@pytest.mark.parametrize("made", ["[]", '{"bad": {}, "contents": [3]}'])
def test_a_shard_that_says_nonsense_is_made_again(cache, copy, images, vae, made, capsys):
    victim = copy / "latents-000001.safetensors"
    save_file(load_file(victim), victim, metadata={"made": made})
    (copy / "manifest.json").unlink()
    encode(images, copy, vae, dtype="fp32")
    assert "made again" in capsys.readouterr().out
    assert victim.read_bytes() == (cache / victim.name).read_bytes()


def test_shards_are_alike_wherever_their_vae_lies(cache, images, vae, tmp_path):
    encode(images, tmp_path / "out", str(shutil.copytree(vae, tmp_path / "vae")), dtype="fp32")
    for shard in cache.glob("*.safetensors"):
        assert (tmp_path / "out" / shard.name).read_bytes() == shard.read_bytes()


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
    assert encode_script.main(arguments) == DATA_BUDGET
    said = capsys.readouterr().out
    assert "ant/0.png" in said and "1 of 12 images" in said and "--skip-bad 1" in said
    assert encode_script.main([*arguments, "--skip-bad", "1"]) == 0
    assert len(CachedDataset(tmp_path / "out")) == 11
    (tmp_path / "images" / "train" / "ant" / "raw.cr2").write_bytes(b"")
    assert encode_script.main([*arguments, "--skip-bad", "1"]) == DATA_BUDGET
    assert "2 of 13 images" in capsys.readouterr().out  # of those that were left out at once too


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
    shutil.copy(Path(vae) / weights.name, weights)
    state = load_file(weights)
    for place in ("diffusion_pytorch_model.bin", "../evil.safetensors", 3):
        index = {"metadata": {}, "weight_map": dict.fromkeys(state, place)}
        (folder / f"{weights.name}.index.json").write_text(json.dumps(index))
        with pytest.raises(DataError, match="other than safetensors files beside"):
            load_vae(str(folder))
    (folder / f"{weights.name}.index.json").unlink()
    weights.unlink()
    with pytest.raises(UserError, match="no VAE with safetensors"):
        encode(images, tmp_path / "out", str(folder))
    assert not trace.exists()


def test_malicious_latents_are_not_executed(copy, images, vae, tmp_path):
    trace = tmp_path / "executed"
    victim = sorted(copy.glob("*.safetensors"))[0]
    victim.write_bytes(pickle.dumps(Canary(trace)).ljust(100_000, b"\0"))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["shards"][0] |= {"bytes": victim.stat().st_size, "sha256": sha256(victim)}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="cannot be read"):
        train(Settings(**COMMON, data=str(copy)), Run(tmp_path / "run"))
    assert len(encode(images, copy, vae, dtype="fp32")) == 12
    assert not trace.exists()


HUGE = 10**18


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (lambda m: [], "the manifest is"),
        (lambda m: None, "the manifest is"),
        (lambda m: m | {"shards": []}, "no images"),
        (lambda m: m | {"shards": {}}, "shards is"),
        (lambda m: m | {"shards": [1]}, "an entry of shards is"),
        (lambda m: m | {"shards": m["shards"] * 2}, "listed twice"),
        (lambda m: m | {"class_names": "ab"}, "class_names"),
        (lambda m: m | {"class_names": []}, "no classes"),
        (lambda m: m | {"class_names": [1]}, "an entry of class_names is"),
        (lambda m: m | {"resolution": 17}, "no multiple"),
        (lambda m: m | {"resolution": "16"}, "resolution"),
        (lambda m: m | {"resolution": HUGE}, "cannot hold"),
        (lambda m: m | {"vae": None}, "vae is"),
        (lambda m: m | {"vae": m["vae"] | {"channels": -1}}, "channels"),
        (lambda m: m | {"vae": m["vae"] | {"factor": 0}}, "factor"),
        (lambda m: m | {"vae": m["vae"] | {"scaling_factor": "x"}}, "scaling_factor"),
        (lambda m: m | {"vae": m["vae"] | {"latents_mean": [1.0]}}, "latents_mean"),
        (lambda m: m | {"source": "x"}, "source"),
        (lambda m: {"name": "x"}, "no 'vae'"),
    ],
)
def test_a_manifest_that_is_not_sound_is_refused_in_one_line(copy, change, fragment):
    file = copy / "manifest.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(DataError, match=f"{fragment}.*recipes/encode.py again") as caught:
        CachedDataset(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "shard",
    [
        {"count": HUGE},
        {"count": -1},
        {"count": 1.5},
        {"count": True},
        {"file": "../plan.json"},
        {"file": "/etc/hostname"},
        {"file": ".."},
        {"file": ""},
        {"file": "a\0b"},
        {"file": 7},
        {"file": "none.safetensors"},
        {"bytes": 0},
        {"sha256": None},
    ],
    ids=str,
)
def test_a_shard_that_is_not_sound_is_refused_in_one_line(copy, shard):
    file = copy / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["shards"][0] |= shard
    file.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"damaged or unfinished"):
        CachedDataset(copy)


@pytest.mark.parametrize(
    ("wrong", "fragment"),
    [
        (lambda t: t | {"mean": t["mean"][:, :1].contiguous()}, "mean is"),
        (lambda t: t | {"logvar": t["logvar"][..., :4].contiguous()}, "logvar is"),
        (lambda t: t | {"label": t["label"] + 9}, "labels"),
        (lambda t: t | {"label": t["label"] - 9}, "labels"),
        (lambda t: t | {"label": t["label"].float()}, "labels"),
        (lambda t: {"mean": t["mean"], "label": t["label"]}, "logvar"),
        (lambda t: t | {"mean": t["mean"] * float("inf")}, "not finite.*--dtype fp32"),
        (lambda t: t | {"logvar": t["logvar"] * float("nan")}, "not finite"),
    ],
)
def test_tensors_that_are_not_sound_are_refused_when_touched(copy, wrong, fragment):
    victim = sorted(copy.glob("*.safetensors"))[0]
    # Room for the bound on counts, so that the tensors themselves are looked at.
    save_file(wrong(load_file(victim)) | {"pad": torch.zeros(10_000)}, victim)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["shards"][0] |= {"bytes": victim.stat().st_size, "sha256": sha256(victim)}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=fragment):
        CachedDataset(copy).batch(torch.arange(2))


def test_a_cache_from_before_contents_were_noted_is_read(copy):
    expected = CachedDataset(copy).batch(torch.arange(12))
    manifest = json.loads((copy / "manifest.json").read_text())
    for shard in manifest["shards"]:
        path = copy / shard["file"]
        save_file(load_file(path), path, metadata={"bad": "{}"})
        shard |= {"bytes": path.stat().st_size, "sha256": sha256(path)}
    del manifest["source"], manifest["vae"]["place"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    found = CachedDataset(copy).batch(torch.arange(12))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_an_image_that_changed_is_encoded_again(images, vae, tmp_path, capsys):
    source = shutil.copytree(images, tmp_path / "images")
    encode(source, tmp_path / "out", vae, dtype="fp32")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    before = [path.stat().st_mtime_ns for path in shards]
    victim = source / "train" / "bee" / "2.png"  # in the second shard
    status, size = victim.stat(), victim.stat().st_size
    shutil.copy(source / "val" / "cat" / "0.png", victim)
    # Neither the size nor the time may hide it.
    content = victim.read_bytes()
    victim.write_bytes(content[:size] if len(content) > size else content.ljust(size, b"\0"))
    os.utime(victim, ns=(status.st_atime_ns, status.st_mtime_ns))
    capsys.readouterr()
    cached = encode(source, tmp_path / "out", vae, dtype="fp32", skip_bad=1)
    after = [path.stat().st_mtime_ns for path in shards]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]
    said = capsys.readouterr().out
    assert "changed" in said and shards[1].name in said and shards[0].name not in said
    options = {"resolution": 16, "seed": 0}
    assert cached.source["sha256"] == load_dataset(str(source), **options).identity()["sha256"]
    fresh = encode(source, tmp_path / "fresh", vae, dtype="fp32", skip_bad=1)
    assert torch.equal(cached.batch(torch.arange(11))[0], fresh.batch(torch.arange(11))[0])
    # Nothing changed: nothing is made, wherever the images lie now.
    source.rename(tmp_path / "moved")
    encode(tmp_path / "moved", tmp_path / "out", vae, dtype="fp32", skip_bad=1)
    assert after == [path.stat().st_mtime_ns for path in shards]


def shifted_vae(vae, folder, channel_bias, scale=1.0):
    """A VAE whose means lie around a number, and vary by about ``scale``."""
    model = load_vae(vae)
    with torch.no_grad():
        model.quant_conv.weight[:4] *= scale
        model.quant_conv.bias[:4] += channel_bias
        model.quant_conv.weight[4:] = 0
        model.quant_conv.bias[4:] = -30  # the spread is the means' alone
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("bias", "scale"), [(1e6, 1.0), (-1e5, 1.0), (6e4, 1.0), (3000.0, 1.0), (0.0, 1e-9)]
)
def test_latents_that_do_not_fit_the_type_are_refused(bias, scale, images, vae, tmp_path):
    place = shifted_vae(vae, tmp_path / "vae", bias, scale)
    with pytest.raises(UserError, match=r"do not fit fp16.*--dtype fp32"):
        encode(images, tmp_path / "out", place)
    with pytest.raises(DataError, match="unfinished"):
        CachedDataset(tmp_path / "out")
    latents, _ = encode(images, tmp_path / "full", place, dtype="fp32").batch(torch.arange(12))
    assert latents.isfinite().all()


def test_a_vae_that_overflows_is_refused(images, vae, tmp_path):
    place = shifted_vae(vae, tmp_path / "vae", float("inf"))
    with pytest.raises(UserError, match="not finite"):
        encode(images, tmp_path / "out", place, dtype="fp32")
    settings = Settings(**COMMON, data=str(images), vae=place, resolution=16)
    with pytest.raises(UserError, match="not finite"):
        load_training_data(settings, load_vae(place)).batch(torch.arange(2))


def test_two_writers_of_one_folder(images, vae, tmp_path, commands):
    arguments = [images, tmp_path / "out", "--vae", vae, "--resolution", 16, "--shard-size", 1]
    files = [tmp_path / "one", tmp_path / "other"]
    writers = [commands.start(SCRIPT, *arguments, cwd=tmp_path, to=file) for file in files]
    codes = [commands.wait(writer) for writer in writers]
    assert sorted(codes) in ([0, 0], [0, 2])
    for code, file in zip(codes, files, strict=True):
        said = file.read_text()
        assert "Traceback" not in said
        if code:
            assert "is being written to by process" in said.splitlines()[-1]
    assert len(CachedDataset(tmp_path / "out")) == 12


def test_a_folder_that_is_being_written_is_refused(copy, images, vae):
    before = {path.name: path.stat().st_mtime_ns for path in copy.glob("[!.]*")}
    with locked(copy / ".lock"), pytest.raises(UserError, match="being written to by process"):
        encode(images, copy, vae, dtype="fp32")
    assert len(before) == 5
    assert before == {path.name: path.stat().st_mtime_ns for path in copy.glob("[!.]*")}


ALL = ["--resolution", 16, "--shard-size", 5, "--batch-size", 2, "--dtype", "fp32"]


def test_the_locale_does_not_count(images, vae, cache, tmp_path, commands):
    out = tmp_path / "l\u00e4tents"
    status, said = commands.run(SCRIPT, images, out, "--vae", vae, *ALL, cwd=tmp_path)
    assert status == 0, said
    assert CachedDataset(out).identity() == CachedDataset(cache).identity()
    assert CachedDataset(out).class_names == ("ant", "bee", "cat", "d\u00f6g")


IMPATIENT = """
import sys, time
from datetime import timedelta
from torch.distributed import distributed_c10d
from recipes.encode import main
from recipes.lab.console import run_script
from recipes.lab.data import encoding

def slow(shard, *arguments):
    time.sleep(4 if shard.path.name.endswith("2.safetensors") else 0)
    write(shard, *arguments)

distributed_c10d.default_pg_timeout = timedelta(seconds=1)
write, encoding._Shard.write = encoding._Shard.write, slow
run_script(main)
"""


def test_a_process_waits_for_another_that_has_a_shard_more(images, vae, tmp_path, commands):
    (tmp_path / "impatient.py").write_text(IMPATIENT)
    flags = [images, "out", "--vae", vae, *ALL]
    status, said = commands.launch(2, tmp_path / "impatient.py", *flags, cwd=tmp_path)
    assert status == 0, said


def test_several_processes_share_the_shards(images, vae, cache, tmp_path, commands):
    out = tmp_path / "out"
    status, said = commands.launch(2, SCRIPT, images, out, "--vae", vae, *ALL, cwd=tmp_path)
    assert status == 0, said
    assert CachedDataset(out).identity() == CachedDataset(cache).identity()


def test_interrupted_it_goes_on(images, vae, tmp_path, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    write, calls = encoding._Shard.write, []

    def second_fails(self, *arguments):
        calls.append(self.path)
        if len(calls) == 2:
            monkeypatch.setattr(encoding, "save_tensors", interrupt)
        write(self, *arguments)

    monkeypatch.setattr(encoding._Shard, "write", second_fails)
    with pytest.raises(KeyboardInterrupt):
        encode(images, out, vae)
    assert sorted(path.name for path in out.iterdir()) == [
        ".lock", "latents-000000.safetensors", "plan.json",
    ]  # fmt: skip
    monkeypatch.undo()
    (out / ".tmp-1-abc-latents-000001.safetensors").write_bytes(b"of a killed process")
    first = (out / "latents-000000.safetensors").stat().st_mtime_ns
    assert len(encode(images, out, vae)) == 12
    assert (out / "latents-000000.safetensors").stat().st_mtime_ns == first
    assert not list(out.glob(".tmp-*"))


def test_a_full_disk_is_one_line_and_goes_on(images, vae, tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(encoding, "save_tensors", full)
    with pytest.raises(UserError, match="No space left"):
        encode(images, tmp_path / "out", vae)
    assert not list((tmp_path / "out").glob(".tmp-*"))
    monkeypatch.undo()
    assert len(encode(images, tmp_path / "out", vae)) == 12


def test_places_that_cannot_be_written_are_refused_before_the_vae_is_loaded(
    images, vae, tmp_path, monkeypatch
):
    monkeypatch.setattr(encoding, "load_vae", lambda *arguments: pytest.fail("too late"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        encode(images, tmp_path / "file", vae)
    with pytest.raises(UserError, match="cannot write"):
        encode(images, tmp_path / "file" / "below", vae)
    with pytest.raises(UserError, match="holds other files"):
        encode(images, images, vae)
    with pytest.raises(UserError, match="no folder"):
        encode(tmp_path / "none", tmp_path / "out", vae)
    with pytest.raises(UserError, match="too large"):
        encode(images, tmp_path / "out", vae, resolution=10**6)
    with pytest.raises(UserError, match="class count 5"):
        encode(images, tmp_path / "out", vae, class_count=5)
    with pytest.raises(UserError, match=r"2\*\*64"):
        encode(images, tmp_path / "out", vae, class_seed=2**64)
    assert not (tmp_path / "out").exists()


def test_links_in_the_folder_are_not_followed(copy, images, vae, tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    for name in ("manifest.json", "plan.json", "latents-000001.safetensors"):
        content = (copy / name).read_bytes()
        (copy / name).unlink()
        if name == "plan.json":
            victim.write_bytes(content)
        (copy / name).symlink_to(victim)
        wanted = victim.read_bytes()
        encode(images, copy, vae, dtype="fp32")
        assert victim.read_bytes() == wanted and not (copy / name).is_symlink()
    (copy / ".tmp-x").symlink_to(victim)
    encode(images, copy, vae, dtype="fp32")
    assert victim.exists() and not (copy / ".tmp-x").is_symlink()
    (copy / ".lock").unlink()
    (copy / ".lock").symlink_to(victim)
    with pytest.raises(UserError, match=r"cannot write.*\.lock"):
        encode(images, copy, vae, dtype="fp32")
    assert victim.read_bytes() == wanted


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", '{"vae": 3}', '{"vae": {}}'])
def test_a_damaged_plan_is_refused_in_one_line(copy, images, vae, content):
    (copy / "plan.json").write_text(content)
    with pytest.raises(UserError, match=r"plan|made otherwise") as caught:
        encode(images, copy, vae, dtype="fp32")
    assert "\n" not in str(caught.value)


def test_a_class_without_images_is_not_encoded_away(images, vae, tmp_path):
    source = shutil.copytree(images / "train", tmp_path / "images")
    (source / "aaa").mkdir()
    with pytest.raises(UserError, match=r"aaa.*no usable image"):
        encode(source, tmp_path / "out", vae)
    (source / "aaa" / "bad.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"aaa.*no usable image"):
        encode(source, tmp_path / "out", vae, skip_bad=1)


def test_a_relative_folder_is_one_setting_from_everywhere(images, tmp_path, monkeypatch):
    shutil.copytree(images / "train", tmp_path / "d5")
    monkeypatch.chdir(tmp_path)
    flags = ["--attn", "sana", "--batch-size", "4", "--resolution", "16", "--out"]
    out = tmp_path / "run"
    arguments = [*flags, str(out), "--steps", "1"]
    assert train_module.main(["--data", "d5", *arguments]) == 0
    assert Run(out).config()["settings"]["data"] == str((tmp_path / "d5").resolve())
    for data in ("d5/", "./d5", str(tmp_path / "d5")):
        assert train_module.main(["--data", data, *arguments]) == 0
    # A run from before kept what was typed.
    config = Run(out).config()
    config["settings"]["data"] = "d5/"
    Run(out).write_config(config)
    assert train_module.main(["--data", "./d5", *arguments]) == 0
    monkeypatch.chdir(images)
    Run(out).write_config(
        config | {"settings": config["settings"] | {"data": str(tmp_path / "d5")}}
    )
    more = ["--steps", "2", "--allow-change", "steps", "--sample-every", "1000"]
    assert train_module.main([*flags, str(out), *more, "--allow-change", "sample_every"]) == 0
    assert len(Run(out).read_log()) == 2


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
