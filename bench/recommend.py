"""``python -m bench.recommend out.json --resolution 1024 --memory 8GiB``: which mechanism to take.

Names the mechanisms that no other beats in time, memory and, where --quality names the folder of a
comparison, quality; says what each costs and how far the figures can be trusted. A JSON of
``bench.whole_models`` tells it of whole models as a user runs them: recorded, compiled or not.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from attnzoo.command.advice import Choice, Measured, advise, of_whole_models
from attnzoo.command.fits import value_at
from attnzoo.command.units import amount, memory
from attnzoo.contract import nearest
from backbones.pattern import parse_pattern
from bench.cases import PIXELS_PER_TOKEN, Case, parts_of
from bench.options import parse_bytes, parse_mechanism
from bench.quality import best_metric, read_quality
from bench.results import device_of, families, frame, read_cases, subset
from bench.whole_models.figures import fastest, is_whole, read_whole
from recipes.lab.console import DONE, UserError, numbers, printable, run_script, whole
from recipes.lab.pages import markdown_table


class Layer(NamedTuple):
    """One layer at the resolution asked for."""

    seconds: float
    launched: float
    peak: float
    weights: float
    is_measured: bool


def choices(
    cases: pd.DataFrame, tokens: int, depth: int, quality: dict[str, float], time: str = "time",
    mixtures: Sequence[str] = (),
) -> tuple[list[Choice], list[str]]:  # fmt: skip
    """What every mechanism costs at ``tokens`` tokens, and the names that cannot be told.

    ``time`` is the column of ``frame`` that counts. Mixtures are sums of their mechanisms' layers.
    """
    layers, unknown = _layers(cases, tokens, time)
    keeps_all = not cases.empty and cases["mode"].iloc[0] == "train"
    found = []
    counted = {label: Counter({label: depth}) for label in layers}
    counted |= {label: _labels_of(label, depth, layers) for label in mixtures}
    for label, counts in counted.items():
        parts = [(layers[name], count) for name, count in counts.items()]
        peaks = [layer.peak * (count if keeps_all else 1) for layer, count in parts]
        peak = sum(peaks) if keeps_all else max(peaks)
        found.append(Choice(
            label,
            sum(layer.seconds * count for layer, count in parts),
            sum(layer.launched * count for layer, count in parts),
            peak + sum(layer.weights * count for layer, count in parts),
            all(layer.is_measured for layer, _ in parts),
            quality.get(label),
        ))  # fmt: skip
    return found, unknown


def _labels_of(mixture: str, depth: int, layers: Iterable[str]) -> Counter[str]:
    """How many blocks of a mixture have each label."""
    text, options = parse_mechanism(mixture)
    pattern = parse_pattern(text)
    labels = {n: Case(mechanism=n, options=own).label for n, own in parts_of(text, options)}
    for name, label in labels.items():
        if label not in layers:
            raise UserError(
                f"block {pattern.first_of(name)} of {mixture!r}: there are no figures of "
                f"{label!r}{nearest(label, layers)} There are of {', '.join(layers)}"
            )
    return Counter(labels[pattern.name_of(index)] for index in range(depth))


def _layers(cases: pd.DataFrame, tokens: int, time: str) -> tuple[dict[str, Layer], list[str]]:
    found, unknown = {}, []
    for label, rows in cases.groupby("label", sort=True):
        name = str(label)
        # Where a case for time and one for memory fall together, the one with more rounds counts.
        rows = rows.drop_duplicates("tokens", keep="first")
        spent, launched, peak = (
            value_at(list(zip(rows["tokens"], rows[column], strict=True)), tokens)
            for column in (time, "seconds", "peak_memory")
        )
        if spent is None or launched is None or peak is None:
            unknown.append(name)
            continue
        weights = rows["parameter_memory"].iloc[0]
        found[name] = Layer(spent[0], launched[0], peak[0], weights, spent[1])
    return found, unknown


def main(arguments: list[str]) -> int:
    """Prints the advice."""
    options = _parser().parse_args(arguments)
    limit = None if options.memory is None else parse_bytes(options.memory)
    if options.resolution % PIXELS_PER_TOKEN:
        raise UserError(
            f"--resolution {options.resolution} is no multiple of {PIXELS_PER_TOKEN} pixels"
        )
    quality, metric, lower, source = _quality(options.quality)
    for text in options.attn:
        parse_pattern(parse_mechanism(text)[0]).check_depth(options.depth)
    if is_whole(options.report):
        if options.width or options.dtype:
            raise UserError(
                f"--width and --dtype are of layers, and {options.report} is of whole models: "
                f"choose by --size"
            )
        if options.attn:
            raise UserError(
                f"{options.report} is of whole models: measure a mixture with python -m "
                f"bench.whole_models --mechanisms, and leave --attn out"
            )
        return _of_whole_models(options, limit, quality, metric, lower, source)
    if options.size:
        raise UserError(
            f"--size is of whole models, and {options.report} is of layers: choose by --width "
            f"and --depth"
        )
    report = read_cases(options.report)
    family = _family(frame(report), options)
    chosen = subset(frame(report), "layer", **family)
    tokens = (options.resolution // PIXELS_PER_TOKEN) ** 2
    time = "seconds" if options.launched else "time"
    found, unknown = choices(chosen, tokens, options.depth, quality, time, options.attn)
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
    table = pd.DataFrame({
        "mechanism": [c.label for c in found],
        "on the device" if on_device else "time": [amount(c.seconds, "s") for c in found],
        "launched": [amount(c.launched, "s") for c in found],
        "memory": [memory(c.peak) for c in found],
        metric or "quality": ["" if c.quality is None else f"{c.quality:.4g}" for c in found],
        "": ["measured" if c.is_measured else "estimated" for c in found],
    }).iloc[pd.Series([c.seconds for c in found]).argsort(kind="stable")]  # fmt: skip
    table = table if on_device else table.drop(columns="launched")
    print(markdown_table(table.columns, table.to_numpy().tolist(), padded=True) + "\n")
    # What to keep in mind, and whether it applies.
    caveats = (
        (on_device, "Times are those of replayed CUDA graphs, except where a step could not be "
         "recorded. Launched one by one the host may take longer; --launched ranks by that."),
        (True, "Time and memory are of attention alone, one layer times the number of blocks; "
         "feed-forwards, and in training the optimizer, come on top for every mechanism alike."),
        (not all(c.is_measured for c in found), f"{options.resolution} px was not measured for "
         f"what is called estimated: the value lies on the line through the two nearest sizes in "
         f"log-log. Measure it with pytest bench/ --resolutions {options.resolution}."),
        (options.attn, "A mixture's figures are added up from its mechanisms' layers."),
        (not source, "Nothing is said of quality, and mechanisms differ in it: train them with "
         "python recipes/compare.py and name its folder with --quality."),
        (source, f"{source}, not at yours; its report says which differences are more than "
         f"noise. Mechanisms without a result are left out of the choice."),
        (True, "Another device, dtype or batch gives another order: measure on your own."),
        (unknown, f"Too few sizes to tell: {', '.join(unknown)}."),
    )  # fmt: skip
    lines = ["What to keep in mind:", *(f"- {text}" for applies, text in caveats if applies)]
    print(printable("\n".join(lines)))
    return DONE


def whole_choices(
    report: dict[str, Any], size: str, mode: str, tokens: int, quality: dict[str, float],
    is_launched: bool = False,
) -> tuple[list[Choice], dict[str, str], int, list[str]]:  # fmt: skip
    """See ``of_whole_models``; the images of the batch, measured nearest to ``tokens``, too."""
    rows = [r for r in report["cases"] if r["size"] == size and r["mode"] == mode]
    batch = min(rows, key=lambda r: abs(math.log(r["tokens"] / tokens)))["batch"]
    measured = []
    for row in rows:
        if (best := fastest(row)) is None:
            continue
        images, eager = row["batch"], row["seconds"].get("eager")
        measured.append(Measured(
            row["mechanism"], row["tokens"], best[0] / images,
            None if eager is None else eager["median"] / images, row["peak_memory"] / images,
            best[1],
        ))  # fmt: skip
    found, treatments, unknown = of_whole_models(measured, tokens, batch, quality, is_launched)
    untimed = {row["mechanism"] for row in rows} - {row.label for row in measured}
    return found, treatments, batch, sorted({*unknown, *untimed})


def _of_whole_models(
    options: argparse.Namespace, limit: float | None, quality: dict[str, float],
    metric: str | None, lower: bool, source: str,
) -> int:  # fmt: skip
    report = read_whole(options.report)
    there = list(dict.fromkeys((row["size"], row["mode"]) for row in report["cases"]))
    sizes = [size for size, mode in there if mode == options.mode]
    size: str = options.size or next(iter(sizes), "")
    if size not in sizes:
        shown = ", ".join(f"{size} {mode}" for size, mode in there)
        asked = f"{options.size or 'models'} {options.mode}"
        raise UserError(f"{options.report} has no {asked}; it has {shown or 'none'}")
    tokens = (options.resolution // PIXELS_PER_TOKEN) ** 2
    found, treatments, batch, unknown = whole_choices(
        report, size, options.mode, tokens, quality, options.launched
    )
    if not found:
        raise UserError(
            f"{options.report} cannot tell of {options.resolution} px: it needs this resolution, "
            f"or two others"
        )
    print(printable(
        f"{options.resolution} px ({tokens:,} tokens), {options.mode}, the whole model of size "
        f"{size}, one image of a batch of {batch}, on {report['device_name']}:\n"
    ))  # fmt: skip
    print(printable("\n".join(advise(found, limit, metric, lower))) + "\n")
    rows = [
        [c.label, treatments[c.label], amount(c.seconds, "s"),
         "" if math.isnan(c.launched) else amount(c.launched, "s"), memory(c.peak),
         "" if c.quality is None else f"{c.quality:.4g}",
         "measured" if c.is_measured else c.how]
        for c in sorted(found, key=lambda c: c.seconds)
    ]  # fmt: skip
    heading = ["mechanism", "fastest", "time", "eager", "memory of the batch",
               metric or "quality", ""]  # fmt: skip
    print(printable(markdown_table(heading, rows, padded=True)) + "\n")
    caveats = (
        (True, "Times are those of the model recorded as a CUDA graph, or compiled and recorded, "
         "whichever is faster; --launched ranks by eager ones."),
        (True, "Memory is of one eager step, above weights and optimizer states."),
        (not all(c.is_measured for c in found), "What is called interpolated or estimated lies "
         "on the line through the two nearest sizes in log-log."),
        (not source, "Nothing is said of quality, and mechanisms differ in it: train them with "
         "python recipes/compare.py and name its folder with --quality."),
        (source, f"{source}, not at yours; its report says which differences are more than "
         f"noise. Mechanisms without a result are left out of the choice."),
        (True, "Another device, dtype or batch gives another order: measure on your own."),
        (unknown, f"Too few sizes to tell: {', '.join(unknown)}."),
    )  # fmt: skip
    lines = ["What to keep in mind:", *(f"- {text}" for applies, text in caveats if applies)]
    print(printable("\n".join(lines)))
    return DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.recommend", description=__doc__)
    parser.add_argument(
        "report",
        type=Path,
        help="JSON of pytest bench/ --benchmark-json, or of bench.whole_models --out",
    )
    parser.add_argument("--resolution", type=whole(PIXELS_PER_TOKEN), default=1024, help="pixels")
    parser.add_argument("--memory", default=None, help="what must suffice, such as 8GiB")
    parser.add_argument("--quality", default=None, help="folder of recipes/compare.py")
    parser.add_argument(
        "--attn", type=numbers(str), default=[], metavar="PATTERN,...",
        help="mixtures to weigh too, such as sana*3+softmax or with options "
        "sana*3+softmax:sana.qk_norm=true, from their mechanisms' figures",
    )  # fmt: skip
    parser.add_argument("--mode", choices=("forward", "train"), default="forward")
    parser.add_argument("--width", type=whole(1), default=None, help="of the tokens")
    parser.add_argument("--dtype", default=None, help="such as bfloat16")
    parser.add_argument(
        "--launched", action="store_true", help="rank by what the host takes, too, on a GPU"
    )
    parser.add_argument("--size", default=None, help="of whole models (default: the first there)")
    parser.add_argument("--depth", type=whole(1), default=12, help="blocks (default: 12)")
    return parser


def _family(cases: pd.DataFrame, options: argparse.Namespace) -> dict[str, Any]:
    asked = {"mode": options.mode, "width": options.width, "dtype": options.dtype}
    there = families(cases, "layer")
    for family in there:
        if all(value in (None, family[name]) for name, value in asked.items()):
            return family
    shown = sorted(f"{f['mode']} d={f['width']} {f['dtype']}" for f in there)
    flags = " ".join(f"--{name} {value}" for name, value in asked.items() if value)
    raise UserError(
        f"{options.report} has no layers for {flags}; it has {', '.join(shown) or 'none'}"
    )


def _quality(folder: str | None) -> tuple[dict[str, float], str | None, bool, str]:
    """Values of each mechanism, the metric, whether smaller is better, and what they are of."""
    if folder is None:
        return {}, None, True, ""
    summary = read_quality(folder)
    metric, lower = best_metric(summary)
    rows: Any = summary[summary["metric"] == metric]
    protocol = "controlled"  # attention is compared here in backbones of one depth
    if "protocol" in rows:
        protocols = sorted(set(rows["protocol"]))
        protocol = protocol if protocol in protocols else protocols[0]
        rows = rows[rows["protocol"] == protocol]
    # The hardest setting stands for all: the largest resolution of the comparison.
    largest = rows["resolution"].max()
    rows = rows[rows["resolution"] == largest]
    # A mean over the settings that are easy would win.
    settings = rows.groupby("variant").size()
    partly = sorted(settings.index[settings < settings.max()])
    means = rows[~rows["variant"].isin(partly)].groupby("variant")["mean"].mean()
    source = f"{metric} is of small models at {largest} px, protocol {protocol}"
    source += f", without {', '.join(partly)}: not measured in every setting" if partly else ""
    return {str(name): float(mean) for name, mean in means.items()}, metric, lower, source


if __name__ == "__main__":
    run_script(main)
