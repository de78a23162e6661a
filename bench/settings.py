"""What the command line of the suite says, as values."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

from attnzoo.contract import nearest
from bench.cells import Cell, Request, table
from bench.machine import commit
from bench.worker import Settings
from recipes.lab.console import parse_options

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
        register: Modules of the user's own mechanisms.
        commit: Of the working tree.
    """

    request: Request
    threads: int
    memory_cap: int
    cell_timeout: float
    time_budget: float
    quality: str | None
    register: tuple[str, ...]
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
        return Settings(self.threads, self.register, peaks, self.quality, checked)


def settings_from(goal_names: tuple[str, ...], **texts: Any) -> BenchSettings:
    """Parses the command line's texts.

    Raises:
        ValueError: A value is wrong; the message names it and what would do.
        TypeError: A mechanism does not have an option.
    """
    # A goal's letter says where it is set: G on a CPU, U on a GPU.
    letter = "U" if texts["device"] == "cuda" else "G"
    own = tuple(name for name in goal_names if name.startswith(letter))
    goals = () if texts["goals"] == "none" else split(texts["goals"]) or own
    for goal in goals:
        if goal not in goal_names:
            raise ValueError(
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
    (threads,) = whole_numbers("--threads", texts["threads"]) or (1,)
    (timeout,) = whole_numbers("--cell-timeout", texts["cell_timeout"]) or (180,)
    (budget,) = whole_numbers("--time-budget", texts.get("time_budget") or "") or (0,)
    return BenchSettings(
        request=request,
        threads=threads,
        memory_cap=parse_bytes(texts["memory_cap"]),
        cell_timeout=timeout,
        time_budget=budget,
        quality=texts["quality"],
        register=texts["register"],
        commit=commit(),
    )


def split(text: str) -> tuple[str, ...]:
    """Parts between commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def whole_numbers(option: str, text: str) -> tuple[int, ...]:
    """Positive integers between commas; ValueError names the option."""
    numbers = []
    for part in split(text):
        if not part.isdigit() or int(part) < 1:
            raise ValueError(f"{option} takes positive integers, got {part!r}")
        numbers.append(int(part))
    return tuple(numbers)


def parse_mechanism(text: str) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """ "sana:impl=naive:eps=0" -> ("sana", (("eps", 0), ("impl", "naive")))."""
    name, *pairs = text.split(":")
    return name, tuple(sorted(parse_options(pairs).items()))


def parse_bytes(text: str) -> int:
    """ "8GiB" -> 8589934592; ValueError if it is no size."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if not match or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is no amount of memory; write it like 8GiB or 300MiB")
    return int(float(match[1]) * _UNITS[match[2]])
