"""What CI installs: one version of everything, each with hashes, and that is what is installed."""

import importlib.metadata
import re
from pathlib import Path

from packaging.markers import Marker

ROOT = Path(__file__).parents[1]
# Its builds differ by index, and so do their hashes.
WITHOUT_HASH = {"torch"}


def pins(text):
    """(name, marker) -> version and hashes of every requirement of a file."""
    found = {}
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for block in "\n".join(lines).replace("\\\n", " ").splitlines():
        requirement, *hashes = block.split("--hash=")
        match = re.fullmatch(r"([\w.-]+)==([\w.+]+)(?: *; *(.+))?", requirement.strip())
        assert match, f"not pinned: {block[:60]}"
        name, version, marker = match.groups()
        assert (name, marker) not in found, name
        found[name, marker] = version, [text.strip() for text in hashes]
    return found


CONSTRAINTS = pins((ROOT / "constraints.txt").read_text("utf-8"))
LOCKED = pins((ROOT / "requirements.lock").read_text("utf-8"))


def test_what_is_no_pin_is_refused():
    for text in ("numpy>=2", "numpy", "a==1\na==1"):
        try:
            pins(text)
        except AssertionError:
            continue
        raise ValueError(text)


def test_every_pinned_version_has_its_hashes():
    expected = {key: pin[0] for key, pin in CONSTRAINTS.items() if key[0] not in WITHOUT_HASH}
    assert {key: version for key, (version, _) in LOCKED.items()} == expected
    for key, (_, hashes) in LOCKED.items():
        assert hashes, key
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", text) for text in hashes), key


def test_what_is_installed_is_what_is_pinned():
    checked = 0
    for (name, marker), (version, _) in CONSTRAINTS.items():
        if marker is not None and not Marker(marker).evaluate():
            continue
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform, or a part that this environment leaves out
        assert installed.partition("+")[0] == version, name
        checked += 1
    assert checked > 40
