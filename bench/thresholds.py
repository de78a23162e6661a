"""The performance goals: ``thresholds.toml`` read, and figures judged by it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from attnzoo.contract import nearest
from recipes.lab.console import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

VERDICTS = ("target reached", "minimum met", "minimum missed", "not measured")
HEADING = ("goal", "what", "value", "quartiles", "minimum", "target", "", "note")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Goal:
    """One table of ``thresholds.toml``, whose comment says what is in it."""

    what: str
    device: str
    figures: dict[str, dict[str, Any]]
    sweep: list[dict[str, Any]] = dataclasses.field(default_factory=lambda: [{}])
    contestants: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    rounds: int = 9
    also: str = ""


_TABLES = tomllib.loads(Path(__file__).with_name("thresholds.toml").read_text("utf-8"))
# Of bench/whole_models: by name the measurement and its figures.
WHOLE_MODELS: dict[str, dict[str, Any]] = _TABLES.pop("whole_models")
# Of bench/scaling: by name its figures.
SCALING: dict[str, dict[str, Any]] = _TABLES.pop("scaling")
GOALS: dict[str, Goal] = {name: Goal(**entry) for name, entry in _TABLES.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GoalFigure:
    """One figure of a goal."""

    goal: str
    what: str
    value: float | None = None  # the median; None if it could not be measured
    minimum: float | None = None  # must be reached; None where a goal has failed as a whole
    target: float | None = None  # what we work towards; likewise
    better: Literal["higher", "lower"] = "higher"
    q1: float | None = None  # quartiles over the rounds
    q3: float | None = None
    note: str = ""  # what else is to be known

    @property
    def verdict(self) -> str:
        """One of ``VERDICTS``."""
        if self.value is None or self.minimum is None or self.target is None:
            return "not measured"
        sign = 1 if self.better == "higher" else -1
        if sign * self.value >= sign * self.target:
            return "target reached"
        is_met = sign * self.value >= sign * self.minimum
        return "minimum met" if is_met else "minimum missed"

    @property
    def shown(self) -> str:
        """The value in as few digits as agree with the verdict, at least three."""
        if self.value is None:
            return ""
        texts = (f"{self.value:.{digits}g}" for digits in range(3, 18))
        same = (t for t in texts
                if dataclasses.replace(self, value=float(t)).verdict == self.verdict)  # fmt: skip
        return next(same)

    @property
    def row(self) -> list[str]:
        """What a table shows, under ``HEADING``."""
        sign = "≥" if self.better == "higher" else "≤"
        return [
            self.goal, self.what, self.shown,
            "" if self.q1 is None else f"{self.q1:.3g} to {self.q3:.3g}",
            "" if self.minimum is None else f"{sign} {self.minimum:g}",
            "" if self.target is None else f"{self.target:g}", self.verdict, self.note,
        ]  # fmt: skip


def not_measured(goal: str, state: str, reason: str) -> GoalFigure:
    """What stands for a goal whose measurement ended otherwise."""
    return GoalFigure(goal=goal, what=GOALS[goal].what, note=f"{state}: {reason}")


def figures_of(report: dict[str, Any]) -> list[GoalFigure]:
    """The figures in a JSON file of the suite, in the order of the goals."""
    names = [field.name for field in dataclasses.fields(GoalFigure)]
    found, device = [], report.get("common", {}).get("device_name")
    for entry in (benchmark["extra_info"] for benchmark in report["benchmarks"]):
        for row in entry.get("rows", ()):
            figure = GoalFigure(**{name: row[name] for name in names})
            if "commit" in entry:  # of an earlier run, which a later one of other goals left in
                other = entry.get("device_name", device)
                where = "" if other == device else f" on {other}"
                notes = (figure.note, f"measured at commit {entry['commit']}{where}")
                figure = dataclasses.replace(figure, note="; ".join(filter(None, notes)))
            found.append(figure)
    for missed in report.get("cells_not_measured", []):
        goal = missed["name"].removeprefix("test_goal[").removesuffix("]")
        if goal in GOALS:
            found.append(not_measured(goal, missed["state"], missed["reason"]))
    return sorted(found, key=lambda figure: (figure.goal[0], int(figure.goal[1:])))


def chosen_goals(names: Iterable[str], device: str) -> tuple[str, ...]:
    """These goals, or all of a device.

    Raises:
        UserError: There is no such goal, or it is another device's.
    """
    names = tuple(names)
    for name in names:
        if name not in GOALS:
            raise UserError(
                f"unknown goal {name!r}{nearest(name, GOALS)} Choose of {', '.join(GOALS)}"
            )
        if GOALS[name].device != device:
            raise UserError(f"{name} is a goal of --device {GOALS[name].device}")
    return names or tuple(name for name, goal in GOALS.items() if goal.device == device)
