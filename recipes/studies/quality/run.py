"""What a call of study.py does: open the data, run what is missing, say what is left."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

import pandas as pd
import torch

from recipes.lab.console import one_line
from recipes.lab.data.datasets import entry_of, kind_of, share
from recipes.lab.files import locked
from recipes.lab.training.build import check_division, open_data
from recipes.lab.training.held_out import check_enough, missing_line, open_held_out
from recipes.studies.comparison.execution import Result
from recipes.studies.comparison.planned import OK, is_done, read_result
from recipes.studies.comparison.study import say
from recipes.studies.quality.launch import run_forked
from recipes.studies.quality.plans import Scale, Seconds, Study, StudyRun, macs_of


def share_data(study: Study, scale: Scale, resolutions: Sequence[int]) -> None:
    """Opens the images once, for all runs that will be forked.

    Raises:
        DataError: They cannot be read.
    """
    entry = entry_of(kind_of(scale.data))
    level = study.level if study.level in entry.levels else "easy"
    for side in resolutions or study.resolutions:
        for split in entry.splits:
            share(scale.data, resolution=side, level=level, split=split)


def check_runs(runs: Sequence[StudyRun]) -> None:
    """Refuses a study whose runs cannot begin, or have no held-out loss, before the first one.

    Raises:
        UserError: No image is left out, or too few are; or micro-steps do not divide a step.
        DataError: They cannot be read.
    """
    of_sides = {one.planned.settings.resolution: one.planned.settings for one in runs}
    for settings in of_sides.values():
        check_division(settings, 1)
        open_data(settings, torch.device("cpu"))  # whether it has held-out images of its own
        held_out = open_held_out(settings)
        check_enough(held_out)
        if line := missing_line(held_out, settings.held_out_images):
            say(f"{settings.resolution} px: {line}")


class Missing:
    """The runs of a plan that have no numbers yet.

    Args:
        out: Folder of the runs.
        runs: All of the plan.
        elsewhere: Names of those that another machine has done.
    """

    def __init__(self, out: Path, runs: Sequence[StudyRun], elsewhere: Collection[str]) -> None:
        self.out, self.runs = out, runs
        self.planned = {
            one.planned.folder(out): one.planned
            for one in runs
            if one.planned.name not in elsewhere
        }

    def run(self, slots: Sequence[str | None], threads: int, minutes: float) -> None:
        """Runs them until time is up, and reports each on the terminal as it ends."""
        with locked(self.out / ".lock", warn=say):
            waiting = [
                folder
                for folder, planned in self.planned.items()
                if not is_done(read_result(folder), planned.extractors)
            ]
            for folder in waiting:
                self.planned[folder].prepare(self.out)
            say(f"{len(waiting)} runs to do, {len(slots)} at a time, {minutes:.1f} minutes left")
            started, counts = time.monotonic(), Counter[str]()

            def report(folder: Path, result: Result | None) -> None:
                state = "not started" if result is None else result["state"]
                counts[state] += 1
                if result is not None:
                    error = f": {one_line(result['error'])}" if result["state"] != OK else ""
                    passed = (time.monotonic() - started) / 60
                    say(f"{passed:.1f} min: {folder.name}: {state}{error}")

            run_forked(waiting, slots, threads, minutes, report)
            say(", ".join(f"{count} {state}" for state, count in counts.items()) or "none to do")

    def left(self, table: pd.DataFrame) -> list[str]:
        """A line for each run of the plan that the table has no numbers of."""
        done = set(table.loc[table["state"] == OK, "run"])
        states = dict(zip(table["run"], table["state"], strict=True))
        return [
            f"{states.get(one.planned.name, 'not run')}: {one.study}, equal {one.protocol}, "
            f"{one.planned.settings.resolution} px, {one.planned.label}, seed "
            f"{one.planned.settings.seed}"
            for one in self.runs
            if one.planned.name not in done
        ]


def dry_run(runs: Sequence[StudyRun], seconds: Seconds) -> str:
    """The plan as a table: what runs in which order, and what it costs."""
    rows = []
    for planned, _, protocol in runs:
        settings = planned.settings
        depth = (settings.backbone or {})["depth"]
        macs = macs_of(settings, depth)
        step = seconds.get((planned.label, settings.resolution or 0))
        per_depth = depth / (runs[0].planned.settings.backbone or {})["depth"]
        rows.append({
            "protocol": protocol, "px": settings.resolution, "variant": planned.label,
            "blocks": depth, "steps": settings.steps, "GMACs": macs / 1e9,
            "PMACs of training": 3 * macs * settings.steps * settings.batch_size / 1e15,
            "minutes": None if step is None else step * per_depth * settings.steps / 60,
        })  # fmt: skip
    frame = pd.DataFrame(rows)
    grouped = frame.groupby(["protocol", "px", "variant"], sort=False)
    shown = grouped.first().assign(seeds=grouped.size()).reset_index()
    total = frame["minutes"].sum()
    names = len({one.planned.name for one in runs})
    return (
        f"{shown.to_string(index=False, float_format=lambda v: f'{v:.3g}')}\n"
        f"{len(runs)} rows of {names} runs, {frame['PMACs of training'].sum():.3g} PMACs of "
        f"training"
        + (
            f", {total:.0f} minutes of one GPU without sharing, measuring and starting"
            if total
            else ""
        )
    )
