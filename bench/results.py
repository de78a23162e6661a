"""JSON files of the suite, read into tables; made small enough to be committed."""

from __future__ import annotations

import argparse
import collections
import json
from pathlib import Path
from typing import Any

import pandas as pd

from bench.timing import quartiles
from recipes.console import DONE, UserError, run_script


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
    return report


def frame(report: dict[str, Any]) -> pd.DataFrame:
    """One row per measured cell: its extra_info, and seconds, seconds_q1 and seconds_q3."""
    rows = []
    for entry in report["benchmarks"]:
        info, stats = entry["extra_info"], entry["stats"]
        if "id" not in info:
            continue
        data = stats.get("data") or [stats["q1"], stats["median"], stats["q3"]]
        low, middle, high = quartiles(data)
        row = {**info, "seconds": middle, "seconds_q1": low, "seconds_q3": high}
        ratios = info.get("ratios", {})
        if "softmax" in ratios and info["kind"] == "layer":
            row["ratio_to_softmax"] = ratios["softmax"]["median"]
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
    """The same report without what pictures and tables do not need; about a fifth of the size."""
    shared = ("versions", "commit", "allocator", "memory_method", "macs_parts", "device_name")
    common: dict[str, Any] = {}
    benchmarks = []
    for entry in report["benchmarks"]:
        info = {}
        for key, value in entry["extra_info"].items():
            if key in shared and key != "macs_parts":
                common.setdefault(key, value)
            elif key != "macs_parts":
                info[key] = _rounded(value)
        low, middle, high = quartiles(entry["stats"].get("data") or [entry["stats"]["median"]])
        stats = {"q1": low, "median": middle, "q3": high, "rounds": entry["stats"]["rounds"]}
        benchmarks.append({"name": entry["name"], "extra_info": info, "stats": _rounded(stats)})
    kept = ("datetime", "cells_requested", "cells_not_measured")
    return {
        "machine_info": {"attnzoo": report["machine_info"].get("attnzoo", {})},
        "common": common,
        **{key: report[key] for key in kept if key in report},
        "benchmarks": benchmarks,
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def main(arguments: list[str]) -> int:
    """Writes a compact copy."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.results", description="makes a small copy of a JSON of the suite"
    )
    parser.add_argument("report", type=Path)
    parser.add_argument("--compact", type=Path, required=True, help="JSON to write")
    options = parser.parse_args(arguments)
    small = compact(read_report(options.report))
    options.compact.parent.mkdir(parents=True, exist_ok=True)
    options.compact.write_text(json.dumps(small, separators=(",", ":")))
    print(f"{options.compact}: {options.compact.stat().st_size / 1024:.0f} KiB")
    return DONE


if __name__ == "__main__":
    run_script(main)
