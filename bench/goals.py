"""``python -m bench.goals [out.json]``: the performance goals, with value and spread, met or not.

With a JSON of ``pytest bench/ --full`` it prints what the file holds; without one it measures.
``bench/thresholds.toml`` lists the goals, ``bench/goal_measurements.py`` how each is measured.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pandas as pd

from bench import goal_measurements, machine
from bench.cases import Case, Conditions
from bench.isolate import run_isolated
from bench.options import split
from bench.results import compact, read_report, source_of
from bench.tables import parts_around, put_into
from bench.thresholds import (
    GOALS,
    HEADING,
    VERDICTS,
    GoalFigure,
    chosen_goals,
    figures_of,
    not_measured,
)
from bench.timing import stopwatch_for
from bench.worker import prepare
from recipes.lab.console import DONE, UserError, run_script
from recipes.lab.files import require_writable, write_json
from recipes.lab.pages import markdown_table


def measure_goal(case: Case, conditions: Conditions) -> dict[str, Any]:
    """Measures one goal.

    Returns:
        "rows" (dictionaries of ``GoalFigure``), and "rounds" for pytest-benchmark.
    """
    allocator = prepare(dataclasses.replace(conditions, threads=1))
    found = goal_measurements.measure(case.mechanism, case.device)
    return {
        "rows": [dataclasses.asdict(f) | {"verdict": f.verdict} for f in found.figures],
        "check": found.checks,
        "rounds": found.rounds or [0.0],
        "timer": stopwatch_for(case.device, 1)[1],
        "allocator": allocator,
        **machine.describe(case.device, 1),
    }


def as_markdown(figures: list[GoalFigure], source: str) -> str:
    """Where the figures come from, how many of each goal meet what, and, folded, every figure."""
    found = pd.DataFrame([(f.goal, f.verdict) for f in figures], columns=["goal", "verdict"])
    counts = pd.crosstab(found["goal"], found["verdict"]).reindex(columns=VERDICTS, fill_value=0)
    goals = [[name, GOALS[name].what, *(number or "" for number in counts.loc[name])]
             for name in found["goal"].unique()]  # fmt: skip
    return (
        f"{source}: {summary(figures)}.\n\n"
        f"{markdown_table(['goal', 'what', *VERDICTS], goals, padded=True)}\n\n"
        f"<details>\n<summary>Every figure</summary>\n\n{as_table(figures)}\n\n</details>"
    )


def as_table(figures: list[GoalFigure]) -> str:
    """The figures as a Markdown table."""
    return markdown_table(HEADING, [figure.row for figure in figures], padded=True)


def summary(figures: list[GoalFigure]) -> str:
    """How many of the figures meet what."""
    count = collections.Counter(figure.verdict for figure in figures)
    return (
        f"{len(figures)} figures: {count['target reached']} reach the target, "
        f"{count['minimum met']} meet the minimum, {count['minimum missed']} miss it, "
        f"{count['not measured']} not measured"
    )


def main(arguments: list[str]) -> int:
    """Prints the goals."""
    parser = argparse.ArgumentParser(prog="python -m bench.goals", description=__doc__)
    parser.add_argument(
        "report", nargs="?", type=Path, help="JSON of pytest bench/ --full, or of --save"
    )
    parser.add_argument("--only", default="", help="goals to measure, such as G4,G9")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: cpu)")
    parser.add_argument(
        "--save", type=Path,
        help="JSON to write the goals' figures to; those that --only leaves out stay in it",
    )  # fmt: skip
    parser.add_argument(
        "--into", type=Path, action="append", default=[],
        help="file whose part <!-- goals -->, or <!-- goals-cuda -->, is replaced; repeatable",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.report and (options.only or options.device):
        raise UserError(f"{options.report} holds what was measured: leave --only and --device out")
    if options.only and not split(options.only):
        raise UserError(f"--only {options.only} names none")
    if options.save:
        require_writable(options.save)
    report, device = None, options.device or "cpu"
    if options.report:
        report = read_report(options.report)
        figures = figures_of(report)
        if not figures:
            raise UserError(
                f"{options.report} holds no goals; they are in a run of pytest bench/ --full, "
                f"or measure them with python -m bench.goals"
            )
        device = GOALS[figures[0].goal].device
    part = "goals-cuda" if device == "cuda" else "goals"
    for path in options.into:
        parts_around(path, part)
    if report is None:
        names = chosen_goals(split(options.only), device)
        report = _measure(names, device, options.save, bool(options.only))
    elif options.save:
        write_json(options.save, _goals_alone(report))
    figures = figures_of(report)
    print(f"{as_table(figures)}\n\n{summary(figures)}")
    for path in options.into:
        put_into(path, part, as_markdown(figures, source_of(report)))
    return DONE


def _goals_alone(report: dict[str, Any]) -> dict[str, Any]:
    entries = [entry for entry in report["benchmarks"] if "rows" in entry["extra_info"]]
    missed = [m for m in report["cells_not_measured"] if m["name"].startswith("test_goal[")]
    return compact(report | {"benchmarks": entries, "cells_not_measured": missed})


def _others(save: Path, names: tuple[str, ...], device: str) -> list[dict[str, Any]]:
    """The entries of goals in a file that are not measured now, with commit and device."""
    saved = read_report(save)
    before = saved["machine_info"]["attnzoo"].get("device", device)
    if before != device:
        raise UserError(f"{save} holds goals of device {before!r}; name another file to save "
                        f"those of {device!r} to")  # fmt: skip
    others = []
    for entry in saved["benchmarks"]:
        rows = [row for row in entry["extra_info"].get("rows", []) if row["goal"] not in names]
        if rows:
            origin = {"commit": saved["common"].get("commit", "unknown")}
            if name := saved["common"].get("device_name"):
                origin["device_name"] = name
            others.append({"extra_info": {**origin, **entry["extra_info"], "rows": rows}})
    return others


def _measure(
    names: tuple[str, ...], device: str, save: Path | None, keeps_others: bool
) -> dict[str, Any]:
    is_added = save is not None and keeps_others and save.exists()
    entries = _others(save, names, device) if save and is_added else []
    report: dict[str, Any] = {
        "machine_info": {"attnzoo": {"device": device, "versions": machine.versions()}},
        "datetime": datetime.now(timezone.utc).isoformat(),
        "common": {"commit": machine.commit()},
        "benchmarks": entries,
    }
    for name in names:
        print(f"{name}: {GOALS[name].what}", file=sys.stderr, flush=True)
        outcome = run_isolated(
            measure_goal, Case(kind="goal", mechanism=name, device=device), Conditions(),
            memory=2**36 if device == "cuda" else 2**34, timeout=1200, device=device,
        )  # fmt: skip
        if outcome.state == "measured":
            found = outcome.result
            report["common"]["device_name"] = found.pop("device_name")
            info = {k: v for k, v in found.items() if k not in ("rounds", "versions")}
        else:
            failed = not_measured(name, outcome.state, outcome.reason)
            info = {"rows": [dataclasses.asdict(failed)]}
        entries.append({"extra_info": info})
        if save:  # after every goal, so that no interruption loses one
            write_json(save, report)
    return report


if __name__ == "__main__":
    run_script(main)
