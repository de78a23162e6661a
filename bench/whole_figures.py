"""What the files of ``bench.whole_models`` say: figures against their goals, and tables."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from bench.fits import crossover
from bench.thresholds import HEADING, WHOLE_MODELS, GoalFigure
from recipes.lab.pages import markdown_table

# Models under one treatment are compared by the last that both have.
TREATMENTS = ("eager", "recorded", "compiled")
MODES = ("forward", "train")


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


def _over_softmax(report: dict[str, Any], mode: str) -> Values:
    for row in _rows(report, size="S", tokens=4096, mode=mode):
        if (name := _best(row)) is not None:
            eager = row["over_softmax"].get("eager", {}).get("median")
            note = name if eager is None else f"{name}; eager {eager:.2f}"
            yield row["mechanism"], {"": (row["over_softmax"][name]["median"], note)}


def _softmax_itself(report: dict[str, Any]) -> Values:
    for mode in MODES:
        for row in _rows(report, mechanism="softmax", size="S", tokens=4096, mode=mode):
            spent = {name: z["median"] for name, z in row["seconds"].items()}
            if {"compiled", "recorded"} <= spent.keys():
                yield mode, {"": (spent["compiled"] / spent["recorded"], "")}


def _crossovers(report: dict[str, Any]) -> Values:
    names = dict.fromkeys(row["mechanism"] for row in report["cases"])
    for name in names:
        values = {}
        for size, mode in itertools.product(("S", "L"), MODES):
            points = [
                (row["resolution"], *found)
                for row in _rows(report, mechanism=name, size=size, mode=mode)
                if (found := over_fastest(row)) is not None
            ]
            if points:
                treatment = ", ".join(dict.fromkeys(best for *_, best in sorted(points)))
                values[f"{size}, {mode}"] = (first_faster([p[:2] for p in points]), treatment)
        yield name, values


def first_faster(points: Iterable[tuple[float, float]]) -> float:
    """The resolution from which a time over softmax's lies below 1; infinite if none does."""
    points = sorted(points)
    if points[0][1] <= 1:
        return points[0][0]
    found = crossover(points, [(x, 1.0) for x, _ in points])
    return float("inf") if found is None else found[0]


def _times_faster(report: dict[str, Any]) -> Values:
    for mode in MODES:
        for row in _rows(report, mechanism="dydila", size="L", tokens=16384, mode=mode):
            if (found := over_fastest(row)) is not None:
                yield mode, {"": (1 / found[0], found[1])}


def _floors(report: dict[str, Any]) -> Values:
    for mode in MODES:
        yield (
            mode,
            {
                f"{row['mechanism']}, n={row['tokens']}": (
                    row["seconds"] / row["floor"],
                    f"floor {row['floor'] * 1e6:.0f} µs by {row['bound']}",
                )
                for row in report["layers"]
                if row["mode"] == mode
            },
        )


_VALUES: dict[str, Callable[[dict[str, Any]], Values]] = {
    "launches": _launches,
    "over_softmax_forward": lambda report: _over_softmax(report, "forward"),
    "over_softmax_train": lambda report: _over_softmax(report, "train"),
    "softmax_itself": _softmax_itself,
    "crossovers": _crossovers,
    "times_faster": _times_faster,
    "floors": _floors,
}


def _rows(report: dict[str, Any], **equal: Any) -> list[dict[str, Any]]:
    return [row for row in report["cases"] if all(row[k] == v for k, v in equal.items())]


def tables(report: dict[str, Any]) -> str:
    """Where the figures come from, the goals, every whole model and every layer, as Markdown."""
    versions = ", ".join(f"{name} {value}" for name, value in report["versions"].items())
    parts = [f"{report['device_name']}, {versions}, commit {report['commit']}, "
             f"{report['datetime'][:10]}"]  # fmt: skip
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
    layers = [
        [row["mechanism"], row["tokens"], row["mode"], f"{row['seconds'] * 1e6:.0f}",
         f"{row['floor'] * 1e6:.0f}", row["bound"], f"{row['seconds'] / row['floor']:.1f}"]
        for row in report["layers"]
    ]  # fmt: skip
    if layers:
        heading = ["layer", "tokens", "step", "µs", "floor, µs", "bound by", "over floor"]
        parts.append(markdown_table(heading, layers, padded=True))
    lacking = [f"- {row['what']}: {row['reason']}" for row in report["missed"]]
    for row in report["cases"]:
        of = f"{row['mechanism']} {row['size']} {row['resolution']}px {row['mode']}"
        lacking += [f"- {of}, {name}: {why}" for name, why in row["missing"].items()]
    if lacking:
        parts.append("Not measured:\n" + "\n".join(lacking))
    return "\n\n".join(parts)
