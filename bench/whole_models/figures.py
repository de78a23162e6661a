"""What the files of ``bench.whole_models`` say: figures against their goals, and tables."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from attnzoo.command.fits import first_faster
from bench.cases import PIXELS_PER_TOKEN
from bench.reports import read, where
from bench.results import NUMBER, TEXT, Foreign, require_shape
from bench.thresholds import HEADING, WHOLE_MODELS, GoalFigure
from recipes.lab.console import UserError
from recipes.lab.files import read_json
from recipes.lab.pages import markdown_table

# Models under one treatment are compared by the last that both have.
TREATMENTS = ("eager", "recorded", "compiled")
LAYER_TREATMENTS = TREATMENTS[1:]
MODES = ("forward", "train")


# What tables, pictures and advice read; ``require_shape`` says how.
_MEDIAN = {"median": NUMBER}
_STEP = {
    **dict.fromkeys(("mechanism", "mode"), TEXT), "tokens": (int,), "seconds": {"*": _MEDIAN},
    "missing": {"*": TEXT},
}  # fmt: skip
_MODEL = {**_STEP, "size": TEXT, **dict.fromkeys(("resolution", "batch"), (int,))}
_PROFILES = {"profiles": {"*": {
    **dict.fromkeys(("kernels", "memsets", "copies", "busy", "gaps"), NUMBER),
    "longest": [(list,)],
}}}  # fmt: skip
_SHAPE = {
    "cases": [{**_MODEL, "over_softmax": {"*": _MEDIAN}, "peak_memory": NUMBER}],
    "layers": [{"seconds": (int, float, dict)}],
    "launches": [{"mechanism": TEXT, "bmm_seconds": NUMBER, "launches": _MEDIAN}],
    "recipes?": [{**dict.fromkeys(("recipe", "mechanism", "way"), TEXT),
                  "images_per_second": NUMBER}],
    "scans?": [{"mode": TEXT, "over_fla": _MEDIAN}],
    "before?": [{**_MODEL, "commit": TEXT, "over_before": {"ours": TEXT, **_MEDIAN}}],
    "profile?": [{**_MODEL, **_PROFILES}],
    "layer-profile?": [{**_STEP, **_PROFILES}],
}  # fmt: skip
_LAYER = {**_STEP, "floor": NUMBER, "bound": TEXT}


def read_whole(path: Path) -> dict[str, Any]:
    """A file that ``bench.whole_models`` has written.

    Raises:
        UserError: It is no such file.
    """
    report = read(path, _SHAPE, "bench.whole_models")
    for row in report["layers"]:
        if not isinstance(row["seconds"], dict):  # of before layers were compiled
            row["seconds"] = {"recorded": {"median": row["seconds"]}}
            row |= {"treatments": list(LAYER_TREATMENTS), "missing": {}}
    try:
        require_shape(report, {"layers": [_LAYER]})
        for i, row in enumerate(report["cases"]):
            if min(row["tokens"], row["batch"], row["resolution"]) < 1:
                raise Foreign(f"it.cases[{i}] has no tokens, no batch or no resolution")
    except Foreign as error:
        raise UserError(f"{path} is no file of python -m bench.whole_models: {error}") from error
    return report


def is_whole(path: Path) -> bool:
    """Whether a file is one for ``read_whole``, which says what is wrong if it is damaged."""
    try:
        report = read_json(path)
    except UserError:
        return False
    return isinstance(report, dict) and {"cases", "layers"} <= report.keys()


def layer_label(row: dict[str, Any]) -> str:
    """A layer's mechanism, and the implementation that was asked for."""
    return ", ".join(filter(None, (row["mechanism"], row.get("impl"))))


def layer_name(row: dict[str, Any]) -> str:
    """Of a layer with its size and step."""
    return f"{layer_label(row)} n={row['tokens']} {row['mode']}"


def fastest(row: dict[str, Any]) -> tuple[float, str] | None:
    """Seconds of a case or layer as a user runs it, and the treatment; None if it ran in none.

    That is recorded, or compiled and recorded, whichever is faster; eager where neither ran.
    """
    spent = {name: found["median"] for name, found in row["seconds"].items()}
    names = [name for name in spent if name != "eager"] or list(spent)
    best = min(names, key=lambda name: spent[name], default=None)
    return None if best is None else (spent[best], best)


def is_as_run(row: dict[str, Any], device: str) -> bool:
    """Whether a case and softmax beside it ran as users run them: not launched on a GPU."""
    best = fastest(row)
    over = (1.0, "") if row["mechanism"] == "softmax" else over_fastest(row)
    if best is None or over is None:
        return False
    return device == "cpu" or "eager" not in (best[1], *over[1].replace(", softmax", "").split())


def replaces(row: dict[str, Any], older: dict[str, Any], device: str) -> bool:
    """Whether a newer case counts: it ran as users run it, in every treatment of the older."""
    lacking = row.get("missing", {}).keys() & older["seconds"].keys()
    return is_as_run(row, device) and not lacking


def joined(reports: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Of several reports the newest with models, with the newest of every case and layer.

    Each has its commit and its device, the report those of all its models. An older case stays
    where the newer one did not run as users run it, or lacks a treatment.
    """
    ordered = sorted(reports, key=lambda report: str(report["datetime"]))
    cases, layers = {}, {}
    for report in ordered:
        source = {name: report[name] for name in ("commit", "device_name")}
        for row in report["cases"]:
            key = tuple(row[name] for name in ("mechanism", "size", "mode", "tokens"))
            if key not in cases or replaces(row, cases[key], report.get("device", "")):
                cases[key] = {**row, **source}
        for row in report["layers"]:
            layers[layer_label(row), row["mode"], row["tokens"]] = {**row, **source}
    newest = next((report for report in reversed(ordered) if report["cases"]), ordered[-1])
    found = {"cases": list(cases.values()), "layers": list(layers.values())}
    devices = sorted({row["device_name"] for row in cases.values()}) or [newest["device_name"]]
    return {**newest, **found, "device_name": ", ".join(devices)}


def newest_figures(reports: Iterable[dict[str, Any]]) -> list[tuple[GoalFigure, str]]:
    """Every figure of the newest report that has it, and that report's commit, by goal.

    Where a model becomes faster than softmax's is read from the newest of every resolution.
    Softmax over its own uncompiled step gives way to softmax over the checkout that E6 names.
    """
    reports = list(reports)
    found: dict[tuple[str, str], tuple[GoalFigure, str]] = {}
    for report in sorted(reports, key=lambda report: str(report["datetime"])):
        for figure in figures(report):
            found[figure.goal, figure.what] = figure, report["commit"]
    for figure in figures(joined(reports)):
        if (figure.goal, figure.what) in found and figure.goal == "E7":
            found[figure.goal, figure.what] = figure, "as below"
    if any(report.get("before") for report in reports):
        found = {key: pair for key, pair in found.items() if "recorded alone" not in key[1]}
    return sorted(found.values(), key=lambda pair: int(pair[0].goal[1:]))


def figures(report: dict[str, Any]) -> list[GoalFigure]:
    """The figures that ``thresholds.toml`` asks of whole models, from what was measured."""
    found: list[GoalFigure] = []
    for goal, entry in WHOLE_MODELS.items():
        values = dict(_VALUES[entry["measurement"]](report))
        for key, figure in entry["figures"].items():
            for words, (value, note) in values.get(key, {}).items():
                limits = {name: figure[name] for name in ("minimum", "target", "better")}
                what = figure["what"].format(words)
                found.append(GoalFigure(goal=goal, what=what, value=value, note=note, **limits))
    return found


Values = Iterator[tuple[str, dict[str, tuple[float | None, str]]]]


def _launches(report: dict[str, Any]) -> Values:
    for row in report["launches"]:
        note = f"a bmm takes {row['bmm_seconds'] * 1e6:.1f} µs"
        yield row["mechanism"], {"": (row["launches"]["median"], note)}


def _speeds(report: dict[str, Any], recipe: str, base: str) -> Values:
    """Images per second of a recipe over those of its base way, by mechanism.

    The base is the recipe of an older commit where that was measured.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in report.get("recipes", []):
        if row["recipe"] == recipe:
            found.setdefault(row["mechanism"], {})[row["way"]] = row
    for name, rows in found.items():
        beside, speeds = base, {way: row["images_per_second"] for way, row in rows.items()}
        if older := rows.get("before"):
            beside = f"before ({older['commit']})"
            speeds[beside] = speeds.pop("before")
        others = [way for way in speeds if way != beside]
        if beside in speeds and others:
            best = max(others, key=lambda way: speeds[way])
            said = f"{best} {speeds[best]:.0f} images/s, {beside} {speeds[beside]:.0f}"
            if older and "float32_images_per_second" in older:
                said += f", in float32 {older['float32_images_per_second']:.0f}"
            yield name, {"": (speeds[best] / speeds[beside], said)}


def _scans(report: dict[str, Any]) -> Values:
    for row in report.get("scans", []):
        yield row["mode"], {"": (row["over_fla"]["median"], "")}


def _best(row: dict[str, Any]) -> str | None:
    """The treatment by which both models of a case are compared alike."""
    return next((name for name in reversed(TREATMENTS) if name in row["over_softmax"]), None)


def over_fastest(row: dict[str, Any]) -> tuple[float, str] | None:
    """A model's time over softmax's, each as fast as it can be run, and by which treatments.

    None where softmax has not been measured beside it.
    """
    found = row.get("over_fastest")
    if found is None:
        best = _best(row)
        return None if best is None else (row["over_softmax"][best]["median"], best)
    ours, theirs = found["ours"], found["softmax"]
    return found["median"], ours if ours == theirs else f"{ours}, softmax {theirs}"


def milliseconds(row: dict[str, Any], report: dict[str, Any]) -> float | None:
    """Of one image of a case as a user runs it; None if it ran in no way.

    Of another file than softmax's it is the ratio to softmax beside it, times softmax's: another
    clock makes no mechanism slower.
    """
    same = {name: row[name] for name in ("size", "mode", "tokens")}
    softmax = next(iter(_rows(report, mechanism="softmax", **same)), row)
    over = over_fastest(row)
    if over is not None and row.get("commit") != softmax.get("commit"):
        own, factor = softmax, over[0]
    else:
        own, factor = row, 1.0
    found = fastest(own)
    return None if found is None else 1e3 * factor * found[0] / own["batch"]


def _over_softmax(report: dict[str, Any], mode: str) -> Values:
    for row in _rows(report, size="S", tokens=4096, mode=mode):
        if (name := _best(row)) is not None:
            eager = row["over_softmax"].get("eager", {}).get("median")
            note = name if eager is None else f"{name}; eager {eager:.2f}"
            yield row["mechanism"], {"": (row["over_softmax"][name]["median"], note)}


def _softmax_itself(report: dict[str, Any]) -> Values:
    """Softmax's model over an older checkout's, or over today's where none was timed."""
    older = {row["mode"]: row for row in report.get("before", [])}
    for mode in MODES:
        today = _rows(report, mechanism="softmax", size="S", tokens=4096, mode=mode)
        row = older.get(mode) or next(iter(today), {"seconds": {}})
        spent = {name: z["median"] for name, z in row["seconds"].items()}
        alone = None
        if {"compiled", "recorded"} <= spent.keys():
            alone = spent["compiled"] / spent["recorded"]
        if mode in older:
            best, commit = row["over_before"]["ours"], row["commit"]
            said = f"{best} {spent[best] * 1e3:.2f} ms, before {spent['before'] * 1e3:.2f}"
            if alone is not None:
                said += f"; compiled blocks over today's recorded alone {alone:.3f}"
            what = f"fastest over recorded at commit {commit}"
            yield mode, {what: (row["over_before"]["median"], said)}
        elif alone is not None:
            yield mode, {"compiled blocks over recorded alone": (alone, "")}


def _crossovers(report: dict[str, Any]) -> Values:
    settings = list(itertools.product(("S", "L"), MODES))
    found = {setting: crossovers(report, *setting) for setting in settings}
    for name in dict.fromkeys(row["mechanism"] for row in report["cases"]):
        values = {}
        for size, mode in settings:
            if name in found[size, mode]:
                rows = _rows(report, mechanism=name, size=size, mode=mode)
                best = [over_fastest(row) for row in sorted(rows, key=lambda z: z["resolution"])]
                treatment = ", ".join(dict.fromkeys(one[1] for one in best if one))
                values[f"{size}, {mode}"] = (found[size, mode][name], treatment)
        yield name, values


def _times_faster(report: dict[str, Any]) -> Values:
    for mode in MODES:
        for row in _rows(report, mechanism="dydila", size="L", tokens=16384, mode=mode):
            if (found := over_fastest(row)) is not None:
                yield mode, {"": (1 / found[0], found[1])}


def _floors(report: dict[str, Any]) -> Values:
    for mode in MODES:
        values = {}
        for row in report["layers"]:
            found = fastest(row)
            if row["mode"] == mode and found is not None and not row.get("impl"):
                note = f"{found[1]}; floor {row['floor'] * 1e6:.0f} µs by {row['bound']}"
                values[f"{row['mechanism']}, n={row['tokens']}"] = found[0] / row["floor"], note
        yield mode, values


_VALUES: dict[str, Callable[[dict[str, Any]], Values]] = {
    "launches": _launches,
    "training": lambda report: _speeds(report, "train", "eager"),
    "sampling": lambda report: _speeds(report, "sample", "eager"),
    "gpus": lambda report: _speeds(report, "train on GPUs", "one GPU"),
    "scans": _scans,
    "over_softmax_forward": lambda report: _over_softmax(report, "forward"),
    "over_softmax_train": lambda report: _over_softmax(report, "train"),
    "softmax_itself": _softmax_itself,
    "crossovers": _crossovers,
    "times_faster": _times_faster,
    "floors": _floors,
}


def _rows(report: dict[str, Any], **equal: Any) -> list[dict[str, Any]]:
    return [row for row in report["cases"] if all(row[k] == v for k, v in equal.items())]


def crossovers(report: dict[str, Any], size: str, mode: str) -> dict[str, float]:
    """By mechanism the px from which its model is faster than softmax's; infinite if never.

    Those that lack a resolution of softmax's are left out: its curve bends between two others; and
    those that have only one.
    """
    rows = _rows(report, size=size, mode=mode)
    wanted = {row["resolution"] for row in rows if row["mechanism"] == "softmax"}
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if (over := over_fastest(row)) is not None:
            found.setdefault(row["mechanism"], {})[row["resolution"]] = over[0]
    return {
        name: first_faster(points.items())
        for name, points in found.items()
        if points.keys() >= wanted and len(points) > 1
    }


def faster_from(reports: Iterable[dict[str, Any]]) -> str:
    """From which resolution on each model is faster than softmax's, a line a size and step."""
    report, lines = joined(reports), []
    sizes = dict.fromkeys(row["size"] for row in report["cases"])
    for size, mode in itertools.product(sizes, MODES):
        rows, found = _rows(report, size=size, mode=mode), crossovers(report, size, mode)
        found.pop("softmax", None)
        if found:
            sides = [row["resolution"] for row in rows if row["mechanism"] == "softmax"]
            at_last = {
                row["mechanism"]: over[0] for row in rows
                if row["resolution"] == max(sides) and (over := over_fastest(row))
            }  # fmt: skip
            words = faster_words(found, min(sides), max(sides), at_last)
            step = _WORDS[mode]
            lines.append(f"- Size {size}, a {step}: faster than softmax's with {words}.")
    return "\n".join(lines)


def faster_words(
    since: Mapping[str, float], first: int, last: int, at_last: Mapping[str, float]
) -> str:
    """ "`sana` from 256 px or below; at 1024 px also with `lit`; not at 1024 px with `moh`".

    Args:
        since: By mechanism the px from which it is faster; infinite if never.
        first: The smallest resolution that was measured.
        last: The largest.
        at_last: Times over softmax's there, also of mechanisms without others.
    """
    parts = [
        f"`{name}` from {px:.0f} px{' or below' if px == first else ''}"
        for name, px in sorted(since.items(), key=lambda item: item[1])
        if math.isfinite(px)
    ]
    never = [f"`{name}`" for name, px in since.items() if math.isinf(px)]
    there = {name: over for name, over in at_last.items() if name not in {*since, "softmax"}}
    also, slower = ([f"`{name}`" for name, over in there.items() if (over < 1) == is_faster]
                    for is_faster in (True, False))  # fmt: skip
    said = ", ".join(parts) or "none that was measured at every resolution"
    said += f"; at {last} px also with {', '.join(also)}" if also else ""
    said += f"; not up to {last} px with {', '.join(never)}" if never else ""
    return said + (f"; not at {last} px with {', '.join(slower)}" if slower else "")


def page(reports: list[dict[str, Any]]) -> str:
    """For a page: the newest of the goals, of models, of layers over floors, as Markdown."""
    report, newest = joined(reports), newest_figures(reports)
    ordered = sorted(reports, key=lambda one: str(one["datetime"]), reverse=True)
    parts = ["\n".join(f"- {source}" for source in dict.fromkeys(map(where, ordered)))]
    for size in dict.fromkeys(row["size"] for row in report["cases"]):
        columns = [
            (mode, px)
            for mode in MODES
            for px in sorted({row["resolution"] for row in _rows(report, size=size, mode=mode)})
        ]
        points = {mode: crossovers(report, size, mode) for mode in MODES}
        rows = []
        for name in dict.fromkeys(row["mechanism"] for row in report["cases"]):
            mine, cells = _rows(report, size=size, mechanism=name), []
            for mode, px in columns:
                here = [row for row in mine if (row["mode"], row["resolution"]) == (mode, px)]
                found = milliseconds(here[0], report) if here else None
                over = over_fastest(here[0]) if here else None
                text = "" if found is None else f"{found:.3g}"
                cells.append(text if over is None else f"{text} ({over[0]:.2f})")
            since = [
                f"{points[mode][name]:.0f}".replace("inf", "never") if name in points[mode] else
                _between(row for row in mine if row["mode"] == mode) for mode in MODES
            ]  # fmt: skip
            if any(cells):
                commits = ", ".join(dict.fromkeys(row["commit"] for row in mine))
                rows.append([name, *cells, *since, commits])
        heading = ["model", *(f"{_WORDS[mode]}, {px} px" for mode, px in columns)]
        heading += [*(f"faster from, {_WORDS[mode]}" for mode in MODES), "commit"]
        title = f"**Size {size}: milliseconds an image as a user runs it (over softmax's)**"
        parts.append(f"{title}\n\n{markdown_table(heading, rows, padded=True)}")
    goals = [
        [*row[:3], *row[4:], commit]
        for row, commit in ((figure.row, commit) for figure, commit in newest)
        if row[0] != "E9"
    ]
    if goals:
        heading = [*HEADING[:3], *HEADING[4:], "commit"]
        missed = sum("minimum missed" in row for row in goals)
        summary = f"Goals of whole models: {missed} of {len(goals)} figures miss the minimum"
        parts.append(_fold(summary, markdown_table(heading, goals, padded=True)))
    if report["layers"]:
        verdicts = [figure.verdict for figure, _ in newest if figure.goal == "E9"]
        within = len(verdicts) - verdicts.count("minimum missed")
        summary = (
            f"E9, one layer: device time over its floor, recorded, or compiled and recorded where "
            f"that is said and faster; products bind it, or memory where said; "
            f"{within} of {len(verdicts)} within the minimum"
        )
        parts.append(_fold(summary, _layers(report)))
    return "\n\n".join(parts)


def _between(rows: Iterable[dict[str, Any]]) -> str:
    """The px between which a model that lacks a resolution becomes faster, where that is known."""
    over = {row["resolution"]: found[0] for row in rows if (found := over_fastest(row))}
    slower, faster = ([px for px, z in over.items() if (z > 1) == side] for side in (True, False))
    is_known = slower and faster and max(slower) < min(faster)
    return f"{max(slower)} to {min(faster)}" if is_known else ""


def _fold(summary: str, text: str) -> str:
    return f"<details>\n<summary>{summary}</summary>\n\n{text}\n\n</details>"


def _layers(report: dict[str, Any]) -> str:
    columns = sorted({(row["mode"], row["tokens"]) for row in report["layers"]})
    layers = {(layer_label(z), z["mode"], z["tokens"]): z for z in report["layers"]}
    rows = []
    for name in sorted({layer_label(row) for row in report["layers"]}):
        here = [layers.get((name, *column)) for column in columns]
        of = [f"{row['commit']}, {row['device_name']}" for row in here if row is not None]
        cells = ["" if row is None else _over_floor(row) for row in here]
        rows.append([name, *cells, "; ".join(dict.fromkeys(of))])
    heading = ["layer", *(f"{_WORDS[mode]}, n={tokens}" for mode, tokens in columns), "of"]
    table = markdown_table(heading, rows, padded=True)
    return "\n\n".join(filter(None, (table, _over_others(report))))


def _over_floor(row: dict[str, Any]) -> str:
    found = fastest(row)
    if found is None:
        return ""
    said = ", ".join(name for name in (found[1], row["bound"]) if name in ("compiled", "memory"))
    return f"{found[0] / row['floor']:.1f}" + (f" ({said})" if said else "")


def _over_others(report: dict[str, Any]) -> str:
    """How long layers take, in times of what they take by an implementation asked for."""
    by_name = {layer_name(row): fastest(row) for row in report["layers"]}
    found = []
    for row in report["layers"]:
        ours, theirs = by_name.get(layer_name({**row, "impl": ""})), fastest(row)
        if row.get("impl") and ours and theirs:
            found.append(f"{layer_name(row)} {ours[0] / theirs[0]:.2f}")
    return f"Time over that by another implementation: {'; '.join(found)}" if found else ""


def _profiles(rows: list[dict[str, Any]]) -> Iterator[str]:
    """What a step's time consists of: a table of all, and a fold with the kernels of each."""
    lines, folds = [], []
    for row in rows:
        px = row.get("resolution", round(row["tokens"] ** 0.5) * PIXELS_PER_TOKEN)
        of = row["mechanism"], row.get("size", "layer"), px, row.get("batch", 1), row["mode"]
        for name, found in row["profiles"].items():
            times = [row["seconds"][name]["median"], *(found[key] for key in ("busy", "gaps"))]
            counts = [f"{found[key]:g}" for key in ("kernels", "memsets", "copies")]
            lines.append([*of, name, *(f"{z * 1e3:.3f}" for z in times), *counts])
            longest = [
                [kernel, f"{count:g}", f"{spent * 1e6:.0f}", f"{spent / found['busy']:.1%}"]
                for kernel, count, spent in found["longest"]
            ]
            table = markdown_table(["kernel", "times", "µs", "share"], longest, padded=True)
            summary = f"{of[0]} {of[1]} {of[2]}px {of[4]}, {name}: the longest kernels"
            folds.append(_fold(summary, table))
    heading = ["model", "size", "px", "batch", "step", "treatment", "a step, ms", "kernels, ms",
               "gaps, ms", "kernels", "memsets", "copies"]  # fmt: skip
    if lines:
        yield from (markdown_table(heading, lines, padded=True), *folds)


_WORDS = {"forward": "forward", "train": "training step"}


def tables(report: dict[str, Any]) -> str:
    """Where the figures come from, the goals, every whole model and every layer, as Markdown."""
    parts = [where(report)]
    if rows := [figure.row for figure in figures(report)]:
        parts.append(markdown_table(HEADING, rows, padded=True))
    heading = ["model", "size", "px", "batch", "step", *(f"{name}, ms" for name in TREATMENTS),
               *(f"over softmax, {name}" for name in TREATMENTS), "images/s", "GiB"]  # fmt: skip
    models = []
    for row in report["cases"]:
        spent = [row["seconds"].get(name, {}).get("median") for name in TREATMENTS]
        over = [row["over_softmax"].get(name, {}).get("median") for name in TREATMENTS]
        models.append([
            row["mechanism"], row["size"], row["resolution"], row["batch"], row["mode"],
            *("" if z is None else f"{z * 1e3:.2f}" for z in spent),
            *("" if z is None else f"{z:.2f}" for z in over),
            f"{row['batch'] / min(z for z in spent if z is not None):.0f}" if any(spent) else "",
            f"{row['peak_memory'] / 2**30:.1f}",
        ])  # fmt: skip
    if models:
        parts.append(markdown_table(heading, models, padded=True))
    layers = []
    for row in report["layers"]:
        spent = [row["seconds"].get(name, {}).get("median") for name in LAYER_TREATMENTS]
        layers.append([
            layer_label(row), row["tokens"], row["mode"],
            *("" if z is None else f"{z * 1e6:.0f}" for z in spent),
            f"{row['floor'] * 1e6:.0f}", row["bound"], _over_floor(row),
        ])  # fmt: skip
    if layers:
        heading = ["layer", "tokens", "step", *(f"{name}, µs" for name in LAYER_TREATMENTS),
                   "floor, µs", "bound by", "over floor"]  # fmt: skip
        parts += filter(None, (markdown_table(heading, layers, padded=True), _over_others(report)))
    profiles, of_layers = report.get("profile", []), report.get("layer-profile", [])
    parts += _profiles([*profiles, *of_layers])
    lacking = [f"- {row['what']}: {row['reason']}" for row in report["missed"]]
    for row in (*report["cases"], *report.get("before", ()), *profiles):
        of = f"{row['mechanism']} {row['size']} {row['resolution']}px {row['mode']}"
        lacking += [f"- {of}, {name}: {why}" for name, why in row["missing"].items()]
    for row in (*report["layers"], *of_layers):
        of = f"layer {layer_name(row)}"
        lacking += [f"- {of}, {name}: {why}" for name, why in row["missing"].items()]
    if lacking:
        parts.append("Not measured:\n" + "\n".join(lacking))
    return "\n\n".join(parts)
