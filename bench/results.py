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
from bench.timing import quartiles
from recipes.lab.console import DONE, UserError, run_script
from recipes.lab.files import read_json, require_writable, write_json

Fields = dict[str, tuple[type, ...]]
_NUMBER, _TEXT = (int, float), (str,)
_OF_ALL: Fields = {
    "id": _TEXT, "kind": _TEXT, "mechanism": _TEXT, "label": _TEXT, "mode": _TEXT,
    "dtype": _TEXT, "resolution": (int,), "tokens": (int,), "width": (int,),
}  # fmt: skip
_MEASURED: Fields = dict.fromkeys(
    ("batch", "peak_memory", "allocated", "parameter_memory", "parameters"), _NUMBER
)
_COUNTED: Fields = dict.fromkeys(
    ("macs", "macs_training", "parameters", "active_parameters"), _NUMBER
)
_OF_KIND: dict[Any, Fields] = {
    "layer": _MEASURED,
    "backbone": _MEASURED,
    "peers": {**_MEASURED, "ratios": (dict,), "peers_missing": (dict,)},
    "count": {**_COUNTED, "macs_paper": (*_NUMBER, type(None))},
}
_GOAL: Fields = {
    **dict.fromkeys(("goal", "what", "better", "note"), _TEXT),
    **dict.fromkeys(("value", "minimum", "target", "q1", "q3"), (*_NUMBER, type(None))),
}
# Of files from before 2026-11-26.
_OLD_WORDS = {"owed": "minimum", "aim": "target", "aim reached": "target reached"}
_MISSED: Fields = {"name": _TEXT, "state": _TEXT, "reason": _TEXT}
_SPREAD: Fields = dict.fromkeys(("median", "q1", "q3"), _NUMBER)


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
        usual = report.pop("usual", None)
        if usual is not None:
            _require(usual, "usual", {})
        for i, entry in enumerate(report["benchmarks"]):
            _check_entry(entry, f"benchmarks[{i}]", usual)
        for part in ("machine_info", "common"):
            _require(report.setdefault(part, {}), part, {})
        info = report["machine_info"].setdefault("attnzoo", {})
        _require(info, "machine_info.attnzoo", {})
        for part, values in (("peaks", _NUMBER), ("versions", _TEXT)):
            found = info.setdefault(part, {})
            _require(found, part, dict.fromkeys(found, values) if type(found) is dict else {})
        for i, missed in enumerate(report.setdefault("cells_not_measured", [])):
            _require(missed, f"cells_not_measured[{i}]", _MISSED)
        if not isinstance(report.setdefault("datetime", ""), str):
            raise _Foreign("datetime is no text")
    except (_Foreign, TypeError) as error:
        raise UserError(f"{path} is no JSON file of the suite, or damaged: {error}") from error
    return report


class _Foreign(Exception):
    """Something that the suite does not write."""


def _require(value: Any, place: str, fields: Fields) -> None:
    """Raises _Foreign unless ``value`` is an object with these fields, numbers finite."""
    if not isinstance(value, dict):
        raise _Foreign(f"{place} is no object")
    for name, kinds in fields.items():
        found = value.get(name, _Foreign)
        is_number = isinstance(found, int | float) and not isinstance(found, bool)
        if is_number and not math.isfinite(found):
            raise _Foreign(f"{place} has {name} {found}")
        if type(found) not in kinds:
            what = "no" if found is _Foreign else f"a {type(found).__name__} as"
            raise _Foreign(f"{place} has {what} {name}")


def _check_entry(entry: Any, place: str, usual: dict[str, Any] | None) -> None:
    """Checks what the tables and pictures read, and undoes ``compact``."""
    _require(entry, place, {"extra_info": (dict,)})
    info = entry["extra_info"] = {**(usual or {}), **entry["extra_info"]}
    for name, kinds in (("device_name", _TEXT), ("commit", _TEXT), ("best_peer", _TEXT)):
        if name in info:
            _require(info, place, {name: kinds})
    if "rows" in info:
        _check_rows(info["rows"], place)
    if "id" not in info or ("rows" in info and "stats" not in entry):
        return  # of other tests, or the figures of a goal alone
    _require(info, place, {**_OF_ALL, **_OF_KIND.get(info.get("kind"), {})})
    _require(entry, place, {"name": _TEXT, "stats": (dict,)})
    stats, data = entry["stats"], entry["stats"].get("data")
    if data:
        numbers = {str(i): value for i, value in enumerate(data)}
        _require(numbers, f"{place}.data", dict.fromkeys(numbers, _NUMBER))
    _require(stats, f"{place}.stats", {} if data else {"median": _NUMBER})
    for name in ("gflops", "share_of_peak", "q1", "q3", "rounds"):
        for found in (info, stats):
            if name in found:
                _require(found, place, {name: _NUMBER})
    if "device_seconds" in info:
        _require(info["device_seconds"], place, {"median": _NUMBER})
    for part in ("ratios", "device_ratios"):
        for name, ratio in dict(info.get(part, {})).items():
            _require(ratio, f"{place}.{part}.{name}", _SPREAD)
    if usual is not None:
        entry["name"] += f"[{info['id']}]"


def _check_rows(rows: Any, place: str) -> None:
    for i, row in enumerate(rows if isinstance(rows, list) else [rows]):
        for old, new in _OLD_WORDS.items():
            if isinstance(row, dict) and old in row:
                row[new] = row.pop(old)
        _require(row, f"{place}.rows[{i}]", _GOAL)
        if row.get("verdict") in _OLD_WORDS:
            row["verdict"] = _OLD_WORDS[row["verdict"]]
        if row["goal"] not in GOALS or row["better"] not in ("higher", "lower"):
            raise _Foreign(f"{place}.rows[{i}] is of no goal of the suite")


def read_cases(path: Path) -> dict[str, Any]:
    """``read_report`` of a file that is to hold times.

    Raises:
        UserError: As there; or it holds the figures of goals alone.
    """
    report = read_report(path)
    entries = report["benchmarks"]
    if entries and not any("stats" in entry for entry in entries):
        raise UserError(
            f"{path} holds figures of goals and no cases; python -m bench.goals {path} shows them"
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
    names = [report.get("common", {}).get("device_name")]
    # Counts are made on a CPU, whatever the device of the run.
    names += [
        entry["extra_info"].get("device_name")
        for entry in report["benchmarks"]
        if entry["extra_info"].get("kind") != "count"
    ]
    return next((str(name) for name in names if name), "an unknown device")


def frame(report: dict[str, Any]) -> pd.DataFrame:
    """One row per measured case: its extra_info, and seconds, seconds_q1 and seconds_q3.

    "device_time" is of a replayed CUDA graph, "time" that where it is known, otherwise "seconds".
    """
    rows = []
    for entry in report["benchmarks"]:
        info, stats = entry["extra_info"], entry.get("stats")
        if "id" not in info or stats is None:
            continue
        low, middle, high = _quartiles(stats)
        row = {**info, "seconds": middle, "seconds_q1": low, "seconds_q3": high, "time": middle}
        if "device_seconds" in info:
            row["device_time"] = row["time"] = info["device_seconds"]["median"]
        for key, column in (("ratios", "ratio_to_softmax"),
                            ("device_ratios", "device_ratio_to_softmax")):  # fmt: skip
            if "softmax" in info.get(key, {}) and info["kind"] == "layer":
                row[column] = info[key]["softmax"]["median"]
        rows.append(row)
    if not rows:
        return pd.DataFrame({name: [] for name in ("id", "kind", "mechanism", "label", "mode")})
    return pd.DataFrame(rows)


def subset(cases: pd.DataFrame, kind: str, mode: str | None = None, **equal: Any) -> pd.DataFrame:
    """The rows of a kind and mode whose columns equal the values given."""
    wanted = {"kind": kind, **({} if mode is None else {"mode": mode}), **equal}
    matches = [
        all(row[column] == value for column, value in wanted.items())
        for row in cases.to_dict("records")
    ]
    return cases.loc[matches]


def families(cases: pd.DataFrame, kind: str) -> list[dict[str, Any]]:
    """The (mode, width, dtype) that occur, the fullest first: each is a picture of its own."""
    keys = ("mode", "width", "dtype")
    counts = collections.Counter(
        tuple(row[key] for key in keys) for row in cases.to_dict("records") if row["kind"] == kind
    )
    return [dict(zip(keys, values, strict=True)) for values, _ in counts.most_common()]


def compact(report: dict[str, Any]) -> dict[str, Any]:
    """The report without what pictures and tables do not need, as ``read_report`` takes it."""
    shared = ("versions", "commit", "allocator", "memory_method", "device_name", "threads")
    common: dict[str, Any] = dict(report.get("common", {}))
    benchmarks = []
    for entry in report["benchmarks"]:
        found = entry["extra_info"]
        if found.get("kind") != "count":  # which is made on a CPU in every run
            common = {key: found[key] for key in shared if key in found} | common
        dropped = ("macs_parts", "check", "timer", "cell_seconds", "cell_cpu_seconds", *shared)
        # A goal's verdict is of the figure as it was measured.
        info = {
            key: value if key == "rows" else rounded(value)
            for key, value in found.items()
            if key not in dropped
        }
        kept: dict[str, Any] = {"extra_info": info}
        if "name" in entry:
            kept["name"] = entry["name"]
        if "stats" in entry:  # bench.goals --save writes figures alone
            low, middle, high = _quartiles(entry["stats"])
            stats = {"q1": low, "median": middle, "q3": high}
            stats |= {key: v for key, v in entry["stats"].items() if key == "rounds"}
            kept["stats"] = rounded(stats)
        benchmarks.append(kept)
    usual = _usual([entry["extra_info"] for entry in benchmarks])
    for entry in benchmarks:
        info = entry["extra_info"]
        if "name" in entry:
            entry["name"] = entry["name"].removesuffix(f"[{info.get('id')}]")
        entry["extra_info"] = {k: v for k, v in info.items() if k not in usual or v != usual[k]}
    also = ("datetime", "cells_not_measured")
    return {
        "machine_info": {"attnzoo": report["machine_info"].get("attnzoo", {})},
        "common": common,
        "usual": usual,
        **{key: report[key] for key in also if key in report},
        "benchmarks": benchmarks,
    }


def _quartiles(stats: dict[str, Any]) -> tuple[float, float, float]:
    if data := stats.get("data"):
        return quartiles(data)
    return stats.get("q1", stats["median"]), stats["median"], stats.get("q3", stats["median"])


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
        UserError: They are of different devices or commits, and so cannot stand in one table.
    """
    sources = {source_of({**report, "datetime": ""}) for report in reports}
    if len(sources) > 1:
        told = "; ".join(sorted(sources))
        raise UserError(f"these are runs of different devices, versions or commits: {told}")
    measured = {entry["name"]: entry for report in reports for entry in report["benchmarks"]}
    missed = {case["name"]: case for r in reports for case in r["cells_not_measured"]}
    return {
        **reports[-1],
        "benchmarks": list(measured.values()),
        "cells_not_measured": [case for name, case in missed.items() if name not in measured],
    }


def rounded(value: Any) -> Any:
    """The same JSON value with floats of six digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


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
