"""Labelled images for the recipes: one loader, four sources, batches addressed by index.

Nothing here keeps a position. Which images a training step sees is a pure function of the seed
and the step (``batch_indices``), so that a resumed run continues exactly.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from recipes.lab.console import printable
from recipes.lab.data.errors import DataError
from recipes.lab.data.images import (
    WHOLE_BYTES,
    BadImage,
    digest_file,
    digest_images,
    find_images,
    read_image,
    training_folder,
)
from recipes.lab.data.order import is_integer, permutation
from recipes.lab.data.shapes import (
    CLASS_NAMES,
    LEVELS,
    MINIMUM_RESOLUTION,
    SPLITS,
    check_choice,
    check_seed,
    render,
    shape_parameters,
)

__all__ = [
    "DATASETS",
    "DataError",
    "ImageDataset",
    "canonical_data",
    "load_dataset",
]

DATASETS = ("digits", "shapes", "fashion-mnist")

FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle-boot",
)
CACHE_BYTES = 2**30
SHAPES_TEST_IMAGES = 1000
MAX_IDX_IMAGES = 1_000_000


class ImageDataset:
    """Labelled square images.

    Attributes:
        name: short name for messages and file names.
        resolution: pixels on a side.
        channels: 1 (grey) or 3 (RGB).
        class_names: name of each class, in the order of the labels. Those of a folder are its
            sub-folders' names as they are, so they are not safe as parts of a path.
        horizontal_flip: whether a mirrored image is as good an example of its class.
        infinite: whether every index in [0, 2**63) is another image.
        latent_factor: image pixels per pixel that the model sees; 1 unless a VAE stands between.
    """

    name: str
    resolution: int
    channels: int
    class_names: tuple[str, ...]
    horizontal_flip: bool = False
    infinite: bool = False
    latent_factor: int = 1

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def __len__(self) -> int:
        """Number of images.

        Raises:
            TypeError: if the set is infinite.
        """
        raise TypeError(f"{self.name} is infinite and has no length")

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images with the given indices.

        Args:
            indices: (b,) int64.

        Returns:
            Images (b, channels, resolution, resolution) float32 in [-1, 1]; labels (b,) int64.

        Raises:
            IndexError: for an index outside the set.
            DataError: if a file of the set has become unreadable.
        """
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """What the data is, by content, so that a run can tell whether it has changed.

        Returns:
            What JSON can hold: "kind"; "images", their number, None for an infinite set;
            "class_names"; "sha256". A folder's has "hashed": "contents" where every file was read
            whole, "ends" where its size and its first and last 64 KiB stand for it, because the
            files have more than 1 GiB in all. Neither where the data lies nor when it was written
            counts.
        """
        raise NotImplementedError

    def _identity(self, kind: str, sha256: str) -> dict[str, Any]:
        return {
            "kind": kind,
            "images": None if self.infinite else len(self),
            "class_names": list(self.class_names),
            "sha256": sha256,
        }

    def _check_range(self, indices: Tensor) -> None:
        # Negative indices would otherwise count from the end and hide a mistake of the caller.
        last = 2**63 - 1 if self.infinite else len(self) - 1
        outside = (indices < 0) | (indices > last)
        if outside.any():
            bad = int(indices[outside][0])
            raise IndexError(f"index {bad} is out of range 0 to {last} of {self.name}")


class _ShapesDataset(ImageDataset):
    name = "shapes"
    channels = 3
    class_names = CLASS_NAMES

    def __init__(self, resolution: int | None, split: str, seed: int, level: str) -> None:
        self.resolution = _check_resolution(resolution, 16, "shapes", smallest=MINIMUM_RESOLUTION)
        self.split = split
        self.seed = seed
        self.level = level
        self.infinite = split == "train"

    def __len__(self) -> int:
        return super().__len__() if self.infinite else SHAPES_TEST_IMAGES

    def identity(self) -> dict[str, Any]:
        law = f"shapes 1 {self.level} {self.split} {self.resolution}"
        return self._identity("shapes", hashlib.sha256(law.encode()).hexdigest())

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        self._check_range(indices)
        parameters = shape_parameters(self.seed, self.split, indices, self.level)
        images = torch.from_numpy(render(parameters, self.resolution))
        return images, torch.from_numpy(parameters.labels)


class _ArrayDataset(ImageDataset):
    """Grey images held in memory at their native size, made smaller on access if asked."""

    channels = 1

    def __init__(
        self,
        name: str,
        class_names: tuple[str, ...],
        pixels: NDArray[np.uint8],
        labels: NDArray[np.int64],
        white: int,
        resolution: int | None,
    ) -> None:
        native = pixels.shape[-1]
        self.name = name
        self.class_names = class_names
        self.resolution = _check_resolution(resolution, native, name, largest=native)
        self._pixels = torch.from_numpy(pixels)[:, None]  # (n, 1, native, native)
        self._labels = torch.from_numpy(labels)
        self._white = white

    def __len__(self) -> int:
        return len(self._labels)

    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256(self._pixels.numpy().tobytes())
        digest.update(self._labels.numpy().tobytes())
        return self._identity(self.name, digest.hexdigest())

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        self._check_range(indices)
        images = self._pixels[indices].float() * (2 / self._white) - 1
        if images.shape[-1] != self.resolution:
            # The triangle filter has no negative weights, so the values stay in [-1, 1].
            size = (self.resolution, self.resolution)
            images = interpolate(images, size=size, mode="bilinear", antialias=True)
        return images.clamp_(-1, 1), self._labels[indices]


class _FolderDataset(ImageDataset):
    """Images of a folder with one sub-folder for each class.

    Attributes:
        skipped: path and reason of every file that was left out.
    """

    channels = 3
    horizontal_flip = True

    def __init__(
        self,
        folder: Path,
        resolution: int | None,
        strict: bool,
        class_count: int | None,
        class_seed: int,
    ) -> None:
        self.name = folder.resolve().name
        self.resolution = _check_resolution(resolution, 64, f"folder {str(folder)!r}")
        folder = training_folder(folder)
        found = find_images(folder, class_count, class_seed)
        self.class_names, self.skipped = found.classes, found.skipped
        self._root, self._found = folder, found.images
        for line in found.notes + ([] if strict else found.doubtful):
            _warn(line)
        if strict and found.doubtful:
            raise DataError(f"{found.doubtful[0]}: rename one, or drop the strict option")
        self._read(folder, found.images)
        if self.skipped:
            self._report(folder, strict)
        found.check_classes(folder, self._labels.tolist())

    def _read(self, folder: Path, found: list[tuple[Path, int]]) -> None:
        shape = (3, self.resolution, self.resolution)
        cached = len(found) * math.prod(shape) <= CACHE_BYTES
        pixels = torch.empty((len(found), *shape) if cached else 0, dtype=torch.uint8)
        files: list[Path] = []
        labels: list[int] = []
        enlarged = 0
        for path, label in found:
            try:
                image, shorter = read_image(path, self.resolution)
            except BadImage as error:
                self.skipped.append((path, str(error)))
                continue
            if cached:
                pixels[len(files)] = image
            enlarged += shorter < self.resolution
            files.append(path)
            labels.append(label)
        self._pixels = pixels[: len(files)] if cached else None
        self._files = files
        self._labels = torch.tensor(labels, dtype=torch.int64)
        if enlarged:
            _warn(
                f"{enlarged} of {len(files)} images under {str(folder)!r} are smaller than "
                f"{self.resolution} pixels and were enlarged; a smaller resolution avoids it"
            )

    def _report(self, folder: Path, strict: bool) -> None:
        total = len(self._files) + len(self.skipped)
        if strict:
            path, reason = self.skipped[0]
            raise DataError(
                f"image {str(path)!r}: {reason}; {len(self.skipped)} of {total} images under "
                f"{str(folder)!r} are unusable: repair or remove them, or drop the strict option"
            )
        reasons = Counter(reason.partition(" (")[0] for _, reason in self.skipped)
        counted = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        _warn(f"skipped {len(self.skipped)} of {total} images under {str(folder)!r}: {counted}")
        for path, reason in self.skipped[:5]:
            _warn(f"  {str(path)!r}: {reason}")
        if len(self.skipped) > 5:
            _warn(f"  and {len(self.skipped) - 5} more")

    def __len__(self) -> int:
        return len(self._files)

    def identity(self) -> dict[str, Any]:
        whole = sum(path.stat().st_size for path, _ in self._found if path.exists()) <= WHOLE_BYTES
        sha256, hashed = digest_images(
            (str(path.relative_to(self._root)), label, digest_file(path, whole))
            for path, label in self._found
        )
        return self._identity("folder", sha256) | {"hashed": hashed}

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        self._check_range(indices)
        if self._pixels is not None:
            pixels = self._pixels[indices]
        else:
            pixels = torch.empty((len(indices), 3, self.resolution, self.resolution))
            for row, index in enumerate(indices.tolist()):
                path = self._files[index]
                try:
                    pixels[row] = read_image(path, self.resolution)[0]
                except BadImage as error:
                    raise DataError(
                        f"image {str(path)!r} was readable when the run began: {error}; "
                        "restore the file, or start again without it"
                    ) from error
        return pixels.float() * (2 / 255) - 1, self._labels[indices]


def load_dataset(
    data: str,
    *,
    resolution: int | None = None,
    split: str = "train",
    seed: int = 0,
    level: str = "easy",
    strict: bool = False,
    class_count: int | None = None,
    class_seed: int = 0,
) -> ImageDataset:
    """Open a data set.

    ========================  ==========  ==========  ========  ================================
    ``data``                  resolution  default     channels  content
    ========================  ==========  ==========  ========  ================================
    digits                    4 to 8      8           1         scikit-learn's handwritten
                                                                digits, fixed split 80 to 20
    shapes                    from 8      16          3         procedural, see shapes.py beside;
                                                                train infinite, test 1000 images
    fashion-mnist             4 to 28     28          1         the Debian package
                                                                dataset-fashion-mnist
    fashion-mnist:FOLDER      4 to 28     28          1         the same four .gz files elsewhere
    path of a folder          from 4      64          3         one sub-folder for each class
    ========================  ==========  ==========  ========  ================================

    Digits and Fashion-MNIST are never enlarged. A known name wins over a folder of that name;
    write ``./digits`` for the folder. A folder that holds nothing but the splits ``train``,
    ``val``, ``validation`` or ``test``, as ImageNet comes, means its ``train``.

    Folder images (the suffixes of ``images.IMAGE_SUFFIXES``; at any depth of a class folder; the
    first frame of an animation) are turned as their EXIF says, laid on white where transparent,
    halved until close to the resolution, resized to it and cropped at the centre. Hidden names
    are passed over; links to folders are not followed, nor links to files outside the folder; a
    class folder that is a link is refused, and what this project wrote is no class. Every image
    is decoded once here, and held in memory up to 1 GiB in all. Those that fail or have another
    suffix are counted and named on stderr and listed in ``skipped``.

    Args:
        data: see the table.
        resolution: pixels on a side; None for the default.
        split: "train" or "test"; a folder is all "train".
        seed: of the pictures of shapes; the other sets do not depend on it.
        level: difficulty of shapes: easy, medium, hard or long-range.
        strict: make an unusable image of a folder an error.
        class_count: take only that many classes of a folder, drawn by ``class_seed``; Sub-IN of
            the paper is 100 of ImageNet's.
        class_seed: of that draw.

    Returns:
        The data set.

    Raises:
        DataError: for an unknown name, split or level, a resolution that the set cannot give,
            missing or damaged files, or a folder without images for every class.
    """
    check_choice(split, SPLITS, "split")
    check_choice(level, LEVELS, "level")
    check_seed(seed)
    if class_count is not None and (data in DATASETS or data.startswith("fashion-mnist:")):
        raise DataError(f"a class count applies to folders only: drop it for data {data!r}")
    if data == "shapes":
        return _ShapesDataset(resolution, split, seed, level)
    if level != "easy":
        raise DataError(f"level {level!r} applies to shapes only: drop it, or use data 'shapes'")
    if data == "digits":
        return _digits(resolution, split)
    name, _, place = data.partition(":")
    if name == "fashion-mnist":
        folder = Path(os.path.expanduser(place)) if place else FASHION_MNIST_FOLDER
        return _fashion_mnist(folder, resolution, split)
    folder = Path(os.path.expanduser(data))
    # Path("") is the working directory, which nobody means by an empty option.
    if not data or not os.path.exists(folder):
        try:
            check_choice(data, DATASETS, "data")
        except DataError as error:
            raise DataError(f"{error}, or the path of an existing folder of images") from None
    if not os.path.isdir(folder):
        raise DataError(
            f"data {data!r} is a file: give a folder with one sub-folder of images for each class"
        )
    if split != "train":
        raise DataError(
            f"folder {data!r} has no split {split!r}: give the folder that holds those images, "
            "with split 'train'"
        )
    return _FolderDataset(folder, resolution, strict, class_count, class_seed)


def canonical_data(data: str) -> str:
    """One spelling for one set of data, good from any working directory.

    A folder becomes its absolute path without links; the names of built-in sets, and what does
    not exist, stay as they are.
    """
    name, colon, place = data.partition(":")
    if data in DATASETS or not data:
        return data
    if name == "fashion-mnist" and place:
        return name + colon + os.path.realpath(os.path.expanduser(place))
    folder = os.path.expanduser(data)
    return os.path.realpath(folder) if os.path.exists(folder) else data


def _check_resolution(
    resolution: int | None, default: int, what: str, smallest: int = 4, largest: int | None = None
) -> int:
    if resolution is None:
        return default
    fits = is_integer(resolution) and resolution >= smallest
    if fits and (largest is None or resolution <= largest):
        return int(resolution)
    if largest is None:
        remedy = f"give an integer of at least {smallest}"
    else:
        remedy = f"give an integer from {smallest} to {largest}; the images are never enlarged"
    raise DataError(f"resolution {resolution!r} does not suit {what}: {remedy}")


def _warn(line: str) -> None:
    print(printable(line), file=sys.stderr)


def _digits(resolution: int | None, split: str) -> ImageDataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "data 'digits' needs scikit-learn: pip install scikit-learn, or use data 'shapes'"
        ) from error

    digits = load_digits()
    labels = digits.target.astype(np.int64)
    chosen: list[NDArray[np.int64]] = []
    for label in range(10):
        members = np.flatnonzero(labels == label)
        members = members[permutation(len(members), 0, label)]
        num_test = round(0.2 * len(members))
        chosen.append(members[:num_test] if split == "test" else members[num_test:])
    rows = np.sort(np.concatenate(chosen))
    pixels = digits.images[rows].astype(np.uint8)
    names = tuple(str(digit) for digit in range(10))
    return _ArrayDataset("digits", names, pixels, labels[rows], 16, resolution)


def _fashion_mnist(folder: Path, resolution: int | None, split: str) -> ImageDataset:
    prefix = "train" if split == "train" else "t10k"
    image_path = folder / f"{prefix}-images-idx3-ubyte.gz"
    label_path = folder / f"{prefix}-labels-idx1-ubyte.gz"
    for path in (image_path, label_path):
        if not os.path.isfile(path):
            raise DataError(
                f"fashion-mnist file {str(path)!r} is missing: "
                "apt-get install dataset-fashion-mnist, or give the folder that holds the four "
                ".gz files as fashion-mnist:FOLDER"
            )
    pixels = _read_idx(image_path, (28, 28))
    labels = _read_idx(label_path, ()).astype(np.int64)
    if len(pixels) != len(labels):
        raise DataError(
            f"{str(label_path)!r} has {len(labels)} labels for {len(pixels)} images: "
            "fetch both files again from one source"
        )
    if labels.max() >= len(FASHION_MNIST_CLASSES):
        raise DataError(
            f"{str(label_path)!r} holds label {labels.max()}, but there are only "
            f"{len(FASHION_MNIST_CLASSES)} classes: fetch the file again"
        )
    return _ArrayDataset("fashion-mnist", FASHION_MNIST_CLASSES, pixels, labels, 255, resolution)


def _read_idx(path: Path, item_shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Read a gzip-compressed idx file of unsigned bytes, (n, *item_shape)."""
    rank = 1 + len(item_shape)
    try:
        with gzip.open(path, "rb") as file:
            header = np.frombuffer(file.read(4 * (1 + rank)), dtype=">u4")
            if len(header) != 1 + rank or header[0] != 0x0800 + rank:
                raise _damaged(path, f"it is no idx file of unsigned bytes in {rank} dimensions")
            shape = tuple(int(size) for size in header[1:])
            if shape[1:] != item_shape or not 1 <= shape[0] <= MAX_IDX_IMAGES:
                wanted = "x".join(["N", *map(str, item_shape)])
                raise _damaged(path, f"its size is {'x'.join(map(str, shape))}, not {wanted}")
            # One byte more than announced shows a surplus without unpacking all of it.
            content = file.read(math.prod(shape) + 1)
    except (EOFError, OSError, ValueError, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        raise _damaged(path, " ".join(str(error).split())) from error
    if len(content) != math.prod(shape):
        amount = "fewer" if len(content) < math.prod(shape) else "more"
        raise _damaged(path, f"it has {amount} bytes than its header says")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape).copy()


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(f"{str(path)!r} is damaged or unreadable ({reason}): fetch the file again")
