"""Labeled images: what a data set is, the table of all of them, and how one is opened.

A data set is one file beside this one, with one import line in ``__init__.py``: a class under
``register_dataset`` that says its sizes, channels, classes, splits and what its classifier must
reach. Nothing here keeps a position. Which images a training step sees is a pure function of the
seed and the step (``batch_indices``), so that a resumed run continues exactly.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from recipes.lab.data.checks import DataError, check_choice, check_seed, is_integer

SPLITS = ("train", "test")
MAX_PIXELS = 50_000_000
_MAX_SIDE = math.isqrt(MAX_PIXELS)


@dataclasses.dataclass(frozen=True)
class Request:
    """What ``load_dataset`` is asked for.

    Attributes:
        data: A name of ``DATASETS``; ``NAME:FOLDER`` where its files lie elsewhere, ``hf:NAME`` of
            the Hugging Face hub's, from the local cache; or the path of
            a folder with one sub-folder for each class. A known name wins over a folder of that
            name, so write ``./digits`` for the folder. A folder that holds nothing but the splits
            ``train``, ``val``, ``validation`` or ``test``, as ImageNet comes, means its ``train``.
        resolution: Pixels on a side; None takes the data's own.
        split: "train" or "test"; a folder is all "train".
        seed: Of pictures that are drawn; files do not depend on it.
        level: Of difficulty, where the data has several.
        strict: Make an unusable image of a folder an error.
        class_count: Take only that many classes of a folder, drawn by ``class_seed``; Sub-IN of
            the paper is 100 of ImageNet's.
        class_seed: Of that draw.
    """

    data: str
    _: dataclasses.KW_ONLY
    resolution: int | None = None
    split: str = "train"
    seed: int = 0
    level: str = "easy"
    strict: bool = False
    class_count: int | None = None
    class_seed: int = 0

    def resolution_of(self, dataset: ImageDataset, what: str) -> int:
        """The side to give.

        Raises:
            DataError: The data set, called ``what``, cannot give it.
        """
        smallest, largest = dataset.resolutions
        side = dataset.default_resolution if self.resolution is None else self.resolution
        if is_integer(side) and smallest <= side <= min(largest or math.inf, _MAX_SIDE):
            return int(side)
        if largest is not None:
            remedy = f"an integer from {smallest} to {largest}; the images are never enlarged"
        elif is_integer(side) and side > _MAX_SIDE:
            remedy = f"one of at most {_MAX_SIDE}"
        else:
            remedy = f"an integer of at least {smallest}"
        raise DataError(f"resolution {side!r} does not suit {what}: give {remedy}")


class ImageDataset:
    """Labeled square images.

    Attributes:
        name: short name for messages and file names.
        resolution: pixels on a side.
        channels: 1 (gray) or 3 (RGB).
        class_names: name of each class, in the order of the labels. Those of a folder are its
            sub-folders' names as they are, so they are not safe as parts of a path, of HTML or of
            what a terminal shows (``console.printable``).
        horizontal_flip: whether a mirrored image is as good an example of its class.
        is_drawn: whether a seed decides the images.
        infinite: whether every index in [0, 2**63) is another image.
        latent_factor: image pixels per pixel that the model sees; 1 unless a VAE stands between.
        resolutions: least and largest side that it can give; None knows no largest.
        default_resolution: side where none is asked for.
        splits: those it has, "train" first; a set without "test" is divided to be measured with.
        levels: of difficulty, the default first.
        takes_place: whether ``NAME:FOLDER`` names where its files lie.
        chooses_classes: whether some of its classes can be drawn.
        classifier_steps: training steps of the classifier that its generated images are shown to.
        accuracy_floor: what that classifier must reach on unseen real images, or no number is
            written.
    """

    name: str
    resolution: int
    channels: int
    class_names: tuple[str, ...]
    horizontal_flip: bool = False
    is_drawn: bool = False
    infinite: bool = False
    latent_factor: int = 1
    resolutions: tuple[int, int | None] = (4, None)
    default_resolution: int = 64
    splits: tuple[str, ...] = SPLITS
    levels: tuple[str, ...] = ("easy",)
    takes_place: bool = False
    chooses_classes: bool = False
    classifier_steps: int = 1000
    accuracy_floor: float = 0.8

    def __init__(self, request: Request) -> None:
        raise NotImplementedError

    @classmethod
    def canonical_place(cls, place: str) -> str:
        """One spelling of what follows ``NAME:``, good from any working directory."""
        return os.path.realpath(os.path.expanduser(place))

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

    @property
    def known_labels(self) -> Tensor | None:
        """(n,) int64: the class of every image, or None where it takes opening them to know."""
        return getattr(self, "_labels", None)

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


class Part(ImageDataset):
    """Some images of a data set, in an order of their own.

    Args:
        whole: The data set.
        indices: (n,) int64, of its images.
    """

    def __init__(self, whole: ImageDataset, indices: Tensor) -> None:
        self._whole, self._indices = whole, indices
        for name in ("name", "resolution", "channels", "class_names", "horizontal_flip",
                     "latent_factor"):  # fmt: skip
            setattr(self, name, getattr(whole, name))

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def known_labels(self) -> Tensor | None:
        labels = self._whole.known_labels
        return None if labels is None else labels[self._indices]

    def identity(self) -> dict[str, Any]:
        whole = self._whole.identity()
        part = hashlib.sha256(whole["sha256"].encode() + self._indices.numpy().tobytes())
        return self._identity(f"part of {whole['kind']}", part.hexdigest())

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        self._check_range(indices)
        return self._whole.batch(self._indices[indices])


def divided(length: int, share: float) -> tuple[Tensor, Tensor]:
    """Divides the images of a set that has no test split; the same way for every run.

    Args:
        length: Number of images, at least 2.
        share: Of them that are left out, at least one and not all.

    Returns:
        (length - m,) and (m,) int64: indices to train on, and those left out.
    """
    order = torch.randperm(length, generator=torch.Generator().manual_seed(0))
    cut = min(max(1, round(share * length)), length - 1)
    return order[cut:], order[:cut]


DATASETS: dict[str, type[ImageDataset]] = {}  # by the name that ``--data`` takes
_KINDS: dict[str, type[ImageDataset]] = {}  # all of them, with the folder, which has no name
Class = TypeVar("Class", bound=type[ImageDataset])


def register_dataset(name: str, *, is_named: bool = True) -> Callable[[Class], Class]:
    """Puts a class, made from a ``Request``, into the table.

    Args:
        name: Of its kind.
        is_named: Whether ``--data`` takes that name.
    """

    def register(dataset: Class) -> Class:
        _KINDS[name] = dataset
        if is_named:
            dataset.name = name
            DATASETS[name] = dataset
        return dataset

    return register


def kind_of(data: str) -> str:
    """The name of the data set that ``data`` means: a registered one, or "folder"."""
    name, colon, _ = data.partition(":")
    is_known = name in DATASETS and (not colon or DATASETS[name].takes_place)
    return name if is_known else "folder"


def entry_of(kind: str) -> type[ImageDataset]:
    """What is registered under the name of a kind."""
    return _KINDS[kind]


class ArrayDataset(ImageDataset):
    """Gray images held in memory at their native size, made smaller on access if asked."""

    channels = 1

    def _hold(
        self, request: Request, pixels: NDArray[np.uint8], labels: NDArray[np.int64], white: int
    ) -> None:
        """Takes (n, side, side) pixels from 0 to ``white`` and (n,) labels."""
        self.resolution = request.resolution_of(self, self.name)
        self._pixels = torch.from_numpy(pixels)[:, None]  # (n, 1, side, side)
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


def known_levels() -> list[str]:
    """The levels of difficulty that any data set has."""
    return list(dict.fromkeys(level for entry in _KINDS.values() for level in entry.levels))


def load_dataset(data: str, **options: Any) -> ImageDataset:
    """Open a data set.

    Args:
        data: See ``Request``.
        options: Its other attributes.

    Raises:
        DataError: An unknown name, split or level, a resolution that the set cannot give, missing
            or damaged files, or a folder without images for every class.
    """
    request = Request(data, **options)
    split, level = request.split, request.level
    check_choice(split, SPLITS, "split")
    check_choice(level, known_levels(), "level")
    check_seed(request.seed)
    kind = kind_of(data)
    entry = entry_of(kind)
    if request.class_count is not None and not entry.chooses_classes:
        raise DataError(f"a class count applies to folders only: drop it for data {data!r}")
    if level not in entry.levels:
        names = " or ".join(name for name, other in DATASETS.items() if level in other.levels)
        raise DataError(f"level {level!r} applies to {names} only: drop it, or use data {names!r}")
    if kind == "folder" and not (data and os.path.exists(os.path.expanduser(data))):
        # Path("") is the working directory, which nobody means by an empty option.
        try:
            check_choice(data, DATASETS, "data")
        except DataError as error:
            raise DataError(f"{error}, or the path of an existing folder of images") from None
    if split not in entry.splits:
        raise DataError(
            f"folder {data!r} has no split {split!r}: give the folder that holds those images, "
            "with split 'train'"
        )
    key = _shared_key(request)
    return _SHARED[key] if key in _SHARED else entry(request)


_SHARED: dict[Request, ImageDataset] = {}


def _shared_key(request: Request) -> Request:
    """What decides the images: no seed does where they are files."""
    is_drawn = entry_of(kind_of(request.data)).is_drawn
    return request if is_drawn else dataclasses.replace(request, seed=0)


def share(data: str, **options: Any) -> None:
    """Opens a data set now, for this process and all that are forked from it.

    Args:
        data: See ``Request``.
        options: Its other attributes.
    """
    _SHARED[_shared_key(Request(data, **options))] = load_dataset(data, **options)


def canonical_data(data: str) -> str:
    """One spelling for one set of data, good from any working directory.

    A folder becomes its absolute path without links; the names of built-in sets, and what does
    not exist, stay as they are.
    """
    name, colon, place = data.partition(":")
    if (kind := kind_of(data)) != "folder":
        return name + colon + (entry_of(kind).canonical_place(place) if place else "")
    folder = os.path.expanduser(data)
    return os.path.realpath(folder) if data and os.path.exists(folder) else data
