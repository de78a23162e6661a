"""``attnzoo recommend``: which mechanism to take at a resolution and a budget of memory.

Answers from the figures that come with attnzoo, of whole models as a user runs them, and says of
each how it is known. ``python -m bench.recommend`` of the repository does so from your own.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence

import attnzoo
from attnzoo.command import Parser
from attnzoo.command.advice import Choice, advise, of_whole_models
from attnzoo.command.figures import (
    PIXELS_PER_TOKEN,
    Figures,
    Quality,
    Row,
    as_measured,
    faster_from,
    shipped,
)
from attnzoo.command.units import amount, memory, parse_bytes
from attnzoo.console import aligned
from attnzoo.errors import InvalidValue, Unavailable

# Beyond twice the sides that were measured, a line says nothing.
FARTHEST = 2
# Weights in float32; in training gradients, two moments and an average of the weights, too.
BYTES_PER_PARAMETER = {"forward": 4, "train": 20}
KEPT = {
    "forward": "weights in float32",
    "train": "weights, gradients, AdamW's two moments and the average, in float32",
}
STEPS = {"forward": "one sampling step (a forward)", "train": "one training step"}


def main(arguments: list[str]) -> None:
    """Prints the advice."""
    given = _parser().parse_args(arguments)
    limit = None if given.memory is None else _limit(given.memory)
    tokens = tokens_of(given.resolution, given.latent, given.patch)
    print("\n".join(recommendation(shipped(), given, tokens, limit)))


def tokens_of(resolution: int, latent: int = 8, patch: int = 2) -> int:
    """Tokens of a square image.

    Raises:
        InvalidValue: Patches do not fill it.
    """
    unit = latent * patch
    if resolution % unit:
        nearest = max(1, round(resolution / unit)) * unit
        raise InvalidValue(
            f"--resolution {resolution} does not divide into tokens of {unit} pixels (latent "
            f"factor {latent}, patch {patch}); the nearest that does is {nearest}"
        )
    return (resolution // unit) ** 2


def recommendation(
    figures: Figures, given: argparse.Namespace, tokens: int, limit: int | None
) -> list[str]:
    """The answer in lines.

    Raises:
        Unavailable: There are no figures for what was asked.
        InvalidValue: Memory counts, but was not measured.
    """
    size, rows = chosen_rows(figures, given.device, given.mode, given.size, tokens)
    nearest = min(rows, key=lambda row: abs(math.log(row.tokens / tokens)))
    batch, measured = (
        given.batch or nearest.batch,
        as_measured(rows, BYTES_PER_PARAMETER[given.mode]),
    )
    found, treatments, unknown = of_whole_models(measured, tokens, batch, {})
    while given.batch is None and limit is not None and batch > 1 and found:
        if any(choice.peak <= limit for choice in found):
            break
        batch //= 2
        found, treatments, unknown = of_whole_models(measured, tokens, batch, {})
    quality = figures.quality_near(tokens)
    if not found:
        raise Unavailable(
            f"there are too few figures of {given.device} to tell of {tokens:,} tokens; "
            f"{_where_measured(figures, given.device)}"
        )
    has_memory = all(choice.peak for choice in found)
    if limit is not None and not has_memory:
        raise InvalidValue(f"--memory: it was not measured on {given.device}; leave it out")
    unit = given.latent * given.patch
    had_to = "" if batch == nearest.batch or given.batch else f" (of {2 * batch} nothing fits)"
    lines = [
        f"{given.resolution} px = {tokens:,} tokens: {STEPS[given.mode]} of a whole DiT of size "
        f"{size},",
        f"times an image of a batch of {nearest.batch}, memory of a batch of {batch}"
        f"{had_to} with the weights, on {given.device}",
        "",
        *advise(found, limit, None, True),
        "",
        _table(found, treatments, rows, tokens, quality, unit),
        "",
        "How it is known:",
    ]
    for number, source in enumerate(_sources(rows), 1):
        lines.append(f"- [{number}] measured on {figures.sources[source]}")
    measured = ", ".join(f"{_pixels(row, unit)}" for row in _of_softmax(rows))
    caveats: Sequence[tuple[object, str]] = (
        (not all(c.is_measured for c in found), f"{given.resolution} px was not measured for what "
         f"is called interpolated (between sizes) or estimated (beyond them): it lies on the "
         f"line through the two nearest sizes in log-log; softmax was measured at {measured} px"),
        (True, "A time is of the model recorded as a CUDA graph, compiled where that is faster; "
         "softmax likewise" if given.device != "cpu" else "A time is of the compiled model, or of "
         "the eager one where that is faster; softmax likewise"),
        (unknown, f"Measured at another size only: {', '.join(unknown)}"),
        (True, _about_quality(quality, tokens)),
        (has_memory, f"Memory is of an eager step and {BYTES_PER_PARAMETER[given.mode]} bytes a "
         f"parameter: {KEPT[given.mode]}; CUDA itself takes some 0.5 GiB more"),
        (True, "Another device or batch gives another order: measure on your own with python -m "
         "bench.whole_models of the repository"),
    )  # fmt: skip
    return [*lines, *(f"- {text}." for applies, text in caveats if applies)]


def chosen_rows(
    figures: Figures, device: str, mode: str, size: str | None, tokens: int
) -> tuple[str, list[Row]]:
    """The size of the backbone that can tell most, or the one asked for, and its rows.

    Raises:
        Unavailable: There is none.
    """
    sizes = list(dict.fromkeys(
        row.size for row in figures.rows
        if row.mode == mode and figures.sources[row.source].device == device
    ))  # fmt: skip
    if not sizes:
        raise Unavailable(
            f"attnzoo {attnzoo.__version__} has no figures of device {device!r}, {mode}; "
            f"{_what_there_is(figures)}"
        )
    if size is not None and size not in sizes:
        raise Unavailable(
            f"there are no figures of size {size!r} on {device}, {mode}; there are of "
            f"{', '.join(sizes)}"
        )

    def rank(name: str) -> tuple[float, int, int]:
        rows = figures.of(device, name, mode)
        known = [row.tokens for row in rows]
        beyond = max(min(known) / tokens, tokens / max(known), 1.0)
        return beyond, -known.count(tokens), -len({row.mechanism for row in rows})

    best = size or min(sizes, key=rank)
    rows = figures.of(device, best, mode)
    known = [row.tokens for row in rows]
    if not min(known) / FARTHEST**2 <= tokens <= max(known) * FARTHEST**2:
        raise Unavailable(
            f"{tokens:,} tokens are too far from what was measured; "
            f"{_where_measured(figures, device)}"
        )
    return best, rows


def _where_measured(figures: Figures, device: str) -> str:
    rows = [row for row in figures.rows if figures.sources[row.source].device == device]
    sides = {
        size: sorted({row.resolution for row in rows if row.size == size})
        for size in dict.fromkeys(row.size for row in rows)
    }
    said = "; ".join(f"{size}: {', '.join(map(str, px))} px" for size, px in sides.items())
    return f"measured were, with {PIXELS_PER_TOKEN} px a token, {said}"


def _what_there_is(figures: Figures) -> str:
    devices = sorted({source.device for source in figures.sources})
    return (
        f"there are of {', '.join(devices) or 'none'}. Measure on your own: python -m "
        f"bench.whole_models --out mine.json, then python -m bench.recommend mine.json, in the "
        f"repository"
    )


def _sources(rows: list[Row]) -> list[int]:
    """What the rows are of, in the order of their numbers in the answer."""
    return sorted({row.source for row in rows})


def _table(
    found: Sequence[Choice], treatments: dict[str, str], rows: list[Row], tokens: int,
    quality: list[Quality], unit: int,
) -> str:  # fmt: skip
    softmax = next((c for c in found if c.label == "softmax"), None)
    since = faster_from(rows)
    used = _sources(rows)
    numbers = {(row.mechanism, row.tokens): used.index(row.source) + 1 for row in rows}
    of_quality = {q.mechanism: f"{q.mean:.4f}" for q in quality}
    columns: dict[str, Callable[[Choice], str]] = {
        "mechanism": lambda c: c.label,
        "time": lambda c: amount(c.seconds, "s"),
        "x softmax": lambda c: f"{c.seconds / softmax.seconds:.2f}" if softmax else "",
        "faster from": lambda c: _since(since.get(c.label), unit),
        "memory": lambda c: memory(c.peak) if c.peak else "",
        f"{quality[0].metric}*" if quality else "": lambda c: of_quality.get(c.label, ""),
        "runs": lambda c: treatments[c.label],
        "known": lambda c: f"measured [{numbers[c.label, tokens]}]" if c.is_measured else c.how,
    }
    if not quality:
        columns.pop("")
    ordered = sorted(found, key=lambda c: c.seconds)
    return aligned([list(columns), *([of(c) for of in columns.values()] for c in ordered)])


def _since(resolution: float | None, unit: int) -> str:
    if resolution is None:
        return ""
    if math.isinf(resolution):
        return "never"
    return f"{resolution / PIXELS_PER_TOKEN * unit:.0f} px"


def _pixels(row: Row, unit: int) -> int:
    return math.isqrt(row.tokens) * unit


def _of_softmax(rows: list[Row]) -> list[Row]:
    return sorted((row for row in rows if row.mechanism == "softmax"), key=lambda row: row.tokens)


def _about_quality(quality: list[Quality], tokens: int) -> str:
    """What is known of quality, which does not count in the choice."""
    if not quality:
        return "Quality is not measured, and mechanisms differ in it"
    first = quality[0]
    best = (min if first.lower else max)(quality, key=lambda q: q.mean)
    softmax = next((f"; softmax {q.mean:.4f}" for q in quality if q.mechanism == "softmax"), "")
    seeds = min(q.seeds for q in quality), max(q.seeds for q in quality)
    other = f", not {tokens:,}" if tokens != first.tokens else ""
    return (
        f"*Quality is known at small scale only, and does not count in the choice: {first.metric} "
        f"on {first.setting}, {first.tokens:,} tokens{other}, "
        f"{seeds[0] if seeds[0] == seeds[1] else f'{seeds[0]} to {seeds[1]}'} seeds; the best is "
        f"{best.mechanism} with {best.mean:.4f}{softmax}"
    )


def _limit(text: str) -> int:
    size = parse_bytes(text)
    if size < 2**20:
        raise InvalidValue(
            f"--memory {text} is less than 1 MiB; write the unit, as in {text.strip()}GiB"
        )
    return size


def _number(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
    if not 1 <= value < 10**6:
        raise argparse.ArgumentTypeError(f"must be from 1 to 999999, got {value}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = Parser("attnzoo recommend", description=__doc__, allow_abbrev=False)
    flag = parser.add_argument
    flag("--resolution", type=_number, default=1024, help="pixels of a side (default: 1024)")
    flag("--memory", help="what must suffice, such as 8GiB, '8 GB' or 300MiB")
    whose = "whose figures: h100 (default) or h200"
    flag("--device", default="h100", type=str.lower, help=whose)
    flag("--mode", choices=("forward", "train"), default="forward", help="(default: forward)")
    flag("--size", help="of the backbone (default: the one that was measured there)")
    flag("--batch", type=_number, help="images at once (default: as measured)")
    flag("--latent", type=_number, default=8, help="pixels per latent pixel (default: 8)")
    flag("--patch", type=_number, default=2, help="latent pixels per token (default: 2)")
    return parser
