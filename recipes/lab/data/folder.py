"""A folder of images with one sub-folder for each class: the data set of everyone's own data.

Image files (the suffixes of ``images.IMAGE_SUFFIXES``; at any depth of a class folder; the first
frame of an animation) are turned as their EXIF says, laid on white where transparent, halved until
close to the resolution, resized to it and cropped at the center. Hidden names are passed over;
links to folders are not followed, nor links to files outside the folder; a class folder that is a
link is refused, and what this project wrote is no class. Every image is decoded once here, and
held in memory up to 1 GiB in all. Those that fail or have another suffix are counted and named on
stderr and listed in ``skipped``.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recipes.lab.console import warn
from recipes.lab.data.checks import DataError
from recipes.lab.data.datasets import ImageDataset, Request, register_dataset
from recipes.lab.data.images import (
    WHOLE_BYTES,
    BadImage,
    digest_file,
    digest_images,
    find_images,
    portable,
    read_images,
    training_folder,
)

CACHE_BYTES = 2**30


@register_dataset("folder", is_named=False)
class FolderDataset(ImageDataset):
    """Images of a folder with one sub-folder for each class.

    Attributes:
        skipped: path and reason of every file that was left out.
    """

    resolutions = (4, None)
    default_resolution = 64
    channels = 3
    splits = ("train",)
    horizontal_flip = True
    chooses_classes = True

    def __init__(self, request: Request) -> None:
        folder = Path(os.path.expanduser(request.data))
        if not os.path.isdir(folder):
            raise DataError(
                f"data {request.data!r} is a file: give a folder with one sub-folder of images "
                f"for each class"
            )
        self.name = folder.resolve().name
        self.resolution = request.resolution_of(self, f"folder {str(folder)!r}")
        self._open(training_folder(folder), request)

    def _takes(self, path: Path) -> bool:
        """Whether an image of the folder belongs to the set."""
        return True

    def _open(self, folder: Path, request: Request) -> None:
        """Reads the classes and images of ``folder``."""
        strict = request.strict
        found = find_images(folder, request.class_count, request.class_seed)
        images = [(path, label) for path, label in found.images if self._takes(path)]
        self.class_names, self.skipped = found.classes, found.skipped
        self._root, self._found = folder, images
        for line in found.notes + ([] if strict else found.doubtful):
            warn(line)
        if strict and found.doubtful:
            raise DataError(f"{found.doubtful[0]}: rename one, or drop the strict option")
        self._read(folder, images)
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
        images = read_images([path for path, _ in found], self.resolution)
        for (path, label), decoded in zip(found, images, strict=True):
            if isinstance(decoded, BadImage):
                self.skipped.append((path, str(decoded)))
                continue
            image, shorter = decoded
            if cached:
                pixels[len(files)] = image
            enlarged += shorter < self.resolution
            files.append(path)
            labels.append(label)
        self._pixels = pixels[: len(files)] if cached else None
        self._files = files
        self._labels = torch.tensor(labels, dtype=torch.int64)
        if enlarged:
            warn(
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
        warn(f"skipped {len(self.skipped)} of {total} images under {str(folder)!r}: {counted}")
        for path, reason in self.skipped[:5]:
            warn(f"  {str(path)!r}: {reason}")
        if len(self.skipped) > 5:
            warn(f"  and {len(self.skipped) - 5} more")

    def __len__(self) -> int:
        return len(self._files)

    def identity(self) -> dict[str, Any]:
        whole = sum(path.stat().st_size for path, _ in self._found if path.exists()) <= WHOLE_BYTES
        sha256, hashed = digest_images(
            (portable(path.relative_to(self._root)), label, digest_file(path, whole))
            for path, label in self._found
        )
        return self._identity("folder", sha256) | {"hashed": hashed}

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        self._check_range(indices)
        if self._pixels is not None:
            pixels = self._pixels[indices]
        else:
            pixels = torch.empty((len(indices), 3, self.resolution, self.resolution))
            paths = [self._files[index] for index in indices.tolist()]
            for row, decoded in enumerate(read_images(paths, self.resolution)):
                if isinstance(decoded, BadImage):
                    raise DataError(
                        f"image {str(paths[row])!r} was readable when the run began: {decoded}; "
                        "restore the file, or start again without it"
                    ) from decoded
                pixels[row] = decoded[0]
        return pixels.float() * (2 / 255) - 1, self._labels[indices]
