"""A page on which of the paper's orderings hold in comparisons of one's own.

Its words stand in results_page.md beside this file; everything else comes from the tables of
comparisons.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd

from recipes.lab.console import UserError, argument, one_line
from recipes.lab.evaluation.scores import metric_of
from recipes.lab.pages import markdown_table, markdown_text
from recipes.studies.comparison.planned import OK, known_as
from recipes.studies.comparison.statistics import CONFIDENCE
from recipes.studies.comparison.summary import (
    SETTING,
    chance_lines,
    grouped_by,
    headlines,
    means_table,
    scaled_mean,
    setting_name,
)
from recipes.studies.comparison.tables import TEXTS, WHOLE, read_table
from recipes.studies.comparison.verdicts import Verdict, compare_variants
from recipes.studies.dydila.paper import CLAIMS, PRESETS, Claim, paper_rows

# Of the overview: every setting has it, and its bias does not depend on the number of samples.
OVERVIEW = "KID"
# Numbers compare within one experiment only.
EXPERIMENT = {"steps": "steps", "batch_size": "images a step", "samples": "samples"}
SYMBOLS = {"better": "✓", "worse": "✗", "same": "~", "unknown": "·"}
NOT_RECORDED = "not recorded"
NEEDED = ["run", "cfg", "macs", "seed", "state", "variant", *SETTING, "steps", "batch_size"]

Conclusion = Literal[
    "not measured", "cannot tell", "holds", "mostly holds", "the opposite holds",
    "mostly the opposite holds", "mixed", "no difference seen", "a difference is seen",
]  # fmt: skip
CONCLUSIONS: dict[Conclusion, str] = {
    "holds": "Holds wherever a difference can be seen",
    "mostly holds": "Holds in most comparisons where a difference can be seen",
    "no difference seen": "Said to be equal, and no difference can be seen",
    "mixed": "Holds in some comparisons, the opposite in others",
    "a difference is seen": "Said to be equal, but a difference can be seen",
    "mostly the opposite holds": "The opposite holds in most comparisons that show any",
    "the opposite holds": "The opposite holds wherever a difference can be seen",
    "cannot tell": "Cannot tell: the spread over the seeds hides what there may be",
    "not measured": "Not measured with two seeds or more",
}


class Tested(NamedTuple):
    """A claim in one metric, at one guidance scale of one experiment."""

    experiment: str
    cfg: float
    metric: str
    verdict: Verdict


def results_page(folders: Sequence[Path]) -> str:
    """The page, in Markdown.

    Args:
        folders: Of comparisons.

    Raises:
        UserError: A folder holds no comparison, or nothing in them is done.
    """
    everything, commands = _read(folders)
    done = everything.loc[everything["state"] == OK]
    if done.empty:
        raise UserError(f"no run of {', '.join(map(str, folders))} is done yet")
    tables = ("table1-S", "table4", "table5", "table6")
    from_paper = [variant for table in tables for variant in PRESETS[table].variants]
    commands.append(f"python recipes/results.py {' '.join(map(argument, folders))}")
    tested = {claim: tested_claim(claim, done) for claim in CLAIMS}
    template = Path(__file__).with_name("results_page.md").read_text("utf-8")
    return string.Template(template).substitute(
        in_short=_in_short(tested),
        overviews="\n".join(_overviews(done)),
        not_done=_not_done(everything),
        origins=_table(pd.DataFrame(_origins(everything))),
        devices=_devices(done),
        chance=_chance(done),
        commands=_code(commands),
        claims="\n".join(_claim_section(claim, found) for claim, found in tested.items() if found),
        numbers="\n".join(_numbers(done)),
        paper=_table(paper_rows(from_paper)),
    )


def _read(folders: Sequence[Path]) -> tuple[pd.DataFrame, list[str]]:
    frames, commands = [], []
    for folder in folders:
        try:
            frames.append(_runs(known_as(folder, "runs.csv")))
            command = (folder / "command.txt").read_bytes().decode("utf-8", "backslashreplace")
        except OSError as error:
            raise UserError(
                f"{folder / 'command.txt'} cannot be read: {error.strerror}"
            ) from error
        except UserError as error:
            raise UserError(
                f"{folder} holds no comparison ({error}); make one with "
                f"python recipes/compare.py --preset results --out {argument(folder)}"
            ) from error
        commands.append(one_line(command.strip()))
    found = pd.concat(frames, ignore_index=True)
    for column in ("device", "torch", "evaluator", "samples"):
        if column not in found:  # written by an earlier version
            found[column] = None
        known = found[column].notna() & (found[column] != "")
        found[column] = found[column].astype(object).where(known, NOT_RECORDED)
    # Two comparisons may share runs; one that is done speaks for both.
    found = found.sort_values("state", key=lambda state: state != OK, kind="stable")
    is_double = found.duplicated(["run", "cfg"]) | (
        (found["state"] != OK) & found["run"].isin(found["run"][found["state"] == OK])
    )
    return found.loc[~is_double].sort_index(), commands


def _runs(file: Path) -> pd.DataFrame:
    frame = read_table(file)
    if missing := [name for name in NEEDED if name not in frame]:
        raise UserError(f"table {str(file)!r} has no column {missing[0]!r}")
    done = frame.loc[frame["state"] == OK]
    for name in (name for name in NEEDED if name not in TEXTS):
        if pd.isna(done[name]).any() or (name in WHOLE and frame[name].dtype != int):
            raise UserError(f"table {str(file)!r} is damaged: column {name!r} lacks a number")
    return frame


def _experiments(done: pd.DataFrame, *keys: str) -> Iterator[tuple[Any, pd.DataFrame]]:
    """(name, rows) of every experiment, and of every value of more keys within it."""
    varying = [key for key in EXPERIMENT if done[key].nunique() > 1]
    for values, rows in grouped_by(done, [*SETTING, *EXPERIMENT, *keys]):
        extra = [f"{rows[key].iloc[0]} {EXPERIMENT[key]}" for key in varying]
        name = ", ".join([setting_name(values[: len(SETTING)]), *extra])
        yield (name, *values[len(SETTING) + len(EXPERIMENT) :]), rows


def tested_claim(claim: Claim, done: pd.DataFrame) -> list[Tested]:
    """The verdicts wherever both variants of a claim were measured."""
    found = []
    for (name, cfg), rows in _experiments(done, "cfg"):
        for metric in headlines(rows):
            verdict = compare_variants(rows, claim.better, claim.worse, metric)
            if verdict.seeds:
                found.append(Tested(name, cfg, metric, verdict))
    return found


def conclusion(claim: Claim, kinds: Iterable[str]) -> tuple[Conclusion, str]:
    """What the verdicts on a claim say together, and how many say what."""
    count = Counter(kinds)
    better, worse, same = count["better"], count["worse"], count["same"]
    total = better + worse + same
    tally = f"{better} for {claim.better}, {worse} for {claim.worse}, {same} cannot tell"
    # Twice what ties give, because one odd seed shows in several metrics.
    chance = 2 * (1 - CONFIDENCE) * total
    if not total:
        return "not measured", "no setting has two seeds"
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


def _in_short(tested: Mapping[Claim, Sequence[Tested]]) -> str:
    """The claims by what has come of them, in words."""
    found: dict[str, list[str]] = {}
    for claim, of_claim in tested.items():
        concluded, tally = conclusion(claim, (one.verdict.kind for one in of_claim))
        found.setdefault(concluded, []).append(f"  - {claim.title}: {tally}")
    return "\n".join(
        "\n".join([f"- **{words}:**", *found[concluded]])
        for concluded, words in CONCLUSIONS.items()
        if concluded in found
    )


def _overviews(done: pd.DataFrame) -> Iterator[str]:
    """One table per protocol: claims against settings."""
    for (protocol,), rows in grouped_by(done, ["protocol"]):
        metric = next((m for m in headlines(rows) if metric_of(m) == OVERVIEW), None)
        if metric is None:
            continue
        table: dict[str, dict[str, str]] = {}
        for claim in CLAIMS:
            for one in tested_claim(claim, rows):
                if one.metric == metric:
                    row = table.setdefault(claim.title, {})
                    name = one.experiment.replace(f", {protocol}", "")
                    row[name] = "\n".join(filter(None, [row.get(name), _field(one.verdict)]))
        scales = " and ".join(f"{cfg:g}" for cfg in rows["cfg"].drop_duplicates())
        frame = pd.DataFrame.from_dict(table, orient="index").rename_axis("claim")
        yield (
            f"## Overview, protocol {markdown_text(protocol)}\n\n"
            f"Gain in {metric}. The lines of a field are guidance {scales}.\n\n"
            f"{_table(frame.reset_index())}\n"
        )


def _field(verdict: Verdict) -> str:
    known = verdict.kind != "unknown"
    number = verdict.gain_and_margin(2, 1) if known else f"{verdict.gain:+.2g}"
    return f"{SYMBOLS[verdict.kind]} {number}"


def _not_done(everything: pd.DataFrame) -> str:
    states = everything.drop_duplicates("run")["state"]
    bad = Counter(states[states != OK])
    if not bad:
        return ""
    shown = markdown_text(", ".join(f"{count} {state}" for state, count in bad.items()))
    return f"**{bad.total()} of {len(states)} runs have no number: {shown}.**\n\n"


def _origins(everything: pd.DataFrame) -> Iterator[dict[str, str]]:
    """What was run where, a row for each experiment."""
    for (name,), group in _experiments(everything):
        runs = group.drop_duplicates("run")
        done = runs.loc[runs["state"] == OK]
        seeds = sorted(Counter(done["seed"]).items())
        yield {
            "setting": name,
            "protocol": _listed(runs["protocol"]),
            "runs done": f"{len(done)} of {len(runs)}",
            "seeds": ", ".join(f"{seed}: {count}" for seed, count in seeds),
            "steps x images": f"{_listed(runs['steps'])} x {_listed(runs['batch_size'])}",
            "samples": _listed(runs["samples"]),
            "device": _counted(done["device"]),
            "torch": _counted(done["torch"]),
            "evaluator": _listed(done["evaluator"]),
        }


def _listed(column: Iterable[Any]) -> str:
    return ", ".join(map(str, dict.fromkeys(column)))


def _counted(column: Iterable[Any]) -> str:
    counts = Counter(column)
    if len(counts) == 1:
        return str(next(iter(counts)))
    return ", ".join(f"{value} {count}" for value, count in counts.items())


def _devices(done: pd.DataFrame) -> str:
    """A warning where numbers that are compared come from different devices."""
    mixed = [
        markdown_text(f"{name} ({_counted(rows.drop_duplicates('run')['device'])})")
        for (name,), rows in _experiments(done)
        if rows["device"].nunique() > 1
    ]
    if not mixed:
        return ""
    return (
        f"**Runs of one setting were made on different devices: {'; '.join(mixed)}.** Data, noise "
        f"and times are the same there, rounding is not: a seed's differences hold some of it.\n\n"
    )


def _chance(done: pd.DataFrame) -> str:
    """The runs whose numbers say nothing of their mechanism."""
    lines = [
        f"- {markdown_text(f'{name}, guidance {cfg:g}: {line}')}"
        for (name, cfg), rows in _experiments(done, "cfg")
        for line in chance_lines(rows)
    ]
    return "\n".join(["**Runs at chance:**\n", *lines, "\n"]) if lines else ""


def _code(lines: Sequence[str]) -> str:
    text = "\n".join(lines)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}sh\n{text}\n{fence}\n"


def _claim_section(claim: Claim, tested: Sequence[Tested]) -> str:
    table: dict[str, dict[str, Any]] = {}
    for one in tested:
        row = table.setdefault(f"{one.experiment}, guidance {one.cfg:g}", {"seeds": 0})
        row["seeds"] = max(row["seeds"], one.verdict.seeds)
        row[one.metric] = _field(one.verdict)
    frame = pd.DataFrame.from_dict(table, orient="index").rename_axis("setting")
    frame = frame.loc[:, ["seeds", *dict.fromkeys(one.metric for one in tested)]]
    concluded, tally = conclusion(claim, (one.verdict.kind for one in tested))
    return _folded(f"{claim.title}: <b>{concluded}</b> ({tally})", frame)


def _numbers(done: pd.DataFrame) -> Iterator[str]:
    metrics = headlines(done)
    for (name, cfg), rows in _experiments(done, "cfg"):
        table = means_table(rows, metrics, 3)
        table.insert(0, "seeds", rows.groupby("variant")["seed"].nunique())
        table.insert(1, "MMACs", scaled_mean(rows, "macs", 1e-6))
        yield _folded(markdown_text(f"{name}, guidance {cfg:g}"), table.rename_axis("variant"))


def _folded(summary: str, frame: pd.DataFrame) -> str:
    table = _table(frame.reset_index())
    return f"<details><summary>{summary}</summary>\n\n{table}\n\n</details>\n"


def _table(frame: pd.DataFrame) -> str:
    return markdown_table(frame.columns, frame.astype(object).values.tolist())
