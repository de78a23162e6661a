"""Fashion-MNIST (Xiao et al. 2017), from the Debian package or a folder of its four files."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recipes.lab.data.checks import DataError
from recipes.lab.data.datasets import ArrayDataset, Request, register_dataset

PACKAGE_FOLDER = Path("/usr/share/datasets/fashion-mnist")
MAX_IMAGES = 1_000_000


@register_dataset("fashion-mnist")
class FashionMNIST(ArrayDataset):
    """60,000 gray pictures of clothes, and 10,000 to test with."""

    takes_place = True
    resolutions = (4, 28)
    default_resolution = 28
    class_names = (
        *("t-shirt", "trouser", "pullover", "dress", "coat"),
        *("sandal", "shirt", "sneaker", "bag", "ankle-boot"),
    )
    accuracy_floor = 0.85

    def __init__(self, request: Request) -> None:
        place = request.data.partition(":")[2]
        folder = Path(os.path.expanduser(place)) if place else PACKAGE_FOLDER
        prefix = "train" if request.split == "train" else "t10k"
        image_path = folder / f"{prefix}-images-idx3-ubyte.gz"
        label_path = folder / f"{prefix}-labels-idx1-ubyte.gz"
        for path in (image_path, label_path):
            if not os.path.isfile(path):
                raise DataError(
                    f"fashion-mnist file {str(path)!r} is missing: "
                    "apt-get install dataset-fashion-mnist, or give the folder that holds the "
                    "four .gz files as fashion-mnist:FOLDER"
                )
        pixels = _read_idx(image_path, (28, 28))
        labels = _read_idx(label_path, ()).astype(np.int64)
        wrong = ""
        if len(pixels) != len(labels):
            wrong = f"has {len(labels)} labels for {len(pixels)} images"
        elif labels.max() >= len(self.class_names):
            wrong = f"holds label {labels.max()} of only {len(self.class_names)} classes"
        if wrong:
            raise DataError(f"{str(label_path)!r} {wrong}: fetch both files again from one source")
        self._hold(request, pixels, labels, white=255)


def _read_idx(path: Path, item_shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Read a gzip-compressed idx file of unsigned bytes, (n, *item_shape)."""
    rank = 1 + len(item_shape)
    try:
        with gzip.open(path, "rb") as file:
            header = np.frombuffer(file.read(4 * (1 + rank)), dtype=">u4").tolist()
            if len(header) != 1 + rank or header[0] != 0x0800 + rank:
                raise ValueError(f"it is no idx file of unsigned bytes in {rank} dimensions")
            shape = header[1:]
            if tuple(shape[1:]) != item_shape or not 1 <= shape[0] <= MAX_IMAGES:
                wanted, found = ("x".join(map(str, s)) for s in (("N", *item_shape), shape))
                raise ValueError(f"its size is {found}, not {wanted}")
            # One byte more than announced shows a surplus without unpacking all of it.
            content = file.read(math.prod(shape) + 1)
        if len(content) != math.prod(shape):
            amount = "fewer" if len(content) < math.prod(shape) else "more"
            raise ValueError(f"it has {amount} bytes than its header says")
    except (EOFError, OSError, ValueError, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{str(path)!r} is damaged or unreadable ({reason}): fetch the file again"
        ) from error
    return np.frombuffer(content, dtype=np.uint8).reshape(shape).copy()
