"""The runs of the studies as one compact table: what is committed, and all that a page needs."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from recipes.lab.console import UserError, one_line
from recipes.lab.evaluation.scores import metric_of
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.settings import Settings
from recipes.studies.comparison.planned import OK, read_result
from recipes.studies.comparison.tables import read_table, write_table
from recipes.studies.quality.plans import PATCH, PROTOCOLS, STUDIES, Scale, Seconds, StudyRun

LIMIT = 300 * 1024  # bytes of a table that is committed
KEY = ["study", "protocol", "run"]
SETTING = ["study", "protocol", "data", "px"]
# What two runs share whose losses compare: a run that another machine does again, or whose loss is
# of other held-out images, is another measurement.
MEASURE = ["device", "torch", "arithmetic", "held_out", "images"]
_TEXTS = (*KEY, "data", "variant", "model", "arithmetic", "state", "error", "device", "torch",
          "images", "curve")  # fmt: skip
_WHOLE = ("px", "tokens", "seed", "steps", "batch", "held_out")
METRICS = ("FID", "KID", "precision", "recall", "density", "coverage")
NUMBERS = ("loss", "loss_model", "q1", "q2", "q3", "q4", "train_loss")
_DIGITS = 6


def collect(out: Path, runs: Sequence[StudyRun], seconds: Seconds) -> pd.DataFrame:
    """One row for each run and protocol, done or not.

    Args:
        out: Folder of the runs.
        runs: All that are planned.
        seconds: Of a step, measured alone.
    """
    rows = [_row(out, one, seconds) for one in runs]
    frame = pd.DataFrame(rows)
    return frame.reindex(columns=[*frame.columns.drop("curve"), "curve"])


def _row(out: Path, one: StudyRun, seconds: Seconds) -> dict[str, Any]:
    planned, settings = one.planned, one.planned.settings
    folder = planned.folder(out)
    result = read_result(folder) or {"state": "not run", "error": None}
    cost, metrics = result.get("cost") or {}, result.get("metrics") or {}
    side, backbone = settings.resolution or 0, settings.backbone or {}
    row: dict[str, Any] = {
        "study": one.study, "protocol": one.protocol, "variant": planned.label,
        "data": settings.data + ("" if settings.level == "easy" else f"/{settings.level}"),
        "px": side, "tokens": (side // PATCH) ** 2, "seed": settings.seed,
        "steps": settings.steps, "batch": settings.batch_size,
        "learning_rate": settings.learning_rate, "held_out": settings.held_out_images,
        "model": f"{backbone.get('dim')}x{backbone.get('depth')}",
        "arithmetic": settings.precision + ", compiled" * (settings.compile == "on")
        + f", {settings.accumulate} micro-steps" * (settings.accumulate > 1),
        "run": planned.name, "state": result["state"],
        "error": one_line(result.get("error") or "")[:160],
        "parameters": cost.get("parameters"), "macs": cost.get("macs"),
        "step_seconds": seconds.get((planned.label, side)),
        "wall_seconds": result.get("wall_seconds"),
    }  # fmt: skip
    row |= dict.fromkeys((*NUMBERS, "device", "torch", "images", "elsewhere", "curve"))
    run, is_done = Run(folder / "run"), result["state"] == OK
    if is_done or run.config_file.is_file():
        try:
            row |= _trained(run, is_done, settings.steps)
        except UserError as error:  # of one run, which must not hide the others
            if is_done:
                row |= {"state": "damaged", "error": one_line(str(error))[:160]}
    for name, value in (metrics.get("results") or {}).get("1", {}).items():
        if metric_of(name) in METRICS:  # bare where Inception has looked
            row[name] = value
    return {name: _short(value) for name, value in row.items()}


def _trained(run: Run, is_done: bool, steps: int) -> dict[str, Any]:
    """What a run's log and configuration say: no loss before it has trained to its end."""
    config, log = run.config(), run.read_log()
    environment = config["environment"]
    held = [entry for entry in log if "held_out_loss" in entry]
    losses = [entry["loss"] for entry in log if entry.get("loss") is not None]
    tail = losses[-max(1, len(losses) // 10) :]
    found: dict[str, Any] = {
        "device": environment["device"], "torch": environment["torch"],
        "held_out": config["settings"]["held_out_images"],
        # Of what is trained on, whose other side the held-out images are.
        "images": str((config["data"].get("identity") or {}).get("sha256", ""))[:8],
        # Resumed in another environment: its bits are of neither.
        "elsewhere": int(any("environment" in line for change in config.get("changes", [])
                             for line in change["changes"])),
        "train_loss": math.fsum(tail) / len(tail) if tail else None,
        "curve": " ".join(f"{e['step']}:{e['held_out_loss']:.5g}" for e in held),
    }  # fmt: skip
    if not (is_done or f"step-{steps:08d}" in run.checkpoint_names()):
        found["train_loss"] = None
    elif held:
        last = held[-1]
        found |= {"loss": last["held_out_loss"], "loss_model": last["held_out_loss_model"]}
        found |= {f"q{q}": last[f"held_out_loss_quarter_{q}"] for q in range(1, 5)}
    return found


def _short(value: Any) -> Any:
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def merged(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """One table of several, in which a run that is done speaks for one that is not.

    Also for the same one under another protocol: what softmax takes is the measure of all three.
    What is done under both keeps its own, which may be of the one machine that pairs ask for. A
    run that was measured in several ways (``MEASURE``) keeps a row of each. Of one that is done
    nowhere the row with a loss stays: its machine may be gone.
    """
    found = pd.concat(tables, ignore_index=True)
    is_done = found["state"] == OK
    order = (found["loss"].isna() + 2 * ~is_done).sort_values(kind="stable").index
    found = found.loc[order]
    once = ~found.duplicated(KEY) | (is_done & ~found.duplicated(KEY + MEASURE))
    rows = found.loc[once].sort_index().to_dict("records")
    done: dict[str, list[dict[Hashable, Any]]] = {}
    for row in rows:
        if row["state"] == OK:
            done.setdefault(row["run"], []).append(row)
    own = (*KEY, "variant", "step_seconds")
    taken_over = [
        one | {name: row[name] for name in own}
        for row in rows
        for one in ([row] if row["state"] == OK else done.get(row["run"], [row]))
    ]
    return pd.DataFrame(taken_over, columns=found.columns)


def one_each(table: pd.DataFrame) -> pd.DataFrame:
    """A row of each run and protocol, whose losses may be averaged.

    In each setting those of the held-out images that most have, of equally many those that say
    which they are; and of these those that most have measured alike.
    """
    images = table["held_out"].astype(str) + " " + table["images"]
    groups = images.groupby([table[name] for name in SETTING])
    table = table.loc[images == groups.transform(lambda shown: shown.mode().iloc[-1])]
    sizes = table.groupby([*SETTING, *MEASURE], dropna=False)["run"].transform("size")
    order = (-sizes).sort_values(kind="stable").index
    return table.loc[order].drop_duplicates([*SETTING, "variant", "seed"]).sort_index()


def of_scale(table: pd.DataFrame, scale: Scale) -> pd.DataFrame:
    """The rows that have a loss and that one page may hold beside runs of this scale."""
    is_alike = (table["batch"] == scale.batch_size) & (
        table["learning_rate"] == scale.learning_rate
    )
    for name, value, free in (("model", scale.model, "MACs"), ("steps", scale.steps, "time")):
        is_alike &= (table[name] == value) | (table["protocol"] == free)
    return table.loc[is_alike & ((table["state"] == OK) | table["loss"].notna())]


def done_in(table: pd.DataFrame | None) -> set[str]:
    """Names of the runs that a table has numbers of."""
    return set() if table is None else set(table.loc[table["state"] == OK, "run"])


def write(path: Path, table: pd.DataFrame) -> None:
    """Writes a table.

    Raises:
        CannotWrite: The system refuses.
    """
    write_table(path, table)


def read(path: Path) -> pd.DataFrame:
    """Reads what ``write`` wrote.

    Raises:
        UserError: It is none, or damaged.
    """
    frame = read_table(path, _TEXTS)
    older = {"held_out": 0, "images": "", "arithmetic": "",
             "learning_rate": Settings.learning_rate}  # fmt: skip
    # A table of before they were noted.
    frame = frame.assign(**{n: value for n, value in older.items() if n not in frame})
    needed = [*_TEXTS, *SETTING, *_WHOLE, *NUMBERS, "macs", "step_seconds", "wall_seconds",
              "elsewhere"]  # fmt: skip
    if missing := [name for name in needed if name not in frame]:
        raise UserError(f"{path} is no table of recipes/study.py: it has no {missing[0]!r}")
    for name in (*_WHOLE, "learning_rate"):
        if frame[name].isna().any():
            raise UserError(f"table {str(path)!r} is damaged: column {name!r} lacks a number")
        is_whole = (frame[name] % 1 == 0) & frame[name].between(0, 2**53)
        if name in _WHOLE and not is_whole.all():
            raise UserError(
                f"table {str(path)!r} is damaged: column {name!r} has "
                f"{frame.loc[~is_whole, name].iloc[0]}, no whole number"
            )
    for name, known in (("study", [*STUDIES]), ("protocol", PROTOCOLS)):
        if not frame[name].isin(known).all():
            unknown = frame.loc[~frame[name].isin(known), name].iloc[0]
            raise UserError(
                f"table {str(path)!r} has the {name} {unknown!r}; known are {', '.join(known)}"
            )
    return frame.astype(dict.fromkeys(_WHOLE, int))


def curve_of(text: str) -> list[tuple[float, float]]:
    """ "300:0.12 600:0.11" -> (step, loss) of each point; damaged ones are left out."""
    points = []
    for part in text.split():
        step, _, loss = part.partition(":")
        try:
            points.append((float(step), float(loss)))
        except ValueError:
            continue
    return points


def change_at_end(curve: Sequence[tuple[float, float]]) -> float:
    """By what share the held-out loss has changed over the last fifth of the steps; or NaN."""
    if len(curve) < 2:
        return math.nan
    last, final = curve[-1]
    before = [loss for step, loss in curve if step <= 0.8 * last * (1 + 1e-9)]
    return final / before[-1] - 1 if before and before[-1] else math.nan


def group_name(setting: Mapping[str, Any]) -> str:
    """ "resolution, equal depth, 64 px"."""
    return f"{setting['study']}, equal {setting['protocol']}, {setting['px']} px"
