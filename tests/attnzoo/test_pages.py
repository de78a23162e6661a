"""Each mechanism's page names the options that its code has, their defaults and their values."""

import ast
import dataclasses
import re
import typing
from pathlib import Path

import pytest

from attnzoo import get_attention, list_attention
from attnzoo.command.listing import table

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "mechanisms"
# Not of the mechanism's own config: the context's, and the backbone's.
ELSEWHERE = {"num_heads", "position"}


def page_of(name: str) -> str:
    return (PAGES / f"{name.removesuffix('-map')}.md").read_text(encoding="utf-8")


def tables(page: str) -> list[list[list[str]]]:
    """The cells of every table of options, its header first."""
    blocks = re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE)
    rows = [
        [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in block.splitlines()]
        for block in blocks
    ]
    return [table for table in rows if "option" in table[0]]


def test_the_readme_has_the_table_of_the_classes():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(
        r"<!-- python -m attnzoo --table -->\n(.*?)\n<!-- end -->", readme, re.DOTALL
    )
    assert block is not None
    assert block[1] == table(), "put what `python -m attnzoo --table` prints there"
    assert all(f"| `{name}` |" in block[1] for name in ("softmax", "dydila-map"))


def test_every_mechanism_has_a_page():
    assert {f"{name.removesuffix('-map')}.md" for name in list_attention()} <= {
        path.name for path in PAGES.glob("*.md")
    }


@pytest.mark.parametrize("name", list_attention())
def test_the_page_has_the_options_of_the_code_and_their_defaults(name):
    fields = {field.name: field for field in dataclasses.fields(get_attention(name).Config)}
    named = set()
    for header, _, *rows in tables(page_of(name)):
        column = header.index("option")
        for row in rows:
            options = re.findall(r"`(\w+)`", row[column])
            named |= set(options)
            if column > 0:  # the table of open questions states its defaults in words
                continue
            said = re.sub(r", of dydila-map.*", "", row[1].replace("`", ""))
            for option, value in zip(options, said.split(", "), strict=False):
                if option in fields and (name, option) != ("dydila-map", "differential"):
                    assert ast.literal_eval(value) == fields[option].default, (option, value)
    assert named - ELSEWHERE == set(fields)


@pytest.mark.parametrize("name", list_attention())
def test_the_page_lists_every_way_to_compute(name):
    hints = typing.get_type_hints(get_attention(name).Config)
    page = page_of(name)
    if refers := re.search(r"\| `impl` .*(?:as in `|see \[)(\w+)", page):
        page += page_of(refers[1])
    for impl in typing.get_args(hints["impl"]):
        assert f'"{impl}"' in page, impl
