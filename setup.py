"""The README as the index shows it: there a link into the repository must be absolute.

Everything else about the package is in pyproject.toml.
"""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
_LINK = r"(?!https?:|mailto:|#)([^\s)\"]+)"


def long_description() -> str:
    """README.md with absolute links: of pictures to the files, of the rest to their pages."""
    text = (ROOT / "README.md").read_text("utf-8")
    settings = (ROOT / "pyproject.toml").read_text("utf-8")
    repository = re.findall(r'^Repository = "(.*)"', settings, re.MULTILINE)[0]
    raw, page = f"{repository}/raw/main/", f"{repository}/blob/main/"
    text = re.sub(rf"(!\[[^]]*\]\(){_LINK}", rf"\g<1>{raw}\g<2>", text)
    text = re.sub(rf"(<img[^>]*\bsrc=\"|srcset=\"){_LINK}", rf"\g<1>{raw}\g<2>", text)
    return re.sub(rf"(?<=\]\(){_LINK}", rf"{page}\g<1>", text)


if __name__ == "__main__":
    setup(long_description=long_description(), long_description_content_type="text/markdown")
