"""JSON files of the suite, read into tables; made small enough to be committed."""

from __future__ import annotations

import argparse
import collections
import json
from pathlib import Path
from typing import Any

import pandas as pd

from bench.timing import quartiles
from recipes.lab.console import DONE, UserError, run_script


def read_report(path: Path) -> dict[str, Any]:
    """Reads a JSON file of the suite.

    Raises:
        UserError: There is no such file, or it is not one of the suite.
    """
    try:
        report = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; make it with pytest bench/ --benchmark-json {path}"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no JSON file of the suite: {error}") from error
    if not isinstance(report, dict) or "benchmarks" not in report:
        raise UserError(f"{path} is no JSON file of the suite: it has no benchmarks")
    usual = report.pop("usual", None)
    if usual is not None:  # it is compact
        for entry in report["benchmarks"]:
            info = entry["extra_info"] = {**usual, **entry["extra_info"]}
            if "id" in info and "name" in entry:
                entry["name"] += f"[{info['id']}]"
    return report


def read_cells(path: Path) -> dict[str, Any]:
    """``read_report`` of a file that is to hold times.

    Raises:
        UserError: As there; or it holds the figures of goals alone.
    """
    report = read_report(path)
    if report["benchmarks"] and not any("stats" in entry for entry in report["benchmarks"]):
        raise UserError(
            f"{path} holds figures of goals and no cells; python -m bench.goals {path} shows them"
        )
    return report


def source_of(report: dict[str, Any]) -> str:
    """The device, torch, commit and day of a run, as far as they are known."""
    first = report["benchmarks"][0]["extra_info"] if report["benchmarks"] else {}
    # A compact report holds what all cells share once.
    known = {**first, **report.get("common", {})}
    info = report.get("machine_info", {}).get("attnzoo", {})
    versions = info.get("versions") or known.get("versions")
    parts = {"": device_of(report), "torch ": (versions or {}).get("torch"),
             "commit ": known.get("commit"), "made ": report.get("datetime", "")[:10]}  # fmt: skip
    return ", ".join(f"{name}{value}" for name, value in parts.items() if value)


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
    """One row per measured cell: its extra_info, and seconds, seconds_q1 and seconds_q3.

    "device_time" is of a replayed CUDA graph, "time" that where it is known, otherwise "seconds".
    """
    rows = []
    for entry in report["benchmarks"]:
        info, stats = entry["extra_info"], entry["stats"]
        if "id" not in info:
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


def subset(cells: pd.DataFrame, kind: str, mode: str | None = None, **equal: Any) -> pd.DataFrame:
    """The rows of a kind and mode whose columns equal the values given."""
    wanted = {"kind": kind, **({} if mode is None else {"mode": mode}), **equal}
    matches = [
        all(row[column] == value for column, value in wanted.items())
        for row in cells.to_dict("records")
    ]
    return cells.loc[matches]


def families(cells: pd.DataFrame, kind: str) -> list[dict[str, Any]]:
    """The (mode, width, dtype) that occur, the fullest first: each is a picture of its own."""
    keys = ("mode", "width", "dtype")
    counts = collections.Counter(
        tuple(row[key] for key in keys) for row in cells.to_dict("records") if row["kind"] == kind
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
        info = {key: rounded(value) for key, value in found.items() if key not in dropped}
        low, middle, high = _quartiles(entry["stats"])
        stats = {"q1": low, "median": middle, "q3": high, "rounds": entry["stats"]["rounds"]}
        benchmarks.append({"name": entry["name"], "extra_info": info, "stats": rounded(stats)})
    usual = _usual([entry["extra_info"] for entry in benchmarks])
    for entry in benchmarks:
        info = entry["extra_info"]
        entry["name"] = entry["name"].removesuffix(f"[{info.get('id')}]")
        entry["extra_info"] = {k: v for k, v in info.items() if k not in usual or v != usual[k]}
    kept = ("datetime", "cells_not_measured")
    return {
        "machine_info": {"attnzoo": report["machine_info"].get("attnzoo", {})},
        "common": common,
        "usual": usual,
        **{key: report[key] for key in kept if key in report},
        "benchmarks": benchmarks,
    }


def _quartiles(stats: dict[str, Any]) -> tuple[float, float, float]:
    if data := stats.get("data"):
        return quartiles(data)
    return stats.get("q1", stats["median"]), stats["median"], stats.get("q3", stats["median"])


def _usual(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """The most frequent value of each key that all cells have; ``read_report`` puts it back."""
    usual = {}
    for key in sorted(set.intersection(*map(set, cells))) if cells else ():
        counts = collections.Counter(json.dumps(cell[key]) for cell in cells)
        text, times = counts.most_common(1)[0]
        if times > 1:
            usual[key] = json.loads(text)
    return usual


def joined(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """One report of several runs, where a later measurement of a cell replaces an earlier one.

    Raises:
        UserError: They are of different devices or commits, and so cannot stand in one table.
    """
    sources = {source_of({**report, "datetime": ""}) for report in reports}
    if len(sources) > 1:
        told = "; ".join(sorted(sources))
        raise UserError(f"these are runs of different devices, versions or commits: {told}")
    measured = {entry["name"]: entry for report in reports for entry in report["benchmarks"]}
    missed = {cell["name"]: cell for r in reports for cell in r.get("cells_not_measured", [])}
    return {
        **reports[-1],
        "benchmarks": list(measured.values()),
        "cells_not_measured": [cell for name, cell in missed.items() if name not in measured],
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
    small = compact(joined([read_cells(path) for path in options.reports]))
    options.compact.parent.mkdir(parents=True, exist_ok=True)
    options.compact.write_text(json.dumps(small, separators=(",", ":")))
    print(f"{options.compact}: {options.compact.stat().st_size / 1024:.0f} KiB")
    return DONE


if __name__ == "__main__":
    run_script(main)
