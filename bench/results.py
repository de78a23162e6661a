"""JSON files of the suite, read into tables; made small enough to be committed."""

from __future__ import annotations

import argparse
import collections
import json
import math
from pathlib import Path
from typing import Any

import pandas as pd

from bench.thresholds import GOALS
from bench.timing import spread
from recipes.lab.console import DONE, UserError, argument, run_script
from recipes.lab.files import read_json, require_writable, write_json

# What the suite writes, as far as tables and pictures read it; ``require_shape`` says how.
NUMBER, _MAYBE, TEXT = (int, float), (int, float, type(None)), (str,)
_SPREAD = dict.fromkeys(("median", "q1", "q3"), NUMBER)
_REPORT = {
    "benchmarks": [{"extra_info": {}}],
    "machine_info?": {"attnzoo?": {"peaks?": {"*": NUMBER}, "versions?": {"*": TEXT}}},
    "common?": {},
    "usual?": {},
    "cells_not_measured?": [dict.fromkeys(("name", "state", "reason"), TEXT)],
    "datetime?": TEXT,
}
_ANY_CASE = {
    **dict.fromkeys(("device_name?", "commit?", "best_peer?"), TEXT),
    **dict.fromkeys(("gflops?", "share_of_peak?"), NUMBER),
    "device_seconds?": {"median": NUMBER},
    "ratios?": {"*": _SPREAD},
    "device_ratios?": {"*": _SPREAD},
    "rows?": [
        dict.fromkeys(("goal", "what", "better", "note"), TEXT)
        | dict.fromkeys(("value", "minimum", "target", "q1", "q3"), _MAYBE)
    ],
}
_NAMED_CASE = {
    **dict.fromkeys(("id", "kind", "mechanism", "label", "mode", "dtype"), TEXT),
    **dict.fromkeys(("resolution", "tokens", "width"), (int,)),
}
_MEASURED: dict[str, Any] = dict.fromkeys(
    ("batch", "peak_memory", "allocated", "parameter_memory", "parameters"), NUMBER
)
_COUNTED = dict.fromkeys(("macs", "macs_training", "parameters", "active_parameters"), NUMBER)
_OF_KIND: dict[Any, dict[str, Any]] = {
    "layer": _MEASURED,
    "backbone": _MEASURED,
    "peers": {**_MEASURED, "ratios": {}, "peers_missing": {}},
    "count": {**_COUNTED, "macs_paper": _MAYBE},
}
_STATS = {
    "median": NUMBER, "data?": [NUMBER], **dict.fromkeys(("q1?", "q3?", "rounds?"), NUMBER),
}  # fmt: skip
# Of files from before 2026-11-26.
_OLD_WORDS = {"owed": "minimum", "aim": "target", "aim reached": "target reached",
              "met": "minimum met", "NOT MET": "minimum missed"}  # fmt: skip

_TIMES = ("seconds", "seconds_q1", "seconds_q3", "time")


class Foreign(Exception):
    """Something that the suite does not write."""


def require_shape(value: Any, shape: Any, place: str = "it") -> None:
    """Raises ``Foreign`` unless a value has a shape, numbers finite.

    A shape is a tuple of types, a list of the shape of all items, or the shapes of an object's
    fields by name; a name with "?" may be absent, and "*" stands for all.
    """
    if isinstance(shape, tuple):
        if type(value) not in shape or (type(value) is float and not math.isfinite(value)):
            raise Foreign(f"{place} is {value!r:.40}")
    elif not isinstance(value, type(shape)):
        raise Foreign(f"{place} is a {type(value).__name__}")
    elif isinstance(shape, list):
        for i, item in enumerate(value):
            require_shape(item, shape[0], f"{place}[{i}]")
    else:
        for name, inner in shape.items():
            if name.endswith("?") and name[:-1] not in value:
                continue
            for key in value if name == "*" else [name.removesuffix("?")]:
                if key not in value:
                    raise Foreign(f"{place} has no {key}")
                require_shape(value[key], inner, f"{place}.{key}")


def read_report(path: Path) -> dict[str, Any]:
    """Reads a JSON file of the suite.

    Raises:
        UserError: There is no such file, or it is not one of the suite.
    """
    if not path.exists():
        raise UserError(
            f"{path} does not exist; make it with pytest bench/ --benchmark-json {path}"
        )
    report = read_json(path, "JSON of the suite")
    if not isinstance(report, dict) or not isinstance(report.get("benchmarks"), list):
        raise UserError(f"{path} is no JSON file of the suite: it has no benchmarks")
    try:
        require_shape(report, _REPORT)
        absent = {"machine_info": {}, "common": {}, "cells_not_measured": [], "datetime": ""}
        report = absent | report
        info = report["machine_info"].get("attnzoo", {})
        report["machine_info"]["attnzoo"] = {"peaks": {}, "versions": {}} | info
        usual = report.pop("usual", None)
        for i, entry in enumerate(report["benchmarks"]):
            entry["extra_info"] = {**(usual or {}), **entry["extra_info"]}
            _check_entry(entry, f"benchmarks[{i}]")
            if usual is not None and "name" in entry and "id" in entry["extra_info"]:
                entry["name"] += f"[{entry['extra_info']['id']}]"
    except (Foreign, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no JSON file of the suite, or damaged: {error}") from error
    return report


def _check_entry(entry: dict[str, Any], place: str) -> None:
    """Checks what the tables and pictures read."""
    info = entry["extra_info"]
    for row in info.get("rows", ()):
        for old, new in _OLD_WORDS.items():
            if old in row:
                row[new] = row.pop(old)
        if row.get("verdict") in _OLD_WORDS:
            row["verdict"] = _OLD_WORDS[row["verdict"]]
    require_shape(info, _ANY_CASE, place)
    for row in info.get("rows", ()):
        if row["goal"] not in GOALS or row["better"] not in ("higher", "lower"):
            raise Foreign(f"{place} has a row of no goal of the suite")
    # Others are of other tests, or the figures of a goal alone.
    if "id" in info and ("stats" in entry or "rows" not in info):
        require_shape(info, _NAMED_CASE | _OF_KIND.get(info.get("kind"), {}), place)
        require_shape(entry, {"name": TEXT, "stats": _STATS}, place)


def read_cases(path: Path) -> dict[str, Any]:
    """``read_report`` of a file that is to hold times.

    Raises:
        UserError: As there; or it holds the figures of goals alone.
    """
    report = read_report(path)
    entries = report["benchmarks"]
    if entries and not any("stats" in entry for entry in entries):
        raise UserError(
            f"{path} holds figures of goals and no cases; "
            f"python -m bench.goals {argument(path)} shows them"
        )
    if entries and not any("id" in entry["extra_info"] for entry in entries):
        raise UserError(f"{path} is a file of pytest-benchmark, but none of attnzoo's suite")
    return report


def source_of(report: dict[str, Any]) -> str:
    """The device, torch, commit and day of a run, as far as they are known."""
    known = common_of(report)
    versions = report["machine_info"]["attnzoo"].get("versions") or known.get("versions") or {}
    parts = {"": device_of(report), "torch ": versions.get("torch"),
             "commit ": known.get("commit"), "made ": report.get("datetime", "")[:10]}  # fmt: skip
    return ", ".join(f"{name}{value}" for name, value in parts.items() if value)


def common_of(report: dict[str, Any]) -> dict[str, Any]:
    """What all cases of a run share; a compact report holds it once."""
    first = report["benchmarks"][0]["extra_info"] if report["benchmarks"] else {}
    return {**first, **report.get("common", {})}


def device_of(report: dict[str, Any]) -> str:
    """The name of what was measured, such as "NVIDIA H200"."""
    infos = [entry["extra_info"] for entry in report["benchmarks"]]
    # Counts are made on a CPU, whatever the device of the run.
    infos = [report.get("common", {}), *(info for info in infos if info.get("kind") != "count")]
    names = (info.get("device_name") for info in infos)
    return next((str(name) for name in names if name), "an unknown device")


def machines_differ(one: dict[str, Any], other: dict[str, Any]) -> str:
    """Where the machines of two runs differ in what moves times, in words; "" if nowhere."""
    known: list[dict[str, Any]] = []
    for report in (one, other):
        info, common = report["machine_info"], common_of(report)
        own = {"threads": common.get("threads")} | info.get("attnzoo", {})
        versions = own.get("versions") or common.get("versions") or {}
        processors, system = info.get("cpu", {}).get("count"), info.get("system")
        known.append({"device": device_of(report), "processors": processors, "system": system,
                      "threads": own["threads"], **versions})  # fmt: skip
    pairs = ((name, *(z.get(name) for z in known)) for name in {**known[0], **known[1]})
    # A compact copy does not say everything.
    return ", ".join(f"{n} {a} and {b}" for n, a, b in pairs if a != b and None not in (a, b))


def frame(report: dict[str, Any]) -> pd.DataFrame:
    """One row per measured case: its extra_info, and seconds, seconds_q1 and seconds_q3.

    "device_time" is of a replayed CUDA graph, "time" that where it is known, otherwise "seconds";
    "gflops" and "share_of_peak" are of "time".
    "over_softmax" is the ratio of times; ``is_raced`` where both were timed in turn.
    """
    rows = []
    for entry in report["benchmarks"]:
        info, stats = entry["extra_info"], entry.get("stats")
        if "id" not in info or stats is None:
            continue
        found = _quartiles(stats)
        row = {**info, "seconds": found["median"], "time": found["median"]}
        row |= {"seconds_q1": found["q1"], "seconds_q3": found["q3"]}
        if "device_seconds" in info:
            row["device_time"] = row["time"] = info["device_seconds"]["median"]
        for key, column in (("ratios", "ratio_to_softmax"),
                            ("device_ratios", "device_ratio_to_softmax")):  # fmt: skip
            if "softmax" in info.get(key, {}) and info["kind"] == "layer":
                row[column] = row["over_softmax"] = info[key]["softmax"]["median"]
        rows.append(row)
    found: Any = pd.DataFrame(rows, columns=None if rows else [*_NAMED_CASE, *_TIMES])
    for column in {"gflops", "share_of_peak"} & {*found}:  # which are stored as launched
        found[column] *= found["seconds"] / found["time"]
    size = ["kind", "mode", "width", "dtype", "resolution"]
    softmax = found[found["label"] == "softmax"].drop_duplicates(size, keep="last")
    theirs = found[size].merge(softmax[[*size, "time"]], on=size, how="left")["time"]
    raced: Any = found.get("over_softmax", pd.Series(math.nan, found.index))
    over = raced.fillna(found["time"] / theirs.to_numpy())
    return found.assign(is_raced=raced.notna() | (found["label"] == "softmax"), over_softmax=over)


def subset(cases: pd.DataFrame, kind: str, **equal: Any) -> pd.DataFrame:
    """The rows of a kind whose columns equal the values given."""
    wanted = pd.Series({"kind": kind, **equal})
    return cases.loc[(cases[list(wanted.index)] == wanted).all(axis=1)]


def families(cases: pd.DataFrame, kind: str) -> list[dict[str, Any]]:
    """The (mode, width, dtype) that occur, the fullest first: each is a picture of its own."""
    sizes: Any = subset(cases, kind).groupby(["mode", "width", "dtype"], sort=False).size()
    fullest = sizes.sort_values(ascending=False, kind="stable").reset_index()
    return fullest[["mode", "width", "dtype"]].to_dict("records")


_SHARED = ("versions", "commit", "allocator", "memory_method", "device_name", "threads")
_DROPPED = ("macs_parts", "check", "timer", "cell_seconds", "cell_cpu_seconds", *_SHARED)


def compact(report: dict[str, Any]) -> dict[str, Any]:
    """The report without what pictures and tables do not need, as ``read_report`` takes it."""
    common: dict[str, Any] = dict(report.get("common", {}))
    benchmarks = []
    for entry in report["benchmarks"]:
        found = entry["extra_info"]
        if found.get("kind") != "count":  # which is made on a CPU in every run
            common = {key: found[key] for key in _SHARED if key in found} | common
        # A goal's verdict is of the figure as it was measured.
        info = {k: v if k == "rows" else rounded(v)
                for k, v in found.items() if k not in _DROPPED}  # fmt: skip
        small: dict[str, Any] = {"extra_info": info}
        if "name" in entry:
            small["name"] = entry["name"].removesuffix(f"[{found.get('id')}]")
        if "stats" in entry:  # bench.goals --save writes figures alone
            stats = _quartiles(entry["stats"])
            stats |= {key: v for key, v in entry["stats"].items() if key == "rounds"}
            small["stats"] = rounded(stats)
        benchmarks.append(small)
    usual = _usual([entry["extra_info"] for entry in benchmarks])
    for small in benchmarks:
        info = small["extra_info"]
        small["extra_info"] = {k: v for k, v in info.items() if k not in usual or v != usual[k]}
    return {
        "machine_info": {"attnzoo": report["machine_info"].get("attnzoo", {})},
        "common": common,
        "usual": usual,
        **{key: report[key] for key in ("datetime", "cells_not_measured") if key in report},
        "benchmarks": benchmarks,
    }


def _quartiles(stats: dict[str, Any]) -> dict[str, float]:
    if data := stats.get("data"):
        return spread(data)
    return {key: stats.get(key, stats["median"]) for key in ("q1", "median", "q3")}


def _usual(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """The most frequent value of each key that all cases have; ``read_report`` puts it back."""
    usual = {}
    for key in sorted(set.intersection(*map(set, cases))) if cases else ():
        counts = collections.Counter(json.dumps(case[key]) for case in cases)
        text, times = counts.most_common(1)[0]
        if times > 1:
            usual[key] = json.loads(text)
    return usual


def joined(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """One report of several runs, where a later measurement of a case replaces an earlier one.

    Raises:
        UserError: They are of different machines or commits, and so cannot stand in one table.
    """
    sources = {source_of({**report, "datetime": ""}) for report in reports}
    if len(sources) > 1:
        told = "; ".join(sorted(sources))
        raise UserError(f"these are runs of different devices, versions or commits: {told}")
    for report in reports[1:]:
        if differs := machines_differ(reports[0], report):
            raise UserError(f"these are runs of machines that differ: {differs}")
    measured = {entry["name"]: entry for report in reports for entry in report["benchmarks"]}
    missed = {case["name"]: case for r in reports for case in r["cells_not_measured"]}
    return {
        **reports[-1],
        "benchmarks": list(measured.values()),
        "cells_not_measured": [case for name, case in missed.items() if name not in measured],
    }


def rounded(value: Any) -> Any:
    """The same JSON value with floats of six digits."""
    return json.loads(json.dumps(value), parse_float=lambda text: float(f"{float(text):.6g}"))


def main(arguments: list[str]) -> int:
    """Writes a compact copy."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.results", description="makes a small copy of a JSON of the suite"
    )
    parser.add_argument("reports", type=Path, nargs="+", help="several runs are joined")
    parser.add_argument("--compact", type=Path, required=True, help="JSON to write")
    options = parser.parse_args(arguments)
    require_writable(options.compact)
    small = compact(joined([read_cases(path) for path in options.reports]))
    write_json(options.compact, small, indent=None)
    print(f"{options.compact}: {options.compact.stat().st_size / 1024:.0f} KiB")
    return DONE


if __name__ == "__main__":
    run_script(main)
