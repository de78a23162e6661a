"""What files of whole models say: goals, tables, crossovers, pictures, advice."""

import copy
import json
import math
import os

import numpy as np
import pytest
from PIL import Image, ImageColor

from attnzoo import list_attention
from bench import plot, recommend
from bench.whole_models import figures as whole_figures
from bench.whole_models.__main__ import main
from recipes.lab.console import UserError
from tests.bench.whole_rows import case_row
from tests.markdown_pages import ROOT


def test_figures_are_of_the_last_treatment_and_judged():
    report = {
        "launches": [{"mechanism": "sana", "bmm_seconds": 1e-5, "launches": {"median": 12.0}}],
        "recipes": [
            {"recipe": recipe, "mechanism": "dydila", "way": way, "images_per_second": speed}
            for recipe, speeds in {
                "train": {"eager": 10.0, "recorded": 40.0, "compiled": 60.0},
                "sample": {"eager": 1.0, "recorded": 19.0},
                "train on GPUs": {"one GPU": 10.0, "two GPUs": 19.0},
            }.items() for way, speed in speeds.items()
        ],
        "scans": [{"mode": "forward", "over_fla": {"median": 0.3}}],
        "layers": [
            {"mechanism": "lit", "tokens": 4096, "mode": "train", "floor": 2.0, "bound": "memory",
             "seconds": {"recorded": {"median": 8.0}, "compiled": {"median": 9.0}}},
        ],
        "cases": [
            case_row("sana", 1024, {"eager": 3.0, "compiled": 2.0}),
            case_row("sana", 4096, {"eager": 2.0, "compiled": 0.5}),
            case_row("dydila", 4096, {"recorded": 1.1}, mode="train"),
            case_row("dydila", 16384, {"compiled": 0.25}, size="L"),
            case_row("softmax", 4096, {}, recorded=2.0, compiled=1.0),
        ],
    }  # fmt: skip
    found = {(f.goal, f.what): f for f in whole_figures.figures(report)}
    by_goal = {goal: f for (goal, _), f in found.items()}
    assert by_goal["E1"].verdict == "minimum met" and "10.0 µs" in by_goal["E1"].note
    assert by_goal["E2"].value == 6.0 and by_goal["E2"].verdict == "minimum met"
    assert by_goal["E2"].note == "compiled 60 images/s, eager 10"
    assert by_goal["E3"].value == 19.0 and by_goal["E3"].verdict == "target reached"
    assert by_goal["E10"].value == 0.3 and by_goal["E11"].value == 1.9
    assert by_goal["E4"].value == 0.5 and by_goal["E4"].note == "compiled; eager 2.00"
    assert by_goal["E4"].verdict == "target reached"
    assert by_goal["E5"].verdict == "minimum missed" and by_goal["E5"].note == "recorded"
    assert by_goal["E6"].value == 0.5
    assert by_goal["E8"].value == 4.0
    assert by_goal["E9"].value == 4.0 and by_goal["E9"].note.startswith("recorded; floor")
    assert "lit, n=4096" in by_goal["E9"].what
    [sana] = [f for (goal, what), f in found.items() if goal == "E7" and "sana" in what]
    assert sana.value == pytest.approx(512 * 2**0.5) and "S, forward" in sana.what


def test_a_crossover_lies_between_sizes_or_nowhere():
    assert whole_figures.first_faster([(512, 0.9), (1024, 0.5)]) == 512
    assert whole_figures.first_faster([(1024, 0.5), (512, 2.0)]) == pytest.approx(512 * 2**0.5)
    assert whole_figures.first_faster([(512, 2.0), (1024, 1.5)]) == math.inf
    assert whole_figures.first_faster([(256, 0.9), (512, 2.0), (1024, 1.5)]) == math.inf
    assert whole_figures.first_faster([(256, 0.9), (512, 2.0), (1024, 0.5)]) == pytest.approx(
        512 * 2**0.5
    )


def whole_report():
    rows = []
    for mode in ("forward", "train"):
        for tokens, factor in ((256, 2.0), (4096, 0.5)):
            seconds = {"eager": 9.0, "recorded": tokens / 256, "compiled": tokens / 128}
            rows.append(case_row("softmax", tokens, {}, mode=mode, **seconds))
            mine = {name: factor * value for name, value in seconds.items()}
            over = {"recorded": factor, "compiled": factor}
            rows.append(case_row("sana", tokens, over, mode=mode, **mine))
            rows[-1]["over_fastest"] = {"median": factor, "ours": "recorded",
                                        "softmax": "recorded"}  # fmt: skip
    layer = {"mechanism": "sana", "mode": "forward", "tokens": 4096, "seconds": 3.0,
             "floor": 2.0, "bound": "memory"}  # fmt: skip
    return {
        "device_name": "a device", "versions": {"torch": "2"}, "commit": "abc",
        "datetime": "2030-01-02T03:04", "cases": rows, "layers": [layer], "launches": [],
        "missed": [],
    }  # fmt: skip


def damaged(**changed):
    report = whole_report()
    for row in report["cases"]:
        row.update(changed)
    return report


@pytest.mark.parametrize(
    ("report", "said"),
    [
        ({}, "it has no versions"),
        ([], "it is a list"),
        (damaged() | {"cases": [3]}, r"it\.cases\[0\] is a int"),
        (damaged() | {"layers": None}, r"it\.layers is a NoneType"),
        (damaged() | {"missed": ["x"]}, r"it\.missed\[0\] is a str"),
        (damaged(missing=None), r"cases\[0\]\.missing is a NoneType"),
        (damaged(seconds={"recorded": 3.0}), r"cases\[0\]\.seconds\.recorded is a float"),
        (damaged(seconds={"eager": {"median": math.nan}}), "median is nan"),
        (damaged(batch=0), r"cases\[0\] has no tokens, no batch"),
        (damaged() | {"layers": [{"seconds": 3.0}]}, r"layers\[0\] has no mechanism"),
    ],
)
def test_a_damaged_or_foreign_file_is_one_line(report, said, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(report))
    is_ours = isinstance(report, dict) and "cases" in report
    calls = [(main, ["--table", str(path)])]
    calls += [
        (plot.main, [str(path), "--out", str(tmp_path / "a")]),
        (recommend.main, [str(path)]),
    ] * is_ours
    for call, arguments in calls:
        with pytest.raises(UserError, match=rf"no file of python -m bench\.whole_models.*{said}"):
            call(arguments)
    assert os.listdir(tmp_path) == ["x.json"]


def test_the_picture_and_the_page_come_from_the_file(tmp_path, capsys):
    path, page = tmp_path / "whole.json", tmp_path / "page.md"
    path.write_text(json.dumps(whole_report()))
    page.write_text("before\n<!-- whole -->\nold\n<!-- /whole -->\nafter\n")
    assert plot.main([str(path), "--out", str(tmp_path), "--into", str(page)]) == 0
    assert (tmp_path / "whole-models.png").stat().st_size > 10_000
    said = page.read_text()
    assert "old" not in said and said.startswith("before") and said.endswith("after\n")
    assert "](whole-models.png)" in said
    assert "a device, torch 2, commit abc" in said and "1.5 (memory)" in said
    cells = next(line for line in said.splitlines() if line.startswith("| sana "))
    assert "2e+03 (2.00)" in cells and cells.count(" 512 ") == 2
    ring = [line.get_xdata()[0] for line in plot.whole_curves(whole_report(), "S").axes[0].lines
            if line.get_markersize() == 13]  # fmt: skip
    assert ring == [pytest.approx(512)]


def test_every_size_has_a_picture(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plot, "whole_curves", lambda _, size: size)
    monkeypatch.setattr(plot, "_saved", lambda size, _, name: drawn.append((size, name)))
    report = whole_report()
    report["cases"] += [row | {"size": "L"} for row in report["cases"]]
    path, page, plots = (tmp_path / name for name in ("whole.json", "page.md", "plots"))
    path.write_text(json.dumps(report))
    page.write_text("<!-- whole -->\n<!-- /whole -->\n")
    (plots / "whole-models-L.png").mkdir(parents=True)
    arguments = [str(path), "--out", str(plots), "--into", str(page)]
    with pytest.raises(UserError, match="cannot write"):
        plot.main(arguments)
    (plots / "whole-models-L.png").rmdir()
    assert not drawn and plot.main(arguments) == 0
    assert drawn == [("S", "whole-models"), ("L", "whole-models-L")]
    shown = [line for line in page.read_text().splitlines() if line.startswith("![")]
    assert [line.rpartition("](")[2] for line in shown] == [f"plots/{n}.png)" for _, n in drawn]


def test_a_model_that_lacks_a_resolution_becomes_faster_between_two_of_its_own():
    report = whole_report() | {"layers": []}
    report["cases"].append(case_row("softmax", 1024, {}, compiled=1.0))
    for tokens, median in ((256, 1.2), (4096, 0.8)):
        over = {"ours": "compiled", "softmax": "compiled", "median": median}
        report["cases"].append(case_row("lit", tokens, {}, compiled=1.0) | {"over_fastest": over})
    page = whole_figures.page([report])
    (line,) = (row for row in page.splitlines() if row.startswith("| lit "))
    assert line.count(" 256 to 1024 ") == 1  # of the forward


def test_a_page_gets_the_parts_that_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "whole_curves", lambda *_: None)
    monkeypatch.setattr(plot, "_saved", lambda *_: None)
    report = whole_report()
    over = {"ours": "compiled", "softmax": "compiled", "median": 0.8}
    alone = case_row("lit", 4096, {}, compiled=1.0) | {"over_fastest": over}
    report["cases"].append(alone)
    path, page, other = (tmp_path / name for name in ("whole.json", "page.md", "other.md"))
    path.write_text(json.dumps(report))
    page.write_text("a\n<!-- faster from -->\nold\n<!-- /faster from -->\nb\n")
    other.write_text("<!-- whole -->\n<!-- /whole -->\n")
    given = [str(path), "--out", str(tmp_path), "--into", str(page), "--into", str(other)]
    assert plot.main(given) == 0
    assert page.read_text() == (
        "a\n<!-- faster from -->\n"
        "![Time of one image of the whole model, size S, against resolution](whole-models.png)\n\n"
        "- Size S, a forward: faster than softmax's with `sana` from 512 px; at 1024 px also with "
        "`lit`.\n- Size S, a training step: faster than softmax's with `sana` from 512 px.\n"
        "<!-- /faster from -->\nb\n"
    )
    assert "**Size S: milliseconds an image" in other.read_text()
    page.write_text("<!-- faster from -->\n")
    with pytest.raises(UserError, match="one line <!-- faster from --> and one line <!-- /faster"):
        plot.main(given)


def test_a_newer_file_of_layers_alone_names_its_device_there_only():
    layer = {"mechanism": "sana", "tokens": 4096, "mode": "train", "floor": 1.0,
             "bound": "products", "seconds": {"recorded": {"median": 2.0}}}  # fmt: skip
    common = {"versions": {}, "missed": [], "launches": []}
    models = common | {"datetime": "1", "commit": "aaaaaaa", "device_name": "H100", "layers": [],
                       "cases": [case_row("softmax", 1024, {}, recorded=1.0)]}  # fmt: skip
    layers = common | {"datetime": "2", "commit": "bbbbbbb", "device_name": "H200", "cases": [],
                       "layers": [layer]}  # fmt: skip
    joined = whole_figures.joined([layers, models])
    assert joined["device_name"] == "H100" and len(joined["cases"]) == 1  # the picture's
    [row] = whole_figures._layers(joined).splitlines()[2:]
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["sana", "2.0", "bbbbbbb, H200"]
    newer = layers | {"cases": [case_row("sana", 1024, {"recorded": 0.5}, recorded=0.5)]}
    assert whole_figures.joined([newer, models])["device_name"] == "H100, H200"


def test_the_words_of_what_is_faster():
    words = whole_figures.faster_words
    over = {"softmax": 1.0, "sana": 0.5, "lit": 0.8, "moh": 1.1, "dydila": 1.2}
    since = {"dydila": math.inf, "focused": 600.4, "sana": 256.0}
    assert words(since, 256, 1024, over) == (
        "`sana` from 256 px or below, `focused` from 600 px; at 1024 px also with `lit`; not up "
        "to 1024 px with `dydila`; not at 1024 px with `moh`"
    )
    assert words({"sana": math.inf}, 256, 512, {"softmax": 1.0}) == (
        "none that was measured at every resolution; not up to 512 px with `sana`"
    )


def test_the_pages_are_what_the_committed_files_say():
    docs = ROOT / "docs"
    reports = [whole_figures.read_whole(path) for path in docs.glob("plots/whole-models*.json")]
    said = "run python bench/plot.py as docs/gpu-measurements.md says"
    for name, text in (
        ("gpu.md", whole_figures.faster_from(reports)),
        ("gpu-measurements.md", whole_figures.page(reports)),
    ):
        assert f"\n\n{text}\n<!-- /" in (docs / name).read_text("utf-8"), f"{name}: {said}"


def test_the_committed_picture_has_the_colors_of_the_zoo():
    """It has 256 of them: those of thin lines must not give way to grays."""
    with Image.open(ROOT / "docs" / "plots" / "whole-models.png") as picture:
        drawn = np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)
    for name in list_attention():
        wanted = np.array(ImageColor.getrgb(plot._style(name)["color"]))
        assert np.abs(drawn.astype(int) - wanted).max(1).min() <= 8, name


def test_a_page_of_several_files_has_the_newest_of_each_figure(tmp_path):
    old, new = whole_report(), whole_report()
    new |= {"commit": "def", "datetime": "2031-01-02T03:04"}
    new["cases"] = [row for row in new["cases"] if row["mode"] == "forward"]
    for row in new["cases"]:  # softmax alone ran as users run it
        if row["mechanism"] == "sana":
            row["seconds"] = {"eager": row["seconds"]["eager"]}
            row["over_fastest"] |= {"ours": "eager"}
    # The old one is of before layers were compiled.
    new["layers"][0] |= {"missing": {}, "seconds": {"recorded": {"median": 9.0},
                                                    "compiled": {"median": 8.0}}}  # fmt: skip
    paths, page = [tmp_path / "new.json", tmp_path / "old.json"], tmp_path / "page.md"
    for path, report in zip(paths, (new, old), strict=True):
        path.write_text(json.dumps(report))
    page.write_text("<!-- whole -->\n<!-- /whole -->\n")
    assert plot.main([*map(str, paths), "--out", str(tmp_path), "--into", str(page)]) == 0
    said = page.read_text()
    assert said.index("commit def") < said.index("commit abc")
    rows = {line.split()[1]: line for line in said.splitlines() if line.startswith("| ")}
    assert "| def, abc |" in rows["softmax"] and "4.0 (compiled, memory)" in rows["sana"]
    kept = whole_figures.joined([new, old])["cases"]
    commits = [row["commit"] for row in kept if row["mechanism"] == "sana"]
    assert len(kept) == 8 and set(commits) == {"abc"}
    both = map(whole_figures.read_whole, paths)
    found = {f.what: (f.value, commit) for f, commit in whole_figures.newest_figures(both)}
    [(value, commit)] = [pair for what, pair in found.items() if what.startswith("layer")]
    assert (value, commit) == (4.0, "def")
    assert "abc" in {commit for _, commit in found.values()}  # what only the old one has


def test_a_file_of_one_resolution_moves_the_crossover_of_the_others():
    old = whole_report() | {"layers": []}
    new = old | {"commit": "def", "datetime": "2031-01-02T03:04"}
    new["cases"] = [
        copy.deepcopy(row)
        for row in old["cases"]
        if (row["tokens"], row["mode"]) == (256, "forward")
    ]
    new["cases"][1]["over_fastest"]["median"] = 0.9

    def crossover(*reports):
        found = {f.what: f.value for f, _ in whole_figures.newest_figures(reports)}
        return found.get("px from which sana's model is faster than softmax's, S, forward")

    assert crossover(old) == pytest.approx(512) and crossover(new) is None
    assert crossover(old, new) == 256
    # What was not compiled in time replaces nothing.
    new["cases"][1]["missing"]["compiled"] = "was not compiled in time"
    assert crossover(old, new) == pytest.approx(512)


def test_softmax_over_the_older_checkout_goes_before_softmax_over_itself():
    alone = whole_report() | {"layers": []}
    alone["cases"] = [case_row("softmax", 4096, {}, recorded=2.0, compiled=1.4)]
    row = case_row("softmax", 4096, {}, recorded=2.0, compiled=1.4, before=2.8)
    row |= {"commit": "abc", "over_before": {"ours": "compiled", "median": 0.5}}
    older = alone | {"cases": [], "before": [row], "datetime": "2029"}
    for reports, value in (([alone], 0.7), ([alone, older], 0.5)):
        found = [f.value for f, _ in whole_figures.newest_figures(reports) if f.goal == "E6"]
        assert found == [value]


def test_what_was_not_timed_is_not_drawn(tmp_path, monkeypatch):
    saved, path = [], tmp_path / "x.json"
    monkeypatch.setattr(plot, "_saved", lambda figure, *_: saved.append(figure))
    report = whole_report()
    report["cases"] = [row for row in report["cases"] if row["mode"] == "forward"]
    path.write_text(json.dumps(report))
    assert plot.main([str(path), "--out", str(tmp_path)]) == 0
    assert [len(part.axes) for part in saved[0].subfigs] == [1, 0]
    path.write_text(json.dumps(damaged(seconds={})))
    with pytest.raises(UserError, match="no whole models that were timed"):
        plot.main([str(path), "--out", str(tmp_path)])


def test_files_of_the_suite_are_drawn_one_at_a_time(tmp_path):
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=r"join others by bench\.results"):
        plot.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")])


def test_advice_is_by_whole_models_as_they_are_run(tmp_path, capsys):
    path = tmp_path / "whole.json"
    path.write_text(json.dumps(whole_report()))
    assert recommend.main([str(path), "--resolution", "1024"]) == 0
    said = capsys.readouterr().out
    assert "sana: the fastest" in said and "2.00 x faster than softmax" in said
    assert "| recorded " in said and "whole model of size S" in said
    assert recommend.main([str(path), "--resolution", "1024", "--launched"]) == 0
    assert "4.5 s" in capsys.readouterr().out
    assert recommend.main([str(path), "--resolution", "512", "--memory", "1GiB"]) == 0
    assert "estimated" in capsys.readouterr().out
    with pytest.raises(UserError, match="no L forward; it has S forward, S train"):
        recommend.main([str(path), "--size", "L"])
    with pytest.raises(UserError, match=r"--width and --dtype are of layers.*choose by --size"):
        recommend.main([str(path), "--width", "96"])


def test_milliseconds_of_an_older_file_are_in_the_unit_of_softmax_today():
    softmax = case_row("softmax", 4096, {}, compiled=0.020)
    old = [softmax, case_row("sana", 4096, {"compiled": 0.5}, compiled=0.011)]
    new = [case_row("softmax", 4096, {}, compiled=0.012)]
    common = {"device": "cuda", "device_name": "any", "layers": []}
    older, newer = (
        common | {"datetime": day, "commit": day, "cases": rows}
        for day, rows in (("1", old), ("2", new))
    )
    report = whole_figures.joined([older, newer])
    softmax, sana = sorted(report["cases"], key=lambda row: row["mechanism"], reverse=True)
    assert whole_figures.milliseconds(softmax, report) == pytest.approx(12.0)
    assert whole_figures.milliseconds(sana, report) == pytest.approx(6.0)
    alone = whole_figures.joined([older])
    assert whole_figures.milliseconds(sana, alone) == pytest.approx(11.0)
    part, *_ = plot.whole_curves(report, "S").subfigs
    drawn = {float(y) for axes in part.axes for line in axes.lines for y in line.get_ydata()}
    assert {12.0, 6.0} <= {round(y, 6) for y in drawn}
