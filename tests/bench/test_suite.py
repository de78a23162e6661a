"""The suite end to end, as a user runs it: through pytest, in a process of its own."""

import dataclasses
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from einops import rearrange

import attnzoo
from attnzoo.command import fits as advised
from attnzoo.command import units
from attnzoo.ops.gated_scan.reference import gated_linear_attention
from attnzoo.testing import build_scrambled, tokens
from bench import compare, fits, goals, plot, recommend, results, worker
from bench.cases import Case, Request, table
from bench.peers import PEERS
from bench.thresholds import GOALS, GoalFigure, figures_of
from recipes.lab.console import UserError

ROOT = Path(__file__).parents[2]
WRONG = str(Path(__file__).with_name("wrong.py"))


COMMAND = (sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider")
KNOWN_PEAKS = ("-p", "tests.bench.known_peaks")
# The run is its own, not a part of this one: pytest-benchmark writes nothing in a worker.
INHERITED = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
ENVIRONMENT = INHERITED | {"OMP_NUM_THREADS": "1"}


def suite(*arguments, plugins=KNOWN_PEAKS, timeout=240):
    """Runs ``pytest bench/`` and returns the finished process."""
    return subprocess.run(
        [*COMMAND, *plugins, *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True,
        text=True, timeout=timeout,
    )  # fmt: skip


def suite_process(*arguments):
    """Starts ``pytest bench/``."""
    return subprocess.Popen(
        [*COMMAND, *KNOWN_PEAKS, *arguments], cwd=ROOT,
        env=ENVIRONMENT | {"PYTHONUNBUFFERED": "1"}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # A shell that started these tests in the background let them inherit a deaf SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Two mechanisms at two sizes, layers and counts only."""
    path = tmp_path_factory.mktemp("quick") / "out.json"
    done = suite(
        "--mechanisms", "sana,softmax", "--resolutions", "128,256", "--widths", "96",
        "-k", "(latency and layer) or (peers and sana-128px) or count",
        "--benchmark-group-by", "param:resolution", "--benchmark-json", str(path),
        "--benchmark-save", "first", "--benchmark-storage", str(path.with_name("storage")),
        "--benchmark-min-rounds", "8", plugins=(),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return path, done.stdout


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Mechanisms that end in each of the other ways."""
    path = tmp_path_factory.mktemp("broken") / "out.json"
    done = suite(
        "--import", WRONG, "--mechanisms", "wrong,greedy,slow,unavailable,sana",
        "--resolutions", "256", "--widths", "96", "--cell-timeout", "4",
        "--memory-cap", "1GiB", "-k", "latency and layer and forward",
        "--benchmark-json", str(path),
    )  # fmt: skip
    return json.loads(path.read_text()), done


def figure(goal, what, value, minimum, target, better, **others):
    return GoalFigure(goal=goal, what=what, value=value, minimum=minimum, target=target,
                      better=better, **others)  # fmt: skip


def by_id(report):
    return {b["extra_info"]["id"]: b["extra_info"] for b in report["benchmarks"]}


def test_every_cell_is_measured_with_what_the_issue_lists(quick):
    report = json.loads(quick[0].read_text())
    assert report["cells_not_measured"] == []
    assert len(report["cells_requested"]) == len(report["benchmarks"]) == 13
    info = by_id(report)["layer-sana-256px-d96-float32-forward"]
    expected = {
        "mechanism": "sana", "tokens": 256, "impl": "auto", "dtype": "float32", "device": "cpu",
        "threads": 1, "timer": "process CPU time", "options": {},
    }  # fmt: skip
    assert {key: info[key] for key in expected} == expected
    for key in ("versions", "commit", "allocator", "load", "peak_memory", "parameters", "check"):
        assert info[key], key
    assert info["macs"] == attnzoo.build_attention("sana", 96).macs((16, 16))
    assert info["macs_training"] > 2 * info["macs"] and info["macs_paper"] < info["macs"]
    assert 0 < info["share_of_peak"] < 1.5
    assert set(info["ratios"]) == {"softmax"} and info["ratios"]["softmax"]["rounds"] >= 3
    softmax = by_id(report)["layer-softmax-256px-d96-float32-forward"]
    assert softmax["operators"] == ["_scaled_dot_product_flash_attention_for_cpu"]
    peers = by_id(report)["peers-sana-128px-d96-float32-forward"]
    assert peers["best_peer"] in ("diffusers Sana processor", "reference map")
    assert "the time of the best peer" in quick[1]


def test_the_rounds_in_the_json_are_those_of_the_cells_process(quick):
    report = json.loads(quick[0].read_text())
    for entry in report["benchmarks"]:
        seconds = entry["stats"]["median"]
        assert 1e-6 < seconds < 5, entry["name"]
        if "gflops" in entry["extra_info"]:
            info = entry["extra_info"]
            step = info["macs_training" if info["mode"] == "train" else "macs"]
            assert info["gflops"] == pytest.approx(2 * step / seconds / 1e9, rel=1e-6)
    assert "param:resolution" not in quick[1] and "resolution=128" in quick[1]


def test_after_a_run_stands_what_each_mechanism_takes_the_fastest_first(quick):
    told, report = quick[1], json.loads(quick[0].read_text())
    part = told[told.index("one attention layer, 256 px (n = 256), d = 96, float32\n") :]
    heads, columns, *rows = part.split("\n\n")[0].splitlines()[1:]
    assert re.match(r"forward: fastest (sana|softmax) \(.*least memory", heads)
    if columns.startswith("train"):
        columns, *rows = rows
    assert columns.split() == [
        *("mechanism", "time", "x", "softmax", "memory", "MACs"),
        *("training", "step", "x", "softmax", "memory"),
    ]
    found = by_id(report)
    medians = {b["extra_info"]["id"]: b["stats"]["median"] for b in report["benchmarks"]}
    case = "layer-{}-256px-d96-float32-forward".format
    order = sorted(("sana", "softmax"), key=lambda name: medians[case(name)])
    assert [row.split()[0] for row in rows] == order
    (sana,) = (row for row in rows if row.split()[0] == "sana")
    info = found[case("sana")]
    for text in (
        units.amount(medians[case("sana")], "s"), units.memory(info["peak_memory"]),
        units.amount(info["macs"]), f"{info['ratios']['softmax']['median']:.2f}",
    ):  # fmt: skip
        assert text in sana, (text, sana)
    # The table of pytest-benchmark was asked for; how long counting took is in neither.
    assert "resolution=256" in told and "count-sana" not in told
    assert all(b["stats"]["rounds"] >= 8 for b in report["benchmarks"] if "check" in
               b["extra_info"])  # fmt: skip


def test_runs_are_compared_with_saved_ones_and_alarm_only_where_the_machine_differs(quick, capsys):
    storage, prefix = quick[0].with_name("storage"), quick[0].with_name("histogram")
    has_pygal = importlib.util.find_spec("pygal") is not None
    done = suite(
        "--mechanisms", "sana", "--resolutions", "128", "--widths", "96", "-k",
        "layer-sana-128px-d96-float32-forward or count", "--benchmark-storage", str(storage),
        "--benchmark-compare", "0001", "--benchmark-columns", "min,rounds", "--benchmark-only",
        "--benchmark-sort", "name", "--benchmark-name", "short", "--benchmark-autosave",
        *(("--benchmark-histogram", str(prefix)) if has_pygal else ()),
    )  # fmt: skip
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    assert "machine_info" not in told and "no fair comparison" not in told
    assert re.search(r"\nlatency\[layer-sana-128px-d96-float32-forward\] \(0001\) +\d", told)
    assert re.search(r"\nlatency\[layer-sana-128px-d96-float32-forward\] \(NOW\) +\d", told)
    assert re.search(r"Name \(time in \ws\) +Min +Rounds", told)
    first, second = sorted(storage.glob("*/*.json"))
    assert second.name.startswith("0002_") and bool(list(prefix.parent.glob("*.svg"))) == has_pygal
    before, after = (results.read_cases(path) for path in (first, second))
    assert compare.main([str(first), str(second)]) == 0
    assert results.machines_differ(before, after) == ""
    after["machine_info"]["attnzoo"]["versions"]["torch"] = "9.9"
    after["machine_info"]["attnzoo"]["threads"] = 64
    torch_here = before["machine_info"]["attnzoo"]["versions"]["torch"]
    assert (
        results.machines_differ(before, after) == f"threads 1 and 64, torch {torch_here} and 9.9"
    )


def test_plots_report_and_compact_copy(quick, tmp_path, capsys):
    small = tmp_path / "small.json"
    assert results.main([str(quick[0]), "--compact", str(small)]) == 0
    assert small.stat().st_size < quick[0].stat().st_size / 2
    whole, read = results.read_report(quick[0]), results.read_report(small)
    dropped = {"macs_parts", "check", "timer", "cell_seconds", "cell_cpu_seconds"}
    for entry, kept in zip(whole["benchmarks"], read["benchmarks"], strict=True):
        info = entry["extra_info"]
        assert kept["name"] == entry["name"]
        expected = {k: info[k] for k in info.keys() - dropped - read["common"].keys()}
        assert kept["extra_info"] == results.rounded(expected)
    again = tmp_path / "again.json"
    assert results.main([str(small), "--compact", str(again)]) == 0
    assert json.loads(again.read_text()) == json.loads(small.read_text())
    data = [entry["stats"]["data"] for entry in whole["benchmarks"]]
    for column, share in (("seconds_q1", 25), ("seconds", 50), ("seconds_q3", 75)):
        expected = [np.percentile(rounds, share) for rounds in data]
        for report in (whole, read):
            assert results.frame(report)[column].tolist() == pytest.approx(expected, rel=1e-5)
    out = tmp_path / "plots"
    assert plot.main([str(small), "--out", str(out)]) == 0
    names = {path.stem for path in out.glob("*.png")}
    assert names >= {
        "time-layer-forward-d96-float32", "memory-layer-forward-d96-float32", "macs-d96",
        "ratios-layer-forward-d96-float32", "arithmetic-layer-forward-d96-float32",
        "roofline-layer-forward-d96-float32",
    }  # fmt: skip
    assert names == {path.stem for path in out.glob("*.svg")}
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(names)
    assert 'src="http' not in page and "13 cases requested, 13 measured" in page


def relabelled(report):
    """The run of a CPU as a GPU's would look."""
    report = json.loads(json.dumps(report))
    report["machine_info"]["attnzoo"]["device"] = "cuda"
    for entry in report["benchmarks"]:
        info, median = entry["extra_info"], entry["stats"]["median"]
        if info["kind"] == "count":
            continue
        info |= {"device": "cuda", "device_name": "NVIDIA H200", "id": f"{info['id']}-cuda"}
        info["device_seconds"] = {"median": median / 2, "q1": median / 3, "q3": median}
        info["device_ratios"] = info["ratios"]
    rows = [figure(goal="U7", what="peak", value=1.3, minimum=1.6, target=1.2, better="lower")]
    entry = {"name": "test_goal[U7]", "stats": {"median": 1.0, "rounds": 1, "data": [1.0]}}
    entry["extra_info"] = {
        "rows": [dataclasses.asdict(row) for row in rows], "id": "U7", "kind": "goal",
        "mechanism": "U7", "label": "U7", "mode": "forward", "device_name": "NVIDIA H200",
        "resolution": 1024, "width": 384, "tokens": 4096, "dtype": "float32",
    }  # fmt: skip
    report["benchmarks"].append(entry)
    lost = {"name": "test_goal[U5]", "state": "unsupported", "reason": "No module named 'fla'"}
    report["cells_not_measured"].append(lost)
    return report


def test_a_run_on_a_gpu_is_drawn_told_and_compared(quick, tmp_path, capsys):
    full, small, page = (tmp_path / name for name in ("gpu.json", "small.json", "page.md"))
    full.write_text(json.dumps(relabelled(json.loads(quick[0].read_text()))))
    assert results.main([str(full), "--compact", str(small)]) == 0
    out = tmp_path / "plots"
    assert plot.main([str(small), "--out", str(out)]) == 0
    names = {path.stem for path in out.glob("*.png")}
    assert names >= {
        f"{kind}-layer-forward-d96-float32-cuda"
        for kind in ("time", "device-time", "memory", "ratios", "device-ratios")
    }
    assert "NVIDIA H200" in (out / "report.html").read_text()
    assert "NVIDIA H200" in (out / "time-layer-forward-d96-float32-cuda.svg").read_text()
    assert recommend.main([str(small), "--resolution", "256"]) == 0
    told = capsys.readouterr().out
    assert "on NVIDIA H200" in told and "| on the device | launched |" in told
    assert recommend.main([str(small), "--resolution", "256", "--launched"]) == 0
    assert "| launched |" not in capsys.readouterr().out
    cells = results.subset(results.frame(results.read_report(small)), "layer", mode="forward")
    (on_device, *_), (launched, *_) = (
        recommend.choices(cells, 256, 1, {}, time)[0] for time in ("time", "seconds")
    )
    assert on_device.seconds == pytest.approx(launched.seconds / 2, rel=1e-5)
    assert on_device.launched == launched.launched == launched.seconds
    assert compare.main([str(full), str(small)]) == 0 and "0 changes" in capsys.readouterr().out
    page.write_text("<!-- goals-cuda -->\n<!-- /goals-cuda -->\n")
    alone = tmp_path / "alone.json"
    assert goals.main([str(full), "--save", str(alone)]) == 0
    assert figures_of(results.read_report(alone)) == figures_of(results.read_report(full))
    assert goals.main([str(small), "--into", str(page)]) == 0
    text = page.read_text()
    assert "NVIDIA H200" in text and "1.3" in text and "unsupported: No module named" in text


def test_a_peer_is_compared_on_the_device_where_both_ran_there():
    def spread(median):
        return {"median": median, "q1": median, "q3": median}

    row = {"kind": "peers", "label": "sana", "mode": "forward", "resolution": 256, "width": 96,
           "dtype": "float32", "device_time": 1.0, "peers_missing": {}, "best_peer": "a",
           "best_peer_on_device": "b",
           "ratios": {"a": spread(0.9), "b": spread(0.8)},
           "device_ratios": {"b": spread(1.5)}}  # fmt: skip
    alone = {key: row[key] for key in row if "device" not in key}
    on_a_gpu, on_a_cpu = (plot._peers(pd.DataFrame([one])) for one in (row, alone))
    assert on_a_gpu.iloc[:, [1, 2, 4]].to_numpy().tolist() == [
        ["b", "1.50", "best peer"], ["a", "0.90", "launched"]
    ]  # fmt: skip
    assert on_a_cpu.iloc[:, [1, 2, 4]].to_numpy().tolist() == [
        ["a", "0.90", "best peer"], ["b", "0.80", ""]
    ]  # fmt: skip
    # The second could not record.
    mixed = plot._peers(pd.DataFrame([row, alone])).iloc[2:, [1, 2, 4]]
    assert mixed.to_numpy().tolist() == [
        ["a", "0.90", "best peer, launched"], ["b", "0.80", "launched"]
    ]  # fmt: skip


@pytest.fixture
def told(quick, tmp_path):
    """``quick`` as if softmax's time were quadratic and Sana's linear."""
    report = json.loads(quick[0].read_text())
    for entry in report["benchmarks"]:
        growth = {"sana": 1, "softmax": 2}[entry["extra_info"]["mechanism"]]
        entry["stats"]["data"] = [entry["extra_info"]["tokens"] ** growth * 1e-7] * 3
    path = tmp_path / "told.json"
    path.write_text(json.dumps(report))
    return path


def test_recommend(told, tmp_path, capsys):
    assert recommend.main([str(told), "--resolution", "1024", "--memory", "8GiB"]) == 0
    shown = capsys.readouterr().out
    assert "- sana: the fastest" in shown and "(estimated)" in shown
    assert "was not measured" in shown and "Nothing is said of quality" in shown
    assert recommend.main([str(told), "--resolution", "256", "--memory", "1MiB"]) == 0
    assert "Nothing fits. The smallest is" in capsys.readouterr().out
    mixed = [str(told), "--resolution", "256", "--depth", "8", "--attn", "sana*3+softmax"]
    assert recommend.main(mixed) == 0
    rows = re.findall(
        r"^\| (\S+) +\| +([\d.]+) (\w+)", capsys.readouterr().out.replace("\\", ""), re.MULTILINE
    )
    seconds = {n: float(z) * {"s": 1, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}[u] for n, z, u in rows}
    mixture = (6 * seconds["sana"] + 2 * seconds["softmax"]) / 8
    assert seconds["sana*3+softmax"] == pytest.approx(mixture, rel=0.01)
    with pytest.raises(UserError, match=r"block 1 of 'sana\+lit': there are no figures of 'lit'"):
        recommend.main([*mixed[:-1], "sana+lit"])
    quality = tmp_path / "summary.csv"
    quality.write_text(
        "data,level,resolution,protocol,cfg,variant,metric,mean,std,seeds\n"
        "shapes,easy,32,controlled,1.0,sana,FID[smallcnn],9.0,0.1,3\n"
        "shapes,easy,32,controlled,1.0,softmax,FID[smallcnn],5.0,0.1,3\n"
        "shapes,easy,32,matched,1.0,sana,FID[smallcnn],1.0,0.1,3\n"
        "shapes,easy,32,matched,1.0,dydila,FID[smallcnn],1.0,0.1,3\n"
    )
    assert recommend.main([str(told), "--resolution", "256", "--quality", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"- softmax: .*the best FID\[smallcnn\] *; .*FID\[smallcnn\] 5", shown)
    assert "32 px, protocol controlled" in shown and "in every setting" not in shown
    with quality.open("a") as file:  # which sana has not passed
        file.write("shapes,hard,32,controlled,1.0,softmax,FID[smallcnn],15.0,0.1,3\n")
    assert recommend.main([str(told), "--resolution", "256", "--quality", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"- softmax: .*FID\[smallcnn\] 10", shown)
    assert "without sana: not measured in every setting" in shown
    found = [
        recommend.Choice("softmax", 2.0, 2.0, 5.0, True, 1.0),
        recommend.Choice("sana", 1.0, 1.0, 5.0, True, 2.0),
        recommend.Choice("focused", 2.0, 2.0, 6.0, True, 2.0),
        recommend.Choice("agent", 1.0, 1.0, 4.0, True),
    ]
    assert recommend.advise(found, None, "FID", True)[2:] == [
        "Beaten in everything that was compared: focused.",
        "Not compared, for want of FID: agent.",
    ]


def test_two_files_are_compared_beyond_their_spread(quick, tmp_path, capsys):
    report = json.loads(quick[0].read_text())
    for entry in report["benchmarks"]:
        if entry["extra_info"]["id"] == "layer-sana-256px-d96-float32-forward":
            entry["stats"]["data"] = [3 * seconds for seconds in entry["stats"]["data"]]
    slower = tmp_path / "slower.json"
    slower.write_text(json.dumps(report))
    assert compare.main([str(quick[0]), str(slower)]) == 0
    shown = capsys.readouterr().out
    assert "| layer-sana-256px-d96-float32-forward | slower |" in shown and "1 changes" in shown
    assert compare.main([str(quick[0]), str(quick[0])]) == 0
    assert "0 changes" in capsys.readouterr().out


def test_nothing_vanishes(broken):
    report, done = broken
    absent = {cell["name"]: cell for cell in report["cells_not_measured"]}
    assert len(report["cells_requested"]) == 5 == len(report["benchmarks"]) + len(absent)
    found = {name.partition("layer-")[2].partition("-")[0]: c for name, c in absent.items()}
    assert {name: cell["state"] for name, cell in found.items()} == {
        "wrong": "error", "greedy": "out-of-memory", "slow": "timeout",
        "unavailable": "unsupported",
    }  # fmt: skip
    assert "differs from its reference" in found["wrong"]["reason"]
    assert "no_such_package_anywhere" in found["unavailable"]["reason"]
    assert done.returncode == 1 and "5 requested, 1 measured" in done.stdout
    for cell in absent.values():
        assert cell["name"] in done.stdout


def test_what_the_time_budget_leaves_out_is_listed(tmp_path):
    path = tmp_path / "short.json"
    done = suite(
        "--import", WRONG, "--mechanisms", "slow,sana", "--resolutions", "256", "--widths",
        "96", "--time-budget", "10", "-k", "latency and layer and forward or count",
        "--benchmark-json", str(path),
    )  # fmt: skip
    report = json.loads(path.read_text())
    absent = {cell["name"]: cell for cell in report["cells_not_measured"]}
    assert any("layer-slow" in name for name in absent), done.stdout
    assert {cell["state"] for cell in absent.values()} == {"timeout"}
    assert all("budget of 10 s was spent" in cell["reason"] for cell in absent.values())
    assert len(report["cells_requested"]) == len(report["benchmarks"]) + len(absent)


# What SIGINT does to a run is pytest's own, which SIGTERM is made to do.
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_an_interrupted_run_writes_what_it_has(tmp_path, number):
    path = tmp_path / "part.json"
    arguments = (
        "--import", WRONG, "--mechanisms", "sana,slow", "--resolutions", "256", "--widths",
        "96", "-k", "latency and layer and forward", "-vv", "--benchmark-json", str(path),
    )  # fmt: skip
    with suite_process(*arguments) as process:
        for line in process.stdout:
            if "layer-sana" in line and "PASSED" in line:
                break
        time.sleep(1)  # into the cell that never ends
        process.send_signal(number)
        rest = process.communicate(timeout=120)[0]
    report = json.loads(path.read_text())
    assert [entry["extra_info"]["mechanism"] for entry in report["benchmarks"]] == ["sana"], rest
    (absent,) = report["cells_not_measured"]
    assert "layer-slow" in absent["name"] and "the run ended" in absent["reason"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mechanisms", "sanna"), "did you mean 'sana'"),
        (("--mechanisms", "sana:implementation=naive"), "sana"),
        (("--resolutions", "250"), "the nearest is 256"),
        (("--dtypes", "float23"), "did you mean 'float32'"),
        (("--memory-cap", "much"), "write it like 8GiB"),
        (("--import", "no/such/file.py"), "there is no file 'no/such/file.py'"),
        (("--threads", "1,2"), "takes one number"),
        (("--threads", "²"), "positive integers"),
        (("--case-timeout", "9" * 30), "positive integers"),
        (("--memory-cap", "9" * 400 + "GiB"), "write it like 8GiB"),
        (("--memory-cap", "0"), "write it like 8GiB"),
        (("--quality", "no/such/folder"), "no summary of a comparison"),
        (("--goals", "G99", "--full"), "unknown goal 'G99'"),
        (("--goals", "U1"), "U1 is a goal of --device cuda"),
        (("--goals", "G4", "--profile", "quick"), "--goals G4 is for --full"),
        (("--goals", "G4", "--mechanisms", "sana"), "without --mechanisms"),
        (("--mechanisms", ","), "--mechanisms ',' names none"),
    ],
)
def test_a_wrong_option_is_one_line(arguments, message):
    from bench.options import options_from
    from recipes.lab.imports import import_all

    flags = dict(zip(arguments[::2], arguments[1::2], strict=False))
    defaults = {
        "profile": "full", "device": "cpu", "mechanisms": "", "resolutions": "", "widths": "",
        "dtypes": "", "goals": "", "threads": "1", "memory_cap": "8GiB", "case_timeout": "60",
        "quality": None, "imports": (),
    }  # fmt: skip
    given = {name.strip("-").replace("-", "_"): text for name, text in flags.items()}
    with pytest.raises((UserError, attnzoo.errors.UsageError), match=re.escape(message)):
        import_all([given["import"]] if "import" in given else [])
        options_from(**(defaults | given))


def test_tables_are_data_without_doubles_and_cover_what_was_asked():
    for request in (Request(), Request(profile="full", goals=tuple(GOALS)),
                    Request(profile="full", device="cuda")):  # fmt: skip
        cells = table(request)
        assert len({cell.id for cell in cells}) == len(cells)
        assert {cell.mechanism for cell in cells} >= set(attnzoo.list_attention())
    everything = table(Request(profile="full", device="cuda", goals=("U1", "U2")))
    timed = [cell for cell in everything if cell.kind not in ("count", "goal")]
    # What fits into nine minutes, and the goals before all that a short run may lose.
    assert (
        len(timed) <= 14 * len(attnzoo.list_attention())
        and sum(cell.compiled for cell in timed) <= 4
    )
    assert everything.index(timed[0]) == len(everything) - len(timed)
    cuda = [cell for cell in timed if cell.kind == "layer"]
    assert {cell.tokens for cell in cuda} >= {256, 65536}
    assert {cell.mode for cell in cuda} == {"forward", "train"}
    assert {cell.width for cell in cuda} == {384, 768}


def test_goals_are_printed_with_their_verdicts_and_written_into_a_file(tmp_path, capsys):
    rows = [
        figure("G9", "times faster", 2.6, 2.5, 3.1, "higher"),
        figure("G4", "time", 2.4, 2.3, 1.97, "lower", q1=2.3,
                  q3=2.5),
        figure("G8", "peak", None, 0.35, 0.21, "lower"),
        figure("G13", "breaks", 0.0, 0, 0, "lower"),
    ]  # fmt: skip
    entry = {"extra_info": {"rows": [dataclasses.asdict(row) for row in rows]}}
    path, page = tmp_path / "goals.json", tmp_path / "page.md"
    path.write_text(json.dumps({"benchmarks": [entry]}))
    page.write_text("before\n<!-- goals -->\nold\n<!-- /goals -->\nafter\n")
    assert goals.main([str(path), "--into", str(page)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[7].strip() for line in lines[2:6]] == [
        "minimum missed", "not measured", "minimum met", "target reached",
    ]  # fmt: skip
    text = page.read_text()
    assert text.startswith("before\n<!-- goals -->\n") and text.endswith("-->\nafter\n")
    assert "old" not in text and "2.3 to 2.5" in text and "4 figures: 1 reach the target" in text
    page.write_text("nothing")
    with pytest.raises(UserError, match="needs one line"):
        goals.main([str(path), "--into", str(page)])


def test_a_backbone_is_checked_with_the_layer_that_it_has():
    own = {"mechanism": "dydila", "resolution": 256, "width": 768}
    layer, backbone = (Case(kind=kind, **own) for kind in ("layer", "backbone"))
    assert worker.layer_options(layer) == {}
    assert worker.layer_options(backbone) == {
        "n_projectors": 7, "n_kernel_factors": 21, "n_differential_factors": 21, "num_heads": 12,
    }  # fmt: skip
    assert layer.check_key != backbone.check_key


def test_layers_of_a_mixture_are_those_of_its_parts():
    options = (("sana.qk_norm", True),)
    cells = table(Request(mechanisms=(("sana*3+softmax", options),)))
    layers = {(c.mechanism, c.options) for c in cells if c.kind in ("layer", "count", "peers")}
    assert layers == {("sana", (("qk_norm", True),)), ("softmax", ())}
    whole = [cell for cell in cells if cell.kind == "backbone"]
    assert {cell.mechanism for cell in whole} == {"sana*3+softmax"}
    assert whole[0].label == "sana*3+softmax[sana.qk_norm=True]"
    small = dataclasses.replace(whole[0], width=96, resolution=64)
    model = worker.build(small)
    assert [b.attention.name for b in model.blocks] == ["sana", "sana", "sana", "softmax"]
    assert model.blocks[0].attention.config.qk_norm
    assert worker.layer_options(small, "sana") == {"qk_norm": True, "num_heads": 3}
    check = worker.check_layers(small)
    assert check["output"] <= check["allowed output"] and worker.subject(small)[1]() is not None
    with pytest.raises(UserError, match=r"block 3 of 'sana\*3\+softmxa': unknown attention"):
        Request(mechanisms=(("sana*3+softmxa", ()),))
    with pytest.raises(UserError, match="has no 'lit'"):
        Request(mechanisms=(("sana*3+softmax", (("lit.eps", 1),)),))


def test_flas_recurrence_gets_its_own_arguments(monkeypatch):
    def naive_recurrent_gla(q, k, v, gk, initial_state=None, output_final_state=False):
        operands = (
            rearrange(z, "b n h d -> b h n d") for z in (q * q.shape[-1] ** -0.5, k, v, gk)
        )
        return rearrange(gated_linear_attention(*operands), "b h n d -> b n h d"), None

    module = types.SimpleNamespace(naive_recurrent_gla=naive_recurrent_gla)
    kernels = types.SimpleNamespace(chunk_gla=None, fused_recurrent_gla=None)  # need a GPU
    found = {"fla": module, "fla.ops": module, "fla.ops.gla": kernels, "fla.ops.gla.naive": module}
    for name, fake in found.items():
        monkeypatch.setitem(sys.modules, name, fake)
    ours, case = build_scrambled("gated", 96), Case(kind="peers", mechanism="gated", width=96)
    (name,) = (name for name in PEERS["gated"] if "naive" in name)
    assert worker.peer_steps(case, ours, [name])[1]["peer_errors"][name] < 1e-5
    with torch.no_grad():
        for direction in ("forward", "columns-backward", "four"):
            ours = build_scrambled("gated", 96, direction=direction)
            found, expected = (
                layer(tokens((4, 6), dim=96), (4, 6))
                for layer in (PEERS["gated"][name](ours), ours)
            )
            torch.testing.assert_close(found, expected)
            assert ours.layer.config.impl == "auto"  # it is timed as it would be without peers


def test_runs_of_one_machine_are_joined(quick, tmp_path):
    report = json.loads(quick[0].read_text())
    kept, rest = report["benchmarks"][:5], report["benchmarks"][5:]
    lost = [{"name": b["name"], "state": "timeout", "reason": "the time was up"} for b in rest]
    lost.append({"name": "never", "state": "error", "reason": "wrong"})
    first = report | {"benchmarks": kept, "cells_not_measured": lost}
    again = json.loads(json.dumps(kept[0]))
    again["extra_info"]["load"] = 77.0
    second = report | {"benchmarks": [*rest, again], "cells_not_measured": []}
    paths = [tmp_path / name for name in ("a.json", "b.json", "small.json")]
    for path, one in zip(paths, (first, second), strict=False):
        path.write_text(json.dumps(one))
    assert results.main([str(paths[0]), str(paths[1]), "--compact", str(paths[2])]) == 0
    small = results.read_report(paths[2])
    names = [b["name"] for b in report["benchmarks"]]
    assert sorted(b["name"] for b in small["benchmarks"]) == sorted(names)
    assert [cell["name"] for cell in small["cells_not_measured"]] == ["never"]
    loads = [b["extra_info"]["load"] for b in small["benchmarks"]]
    assert loads.count(77.0) == 1
    for entry in second["benchmarks"]:
        entry["extra_info"]["commit"] = "another"
    paths[1].write_text(json.dumps(second))
    with pytest.raises(UserError, match="commit another"):
        results.main([str(paths[0]), str(paths[1]), "--compact", str(paths[2])])


def test_measuring_some_goals_again_keeps_the_others(tmp_path, capsys):
    path = tmp_path / "goals.json"
    old = [figure(g, g, 1.0, 2.0, 1.0, "lower") for g in ("G14", "G5")]
    entries = [{"extra_info": {"rows": [dataclasses.asdict(row)]}} for row in old]
    path.write_text(
        json.dumps({"benchmarks": entries, "common": {"commit": "abc123", "device_name": "Z80"}})
    )
    assert goals.main(["--only", "G14", "--save", str(path)]) == 0
    rows = figures_of(results.read_report(path))
    assert [row.goal for row in rows] == ["G5"] + ["G14"] * (len(rows) - 1) and len(rows) > 2
    assert rows[0].note == "measured at commit abc123 on Z80" and "commit" not in rows[1].note
    assert goals.main([str(path)]) == 0
    assert "abc123" in capsys.readouterr().out
    for arguments, said in (
        (["--only", "U2"], "U2 is a goal of --device cuda"), (["--only", ","], "names none"),
        ([str(path), "--only", "G14"], "leave --only and --device out"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            goals.main(arguments)
    with pytest.raises(UserError, match="device 'cpu'; name another file"):
        goals.main(["--only", "U2", "--device", "cuda", "--save", str(path)])


@pytest.mark.parametrize("name", ["goals.json", "goals-gpu.json"])
def test_the_committed_goals_are_what_the_pages_show(name):
    """python -m bench.goals FILE --into docs/goals.md writes it."""
    report = results.read_report(ROOT / "docs" / "plots" / name)
    text = goals.as_markdown(figures_of(report), results.source_of(report))
    assert text in (ROOT / "docs" / "goals.md").read_text()
    for page in ("README.md", "docs/performance.md"):  # each table has one home
        assert "<!-- goals" not in (ROOT / page).read_text(), page
    assert (ROOT / "docs" / "plots" / name).stat().st_size < 100 * 2**10


def test_the_committed_gpu_run_is_small_and_is_what_its_page_shows():
    path = ROOT / "docs" / "plots" / "gpu.json"
    assert path.stat().st_size < 200 * 2**10
    report = results.read_report(path)
    assert plot.where(report) in (ROOT / "docs" / "gpu-measurements.md").read_text()
    assert {"layer", "backbone", "peers", "count"} <= set(results.frame(report)["kind"])


def test_the_pages_commands_run(quick, tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / "read-the-results.md").read_text()
    block = text[text.index("## A benchmark") :].split("```")[1]
    measure, draw, advise, judge = (shlex.split(line) for line in block.splitlines()[1:])
    # ``quick`` is such a run, of few cases; drawing and measuring goals have tests of their own.
    assert measure[:3] == ["pytest", "bench/", "--benchmark-json"]
    shutil.copy(quick[0], tmp_path / measure[3])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plot, "draw", lambda *_, **__: [])
    assert draw[:2] == ["python", "bench/plot.py"] and plot.main(draw[2:]) == 0
    assert advise[:3] == ["python", "-m", "bench.recommend"]
    assert recommend.main(advise[3:]) == 0
    assert judge == ["python", "-m", "bench.goals"] and not capsys.readouterr().err


def test_exponents_crossovers_and_fronts():
    sizes = [256.0, 1024.0, 4096.0, 16384.0]
    linear = [(n, 3 * n) for n in sizes]
    quadratic = [(n, n**2 / 1000) for n in sizes]
    assert fits.exponent(linear) == pytest.approx(1) and fits.exponent(linear[:1]) is None
    assert fits.exponent(quadratic, least=1024) == pytest.approx(2)
    x, y = advised.crossover(linear, quadratic)
    assert x == pytest.approx(3000) and y == pytest.approx(9000)
    assert advised.crossover(quadratic, linear) is None
    assert advised.value_at(linear, 1024) == (3072, True)
    value, is_measured = advised.value_at(quadratic, 65536)
    assert value == pytest.approx(65536**2 / 1000) and not is_measured
    assert advised.value_at(linear[:1], 512) is None
    bent = [(256, 14), (4096, 22), (16384, 63)]  # 16384 is nearer to 2304, and on the other side
    assert advised.value_at(bent, 2304)[0] == pytest.approx(22 * (9 / 16) ** math.log(22 / 14, 16))
    assert advised.value_at(bent, 8192)[0] == pytest.approx((22 * 63) ** 0.5)
    assert advised.value_at(bent, 65536)[0] == pytest.approx(63**2 / 22)
    ones = [(x, 1.0) for x in (1, 2, 4, 8)]
    assert advised.crossover([(1, 2), (2, 0.5), (4, 2), (8, 0.5)], ones)[0] == pytest.approx(
        32**0.5
    )
    assert advised.crossover([(1, 2), (2, 0.5), (4, 0.5), (8, 2)], ones) is None
    points = {"a": (1.0, 3.0), "b": (2.0, 2.0), "c": (2.0, 4.0), "d": (2.0, 2.0)}
    assert advised.pareto(points) == ["a", "b", "d"]


def test_reading_what_is_no_report_is_a_one_line_error(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        results.read_report(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(UserError, match="no benchmarks"):
        results.read_report(tmp_path / "bad.json")
    (tmp_path / "empty.json").write_text('{"benchmarks": [], "machine_info": {}}')
    with pytest.raises(UserError, match="holds no goals"):
        goals.main([str(tmp_path / "empty.json")])
    with pytest.raises(UserError, match="figures of goals and no cases"):
        recommend.main([str(ROOT / "docs" / "plots" / "goals.json")])
