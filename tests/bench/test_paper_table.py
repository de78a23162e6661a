"""Every published figure is reproduced, and the table says so."""

import csv
from pathlib import Path

import pytest

from bench.paper_table import PRINTED, counted, main, short_table

PAGE = Path(__file__).parents[2] / "docs" / "gflops.md"

TABLES_1_AND_2 = PRINTED[:24]


@pytest.fixture(scope="module")
def rows():
    return {printed[:3]: counted(*printed) for printed in PRINTED}


@pytest.mark.parametrize("printed", TABLES_1_AND_2, ids=str)
def test_figures_are_reproduced_within_a_thousandth(rows, printed):
    ours = float(rows[printed[:3]].ours_paper)
    assert ours == pytest.approx(float(printed[3]), rel=1e-3)


def test_all_but_one_figure_print_the_papers_digits(rows):
    others = [p[:3] for p in TABLES_1_AND_2 if rows[p[:3]].same_digits != "yes"]
    assert others == [("PixArt-Sigma", "L", 512)]


def test_the_map_wise_model_is_near(rows):
    assert float(rows["DyDi-LiT-map", "S", 256].ours_paper) == pytest.approx(6.45, rel=5e-3)


# From section 12.4 of the fact sheet, with 15 instead of 9 + 4 for the unfused convolution.
@pytest.mark.parametrize(
    ("model", "size", "resolution", "full"),
    [
        ("DiT", "S", 256, 6.06),
        ("DyDi-LiT", "S", 256, 6.729),
        ("DyDi-LiT", "B", 256, 11.756),
        ("DyDi-LiT", "L", 256, 25.890),
        ("DyDi-LiT", "L", 512, 110.708),
        ("DiG", "S", 256, 6.96),
        ("DiG", "B", 256, 12.43),
        ("DiG", "L", 256, 27.54),
        ("DiG", "L", 512, 110.0),
        ("DyDi-LiT-map", "S", 256, 7.17),
    ],
)
def test_full_counts(rows, model, size, resolution, full):
    assert float(rows[model, size, resolution].ours_full) == pytest.approx(full, rel=1e-3)


def test_the_page_shows_the_table(rows):
    assert short_table(list(rows.values())).strip() in PAGE.read_text("utf-8")


def test_the_table_is_printed_and_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("bench.paper_table.PRINTED", PRINTED[:1])
    (row,) = main(["--out", str(tmp_path / "new")])
    shown = capsys.readouterr().out
    assert "1 of 1 figures print the paper's digits" in shown
    assert (tmp_path / "new" / "paper_table.md").read_text() in shown
    short = (tmp_path / "new" / "paper_table_short.md").read_text()
    assert "| DiT   | 6.06 / 6.06 / 6.06 | -         | -" in short
    with (tmp_path / "new" / "paper_table.csv").open() as file:
        (written,) = csv.DictReader(file)
    assert written["paper"] == "6.06" and written["ours_paper"] == row.ours_paper == "6.0606"
    assert written["same_digits"] == "yes" and written["how"] == "closed form"
    assert row.parameters == "32.87"
