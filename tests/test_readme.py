"""The README is short, its code runs, and what it states stands in a file that a command wrote."""

import re

import pytest

from attnzoo import list_attention
from attnzoo.command.figures import shipped
from bench import first_screen
from recipes.studies.quality.decide import decide
from recipes.studies.quality.table import read
from tests.markdown_pages import ROOT, code_blocks, without_side_effects

TEXT = (ROOT / "README.md").read_text("utf-8")
SENTENCES = " ".join(TEXT.split())


def page(name):
    return (ROOT / "docs" / name).read_text("utf-8")


def test_it_is_read_in_a_minute():
    assert len(TEXT.splitlines()) <= 200
    assert len(TEXT.split()) <= 1500


def test_the_question_comes_first_and_the_citation_last():
    first = TEXT.splitlines()[2]
    assert first.startswith("**Which attention") and first.endswith("?**")
    order = [
        "<!-- first screen -->",
        "<!-- /first screen -->",
        "**Where softmax wins:**",
        "make demo",
        "## Your own images",
        "## In your own code",
        "## Your own mechanism",
        "--table -->",
        "## Where everything lives",
        "## Cite",
    ]
    places = [TEXT.index(part) for part in order]
    assert places == sorted(places)
    assert all(TEXT.count(part) == 1 for part in order)


def test_no_goals_are_shown():
    for word in ("<!-- goals", "minimum missed", "NOT MET", "| G1 "):
        assert word not in TEXT, word


@pytest.mark.parametrize("code", code_blocks(TEXT, "python"), ids=["use", "own mechanism"])
def test_code_runs(code):
    with without_side_effects():
        exec(compile(code, "README.md", "exec"), {})


def test_what_is_run_elsewhere_is_printed_as_it_is_run():
    """tests/test_roads.py runs these blocks of the pages."""
    images = code_blocks(TEXT, "sh")[1]
    assert images in code_blocks(page("own-data.md"), "sh")
    assert len(images.splitlines()) == 5 and "metrics" in page("own-data.md")
    (own,) = [code for code in code_blocks(TEXT, "python") if "register_attention" in code]
    assert own in code_blocks(page("write-a-mechanism.md"), "python")


def test_the_two_commands_are_targets_of_make():
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    commands = [line.split("#")[0].split() for line in code_blocks(TEXT, "sh")[0].splitlines()]
    assert commands == [["make", "demo"], ["make", "test"]]
    assert targets and {name for _, name in commands} <= set(targets[1].split())


def test_the_table_lists_the_whole_zoo():
    listed = re.findall(r"^\| `([a-z-]+)` \|", TEXT, flags=re.MULTILINE)
    assert sorted(listed) == list_attention()
    assert f"{len(listed)} interchangeable attention mechanisms" in SENTENCES


def test_every_folder_that_is_named_is_there():
    part = TEXT[TEXT.index("## Where everything lives") :]
    named = re.findall(r"`([\w/]+/)`", part)
    assert len(named) >= 8
    assert not [folder for folder in named if not (ROOT / folder).is_dir()]


def test_where_softmax_wins_is_what_was_measured():
    rows = shipped().of("h100", "S", "forward")
    over = {row.mechanism: row.over_softmax for row in rows if row.resolution == 256}
    assert (
        f"On an H100, size S at 256 px takes {over['sana']:.2f} times softmax's time with Sana, "
        f"{over['dydila']:.2f} with DyDiLA"
    ) in SENTENCES


def test_quality_is_what_the_studies_decide():
    decisions = decide(read(ROOT / "docs" / "results.csv"))
    found = {
        (one.study, one.claim.first, one.claim.second, one.px): one
        for one in decisions
        if one.protocol == "depth"
    }
    sana = [found["resolution", "softmax", "sana", px] for px in (32, 64, 128, 256)]
    assert all(one.kind == "holds" and one.difference.pairs == 3 for one in sana)
    percent = [f"{-one.difference.percent:.1f}" for one in sana]
    assert (
        f"With 64, 256, 1,024 and 4,096 tokens (2,000 steps, three seeds) softmax's held-out "
        f"loss is {', '.join(percent[:3])} and {percent[3]} % below Sana's, in equal time"
    ) in SENTENCES
    in_time = {one.claim[1:3]: one for one in decisions if one.protocol == "time" and one.px == 64}
    over_sana = in_time["softmax", "sana"]
    assert over_sana.kind == "holds"
    assert f"below Sana's, in equal time {-over_sana.difference.percent:.1f} %." in SENTENCES
    assert "At 4,096 tokens FID prefers Sana." in SENTENCES
    assert "clearest `sana` before `softmax` at 256 px" in (ROOT / "docs/results.md").read_text()
    dydila = [found["resolution", "dydila", "softmax", px] for px in (32, 64, 128, 256)]
    assert all(one.difference.bound_percent < 3 for one in dydila)
    slower = in_time["dydila", "softmax"]
    assert slower.kind == "opposite"
    without = found["controls", "dydila, no conv", "softmax", 64]
    assert without.kind == "opposite"
    assert (
        f"DyDiLA stays within 3 % of softmax, in equal time {slower.difference.percent:.1f} % "
        f"above, without it {without.difference.percent:.1f} %"
    ) in SENTENCES


def test_size_s_agrees_in_losses_and_not_in_fid():
    table = read(ROOT / "docs" / "results-size-s.csv")
    measured = [one for one in decide(table) if one.difference and one.difference.pairs]
    found = {(one.claim.first, one.claim.second, one.px): one.difference for one in measured}
    for px in (64, 128, 256):
        assert found["softmax", "sana", px].percent < -6
        assert found["dydila", "softmax", px].bound_percent < 3
    mixed = [one for one in measured if one.claim[1:3] == ("sana*3+softmax", "softmax")]
    assert [one.kind for one in mixed] == ["undecided"] * 3
    percent = sorted(one.difference.percent for one in mixed)
    assert (
        f"Sana. [Size S](docs/results-size-s.md) agrees, but in FID; there `sana*3+softmax` is "
        f"{percent[0]:.1f} to {percent[-1]:.1f} % above softmax, undecided."
    ) in SENTENCES
    of_size = table[table["px"] == 256].groupby("variant")["FID[efflite0]"].mean()
    assert of_size["softmax"] < of_size["sana"]


def test_first_public_implementation_says_of_what():
    assert (
        "first public implementation of the diffusion transformer DyDi-LiT, tested against the "
        "paper's equations ([arXiv 2601.13683](https://arxiv.org/abs/2601.13683); an adaptation "
        "of the layer to image-text cross-attention in echocardiography exists)"
    ) in SENTENCES


def test_the_first_screen_is_what_the_figures_say():
    found = shipped()
    part = TEXT.split("<!-- first screen -->")[1].split("<!-- /first screen -->")[0]
    for said in (first_screen.caption(found, "h100"), first_screen.table(found, "h100")):
        assert said in part, "run python -m bench.first_screen --into README.md"
