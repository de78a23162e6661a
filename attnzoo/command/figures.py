"""The figures that come with attnzoo: whole models as they were measured, and their quality.

``figures.json`` is written by ``python -m bench.shipped`` of the repository, from the committed
measurements of ``bench.whole_models``.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import math
from collections.abc import Iterable
from typing import Any

from attnzoo.command.advice import Measured
from attnzoo.command.fits import first_faster

PIXELS_PER_TOKEN = 16  # of what was measured: patches of 2 x 2 latent pixels of 8 x 8


@dataclasses.dataclass(frozen=True)
class Source:
    """One run of ``bench.whole_models``.

    Attributes:
        device: "cpu", or the GPU's short name, such as "h100".
        device_name: As its driver says.
        date: Of the measurement, ISO.
        commit: Of the repository.
        versions: Of Python and the packages.
        file: In the repository.
    """

    device: str
    device_name: str
    date: str
    commit: str
    versions: dict[str, str]
    file: str

    def __str__(self) -> str:
        torch = self.versions.get("torch", "?")
        return f"{self.device_name}, {self.date}, commit {self.commit}, torch {torch}"


@dataclasses.dataclass(frozen=True)
class Row:
    """A step of one whole model, in the controlled protocol, as a user runs it.

    Attributes:
        source: Index of its ``Source``.
        mechanism: Or a pattern of several.
        size: Of the backbone.
        mode: "forward" or "train".
        tokens: Of one image.
        batch: Images of the step.
        parameters: Of the model.
        seconds: Of the step, at its fastest.
        treatment: What that is: recorded as a CUDA graph, compiled, or eager.
        eager: Seconds launched operator by operator, if measured.
        over_softmax: Time over softmax's, both at their fastest, in the same rounds; 1 of softmax.
        peak: Bytes of an eager step above the weights, 0 if not measured.
    """

    source: int
    mechanism: str
    size: str
    mode: str
    tokens: int
    batch: int
    parameters: int
    seconds: float
    treatment: str
    eager: float | None
    over_softmax: float
    peak: int

    @property
    def resolution(self) -> int:
        """Pixels along one side, of a latent model with 16 px a token."""
        return math.isqrt(self.tokens) * PIXELS_PER_TOKEN


SEEDS = 3  # from which on a comparison of quality decides


@dataclasses.dataclass(frozen=True)
class Quality:
    """What a comparison found of one mechanism.

    Attributes:
        mechanism: Or a pattern of several.
        tokens: Of one image.
        metric: What was measured.
        lower: Whether less is better.
        mean: Over the seeds.
        spread: Half the distance between the extremes of the seeds; 0 of one seed.
        seeds: How many.
        setting: Data and resolution.
    """

    mechanism: str
    tokens: int
    metric: str
    lower: bool
    mean: float
    spread: float
    seeds: int
    setting: str


@dataclasses.dataclass(frozen=True)
class Figures:
    """All that was measured."""

    sources: list[Source]
    rows: list[Row]
    quality: list[Quality]

    def of(self, device: str, size: str, mode: str) -> list[Row]:
        """Rows of one device, size and mode."""
        return [
            row for row in self.rows
            if (self.sources[row.source].device, row.size, row.mode) == (device, size, mode)
        ]  # fmt: skip

    def quality_near(self, tokens: int) -> list[Quality]:
        """Results of one comparison: of the number of tokens nearest to this, the largest.

        One that decides comes first: softmax and two others have ``SEEDS`` seeds there, so that
        there is a choice. Means over fewer seeds than softmax's are left out, as they are of
        other noise.
        """
        comparisons: dict[tuple[int, str, str], list[Quality]] = {}
        for q in self.quality:
            comparisons.setdefault((q.tokens, q.setting, q.metric), []).append(q)
        nearest = min(
            comparisons.values(),
            key=lambda found: (
                not _decides(found), abs(math.log(found[0].tokens / tokens)), -len(found),
            ),
            default=[],
        )  # fmt: skip
        fewest = next((q.seeds for q in nearest if q.mechanism == "softmax"), 0)
        return [q for q in nearest if q.seeds >= fewest]


def _decides(quality: list[Quality]) -> bool:
    judged = [q.mechanism for q in quality if q.seeds >= SEEDS]
    return "softmax" in judged and len(judged) > 2


def softmax_seconds(rows: Iterable[Row]) -> dict[int, float]:
    """Seconds an image of softmax's model, by tokens."""
    return {row.tokens: row.seconds / row.batch for row in rows if row.mechanism == "softmax"}


def as_measured(rows: list[Row], bytes_per_parameter: int) -> list[Measured]:
    """Rows in one unit of time, whatever run they are of.

    A time is softmax's, times the ratio that was measured in the same rounds: two runs may have
    had hosts, clocks and batches that differ.
    """
    of_softmax = softmax_seconds(rows)
    found = []
    for row in rows:
        spent = row.seconds / row.batch
        seconds = row.over_softmax * of_softmax.get(row.tokens, spent / row.over_softmax)
        found.append(Measured(
            row.mechanism, row.tokens, seconds, row.eager and row.eager / row.batch,
            row.peak / row.batch, row.treatment, row.parameters * bytes_per_parameter,
        ))  # fmt: skip
    return found


def faster_from(rows: list[Row]) -> dict[str, float]:
    """By mechanism the resolution from which its model is faster than softmax's.

    Infinite where it was slower at every one. Those that lack a resolution of softmax's are left
    out, as their curve may bend there.
    """
    wanted = {row.resolution for row in rows if row.mechanism == "softmax"}
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        found.setdefault(row.mechanism, {})[row.resolution] = row.over_softmax
    return {
        name: first_faster(points.items())
        for name, points in found.items()
        if name != "softmax" and len(points) > 1 and points.keys() >= wanted
    }


def loads(text: str) -> Figures:
    """Figures of the JSON that ``dumps`` has written."""
    data = json.loads(text)

    def rows(kind: type, key: str) -> list[Any]:
        names, *values = data[key]
        return [kind(**dict(zip(names, each, strict=True))) for each in values]

    sources = [Source(**each) for each in data["sources"]]
    return Figures(sources, rows(Row, "rows"), rows(Quality, "quality"))


def dumps(figures: Figures) -> str:
    """Compact JSON: one line a row, its columns named once."""

    def rows(kind: type, values: list[Any]) -> str:
        names = [field.name for field in dataclasses.fields(kind)]
        lines = [names, *([getattr(each, name) for name in names] for each in values)]
        return "[\n" + ",\n".join(json.dumps(line) for line in lines) + "\n]"

    sources = ",\n".join(json.dumps(dataclasses.asdict(each)) for each in figures.sources)
    return (
        f'{{"sources": [\n{sources}\n],\n"rows": {rows(Row, figures.rows)},\n'
        f'"quality": {rows(Quality, figures.quality)}}}\n'
    )


@functools.cache
def shipped() -> Figures:
    """What this version of attnzoo comes with."""
    file = importlib.resources.files("attnzoo.command") / "figures.json"
    return loads(file.read_text("utf-8"))
