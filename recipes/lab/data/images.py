"""Picture files in folders: which ones count, and how one becomes a square of pixels."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from recipes.lab.data.errors import DataError
from recipes.lab.data.order import permutation
from recipes.lab.data.shapes import check_seed

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"})
# A file is opened only by these readers, whatever its name: PIL has dozens, some run programs.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
MAX_PIXELS = 50_000_000
# PIL warns at more pixels than that. Once and for all, because catch_warnings is not for threads.
warnings.simplefilter("error", Image.DecompressionBombWarning)
# Enlarging the short side of a very long image to the resolution would need unbounded memory.
MAX_ASPECT = 20
WHOLE_BYTES = 2**30  # up to so much, a folder is identified by all that its files hold
END_BYTES = 2**16


class BadImage(Exception):
    """One image that cannot be used; the text is the reason."""


def training_folder(folder: Path) -> Path:
    """``folder``, or its ``train`` if the folder holds nothing but splits."""
    names = {entry.name for entry in _visible(folder) if entry.is_dir(follow_symlinks=False)}
    is_split = "train" in names and names <= {"train", "val", "validation", "test"}
    # Classes may be called train and test: only a split has folders of its own.
    has_classes = is_split and any(
        entry.is_dir(follow_symlinks=False) for entry in _visible(folder / "train")
    )
    return folder / "train" if has_classes else folder


_REFUSED_LINK = "a link to a folder, or to nothing, is not followed"


def find_images(
    root: Path, class_count: int | None = None, class_seed: int = 0
) -> tuple[tuple[str, ...], list[tuple[Path, int]], list[tuple[Path, str]]]:
    """List the classes, the image files with their labels, and the links that are refused.

    Args:
        root: folder with one sub-folder for each class.
        class_count: keep that many classes, in their order; None keeps all.
        class_seed: decides which.

    Raises:
        DataError: if the folder has no classes, or fewer than asked for.
    """
    skipped: list[tuple[Path, str]] = []
    classes: list[str] = []
    for entry in _visible(root):
        if entry.is_dir(follow_symlinks=False):
            classes.append(entry.name)
        elif entry.is_symlink() and not os.path.isfile(entry):
            skipped.append((Path(entry.path), _REFUSED_LINK))
    if not classes:
        raise DataError(
            f"folder {str(root)!r} has no sub-folders: make one for each class and put the images "
            "there (hidden folders and links to folders do not count)"
        )
    if class_count is not None:
        if not 1 <= class_count <= len(classes):
            raise DataError(
                f"class count {class_count} is out of range: folder {str(root)!r} has "
                f"{len(classes)} classes"
            )
        drawn = permutation(len(classes), check_seed(class_seed), 0)[:class_count]
        classes = [classes[index] for index in sorted(drawn.tolist())]
    real_root = os.path.realpath(root)
    found: list[tuple[Path, int]] = []
    for label, name in enumerate(classes):
        waiting = [root / name]
        while waiting:
            for entry in _visible(waiting.pop()):
                path = Path(entry.path)
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(path)
                elif entry.is_symlink() and not os.path.isfile(entry):
                    skipped.append((path, _REFUSED_LINK))
                elif path.suffix.lower() in IMAGE_SUFFIXES and os.path.isfile(entry):
                    target = os.path.realpath(path)
                    if os.path.commonpath([real_root, target]) == real_root:
                        found.append((path, label))
                    else:
                        skipped.append((path, "a link out of the folder is not followed"))
    return tuple(classes), found, skipped


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        raise DataError(
            f"folder {str(folder)!r} cannot be read ({error.strerror}): make it readable"
        ) from error


class FileDigest(NamedTuple):
    """What a file holds.

    Attributes:
        size: In bytes.
        whole: SHA-256 of all of it; "" if it was not read.
        ends: SHA-256 of its size and its first and last 64 KiB.
    """

    size: int
    whole: str
    ends: str


def digest_file(path: Path, whole: bool = True) -> FileDigest:
    """What a file holds; of one that cannot be read, that it cannot.

    Args:
        path: The file.
        whole: Whether to read all of it.
    """
    digest, ends = hashlib.sha256(), hashlib.sha256()
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            ends.update(b"%d:" % size + file.read(END_BYTES))
            file.seek(max(0, size - END_BYTES))
            ends.update(file.read(END_BYTES))
            file.seek(0)
            while whole and (piece := file.read(1 << 20)):
                digest.update(piece)
    except OSError:
        return FileDigest(0, "unreadable", "unreadable")
    return FileDigest(size, digest.hexdigest() if whole else "", ends.hexdigest())


def digest_images(files: Iterable[tuple[str, int, FileDigest]]) -> tuple[str, str]:
    """What a folder of images holds.

    Args:
        files: Name relative to the folder, label and content of every image.

    Returns:
        SHA-256 over them, and which part of the contents it is of: "contents", or "ends" if
        there are more than ``WHOLE_BYTES``.
    """
    files = list(files)
    is_small = sum(content.size for _, _, content in files) <= WHOLE_BYTES
    digest = hashlib.sha256()
    for name, label, content in files:
        part = content.whole if is_small else content.ends
        digest.update(os.fsencode(name) + b"\0%d\0" % label + part.encode() + b"\n")
    return digest.hexdigest(), "contents" if is_small else "ends"


def read_image(path: Path, resolution: int) -> tuple[Tensor, int]:
    """Decode, crop and resize one file.

    Returns:
        (3, resolution, resolution) uint8, and the shorter side of the file's image in pixels.

    Raises:
        BadImage: if the file is not an image that can be used.
    """
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            width, height = image.size
            _check_size(width, height)
            rgb = _centre_crop(to_rgb(ImageOps.exif_transpose(image)), resolution)
    except (BadImage, MemoryError):
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadImage(f"larger than {MAX_PIXELS // 10**6} megapixels") from error
    except Exception as error:
        # PIL's readers let struct.error, SyntaxError, KeyError and more out on damaged files.
        reason = " ".join(str(error).replace(str(path), "file").split())
        raise BadImage(f"cannot be decoded ({reason or type(error).__name__})") from error
    pixels = torch.from_numpy(np.array(rgb)).permute(2, 0, 1)
    return pixels, min(width, height)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImage(f"larger than {MAX_PIXELS // 10**6} megapixels ({width}x{height})")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImage(f"more than {MAX_ASPECT} times as long as wide ({width}x{height})")


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image in eight bits per colour, on white where it is transparent."""
    if image.mode.startswith("I;16"):
        # PIL would clip at 255; 65535 / 257 is exactly 255.
        grey = np.round(np.asarray(image).astype(np.float64) / 257).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        raise BadImage(f"mode {image.mode} has no defined white; save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _centre_crop(image: Image.Image, resolution: int) -> Image.Image:
    # Box-halving first, as in ADM (Dhariwal & Nichol 2021), keeps the results comparable.
    while min(image.size) >= 2 * resolution:
        image = image.reduce(2)
    ratio = resolution / min(image.size)
    width, height = (max(resolution, round(side * ratio)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))
