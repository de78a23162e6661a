"""The page docs/results.md and its picture, from a table of runs; its words stand in page.md."""

from __future__ import annotations

import math
import string
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pandas as pd

from recipes.lab.console import UserError
from recipes.lab.drawing.canvas import Figure, panels, plain
from recipes.lab.drawing.palette import color_of, marker_of
from recipes.lab.evaluation.scores import metric_of
from recipes.lab.pages import markdown_table, markdown_text
from recipes.studies.comparison.planned import OK
from recipes.studies.comparison.statistics import LEVEL
from recipes.studies.comparison.verdicts import rounded_up
from recipes.studies.quality.decide import LOSS, Decision, decide
from recipes.studies.quality.plans import REFERENCE, RESOLUTION, STUDIES
from recipes.studies.quality.table import (
    KEY,
    MEASURE,
    METRICS,
    NUMBERS,
    SETTING,
    change_at_end,
    curve_of,
    group_name,
    one_each,
)

TOPICS = {
    "type": ("Does the attention type matter at this scale?",
             "Mixing against a convolution alone, and one kind of attention against another."),
    "convolution": ("What does the convolution of the values do?",
                    "Each mechanism with it against the same one without it, softmax too."),
    "parts": ("DyDiLA's parts", "Its steps on top of one another, and each alone on its start."),
    "difference": ("Token-wise against map-wise", "DyDiLA's difference of tokens against that of "
                   "attention maps."),
    "linear": ("Linear against softmax, by resolution", "The claim is that softmax, or a mixture "
               "with it, is the better one."),
}  # fmt: skip
NOT_YET = "not measured yet"
# A study of this many blocks and channels is what the claims are about; smaller is a rehearsal.
_FULL = "192x6"
FID = "FID[efflite0]"


def results_page(table: pd.DataFrame, picture: str, name: str, mixed: bool = False) -> str:
    """The page, in Markdown.

    Args:
        table: See ``table.read``.
        picture: Its path, as the page names it.
        name: The table's, likewise.
        mixed: Whether pairs of two devices or versions of torch count too.

    Raises:
        UserError: No run of the table is done, or a study's runs are of two scales.
    """
    done = table.loc[(table["state"] == OK) & table[LOSS].notna()]
    if done.empty:
        raise UserError("no run of the table is done yet: go on with python recipes/study.py")
    for study, runs in done.loc[done["protocol"] == "depth"].groupby("study"):
        if len(scales := _unique(runs, ["model", "steps", "batch"])) > 1:
            named = " and ".join("model {}, {} steps of {} images".format(*s) for s in scales)
            raise UserError(f"the table has runs of {study!r} of {named}: make a page of each, "
                            f"since a line through both would show the scale")  # fmt: skip
    decisions = decide(table, mixed)
    template = Path(__file__).with_name("page.md").read_text("utf-8")
    return string.Template(template).substitute(
        picture=picture,
        table=name,
        scale=_scale(done),
        claims="\n\n".join(_main_tables(decisions)),
        topics="\n".join(_topics(decisions)),
        flatness=_flatness(done) + _split(done),
        all_claims=_all_claims(decisions),
        numbers="\n\n".join(_numbers(done)),
        origins=_origins(table),
        left=_left(table),
    )


def _scale(done: pd.DataFrame) -> str:
    """How large what was measured is, and what it is too small for."""
    runs = done.drop_duplicates(["run", *MEASURE])
    devices = ", ".join(f"{d} (torch {t})" for d, t in _unique(runs, ["device", "torch"]))
    settings = "; ".join(
        f"{data} at {', '.join(map(str, sorted(rows['px'].unique())))} px with up "
        f"to {rows['seed'].nunique()} seeds"
        for data, rows in runs.groupby("data", sort=False)
    )
    models = sorted(runs.loc[runs["protocol"] != "MACs", "model"].unique())
    text = (
        f"{len(runs)} runs, {settings}; model "
        f"{', '.join(models)} (width x blocks), {_range(runs['steps'])} steps of "
        f"{_range(runs['batch'])} images; on {devices}, {runs['wall_seconds'].sum() / 60:.0f} "
        f"minutes of runs in all."
    )
    is_small = _FULL not in models or all(str(d).startswith("cpu") for d in runs["device"])
    if is_small:
        text += (
            f"\n\n**This is a rehearsal at a scale of minutes on a CPU. What only the studies "
            f"proper can decide, of model {_FULL} at 32 to 256 px on a GPU, says here "
            f'"{NOT_YET}".** Nothing here should be carried over to larger models or images.'
        )
    return text


def _unique(rows: pd.DataFrame, names: Sequence[str]) -> list[tuple[Any, ...]]:
    return list(rows[list(names)].drop_duplicates().itertuples(index=False, name=None))


def _range(values: Iterable[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _main_tables(decisions: Sequence[Decision]) -> Iterator[str]:
    """Per study: claims against settings; resolutions at equal depth only."""
    for study in STUDIES.values():
        own = [one for one in decisions if one.study == study.name and one.claim.is_main]
        is_by_side = len(study.resolutions) > 1
        if is_by_side:
            own = [one for one in own if one.protocol == "depth"]
        rows: dict[str, dict[str, str]] = {}
        columns = dict.fromkeys(
            f"{side} px" if is_by_side else f"equal {protocol}"
            for protocol in (study.protocols if not is_by_side else ("depth",))
            for side in study.resolutions
        )
        for one in own:
            row = rows.setdefault(f"{one.claim.first} better than {one.claim.second}", {})
            key = f"{one.px} px" if is_by_side else f"equal {one.protocol}"
            columns.setdefault(key)
            row[key] = field(one)
        if all(text == NOT_YET for row in rows.values() for text in row.values()):
            yield f"Of the study `{study.name}`: {NOT_YET}."
            continue
        order = sorted(columns, key=_side) if is_by_side else list(columns)
        empty = [k for k in order if all(row.get(k, NOT_YET) == NOT_YET for row in rows.values())]
        order = [key for key in order if key not in empty]
        heading = [f"{study.name}: claim", *order]
        body = [[claim, *(row.get(key, NOT_YET) for key in order)] for claim, row in rows.items()]
        yield markdown_table(heading, body)
        if empty:
            yield f"Of the study `{study.name}` {NOT_YET}: {', '.join(empty)}."


def _side(column: str) -> int:
    return int(column.split()[0])


def field(one: Decision) -> str:
    """ "✓ -1.2 % [-1.6, -0.8], 5 seeds"."""
    found = one.difference
    if one.kind == "not measured":
        return NOT_YET
    if one.failed:
        return f"{' and '.join(one.failed)} did not train, {found.pairs} seeds"
    if found.pairs < 2:
        return f"{found.percent:+.2g} %, 1 seed: nothing can be said"
    low, high = (_percent(found.mean + sign * found.margin, found.scale) for sign in (-1, 1))
    seen = f"{_number(found.percent)} % [{_number(low)}, {_number(high)}], {found.pairs} seeds"
    symbol = {"holds": "✓ ", "opposite": "✗ "}.get(one.kind, "")
    return f"{symbol}{seen}" if symbol else f"below {rounded_up(found.bound_percent)} %: {seen}"


def _percent(value: float, scale: float) -> float:
    return 100 * value / abs(scale) if scale else math.nan


def _number(value: float) -> str:
    return f"{value:+.2g}" if abs(value) < 100 else f"{value:+.0f}"


def _topics(decisions: Sequence[Decision]) -> Iterator[str]:
    """A paragraph for each question."""
    for topic, (question, words) in TOPICS.items():
        own = [one for one in decisions if one.claim.topic == topic]
        parts = [f"{words} {_count([d for d in own if d.protocol == 'depth'])}"]
        if topic == "linear":
            sides = sorted({*RESOLUTION.resolutions} | {one.px for one in own})
            parts = [words] + [
                f"{side} px: {_count([d for d in own if d.protocol == 'depth' and d.px == side])}"
                for side in sides
            ]
        yield f"**{question}** {' '.join(parts)}\n"
    timed = [one for one in decisions if one.protocol == "time"]
    yield f"**At equal time.** All claims again, by seconds of training. {_count(timed)}\n"


def _count(decisions: Sequence[Decision]) -> str:
    """What so many comparisons say together, in a sentence or two."""
    by_kind: dict[str, list[Decision]] = {}
    for one in decisions:
        by_kind.setdefault(one.kind, []).append(one)
    known = [one for one in decisions if one.kind != "not measured"]
    if not known:
        return f"{NOT_YET.capitalize()}."
    is_of_one_side = len({one.px for one in decisions}) == 1

    def strongest(ones: Sequence[Decision]) -> str:
        most = sorted(ones, key=lambda one: -abs(one.difference.percent))[:3]
        return "; ".join(_named(one) + (f" at {one.px} px" * (not is_of_one_side)) for one in most)

    parts = []
    for kind, words in (("holds", "the first is better in"), ("opposite", "the second in")):
        if own := by_kind.get(kind, []):
            parts.append(f"{words} {len(own)} ({strongest(own)})")
    open_ones = by_kind.get("undecided", [])
    if alone := [one for one in open_ones if one.difference.p < LEVEL]:
        parts.append(f"{len(alone)} would be decided but for the correction ({strongest(alone)})")
    rest = [one.difference for one in open_ones if one not in alone]
    if bounds := [found.bound_percent for found in rest if found.pairs > 1]:
        which = "is undecided, a difference" if len(bounds) == 1 else "are undecided, differences"
        parts.append(f"{len(bounds)} {which} below {rounded_up(max(bounds))} %")
    if len(rest) > len(bounds):
        parts.append(f"{len(rest) - len(bounds)} with one seed")
    failed = dict.fromkeys(label for one in by_kind.get("not trained", []) for label in one.failed)
    if failed:
        count = len(by_kind["not trained"])
        names = markdown_text(" and ".join(failed))
        parts.append(f"{count} not decided as {names} did not train")
    text = f"Of {len(known)} {'comparison' if len(known) == 1 else 'comparisons'} "
    text += f"{', '.join(parts)}."
    missing = len(decisions) - len(known)
    return text + (f" {missing} more {NOT_YET}." if missing else "")


def _named(one: Decision) -> str:
    claim = one.claim
    better, worse = (claim.first, claim.second)[:: 1 if one.difference.mean < 0 else -1]
    return markdown_text(f"{better} before {worse} by {abs(one.difference.percent):.2g} %")


def _flatness(done: pd.DataFrame) -> str:
    """How far the curves have flattened."""
    changes = pd.Series([100 * change_at_end(curve_of(c)) for c in done["curve"]], done.index)
    parts = [
        f"{px} px {rows.median():+.1f} % (from {rows.min():+.1f} to {rows.max():+.1f})"
        for px, rows in changes.dropna().groupby(done["px"])
    ]
    shown = ", ".join(parts) or NOT_YET
    return (
        f"**Have the curves flattened?** Over the last fifth of the steps, in which the learning "
        f"rate falls to 0, the held-out loss of the median run still changed by: {shown}."
    )


def _split(done: pd.DataFrame) -> str:
    """What was wrong with the held-out images of tables that do not say which they were."""
    if not ((done["images"] == "") & done["data"].str.startswith("emoji")).any():
        return ""
    return (
        "\n\n**Near copies.** Runs that do not say what their images were had an earlier split of "
        "the emoji: of 119 of its 1,235 test images (25 of Fluent's 395) a variant was trained "
        "on, such as the same person blond, facing right, or a couple of other genders. All "
        "mechanisms met the same."
    )


def _all_claims(decisions: Sequence[Decision]) -> str:
    rows = []
    for one in decisions:
        found = one.difference
        setting = {"study": one.study, "protocol": one.protocol, "px": one.px}
        rows.append([
            f"{one.claim.first} better than {one.claim.second}", group_name(setting), one.kind,
            field(one), f"{one.p:.2g}" if one.p == one.p else "",
            f"{100 * one.saved:+.0f} %" if one.saved == one.saved else "",
            "" if one.needed != one.needed or found.pairs < 2
            else "too many" if math.isinf(one.needed) else f"{one.needed:.0f}",
            one.foreign or "",
        ])  # fmt: skip
    heading = ["claim", "setting", "decided", "difference", "p, corrected", "steps saved",
               "seeds that would decide", "pairs left out: not measured alike"]  # fmt: skip
    return markdown_table(heading, rows)


def _numbers(done: pd.DataFrame) -> Iterator[str]:
    metrics = [c for c in done.columns if metric_of(c) in METRICS and done[c].notna().any()]
    for setting, rows in one_each(done).groupby(SETTING, sort=False):
        body, images = [], rows["held_out"].iloc[0]
        for variant, own in rows.groupby("variant", sort=False):
            shown = [_mean(own[c]) for c in (*NUMBERS, *metrics)]
            body.append([
                variant, own["seed"].nunique(), own["model"].iloc[0], _range(own["steps"]),
                f"{own['macs'].mean() / 1e6:.4g}", f"{1e3 * own['step_seconds'].mean():.3g}",
                *shown,
            ])  # fmt: skip
        heading = ["variant", "seeds", "model", "steps", "MMACs", "ms a step", "held-out loss",
                   "of the model", *NUMBERS[2:-1], "training loss", *metrics]  # fmt: skip
        named = dict(zip(SETTING, cast(tuple, setting), strict=True))
        title = f"{group_name(named)}, {named['data']}, held-out images: {_images(images)}"
        yield f"{title}\n\n{markdown_table(heading, body)}"


def _images(count: int) -> str:
    return f"{count:,}" if count else "not noted"  # by versions before it was


def _mean(values: pd.Series) -> str:
    if values.notna().sum() == 0:
        return ""
    spread = values.std()
    return f"{values.mean():.4g}" + (f" ± {spread:.2g}" if spread == spread else "")


def _origins(table: pd.DataFrame) -> str:
    rows = []
    for setting, own in table.groupby(SETTING, sort=False):
        done, planned = own.loc[own["state"] == OK], own.drop_duplicates(KEY)
        named = dict(zip(SETTING, cast(tuple, setting), strict=True))
        machines = _unique(done, ["device", "torch"])
        rows.append([
            group_name(named), named["data"], f"{done['run'].nunique()} of {len(planned)}",
            ", ".join(sorted(own["arithmetic"].unique())),
            ", ".join(f"{device}, torch {version}" for device, version in machines),
            ", ".join(_images(count) for (count,) in _unique(done, ["held_out"])),
            int(done["elsewhere"].fillna(0).sum()),
            f"{done['wall_seconds'].sum() / 60:.1f}",
        ])  # fmt: skip
    heading = ["setting", "data", "runs done", "arithmetic", "machine", "held-out images",
               "resumed elsewhere",
               "minutes"]  # fmt: skip
    return markdown_table(heading, rows)


def _left(table: pd.DataFrame) -> str:
    bad = table.loc[table["state"] != OK]
    if bad.empty:
        return "Every planned run has numbers."
    groups = bad.groupby([*SETTING, "variant", "state"], sort=False)
    rows = [
        [group_name(dict(zip(SETTING, key[:4], strict=True))), key[4], key[5], len(own),
         own["error"].iloc[0]]
        for key, own in groups
    ]  # fmt: skip
    return markdown_table(["setting", "variant", "state", "runs", "why"], rows)


def picture(table: pd.DataFrame) -> Figure:
    """Held-out loss against softmax's, and FID, by tokens; seeds as bands."""
    done: Any = one_each(table.loc[
        (table["state"] == OK) & (table["study"] == RESOLUTION.name)
        & (table["protocol"] == "depth")
    ])  # fmt: skip
    keys = ["px", "seed", *MEASURE]
    softmax = done.loc[done["variant"] == REFERENCE].drop_duplicates(keys).set_index(keys)[LOSS]
    of_softmax = [
        softmax.get(key, math.nan) for key in done[keys].itertuples(index=False, name=None)
    ]
    reference = pd.Series(of_softmax, done.index, dtype=float)
    shown = done.assign(percent=100 * (done[LOSS] / reference - 1))
    figure, axes = panels(1, 2, 6.4, 4.6)
    sides = sorted(done["tokens"].unique())
    # Of several resolutions, variants of one alone would be a heap of points in a corner.
    sizes = shown.groupby("variant")["tokens"].transform("nunique")
    shown = shown.loc[sizes > 1] if (sizes > 1).any() else shown
    for axis, column, title in (
        (axes[0, 0], "percent", "held-out loss, % above softmax's; lower is better"),
        (axes[0, 1], FID, f"{FID}; lower is better"),
    ):
        known = column in shown and shown[column].notna().any()
        if not known:
            axis.text(0.5, 0.5, NOT_YET, ha="center", va="center", transform=axis.transAxes)
            axis.set_yticks([])
        for variant, rows in shown.groupby("variant", sort=False) if known else ():
            values = rows.groupby("tokens")[column]
            mean, low, high = values.mean(), values.min(), values.max()
            color, is_other = color_of(_mechanism(variant)), "," in str(variant)
            axis.plot(
                mean.index, mean, "--" if is_other else "-", marker=marker_of(_mechanism(variant)),
                color=color, lw=1.6, markerfacecolor="white" if is_other else color,
                label=plain(str(variant)),
            )  # fmt: skip
            axis.fill_between(mean.index, low, high, color=color, alpha=0.15, lw=0)
            axis.vlines(mean.index, low, high, color=color, alpha=0.5)
        axis.set(xlabel="tokens", title=title)
        if sides:
            axis.set_xscale("log", base=2)
            axis.set_xticks(sides, [f"{side}" for side in sides])
            axis.minorticks_off()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    return figure


def _mechanism(label: Any) -> str:
    """ "softmax, conv" has softmax's color."""
    return str(label).partition(",")[0]
