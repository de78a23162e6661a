"""PNG grids of samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from recipes.lab.diffusion import to_uint8
from recipes.lab.files import whole_file


def image_grid(images: Tensor, columns: int, smallest: int = 64, gap: int = 2) -> Image.Image:
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
    zoom = max(1, -(-smallest // max(pixels.shape[1:3])))
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
