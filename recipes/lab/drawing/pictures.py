"""PNG grids of samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from recipes.lab.console import UserError
from recipes.lab.diffusion import to_uint8
from recipes.lab.files import whole_file

_SMALLEST, _GAP = 64, 2
# Pixels on a side that a kind of file can hold.
_LARGEST = {".webp": 16383, ".jpg": 65500, ".jpeg": 65500, ".gif": 65535}


def check_grid(count: int, columns: int, side: int, path: Path) -> None:
    """Refuses a picture that its kind of file cannot hold, before its images are drawn.

    Args:
        count: Number of images.
        columns: Images per row.
        side: Of an image, in pixels.
        path: The picture.

    Raises:
        UserError: It is too large.
    """
    largest = _LARGEST.get(path.suffix.lower())
    needed = max(columns, -(-count // columns)) * (side * _zoom(side, _SMALLEST) + _GAP) + _GAP
    if largest is not None and needed > largest:
        raise UserError(
            f"{count} images in {columns} columns are {needed} pixels long, and a "
            f"{path.suffix.lower()} holds {largest}: draw fewer, or let --out end in .png"
        )


def _zoom(side: int, smallest: int) -> int:
    return max(1, -(-smallest // side))


def image_grid(
    images: Tensor, columns: int, smallest: int = _SMALLEST, gap: int = _GAP
) -> Image.Image:
    """Lays images out row by row, enlarged by whole pixels until a person can see them.

    Args:
        images: (n, 1 or 3, h, w), nominally in [-1, 1]; other channel counts show the first.
        columns: Images per row.
        smallest: Least side of one image in the picture, in pixels.
        gap: White pixels between images.

    Returns:
        An RGB picture.
    """
    pixels = to_uint8(images).numpy()
    if pixels.shape[-1] != 3:
        pixels = pixels[..., :1].repeat(3, axis=-1)
    zoom = _zoom(max(pixels.shape[1:3]), smallest)
    pixels = pixels.repeat(zoom, axis=1).repeat(zoom, axis=2)
    count, height, width, _ = pixels.shape
    rows = -(-count // columns)
    canvas = np.full(
        (rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, dtype=np.uint8
    )
    for index, image in enumerate(pixels):
        top = gap + (index // columns) * (height + gap)
        left = gap + (index % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return Image.fromarray(canvas)


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Writes ``image_grid``, making its folder; the kind of file follows the suffix.

    Raises:
        CannotWrite: The system refuses.
    """
    with whole_file(path) as temporary:
        image_grid(images, columns).save(temporary)
