"""What a careless or hostile user gives the suite and its scripts: one line, and nothing lost."""

import dataclasses
import importlib.metadata
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import types
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from matplotlib.text import Text

from attnzoo.testing import build_scrambled
from bench import compare, goals, isolate, machine, peers, plot, recommend, results, worker
from bench.cases import Case
from bench.isolate import Unsupported, run_isolated
from bench.options import options_from
from bench.thresholds import GoalFigure, figures_of
from recipes.lab import pages
from recipes.lab.console import UserError

ROOT = Path(__file__).parents[2]
PLAIN = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
PLAIN |= {"OMP_NUM_THREADS": "1"}
FEW = ("--mechanisms", "sana", "--resolutions", "128", "--widths", "96", "-k", "count")
PLUGINS = ("-p", "no:cacheprovider", "-p", "tests.bench.known_peaks")
SUITE = (sys.executable, "-m", "pytest", "bench", "-q", *PLUGINS)
GPU_RUN = ROOT / "docs" / "plots" / "gpu.json"
IMPL_CASES = (("softmax", "flash"), ("dydila", "triton"), ("gated", "fla"), ("agent", "xformers"))


def call(*command, folder=ROOT, **environment):
    return subprocess.run(
        command, cwd=folder, env=PLAIN | environment, capture_output=True, text=True, timeout=200
    )


def small_report(label="sana", **changes):
    """A run with two mechanisms at two sizes."""
    entries = []
    for name, factor in (("softmax", 2.0), (label, 1.0)):
        for px in (256, 512):
            seconds = factor * (px / 256) ** 2 * 1e-3
            info = {
                "id": f"layer-{name}-{px}", "kind": "layer", "mechanism": name, "label": name,
                "mode": "forward", "dtype": "float32", "resolution": px, "tokens": px * px // 256,
                "width": 96, "batch": 1, "peak_memory": px * 4000, "allocated": px * 8000,
                "parameter_memory": 40000, "parameters": 10000, "gflops": 5.0,
                "share_of_peak": 0.1, "device_name": "a CPU", "commit": "abc",
                "ratios": {"softmax": {"median": 1.0, "q1": 1.0, "q3": 1.0, "rounds": 3}},
            } | changes  # fmt: skip
            stats = {"median": seconds, "q1": seconds, "q3": seconds, "rounds": 3}
            entries.append({"name": f"t[{info['id']}]", "extra_info": info, "stats": stats})
    return {
        "machine_info": {"attnzoo": {"peaks": {"float32": 50.0, "copy": 10.0}}},
        "datetime": "2026-01-01T00:00:00", "benchmarks": entries, "cells_not_measured": [],
    }  # fmt: skip


def written(path, report):
    path.write_text(json.dumps(report), "utf-8")
    return path


REFUSED = (
    (("-n", "2"), "one case at a time"),
    (("--dist", "load", "--tx", "2*popen"), "one case at a time"),
    (("--quick", "--full"), "exclude each other"),
    (("tests/bench/test_gpu_goals.py",), "runs by itself"),
    (("--benchmark-disable",), "stores nothing"),
    (("--benchmark-skip",), "skips every case"),
    (("--setup-plan",), "measure nothing"),
    (("--benchmark-group-by", "sieze"), "'sieze' is unknown"),
    (("-p", "no:benchmark"), "needs pytest-benchmark"),
    (("--benchmark-json", "/proc/nowhere/out.json"), "cannot write '/proc/nowhere/out.json'"),
    (("--benchmark-json", "docs"), "it is a folder"),
    (("--benchmark-save", "x", "--benchmark-storage", "/proc/nowhere"), "cannot write '/proc/no"),
    (("--import", "no_such_module_anywhere"), "no module 'no_such_module_anywhere'"),
    (("--benchmark-histogram",), "needs pygal, which is not installed: pip install"),
    (("--benchmark-max-time", "3"), "--benchmark-max-time has no effect here"),
    (("--benchmark-warmup=on",), "--benchmark-warmup has no effect here"),
)
# One process for all, since most of a refusal's time goes to starting. No file whose name begins
# with "full" can be written in it.
ONE_PROCESS = """
import contextlib, io, json, os, sys
import pytest
sys.modules["pygal"] = None
replace = os.replace
def full(source, target):
    if os.path.basename(target).startswith("full"):
        raise OSError(28, "No space left on device")
    return replace(source, target)
os.replace = full
found = []
for flags in json.loads(sys.argv[1]):
    told, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(said):
        status = pytest.main(["bench", "-q", "-p", "no:cacheprovider", *flags])
    found.append([int(status), told.getvalue(), said.getvalue()])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def written_before(tmp_path_factory):
    """A file, and one that cannot be written, of an earlier run."""
    paths = [tmp_path_factory.mktemp("written") / name for name in ("out.json", "full.json")]
    for path in paths:
        path.write_text("older")
    return paths


@pytest.fixture(scope="module")
def one_process(written_before):
    """Status, standard error and output of the runs of ``REFUSED``, a listing and a full disk."""
    path, full = map(str, written_before)
    runs = [flags for flags, _ in REFUSED]
    runs += [("--collect-only", "--benchmark-json", path), ("--benchmark-json", full)]
    flags = [[*FEW, *flags] for flags in runs]
    done = call(sys.executable, "-c", ONE_PROCESS, json.dumps(flags))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("place", range(len(REFUSED)), ids=lambda i: " ".join(REFUSED[i][0]))
def test_what_would_store_nothing_is_refused_before_anything_is_measured(one_process, place):
    status, told, said = one_process[place]
    lines = told.strip().splitlines()
    assert status == 4 and REFUSED[place][1] in lines[-1], told + said
    assert lines[-1].startswith("ERROR:") and "Traceback" not in told and "passed" not in said


def test_listing_the_cases_leaves_an_older_result_as_it_is(one_process, written_before):
    status, _, said = one_process[-2]
    assert status == 0 and "count-sana" in said
    assert written_before[0].read_text() == "older"


def test_a_disk_that_is_full_at_the_end_is_one_line(one_process, written_before):
    status, told, said = one_process[-1]
    path = written_before[1]
    assert status == 2 and "Traceback" not in told + said
    assert f"error: cannot write {str(path)!r}: No space left on device" in said
    assert path.read_text() == "older" and os.listdir(path.parent).count("full.json") == 1
    assert not list(path.parent.glob(".tmp-*"))


def test_an_own_mechanism_and_a_new_folder_under_the_c_locale(tmp_path, capsys):
    own = tmp_path / "own.py"
    own.write_text(
        "import attnzoo\nimport torch.nn as nn\n\n"
        '@attnzoo.register_attention("own")\n'
        "class Own(attnzoo.Attention):\n"
        "    def __init__(self, context, config):\n"
        "        super().__init__(context, config)\n"
        "        self.value = nn.Linear(self.dim, self.dim)\n\n"
        "    def forward(self, x, grid):\n"
        "        return self.value(x).mean(1, keepdim=True).expand_as(x)\n"
    )
    path = tmp_path / "new" / "out.json"
    done = call(
        *SUITE, "--import", str(own), "--mechanisms", "own", "--resolutions", "128", "--widths",
        "96", "-k", "latency and layer and forward or count", "--benchmark-json", str(path),
        "--benchmark-only", LC_ALL="C", PYTHONUTF8="0",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(path.read_text("utf-8"))
    assert {entry["extra_info"]["mechanism"] for entry in report["benchmarks"]} == {"own"}
    remembered = report["machine_info"]["attnzoo"]["imports"]
    assert remembered["own"]["source"] == str(own) and len(remembered["own"]["sha256"]) == 64
    drawn = call(
        sys.executable, "bench/plot.py", str(path), "--out", str(tmp_path / "plots"),
        LC_ALL="C", PYTHONUTF8="0", MPLBACKEND="nonsense",
    )  # fmt: skip
    assert drawn.returncode == 0, drawn.stderr
    assert "own" in (tmp_path / "plots" / "report.html").read_text("utf-8")
    assert recommend.main([str(path), "--resolution", "128"]) == 0
    assert "- own: the fastest" in capsys.readouterr().out


def test_a_run_that_stops_early_says_why_though_nothing_was_measured(tmp_path):
    path = tmp_path / "out.json"
    wrong = str(Path(__file__).with_name("wrong.py"))
    done = call(
        *SUITE, "--import", wrong, "--mechanisms", "wrong", "--resolutions", "256",
        "--widths", "96", "-k", "latency and layer", "-x", "--benchmark-json", str(path),
    )  # fmt: skip
    report = json.loads(path.read_text())
    absent = report["cells_not_measured"]
    assert report["benchmarks"] == [] and len(report["cells_requested"]) == len(absent) == 2
    states = [cell["state"] for cell in absent]
    assert sorted(states) == ["error", "interrupted"], done.stdout
    late = [cell["reason"] for cell in absent if cell["state"] == "interrupted"]
    assert all("stopping after 1 failures" in reason for reason in late)


@pytest.mark.parametrize(("mechanism", "impl"), IMPL_CASES)
@pytest.mark.parametrize("kind", ["layer", "count"])
def test_an_implementation_that_cannot_run_here_is_unsupported(mechanism, impl, kind):
    cell = Case(kind=kind, mechanism=mechanism, options=(("impl", impl),), resolution=64, width=96)
    function = worker.count if kind == "count" else worker.measure
    outcome = run_isolated(function, cell, worker.Conditions(), memory=2**33, timeout=100)
    isolate.end_all()
    if outcome.state == "measured":  # where the library is there, or nothing is run
        return
    assert outcome.state == "unsupported" and "\n" not in outcome.reason
    assert f"impl={impl!r}" in outcome.reason


def peer_steps(mechanism, *names):
    """All peers of a layer, or these, on few tokens; see ``worker.peer_steps``."""
    case = Case(kind="peers", mechanism=mechanism, resolution=64, width=96)
    layer = build_scrambled(mechanism, 96)
    return worker.peer_steps(case, layer, names or peers.PEERS[mechanism])


def broken(name, error):
    """A module that raises when anything is taken from it."""

    def __getattr__(attribute):
        raise error

    module = types.ModuleType(name)
    module.__getattr__ = __getattr__  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize(
    "error",
    [AttributeError("no such kernel"), OSError("libcuda.so"), RuntimeError("built for torch 1"),
     TypeError("'NoneType'"), KeyError("CUDA_HOME"), SystemExit(3)],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_peers_survive_whatever_an_optional_package_raises(monkeypatch, error):
    for name in ("flash_attn", "xformers", "xformers.ops", "fla", "fla.ops", "fla.ops.gla",
                 "fla.ops.gla.naive"):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, broken(name, error))
    both = {"softmax": ("flash-attn", "xformers"), "gated": ("fla chunk_gla",)}
    for mechanism, lost in both.items():
        calls, found = peer_steps(mechanism)
        assert calls, mechanism
        missing = found["peers_missing"]
        for name in lost:
            assert name in missing and "\n" not in missing[name]
            assert type(error).__name__ in missing[name]


def test_flash_attn_4_serves_as_the_peer_where_it_is_what_is_there(monkeypatch):
    def flash_attn_func(query, key, value):
        scale = query.shape[-1] ** -0.5
        q, k, v = (z.transpose(1, 2) for z in (query, key, value))
        return ((q @ k.transpose(-2, -1) * scale).softmax(-1) @ v).transpose(1, 2), None

    package = types.ModuleType("flash_attn")
    package.cute = types.SimpleNamespace(flash_attn_func=flash_attn_func)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", package.cute)
    assert peer_steps("softmax", "flash-attn")[1]["peer_errors"]["flash-attn"] < 1e-5


def test_a_peer_that_fails_when_it_is_called_is_named_and_the_others_are_timed(monkeypatch):
    def explode(*_, **__):
        raise AssertionError("xformers has no operator here")

    module = types.SimpleNamespace(memory_efficient_attention=explode)
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", module)
    calls, found = peer_steps("softmax")
    assert "no operator here" in found["peers_missing"]["xformers"]
    assert "bare SDPA" in calls and "xformers" not in calls


def test_a_missing_function_is_one_line():
    with pytest.raises(Unsupported) as caught:
        peers.optional("function", "no_such_package_anywhere", "json")
    assert "no_such_package_anywhere" in str(caught.value) and "\n" not in str(caught.value)


def test_versions_survive_metadata_that_cannot_be_read(monkeypatch):
    def raising(package):
        raise KeyError("Version")

    monkeypatch.setattr(importlib.metadata, "version", raising)
    assert machine.versions()["torch"] == "unreadable (KeyError)"


# What cases import beforehand is left out, as nothing of it is needed here.
BARE = """
from multiprocessing.forkserver import ForkServer
ForkServer.set_forkserver_preload = lambda *_: None
from bench.isolate import run_isolated
"""
QUICK = f"{BARE}import os\nprint(run_isolated(os.getcwd, memory=2**33, timeout=60).state)\n"
SLEEPING = """
import os, time
from multiprocessing import util
with open(util.get_temp_dir() + "/of-a-case", "w") as file:
    file.write(str(os.getpid()))
time.sleep(300)
"""
KILLED = f"{BARE}run_isolated(exec, {SLEEPING!r}, memory=2**33, timeout=300)"


@pytest.fixture
def short_path():
    """A folder whose name leaves room for a socket's, as one of pytest's workers may not."""
    with tempfile.TemporaryDirectory(prefix="az-", dir="/tmp") as folder:
        yield Path(folder)


def test_a_long_temporary_folder_is_no_hindrance(short_path):
    long = short_path / ("x" * 90)
    long.mkdir()
    done = call(sys.executable, "-c", QUICK, TMPDIR=str(long), PYTHONPATH=str(ROOT))
    assert done.stdout == "measured\n", done.stderr


def test_a_killed_suite_leaves_no_process_and_the_next_one_sweeps_its_folder(short_path):
    tmp_path = short_path
    environment = PLAIN | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", KILLED], cwd=ROOT, env=environment) as process:
        deadline = time.time() + 100
        while not (found := list(tmp_path.glob("*/of-a-case"))) or not found[0].read_text():
            assert time.time() < deadline and process.poll() is None
            time.sleep(0.2)
        case = int(found[0].read_text())
        process.kill()
    left = list(tmp_path.iterdir())
    assert [path.name.startswith("attnzoo-bench-") for path in left] == [True]
    while Path(f"/proc/{case}").exists() and "Z" not in Path(f"/proc/{case}/stat").read_text():
        assert time.time() < deadline, "the case's process outlives its suite"
        time.sleep(0.2)
    other = tmp_path / "attnzoo-bench-of-a-run-that-goes-on"
    other.mkdir()
    (tmp_path / "attnzoo-bench-link").symlink_to(tmp_path)
    old = time.time() - 1000
    for folder in (*left, other):
        os.utime(folder, (old, old))
    with isolate.locked(other / ".lock"):
        os.utime(other, (old, old))
        isolate._sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {other.name, "attnzoo-bench-link"}


def test_a_finished_run_leaves_nothing(short_path):
    tmp_path = short_path
    environment = {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = call(sys.executable, "-c", QUICK, **environment)
    assert done.stdout == "measured\n" and list(tmp_path.iterdir()) == [], done.stderr


DAMAGED = {
    "no JSON": "{",
    "binary": b"\x00\xff\xfe",
    "a list": "[]",
    "deep": "[" * 100_000,
    "another project's": {"benchmarks": [{"name": "t", "extra_info": {}, "stats": {}}]},
    "entries that are none": {"benchmarks": [3]},
    "no extra_info": {"benchmarks": [{"name": "t"}]},
    "id alone": {"benchmarks": [{"name": "t", "extra_info": {"id": "x"}, "stats": {}}]},
    "text for a number": small_report(resolution="large"),
    "a foreign peak": small_report(peak_memory=None),
    "no number": small_report(peak_memory=float("nan")),
    "ratios of nothing": small_report(ratios={"softmax": 3}),
    "a foreign machine": small_report() | {"machine_info": []},
    "foreign peaks": small_report() | {"machine_info": {"attnzoo": {"peaks": {"float32": "x"}}}},
    "foreign accounts": small_report() | {"cells_not_measured": [{"name": 3}]},
    "a foreign date": small_report() | {"datetime": 3},
    "foreign goals": {"benchmarks": [{"extra_info": {"rows": [{"goal": "G99"}]}}]},
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_or_foreign_file_is_one_line(name, tmp_path):
    path, content = tmp_path / "report.json", DAMAGED[name]
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    for main, flags in (
        (plot.main, ["--out", str(tmp_path / "plots")]),
        (recommend.main, ["--resolution", "256"]),
        (results.main, ["--compact", str(tmp_path / "small.json")]),
        (compare.main, [str(path)]),
        (goals.main, []),
    ):
        with pytest.raises(UserError) as caught:
            main([str(path), *flags])
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "small.json").exists() and not (tmp_path / "plots/report.html").exists()


def test_a_sound_file_passes_the_same_checks(tmp_path, capsys):
    path = written(tmp_path / "report.json", small_report())
    with pytest.raises(UserError, match=r"--size is of whole models.*choose by --width"):
        recommend.main([str(path), "--size", "S"])
    assert recommend.main([str(path), "--resolution", "256"]) == 0
    assert compare.main([str(path), str(path)]) == 0
    capsys.readouterr()


def test_outputs_are_refused_before_work(tmp_path, monkeypatch):
    path = written(tmp_path / "report.json", small_report())
    monkeypatch.setattr(plot, "draw", None)
    monkeypatch.setattr(goals, "_measure", None)
    monkeypatch.setattr(results, "joined", None)
    page = tmp_path / "page.md"
    page.write_text("<!-- /where -->\n<!-- where -->\n")
    for main, arguments, message in (
        (plot.main, [str(path), "--out", "/proc/nowhere"], "cannot write"),
        (plot.main, [str(path), "--out", str(tmp_path), "--into", str(page)], "needs one line"),
        (results.main, [str(path), "--compact", str(tmp_path)], "it is a folder"),
        (goals.main, ["--only", "G13", "--save", "/proc/nowhere/x.json"], "cannot write"),
        (goals.main, ["--only", "G13", "--into", str(page)], "needs one line"),
    ):
        with pytest.raises(UserError, match=message):
            main(arguments)


@pytest.mark.parametrize("flags", [["--memory", "much"], ["--memory", ""], ["--quality", "none"]])
def test_recommend_reads_its_flags_first(flags, tmp_path):
    with pytest.raises(UserError):
        recommend.main([str(tmp_path / "missing.json"), "--resolution", "256", *flags])
    with pytest.raises(UserError, match="does not exist"):
        recommend.main([str(tmp_path / "missing.json"), "--resolution", "256"])


@pytest.mark.parametrize(
    "content",
    [
        "variant,metric,mean,resolution\n",
        "variant,metric,mean,resolution\nsana,FID,much,32\n",
        "variant,metric,mean,resolution\nsana,FID,nan,32\n",
    ],
)
def test_a_summary_without_numbers_is_one_line(content, tmp_path):
    (tmp_path / "summary.csv").write_text(content)
    path = written(tmp_path / "report.json", small_report())
    with pytest.raises(UserError, match="no result that is a number"):
        recommend.main([str(path), "--resolution", "256", "--quality", str(tmp_path)])


HOSTILE = "_x|`$\\bad$<img src=x onerror=alert(1)>\x1b[31m[a](b)\ny=é"


def test_names_that_users_choose_do_no_harm(tmp_path, capsys):
    report = small_report(HOSTILE, mode="forward", dtype="../../outside/x")
    report["cells_not_measured"] = [{"name": HOSTILE, "state": "error", "reason": HOSTILE}]
    for entry in report["benchmarks"]:
        entry["extra_info"]["device_name"] = HOSTILE
    path = written(tmp_path / "report.json", report)
    out = tmp_path / "a" / "plots"
    assert plot.main([str(path), "--out", str(out)]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"report.json", "a"}
    assert os.listdir(tmp_path / "a") == ["plots"]
    assert recommend.main([str(path), "--resolution", "256"]) == 0
    told = capsys.readouterr().out
    assert "\x1b" not in told
    row = next(line for line in told.splitlines() if line.startswith("| _x"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 6 and "&lt;img" in row and "\\`" in row
    page = (out / "report.html").read_text("utf-8")
    assert "<img src=x" not in page and "&lt;img src=x" in page and "\x1b" not in page
    picture = next(out.glob("time-*.svg"))
    ElementTree.parse(picture)
    assert picture.stat().st_size > 1000


def test_many_mechanisms_are_drawn_and_told_without_overlap(tmp_path, monkeypatch):
    report = small_report("mechanism-0")
    for i in range(1, 24):
        more = small_report(f"mechanism-{i}")["benchmarks"][2:]
        for entry in more:
            entry["stats"] |= {key: entry["stats"][key] * (1 + i / 9) for key in ("median", "q1")}
        report["benchmarks"] += more
    path = written(tmp_path / "report.json", report)
    drawn = [(name, figure) for name, _, figure in plot.figures(results.read_report(path))]
    assert {name for name, _ in drawn} >= {"time", "memory", "arithmetic", "roofline", "ratios"}
    for name, figure in drawn:
        figure.canvas.draw()
        hidden = {t for ax in figure.axes for t in ax.findobj(Text) if not ax.axison}
        for ax in figure.axes:  # nor are ticks outside of the view drawn
            for axis, (low, high) in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
                ticks = axis.get_major_ticks()
                low, high = sorted((low, high))
                hidden |= {t.label1 for t in ticks if not low <= t.get_loc() <= high}
        texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
        boxes = [t.get_window_extent() for t in texts if t not in hidden]
        assert len(boxes) > 24, name
        # Two edges may touch.
        smaller = [box.padded(-1) for box in boxes]
        overlap = [(a, b) for a, b in itertools.combinations(smaller, 2) if a.overlaps(b)]
        assert not overlap, (name, overlap)
        assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes), name
    monkeypatch.setattr(plot, "draw", lambda *_: [])  # once is enough
    assert plot.main([str(path), "--out", str(tmp_path / "plots")]) == 0
    page = (tmp_path / "plots" / "report.html").read_text("utf-8")
    assert page.index("<h2>Verdict") < page.index("<h2>One attention") < page.index("<h2>Pict")
    assert "mechanism-0 (1 ms" in page and "23 of 24" not in page
    assert max(head.count("<th>") for head in page.split("</thead>")) <= 13
    first = page[page.index("<h2>One attention layer, 512 px") :].split("</table>")[0]
    order = re.findall(r"<tr><td>([\w-]+)", first)
    assert order[0] == "mechanism-0" and order[1:3] == ["mechanism-1", "mechanism-2"]
    assert len(order) == 25


def test_text_of_a_table_is_escaped_once():
    assert pages.markdown_text("a|b") == "a\\|b"
    assert pages.markdown_text("sana[impl=reference]") == "sana[impl=reference]"
    assert pages.markdown_text("</td>") == "&lt;/td&gt;"
    assert pages.markdown_text("≥ 0.88, ≤ 1") == "≥ 0.88, ≤ 1"


def test_a_pipe_that_closes_is_no_traceback():
    code = "from recipes.lab.console import run_script; run_script(lambda _: print('x' * 10**6))"
    done = call("bash", "-c", f'(sleep 1; {sys.executable} -c "{code}") | true')
    assert done.stderr == "", done.stderr


def test_ties_are_called_ties():
    choice = recommend.Choice
    found = [choice("a", 1.0, 1.0, 5.0, True, 3.00001), choice("b", 1.0, 1.0, 5.0, True, 3.0)]
    lines = recommend.advise(found, None, "FID", True)
    # b is as fast and better by a hair, which is enough to beat a, though both show 3.
    assert lines[0].startswith("- b:") and "Beaten in everything that was compared: a." in lines
    found = [choice("a", 1.0, 1.0, 5.0, True), choice("b", 1.0000001, 1.0, 4.9999999, True)]
    lines = recommend.advise(found, None, None, True)
    assert "the fastest (a tie with b)" in lines[0] and "the fastest (a tie with a)" in lines[1]
    assert "the least memory (a tie with a)" in lines[1]
    found = [choice("softmax", 1.0, 1.0, 5.0, True), choice("b", 1.001, 1.0, 4.0, True)]
    lines = recommend.advise(found, None, None, True)
    assert "as fast as softmax" in lines[0] and lines[1].endswith("compared: softmax.")


def test_a_verdict_is_of_the_figure_as_measured_and_what_is_shown_agrees(tmp_path):
    row = GoalFigure(
        goal="G4", what="t", value=2.3000000001, minimum=2.3, target=2.0, better="lower"
    )
    assert row.verdict == "minimum missed" and row.shown == "2.3000000001"
    assert dataclasses.replace(row, value=2.41).shown == "2.41"
    entry = {"extra_info": {"rows": [dataclasses.asdict(row)], "id": "G4"}}
    path = written(tmp_path / "g.json", {"benchmarks": [entry]})
    assert goals.main([str(path), "--save", str(tmp_path / "again.json")]) == 0
    (again,) = figures_of(results.read_report(tmp_path / "again.json"))
    assert again.value == row.value and again.verdict == "minimum missed"


def test_a_mechanism_without_memory_of_its_own_is_drawn(tmp_path, capsys):
    path = written(tmp_path / "report.json", small_report(peak_memory=0))
    assert plot.main([str(path), "--out", str(tmp_path / "plots")]) == 0
    assert recommend.main([str(path), "--resolution", "1024"]) == 0
    capsys.readouterr()


def test_what_a_gpu_reaches_is_of_the_time_that_is_shown():
    report = small_report(device_seconds={"median": 5e-4})
    cases = results.frame(report)
    found = cases[["time", "gflops", "share_of_peak"]].drop_duplicates("gflops").iloc[0]
    assert found.to_list() == [5e-4, 5.0 * cases["seconds"][0] / 5e-4, pytest.approx(0.4)]
    assert "| 40      | 1.25 " in plot.where(report)  # 4 ms launched, 0.5 of the device


def test_a_run_that_measured_nothing_is_compared(tmp_path, capsys):
    none = written(tmp_path / "none.json", small_report() | {"benchmarks": []})
    some = written(tmp_path / "some.json", small_report())
    assert compare.main([str(none), str(some)]) == 0
    assert "0 cases in both files" in capsys.readouterr().out


def test_runs_of_other_threads_are_not_joined():
    one, other = small_report(threads=1), small_report(threads=2)
    one["common"] = other["common"] = {}
    with pytest.raises(UserError, match="threads 1 and 2"):
        results.joined([one, other])


def test_settings_are_checked_in_full(tmp_path):
    texts = {
        "profile": "quick", "device": "cpu", "mechanisms": "sana", "resolutions": "128",
        "widths": "96", "dtypes": "", "goals": "none", "threads": "1", "memory_cap": "8GiB",
        "case_timeout": "60", "quality": None, "imports": (),
    }  # fmt: skip
    assert options_from(**texts).conditions.threads == 1
    for name, value in (("threads", "0"), ("widths", "-3"), ("case_timeout", "1,2"),
                        ("quality", str(tmp_path)), ("mechanisms", "sana:=3")):  # fmt: skip
        with pytest.raises(UserError):
            options_from(**(texts | {name: value}))


def test_the_gpu_run_in_the_repository_passes_the_checks():
    assert len(results.read_cases(GPU_RUN)["benchmarks"]) > 50
