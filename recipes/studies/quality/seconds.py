"""Seconds of a training step, alone on the machine: what "equal time" is measured by."""

from __future__ import annotations

import dataclasses
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from recipes.lab.console import UserError, printable
from recipes.lab.files import read_json, write_json
from recipes.lab.training.settings import Settings
from recipes.lab.training.trainer import Trainer
from recipes.studies.quality.plans import Scale, Seconds, StudyRun

FILE = "step-seconds.json"
_ROUNDS, _LEAST_SECONDS, _LEAST_STEPS, _WARM = 5, 0.5, 3, 4
_OF_SCALE = ("model", "batch_size", "accumulate", "precision", "compile")
_ALIKE = 1.15  # between the slowest and the fastest round of an idle machine


def seconds_of_step(settings: Settings) -> float:
    """The median time of a step, as the trainer takes it: recorded where that is possible."""
    trainer = Trainer(dataclasses.replace(settings, steps=10**6, held_out_every=None))
    try:
        for _ in range(_WARM):
            trainer.train_step()
        found = []
        for _ in range(_ROUNDS):
            started, steps = time.perf_counter(), 0
            while steps < _LEAST_STEPS or time.perf_counter() - started < _LEAST_SECONDS:
                trainer.train_step(ahead=True)
                steps += 1
            found.append((time.perf_counter() - started) / steps)
    finally:
        trainer.batches.close()
    if max(found) > _ALIKE * min(found):
        rounds = " to ".join(f"{1e3 * seconds:.3g}" for seconds in (min(found), max(found)))
        print(f"rounds took {rounds} ms a step: something else uses this machine; measure again "
              f"when it is idle", file=sys.stderr)  # fmt: skip
    return statistics.median(found)


def measure(runs: Sequence[StudyRun], scale: Scale, file: Path, threads: int) -> None:
    """Adds the seconds of every variant and resolution that the file lacks at this scale."""
    torch.set_num_threads(threads)
    entries = _entries(file) if file.is_file() else []
    known = {(e["variant"], e["resolution"]) for e in entries if _is_of(e, scale)}
    for planned, *_ in runs:
        settings = planned.settings
        key = planned.label, settings.resolution
        if key in known:
            continue
        known.add(key)
        try:
            seconds = seconds_of_step(settings)
        except Exception as error:  # one that fails fails in its run too, which says why
            print(printable(f"{key[0]} at {key[1]} px: {error}"), flush=True)
            continue
        print(printable(f"{key[0]} at {key[1]} px: {1e3 * seconds:.3g} ms a step"), flush=True)
        entries.append({
            "variant": key[0], "resolution": key[1], "seconds": float(f"{seconds:.4g}"),
            **{name: getattr(scale, name) for name in _OF_SCALE},
            "device": device_name(), "torch": torch.__version__,
        })  # fmt: skip
        write_json(file, {"steps": entries})


def device_name() -> str:
    """The GPU's name, or the processor's kind."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu {platform.machine()}"


def read_seconds(file: Path, scale: Scale) -> Seconds:
    """What ``measure`` wrote of this scale; nothing where there is no file.

    Raises:
        UserError: The file is damaged, or was measured on several devices.
    """
    entries = [e for e in (_entries(file) if file.is_file() else []) if _is_of(e, scale)]
    devices = sorted({f"{e['device']}, torch {e['torch']}" for e in entries})
    if len(devices) > 1:
        raise UserError(
            f"{file} holds seconds of several machines ({'; '.join(devices)}), which do not "
            f"compare: move it away and measure again"
        )
    return {(e["variant"], e["resolution"]): e["seconds"] for e in entries}


def _is_of(entry: dict[str, Any], scale: Scale) -> bool:
    # Versions before noted fewer.
    noted = [name for name in _OF_SCALE if name in entry]
    return all(entry[name] == getattr(scale, name) for name in noted)


def _entries(file: Path) -> list[dict[str, Any]]:
    found = read_json(file, "table of seconds", "move it away and measure again")
    try:
        entries = found["steps"]
        wanted = {"variant", "resolution", "seconds", "device", "torch"}
        if not all(wanted <= {*e} and e["seconds"] > 0 for e in entries):
            raise ValueError("an entry lacks something")
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}): move it away and measure again") from error
    return entries
