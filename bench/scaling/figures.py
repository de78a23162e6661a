"""What the files of ``bench.scaling`` say: shares of linear scaling, goals, and tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.reports import read, where
from bench.results import NUMBER, TEXT, Foreign, require_shape
from bench.thresholds import HEADING, SCALING, GoalFigure
from recipes.lab.console import UserError
from recipes.lab.pages import markdown_table
from recipes.lab.training.settings import PRESETS

_NUMBERS = ("images_per_second", "making_a_batch", "waiting_for_a_batch", "peak_memory")
# What tables read; ``require_shape`` says how.
_SHAPE = {
    "gpus": (int,), "device": TEXT,
    "training": [{
        **dict.fromkeys(("mechanism", "way", "size", "treatment"), TEXT),
        **dict.fromkeys(("tokens", "gpus", "images"), (int,)), **dict.fromkeys(_NUMBERS, NUMBER),
        "seconds": dict.fromkeys(("median", "q1", "q3"), NUMBER), "notes": [TEXT],
        "checkpoint": (dict, type(None)), "beside": (int, type(None)),
    }],
    "checks": [{"check": TEXT, "processes": (int,), "equal": (bool,)}],
}  # fmt: skip
_SAVED = {"seconds": NUMBER, "bytes": NUMBER}
_CHECKED = {
    "kill": {
        "mechanism": TEXT, **dict.fromkeys(("largest_difference", "seconds_to_end"), NUMBER),
        **dict.fromkeys(("tensors", "killed", "at_step", "resumed_from"), (int,)),
        **dict.fromkeys(("equal_before", "ended_by_itself"), (bool,)),
    },
    "encode": {"shards": (int,)},
    "evaluate": {"metrics": (int,), "differing": [TEXT]},
}  # fmt: skip
_WAYS = {"overlapped": "overlapped", "bf16": "overlapped, bfloat16", "fsdp2": "FSDP2",
         "25MB": "overlapped, 25 MB", "ddp": "one reduction"}  # fmt: skip


def read_scaling(path: Path) -> dict[str, Any]:
    """A file that ``bench.scaling`` has written.

    Raises:
        UserError: It is no such file, or has a way that this version does not know.
    """
    report = read(path, _SHAPE, "bench.scaling")
    for name, kind, known in (("training", "way", _WAYS), ("checks", "check", _CHECKED)):
        for row in report[name]:
            if row[kind] not in known:
                raise UserError(f"{path} has the {kind} {row[kind]!r}; known are "
                                f"{', '.join(known)}")  # fmt: skip
    try:
        for row in report["training"]:
            for name in ("gpus", "images_per_second"):
                if row[name] <= 0:
                    raise Foreign(f"{name} is {row[name]}")
            if row["checkpoint"] is not None:
                require_shape(row["checkpoint"], _SAVED, "checkpoint")
        for row in report["checks"]:
            require_shape(row, _CHECKED[row["check"]], row["check"])
    except Foreign as error:
        raise UserError(f"{path} is damaged: {error}") from error
    return report


def share_of_linear(report: dict[str, Any], row: dict[str, Any]) -> float | None:
    """Images per second over as many times those of one GPU; None where one was not measured."""
    alike = ("mechanism", "tokens", "size")
    for one in report["training"]:
        is_of_its_way = (one["way"] == "fsdp2") == (row["way"] == "fsdp2")
        if one["gpus"] == 1 and is_of_its_way and all(one[key] == row[key] for key in alike):
            return row["images_per_second"] / row["gpus"] / one["images_per_second"]
    return None


def figures(report: dict[str, Any]) -> list[GoalFigure]:
    """The figures that ``thresholds.toml`` asks of several GPUs, from what was measured."""
    found = []
    # What train.py does; files of before it did have one reduction.
    ways = {row["way"] for row in report["training"]}
    asked = "overlapped" if "overlapped" in ways else "ddp"
    for goal, entry in SCALING.items():
        for row in sorted(report["training"], key=lambda row: row["gpus"]):
            limits = entry["figures"].get(str(row["tokens"]))
            share = share_of_linear(report, row)
            is_asked = row["size"] == "L" and row["way"] == asked and row["gpus"] > 1
            if limits is None or share is None or not is_asked:
                continue
            words = f"{row['mechanism']}, {row['gpus']} GPUs"
            what = limits["what"].format(words)
            found.append(GoalFigure(goal=goal, value=share, note=row["treatment"],
                                    **{**limits, "what": what}))  # fmt: skip
    return found


def tables(report: dict[str, Any]) -> str:
    """Where the figures come from, the goals, all trainings and checks; Markdown."""
    several = f"{report['gpus']} x " if report["device"] == "cuda" else "Processes of a CPU: "
    parts = [several + where(report)]
    if rows := [figure.row for figure in figures(report)]:
        parts.append(markdown_table(HEADING, rows, padded=True))
    parts += filter(None, (_speeds(report), _details(report), _checkpoints(report)))
    lines = [_said(row) for row in report["checks"]]
    lines += [f"- not measured: {row['what']}: {row['reason']}" for row in report["missed"]]
    notes: dict[str, list[str]] = {}
    for row in report["training"]:
        for note in row["notes"]:
            notes.setdefault(note, []).append(f"{row['mechanism']} on {row['gpus']}")
    lines += [f"- {note} ({len(names)} cases, such as {names[0]})"
              for note, names in notes.items()]  # fmt: skip
    return "\n\n".join([*parts, *(["\n".join(lines)] if lines else [])])


def _speeds(report: dict[str, Any]) -> str:
    """Images per second, and the share of linear, by number of GPUs."""
    counts = sorted({row["gpus"] for row in report["training"]})
    found: dict[tuple[Any, ...], dict[int, str]] = {}
    for row in report["training"]:
        key = row["size"], row["tokens"], _WAYS[row["way"]], row["mechanism"], row["images"]
        share = share_of_linear(report, row)
        shown = "" if row["gpus"] == 1 or share is None else f" ({share:.2f})"
        found.setdefault(key, {})[row["gpus"]] = f"{row['images_per_second']:.0f}{shown}"
    heading = ["size", "tokens", "way", "model", "images a GPU",
               *(f"images/s on {count} (share of linear)" if count > 1 else "images/s on 1"
                 for count in counts)]  # fmt: skip
    rows = [[*key, *(cells.get(count, "") for count in counts)] for key, cells in found.items()]
    return markdown_table(heading, rows, padded=True) if rows else ""


def _details(report: dict[str, Any]) -> str:
    heading = ["model", "tokens", "way", "GPUs", "step", "ms a step (quartiles)",
               "ms to make a batch", "ms waiting for it", "GiB", "starts beside it"]  # fmt: skip
    rows = []
    for row in report["training"]:
        median, *quartiles = (row["seconds"][key] * 1e3 for key in ("median", "q1", "q3"))
        rows.append([
            row["mechanism"], row["tokens"],
            "launched, whole" if (row["way"], row["gpus"]) == ("fsdp2", 1) else _WAYS[row["way"]],
            row["gpus"], row["treatment"],
            f"{median:.1f} ({quartiles[0]:.1f} to {quartiles[1]:.1f})",
            f"{row['making_a_batch'] * 1e3:.1f}", f"{row['waiting_for_a_batch'] * 1e3:.2f}",
            f"{row['peak_memory'] / 2**30:.1f}", row["beside"] or "",
        ])  # fmt: skip
    return markdown_table(heading, rows, padded=True) if rows else ""


def share_of_saving(row: dict[str, Any]) -> float:
    """Of the time of a training that saves as often as ``--preset dit`` does."""
    saving = row["checkpoint"]["seconds"]
    return saving / (saving + PRESETS["dit"]["checkpoint_every"] * row["seconds"]["median"])


def _checkpoints(report: dict[str, Any]) -> str:
    every = PRESETS["dit"]["checkpoint_every"]
    heading = ["checkpoint of", "way", "GPUs", "GB", "s", f"share of training, every {every}"]
    rows = [
        [row["mechanism"], _WAYS[row["way"]], row["gpus"],
         f"{row['checkpoint']['bytes'] / 1e9:.2f}", f"{row['checkpoint']['seconds']:.2f}",
         f"{share_of_saving(row):.2%}"]
        for row in report["training"] if row["checkpoint"]
    ]  # fmt: skip
    return markdown_table(heading, rows, padded=True) if rows else ""


def _said(row: dict[str, Any]) -> str:
    """What a check has found, as one line of a list."""
    count = row["processes"]
    if row["check"] == "encode":
        outcome = "equal to the last digit" if row["equal"] else "DIFFERENT"
        return (f"- encode.py: manifest and {row['shards']} shards of {count} processes and of "
                f"one are {outcome}")  # fmt: skip
    if row["check"] == "evaluate":
        parts = f"DIFFERENT in {', '.join(row['differing'])}"
        outcome = "equal to the last digit" if row["equal"] else parts
        return (f"- evaluate.py: {row['metrics']} metrics of {count} processes and of one are "
                f"{outcome}")  # fmt: skip
    outcome = f"all {row['tensors']} tensors equal those of an uninterrupted run, bit for bit"
    if not row["equal"]:
        before = "were equal" if row["equal_before"] else "differed too"
        outcome = (f"DIFFERENT from an uninterrupted run by up to {row['largest_difference']:.1e}"
                   f" (losses before the kill {before})")  # fmt: skip
    by = "" if row["ended_by_itself"] else ", when the bench ended it"
    return (
        f"- train.py, {row['mechanism']}: kill -9 of process {row['killed']} of {count} after "
        f"step {row['at_step']}, torchrun ended {row['seconds_to_end']:.0f} s later{by}, resumed "
        f"from step {row['resumed_from']}: {outcome}"
    )
