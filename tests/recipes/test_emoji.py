"""The emoji: what is fetched, what is refused, and that no variant leaks across the split."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile

import pytest
from PIL import Image

from recipes.fetch import main
from recipes.lab.console import UserError
from recipes.lab.data import emoji
from recipes.lab.data.checks import DataError
from recipes.lab.data.datasets import load_dataset
from recipes.lab.data.emoji import Package, family_of, fetch, is_test


def codes() -> dict[str, str]:
    """Many emoji of two categories, and their variants."""
    plain = {f"1f{number:03x}": "Food & Drink" for number in range(0x300, 0x340)}
    tones = {f"1f{n:03x}-1f3f{t}": "People & Body" for n in range(0x600, 0x610) for t in "bcd"}
    return plain | tones | {"1f3fb": "Component"}


def tarball(path, member, size, table=True):
    """Writes what looks like a package of npm, and gives its hash."""
    with tarfile.open(path, "w:gz") as archive:

        def add(name, content):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))

        if table:
            entries = [{"unified": c.upper(), "category": k} for c, k in codes().items()]
            add("package/emoji.json", json.dumps(entries).encode())
        add("package/../outside.png", b"no image that is asked for")
        for index, code in enumerate(codes()):
            image, content = Image.new("RGBA", (size, size), (index, 0, 0, 128)), io.BytesIO()
            image.save(content, "WEBP" if member.endswith("webp") else "PNG")
            add(member.format(code), content.getvalue())
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Two packages with their tarballs."""
    root, made = tmp_path_factory.mktemp("tarballs"), {}
    for maker, member, size in (
        ("noto", "package/{}.png", 64),
        ("fluent", "package/{}.webp", 256),
    ):
        path = root / f"{maker}.tgz"
        digest = tarball(path, member, size, table=maker == "noto")
        pattern = member.replace(".", r"\.").format("([0-9a-f-]+)")
        made[Package(f"{maker}@1", maker, digest, pattern, "free")] = path
    return made


def test_what_is_fetched_is_two_splits_with_licenses(packages, tmp_path, capsys):
    out = tmp_path / "emoji"
    out.mkdir()
    (out / ".tmp-1-0a-LICENCES.txt").touch()  # as a call leaves that was killed
    count = fetch(out, list(packages.values()), list(packages))
    assert not [*out.glob(".*")]
    assert count == 2 * (len(codes()) - 1)  # a skin tone alone is no emoji
    assert "free; from noto@1 of npm" in (out / "LICENCES.txt").read_text()
    assert not (tmp_path / "outside.png").exists()
    train, test = (load_dataset(f"emoji:{out}", split=split) for split in ("train", "test"))
    assert (len(train) + len(test), train.class_names) == (count, ("food", "people"))
    assert train.identity()["sha256"] != test.identity()["sha256"]
    # Above 64 px nothing is enlarged.
    large = load_dataset(f"emoji:{out}", split="train", resolution=256)
    assert 2 * len(large) == len(train) and "enlarged" not in capsys.readouterr().err
    # One maker's are the same images at any resolution.
    few = [load_dataset(f"emoji:{out}", resolution=r, level="fluent") for r in (16, 256)]
    assert [len(one) for one in few] == [len(large), len(large)]
    assert len({one.identity()["sha256"] for one in (*few, large)}) == 1
    # Again, over what an earlier version had put on the other side.
    files = {file.relative_to(out) for file in out.rglob("*.*")}
    moved = next(out.glob("test/food/noto-*"))
    moved.rename(out / "train" / "food" / moved.name)
    (out / "train" / "food" / f".tmp-1-0a-{moved.name}").touch()
    assert fetch(out, list(packages.values()), list(packages)) == count
    assert {file.relative_to(out) for file in out.rglob("*.*")} == files


def test_no_variant_of_an_emoji_lies_on_the_other_side(packages, tmp_path):
    out = tmp_path / "emoji"
    fetch(out, list(packages.values()), list(packages))
    sides: dict[str, set[str]] = {}
    for file in out.rglob("*-*.*"):
        sides.setdefault(family_of(file.stem.partition("-")[2]), set()).add(file.parts[-3])
    assert {"train"} in sides.values() and {"test"} in sides.values()
    assert all(len(found) == 1 for found in sides.values())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1F44B", "1f44b-1f3ff"),  # skin tone
        ("1f469-200d-1f692", "1f468-1f3fd-200d-1f692"),  # a firefighter of any gender
        ("1f3c3-200d-2640-fe0f", "1f3c3"),  # a sign of gender
        ("1f9d1-1f3fb-200d-1f91d-200d-1f9d1-1f3ff", "1f46c"),  # holding hands
        ("1f491-1f3fd", "1f468-1f3fd-200d-2764-fe0f-200d-1f468-1f3fd"),  # in love
        ("1f46a", "1f469-200d-1f469-200d-1f466"),  # a family
        ("1f471-1f3fc-200d-2640-fe0f", "1f469-1f3fc"),  # blond
        ("1f3c3-200d-2642-fe0f-200d-27a1-fe0f", "1f3c3"),  # facing right
        ("1f1e7-1f1fb", "1f1f3-1f1f4"),  # Bouvet Island has Norway's flag
        ("2764", "2764-fe0f"),
        ("1f935-200d-2640-fe0f", "1f935-1f3fb-200d-2642-fe0f"),
    ],
)
def test_variants_are_one_family(one, other):
    assert family_of(one) == family_of(other)
    assert is_test(one) == is_test(other)


def test_other_emoji_are_other_families():
    others = ("1f44b", "1f44c", "1f469-200d-1f692", "1f469", "27a1", "1f1f8-1f1ea")
    assert len({family_of(code) for code in others}) == len(others)


def test_bad_input_is_one_line(packages, tmp_path, monkeypatch, capsys):
    with pytest.raises(DataError, match=r"recipes/fetch.py emoji"):
        load_dataset(f"emoji:{tmp_path}")
    wrong = tmp_path / "wrong.tgz"
    wrong.write_bytes(b"another version")
    with pytest.raises(UserError, match=r"is none of .*its SHA-256 is [0-9a-f]{64}"):
        main(["emoji", "--out", str(tmp_path / "out"), "--tarballs", str(wrong)])
    with pytest.raises(UserError, match="tarballs of fluent@1 are missing"):
        fetch(tmp_path / "out", [next(iter(packages.values()))], list(packages))
    mine = tmp_path / "mine" / "train"
    mine.mkdir(parents=True)
    for folder in (tmp_path, mine.parent):  # also one that is laid out alike
        with pytest.raises(UserError, match="holds no emoji"):
            fetch(folder, list(packages.values()), list(packages))
    monkeypatch.setenv("PATH", str(tmp_path))  # no npm
    with pytest.raises(UserError, match=r"npm cannot be run .* npm pack emoji-datasource-google"):
        main(["emoji", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_published_packages_are_pinned():
    assert len({package.sha256 for package in emoji.PACKAGES}) == 3
