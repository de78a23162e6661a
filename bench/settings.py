"""What the command line of the suite says, as values."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any

import torch

import attnzoo
from attnzoo.contract import nearest
from attnzoo.errors import UsageError
from bench.cells import Cell, Request, table
from bench.machine import commit
from bench.quality import read_quality
from bench.worker import Settings
from recipes.lab.console import UserError, parse_options

_UNITS = {"": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """One run of the suite.

    Attributes:
        request: What was asked for.
        threads: Of torch.
        memory_cap: Bytes of one cell.
        cell_timeout: Seconds of one cell.
        time_budget: Seconds of the whole run; 0 is no limit.
        quality: Results of ``recipes/compare.py``.
        imports: Files or modules of the user's own mechanisms.
        commit: Of the working tree.
    """

    request: Request
    threads: int
    memory_cap: int
    cell_timeout: float
    time_budget: float
    quality: str | None
    imports: tuple[str, ...]
    commit: str

    @property
    def profile(self) -> str:
        """ "quick" or "full"."""
        return self.request.profile

    @property
    def device(self) -> str:
        """ "cpu" or "cuda"."""
        return self.request.device

    @functools.cache  # noqa: B019 - one per run
    def cells(self) -> list[Cell]:
        """Every cell that was asked for."""
        return table(self.request)

    def shared(self, peaks: dict[str, float], checked: dict[str, Any]) -> Settings:
        """What every cell's process is told."""
        return Settings(self.threads, self.imports, peaks, self.quality, checked)


def settings_from(goal_names: tuple[str, ...], **texts: Any) -> BenchSettings:
    """Parses and checks the command line's texts.

    Raises:
        UserError: A value is wrong; the message names it and what would do.
        attnzoo.UsageError: A mechanism does not exist, has no such option, or cannot be built.
    """
    # A goal's letter says where it is set: G on a CPU, U on a GPU.
    letter = "U" if texts["device"] == "cuda" else "G"
    own = tuple(name for name in goal_names if name.startswith(letter))
    goals = () if texts["goals"] == "none" else split(texts["goals"]) or own
    for goal in goals:
        if goal not in goal_names:
            raise UserError(
                f"unknown goal {goal!r}{nearest(goal, goal_names)} "
                f"Choose of {', '.join(goal_names)}"
            )
    request = Request(
        profile=texts["profile"],
        device=texts["device"],
        mechanisms=tuple(parse_mechanism(text) for text in split(texts["mechanisms"])),
        resolutions=whole_numbers("--resolutions", texts["resolutions"]),
        widths=whole_numbers("--widths", texts["widths"]),
        dtypes=split(texts["dtypes"]),
        goals=goals,
        quality=texts["quality"] is not None,
    )
    if texts["quality"] is not None:
        read_quality(texts["quality"])
    settings = BenchSettings(
        request=request,
        threads=_one("--threads", texts["threads"], 1),
        memory_cap=parse_bytes(texts["memory_cap"]),
        cell_timeout=_one("--cell-timeout", texts["cell_timeout"], 180),
        time_budget=_one("--time-budget", texts.get("time_budget") or "", 0),
        quality=texts["quality"],
        imports=texts["imports"],
        commit=commit(),
    )
    _check_that_layers_exist(settings.cells())
    return settings


def _check_that_layers_exist(cells: list[Cell]) -> None:
    # What a named implementation lacks here is an outcome of its cases, not a mistake.
    layers = {
        (cell.mechanism, cell.options, cell.width)
        for cell in cells
        if cell.kind not in ("goal", "quality") and "impl" not in dict(cell.options)
    }
    for mechanism, options, width in sorted(layers, key=str):
        try:
            with torch.device("meta"):
                attnzoo.build_attention(mechanism, width, **dict(options))
        except UsageError as error:
            raise UserError(f"{mechanism} of width {width}: {error}") from error
        except Exception:  # a bug in a mechanism is an outcome of its cases, too
            continue


def _one(option: str, text: str, default: int) -> int:
    numbers = whole_numbers(option, text) or (default,)
    if len(numbers) > 1:
        raise UserError(f"{option} takes one number, got {text!r}")
    return numbers[0]


def split(text: str) -> tuple[str, ...]:
    """Parts between commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def whole_numbers(option: str, text: str) -> tuple[int, ...]:
    """Positive integers between commas; UserError names the option."""
    numbers = []
    for part in split(text):
        if not part.isdecimal() or not 1 <= int(part[:20]) < 10**9:
            raise UserError(f"{option} takes positive integers below 10^9, got {part[:40]!r}")
        numbers.append(int(part))
    return tuple(numbers)


def parse_mechanism(text: str) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """ "sana:impl=naive:eps=0" -> ("sana", (("eps", 0), ("impl", "naive")))."""
    name, *pairs = text.split(":")
    return name, tuple(sorted(parse_options(pairs).items()))


def parse_bytes(text: str) -> int:
    """ "8GiB" -> 8589934592; UserError if it is no size."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    size = float(match[1]) * _UNITS.get(match[2], math.nan) if match else math.nan
    if not 1 <= size < 2**60:
        raise UserError(f"{text!r} is no amount of memory; write it like 8GiB or 300MiB")
    return int(size)
