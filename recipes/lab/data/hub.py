"""Data sets of the Hugging Face hub, from the local cache, or a folder of ``save_to_disk``.

    hf:ylecun/mnist              what load_dataset("ylecun/mnist") has put into the cache
    hf:uoft-cs/cifar100:default  the same with the name of a configuration
    hf:./pictures                what save_to_disk("./pictures") has written

Nothing is asked of the network. The image is the first column of images, the class the column
"label" or the only one of classes. To be measured with, a set has its split "test", or
"validation"; of a set with neither, a tenth is left out, the same images for every run. Images are
cropped and resized as those of a folder; a set whose first image is gray is gray.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recipes.lab.console import warn
from recipes.lab.data.checks import DataError
from recipes.lab.data.datasets import ImageDataset, Request, divided, register_dataset
from recipes.lab.data.images import WHOLE_BYTES, BadImage, fit_image

CACHE_BYTES = 2**30
HELD_OUT = 0.1  # of a set that has nothing to be measured with
_TESTS = ("test", "validation", "valid", "val")
_LABELS = ("label", "labels", "fine_label", "class")
_ENDS = 1000  # images at both ends that stand for a set of more than WHOLE_BYTES
_LUMA = torch.tensor([299, 587, 114])[:, None, None]  # a colored image in a gray set


@register_dataset("hf")
class HubDataset(ImageDataset):
    """Labeled images of one split."""

    takes_place = True
    default_resolution = 64

    def __init__(self, request: Request) -> None:
        data, place = request.data, request.data.partition(":")[2]
        splits = _open(data, place)
        rows, rest = _split_of(splits, request.split, data)
        image, label = _columns(rows, data)
        self.name = f"hf-{Path(place).name}"
        self._image, self._rows = image, rows.select_columns([image])
        self.class_names, labels = _classes(splits["train"], rows, label, data)
        kept = torch.arange(len(rows)) if rest is None else rest
        self._places, self._labels = kept, labels[kept]
        try:
            first = self._rows[int(kept[0])][image]
        except Exception as error:  # whatever a decoder says of a damaged file
            raise DataError(f"data {data!r}: the first image cannot be decoded") from error
        self.channels = 1 if first.mode in ("1", "L") else 3
        self.default_resolution = max(4, min(64, *first.size))
        self.resolution = request.resolution_of(self, f"data {data!r}")
        shape = (self.channels, self.resolution, self.resolution)
        is_cached = len(kept) * math.prod(shape) <= CACHE_BYTES
        self._pixels = torch.empty(len(kept) if is_cached else 0, *shape, dtype=torch.uint8)
        self._is_decoded = torch.zeros(len(self._pixels), dtype=torch.bool)

    @classmethod
    def canonical_place(cls, place: str) -> str:
        return os.path.realpath(os.path.expanduser(place)) if _is_folder(place) else place

    def __len__(self) -> int:
        return len(self._places)

    def identity(self) -> dict[str, Any]:
        from datasets import Image

        rows = self._rows.cast_column(self._image, Image(decode=False))
        is_whole = rows.data.nbytes <= WHOLE_BYTES
        count = len(self)
        ends = [*range(_ENDS), *range(count - _ENDS, count)]
        shown = range(count) if is_whole or count <= len(ends) else ends
        digest = hashlib.sha256(self._labels.numpy().tobytes())
        for index in shown:
            raw = rows[int(self._places[index])][self._image]
            digest.update(raw["bytes"] or os.fsencode(os.path.basename(raw["path"])))
        hashed = "contents" if is_whole else "ends"
        return self._identity("hf", digest.hexdigest()) | {"hashed": hashed}

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        self._check_range(indices)
        pixels = torch.empty(len(indices), self.channels, self.resolution, self.resolution)
        for row, index in enumerate(indices.tolist()):
            pixels[row] = self._decoded(index)
        return pixels * (2 / 255) - 1, self._labels[indices]

    def _decoded(self, index: int) -> Tensor:
        if len(self._pixels) and self._is_decoded[index]:
            return self._pixels[index]
        try:
            image = fit_image(self._rows[int(self._places[index])][self._image], self.resolution)
        except Exception as error:  # BadImage, and whatever a decoder says of a damaged file
            reason = str(error) if isinstance(error, BadImage) else "cannot be decoded"
            raise DataError(f"image {index} of {self.name!r}: {reason}") from error
        if self.channels == 1:
            image = ((_LUMA * image).sum(0, keepdim=True) + 500) // 1000
        if len(self._pixels):
            self._pixels[index], self._is_decoded[index] = image, True
        return image


def _is_folder(place: str) -> bool:
    return place[:1] in (".", "/", "~") or os.path.isdir(place)


def _open(data: str, place: str) -> Mapping[str, Any]:
    """The splits of a data set by name."""
    if not place:
        raise DataError("data 'hf' lacks a name: give hf:OWNER/NAME, or hf:./FOLDER")
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"data {data!r} needs the package datasets: pip install 'attnzoo[hf]'"
        ) from error
    try:
        found: Any = _saved(place) if _is_folder(place) else _cached(place)
    except Exception as error:  # the package lets through whatever its files make it raise
        if isinstance(error, DataError):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if _is_folder(place):
            raise DataError(
                f"data {data!r}: no data set that save_to_disk wrote ({reason})"
            ) from error
        name, _, config = place.partition(":")
        call = f'load_dataset("{name}"' + (f', "{config}")' if config else ")")
        raise DataError(
            f"data {data!r} is not in the local cache ({reason}); fetch it once where there is a "
            f"network: python -c 'from datasets import load_dataset; {call}'"
        ) from error
    splits: Any = found if isinstance(found, datasets.DatasetDict) else {"train": found}
    return splits


def _saved(place: str) -> Any:
    from datasets import load_from_disk

    return load_from_disk(str(Path(place).expanduser()))


def _cached(place: str) -> Any:
    from datasets.packaged_modules.cache.cache import Cache

    name, _, config = place.partition(":")
    builder = Cache(
        dataset_name=name.rpartition("/")[2], config_name=config or None, version="auto",
        hash="auto", repo_id=name,
    )  # fmt: skip
    return builder.as_dataset()


def _split_of(splits: Mapping[str, Any], split: str, data: str) -> tuple[Any, Tensor | None]:
    """The rows of "train" or "test", and which of them where they have to be divided."""
    if "train" not in splits:
        raise DataError(
            f"data {data!r} has no split 'train', but {', '.join(splits)}: save the one to train "
            f"on by save_to_disk, and give that folder"
        )
    test = next((name for name in _TESTS if name in splits), None)
    rows = splits["train"] if split == "train" or test is None else splits[test]
    if len(rows) < 2:
        raise DataError(f"data {data!r} has {len(rows)} images in its split, and 2 are the least")
    if test is not None:
        return rows, None
    warn(f"data {data!r} has no split to be measured with: a tenth of it is left out for that")
    return rows, divided(len(rows), HELD_OUT)[split == "test"]


def _columns(rows: Any, data: str) -> tuple[str, str]:
    """Names of the columns of images and of classes."""
    from datasets import ClassLabel, Image

    image = next((name for name, kind in rows.features.items() if isinstance(kind, Image)), None)
    listed = ", ".join(rows.features)
    if image is None:
        raise DataError(f"data {data!r} has no column of images among {listed}")
    classes = [name for name, kind in rows.features.items() if isinstance(kind, ClassLabel)]
    named = [name for name in _LABELS if name in rows.features]
    if not named and len(classes) != 1:
        raise DataError(
            f"data {data!r} has no column 'label' among {listed}: rename the one of the classes "
            f"(rename_column), save_to_disk, and give that folder"
        )
    return image, (named or classes)[0]


def _classes(train: Any, rows: Any, label: str, data: str) -> tuple[tuple[str, ...], Tensor]:
    """Names of the training images' classes, and the class of each row, (n,) int64."""
    names, _ = _named(train, label, data)
    order = {name: index for index, name in enumerate(names)}
    _, found = _named(rows, label, data)
    if unknown := sorted(set(found) - set(order)):
        raise DataError(
            f"data {data!r}: images to be measured with are of {', '.join(unknown[:5])}, of which "
            f"no training image is: leave them out, or train on them too"
        )
    return names, torch.from_numpy(np.asarray([order[name] for name in found], dtype=np.int64))


def _named(rows: Any, label: str, data: str) -> tuple[tuple[str, ...], list[str]]:
    """Names of the classes, and that of each row."""
    from datasets import ClassLabel

    values, kind = list(rows[label][:]), rows.features[label]
    if not all(isinstance(value, int | str) for value in values):
        raise DataError(f"data {data!r}: column {label!r} holds other than classes")
    if not isinstance(kind, ClassLabel):
        # As integers, or in the order of their names.
        return tuple(map(str, sorted(set(values)))), list(map(str, values))
    if not all(0 <= value < len(kind.names) for value in values):
        raise DataError(f"data {data!r}: column {label!r} has images without a class")
    return tuple(kind.names), [kind.names[value] for value in values]
