"""``python -m bench.goals [out.json]``: the performance goals, with value and spread, met or not.

With a JSON of ``pytest bench/ --full`` it prints what the file holds; without one it measures.
Every figure is made in one way: one thread, process CPU time, all contestants in turn in one
process, at least 7 rounds, median of the ratios of each round, and the twin check first.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from bench.cells import Cell
from bench.isolate import run_isolated
from bench.tables import markdown, put_into
from bench.worker import Settings, prepare
from recipes.console import DONE, UserError, run_script


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One figure of a goal.

    Attributes:
        goal: "G1" and so on.
        what: What the value is.
        value: The median, or None if it could not be measured.
        q1: Lower quartile over the rounds.
        q3: Upper quartile over the rounds.
        owed: The value that is owed.
        aim: The value that we aim at.
        better: Whether the value should be "higher" or "lower".
        note: What else is to be known.
    """

    goal: str
    what: str
    value: float | None
    owed: float
    aim: float
    better: Literal["higher", "lower"]
    q1: float | None = None
    q3: float | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        """ "aim reached", "met", "not met" or "not measured"."""
        if self.value is None:
            return "not measured"
        sign = 1 if self.better == "higher" else -1
        if sign * self.value >= sign * self.aim:
            return "aim reached"
        return "met" if sign * self.value >= sign * self.owed else "NOT MET"


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
}


def measure_goal(cell: Cell, settings: Settings) -> dict[str, Any]:
    """Measures one goal.

    Returns:
        "rows" (dictionaries of ``Row``), and "rounds" for pytest-benchmark.
    """
    from bench import goal_measurements, machine

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
    rows = [Row(**{n: row[n] for n in names}) for entry in entries for row in entry["rows"]]
    return sorted(rows, key=lambda row: int(row.goal[1:]))


def as_table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = []
    for row in rows:
        sign = ">=" if row.better == "higher" else "<="
        spread = "" if row.q1 is None else f"{row.q1:.3g} to {row.q3:.3g}"
        value = "" if row.value is None else f"{row.value:.3g}"
        owed, aim = f"{sign} {row.owed:g}", f"{row.aim:g}"
        lines.append([row.goal, row.what, value, spread, owed, aim, row.verdict, row.note])
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
    parser.add_argument("report", nargs="?", type=Path, help="JSON of pytest bench/ --full")
    parser.add_argument("--only", default="", help="goals to measure, such as G4,G9")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--save", type=Path, help="JSON to write what was measured to")
    parser.add_argument("--into", type=Path, help="file whose <!-- goals --> part is replaced")
    options = parser.parse_args(arguments)
    if options.report:
        from bench.results import read_report

        rows = rows_of(read_report(options.report))
        if not rows:
            raise UserError(
                f"{options.report} holds no goals; they are in a run of pytest bench/ --full, "
                f"or measure them with python -m bench.goals"
            )
    else:
        wanted = [name for name in options.only.split(",") if name] or list(GOALS)
        for name in wanted:
            if name not in GOALS:
                raise UserError(f"unknown goal {name!r}; choose of {', '.join(GOALS)}")
        rows = _measure(wanted, options.device, options.save)
    text = f"{as_table(rows)}\n\n{summary(rows)}"
    print(text)
    if options.into:
        put_into(options.into, "goals", text)
    return DONE


def _measure(names: list[str], device: str, save: Path | None) -> list[Row]:
    entries: list[dict[str, Any]] = []
    for name in names:
        print(f"{name}: {GOALS[name]}", file=sys.stderr, flush=True)
        cell = Cell(kind="goal", mechanism=name, device=device)
        outcome = run_isolated(
            measure_goal, cell, Settings(), memory=2**34, timeout=1200, device=device
        )
        if outcome.state != "measured":
            row = Row(goal=name, what=GOALS[name], value=None, owed=0, aim=0, better="higher",
                      note=f"{outcome.state}: {outcome.reason}")  # fmt: skip
            entries.append({"rows": [dataclasses.asdict(row)]})
        else:
            entries.append({k: v for k, v in outcome.result.items() if k != "rounds"})
    report = {"benchmarks": [{"extra_info": entry} for entry in entries]}
    if save:
        save.write_text(json.dumps(report, indent=1))
    return rows_of(report)


if __name__ == "__main__":
    run_script(main)
