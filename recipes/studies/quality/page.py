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
from recipes.lab.pages import markdown_table
from recipes.studies.comparison.planned import OK
from recipes.studies.comparison.statistics import LEVEL
from recipes.studies.comparison.verdicts import rounded_up
from recipes.studies.quality.decide import LOSS, Decision, decide, far_loss
from recipes.studies.quality.plans import PROTOCOLS, REFERENCE, RESOLUTION, STUDIES
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
    "type": "Does the attention type matter at this scale?",
    "convolution": "What does the convolution of the values do?",
    "parts": "DyDiLA's parts, on top of one another and each alone on its start.",
    "difference": "DyDiLA's difference of tokens against that of maps.",
    "linear": "Linear against softmax, by resolution.",
}
# What the short answer is about: the first words, and claims at one protocol, or a whole topic.
HEADLINES: Sequence[tuple[str, str, Sequence[tuple[str, str]] | str]] = (
    ("Linear attention alone", "depth", [("softmax", "sana")]),
    ("DyDiLA", "depth", [("dydila", "softmax")]),
    ("No attention at all", "depth", [("dydila", "conv")]),
    ("A convolution of the values", "depth", "convolution"),
    ("At equal time", "time", [("softmax", "sana"), ("dydila", "softmax")]),
)
NOT_YET = "not measured yet"
# Width and blocks of the smallest model that the claims are about, and of a rehearsal.
_FULL, _SMALL = "192x6", "96x4"
_SCALE = ["model", "steps", "batch", "learning_rate"]
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
    for study, runs in done.groupby("study"):
        # At equal MACs models differ, and at equal time steps.
        for alike, names in ((runs.loc[runs["protocol"] == "depth"], _SCALE), (runs, _SCALE[2:])):
            if len(scales := _unique(alike, names)) > 1:
                words = ", ".join(f"{name.replace('_', ' ')} {{}}" for name in names)
                named = " and ".join(words.format(*scale) for scale in scales)
                raise UserError(
                    f"the table has runs of {study!r} of {named}: make a page of each, since a "
                    f"line through both would show the scale"
                )
    decisions = decide(table, mixed)
    template = Path(__file__).with_name("page.md").read_text("utf-8")
    return string.Template(template).substitute(
        picture=picture,
        table=name,
        scale=_scale(done),
        short="\n".join([*_short_answer(decisions), *_by_fid(decisions, done)]),
        claims="\n\n".join(_main_table(decisions)),
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
    devices = " and ".join(device for (device,) in _unique(runs, ["device"]))
    models = runs.loc[runs["protocol"] != "MACs"].groupby(["data", "model"], sort=False)
    settings = "; ".join(
        f"{data} at {', '.join(map(str, sorted(rows['px'].unique())))} px, up to "
        f"{rows['seed'].nunique()} seeds of model {model}"
        for (data, model), rows in models
    )
    text = (
        f"{len(runs)} runs: {settings} (width x blocks); {_range(runs['steps'])} steps of "
        f"{_range(runs['batch'])} images at rate {_range(runs['learning_rate'])}; "
        f"on {devices}."
    )
    is_on_cpu = all(str(device).startswith("cpu") for device in runs["device"])
    is_small = is_on_cpu or {model for _, model in models.groups} == {_SMALL}
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


def _main_table(decisions: Sequence[Decision]) -> Iterator[str]:
    """The main claims against all settings that have any; and which settings have none."""
    rows: dict[tuple[str, str], dict[tuple[Any, ...], str]] = {}
    has_any: dict[tuple[Any, ...], bool] = {}
    for one in sorted(decisions, key=lambda one: list(TOPICS).index(one.claim.topic)):
        setting = one.study, one.protocol, one.data, one.px
        is_known = one.kind != "not measured"
        has_any[setting] = has_any.get(setting, False) or is_known
        if one.claim.is_main and is_known:
            rows.setdefault((one.claim.first, one.claim.second), {})[setting] = _short_field(one)

    def order(setting: tuple[Any, ...]) -> tuple[Any, ...]:
        study, protocol, data, px = setting
        return [*STUDIES].index(study), data, PROTOCOLS.index(protocol), px

    columns = [s for s in sorted(has_any, key=order) if any(s in row for row in rows.values())]
    if rows:
        titles = [f"{study}\n{data}, {px} px\nequal {protocol}"
                  for study, protocol, data, px in columns]  # fmt: skip
        body = [[f"{first} better than {second}", *(row.get(s, "") for s in columns)]
                for (first, second), row in rows.items()]  # fmt: skip
        yield markdown_table(["claim", *titles], body)
    parts = []
    for name, study in STUDIES.items():
        for protocol in study.protocols:
            known = {s[3] for s, has in has_any.items() if has and s[:2] == (name, protocol)}
            if missing := [f"{px}" for px in study.resolutions if px not in known]:
                parts.append(f"{name} at equal {protocol}, {', '.join(missing)} px")
    if parts:
        yield f"{NOT_YET.capitalize()}: {'; '.join(parts)}."


def _short_field(one: Decision) -> str:
    """ "✓ 1.2 % (5)"."""
    found = one.difference
    if one.failed:
        return f"{' and '.join(one.failed)} did not train"
    if found.pairs < 2:
        return "? (1)"
    symbol = {"holds": "✓", "opposite": "✗"}.get(one.kind)
    seen = f"{symbol} {_size(one)}" if symbol else f"< {rounded_up(found.bound_percent)}"
    return f"{seen} % ({found.pairs})"


def _size(one: Decision) -> str:
    return _number(abs(one.difference.percent)).lstrip("+")


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


def _short_answer(decisions: Sequence[Decision]) -> Iterator[str]:
    """A sentence for each of ``HEADLINES``."""
    for words, protocol, about in HEADLINES:
        own = [one for one in decisions if one.protocol == protocol]
        if isinstance(about, str):
            said = _tally([one for one in own if one.claim.topic == about])
        else:
            said = "; ".join(_across(p, [d for d in own if d.claim[1:3] == p]) for p in about)
        yield f"- **{words}**: {said}."


def _by_fid(decisions: Sequence[Decision], done: pd.DataFrame) -> Iterator[str]:
    """A sentence where FID, of few samples, orders two otherwise than the loss has decided."""
    if FID not in done:
        return
    means: dict[Any, float] = {
        place: own[FID].mean() for place, own in one_each(done).groupby([*SETTING, "variant"])
    }
    against, count = [], 0
    for one in decisions:
        if one.kind in ("holds", "opposite"):
            pair = one.claim[1:3] if one.kind == "holds" else one.claim[2:0:-1]
            place = tuple(getattr(one, name) for name in SETTING)
            better, worse = (means.get((*place, name), math.nan) for name in pair)
            count += not math.isnan(better - worse)
            if worse < better:
                against.append((better / worse, f"`{pair[1]}` before `{pair[0]}` at {one.px} px "
                                                f"({worse:.0f} and {better:.0f})"))  # fmt: skip
    if against:
        yield (f"- **{FID}** orders {len(against)} of {count} decided comparisons otherwise, "
               f"clearest {max(against)[1]}.")  # fmt: skip


def _across(pair: Sequence[str], decisions: Sequence[Decision]) -> str:
    """What one claim's settings say together."""
    names = [f"`{name}`" for name in pair]
    known = [one for one in decisions if one.kind != "not measured"]
    if not known:
        return f"{' against '.join(names)} is {NOT_YET}"
    parts = []
    for kind in ("holds", "opposite"):
        if own := [one for one in known if one.kind == kind]:
            better, worse = names if kind == "holds" else reversed(names)
            parts.append(f"{better} is better than {worse} by {_sizes(own)} {_places(own, known)}")
    if own := [one for one in known if one.kind == "undecided"]:
        bounds = [one.difference.bound_percent for one in own if one.difference.pairs > 1]
        said = f"undecided {_places(own, known)}"
        said += (
            f", the difference below {rounded_up(max(bounds))} %" if bounds else ", with 1 seed"
        )
        parts.append(said if parts else f"{' against '.join(names)} is {said}")
    if failed := dict.fromkeys(label for one in known for label in one.failed):
        parts.append(f"{' and '.join(f'`{label}`' for label in failed)} did not train")
    return ", ".join(parts)


def _sizes(decisions: Sequence[Decision]) -> str:
    """ "4.6 to 9.6 %"."""
    ordered = sorted(decisions, key=lambda one: abs(one.difference.percent))
    return " to ".join(dict.fromkeys(_size(one) for one in (ordered[0], ordered[-1]))) + " %"


def _places(own: Sequence[Decision], known: Sequence[Decision]) -> str:
    """ "at 32 to 128 px (3 of 4 settings)"."""
    sides = dict.fromkeys(str(px) for px in (min(d.px for d in own), max(d.px for d in own)))
    share = f" ({len(own)} of {len(known)} settings)" if len(known) > 1 else ""
    return f"at {' to '.join(sides)} px{share}"


def _topics(decisions: Sequence[Decision]) -> Iterator[str]:
    """A paragraph of at most three sentences for each question."""
    for topic, question in TOPICS.items():
        own = [d for d in decisions if d.claim.topic == topic and d.protocol == "depth"]
        yield f"**{question}** {_paragraph(own)}\n"
    yield f"**At equal time.** {_paragraph([d for d in decisions if d.protocol == 'time'])}\n"


def _paragraph(decisions: Sequence[Decision]) -> str:
    """What so many comparisons say together."""
    known = [one for one in decisions if one.kind != "not measured"]
    if not known:
        return f"{NOT_YET.capitalize()}."
    missing, is_one = len(decisions) - len(known), len(known) == 1
    sentences = []
    decided = [one for one in known if one.kind in ("holds", "opposite")]
    said = f"{len(decided)} of {len(known)} comparison{'' if is_one else 's'} "
    said += f"{'is' if is_one or len(decided) == 1 else 'are'} decided"
    if decided:
        said += f": {_largest(decided, decisions, 2)}"
    sentences.append(said)
    undecided = [one for one in known if one.kind == "undecided"]
    alone = [one for one in undecided if one.difference.p < LEVEL]
    rest = [one.difference for one in undecided if one not in alone]
    parts = []
    if alone:
        parts.append(f"{len(alone)} by the correction alone "
                     f"({_largest(alone, decisions, 1)})")  # fmt: skip
    if bounds := [found.bound_percent for found in rest if found.pairs > 1]:
        parts.append(f"{len(bounds)} with a difference below {rounded_up(max(bounds))} %")
    if len(rest) > len(bounds):
        parts.append(f"{len(rest) - len(bounds)} with 1 seed")
    if parts:
        sentences.append(f"Undecided: {', '.join(parts)}")
    others = _untrained(known)
    if missing:
        others.append(f"{missing} more {'is' if missing == 1 else 'are'} {NOT_YET}")
    if others:
        sentences.append("; ".join(others))
    return " ".join(f"{said}." for said in sentences)


def _untrained(decisions: Sequence[Decision]) -> list[str]:
    labels = dict.fromkeys(label for one in decisions for label in one.failed)
    count = sum(bool(one.failed) for one in decisions)
    names = " and ".join(f"`{label}`" for label in labels)
    return [f"{count} not decided as {names} did not train"] if labels else []


def _tally(decisions: Sequence[Decision]) -> str:
    """How many comparisons are decided, and for which."""
    known = [one for one in decisions if one.kind != "not measured"]
    if not known:
        return NOT_YET
    parts = []
    for kind, said in (("holds", "better"), ("opposite", "worse")):
        if own := [one for one in known if one.kind == kind]:
            parts.append(f"{said} in {len(own)}, by {_sizes(own)}")
    if count := sum(one.kind == "undecided" for one in known):
        parts.append(f"undecided in {count}")
    of = "comparison" if len(known) == 1 else "comparisons"
    return f"of {len(known)} {of} {'; '.join([*parts, *_untrained(known)])}"


def _largest(decisions: Sequence[Decision], among: Sequence[Decision], most: int) -> str:
    """ "`softmax` before `sana` by 4.6 % at 32 px, 9.6 % at 128 px; ..."."""
    pairs: dict[tuple[str, str], list[Decision]] = {}
    for one in sorted(decisions, key=lambda one: -abs(one.difference.percent)):
        claim = one.claim
        is_first = one.difference.mean < 0
        names = (claim.first, claim.second) if is_first else (claim.second, claim.first)
        pairs.setdefault(names, []).append(one)
    is_of_one_side = len({one.px for one in among}) == 1
    said, rest = [], sum(map(len, [*pairs.values()][most:]))
    for (better, worse), own in list(pairs.items())[:most]:
        sizes = [f"{_size(one)} %" + f" at {one.px} px" * (not is_of_one_side)
                 for one in sorted(own, key=lambda one: one.px)]  # fmt: skip
        said.append(f"`{better}` before `{worse}` by {', '.join(sizes)}")
    return "; ".join(said) + (f"; {rest} more" if rest else "")


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
        body, images = [], _images(rows["held_out"].iloc[0], rows["images"].iloc[0])
        for variant, own in rows.groupby("variant", sort=False):
            shown = [_mean(own[c]) for c in (*NUMBERS, *metrics)]
            body.append([
                variant, own["seed"].nunique(), own["model"].iloc[0], _range(own["steps"]),
                f"{own['macs'].mean() / 1e6:.4g}",
                f"{1e3 * own['step_seconds'].mean():.3g}".replace("nan", ""),  # not measured
                *shown,
            ])  # fmt: skip
        heading = ["variant", "seeds", "model", "steps", "MMACs", "ms a step", "held-out loss",
                   "of the model", *NUMBERS[2:-1], "training loss", *metrics]  # fmt: skip
        named = dict(zip(SETTING, cast(tuple, setting), strict=True))
        title = f"{group_name(named)}, {named['data']}, held-out images: {images}"
        yield f"{title}\n\n{markdown_table(heading, body)}"


def _images(count: int, split: str) -> str:
    """How many, and of which split of the data; versions before noted neither."""
    return (f"{count:,}" if count else "not noted") + (f" of {split}" if split else "")


def _mean(values: pd.Series) -> str:
    if values.notna().sum() == 0:
        return ""
    spread = values.std() if values.abs().max() < math.inf else math.nan
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
            ", ".join(_images(*one) for one in _unique(done, ["held_out", "images"])),
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
        return "Every run of the table has numbers."
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
    lost = ~(done[LOSS] <= done.groupby("px")[LOSS].transform(far_loss))
    done = done.loc[~lost.groupby([done["px"], done["variant"]]).transform("any")]
    keys = ["px", "seed", *MEASURE]
    softmax = done.loc[done["variant"] == REFERENCE].drop_duplicates(keys).set_index(keys)[LOSS]
    of_softmax = [
        softmax.get(key, math.nan) for key in done[keys].itertuples(index=False, name=None)
    ]
    reference = pd.Series(of_softmax, done.index, dtype=float)
    shown = done.assign(percent=100 * (done[LOSS] / reference - 1))
    figure, axes = panels(1, 2, 6.4, 4.6)
    sides = sorted(done["tokens"].unique())
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
