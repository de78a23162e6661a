"""``python -m bench.goals [out.json]``: the performance goals, with value and spread, met or not.

With a JSON of ``pytest bench/ --full`` it prints what the file holds; without one it measures.
Every figure is made in one way: one thread, process CPU time, all contestants in turn in one
process, at least 7 rounds, median of the ratios of each round, and the twin check first. On a GPU
(goals U1 and on) the clock is CUDA events, over replays of a CUDA graph where one can be recorded.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from attnzoo.contract import nearest
from bench import machine
from bench.cells import Cell
from bench.isolate import run_isolated
from bench.results import compact, read_report, source_of
from bench.tables import markdown, parts_around, put_into
from bench.worker import Settings, prepare
from recipes.lab.console import DONE, UserError, run_script
from recipes.lab.files import check_writable, write_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One figure of a goal.

    Attributes:
        goal: "G1" and so on.
        what: What the value is.
        value: The median, or None if it could not be measured.
        q1: Lower quartile over the rounds.
        q3: Upper quartile over the rounds.
        owed: The value that is owed; None where a goal has failed as a whole.
        aim: The value that we aim at; likewise.
        better: Whether the value should be "higher" or "lower".
        note: What else is to be known.
    """

    goal: str
    what: str
    value: float | None
    owed: float | None
    aim: float | None
    better: Literal["higher", "lower"]
    q1: float | None = None
    q3: float | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        """One of ``VERDICTS``."""
        if self.value is None or self.owed is None or self.aim is None:
            return "not measured"
        sign = 1 if self.better == "higher" else -1
        if sign * self.value >= sign * self.aim:
            return "aim reached"
        return "met" if sign * self.value >= sign * self.owed else "NOT MET"

    @property
    def shown(self) -> str:
        """The value in as few digits as agree with the verdict, at least three."""
        if self.value is None:
            return ""
        for digits in range(3, 17):
            text = f"{self.value:.{digits}g}"
            if dataclasses.replace(self, value=float(text)).verdict == self.verdict:
                return text
        return repr(self.value)


VERDICTS = ("aim reached", "met", "NOT MET", "not measured")

# The measurements import torch and the zoo; the goals' names must not.
GOALS: dict[str, str] = {
    "G1": "routed projection: speed over nn.Linear at equal useful MACs",
    "G2": "routed projection: times faster than evaluating all projectors",
    "G3": "power map: time in linears; times faster than autograd's pow",
    "G4": "DyDiLA layer: time in Sana layers; that over the ratio of MACs",
    "G5": "DyDiLA: token-wise, times faster than map-wise",
    "G6": "linear mechanisms: exponent of time and of peak memory, n = 1k to 16k",
    "G7": "DyDiLA: peak memory, in tensors of n x d",
    "G8": "streaming inference: peak over one-shot Sana, time over one-shot DyDiLA",
    "G9": "DyDiLA: times faster than softmax with SDPA; crossover",
    "G10": "Sana: time over diffusers' processor, same weights",
    "G11": "gated linear attention: times faster than the recurrence; error",
    "G12": "compressed: times faster than SDPA; its convolutions in linears",
    "G13": "torch.compile: graph breaks and recompilations over routings",
    "G14": "softmax layer: speed over bare SDPA with the same projections",
    "U1": "DyDiLA layer: time in Sana layers, d = 768, bf16",
    "U2": "routed projection: speed over nn.Linear at equal useful MACs",
    "U3": "fused power map: share of a copy's bandwidth; times faster than eager",
    "U4": "Sana: speed over the best peer, same weights",
    "U5": "gated linear attention: time over flash-linear-attention's kernel",
    "U6": "backbone at 2048 px: DyDiLA times faster than the fastest softmax",
    "U7": "DyDiLA: peak memory of a training step over Sana's",
}
# G is set on a CPU, U on a GPU.
LETTERS = {"cpu": "G", "cuda": "U"}


def measure_goal(cell: Cell, settings: Settings) -> dict[str, Any]:
    """Measures one goal.

    Returns:
        "rows" (dictionaries of ``Row``), and "rounds" for pytest-benchmark.
    """
    from bench import goal_measurements

    allocator = prepare(dataclasses.replace(settings, threads=1))
    found = goal_measurements.measure(cell.mechanism, cell.device)
    return {
        "rows": [dataclasses.asdict(row) | {"verdict": row.verdict} for row in found.rows],
        "check": found.checks,
        "rounds": found.rounds or [0.0],
        "timer": found.timer,
        "allocator": allocator,
        **machine.describe(cell.device, 1),
    }


def rows_of(report: dict[str, Any]) -> list[Row]:
    """The rows in a JSON file of the suite, in the order of the goals."""
    names = [field.name for field in dataclasses.fields(Row)]
    entries = [b["extra_info"] for b in report["benchmarks"] if "rows" in b["extra_info"]]
    rows = []
    for entry in entries:
        found = [Row(**{name: row[name] for name in names}) for row in entry["rows"]]
        if "commit" in entry:  # of an earlier run, which a later one of other goals kept
            earlier = f"measured at commit {entry['commit']}"
            notes = ["; ".join(text for text in (row.note, earlier) if text) for row in found]
            found = [dataclasses.replace(r, note=n) for r, n in zip(found, notes, strict=True)]
        rows += found
    for cell in report.get("cells_not_measured", []):
        goal = cell["name"].removeprefix("test_goal[").removesuffix("]")
        if goal in GOALS:
            rows.append(_not_measured(goal, cell["state"], cell["reason"]))
    return sorted(rows, key=lambda row: (row.goal[0], int(row.goal[1:])))


def _not_measured(goal: str, state: str, reason: str) -> Row:
    return Row(goal=goal, what=GOALS[goal], value=None, owed=None, aim=None,
               better="higher", note=f"{state}: {reason}")  # fmt: skip


def as_markdown(rows: list[Row], source: str) -> str:
    """Where the figures come from, how many of each goal meet what, and, folded, every figure."""
    goals = []
    for name in dict.fromkeys(row.goal for row in rows):
        own = [row for row in rows if row.goal == name]
        count = collections.Counter(row.verdict for row in own)
        shown = [str(count[verdict] or "") for verdict in VERDICTS]
        goals.append([name, GOALS[name], *shown])
    return (
        f"{source}: {summary(rows)}.\n\n{markdown(['goal', 'what', *VERDICTS], goals)}\n\n"
        f"<details>\n<summary>Every figure</summary>\n\n{as_table(rows)}\n\n</details>"
    )


def as_table(rows: list[Row]) -> str:
    """The figures as a Markdown table."""
    lines = []
    for row in rows:
        sign = ">=" if row.better == "higher" else "<="
        spread = "" if row.q1 is None else f"{row.q1:.3g} to {row.q3:.3g}"
        owed = "" if row.owed is None else f"{sign} {row.owed:g}"
        aim = "" if row.aim is None else f"{row.aim:g}"
        lines.append([row.goal, row.what, row.shown, spread, owed, aim, row.verdict, row.note])
    heading = ["goal", "what", "value", "quartiles", "owed", "aim", "", "note"]
    return markdown(heading, lines)


def summary(rows: list[Row]) -> str:
    """How many of the figures meet what."""
    count: Callable[[str], int] = [row.verdict for row in rows].count
    return (
        f"{len(rows)} figures: {count('aim reached')} reach the aim, {count('met')} meet what is "
        f"owed, {count('NOT MET')} do not, {count('not measured')} not measured"
    )


def main(arguments: list[str]) -> int:
    """Prints the goals."""
    parser = argparse.ArgumentParser(prog="python -m bench.goals", description=__doc__)
    parser.add_argument(
        "report", nargs="?", type=Path, help="JSON of pytest bench/ --full, or of --save"
    )
    parser.add_argument("--only", default="", help="goals to measure, such as G4,G9")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--save", type=Path,
        help="JSON to write the goals' figures to; those that --only leaves out stay in it",
    )  # fmt: skip
    parser.add_argument(
        "--into", type=Path, action="append", default=[],
        help="file whose part <!-- goals -->, or <!-- goals-cuda -->, is replaced; repeatable",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.save:
        check_writable(options.save)
    if options.report:
        report = read_report(options.report)
        rows = rows_of(report)
        if not rows:
            raise UserError(
                f"{options.report} holds no goals; they are in a run of pytest bench/ --full, "
                f"or measure them with python -m bench.goals"
            )
        part = _part(rows[0].goal)
        _check_parts(options.into, part)
        if options.save:
            write_json(options.save, _goals_alone(report))
    else:
        own = [name for name in GOALS if name.startswith(LETTERS[options.device])]
        wanted = [name for name in options.only.split(",") if name] or own
        for name in wanted:
            if name not in GOALS:
                choices = f"{nearest(name, GOALS)} Choose of {', '.join(GOALS)}"
                raise UserError(f"unknown goal {name!r}{choices}")
        part = _part(LETTERS[options.device])
        _check_parts(options.into, part)
        report = _measure(wanted, options.device, options.save, bool(options.only))
        rows = rows_of(report)
    print(f"{as_table(rows)}\n\n{summary(rows)}")
    for path in options.into:
        put_into(path, part, as_markdown(rows, source_of(report)))
    return DONE


def _part(goal: str) -> str:
    return "goals-cuda" if goal.startswith(LETTERS["cuda"]) else "goals"


def _check_parts(paths: list[Path], part: str) -> None:
    for path in paths:
        parts_around(path, part)


def _goals_alone(report: dict[str, Any]) -> dict[str, Any]:
    entries = [entry for entry in report["benchmarks"] if "rows" in entry["extra_info"]]
    cells = report.get("cells_not_measured", [])
    missed = [cell for cell in cells if cell["name"].startswith("test_goal[")]
    return compact(report | {"benchmarks": entries, "cells_not_measured": missed})


def _others(saved: dict[str, Any], names: list[str]) -> list[dict[str, Any]]:
    """The entries of goals that are not measured now, each with its commit."""
    kept = []
    for entry in saved["benchmarks"]:
        rows = [row for row in entry["extra_info"].get("rows", []) if row["goal"] not in names]
        if rows:
            commit = {"commit": saved.get("common", {}).get("commit", "unknown")}
            kept.append({"extra_info": {**commit, **entry["extra_info"], "rows": rows}})
    return kept


def _measure(
    names: list[str], device: str, save: Path | None, keeps_others: bool
) -> dict[str, Any]:
    entries: list[dict[str, Any]] = []
    if save is not None and keeps_others and save.exists():
        saved = read_report(save)
        before = saved.get("machine_info", {}).get("attnzoo", {}).get("device", device)
        if before != device:
            raise UserError(f"{save} holds goals of device {before!r}; name another file to save "
                            f"those of {device!r} to")  # fmt: skip
        entries = _others(saved, names)
    report = {
        "machine_info": {"attnzoo": {"device": device, "versions": machine.versions()}},
        "datetime": datetime.now(timezone.utc).isoformat(),
        "common": {"commit": machine.commit()},
        "benchmarks": entries,
    }
    for name in names:
        print(f"{name}: {GOALS[name]}", file=sys.stderr, flush=True)
        outcome = run_isolated(
            measure_goal, Cell(kind="goal", mechanism=name, device=device), Settings(),
            memory=2**36 if device == "cuda" else 2**34, timeout=1200, device=device,
        )  # fmt: skip
        if outcome.state == "measured":
            found = outcome.result
            report["common"]["device_name"] = found.pop("device_name")
            info = {k: v for k, v in found.items() if k not in ("rounds", "versions")}
        else:
            row = _not_measured(name, outcome.state, outcome.reason)
            info = {"rows": [dataclasses.asdict(row)]}
        entries.append({"extra_info": info})
        if save:  # after every goal, so that no interruption loses one
            write_json(save, report)
    return report


if __name__ == "__main__":
    run_script(main)
