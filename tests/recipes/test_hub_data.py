"""Data sets of the Hugging Face hub: from the cache, from a folder, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from recipes.lab.data import hub
from recipes.lab.data.checks import DataError
from recipes.lab.data.datasets import canonical_data, divided, load_dataset
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.session import train
from recipes.lab.training.settings import Settings

datasets = pytest.importorskip("datasets")


def table(count, mode="RGB", label="label", kind=None, offset=0):
    shape = (12, 8, 3) if mode == "RGB" else (12, 8)
    images = [Image.fromarray(np.full(shape, offset + i, np.uint8)) for i in range(count)]
    kind = kind or datasets.ClassLabel(names=["ant", "bee"])
    features = datasets.Features({"picture": datasets.Image(), label: kind})
    values = [i % 2 for i in range(count)]
    if getattr(kind, "dtype", "") == "string":
        values = ["zebra" if value else "ape" for value in values]
    return datasets.Dataset.from_dict({"picture": images, label: values}, features=features)


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Saves splits to a folder; returns how ``--data`` names it."""
    monkeypatch.chdir(tmp_path)

    def save(**splits):
        shutil.rmtree("pictures", ignore_errors=True)
        datasets.DatasetDict(splits).save_to_disk("pictures")
        return "hf:./pictures"

    return save


def test_a_saved_folder_has_its_splits(saved):
    data = saved(train=table(8), validation=table(4, offset=100))
    found = load_dataset(data)
    assert (found.class_names, found.channels, found.resolution) == (("ant", "bee"), 3, 8)
    images, labels = found.batch(torch.tensor([3, 0, 3]))
    assert images.shape == (3, 3, 8, 8) and labels.tolist() == [1, 0, 1]
    torch.testing.assert_close(images[:, 0, 0, 0], torch.tensor([3, 0, 3.0]) * 2 / 255 - 1)
    assert torch.equal(found.batch(torch.tensor([3]))[0], images[:1])  # now from memory
    test = load_dataset(data, split="test", resolution=4)
    assert len(test) == 4 and test.batch(torch.tensor([0]))[0].shape == (1, 3, 4, 4)
    assert test.batch(torch.tensor([0]))[0].mean() > -0.3  # those of the validation split
    assert canonical_data(data) == f"hf:{Path.cwd() / 'pictures'}"
    assert canonical_data("hf:ylecun/mnist") == "hf:ylecun/mnist"


def test_a_split_to_measure_with_is_left_out_where_there_is_none(saved, capsys):
    data = saved(train=table(20, "L"))
    found, test = load_dataset(data), load_dataset(data, split="test")
    assert "a tenth" in capsys.readouterr().err and found.channels == 1
    values = [
        ((part.batch(torch.arange(len(part)))[0][:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
        for part in (found, test)
    ]
    assert values == [z.tolist() for z in divided(20, 0.1)] and len(test) == 2
    assert found.identity()["sha256"] != test.identity()["sha256"]
    assert found.identity() == load_dataset(data).identity()
    saved(train=table(20, "L", offset=1))
    assert found.identity()["sha256"] != load_dataset(data).identity()["sha256"]


def test_strings_and_numbers_are_classes(saved):
    data = saved(train=table(4, kind=datasets.Value("string")), test=table(2))
    assert load_dataset(data).class_names == ("ape", "zebra")
    data = saved(train=table(4, kind=datasets.Value("int64")), test=table(2))
    assert load_dataset(data).class_names == ("0", "1")
    data = saved(train=table(4, label="kind"), test=table(2, label="kind"))
    assert load_dataset(data).class_names == ("ant", "bee")  # the only column of classes


def test_a_class_is_the_one_of_the_training_images_in_every_split(saved):
    text = datasets.Value("string")
    bees = table(4, kind=text).filter(lambda row: row["label"] == "zebra")
    data = saved(train=table(4, kind=text), test=bees)
    test = load_dataset(data, split="test")
    assert test.class_names == ("ape", "zebra")
    assert test.batch(torch.arange(2))[1].tolist() == [1, 1]
    other = table(2, kind=datasets.ClassLabel(names=["bee", "ant"]))
    test = load_dataset(saved(train=table(4), test=other), split="test")
    assert test.class_names == ("ant", "bee")
    assert test.batch(torch.arange(2))[1].tolist() == [1, 0]
    data = saved(train=bees, test=table(4, kind=text))
    with pytest.raises(DataError, match="are of ape, of which no training image is"):
        load_dataset(data, split="test")


def test_a_colored_image_of_a_gray_set_is_as_light_as_it_looks(saved):
    colors = [Image.new("L", (8, 8), 200), Image.new("RGB", (8, 8), (10, 200, 90))]
    rows = {"picture": colors, "label": ["ape", "ape"]}
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.Value("string")})
    found = load_dataset(saved(train=datasets.Dataset.from_dict(rows, features=features),
                               test=table(2)))  # fmt: skip
    levels = (found.batch(torch.arange(2))[0][:, 0, 0, 0] + 1) * 127.5
    wanted = [200, colors[1].convert("L").getpixel((0, 0))]
    assert found.channels == 1 and levels.round().tolist() == wanted


@pytest.mark.parametrize("ends", [1, 1000])
def test_few_large_images_are_identified_too(saved, monkeypatch, ends):
    monkeypatch.setattr(hub, "WHOLE_BYTES", 0)
    monkeypatch.setattr(hub, "_ENDS", ends)
    found = [load_dataset(saved(train=table(6, offset=i), test=table(2))) for i in range(2)]
    first, second = (part.identity() for part in found)
    assert first["hashed"] == "ends" and first["sha256"] != second["sha256"]


def test_what_cannot_be_used_is_named(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    number = datasets.Value("float32")
    cases = [
        ({"valid": table(4)}, "no split 'train', but valid"),
        ({"train": table(4).remove_columns("picture")}, "no column of images among label"),
        ({"train": table(4).remove_columns("label")}, "no column 'label' among picture"),
        ({"train": table(4, label="kind", kind=number)}, "no column 'label' among picture, kind"),
        ({"train": table(4, kind=number)}, "'label' holds other than classes"),
        ({"train": table(1), "test": table(2)}, "1 images"),
    ]
    for splits, said in cases:
        with pytest.raises(DataError, match=said):
            load_dataset(saved(**splits))
    data = saved(train=table(4), test=table(2))
    for options, said in (({"resolution": 2}, "resolution 2"), ({"level": "hard"}, "hard")):
        with pytest.raises(DataError, match=said):
            load_dataset(data, **options)
    for name, said in (
        ("hf:", "lacks a name"),
        ("hf", "lacks a name"),
        ("hf:./nowhere", "save_to_disk"),
        ("hf:somebody/pictures", r"not in the local cache.*load_dataset\(\"somebody/pictures\"\)"),
        ("hf:a/b/c", "not in the local cache"),
    ):
        with pytest.raises(DataError, match=said) as caught:
            load_dataset(name)
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'attnzoo\[hf\]'"):
        load_dataset(data)


def test_a_cached_name_is_read_and_trained_on_without_the_hub(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    for split, count in (("train", 12), ("test", 4)):
        table(count).to_parquet(tmp_path / f"{split}.parquet")
    files = {split: str(tmp_path / f"{split}.parquet") for split in ("train", "test")}
    datasets.load_dataset("parquet", data_files=files, cache_dir=str(cache))
    [built] = cache.glob("parquet/default-*/*/*/")
    # As the package leaves what it has fetched from the hub.
    place = cache / "somebody___pictures" / "default" / "0.0.0" / "abc"
    place.parent.mkdir(parents=True)
    shutil.move(built, place)
    for file in place.glob("parquet-*.arrow"):
        file.rename(place / file.name.replace("parquet-", "pictures-"))
    info = json.loads((place / "dataset_info.json").read_text())
    info |= {"dataset_name": "pictures", "config_name": "default"}
    (place / "dataset_info.json").write_text(json.dumps(info))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr("socket.socket.connect", None)
    for data in ("hf:somebody/pictures", "hf:somebody/pictures:default"):
        assert len(load_dataset(data)) == 12 and len(load_dataset(data, split="test")) == 4
    run = Run(tmp_path / "run")
    settings = Settings(attn="sana", data="hf:somebody/pictures", steps=2, batch_size=4)
    assert train(settings, run) == 0
    data = run.config()["data"]
    assert data["class_names"] == ["ant", "bee"] and data["identity"]["kind"] == "hf"
    assert run.config()["settings"]["data"] == "hf:somebody/pictures"
