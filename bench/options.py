"""What the command line of the suite says, as values."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import time
from pathlib import Path
from typing import Any

import torch

import attnzoo
from attnzoo.command import units
from attnzoo.errors import UsageError
from bench.cases import Case, Conditions, Options, Request, parts_of, table
from bench.machine import commit
from bench.quality import read_quality
from bench.thresholds import chosen_goals
from recipes.lab.console import UserError, parse_options


@dataclasses.dataclass(kw_only=True)
class SuiteRun:
    """One run of the suite: what its command line says, and its books."""

    request: Request
    conditions: Conditions
    memory_cap: int  # bytes of one case
    case_timeout: float  # seconds
    time_budget: float  # seconds of the whole run; 0 is no limit
    commit: str = dataclasses.field(default_factory=commit)
    begin: float = dataclasses.field(default_factory=time.monotonic)
    json: Path | None = None  # what --benchmark-json names
    # Names of the tests, and state and reason of those that were not measured, by node id.
    requested: dict[str, str] = dataclasses.field(default_factory=dict)
    missed: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    unwritten: list[str] = dataclasses.field(default_factory=list)  # what the system refused
    # Reports of other runs that --benchmark-compare names.
    compared: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @functools.cached_property
    def cases(self) -> dict[str, Case]:
        """Every case that was asked for, by id."""
        return {case.id: case for case in table(self.request)}


def options_from(**texts: Any) -> SuiteRun:
    """Parses and checks the command line's texts.

    Raises:
        UserError: A value is wrong; the message names it and what would do.
        attnzoo.UsageError: A mechanism does not exist, has no such option, or cannot be built.
    """
    for name in ("mechanisms", "resolutions", "widths", "dtypes", "goals"):
        if texts[name] and not split(texts[name]):
            raise UserError(f"--{name} {texts[name]!r} names none; leave it out for all")
    goals, quality = split(texts["goals"]), texts["quality"]
    if goals not in ((), ("none",)) and (texts["profile"] != "full" or texts["mechanisms"]):
        raise UserError(
            f"--goals {texts['goals']} is for --full without --mechanisms; python -m bench.goals "
            f"--only {texts['goals']} measures these alone"
        )
    request = Request(
        profile=texts["profile"],
        device=texts["device"],
        mechanisms=tuple(parse_mechanism(text) for text in split(texts["mechanisms"])),
        resolutions=whole_numbers("--resolutions", texts["resolutions"]),
        widths=whole_numbers("--widths", texts["widths"]),
        dtypes=split(texts["dtypes"]),
        goals=() if goals == ("none",) else chosen_goals(goals, texts["device"]),
        quality=quality is not None,
    )
    if quality is not None:
        read_quality(quality)
    run = SuiteRun(
        request=request,
        conditions=Conditions(
            _one("--threads", texts["threads"], 1),
            texts["imports"],
            quality,
            min_rounds=texts.get("min_rounds", 0),
        ),
        memory_cap=parse_bytes(texts["memory_cap"]),
        case_timeout=_one("--case-timeout", texts["case_timeout"], 180),
        time_budget=_one("--time-budget", texts.get("time_budget") or "", 0),
    )
    # What a named implementation lacks here is an outcome of its cases, not a mistake.
    layers = {
        (name, options, case.width)
        for case in run.cases.values()
        if case.kind not in ("goal", "quality")
        for name, options in parts_of(case.mechanism, case.options)
        if "impl" not in dict(options)
    }
    for mechanism, given, width in sorted(layers, key=str):
        try:
            with torch.device("meta"):
                attnzoo.build_attention(mechanism, width, **dict(given))
        except UsageError as error:
            raise UserError(f"{mechanism} of width {width}: {error}") from error
        except Exception:  # a bug in a mechanism is an outcome of its cases, too
            continue
    return run


def from_zero(text: str) -> float:
    """A finite number that is not negative, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number from 0 on, got {text!r}")
    return value


def split(text: str) -> tuple[str, ...]:
    """Parts between commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def whole_numbers(option: str, text: str) -> tuple[int, ...]:
    """Positive integers between commas; UserError names the option."""
    for part in split(text):
        if not part.isdecimal() or not 1 <= int(part[:20]) < 10**9:
            raise UserError(f"{option} takes positive integers below 10^9, got {part[:40]!r}")
    return tuple(map(int, split(text)))


def _one(option: str, text: str, default: int) -> int:
    numbers = [*whole_numbers(option, text)] or [default]
    if len(numbers) > 1:
        raise UserError(f"{option} takes one number, got {text!r}")
    return numbers[0]


def parse_mechanism(text: str) -> tuple[str, Options]:
    """ "sana:impl=torch:eps=1e-9" -> ("sana", (("eps", 1e-9), ("impl", "torch"))).

    Options of a pattern name their mechanism: "sana*3+softmax:sana.eps=1e-9".
    """
    name, *pairs = text.split(":")
    return name, tuple(sorted(parse_options(pairs).items()))


def parse_bytes(text: str) -> int:
    """See ``attnzoo.command.units.parse_bytes``; UserError if it is no size."""
    try:
        return units.parse_bytes(text)
    except UsageError as error:
        raise UserError(str(error)) from error
