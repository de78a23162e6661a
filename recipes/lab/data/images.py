"""Picture files in folders: which ones count, what they hold, how one becomes a square."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import unicodedata
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from recipes.lab.data.checks import DataError, check_seed
from recipes.lab.data.datasets import MAX_PIXELS
from recipes.lab.data.order import permutation
from recipes.lab.distributed import neighbors

# A file is opened by its own reader only: PIL has dozens, some run programs. Names of the common
# formats are often mixed up, so each of those readers takes them all.
_COMMON = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
_READERS = {
    _COMMON: ".jpg .jpeg .png .webp .bmp .gif",
    ("JPEG",): ".jpe .jfif",
    ("PNG",): ".apng",
    ("DIB",): ".dib",
    ("TIFF",): ".tif .tiff",
    ("AVIF",): ".avif .avifs",
    ("PPM",): ".ppm .pgm .pbm .pnm",
    ("JPEG2000",): ".jp2 .j2k .jpc .jpf .jpx .j2c",
    ("QOI",): ".qoi",
}
_FORMATS = {suffix: formats for formats, names in _READERS.items() for suffix in names.split()}
IMAGE_SUFFIXES = frozenset(_FORMATS)
_MOST_THREADS = 16
_AT_ONCE = 256  # decoded before they are taken
# What lies beside images and is none.
_COMPANIONS = frozenset(
    {".txt", ".md", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".toml"}
    | {".html", ".htm", ".db", ".ini", ".log"}
)
# PIL warns at more pixels than that. Once and for all, because catch_warnings is not for threads.
warnings.simplefilter("error", Image.DecompressionBombWarning)
# Enlarging the short side of a very long image to the resolution would need unbounded memory.
MAX_ASPECT = 20
_TOO_LARGE = f"larger than {MAX_PIXELS // 10**6} megapixels"
WHOLE_BYTES = 2**30  # up to so much, a folder is identified by all that its files hold
END_BYTES = 2**16


class BadImage(Exception):
    """One image that cannot be used; the text is the reason."""


def portable(name: str | Path) -> str:
    """A file's name as UTF-8 has it, whatever the locale under which it was listed."""
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def portable_bytes(name: str) -> bytes:
    """The bytes on disk of what ``portable`` gave."""
    return name.encode("utf-8", "surrogateescape")


@dataclasses.dataclass(frozen=True)
class FoundImages:
    """What a folder holds.

    Attributes:
        classes: Names of the class folders, ``portable`` but raw: not safe to print.
        images: Files with their labels.
        skipped: Files that are or may be images and are left out, with the reason.
        notes: Lines about what else was passed over, for a person.
        doubtful: Lines about what is read but is perhaps not meant so.
    """

    classes: tuple[str, ...]
    images: list[tuple[Path, int]]
    skipped: list[tuple[Path, str]]
    notes: list[str]
    doubtful: list[str]

    def check_classes(self, root: Path, labels: Iterable[int]) -> None:
        """Refuses a class without an image, because dropping it would renumber the others.

        Raises:
            DataError: There is one.
        """
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        present = set(labels)
        if not present:
            raise DataError(
                f"no usable image in any class folder of {str(root)!r}: "
                f"add images ({suffixes}) to its sub-folders"
            )
        for label, name in enumerate(self.classes):
            if label not in present:
                raise DataError(
                    f"class folder {str(root / name)!r} has no usable image: "
                    f"add images ({suffixes}) or remove the folder"
                )


def training_folder(folder: Path) -> Path:
    """``folder``, or its ``train`` if the folder holds nothing but splits.

    Folders that this project wrote do not count.
    """
    names = {entry.name for entry in _visible(folder) if entry.is_dir(follow_symlinks=False)}
    splits = {"train", "val", "validation", "test"}
    is_split = "train" in names and all(
        _is_output(_walk(folder / name)) for name in names - splits
    )
    # Classes may be called train and test: only a split has folders of its own.
    has_classes = is_split and any(
        entry.is_dir(follow_symlinks=False) for entry in _visible(folder / "train")
    )
    return folder / "train" if has_classes else folder


def find_images(root: Path, class_count: int | None = None, class_seed: int = 0) -> FoundImages:
    """Lists the classes, the image files with their labels, and what is left out.

    A sub-folder that holds only what this project wrote (runs, latents, comparisons) is no class.

    Args:
        root: Folder with one sub-folder for each class.
        class_count: Take that many classes, in their order; None takes all.
        class_seed: Decides which.

    Raises:
        DataError: The folder has no classes, or fewer than asked for; a class folder is a link,
            or holds what this project wrote among its images.
    """
    check_seed(class_seed)
    found = FoundImages((), [], [], [], [])
    walks = _class_folders(root, found)
    classes = list(walks)
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
        drawn = permutation(len(classes), class_seed, 0)[:class_count]
        classes = [classes[index] for index in sorted(drawn.tolist())]
    others: Counter[str] = Counter()
    real_root = os.path.realpath(root)
    for label, name in enumerate(classes):
        found.skipped.extend(walks[name].skipped)
        others += walks[name].others
        for path in walks[name].images:
            # Links to folders were not followed, so only a link to a file can lead out.
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(real_root):
                found.skipped.append((path, "a link out of the folder is not followed"))
            else:
                found.images.append((path, label))
    if others:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
        found.notes.append(f"passed over files under {str(root)!r} that are no images: {kinds}")
    names = tuple(portable(name) for name in classes)
    spelled: dict[str, str] = {}
    for name in names:
        key = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
        if key in spelled:
            found.doubtful.append(
                f"classes {spelled[key]!r} and {name!r} differ only in upper case or in "
                f"Unicode's form, and are two classes"
            )
        spelled[key] = name
    return dataclasses.replace(found, classes=names)


def _class_folders(root: Path, found: FoundImages) -> dict[str, _Walk]:
    """What lies in each class folder; adds what is passed over to ``found``."""
    walks: dict[str, _Walk] = {}
    entries = _visible(root)
    made = _made_here({entry.name for entry in entries})
    if made:
        raise DataError(f"folder {str(root)!r} is {made}, and no folder of images")
    for entry in entries:
        path = Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            walk = _walk(path)
            if _is_output(walk):
                found.notes.append(f"{str(path)!r} holds {walk.outputs[0][1]} and is no class")
            elif walk.outputs and (walk.images or walk.skipped):
                raise DataError(
                    f"class folder {str(path)!r} holds images, and {walk.outputs[0][1]} in "
                    f"{str(walk.outputs[0][0])!r}: move one of them elsewhere"
                )
            else:
                walks[entry.name] = walk
        elif entry.is_symlink() and not os.path.isfile(entry):
            raise DataError(
                f"{str(path)!r} is {'a link' if os.path.isdir(entry) else 'a dangling link'}, "
                f"which is not followed, so that its class would be missing and the others "
                f"renumbered: put the folder itself there, or remove the link to go without it"
            )
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            found.skipped.append((path, "lies in no class folder"))
    return walks


@dataclasses.dataclass
class _Walk:
    """What lies below one folder.

    Attributes:
        folder: The folder.
        images: Files with an image's suffix.
        skipped: What may be an image and is left out, with the reason.
        others: Number of other files, by suffix.
        outputs: Folders that this project wrote, and what they are; nothing in them is listed.
    """

    folder: Path
    images: list[Path] = dataclasses.field(default_factory=list)
    skipped: list[tuple[Path, str]] = dataclasses.field(default_factory=list)
    others: Counter[str] = dataclasses.field(default_factory=Counter)
    outputs: list[tuple[Path, str]] = dataclasses.field(default_factory=list)


def _walk(folder: Path) -> _Walk:
    walk = _Walk(folder)
    waiting = [folder]
    while waiting:
        place = waiting.pop()
        entries = _visible(place)
        made = _made_here({entry.name for entry in entries})
        if made:
            walk.outputs.append((place, made))
            continue
        for entry in entries:
            path = Path(entry.path)
            suffix = path.suffix.lower()
            if entry.is_dir(follow_symlinks=False):
                waiting.append(path)
            elif not os.path.isfile(entry):
                is_link = entry.is_symlink()
                reason = "a link to a folder, or to nothing, is not followed"
                walk.skipped.append((path, reason if is_link else "no regular file"))
            elif suffix in IMAGE_SUFFIXES:
                walk.images.append(path)
            elif suffix in _COMPANIONS:
                walk.others[suffix] += 1
            else:
                walk.skipped.append((path, f"{suffix or 'no suffix'} is not among what is read"))
    return walk


def _made_here(names: Collection[str]) -> str:
    """What this project wrote into a folder with these names in it; "" if it did not."""
    if "config.json" in names and {"checkpoints", "log.jsonl", "status.json"} & set(names):
        return "a run"
    if "plan.json" in names:
        return "latents of recipes/encode.py"
    tables = {"command.txt", "report.html", "runs.csv", "cells.csv"}
    if {"runs", "cells"} & set(names) and tables & set(names):
        return "a comparison"
    return ""


def _is_output(walk: _Walk) -> bool:
    # Beside their runs, the default folder of the scripts holds pictures of them too.
    is_bare = not (walk.images or walk.skipped)
    return bool(walk.outputs) and (is_bare or walk.folder.name == "runs")


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
        digest.update(portable_bytes(name) + b"\0%d\0" % label + part.encode() + b"\n")
    return digest.hexdigest(), "contents" if is_small else "ends"


def read_image(path: Path, resolution: int) -> tuple[Tensor, int]:
    """Decode, crop and resize one file.

    Returns:
        (3, resolution, resolution) uint8, and the shorter side of the file's image in pixels.

    Raises:
        BadImage: if the file is not an image that can be used.
    """
    try:
        formats = _FORMATS.get(path.suffix.lower(), _COMMON)
        with Image.open(path, formats=formats) as image:
            return fit_image(image, resolution), min(image.size)
    except (BadImage, MemoryError):
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadImage(_TOO_LARGE) from error
    except Exception as error:
        # PIL's readers let struct.error, SyntaxError, KeyError and more out on damaged files.
        reason = " ".join(str(error).replace(str(path), "file").split())
        raise BadImage(f"cannot be decoded ({reason or type(error).__name__})") from error


def fit_image(image: Image.Image, resolution: int) -> Tensor:
    """An open image turned as its EXIF says, on white, resized and cropped at the center.

    Returns:
        (3, resolution, resolution) uint8.

    Raises:
        BadImage: Its size or its mode cannot be used.
    """
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImage(f"{_TOO_LARGE} ({width}x{height})")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImage(f"more than {MAX_ASPECT} times as long as wide ({width}x{height})")
    upright = ImageOps.exif_transpose(image)
    if image.format == "PPM" and image.mode == "I":  # 16 bits, scaled to 65535
        upright = Image.fromarray(np.asarray(upright).astype(np.uint16))
    rgb = _center_crop(to_rgb(upright), resolution)
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def read_images(paths: Sequence[Path], resolution: int) -> Iterator[tuple[Tensor, int] | BadImage]:
    """What ``read_image`` gives or raises for each path, in their order.

    PIL decodes without holding Python's lock, so threads do; how many changes only the time.
    """

    def read(path: Path) -> tuple[Tensor, int] | BadImage:
        try:
            return read_image(path, resolution)
        except BadImage as error:
            return error

    with ThreadPoolExecutor(threads(), "images") as pool:
        for start in range(0, len(paths), _AT_ONCE):
            yield from pool.map(read, paths[start : start + _AT_ONCE])


def threads() -> int:
    """How many images are decoded at the same time: one per core that this process has."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return max(1, min(_MOST_THREADS, cores // neighbors()))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image in eight bits per color, on white where it is transparent."""
    if image.mode.startswith("I;16"):
        # PIL would clip at 255; 65535 / 257 is exactly 255.
        gray = np.round(np.asarray(image).astype(np.float64) / 257).astype(np.uint8)
        return Image.fromarray(gray).convert("RGB")
    if image.mode in ("I", "F"):
        raise BadImage(f"mode {image.mode} has no defined white; save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _center_crop(image: Image.Image, resolution: int) -> Image.Image:
    # Box-halving first, as in ADM (Dhariwal & Nichol 2021), keeps the results comparable.
    while min(image.size) >= 2 * resolution:
        image = image.reduce(2)
    ratio = resolution / min(image.size)
    width, height = (max(resolution, round(side * ratio)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))
