"""Writes docs/results.md from the tables of comparisons: which of the paper's orderings hold.

    python recipes/results.py runs/results --out docs/results.md

Nothing in that page is written by hand but the words around the numbers, which stand here.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from recipes.cells import OK
from recipes.console import UserError, run_script
from recipes.grid import CLAIMS, PRESETS, Claim, paper_rows
from recipes.report import PLACE, headlines, place_name, summarise
from recipes.verdicts import Verdict, compare_variants

INTRODUCTION = """# Which of the paper's orderings hold here

Small models (size tiny: width 96, 4 blocks), small images, a few minutes of training: **another
experiment than the paper's**, in which orders may be compared, values never. The protocol is
"{protocol}", every model has had the same {steps} steps of {batch} images, in the same order and
with the same noise within a seed ({seeds} seeds). docs/evaluation.md says what the numbers mean.

A difference counts if the 95 % interval of its mean over the seeds (Student's t on differences
within a seed) leaves out 0; "cannot tell" is all that can be said otherwise, and is no proof that
two variants are equal. Nothing is corrected for the number of comparisons: of twenty ties, one
will look like a difference. With three seeds the interval reaches 2.5 standard deviations to
either side, so only large differences count.

This page is written by a command, from the numbers of these:

```sh
{commands}
```
"""


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python recipes/results.py", description="Write docs/results.md from comparisons."
    )
    parser.add_argument("folders", metavar="FOLDER", nargs="+", help="--out of compare.py")
    parser.add_argument("--out", default="docs/results.md", help="page to write")
    given = parser.parse_args(arguments)
    Path(given.out).write_text(results_page([Path(folder) for folder in given.folders]))
    print(given.out)
    return 0


def results_page(folders: Sequence[Path]) -> str:
    """The page, in Markdown.

    Raises:
        UserError: A folder holds no comparison, or nothing in them is done.
    """
    frames, commands = [], []
    for folder in folders:
        try:
            frames.append(pd.read_csv(folder / "cells.csv", dtype={"level": str}))
            commands.append((folder / "command.txt").read_text().strip())
        except OSError as error:
            raise UserError(
                f"{folder} holds no comparison ({error.strerror}: {error.filename}); make one "
                f"with python recipes/compare.py --preset results --out {folder}"
            ) from error
    everything = pd.concat(frames, ignore_index=True)
    everything["level"] = everything.level.fillna("")
    done = everything[everything.state == OK]
    if done.empty:
        raise UserError(f"no cell of {', '.join(map(str, folders))} is done yet")
    tables = ("table1-S", "table4", "table5", "table6")
    from_paper = [variant for table in tables for variant in PRESETS[table].variants]
    names = " ".join(map(str, folders))
    commands.append(f"python recipes/results.py {names}")
    parts = [
        INTRODUCTION.format(
            protocol=_listed(done.protocol),
            steps=_listed(done.steps),
            batch=_listed(done.batch_size),
            seeds=done.seed.nunique(),
            commands="\n".join(commands),
        ),
        _not_done(everything),
        "## The orderings\n",
        *[_claim_section(claim, done) for claim in CLAIMS],
        "## All numbers\n",
        "Mean ± standard deviation over seeds. The first column counts multiply-accumulates of "
        "one forward, in millions. `[smallcnn]` is a small network trained on the real images, "
        "`[judge]` the exact judge of the procedural shapes. Lower is better for FID and KID.\n",
        *_tables(done),
        "## The paper's numbers\n",
        "Sub-ImageNet at 256 px, size S, guidance 4.0, Inception features; not to be compared in "
        "value.\n",
        _markdown(paper_rows(from_paper)),
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _listed(column: pd.Series) -> str:
    return ", ".join(map(str, column.drop_duplicates()))


def _not_done(everything: pd.DataFrame) -> str:
    cells = everything.drop_duplicates("cell")
    bad = cells[cells.state != OK]
    if bad.empty:
        return ""
    counts = Counter(bad.state)
    states = ", ".join(f"{count} {state}" for state, count in counts.items())
    return f"**{len(bad)} of {len(cells)} cells have no number: {states}.**\n"


def claim_verdicts(claim: Claim, done: pd.DataFrame) -> list[tuple[str, str, Verdict]]:
    """(place and guidance, metric, verdict) wherever both variants of a claim were measured."""
    found = []
    for (*place, cfg), group in done.groupby([*PLACE, "cfg"], sort=False, dropna=False):
        for metric in headlines(group):
            verdict = compare_variants(group, claim.better, claim.worse, metric)
            if verdict.seeds:
                found.append((f"{place_name(place)}, guidance {cfg:g}", metric, verdict))
    return found


def conclusion(claim: Claim, kinds: Sequence[str]) -> str:
    """What the verdicts on a claim say together."""
    count = Counter(kinds)
    better, worse, same = count["better"], count["worse"], count["same"]
    tally = f"{better} for {claim.better}, {worse} for {claim.worse}, {same} cannot tell"
    if not better + worse + same:
        return "**Not measured** with more than one seed."
    if claim.equal:
        if not better + worse:
            return f"**No difference seen** ({tally})."
        return f"**A difference is seen in places** ({tally})."
    if not better + worse:
        return f"**Cannot tell**: no difference beyond the spread anywhere ({tally})."
    if not worse:
        return f"**Holds** where a difference can be seen ({tally})."
    if not better:
        return f"**Does not hold; the opposite does** where a difference can be seen ({tally})."
    return f"**Mixed** ({tally})."


def _claim_section(claim: Claim, done: pd.DataFrame) -> str:
    verdicts = claim_verdicts(claim, done)
    relation = "about equal to" if claim.equal else "before"
    title = f"### {claim.better} {relation} {claim.worse} ({claim.source})\n"
    text = conclusion(claim, [verdict.kind for _, _, verdict in verdicts])
    if not verdicts:
        return f"{title}\n{text}\n"
    rows = pd.DataFrame(
        [(where, metric, verdict.words) for where, metric, verdict in verdicts],
        columns=["where", "metric", "verdict"],
    )
    wide = rows.pivot(index="where", columns="metric", values="verdict")
    wide = wide.loc[rows["where"].unique(), rows.metric.unique()].reset_index()
    note = "Gains of the first, positive where it is better:"
    return f"{title}\n{text} {note}\n\n{_markdown(wide)}\n"


def _tables(done: pd.DataFrame) -> list[str]:
    summary = summarise(done)
    wanted = headlines(done)
    parts = []
    for (*place, cfg), group in summary.groupby([*PLACE, "cfg"], sort=False, dropna=False):
        group = group[group.metric.isin(wanted)].assign(
            shown=lambda g: [
                f"{mean:.3g} ± {std:.2g}" if std == std else f"{mean:.3g}"
                for mean, std in zip(g["mean"], g["std"], strict=True)
            ]
        )
        wide = group.pivot(index="variant", columns="metric", values="shown")
        wide = wide.loc[group.variant.unique(), [m for m in wanted if m in wide]]
        mask = (done.data == place[0]) & (done.level == place[1]) & (done.resolution == place[2])
        macs = done[mask].groupby("variant", sort=False).macs.mean()
        wide.insert(0, "MMACs", (macs / 1e6).map("{:.3g}".format))
        title = f"### {place_name(place)}, guidance {cfg:g}"
        parts.append(f"{title}\n\n{_markdown(wide.reset_index())}\n")
    return parts


def _markdown(frame: pd.DataFrame) -> str:
    def line(cells: Sequence[object]) -> str:
        shown = ("" if cell != cell or cell is None else str(cell) for cell in cells)
        return f"| {' | '.join(shown)} |"

    rule = "|" + "---|" * len(frame.columns)
    rows = [line(row) for row in frame.astype(object).values.tolist()]
    return "\n".join([line(list(frame.columns)), rule, *rows])


if __name__ == "__main__":
    run_script(main)
