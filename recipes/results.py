"""Writes docs/results.md from the tables of comparisons: which of the paper's orderings hold.

    python recipes/results.py runs/results-16 runs/results-32 --out docs/results.md

Nothing in that page is written by hand but the words around the numbers, which stand here.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from recipes.lab.console import UserError, one_line, printable, run_script
from recipes.lab.evaluation.scores import metric_of
from recipes.lab.files import require_writable, write_text
from recipes.studies.comparison.cells import OK
from recipes.studies.comparison.grid import CLAIMS, PRESETS, Claim, paper_rows
from recipes.studies.comparison.report import (
    PLACE,
    chance_lines,
    headlines,
    place_name,
    summarise,
)
from recipes.studies.comparison.tables import TEXTS, WHOLE, as_markdown, read_table
from recipes.studies.comparison.verdicts import (
    CONFIDENCE,
    Verdict,
    compare_variants,
    winner_digits,
)

# Of the overview: every place has it, and its bias does not depend on the number of samples.
OVERVIEW = "KID"
# Numbers compare within one experiment only.
EXPERIMENT = [*PLACE, "steps", "batch_size", "samples"]
SYMBOLS = {"better": "✓", "worse": "✗", "same": "~", "unknown": "·"}
NOT_RECORDED = "not recorded"
NEEDED = ["cell", "cfg", "macs", "seed", "state", "variant", *EXPERIMENT[:-1]]

INTRODUCTION = """# Which of the paper's orderings hold here

Small models (size tiny: width 96, 4 blocks or what the protocol gives), small images, a few
minutes of training: **another experiment than the paper's**, in which orders may be compared,
values never. Within a place every model has had the same number of the same images, in the same
order and with the same noise within a seed. [docs/evaluation.md](evaluation.md) says what the
numbers mean.

## In short
"""

READING = """A difference counts if the 95 % interval of its mean over the seeds (Student's t on
differences within a seed) leaves out 0; "cannot tell" is all that can be said otherwise, and is no
proof that two variants are equal. With three seeds the interval reaches 2.5 standard deviations to
either side, so only large differences count. Of twenty ties one will look like a difference, and
metrics agree with one another: one difference in ten comparisons is not yet taken for any.
"""

LEGEND = """Gain in {metric} of the first over the second, ± half its interval: ✓ the first is
better, ✗ the second is, ~ the spread hides any difference, · fewer than two seeds or no spread.
{guidances} Every other metric is below.
"""

NUMBERS = """Mean ± standard deviation over seeds. MMACs are the multiply-accumulates of one
forward, in millions. `[smallcnn]` is a small network trained on the real images, `[judge]` the
exact judge of the procedural shapes. Lower is better for FID and KID.
"""


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python recipes/results.py", description="Write docs/results.md from comparisons."
    )
    parser.add_argument("folders", metavar="FOLDER", nargs="+", help="--out of compare.py")
    parser.add_argument("--out", default="docs/results.md", help="page to write")
    given = parser.parse_args(arguments)
    out = require_writable(Path(given.out))
    write_text(out, results_page([Path(folder) for folder in given.folders]))
    print(printable(given.out))
    return 0


def results_page(folders: Sequence[Path]) -> str:
    """The page, in Markdown.

    Raises:
        UserError: A folder holds no comparison, or nothing in them is done.
    """
    everything, commands = _read(folders)
    done = everything[everything.state == OK]
    if done.empty:
        raise UserError(f"no cell of {', '.join(map(str, folders))} is done yet")
    tables = ("table1-S", "table4", "table5", "table6")
    from_paper = [variant for table in tables for variant in PRESETS[table].variants]
    commands.append(f"python recipes/results.py {' '.join(map(str, folders))}")
    judged = [(claim, claim_verdicts(claim, done)) for claim in CLAIMS]
    parts = [
        INTRODUCTION,
        in_short(judged),
        READING,
        *_overviews(done),
        "## Where the numbers come from\n",
        _not_done(everything),
        _origins(everything),
        _devices(done),
        _chance(done),
        _code(commands),
        "## Every ordering in every metric\n",
        *[_claim_section(claim, verdicts) for claim, verdicts in judged if verdicts],
        "## All numbers\n",
        NUMBERS,
        *_tables(done),
        "## The paper's numbers\n",
        "Sub-ImageNet at 256 px, size S, guidance 4.0, Inception features; not to be compared in "
        "value.\n",
        _markdown(paper_rows(from_paper)),
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _read(folders: Sequence[Path]) -> tuple[pd.DataFrame, list[str]]:
    frames, commands = [], []
    for folder in folders:
        try:
            frames.append(_cells(folder / "cells.csv"))
            command = (folder / "command.txt").read_bytes().decode("utf-8", "backslashreplace")
        except OSError as error:
            raise UserError(
                f"{folder / 'command.txt'} cannot be read: {error.strerror}"
            ) from error
        except UserError as error:
            raise UserError(
                f"{folder} holds no comparison ({error}); make one with "
                f"python recipes/compare.py --preset results --out {folder}"
            ) from error
        commands.append(one_line(command.strip()))
    found = pd.concat(frames, ignore_index=True)
    for column in ("device", "torch", "evaluator", "samples"):
        if column not in found:  # written by an earlier version
            found[column] = None
        known = found[column].notna() & (found[column] != "")
        found[column] = found[column].astype(object).where(known, NOT_RECORDED)
    # Two comparisons may share cells; one that is done speaks for its twin.
    found = found.sort_values("state", key=lambda state: state != OK, kind="stable")
    is_twin = found.duplicated(["cell", "cfg"]) | (
        (found.state != OK) & found.cell.isin(found.cell[found.state == OK])
    )
    return found[~is_twin].sort_index(), commands


def _cells(file: Path) -> pd.DataFrame:
    frame = read_table(file)
    if missing := [name for name in NEEDED if name not in frame]:
        raise UserError(f"table {str(file)!r} has no column {missing[0]!r}")
    done = frame[frame.state == OK]
    numbers = [name for name in NEEDED if name not in TEXTS]
    for name in numbers:
        if done[name].isna().any() or (name in WHOLE and frame[name].dtype != int):
            raise UserError(f"table {str(file)!r} is damaged: column {name!r} lacks a number")
    return frame


def _experiments(done: pd.DataFrame, keys: Sequence[str] = ()) -> Iterator[tuple[Any, Any]]:
    """(name, rows) of every experiment, and of every value of more keys within it."""
    varying = [key for key in ("steps", "batch_size", "samples") if done[key].nunique() > 1]
    for values, rows in done.groupby([*EXPERIMENT, *keys], sort=False, dropna=False):
        named = dict(zip(EXPERIMENT, values, strict=False))
        name = place_name([named[key] for key in PLACE])
        words = {"steps": "steps", "batch_size": "images a step", "samples": "samples"}
        extra = [f"{named[key]} {words[key]}" for key in varying]
        yield (", ".join([name, *extra]), *values[len(EXPERIMENT) :]), rows


def claim_verdicts(claim: Claim, done: pd.DataFrame) -> list[tuple[str, float, str, Verdict]]:
    """(place, guidance, metric, verdict) wherever both variants of a claim were measured."""
    found = []
    for (name, cfg), rows in _experiments(done, ["cfg"]):
        for metric in headlines(rows):
            verdict = compare_variants(rows, claim.better, claim.worse, metric)
            if verdict.seeds:
                found.append((name, cfg, metric, verdict))
    return found


Conclusion = Literal[
    "not measured", "cannot tell", "holds", "mostly holds", "the opposite holds",
    "mostly the opposite holds", "mixed", "no difference seen", "a difference is seen",
]  # fmt: skip


def conclusion(claim: Claim, kinds: Sequence[str]) -> tuple[Conclusion, str]:
    """What the verdicts on a claim say together, and how many say what."""
    count = Counter(kinds)
    better, worse, same = count["better"], count["worse"], count["same"]
    total = better + worse + same
    tally = f"{better} for {claim.better}, {worse} for {claim.worse}, {same} cannot tell"
    # Twice what ties give, because one odd seed shows in several metrics.
    chance = 2 * (1 - CONFIDENCE) * total
    if not total:
        return "not measured", "no place has two seeds"
    if claim.equal:
        is_seen = better + worse > chance
        return "a difference is seen" if is_seen else "no difference seen", tally
    if max(better, worse) <= chance:
        return "cannot tell", tally
    if worse <= chance:
        return "mostly holds" if worse else "holds", tally
    if better <= chance:
        return "mostly the opposite holds" if better else "the opposite holds", tally
    return "mixed", tally


def _title(claim: Claim) -> str:
    return f"{claim.better} {'about equal to' if claim.equal else 'before'} {claim.worse}"


def in_short(judged: Sequence[tuple[Claim, Sequence[tuple[str, float, str, Verdict]]]]) -> str:
    """The claims by what has come of them, in words."""
    found: dict[str, list[str]] = {}
    for claim, verdicts in judged:
        said, tally = conclusion(claim, [verdict.kind for *_, verdict in verdicts])
        found.setdefault(said, []).append(f"  - {_title(claim)} ({claim.source}): {tally}")
    order = (
        ("holds", "Holds wherever a difference can be seen"),
        ("mostly holds", "Holds in most comparisons where a difference can be seen"),
        ("no difference seen", "Said to be equal, and no difference can be seen"),
        ("mixed", "Holds in some comparisons, the opposite in others"),
        ("a difference is seen", "Said to be equal, but a difference can be seen"),
        ("mostly the opposite holds", "The opposite holds in most comparisons that show any"),
        ("the opposite holds", "The opposite holds wherever a difference can be seen"),
        ("cannot tell", "Cannot tell: the spread over the seeds hides what there may be"),
        ("not measured", "Not measured with two seeds or more"),
    )
    lines = []
    for said, words in order:
        if said in found:
            lines += [f"- **{words}:**", *found[said]]
    note = "Counted are comparisons: one for each place, guidance scale and headline metric."
    return "\n".join([*lines, "", note, ""])


def _overviews(done: pd.DataFrame) -> Iterator[str]:
    """One table per protocol: claims against places."""
    for protocol, rows in done.groupby("protocol", sort=False):
        metric = next((m for m in headlines(rows) if metric_of(m) == OVERVIEW), None)
        if metric is None:
            continue
        table: dict[str, dict[str, str]] = {}
        for claim in CLAIMS:
            fields: dict[str, list[str]] = {}
            for name, _, measured, verdict in claim_verdicts(claim, rows):
                if measured == metric:
                    fields.setdefault(name, []).append(_field(verdict))
            if fields:
                table[f"{_title(claim)} ({claim.source})"] = {
                    name.replace(f", {protocol}", ""): "\n".join(lines)
                    for name, lines in fields.items()
                }
        scales = [f"{cfg:g}" for cfg in rows.cfg.drop_duplicates()]
        guidances = f"The lines of a field are guidance {' and '.join(scales)}."
        yield f"## Overview, protocol {as_markdown(protocol)}\n"
        yield LEGEND.format(metric=metric, guidances=guidances)
        frame = pd.DataFrame.from_dict(table, orient="index")
        yield _markdown(frame.rename_axis("claim").reset_index()) + "\n"


def _field(verdict: Verdict) -> str:
    if verdict.kind == "unknown":
        return f"{SYMBOLS[verdict.kind]} {verdict.gain:+.2g}"
    return f"{SYMBOLS[verdict.kind]} {verdict.gain_and_margin(2, 1)}"


def _not_done(everything: pd.DataFrame) -> str:
    cells = everything.drop_duplicates("cell")
    bad = cells[cells.state != OK]
    if bad.empty:
        return ""
    counts = Counter(bad.state)
    states = as_markdown(", ".join(f"{count} {state}" for state, count in counts.items()))
    return f"**{len(bad)} of {len(cells)} cells have no number: {states}.**\n"


def _origins(everything: pd.DataFrame) -> str:
    """What was run where, a row for each experiment."""
    rows = []
    for (name,), group in _experiments(everything):
        cells = group.drop_duplicates("cell")
        done = cells[cells.state == OK]
        rows.append(
            {
                "place": name,
                "protocol": _listed(cells.protocol),
                "cells done": f"{len(done)} of {len(cells)}",
                "seeds": ", ".join(
                    f"{seed}: {count}" for seed, count in sorted(Counter(done.seed).items())
                ),
                "steps x images": f"{_listed(cells.steps)} x {_listed(cells.batch_size)}",
                "samples": _listed(cells.samples),
                "device": _counted(done.device),
                "torch": _counted(done.torch),
                "evaluator": _listed(done.evaluator),
            }
        )
    note = "Under seeds stands how many variants of each are done, under device how many cells.\n"
    return f"{note}\n{_markdown(pd.DataFrame(rows))}\n"


def _chance(done: pd.DataFrame) -> str:
    """The runs whose numbers say nothing of their mechanism."""
    lines = [
        f"- {as_markdown(f'{name}, guidance {cfg:g}: {line}')}"
        for (name, cfg), rows in _experiments(done, ["cfg"])
        for line in chance_lines(rows)
    ]
    return "\n".join(["**Runs at chance:**\n", *lines, ""]) if lines else ""


def _code(lines: Sequence[str]) -> str:
    text = "\n".join(lines)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}sh\n{text}\n{fence}\n"


def _devices(done: pd.DataFrame) -> str:
    """A warning where numbers that are compared come from different devices."""
    mixed = [
        as_markdown(f"{name} ({_counted(rows.drop_duplicates('cell').device)})")
        for (name,), rows in _experiments(done)
        if rows.device.nunique() > 1
    ]
    if not mixed:
        return ""
    return (
        f"**Cells of one place ran on different devices: {'; '.join(mixed)}.** Data, noise and "
        f"times are the same there, rounding is not: a seed's differences hold some of it.\n"
    )


def _listed(column: pd.Series) -> str:
    return ", ".join(map(str, column.drop_duplicates()))


def _counted(column: pd.Series) -> str:
    counts = Counter(column)
    if len(counts) == 1:
        return str(next(iter(counts)))
    return ", ".join(f"{value} {count}" for value, count in counts.items())


def _claim_section(claim: Claim, verdicts: Sequence[tuple[str, float, str, Verdict]]) -> str:
    said, tally = conclusion(claim, [verdict.kind for *_, verdict in verdicts])
    rows = pd.DataFrame(
        [
            (f"{name}, guidance {cfg:g}", metric, _field(verdict), verdict.seeds)
            for name, cfg, metric, verdict in verdicts
        ],
        columns=["place", "metric", "verdict", "seeds"],
    )
    wide = rows.pivot(index="place", columns="metric", values="verdict")
    wide = wide.loc[rows.place.unique(), rows.metric.unique()]
    wide.insert(0, "seeds", rows.groupby("place").seeds.max())
    summary = f"{_title(claim)} ({claim.source}): <b>{said}</b> ({tally})"
    return _folded(summary, _markdown(wide.reset_index()))


def _tables(done: pd.DataFrame) -> Iterator[str]:
    wanted = headlines(done)
    for (name, cfg), rows in _experiments(done, ["cfg"]):
        summary = summarise(rows)
        group = summary[summary.metric.isin(wanted)]
        digits = winner_digits(group, 3)
        group = group.assign(
            shown=[
                f"{mean:.{digits[metric]}g}" + (f" ± {std:.2g}" if std == std else "")
                for metric, mean, std in zip(
                    group.metric, group["mean"], group["std"], strict=True
                )
            ]
        )
        wide = group.pivot(index="variant", columns="metric", values="shown")
        wide = wide.loc[group.variant.unique(), [m for m in wanted if m in wide]]
        by_variant = rows.groupby("variant", sort=False)
        wide.insert(0, "seeds", by_variant.seed.nunique())
        wide.insert(1, "MMACs", (by_variant.macs.mean() / 1e6).map("{:.3g}".format))
        yield _folded(as_markdown(f"{name}, guidance {cfg:g}"), _markdown(wide.reset_index()))


def _folded(summary: str, table: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n{table}\n\n</details>\n"


def _markdown(frame: pd.DataFrame) -> str:
    def line(cells: Sequence[object]) -> str:
        shown = ("" if cell != cell or cell is None else as_markdown(cell) for cell in cells)
        return f"| {' | '.join(shown)} |"

    rule = "|" + "---|" * len(frame.columns)
    rows = [line(row) for row in frame.astype(object).values.tolist()]
    return "\n".join([line(list(frame.columns)), rule, *rows])


if __name__ == "__main__":
    run_script(main)
