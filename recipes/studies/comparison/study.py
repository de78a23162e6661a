"""A comparison from its plan to its report: one folder, filled by one process at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import pandas as pd
import torch

from recipes.lab.console import UserError, one_line, printable
from recipes.lab.evaluation.measure import prepare_real
from recipes.lab.files import locked, refuse_links, require_writable
from recipes.studies.comparison import execution
from recipes.studies.comparison.plan import distinct_data, real_of
from recipes.studies.comparison.planned import EVALUATORS, OK, PlannedRun, is_done, read_result
from recipes.studies.comparison.report import write_report
from recipes.studies.comparison.verdicts import ALL_PAIRS, Choice


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """How the runs of a comparison are run, whatever they are.

    Attributes:
        jobs: Runs at the same time.
        run_minutes: Limit of one run, which goes on when compared again.
        time_budget: Minutes after which none starts; None for no limit.
        cluster: "local" or "slurm" to hand them to submitit; None for processes of this one.

    Raises:
        UserError: A limit is not a length of time, or submitit is not installed.
    """

    jobs: int = 1
    run_minutes: float = 120.0
    time_budget: float | None = None
    cluster: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.run_minutes < 1e6:
            raise UserError(
                f"--run-minutes must be above 0 and below 1e6, got {self.run_minutes:g}"
            )
        if self.time_budget is not None and not self.time_budget >= 0:
            raise UserError(f"--time-budget must be at least 0, got {self.time_budget:g}")
        if self.cluster and importlib.util.find_spec("submitit") is None:
            raise UserError("--engine submitit needs submitit: pip install submitit")


def compare(
    planned: Sequence[PlannedRun],
    out: Path,
    limits: Limits | None,
    *,
    title: str,
    paper: pd.DataFrame,
    choice: Choice = ALL_PAIRS,
) -> bool:
    """Runs what is not done yet and writes the report of everything.

    Args:
        planned: All runs of the comparison, checked by ``plan.check_plan``.
        out: Folder of the runs and the report.
        limits: None runs nothing, also while another process does.
        title: The command, for the report.
        paper: The paper's numbers of the same variants; may be empty.
        choice: Which runs the report compares.

    Returns:
        Whether every run is done.

    Raises:
        UserError: Another process compares in ``out``, something in it is a link, or what is done
            in it is all of another comparison, whose report this one's would replace.
        CannotWrite: The system refuses.
    """
    _check_writable(out)
    folders = {one.folder(out): one for one in planned}
    with contextlib.nullcontext() if limits is None else locked(out / ".lock", warn=say):
        missing = {f: p for f, p in folders.items() if not is_done(read_result(f), p.extractors)}
        if len(missing) == len(folders) and (others := _done_beside(folders, out)):
            raise UserError(
                f"{out} holds {others} finished runs of another comparison and none of this one: "
                f"give the flags that are in {out / 'command.txt'}, or choose another --out"
            )
        counts = f"{len(planned) - len(missing)} done, {len(missing)} to run"
        say(f"{len(planned)} runs in {out}: {counts}", sys.stdout)
        if missing and limits is not None:
            _run_missing(missing, out, limits)
        states = write_report(out, planned, paper, title, choice)
    tables = f"{out / 'runs.csv'}, {out / 'summary.csv'}"
    say(f"report: {out / 'report.html'}   numbers: {tables}", sys.stdout)
    return all(state == OK for state in states.values())


def _done_beside(folders: Mapping[Path, PlannedRun], out: Path) -> int:
    found = [result.parent for result in out.glob("runs/*/result.json")]
    results = [read_result(folder) for folder in found if folder not in folders]
    return sum(result is not None and result["state"] == OK for result in results)


def _check_writable(out: Path) -> None:
    require_writable(out / "report.html")
    for name in (EVALUATORS, "submitit"):
        refuse_links(out, out / name)


def prepare_evaluators(planned: Sequence[PlannedRun], out: Path) -> None:
    """Makes what measures the images, once, before runs want it at the same time."""
    _check_writable(out)
    for one in distinct_data(planned):
        prepare_real(real_of(one), one.samples, out / EVALUATORS)


def _run_missing(planned: Mapping[Path, PlannedRun], out: Path, limits: Limits) -> None:
    """Runs all of these, and reports each on the terminal as it ends."""
    for one in planned.values():
        one.prepare(out)
    with contextlib.suppress(BrokenPipeError):  # it reports; what it leaves, the runs make
        prepare_evaluators(list(planned.values()), out)
    limit = math.inf if limits.time_budget is None else 60 * limits.time_budget
    started, ended = time.monotonic(), 0

    def report(folder: Path, result: dict[str, Any] | None) -> None:
        nonlocal ended
        ended += 1
        text = "not started, time is up or a signal came"
        if result is not None:
            text = result["state"]
            text += f": {one_line(result['error'])}" if result["state"] != OK else ""
        minutes = (time.monotonic() - started) / 60
        say(f"{ended} of {len(planned)}, {minutes:.0f} min: {folder.name}: {text}")

    def may_start() -> bool:
        return time.monotonic() - started < limit

    run = execution.locally(limits.jobs, limits.run_minutes)
    if limits.cluster:
        parameters = {
            "timeout_min": math.ceil(limits.run_minutes),
            "cpus_per_task": max(1, (os.cpu_count() or 1) // limits.jobs),
            "gpus_per_node": 1 if torch.cuda.is_available() else 0,
        }
        run = execution.by_submitit(limits.cluster, out / "submitit", parameters)
    execution.run_all(list(planned), limits.jobs, may_start, report, run)


def say(line: str, file: TextIO | None = None) -> None:
    """A line to a person; one that has gone away, as in "2>&1 | head", stops no run."""
    with contextlib.suppress(OSError):
        print(printable(line), file=file or sys.stderr, flush=True)
