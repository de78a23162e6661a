"""Comparisons in the hands of others: hostile names, damaged files, hangs, odd environments."""

import contextlib
import csv
import dataclasses
import errno
import html.parser
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from recipes import compare as compare_module
from recipes import demo as demo_module
from recipes import results as results_module
from recipes.lab import files
from recipes.lab.console import UserError
from recipes.lab.drawing.canvas import new_figure, plain, png
from recipes.lab.drawing.palette import color_of, marker_of
from recipes.lab.files import CannotWrite, locked
from recipes.lab.pages import markdown_text
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.settings import Settings
from recipes.studies import demo as demo_study
from recipes.studies.comparison import execution, study
from recipes.studies.comparison.execution import STOPPED, locally, run_all
from recipes.studies.comparison.plan import parse_variant, plan_runs
from recipes.studies.comparison.planned import EARLIER, OK, PlannedRun, read_result, set_aside
from recipes.studies.comparison.report import write_report
from recipes.studies.comparison.tables import read_table, write_table
from recipes.studies.dydila.paper import paper_rows
from recipes.studies.dydila.results import results_page
from tests.commands import Forked

ROOT = Path(__file__).parents[2]
NO_PAPER = paper_rows([])
HOSTILE = "<img src=x onerror=alert(1)>"


def case(label="sana", imports=(), **settings):
    settings = {"attn": "sana", "steps": 3, "batch_size": 8, "sample_every": 3} | settings
    return PlannedRun(
        label=label, settings=Settings(**settings), cfgs=(1.0,), samples=12, sampling_steps=2,
        imports=imports,
    )  # fmt: skip


def finished(out, one, fid=1.5, accuracy=0.5, curve=((1, 1.0), (2, 0.5))):
    """Leaves what a run that is done leaves, without one."""
    folder = one.prepare(out)
    numbers = {"FID[smallcnn]": fid, "class_accuracy[smallcnn]": accuracy, "count": 12}
    result = {
        "state": OK,
        "error": None,
        "cost": {"macs": 10**6, "forward_seconds": 1e-3, "training_seconds": 1e-3},
        "metrics": {
            "results": {"1": numbers}, "real_floor": {"FID[smallcnn]": 0.1}, "resolution": 8,
            "device": "cpu", "versions": {"torch": "2.10"},
            "evaluator": {"name": "smallcnn", "sha256": "0" * 64},
        },
        "curve": [list(point) for point in curve],
        "wall_seconds": 1.0,
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "run").mkdir()
    config = {"settings": {"attn": "sana"}, "data": {"class_names": [str(i) for i in range(10)]}}
    (folder / "run" / "config.json").write_text(json.dumps(config))
    return result


def test_seconds_of_a_run_are_those_of_all_attempts(tmp_path, monkeypatch):
    one = case()
    done, folder = finished(tmp_path, one), one.folder(tmp_path)
    (folder / "result.json").write_text(json.dumps(STOPPED | {"wall_seconds": 500.0}))
    ends = iter([STOPPED, done, STOPPED])
    monkeypatch.setattr(execution, "_run_one", lambda *_: dict(next(ends)))
    for attempt in range(3):
        set_aside(folder)
        assert read_result(folder) is None
        assert 500.0 <= execution.run_one(folder)["wall_seconds"] < 510.0, attempt
    # Numbers of a run that was done outlive an attempt to add others that was stopped.
    set_aside(folder)
    earlier = read_result(folder, EARLIER)
    assert earlier["state"] == OK and earlier["wall_seconds"] >= 500.0


class Page(html.parser.HTMLParser):
    """Every tag and attribute of a page, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("hostile")
    labels = [f'{HOSTILE}"{HOSTILE}', "=1+1", "@x", "$\\bad$", "_hidden", "a\x1b[31m|b\n# c"]
    plan = [case(label, data=HOSTILE, seed=seed) for label in labels for seed in (0, 1)]
    for number, one in enumerate(plan):
        finished(out, one, fid=1 + number / 7)
    failed = case("-2+3", data=HOSTILE, steps=9)
    folder = failed.prepare(out)
    (folder / "result.json").write_text(
        json.dumps({"state": "error", "error": f"=cmd {HOSTILE}\x1b]0;x\x07"})
    )
    plan.append(failed)
    title = f"compare.py --data '{HOSTILE}' ```\n# x"
    write_report(out, plan, NO_PAPER, title=title)
    return out, labels


class TestNamesAreText:
    def test_the_report_is_inert(self, report):
        out, _ = report
        text = (out / "report.html").read_text(encoding="utf-8")
        page = Page(text)
        assert "onerror=alert(1)" in page.text and "\x1b" not in text and "\x07" not in text
        assert not any(name.startswith("on") for _, name, _ in page.attributes)
        assert set(page.tags) <= {
            "html", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "code", "ul", "li",
            "b", "wbr", "table", "thead", "tbody", "tr", "th", "td", "img",
        }  # fmt: skip
        sources = [value for tag, name, value in page.attributes if name == "src"]
        assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
        assert ("meta", "http-equiv", "Content-Security-Policy") in page.attributes

    def test_a_spreadsheet_computes_nothing_and_numbers_stay_numbers(self, report):
        out, labels = report
        with (out / "runs.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            for name, value in row.items():
                with contextlib.suppress(ValueError):
                    float(value)
                    continue
                assert not value.startswith(tuple("=+-@\t\r\n")), (name, value)
                assert "\x1b" not in value
        assert {row["variant"] for row in rows} > {"'=1+1", "'@x", "'-2+3"}
        frame = read_table(out / "runs.csv")
        shown = [label.replace("\x1b", "\\x1b").replace("\n", "\\n") for label in labels]
        assert set(frame.variant) == {*shown, "-2+3"}
        assert frame["FID[smallcnn]"].dropna().tolist() == [1 + n / 7 for n in range(12)]

    def test_the_page_of_results_is_inert(self, report):
        out, _ = report
        page = results_page([out])
        assert "\x1b" not in page and "&lt;img" in page
        outside = page[: page.index("````sh")] + page[page.rindex("````\n") :]
        assert "<img" not in outside
        # The command keeps to its block: a fence longer than any in it.
        assert page.index("````sh") < page.index("```\\n# x") < page.rindex("````\n")
        assert "\n# c" not in page and "\\|b" in page

    def test_markdown_escapes(self):
        assert markdown_text("a|b<c>`d`") == "a\\|b&lt;c&gt;\\`d\\`"
        assert markdown_text("[x](javascript:y)") == "[x]\\(javascript:y)"
        assert markdown_text("FID[smallcnn] class_accuracy +focused kernel") == (
            "FID[smallcnn] class_accuracy +focused kernel"
        )

    def test_names_that_are_formulas_are_drawn_as_they_are(self):
        figure = new_figure(2, 2)
        axis = figure.subplots()
        for name in ("$\\bad$", "_hidden", "a$b", "\udcc3\udca9", "\x1b[0m"):
            axis.plot([0, 1], [0, 1], label=plain(name), color=color_of(name),
                      marker=marker_of(name))  # fmt: skip
        axis.set(title=plain("$\\frac$"), xlabel=plain("$x"))
        axis.set_xticks([0, 1], [plain("$\\bad$"), plain("%")])
        axis.legend()
        assert png(figure, 50).startswith(b"\x89PNG")
        assert len(axis.get_legend().get_texts()) == 5
        with pytest.raises(ValueError, match="bad"):  # what plain() is for
            axis.set_title("$\\bad$")
            png(figure, 50)

    def test_tables_read_back_what_was_written(self, tmp_path):
        names = ["NA", "null", "", "'=x", "=x", "'", "1.50", "a,b", 'q"q', "+focused kernel"]
        values = [0.1 + 0.2, 1 / 3, np.nan, 1e-300, 5.0, -0.0, 1e22, 2.5, -3.0, 7.0]
        frame = pd.DataFrame({"variant": names, "seed": range(10), "KID[x]": values})
        write_table(tmp_path / "t.csv", frame)
        found = read_table(tmp_path / "t.csv")
        assert found.variant.tolist() == names and found.seed.tolist() == list(range(10))
        assert found["KID[x]"].equals(frame["KID[x]"])

    def test_the_terminal_gets_no_control_codes(self, tmp_path, capsys, monkeypatch):
        out = tmp_path / "a\x1b[31mb"
        monkeypatch.setattr(study, "_run_missing", lambda *_: None)
        arguments = ["--attn", "sana", "--data", "digits", "--seeds", "1", "--out", str(out)]
        assert compare_module.main([*arguments, "--report-only"]) == 1
        captured = capsys.readouterr()
        assert "\x1b" not in captured.out + captured.err and "\\x1b[31m" in captured.out


@pytest.mark.usefixtures("no_charts")
class TestFoldersOfEarlierVersions:
    ARGUMENTS = ("--attn", "sana", "--data", "digits", "--seeds", "1", "--samples", "12", "--cfg",
                 "1", "--steps", "3", "--batch-size", "8", "--sampling-steps", "2")  # fmt: skip

    def made_earlier(self, out):
        """A comparison that is done, under the names that its files had."""
        like = case(label="")
        (one,) = plan_runs(
            [parse_variant("sana")],
            [("digits", None)],
            seeds=1,
            protocols=["controlled"],
            like=like,
        )  # fmt: skip
        finished(out, one)
        (out / "runs").rename(out / "cells")
        (out / "cells" / one.name / "planned.json").rename(out / "cells" / one.name / "cell.json")
        return one

    def test_they_are_found_and_reported_again(self, tmp_path):
        one = self.made_earlier(tmp_path)
        assert compare_module.main([*self.ARGUMENTS, "--out", str(tmp_path)]) == 0
        frame = read_table(tmp_path / "runs.csv")
        assert frame.run.tolist() == [one.name] and frame["FID[smallcnn]"].tolist() == [1.5]
        assert not (tmp_path / "runs").exists()

    def test_their_tables_are_read(self, tmp_path):
        one = self.made_earlier(tmp_path)
        write_report(tmp_path, [one], NO_PAPER, title="x")
        page = results_page([tmp_path])
        text = (tmp_path / "runs.csv").read_text("utf-8").replace(",run,", ",cell,", 1)
        (tmp_path / "runs.csv").unlink()
        (tmp_path / "cells.csv").write_text(text, "utf-8")
        assert results_page([tmp_path]) == page

    def test_their_labels_are_written_as_today(self, tmp_path):
        one = self.made_earlier(tmp_path)
        file = tmp_path / "cells" / one.name / "result.json"
        file.write_text(file.read_text("utf-8").replace("FID[smallcnn]", "class_accuracy[judge]"))
        assert compare_module.main([*self.ARGUMENTS, "--out", str(tmp_path)]) == 0
        table = tmp_path / "runs.csv"
        assert read_table(table)["class_accuracy[classifier]"].tolist() == [1.5]
        text = table.read_text("utf-8")
        table.write_text(text.replace("[classifier]", "[judge]"), "utf-8")
        assert "[judge]" not in text and "class_accuracy[classifier]" in read_table(table)

    def test_one_that_has_not_ended_goes_on(self, tmp_path):
        one = self.made_earlier(tmp_path)
        folder = tmp_path / "cells" / one.name
        (folder / "cell.json").write_text(
            (folder / "cell.json").read_text("utf-8").replace('"sana"', '"no-such"')
        )
        assert "no-such" in execution.run_one(folder)["error"]

    def test_old_flags_are_understood(self, capsys):
        arguments = [*self.ARGUMENTS, "--cell-minutes", "0", "--dry-run"]
        with pytest.raises(UserError, match="--run-minutes must be above 0"):
            compare_module.main(arguments)


@pytest.mark.usefixtures("no_charts")
class TestDamagedFiles:
    @pytest.mark.parametrize(
        "content",
        [
            b"", b"{", b"[]", b"{}", b"null", b"\xff\xfe", b'{"state": 3}', b"[" * 100_000,
            b'{"state": "ok"}',
            b'{"state": "ok", "cost": {}, "metrics": {}, "curve": []}',
            b'{"state": "ok", "cost": [], "metrics": {"results": {}, "real_floor": {}},'
            b' "curve": []}',
            b'{"state": "ok", "cost": {}, "metrics": {"results": {"a": {}}, "real_floor": {}},'
            b' "curve": []}',
            b'{"state": "ok", "cost": {}, "metrics": {"results": {"1": 3}, "real_floor": {}},'
            b' "curve": []}',
            b'{"state": "ok", "cost": {}, "metrics": {"results": {}, "real_floor": {}},'
            b' "curve": [[1]]}',
            b'{"state": "ok", "cost": {}, "metrics": {"results": {}, "real_floor": {}},'
            b' "curve": [[1, null]]}',
            b'{"state": "error", "error": ["x"]}',
        ],
    )  # fmt: skip
    def test_a_damaged_result_is_named_and_run_again(self, tmp_path, capsys, content):
        good, bad = case(), case(seed=1)
        finished(tmp_path, good)
        folder = bad.prepare(tmp_path)
        (folder / "result.json").write_bytes(content)
        assert read_result(folder) is None
        assert str(folder / "result.json") in capsys.readouterr().err
        states = write_report(tmp_path, [good, bad], NO_PAPER, title="x")
        assert states == {good.name: OK, bad.name: "not run"}

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("runs.csv", b""),
            ("runs.csv", b"\xff\xff"),
            ("runs.csv", b"a,b\n1\n"),
            ("runs.csv", b"variant,seed\nx,y\n"),
            ("runs.csv", b'a,"b\n'),
            ("runs.csv", b"state,state\nok,ok\n"),
            ("runs.csv", None),
            ("command.txt", None),
        ],
    )
    def test_a_damaged_table_is_one_line(self, tmp_path, name, content):
        finished(tmp_path, case())
        write_report(tmp_path, [case()], NO_PAPER, title="x")
        assert "digits" in results_page([tmp_path])
        if content is None:
            (tmp_path / name).unlink()
        else:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name) as caught:
            results_page([tmp_path])
        assert "\n" not in str(caught.value)

    def test_a_column_without_its_number_is_one_line(self, tmp_path):
        finished(tmp_path, case())
        write_report(tmp_path, [case()], NO_PAPER, title="x")
        frame = read_table(tmp_path / "runs.csv").assign(seed=np.nan)
        write_table(tmp_path / "runs.csv", frame)
        with pytest.raises(UserError, match="'seed' lacks a number"):
            results_page([tmp_path])

    def test_a_damaged_case_is_an_error_of_its_own(self, tmp_path, capsys):
        folder = case().prepare(tmp_path)
        (folder / "planned.json").write_text("{")
        result = execution.run_one(folder)
        assert result["state"] == "error" and "planned.json" in result["error"]
        assert "Traceback" not in capsys.readouterr().err

    def test_steps_without_a_loss_are_left_out(self, tmp_path):
        run = Run(tmp_path)
        entries = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 0.5}]
        for entry in entries:
            run.append_log(entry)
        assert execution._curve(run) == [(1, 1.0), (3, 0.5)]
        steps, means, window = demo_study.smoothed(entries)
        assert (steps, means, window) == ([3], [0.75], 2)
        assert demo_study.smoothed(entries[1:2]) == ([], [], 1)

    def test_a_link_is_not_written_through(self, tmp_path):
        victim = tmp_path / "victim"
        victim.write_text("mine")
        folder = case().prepare(tmp_path / "out")
        for name in ("output.txt", "result.json", "run"):
            (folder / name).symlink_to(victim)
            with pytest.raises(UserError, match=f"{name}' is a link"):
                case().prepare(tmp_path / "out")
            (folder / name).unlink()
        assert victim.read_text() == "mine"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with modules that must not be taken for others."""
    for name in ("pandas", "torch", "numpy", "json", "sitecustomize", "recipes"):
        (tmp_path / f"{name}.py").write_text(
            f"open({str(tmp_path / 'executed')!r}, 'a').write({name!r})\n"
        )
    (tmp_path / "helper.py").write_text("value = 1\n")
    (tmp_path / "mine.py").write_text(
        textwrap.dedent(
            """
            import helper
            import attnzoo

            @attnzoo.register_attention("mine")
            class Mine(attnzoo.Attention):
                def forward(self, x, grid):
                    raise RuntimeError(f"reached {helper.value}")
            """
        )
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


class TestProcesses:
    def test_the_working_folder_stands_in_for_no_package(self, place, monkeypatch):
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", str(place), "."]))
        folder = case("mine", imports=("mine",), attn="mine").prepare(place / "out")
        seen = []
        run_all([folder], 1, lambda: True, lambda _, r: seen.append(r), locally(1))
        assert not (place / "executed").exists()
        assert "reached 1" in seen[0]["error"]
        output = (folder / "output.txt").read_text()
        assert "RuntimeError: reached 1" in output and "mine.py" in output  # a bug: its traceback

    def test_one_that_hangs_is_ended(self, place, monkeypatch):
        stuck = (
            "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
            "open('stuck', 'w').close()\ntime.sleep(999)"
        )
        monkeypatch.setattr(execution, "_START", stuck)
        monkeypatch.setattr(execution, "GRACE_SECONDS", 0.5)
        folder = case().prepare(place / "out")
        seen, started = [], time.monotonic()
        run_all([folder], 1, lambda: True, lambda _, r: seen.append(r), locally(1, minutes=0.1))
        assert time.monotonic() - started < 60 and (place / "stuck").exists()
        assert seen[0]["state"] == "timed out" and "--run-minutes 0.1" in seen[0]["error"]
        assert read_result(folder) == seen[0] and seen[0]["wall_seconds"] > 5

    def test_a_reader_that_goes_away_ends_nothing(self, place, monkeypatch):
        """Two runs at once, and both outputs closed: they end, and the report is written."""
        out = place / "out"
        said = place / "said"

        def prepare(*_):
            said.touch()
            print("it reports", file=sys.stderr, flush=True)

        monkeypatch.setattr(study, "prepare_evaluators", prepare)
        monkeypatch.setattr(execution, "_START", "raise SystemExit(2)")
        read, write = os.pipe()
        os.close(read)
        arguments = ["--attn", "sana", "--data", "digits", "--seeds", "2", "--steps", "2",
                     "--samples", "12", "--jobs", "2", "--out", str(out)]  # fmt: skip
        process = Forked(compare_module.main, arguments, write)
        os.close(write)
        assert process.wait(timeout=180) in (1, 141)
        states = read_table(out / "runs.csv").state.tolist()
        assert states == ["crashed", "crashed"] and (out / "report.html").stat().st_size > 1000
        assert said.exists()

    def test_a_full_disk_stops_no_other(self, place, monkeypatch):
        def full(*_, **__):
            raise CannotWrite(Path("result.json"), OSError(errno.ENOSPC, "No space left"))

        folder = case(imports=("no_such_module",)).prepare(place / "out")
        monkeypatch.setattr(execution, "write_json", full)
        monkeypatch.setattr(execution, "_START", "raise SystemExit(2)")
        seen = []
        run_all([folder], 1, lambda: True, lambda _, r: seen.append(r), locally(1))
        assert seen[0]["state"] == "crashed"

    def test_runs_end_when_the_report_of_one_fails(self, place, monkeypatch):
        sleeping = "import sys, time\ntime.sleep(999 if 'seed-1' in sys.argv[1] else 0)"
        monkeypatch.setattr(execution, "_START", sleeping)
        folders = [case(seed=seed).prepare(place / "out") for seed in (0, 1)]

        def report(*_):
            raise BrokenPipeError

        started = time.monotonic()
        with pytest.raises(BrokenPipeError):
            run_all(folders, 2, lambda: True, report, locally(2))
        assert time.monotonic() - started < 50


class TestTheEnvironment:
    def test_a_backend_of_a_notebook_is_not_looked_at(self):
        studies = "comparison.study", "dydila.figures", "dydila.results", "demo"
        modules = ", ".join(f"recipes.studies.{name}" for name in studies)
        done = subprocess.run(
            [sys.executable, "-c", f"import {modules}"], env=os.environ | {"MPLBACKEND": "none"},
            cwd=ROOT, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    def test_a_locale_without_utf8_writes_the_same(self, tmp_path):
        data = tmp_path / "pics-é-ж"
        for name in ("ä", "ö"):
            (data / name).mkdir(parents=True)
            Image.fromarray(np.full((16, 16, 3), 9, np.uint8)).save(data / name / "1.png")
        out = tmp_path / "out"
        arguments = [
            "--attn", "sana,softmax", "--data", str(data), "--resolutions", "16", "--seeds", "1",
            "--steps", "2", "--samples", "12", "--cfg", "1", "--report-only", "--out", str(out),
        ]  # fmt: skip
        plan = plan_runs(
            [parse_variant("sana"), parse_variant("softmax")], [(str(data), 16)], seeds=1,
            protocols=["controlled"],
            like=PlannedRun(label="", settings=Settings(patch_size=4, steps=2, batch_size=64),
            cfgs=(1.0,), samples=12, sampling_steps=20))  # fmt: skip
        for one in plan:
            finished(out, one)
        (out / "report.html").write_text("old")
        page_file = tmp_path / "page-é.md"
        both = (
            "import sys\nfrom recipes import compare, results\n"
            "assert compare.main(sys.argv[3:]) == 0\nsys.exit(results.main(sys.argv[1:3]))"
        )
        done = subprocess.run(
            [sys.executable, "-c", both, str(out), f"--out={page_file}", *arguments], cwd=ROOT,
            env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
            capture_output=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        page = (out / "report.html").read_text(encoding="utf-8")
        assert "pics-é-ж" in page and "2 of 2 runs are done" in page
        assert str(data) in (out / "command.txt").read_text(encoding="utf-8")
        assert "pics-é-ж" in read_table(out / "runs.csv").data[0]
        assert "pics-é-ж" in page_file.read_text(encoding="utf-8")


@pytest.mark.usefixtures("no_charts")
class TestWritersOfOneFolder:
    ARGUMENTS = ("--attn", "sana", "--data", "digits", "--seeds", "1", "--out")

    def test_a_second_one_is_refused_in_one_line(self, tmp_path):
        with (
            locked(tmp_path / ".lock"),
            pytest.raises(UserError, match=r"is being written to by process \d+"),
        ):
            compare_module.main([*self.ARGUMENTS, str(tmp_path)])

    def test_a_report_may_be_written_meanwhile(self, tmp_path):
        with locked(tmp_path / ".lock"):
            assert compare_module.main([*self.ARGUMENTS, str(tmp_path), "--report-only"]) == 1
        assert (tmp_path / "report.html").exists()

    def test_a_full_disk_leaves_the_old_report(self, tmp_path, monkeypatch):
        (tmp_path / "report.html").write_text("old")
        own = os.replace

        def replace(source, target):
            if Path(target).name == "report.html":
                raise OSError(errno.ENOSPC, "No space left on device")
            own(source, target)

        monkeypatch.setattr(files.os, "replace", replace)
        with pytest.raises(CannotWrite, match=r"report\.html.*No space left"):
            compare_module.main([*self.ARGUMENTS, str(tmp_path), "--report-only"])
        assert (tmp_path / "report.html").read_text() == "old"
        assert not list(tmp_path.glob(".tmp-*"))

    def test_an_out_that_cannot_be_written_is_refused_first(self, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setattr(study, "_run_missing", None)
        for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/dev/full/x")):
            with pytest.raises(CannotWrite):
                compare_module.main([*self.ARGUMENTS, str(out)])
        with pytest.raises(CannotWrite):
            results_module.main([str(tmp_path), "--out", str(tmp_path / "file" / "page.md")])


DATA = {"resolution": 8, "channels": 1, "class_names": [str(digit) for digit in range(10)]}


class TestTheDemo:
    def test_a_longer_run_is_not_replaced(self, tmp_path, monkeypatch):
        run = Run(tmp_path / "softmax")
        settings = json.loads(json.dumps(dataclasses.asdict(Settings()))) | {"attn": "softmax"}
        run.create({"settings": settings | {"steps": 9000}, "data": DATA}, overwrite=False)
        monkeypatch.setattr(demo_study, "train", None)
        with pytest.raises(UserError, match=r"not replaced unasked.*--overwrite"):
            demo_module.main(["--steps", "2", "--out", str(tmp_path)])
        assert run.config()["settings"]["steps"] == 9000

    def test_its_own_runs_go_on_and_others_are_replaced_if_asked(self, tmp_path, monkeypatch):
        seen = []
        monkeypatch.setattr(
            demo_study,
            "train",
            lambda settings, run, **how: seen.append((settings.attn, how)) or 0,
        )
        monkeypatch.setattr(demo_study, "_draw", lambda *_: None)
        run = Run(tmp_path / "softmax")
        settings = json.loads(json.dumps(dataclasses.asdict(Settings()))) | {"attn": "softmax"}
        run.create({"settings": settings | {"steps": 2}, "data": DATA}, overwrite=False)
        demo_module.main(["--steps", "2", "--out", str(tmp_path)])
        demo_module.main(["--steps", "3", "--overwrite", "--out", str(tmp_path)])
        fresh = {"resume": False, "overwrite": False}
        assert seen == [
            ("dydila", fresh),
            ("softmax", {"resume": True, "overwrite": False}),
            ("dydila", fresh),
            ("softmax", {"resume": False, "overwrite": True}),
        ]
        seen.clear()  # one that cannot go on
        demo_module.main(["--steps", "2", "--overwrite", "--out", str(tmp_path)])
        assert seen[1] == ("softmax", {"resume": False, "overwrite": True})
        seen.clear()  # and one that can
        monkeypatch.setattr(Run, "newest_checkpoint", lambda *_, **__: (1, tmp_path))
        demo_module.main(["--steps", "2", "--overwrite", "--out", str(tmp_path)])
        assert seen[1] == ("softmax", {"resume": True, "overwrite": False})


def test_nothing_else_is_written_by_hand():
    """Every file goes through recipes/lab/files.py."""
    sources = [
        *(
            ROOT / "recipes" / name
            for name in ("compare.py", "figures.py", "results.py", "demo.py")
        ),
        *(ROOT / "recipes" / "studies").rglob("*.py"),
        *(ROOT / "recipes" / "lab" / "drawing").rglob("*.py"),
    ]
    for source in sources:
        text = source.read_text()
        for call in (".write_text(", ".write_bytes(", ".to_csv(path", "import matplotlib.pyplot"):
            assert call not in text, (source, call)
