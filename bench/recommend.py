"""``python -m bench.recommend out.json --resolution 1024 --memory 8GiB``: which mechanism to take.

Names the mechanisms that no other beats in time, memory and, where --quality names the folder of a
comparison, quality; says what each costs and how far the figures can be trusted.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from bench.cases import PIXELS_PER_TOKEN
from bench.fits import pareto, value_at
from bench.options import parse_bytes
from bench.quality import best_metric, read_quality
from bench.results import device_of, families, frame, read_cases, subset
from bench.tables import amount, memory
from recipes.lab.console import DONE, UserError, printable, run_script, whole
from recipes.lab.pages import markdown_table


@dataclasses.dataclass(frozen=True)
class Choice:
    """One mechanism at the resolution asked for.

    Attributes:
        label: The mechanism with its options.
        seconds: Of all blocks: on a GPU the device's, unless the launched times are asked for.
        launched: The same, with what the host takes to launch every operator.
        peak: Bytes: one block's peak and the weights of all, and in training what every block
            keeps for its backward.
        is_measured: Whether the resolution was measured, not put on a line.
        quality: Of the comparison, or None.
    """

    label: str
    seconds: float
    launched: float
    peak: float
    is_measured: bool
    quality: float | None = None


def choices(
    cases: pd.DataFrame, tokens: int, depth: int, quality: dict[str, float], time: str = "time"
) -> tuple[list[Choice], list[str]]:
    """What every mechanism costs at ``tokens`` tokens, and the names that cannot be told.

    ``time`` is the column of ``frame`` that counts.
    """
    found, unknown = [], []
    for label, rows in cases.groupby("label", sort=True):
        # Where a case for time and one for memory fall together, the one with more rounds counts.
        rows = rows.drop_duplicates("tokens", keep="first")
        spent, launched, peak = (
            value_at(list(zip(rows["tokens"], rows[column], strict=True)), tokens)
            for column in (time, "seconds", "peak_memory")
        )
        if spent is None or launched is None or peak is None:
            unknown.append(str(label))
            continue
        weights = rows["parameter_memory"].iloc[0] * depth
        kept = depth if rows["mode"].iloc[0] == "train" else 1
        found.append(
            Choice(str(label), spent[0] * depth, launched[0] * depth, peak[0] * kept + weights,
                   spent[1], quality.get(str(label)))
        )  # fmt: skip
    return found, unknown


def advise(found: list[Choice], limit: float | None, metric: str | None, lower: bool) -> list[str]:
    """The Pareto front in words, the fastest first."""
    fitting = [c for c in found if limit is None or c.peak <= limit]
    lines = []
    too_large = [f"{c.label} ({memory(c.peak)})" for c in found if c not in fitting]
    if too_large:
        lines.append(f"Do not fit into {memory(limit or 0)}: {', '.join(too_large)}.")
    if not fitting:
        least = min(found, key=lambda c: c.peak)
        lines.append(
            f"Nothing fits. The smallest is {least.label} with {memory(least.peak)}: take a "
            f"lower resolution, a smaller batch or width, or gradient checkpointing."
        )
        return lines
    judged = [c for c in fitting if c.quality is not None] if metric else []
    sign = 1 if lower else -1
    points = {c.label: (c.seconds, c.peak, sign * (c.quality or 0.0)) for c in judged or fitting}
    front = [c for c in sorted(fitting, key=lambda c: c.seconds) if c.label in pareto(points)]
    softmax = next((c for c in found if c.label == "softmax"), None)
    contests: list[tuple[str, list[Choice], Callable[[Choice], float], Callable]] = [
        ("the fastest", front, lambda c: c.seconds, lambda c: amount(c.seconds, "s")),
        ("takes the least memory", front, lambda c: c.peak, lambda c: memory(c.peak)),
        (f"the best {metric}", judged, lambda c: sign * (c.quality or 0),
         lambda c: f"{c.quality:.4g}"),
    ]  # fmt: skip
    for choice in front:
        praise = [text for contest in contests if (text := _praise(choice, *contest))]
        text = f"- {choice.label}: {', '.join(praise) or 'a compromise'}; "
        text += f"{amount(choice.seconds, 's')}, {memory(choice.peak)}"
        if softmax and choice is not softmax:
            factor = softmax.seconds / choice.seconds
            than = f"{factor:.2f} x faster" if factor >= 1 else f"{1 / factor:.2f} x slower"
            text += ", as fast as softmax" if "1.00" in than[:4] else f", {than} than softmax"
        if choice.quality is not None:
            text += f", {metric} {choice.quality:.4g}"
        lines.append(text + ("" if choice.is_measured else " (estimated)") + ".")
    beaten = [c.label for c in judged or fitting if c not in front]
    if beaten:
        lines.append(f"Beaten in everything that was compared: {', '.join(sorted(beaten))}.")
    if judged and (rest := [c.label for c in fitting if c not in judged]):
        lines.append(f"Not compared, for want of {metric}: {', '.join(sorted(rest))}.")
    return lines


def _praise(
    choice: Choice,
    what: str,
    among: list[Choice],
    value: Callable[[Choice], float],
    shown: Callable[[Choice], str],
) -> str:
    """``what`` if nobody is before this choice; a tie where the figures shown are the same."""
    if not among:
        return ""
    least = min(among, key=value)
    if shown(choice) != shown(least):
        return ""
    tied = [c.label for c in among if c is not choice and shown(c) == shown(least)]
    return f"{what} (a tie with {', '.join(tied)})" if tied else what


def main(arguments: list[str]) -> int:
    """Prints the advice."""
    options = _parser().parse_args(arguments)
    limit = None if options.memory is None else parse_bytes(options.memory)
    if options.resolution % PIXELS_PER_TOKEN:
        raise UserError(
            f"--resolution {options.resolution} is no multiple of {PIXELS_PER_TOKEN} pixels"
        )
    quality, metric, lower, source = _quality(options.quality)
    report = read_cases(options.report)
    cases = frame(report)
    family = _family(cases, options)
    chosen = subset(cases, "layer", **family)
    tokens = (options.resolution // PIXELS_PER_TOKEN) ** 2
    time = "seconds" if options.launched else "time"
    found, unknown = choices(chosen, tokens, options.depth, quality, time)
    if not found:
        raise UserError(
            f"{options.report} cannot tell of {options.resolution} px: it needs this resolution, "
            f"or two others"
        )
    print(
        f"{options.resolution} px ({tokens:,} tokens), {family['mode']}, the attention of "
        f"{options.depth} blocks of width {family['width']}, {family['dtype']}, batch "
        f"{int(chosen['batch'].iloc[0])}, on {printable(device_of(report))}:\n"
    )
    print(printable("\n".join(advise(found, limit, metric, lower))) + "\n")
    on_device = time == "time" and "device_time" in chosen and chosen["device_time"].notna().any()
    rows = [
        [c.label, amount(c.seconds, "s"), *([amount(c.launched, "s")] if on_device else []),
         memory(c.peak), "" if c.quality is None else f"{c.quality:.4g}",
         "measured" if c.is_measured else "estimated"]
        for c in sorted(found, key=lambda c: c.seconds)
    ]  # fmt: skip
    heading = ["mechanism", *(["on the device", "launched"] if on_device else ["time"]), "memory"]
    print(markdown_table([*heading, metric or "quality", ""], rows, padded=True) + "\n")
    print(printable("\n".join(_caveats(found, unknown, source, on_device, options))))
    return DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.recommend", description=__doc__)
    parser.add_argument("report", type=Path, help="JSON of pytest bench/ --benchmark-json")
    parser.add_argument("--resolution", type=whole(PIXELS_PER_TOKEN), default=1024, help="pixels")
    parser.add_argument("--memory", default=None, help="what must suffice, such as 8GiB")
    parser.add_argument("--quality", default=None, help="folder of recipes/compare.py")
    parser.add_argument("--mode", choices=("forward", "train"), default="forward")
    parser.add_argument("--width", type=whole(1), default=None, help="of the tokens")
    parser.add_argument("--dtype", default=None, help="such as bfloat16")
    parser.add_argument(
        "--launched", action="store_true", help="rank by what the host takes, too, on a GPU"
    )
    parser.add_argument("--depth", type=whole(1), default=12, help="blocks (default: 12)")
    return parser


def _family(cases: pd.DataFrame, options: argparse.Namespace) -> dict[str, Any]:
    there = families(cases, "layer")
    for family in there:
        is_width = options.width in (None, family["width"])
        is_dtype = options.dtype in (None, family["dtype"])
        if family["mode"] == options.mode and is_width and is_dtype:
            return family
    shown = sorted(f"{f['mode']} d={f['width']} {f['dtype']}" for f in there)
    raise UserError(
        f"{options.report} has no layers for --mode {options.mode}"
        f"{f' --width {options.width}' if options.width else ''}"
        f"{f' --dtype {options.dtype}' if options.dtype else ''}; "
        f"it has {', '.join(shown) or 'none'}"
    )


def _quality(folder: str | None) -> tuple[dict[str, float], str | None, bool, str]:
    """Values of each mechanism, the metric, whether smaller is better, and what they are of."""
    if folder is None:
        return {}, None, True, ""
    summary = read_quality(folder)
    metric, lower = best_metric(summary)
    rows = [row for row in summary.to_dict("records") if row["metric"] == metric]
    # Attention is compared here in backbones of one depth.
    protocols = sorted({row.get("protocol", "controlled") for row in rows})
    protocol = "controlled" if "controlled" in protocols else protocols[0]
    rows = [row for row in rows if row.get("protocol", "controlled") == protocol]
    # The hardest place stands for all: the largest resolution of the comparison.
    largest = max(row["resolution"] for row in rows)
    values: dict[str, list[float]] = {}
    for row in rows:
        if row["resolution"] == largest:
            values.setdefault(str(row["variant"]), []).append(float(row["mean"]))
    means = {name: statistics.fmean(found) for name, found in values.items()}
    source = f"{metric} is of small models at {largest} px, protocol {protocol}"
    return means, metric, lower, source


def _caveats(
    found: list[Choice],
    unknown: list[str],
    quality: str,
    on_device: bool,
    options: argparse.Namespace,
) -> list[str]:
    lines = ["What to keep in mind:"]
    if on_device:
        lines.append(
            "- Times are those of replayed CUDA graphs, except where a step could not be "
            "recorded. Launched one by one the host may take longer; --launched ranks by that."
        )
    lines.append(
        "- Time and memory are of attention alone, one layer times the number of blocks; "
        "feed-forwards, and in training the optimiser, come on top for every mechanism alike."
    )
    if any(not choice.is_measured for choice in found):
        lines.append(
            f"- {options.resolution} px was not measured for what is called estimated: the "
            f"value lies on the line through the two nearest sizes in log-log. Measure it with "
            f"pytest bench/ --resolutions {options.resolution}."
        )
    if not quality:
        lines.append(
            "- Nothing is said of quality, and mechanisms differ in it: train them with "
            "python recipes/compare.py and name its folder with --quality."
        )
    else:
        lines.append(
            f"- {quality}, not at yours; its report says which differences are more than noise. "
            f"Mechanisms without a result are left out of the choice."
        )
    lines.append("- Another device, dtype or batch gives another order: measure on your own.")
    if unknown:
        lines.append(f"- Too few sizes to tell: {', '.join(unknown)}.")
    return lines


if __name__ == "__main__":
    run_script(main)
