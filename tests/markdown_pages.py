"""The Markdown that people read, for the tests that hold it to the code."""

import contextlib
import re
import shlex
from pathlib import Path

from attnzoo import registry

ROOT = Path(__file__).parents[1]


def pages():
    """Every file that people read as Markdown."""
    return [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
        (ROOT / "docs").rglob("*.md")
    )


def code_blocks(text, language):
    """The contents of the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands(text):
    """The words of every command line of a page's shell blocks."""
    blocks = (block.replace("\\\n", " ") for block in code_blocks(text, "sh"))
    lines = [line for block in blocks for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def named_code(text):
    """Python blocks by the file name that stands before each."""
    return dict(re.findall(r"`(\w+\.py)`[^\n`]*\n\n```python\n(.*?)^```", text,
                           flags=re.DOTALL | re.MULTILINE))  # fmt: skip


def without_code(text):
    """A page without its blocks and words of code, in which nothing is a link."""
    text = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(text):
    """The anchors that a code host, and mkdocs.yml, give a page's headings."""
    found = []
    for title in re.findall(r"^#+ +(.*?) *$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL
                                                     | re.MULTILINE), re.MULTILINE):  # fmt: skip
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()
        found.append(re.sub(r"[^\w\- ]", "", words).replace(" ", "-"))
    return found


@contextlib.contextmanager
def without_side_effects():
    """Forgets the mechanisms that are registered inside."""
    before = set(registry._REGISTRY)
    try:
        yield
    finally:
        for name in set(registry._REGISTRY) - before:
            del registry._REGISTRY[name]
