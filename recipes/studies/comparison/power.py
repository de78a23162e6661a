"""How many seeds would decide, from the runs that are there: the price of a comparison."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from recipes.lab.console import UserError, one_line
from recipes.studies.comparison.planned import OK, PlannedRun
from recipes.studies.comparison.statistics import LEVEL, POWER, seeds_to_find
from recipes.studies.comparison.summary import SETTING, collect, headlines, setting_name
from recipes.studies.comparison.verdicts import Choice, Verdict, family, is_of_model


def power_table(out: Path, planned: Sequence[PlannedRun], choice: Choice) -> str:
    """A table of all comparisons, and how many seeds each would take.

    Args:
        out: Folder of the comparison.
        planned: All its runs, done or not.
        choice: Which are compared with which.

    Raises:
        UserError: No two variants have two seeds in common.
    """
    runs = collect(out, planned).runs
    done = runs.loc[runs["state"] == OK]
    rows = list(_rows(done, choice))
    if not rows:
        seeds = done["seed"].nunique()
        raise UserError(
            f"--power needs a pilot of at least 2 seeds of two variants on one machine, and {out} "
            f"has {len(done['run'].unique())} finished runs of {seeds} seed(s): run the same "
            f"command with --seeds 2 or more first, without --power"
        )
    return (
        f"{pd.DataFrame(rows).to_string(index=False)}\n"
        f"effect: mean difference of the pilot, in percent of the second, ± the spread over "
        f"seeds.\nseeds alone, in family: what finds an effect of that size with a power of "
        f"{POWER:.0%}, p < {LEVEL:.2g}\nalone and with Holm's first step for all comparisons of "
        f"the metric. A spread from few seeds may be half the true one: plan for more."
    )


def _rows(done: pd.DataFrame, choice: Choice) -> Iterator[dict[str, Any]]:
    for metric in headlines(done) if len(done) else ():
        verdicts = family(done, metric, [*SETTING, "cfg"], choice)
        size = sum(len(of_setting) for of_setting in verdicts.values())
        for (*setting, cfg), of_setting in verdicts.items():
            for (first, second), verdict in of_setting.items():
                if verdict.seeds >= 2 and verdict.difference is not None:
                    yield {
                        "setting": one_line(setting_name(setting)),
                        "guidance": "" if is_of_model(metric) else f"{cfg:g}",
                        "metric": metric,
                        "comparison": one_line(f"{first} - {second}"),
                        "pilot seeds": verdict.seeds,
                        "effect": _effect(verdict),
                        "seeds alone": _seeds(verdict, LEVEL),
                        "in family": _seeds(verdict, LEVEL / size),
                    }


def _effect(verdict: Verdict) -> str:
    found = verdict.difference
    assert found is not None
    if not abs(found.percent) <= 1000:
        return f"{found.mean:+.2g} ± {found.std:.2g}"
    return f"{found.percent:+.2g} % ± {100 * found.std / abs(found.scale):.2g}"


def _seeds(verdict: Verdict, level: float) -> str:
    found = verdict.difference
    assert found is not None
    if found.std == 0 and found.mean != 0:
        return "no spread"
    needed = seeds_to_find(found.mean, found.std, level=level)
    return "never" if math.isinf(needed) else f"{needed:.0f}"
