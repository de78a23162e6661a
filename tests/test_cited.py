"""docs/cited.md: all references of the paper, each with its place here or the reason for none."""

import re
from pathlib import Path

import pytest

from attnzoo import get_attention, list_attention

ROOT = Path(__file__).parents[1]
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in (ROOT / "docs" / "cited.md").read_text(encoding="utf-8").splitlines()
    if re.match(r"\| \d+ \|", line)
]
# Numbers on arXiv of the mechanisms that the paper cites, which its own list gives.
CITED = {
    number: [row for row in ROWS if number in row[2]]
    for row in ROWS
    for number in re.findall(r"\[(\d{4}\.\d{4,5})\]", row[2])
}


def test_there_are_47_in_the_order_of_the_paper():
    assert [int(row[0]) for row in ROWS] == list(range(1, 48))
    assert all(len(row) == 4 and all(row) for row in ROWS)


@pytest.mark.parametrize("name", list_attention())
def test_a_mechanism_whose_paper_is_cited_is_named_there(name):
    number = get_attention(name).paper.rpartition(", ")[2]
    if number in CITED:
        assert any(f"`{name}`" in row[3] for row in CITED[number]), (name, number)
    else:  # and none else is taken for the paper's
        said = [row for row in ROWS if row[3].startswith(f"`{name}`")]
        assert not said, (name, said)


def test_every_reference_is_a_mechanism_or_says_why_not():
    for row in ROWS:
        is_mechanism = re.match(r"`[a-z-]+`", row[3]) or "selective scan of" in row[3]
        assert is_mechanism or re.match("no mechanism|as the row above", row[3]), row


def test_every_file_that_is_named_is_there():
    named = re.findall(r"`((?:attnzoo|backbones|recipes)/[\w/]+\.py)`", str(ROWS))
    assert len(named) > 10
    assert not [path for path in named if not (ROOT / path).exists()]


def test_every_feedforward_that_is_named_can_be_built():
    from backbones.feedforward import FEEDFORWARDS

    named = set(re.findall(r'feedforward="([\w-]+)"', str(ROWS)))
    assert named and named <= set(FEEDFORWARDS)
