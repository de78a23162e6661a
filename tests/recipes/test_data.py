"""The data sets: determinism, the laws of the shapes, bad files, and messages that help."""

import gzip
import os
import resource
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from recipes.lab.data import fashion_mnist, folder
from recipes.lab.data.datasets import DATASETS, DataError, canonical_data, load_dataset
from recipes.lab.data.images import BadImage, read_image, to_rgb
from recipes.lab.data.order import batch_indices
from recipes.lab.data.shapes import (
    CLASS_NAMES,
    DARK_GRAY,
    LEVELS,
    PALETTE,
    ShapeParameters,
    _philox,
    coverage,
    render,
    shape_parameters,
)


def fails(*args, **options) -> str:
    """The message of the DataError, which has to be one line."""
    with pytest.raises(DataError) as caught:
        load_dataset(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


class TestShapes:
    @pytest.mark.parametrize(
        ("counter", "key", "expected"),
        [
            ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
            (
                [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
                (0xA4093822, 0x299F31D0),
                [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
            ),
        ],
    )
    def test_generator_gives_the_published_vectors(self, counter, key, expected):
        words = _philox(tuple(np.array([word], dtype=np.uint64) for word in counter), key)
        assert [int(word[0]) for word in words] == expected

    def test_stream_is_pinned(self):
        # A change here changes every published result on shapes.
        parameters = shape_parameters(7, "train", [0, 1, 2, 3, 2**40], "easy")
        assert parameters.labels.tolist() == [9, 4, 0, 3, 9]
        scales = [0.589580587, 0.6425148473, 0.6076989455, 0.554790176, 0.5974163848]
        np.testing.assert_allclose(parameters.scale[:, 0], scales, rtol=0, atol=1e-9)

    @pytest.mark.parametrize("level", LEVELS)
    def test_batch_does_not_depend_on_the_company(self, level):
        dataset = load_dataset("shapes", level=level, seed=3)
        indices = torch.tensor([5, 2**62, 0, 5])
        images, labels = dataset.batch(indices)
        assert images.shape == (4, 3, 16, 16) and images.dtype == torch.float32
        assert labels.shape == (4,) and labels.dtype == torch.int64
        assert images.min() >= -1 and images.max() <= 1
        assert torch.equal(images[0], images[3])
        for row, index in enumerate(indices):
            image, label = load_dataset("shapes", level=level, seed=3).batch(index[None])
            assert torch.equal(image[0], images[row]) and label[0] == labels[row]

    @pytest.mark.parametrize("level", LEVELS)
    def test_resolutions_show_the_same_picture(self, level):
        parameters = shape_parameters(0, "train", np.arange(200), level)
        large = coverage(parameters, 64).reshape(200, 16, 4, 16, 4).mean(axis=(2, 4))
        small = coverage(parameters, 16)
        assert np.abs(large - small).mean() < 0.006
        assert np.abs(large.mean((1, 2)) - small.mean((1, 2))).max() < 0.012

    @pytest.mark.parametrize("resolution", [8, 17, 33])
    def test_any_resolution(self, resolution):
        images, _ = load_dataset("shapes", resolution=resolution).batch(torch.arange(3))
        assert images.shape == (3, 3, resolution, resolution)

    def test_templates_differ(self):
        count = len(CLASS_NAMES)
        parameters = ShapeParameters(
            labels=np.arange(count),
            center=np.zeros((count, 1, 2)),
            scale=np.full((count, 1), 0.6),
            rotation=np.zeros((count, 1)),
            foreground=np.ones((count, 3)),
            background=-np.ones((count, 3)),
        )
        masks = coverage(parameters, 16)
        for first in range(count):
            for second in range(first):
                shared = np.minimum(masks[first], masks[second]).sum()
                union = np.maximum(masks[first], masks[second]).sum()
                assert shared / union < 0.93, (CLASS_NAMES[first], CLASS_NAMES[second])

    @pytest.mark.parametrize(
        ("name", "area"),
        [
            ("disc", np.pi * 0.95**2),
            ("ring", np.pi * (0.97**2 - 0.51**2)),
            ("square", 1.4**2),
            ("triangle", 3 * np.sqrt(3) / 4),
            ("hexagon", 3 * np.sqrt(3) / 2),
            ("star", 5 * 0.42 * np.sin(np.pi / 5)),
            ("plus", 4 * (2 * 0.95 * 0.28 - 0.28**2)),
            ("bar", 4 * 0.95 * 0.28),
        ],
    )
    def test_area_is_that_of_the_figure(self, name, area):
        label = np.array([CLASS_NAMES.index(name)])
        one, color = np.ones((1, 1)), np.ones((1, 3))
        # A turn and a shift change no area.
        parameters = ShapeParameters(
            label, np.array([[[0.1, -0.05]]]), 0.8 * one, 0.3 * one, color, -color
        )
        measured = coverage(parameters, 128).sum() * (2 / 128) ** 2
        assert measured == pytest.approx(0.64 * area, rel=0.01)

    def test_axes(self):
        one, color = np.ones((1, 1)), np.ones((1, 3))
        triangle = ShapeParameters(
            np.array([CLASS_NAMES.index("triangle")]),
            np.array([[[0.5, 0.5]]]),
            0.4 * one,
            0 * one,
            color,
            -color,
        )
        mask = coverage(triangle, 32)[0]
        assert mask[:16, 16:].sum() == mask.sum() > 0
        widths = mask.sum(axis=1)
        assert widths[4] < widths[9]

    def test_train_and_test_are_disjoint(self):
        train = shape_parameters(0, "train", np.arange(20_000), "easy").center[:, 0]
        test = shape_parameters(0, "test", np.arange(1000), "easy").center[:, 0]
        assert not {tuple(row) for row in train} & {tuple(row) for row in test}
        assert load_dataset("shapes", split="train").infinite
        assert len(load_dataset("shapes", split="test")) == 1000

    def test_seeds_differ_in_both_halves(self):
        scales = {
            shape_parameters(seed, "train", [0]).scale.item() for seed in (0, 1, 2**32, 2**64 - 1)
        }
        assert len(scales) == 4

    @pytest.mark.parametrize("level", LEVELS)
    def test_laws(self, level):
        number = 20_000
        parameters = shape_parameters(1, "train", np.arange(number), level)
        shares = np.bincount(parameters.labels, minlength=10) / number
        assert np.abs(shares - 0.1).max() < 0.01
        corner, jitter, (low, high) = {
            "easy": (0, 0.075, (0.55, 0.65)),
            "medium": (0, 0.25, (0.40, 0.65)),
            "hard": (0, 0.25, (0.40, 0.65)),
            "long-range": (0.55, 0.04, (0.34, 0.40)),
        }[level]
        offset = np.abs(parameters.center) - corner if corner else parameters.center
        assert -jitter < offset.min() < -0.98 * jitter
        assert 0.98 * jitter < offset.max() < jitter
        assert low < parameters.scale.min() and parameters.scale.max() < high
        assert parameters.scale.mean() == pytest.approx((low + high) / 2, abs=0.003)
        reach = np.abs(parameters.center).max(axis=2) + parameters.scale
        assert reach.max() <= 1
        if level == "hard":
            assert parameters.rotation.max() > 6.2
            assert parameters.foreground.min() >= 0.1 and parameters.background.max() <= -0.3
        else:
            assert not parameters.rotation.any()
            assert (parameters.background == DARK_GRAY).all()
            color = (parameters.foreground[:, None] == PALETTE).all(axis=2).argmax(axis=1)
            # Color must tell nothing of the class.
            table = np.histogram2d(parameters.labels, color, bins=(10, 4))[0] / number
            assert np.abs(table - 0.025).max() < 0.006

    def test_long_range_objects_agree_across_the_diagonal(self):
        number = 400
        parameters = shape_parameters(0, "train", np.arange(number), "long-range")
        first, second = parameters.center[:, 0], parameters.center[:, 1]
        assert (np.sign(first) == -np.sign(second)).all() and (first[:, 1] > 0).all()
        assert 0.4 < (first[:, 0] > 0).mean() < 0.6
        images = render(parameters, 32)
        images = np.where((first[:, 0] > 0)[:, None, None, None], images[..., ::-1], images)
        quarters = [images[:, :, :16, :16], images[:, :, 16:, 16:]]
        empty = [images[:, :, :16, 16:], images[:, :, 16:, :16]]
        assert all(np.allclose(part, DARK_GRAY[0]) for part in empty)
        brightest = [part.reshape(number, 3, -1).max(axis=2) for part in quarters]
        np.testing.assert_allclose(brightest[0], brightest[1], atol=1e-6)
        np.testing.assert_allclose(brightest[0], parameters.foreground, atol=1e-6)
        # One class: the area over the squared scale is the same constant for both objects.
        contrast = parameters.foreground - parameters.background
        areas = np.stack(
            [
                ((part - DARK_GRAY[0]) / contrast[:, :, None, None]).mean(axis=1).sum(axis=(1, 2))
                for part in quarters
            ],
            axis=1,
        )
        shape_areas = areas / parameters.scale**2
        assert np.abs(shape_areas[:, 0] / shape_areas[:, 1] - 1).max() < 0.1

    def test_messages(self):
        assert "did you mean 'medium'" in fails("shapes", level="medum")
        assert all(level in fails("shapes", level="x") for level in LEVELS)
        assert "train, test" in fails("shapes", split="valid")
        assert "at least 8" in fails("shapes", resolution=7)
        assert "at least 8" in fails("shapes", resolution=16.0)
        assert "2**64" in fails("shapes", seed=-1)
        with pytest.raises(IndexError, match="0 to 999"):
            load_dataset("shapes", split="test").batch(torch.tensor([1000]))
        with pytest.raises(IndexError, match="-1"):
            load_dataset("shapes").batch(torch.tensor([0, -1]))
        with pytest.raises(TypeError, match="infinite"):
            len(load_dataset("shapes"))


class TestBatchIndices:
    def test_each_epoch_holds_every_image_once(self):
        dataset = load_dataset("digits", split="test")
        length, batch_size = len(dataset), 50
        steps = -(-3 * length // batch_size)
        stream = torch.cat([batch_indices(dataset, 5, step, batch_size) for step in range(steps)])
        epochs = stream[: 3 * length].reshape(3, length)
        assert length % batch_size, "a batch has to span two epochs"
        for epoch in epochs:
            assert torch.equal(epoch.sort().values, torch.arange(length))
        assert not torch.equal(epochs[0], epochs[1])
        assert not torch.equal(epochs[0], torch.arange(length))

    def test_is_a_pure_function(self):
        dataset = load_dataset("digits", split="test")
        first = batch_indices(dataset, 5, 2, 32)
        # The caller may write into its batch without spoiling the stored order.
        first[:] = -1
        again = batch_indices(dataset, 5, 2, 32)
        assert again.min() >= 0
        assert not torch.equal(again, batch_indices(dataset, 6, 2, 32))
        for step in range(200):
            batch_indices(dataset, 5, step, 32)
        assert torch.equal(again, batch_indices(dataset, 5, 2, 32))

    def test_stream_does_not_depend_on_the_batch_size(self):
        dataset = load_dataset("digits", split="test")
        length = len(dataset)
        whole = batch_indices(dataset, 0, 0, 6 * length)
        parts = torch.cat([batch_indices(dataset, 0, step, length // 2) for step in range(12)])
        assert torch.equal(parts, whole[: len(parts)])

    def test_infinite_sets_count_up(self):
        dataset = load_dataset("shapes")
        assert batch_indices(dataset, 9, 2**40, 4).tolist() == [2**42 + i for i in range(4)]

    @pytest.mark.parametrize(("seed", "step", "size"), [(-1, 0, 1), (0, -1, 1), (0, 0, 0)])
    def test_bad_arguments(self, seed, step, size):
        with pytest.raises(DataError, match="out of range"):
            batch_indices(load_dataset("shapes"), seed, step, size)


class TestDigits:
    def test_split_is_fixed_stratified_and_disjoint(self):
        train, test = (load_dataset("digits", split=split) for split in ("train", "test"))
        assert len(train) + len(test) == 1797
        sets = []
        for dataset in (train, test):
            images, labels = dataset.batch(torch.arange(len(dataset)))
            assert images.shape[1:] == (1, 8, 8) and images.dtype == torch.float32
            assert images.min() == -1 and images.max() == 1
            sets.append({image.numpy().tobytes() for image in images})
            shares = torch.bincount(labels) / len(labels)
            assert (shares - 0.1).abs().max() < 0.005
        assert not sets[0] & sets[1]
        assert len(test) == pytest.approx(0.2 * 1797, abs=5)
        other = load_dataset("digits", split="test", seed=4)
        everything = torch.arange(len(test))
        assert torch.equal(other.batch(everything)[0], test.batch(everything)[0])
        assert not test.horizontal_flip and test.num_classes == 10 and not test.infinite

    def test_smaller_but_never_larger(self):
        dataset = load_dataset("digits", resolution=4)
        large, _ = load_dataset("digits").batch(torch.arange(50))
        small, _ = dataset.batch(torch.arange(50))
        assert small.shape == (50, 1, 4, 4)
        assert (small.mean((1, 2, 3)) - large.mean((1, 2, 3))).abs().max() < 0.1
        assert "from 4 to 8" in fails("digits", resolution=16)

    def test_index_out_of_range(self):
        dataset = load_dataset("digits")
        for index in (-1, len(dataset)):
            with pytest.raises(IndexError, match=f"{index} is out of range 0 to"):
                dataset.batch(torch.tensor([0, index]))


def write_idx(folder: Path, images: np.ndarray, labels: np.ndarray, prefix="train") -> None:
    header = struct.pack(">4I", 0x803, *images.shape)
    with gzip.open(folder / f"{prefix}-images-idx3-ubyte.gz", "wb") as file:
        file.write(header + images.astype(np.uint8).tobytes())
    header = struct.pack(">2I", 0x801, len(labels))
    with gzip.open(folder / f"{prefix}-labels-idx1-ubyte.gz", "wb") as file:
        file.write(header + labels.astype(np.uint8).tobytes())


class TestFashionMnist:
    @pytest.fixture
    def folder(self, tmp_path):
        generator = np.random.default_rng(0)
        self.images = generator.integers(0, 256, (30, 28, 28))
        self.labels = generator.integers(0, 10, 30)
        write_idx(tmp_path, self.images, self.labels)
        write_idx(tmp_path, self.images[:7], self.labels[:7], "t10k")
        return tmp_path

    def test_reads(self, folder):
        dataset = load_dataset(f"fashion-mnist:{folder}")
        images, labels = dataset.batch(torch.arange(30))
        assert images.shape == (30, 1, 28, 28) and images.dtype == torch.float32
        np.testing.assert_allclose(images[:, 0], self.images / 127.5 - 1, atol=1e-6)
        assert labels.tolist() == self.labels.tolist()
        assert len(load_dataset(f"fashion-mnist:{folder}", split="test")) == 7
        assert dataset.num_classes == 10 and not dataset.horizontal_flip

    def test_resolution(self, folder):
        small, _ = load_dataset(f"fashion-mnist:{folder}", resolution=14).batch(torch.arange(3))
        assert small.shape == (3, 1, 14, 14)
        assert "from 4 to 28" in fails(f"fashion-mnist:{folder}", resolution=32)

    def test_missing(self, tmp_path, monkeypatch):
        monkeypatch.setattr(fashion_mnist, "PACKAGE_FOLDER", tmp_path / "nowhere")
        message = fails("fashion-mnist")
        assert "apt-get install dataset-fashion-mnist" in message and "nowhere" in message
        assert "fashion-mnist:FOLDER" in message

    def test_truncated_file_is_named(self, folder):
        path = folder / "train-images-idx3-ubyte.gz"
        path.write_bytes(path.read_bytes()[:-2000])
        assert path.name in fails(f"fashion-mnist:{folder}")

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "no idx file"),
            (struct.pack(">4I", 0x801, 2, 28, 28) + bytes(1568), "no idx file"),
            (struct.pack(">4I", 0x803, 2, 32, 32) + bytes(2048), "2x32x32"),
            (struct.pack(">4I", 0x803, 2**32 - 1, 28, 28), "Nx28x28"),
            (struct.pack(">4I", 0x803, 2, 28, 28) + bytes(1567), "fewer"),
            (struct.pack(">4I", 0x803, 2, 28, 28) + bytes(1569), "more"),
            (struct.pack(">4I", 0x803, 2, 28, 28) + bytes(1568), "30 labels for 2 images"),
        ],
    )
    def test_damaged_content(self, folder, content, reason):
        (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(content))
        message = fails(f"fashion-mnist:{folder}")
        assert reason in message and "again" in message

    def test_not_gzip_and_bad_label(self, folder):
        write_idx(folder, self.images, np.full(30, 10))
        assert "label 10" in fails(f"fashion-mnist:{folder}")
        (folder / "train-labels-idx1-ubyte.gz").write_bytes(b"<html>not found</html>")
        assert "train-labels" in fails(f"fashion-mnist:{folder}")


def solid(mode: str, color, size=(40, 30)) -> Image.Image:
    return Image.new(mode, size, color)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.fixture
def root(tmp_path) -> Path:
    """Two classes of one red and one blue image."""
    folder = tmp_path / "images"
    for name, color in (("cat", (255, 0, 0)), ("dog", (0, 0, 255))):
        (folder / name).mkdir(parents=True)
        solid("RGB", color).save(folder / name / "a.png")
    return folder


def only_image(root: Path, resolution=16) -> torch.Tensor:
    """The image of class ``zebra``, in 0 to 255."""
    dataset = load_dataset(str(root), resolution=resolution, strict=True)
    images, labels = dataset.batch(torch.arange(len(dataset)))
    assert images.shape[1:] == (3, resolution, resolution)
    assert images.min() >= -1 and images.max() <= 1
    chosen = images[labels == dataset.class_names.index("zebra")]
    assert len(chosen) == 1
    return (chosen[0] + 1) * 127.5


class TestFolder:
    def test_reads(self, root):
        dataset = load_dataset(str(root))
        assert dataset.class_names == ("cat", "dog") and dataset.num_classes == 2
        assert dataset.resolution == 64 and dataset.channels == 3 and dataset.name == "images"
        assert dataset.horizontal_flip and not dataset.infinite and dataset.skipped == []
        images, labels = dataset.batch(torch.tensor([1, 0]))
        assert images.dtype == torch.float32 and labels.tolist() == [1, 0]
        assert images[:, :, 5, 5].tolist() == [[-1, -1, 1], [1, -1, -1]]

    def test_decoding_on_access_gives_the_same(self, root, monkeypatch):
        generator = np.random.default_rng(0)
        noise = generator.integers(0, 256, (70, 90, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / "cat" / "noise.png")
        cached = load_dataset(str(root), resolution=16)
        monkeypatch.setattr(folder, "CACHE_BYTES", 0)
        lazy = load_dataset(str(root), resolution=16)
        assert torch.equal(cached.batch(torch.arange(3))[0], lazy.batch(torch.arange(3))[0])
        (root / "cat" / "noise.png").write_bytes(b"")
        with pytest.raises(DataError, match=r"noise\.png.*was readable"):
            lazy.batch(torch.arange(3))

    @pytest.mark.parametrize(
        ("file", "image", "expected"),
        [
            ("gray.png", solid("L", 100), (100, 100, 100)),
            ("one_bit.png", solid("1", 1), (255, 255, 255)),
            ("cmyk.jpg", solid("CMYK", (255, 0, 0, 0)), (0, 255, 255)),
            ("clear.png", solid("RGBA", (0, 0, 0, 0)), (255, 255, 255)),
            ("half.png", solid("RGBA", (0, 0, 0, 128)), (127, 127, 127)),
            ("la.png", solid("LA", (0, 0)), (255, 255, 255)),
            ("deep.png", solid("I;16", 40000), (156, 156, 156)),
            ("palette.gif", solid("RGB", (10, 200, 30)).quantize(4), (10, 200, 30)),
            ("loss.webp", solid("RGB", (10, 200, 30)), (10, 200, 30)),
            ("old.bmp", solid("RGB", (10, 200, 30)), (10, 200, 30)),
            ("CAPITALS.JPEG", solid("RGB", (10, 200, 30)), (10, 200, 30)),
        ],
    )
    def test_modes_and_formats(self, root, file, image, expected):
        (root / "zebra").mkdir()
        image.save(root / "zebra" / file)
        wanted = torch.tensor(expected).float()[:, None, None]
        # A lossy file is a few gray levels off.
        assert (only_image(root) - wanted).abs().max() < 5

    def test_transparent_palette_color_is_white(self, root):
        (root / "zebra").mkdir()
        image = Image.new("P", (20, 20), 1)
        image.putpalette([0, 0, 0, 9, 9, 9])
        image.save(root / "zebra" / "p.png", transparency=1)
        assert only_image(root).min() == 255

    def test_floating_point_modes_are_refused(self):
        for mode in ("I", "F"):
            with pytest.raises(BadImage, match="8 or 16 bits"):
                to_rgb(Image.new(mode, (4, 4)))

    def test_exif_rotation(self, root):
        (root / "zebra").mkdir()
        image = solid("RGB", (255, 255, 255), (32, 32))
        image.paste((0, 0, 0), (0, 0, 32, 16))
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(root / "zebra" / "turned.jpg", exif=exif, quality=95)
        pixels = only_image(root)
        assert pixels[:, :, :7].min() > 230 and pixels[:, :, 9:].max() < 25

    @pytest.mark.parametrize("size", [(300, 100), (100, 300), (33, 31), (16, 16), (5, 9), (1, 1)])
    def test_crop_is_central(self, root, size):
        (root / "zebra").mkdir()
        width, height = size
        image = solid("RGB", (0, 0, 0), size)
        side = min(size)
        left, top = (width - side) // 2, (height - side) // 2
        image.paste((255, 255, 255), (left, top, left + side, top + side))
        image.save(root / "zebra" / "a.png")
        assert only_image(root)[:, 1:-1, 1:-1].min() > 150

    def test_shrinking_averages(self, root):
        (root / "zebra").mkdir()
        board = np.indices((256, 256)).sum(axis=0) % 2 * 255
        Image.fromarray(board.astype(np.uint8)).save(root / "zebra" / "a.png")
        assert (only_image(root) - 127.5).abs().max() < 2

    def test_small_images_are_reported(self, root, capsys):
        load_dataset(str(root), resolution=31)
        assert "2 of 2 images" in capsys.readouterr().err
        load_dataset(str(root), resolution=30)
        assert not capsys.readouterr().err

    def make_bad(self, root) -> dict[str, str]:
        cat = root / "cat"
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(cat / "cut.jpg")
        whole = (cat / "cut.jpg").read_bytes()
        (cat / "cut.jpg").write_bytes(whole[: len(whole) // 2])
        (cat / "tail.jpg").write_bytes(whole[:-4])
        Image.fromarray(noise).save(cat / "cut.png")
        whole = (cat / "cut.png").read_bytes()
        (cat / "cut.png").write_bytes(whole[: len(whole) // 2])
        (cat / "random.png").write_bytes(noise.tobytes())
        (cat / "empty.png").write_bytes(b"")
        (cat / "page.jpg").write_text("<html>")
        (cat / "large.png").write_bytes(png_header(8000, 8000))
        (cat / "bomb.png").write_bytes(png_header(10_000, 10_000))
        (cat / "huge.png").write_bytes(png_header(20_000, 20_000))
        solid("RGB", 0, (210, 10)).save(cat / "long.png")
        solid("RGB", 0).save(cat / "other.png", format="TIFF")
        return {
            "cut.jpg": "truncated",
            "tail.jpg": "truncated",
            "cut.png": "truncated",
            "random.png": "decoded",
            "empty.png": "decoded",
            "page.jpg": "decoded",
            "large.png": "50 megapixels",
            "bomb.png": "50 megapixels",
            "huge.png": "50 megapixels",
            "long.png": "20 times",
            "other.png": "decoded",
        }

    def test_bad_images_are_skipped_and_named(self, root, capsys):
        bad = self.make_bad(root)
        dataset = load_dataset(str(root), resolution=16)
        assert len(dataset) == 2 and dataset.batch(torch.arange(2))[1].tolist() == [0, 1]
        reasons = {path.name: reason for path, reason in dataset.skipped}
        assert reasons.keys() == bad.keys()
        for name, part in bad.items():
            assert part in reasons[name], (name, reasons[name])
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 7 and "skipped 11 of 13" in lines[0] and "and 6 more" in lines[-1]
        assert all(Path(line.split("'")[1]).name in bad for line in lines[1:6])

    def test_bombs_cost_no_memory(self, root):
        self.make_bad(root)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for name in ("large.png", "bomb.png", "huge.png"):
            with pytest.raises(BadImage):
                read_image(root / "cat" / name, 16)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # in kB

    def test_of_an_animation_the_first_frame_is_taken(self, root):
        (root / "zebra").mkdir()
        frames = [solid("RGB", color) for color in ((10, 200, 30), (200, 10, 30))]
        frames[0].save(root / "zebra" / "a.gif", save_all=True, append_images=frames[1:])
        wanted = torch.tensor([10.0, 200.0, 30.0])[:, None, None]
        assert (only_image(root) - wanted).abs().max() < 5

    def test_strict(self, root):
        self.make_bad(root)
        message = fails(str(root), strict=True)
        assert "bomb.png" in message and "11 of 13" in message and "strict" in message

    def test_links(self, root, capsys):
        secret = root.parent / "secret"
        secret.mkdir()
        solid("RGB", 0).save(secret / "secret.png")
        (root / "cat" / "inside.png").symlink_to(root / "dog" / "a.png")
        (root / "cat" / "escape.png").symlink_to(secret / "secret.png")
        (root / "cat" / "loop").symlink_to(root)
        (root / "cat" / "self.png").symlink_to(root / "cat" / "self.png")
        (root / "cat" / "dead.png").symlink_to(root / "nothing.png")
        dataset = load_dataset(str(root), resolution=16)
        assert dataset.class_names == ("cat", "dog") and len(dataset) == 3
        names = {path.name for path, _ in dataset.skipped}
        assert names == {"escape.png", "loop", "self.png", "dead.png"}
        line = capsys.readouterr().err.splitlines()[0]
        assert "3 a link to a folder, or to nothing" in line and "1 a link out of" in line
        # The folder itself may be a link.
        (root.parent / "link").symlink_to(root)
        assert len(load_dataset(str(root.parent / "link"), resolution=16)) == 3

    def test_a_class_that_is_a_link_is_not_dropped_silently(self, root):
        (root.parent / "secret").mkdir()
        (root / "bee").symlink_to(root.parent / "secret")
        message = fails(str(root))
        assert "bee" in message and "link" in message and "renumbered" in message
        (root.parent / "secret").rmdir()
        assert "dangling" in fails(str(root))
        (root / "bee").rename(root / ".bee")
        assert load_dataset(str(root), resolution=16).class_names == ("cat", "dog")

    @pytest.mark.parametrize(
        ("file", "mode", "options"),
        [
            ("a.tif", "RGB", {}),
            ("a.TIFF", "RGB", {"compression": "tiff_lzw"}),
            ("a.jfif", "RGB", {"format": "JPEG"}),
            ("a.jpe", "RGB", {"format": "JPEG"}),
            ("a.apng", "RGB", {"format": "PNG"}),
            ("a.ppm", "RGB", {}),
            ("a.pnm", "RGB", {}),
            ("a.pgm", "L", {}),
            ("a.pbm", "1", {}),
            ("a.dib", "RGB", {}),
            ("a.jp2", "RGB", {}),
            ("a.avif", "RGB", {}),
            ("a.qoi", "RGB", {}),
        ],
    )
    def test_every_safe_suffix_is_read(self, root, file, mode, options):
        if file.endswith("avif") and not features.check("avif"):
            pytest.skip("this Pillow has no AVIF")
        (root / "zebra").mkdir()
        solid(mode, 255 if mode != "RGB" else (255, 255, 255)).save(
            root / "zebra" / file, **options
        )
        assert only_image(root).min() > 250

    def test_sixteen_bit_grey_maps_keep_their_white(self, root):
        (root / "zebra").mkdir()
        header = b"P5 20 20 65535\n"
        content = np.full(400, 0x8080, dtype=">u2").tobytes()
        (root / "zebra" / "a.pgm").write_bytes(header + content)
        assert (only_image(root) - 128).abs().max() < 1

    def test_what_is_not_read_is_counted_by_reason(self, root, capsys):
        for number in range(3):
            (root / "cat" / f"{number}.heic").write_bytes(b"x")
        (root / "cat" / "bare").write_bytes(b"x")
        (root / "dog" / "b.png").write_bytes(b"")
        solid("RGB", 0).save(root / "loose.png")
        dataset = load_dataset(str(root), resolution=16)
        assert len(dataset) == 2 and len(dataset.skipped) == 6
        line = capsys.readouterr().err.splitlines()[0]
        for part in ("skipped 6 of 8", "3 .heic", "1 no suffix", "1 cannot be", "1 lies in no"):
            assert part in line
        for name in ("b.png", "bare", "loose.png"):
            (next(root.rglob(name))).unlink()
        assert "heic" in fails(str(root), strict=True)

    def test_pipes_and_other_files_are_passed_over(self, root, capsys):
        (root / "cat" / "notes.txt").write_text("x")
        (root / "labels.csv").write_text("x")
        assert len(load_dataset(str(root), resolution=16, strict=True)) == 2
        assert "no images: 1 .txt" in capsys.readouterr().err
        os.mkfifo(root / "cat" / "pipe.png")
        assert len(load_dataset(str(root), resolution=16)) == 2
        assert "pipe.png" in fails(str(root), strict=True)

    def make_run(self, folder: Path) -> None:
        (folder / "samples").mkdir(parents=True)
        (folder / "checkpoints").mkdir()
        (folder / "config.json").write_text("{}")
        solid("RGB", 0).save(folder / "samples" / "a.png")

    def test_what_this_project_wrote_is_no_class(self, root, capsys):
        plain = load_dataset(str(root), resolution=16)
        self.make_run(root / "runs" / "a-sana")
        solid("RGB", 0).save(root / "runs" / "demo.png")
        self.make_run(root / "results" / "cells" / "x" / "run")
        (root / "latents").mkdir()
        (root / "latents" / "plan.json").write_text("{}")
        capsys.readouterr()
        dataset = load_dataset(str(root), resolution=16, strict=True)
        assert dataset.class_names == ("cat", "dog") and len(dataset) == 2
        assert dataset.identity() == plain.identity()
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 3 and all("is no class" in line for line in lines)
        self.make_run(root / "cat" / "run")
        message = fails(str(root))
        assert "cat" in message and "a run" in message and "move one" in message
        assert "is a run" in fails(str(root / "cat" / "run"))

    def test_outputs_beside_splits_do_not_make_classes_of_them(self, root):
        (root / "train").mkdir()
        for name in ("cat", "dog"):
            (root / name).rename(root / "train" / name)
        (root / "val").mkdir()
        self.make_run(root / "runs" / "a-sana")
        assert load_dataset(str(root), resolution=16).class_names == ("cat", "dog")

    @pytest.mark.parametrize(
        ("first", "second"), [("Cat", "cat"), ("\u00fc", "u\u0308"), ("Stra\u00dfe", "STRASSE")]
    )
    def test_classes_that_differ_only_in_spelling_are_named(self, root, first, second, capsys):
        for name in {first, second} - {"cat"}:
            shutil.copytree(root / "dog", root / name)
        assert len(load_dataset(str(root), resolution=16).class_names) in (3, 4)
        assert "are two classes" in capsys.readouterr().err
        assert "are two classes" in fails(str(root), strict=True)

    def test_names_do_not_drive_the_terminal(self, root, capsys):
        (root / "cat\x1b[31m").mkdir()
        (root / "cat\x1b[31m" / "a.png").write_bytes(b"")
        (root / "cat" / "a.\x1b[31m").write_bytes(b"")
        fails(str(root))
        said = capsys.readouterr().err
        assert "\x1b" not in said and "\\x1b" in said

    def test_class_names(self, root):
        odd = ["..x", ".hidden", "-rf", "a\nb", "\u00fc", "x" * 255, "\udce9"]
        for name in odd:
            (root / name).mkdir()
            solid("RGB", 0).save(root / name / "deep.png")
        (root / "cat" / "more").mkdir()
        solid("RGB", 0).save(root / "cat" / "more" / "b.png")
        dataset = load_dataset(str(root), resolution=16)
        expected = {"cat", "dog", "-rf", "a\nb", "\u00fc", "x" * 255, "\udce9"}
        assert dataset.class_names == tuple(sorted(expected))
        assert len(dataset) == 8
        (root / "a\nb" / "deep.png").unlink()
        assert "a\\nb" in fails(str(root))

    def test_structure_messages(self, root):
        (root / "ant").mkdir()
        message = fails(str(root))
        assert "ant" in message and "add images" in message
        (root / "ant" / "a.png").write_bytes(b"")
        assert "ant" in fails(str(root))
        for path in root.rglob("*.png"):
            path.unlink()
        assert "any class folder" in fails(str(root))
        for path in root.iterdir():
            path.rmdir()
        assert "one for each class" in fails(str(root))
        assert "at least 4" in fails(str(root), resolution=0)
        assert "at most 7071" in fails(str(root), resolution=10**6)
        assert "no split 'test'" in fails(str(root), split="test")
        (root / "file").write_text("x")
        assert "is a file" in fails(str(root / "file"))


class TestNames:
    def test_one_folder_has_one_spelling(self, root, monkeypatch):
        monkeypatch.chdir(root.parent)
        wanted = str(root.resolve())
        for name in ("images", "images/", "./images", "images/cat/..", wanted):
            assert canonical_data(name) == wanted
        for name in ("digits", "shapes", "", "no-such", "x" * 5000, "a\0b"):
            assert canonical_data(name) == name
        assert canonical_data("fashion-mnist:images") == f"fashion-mnist:{wanted}"
        (root.parent / "digits").mkdir()
        assert canonical_data("./digits") == str((root.parent / "digits").resolve())

    @pytest.mark.parametrize(
        "name", ["shape", "/no/such/folder", "", "shapes:x", "~nobody/x", "x" * 5000, "a\0b"]
    )
    def test_unknown(self, name):
        message = fails(name)
        assert repr(name) in message and all(known in message for known in DATASETS)
        assert "folder" in message

    def test_nearest_is_suggested(self):
        assert "did you mean 'digits'" in fails("digit")
        assert "did you mean 'fashion-mnist'" in fails("fashion_mnist")

    def test_level_is_for_shapes(self):
        assert "shapes only" in fails("digits", level="hard")
