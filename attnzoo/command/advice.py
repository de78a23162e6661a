"""Which mechanisms no other beats in time, memory and quality, and how that is said."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from attnzoo.command.fits import pareto, value_at
from attnzoo.command.units import amount, memory


@dataclasses.dataclass(frozen=True)
class Choice:
    """One mechanism at the resolution asked for."""

    label: str  # the mechanism with its options
    # Of the unit that is compared: all blocks, or an image of a whole model. On a GPU the
    # device's, unless launched times are asked for.
    seconds: float
    launched: float  # the same with what the host takes to launch every operator
    # Bytes; of layers one block's peak and the weights of all, and in training what every block
    # keeps for its backward. 0 where no memory was measured.
    peak: float
    is_measured: bool  # not put on a line between other resolutions
    quality: float | None = None  # of the comparison
    how: str = "estimated"  # it is known, where it was not measured


class Measured(NamedTuple):
    """What a whole model took at one size, an image."""

    label: str
    tokens: int
    seconds: float
    launched: float | None  # None where it was not launched eagerly
    peak: float  # bytes above the weights; 0 where it was not measured
    treatment: str  # how it is the fastest
    fixed: float = 0.0  # bytes of weights, and of what an optimizer keeps


def of_whole_models(
    rows: Iterable[Measured], tokens: int, batch: int, quality: dict[str, float],
    is_launched: bool = False,
) -> tuple[list[Choice], dict[str, str], list[str]]:  # fmt: skip
    """What one image costs in every whole model at ``tokens`` tokens.

    Returns:
        Choices, whose peak is that of ``batch`` images; how each is run where it was measured
        nearest to ``tokens``; and the labels that cannot be told.
    """
    of_label: dict[str, list[Measured]] = {}
    rows = list(rows)
    softmax = {row.tokens: row.seconds for row in rows if row.label == "softmax"}
    here = value_at(list(softmax.items()), tokens)
    for row in sorted(rows, key=lambda row: abs(math.log(row.tokens / tokens))):
        of_label.setdefault(row.label, []).append(row)
    found, treatments, unknown = [], {}, []
    for label, mine in sorted(of_label.items()):
        treatments[label] = mine[0].treatment
        launched = value_at([(z.tokens, z.launched) for z in mine if z.launched], tokens)
        spent = launched
        if not is_launched:
            # Times over softmax's bend less between sizes than times do.
            known = here is not None and softmax.keys() >= {z.tokens for z in mine}
            unit = softmax if known else {}
            spent = value_at([(z.tokens, z.seconds / unit.get(z.tokens, 1)) for z in mine], tokens)
            if spent is not None and here is not None and known:
                spent = spent[0] * here[0], spent[1] and here[1]
        peak = value_at([(z.tokens, z.peak) for z in mine], tokens)
        if spent is None or peak is None:
            unknown.append(label)
            continue
        sizes = sorted(z.tokens for z in mine)
        how = "interpolated" if sizes[0] < tokens < sizes[-1] else "estimated"
        found.append(Choice(
            label, spent[0], math.nan if launched is None else launched[0],
            peak[0] * batch + mine[0].fixed if peak[0] else 0.0, spent[1], quality.get(label), how,
        ))  # fmt: skip
    return found, treatments, unknown


def _shown(value: float) -> float:
    return float(f"{value:.3g}")


def advise(
    found: Sequence[Choice], limit: float | None, metric: str | None, lower: bool
) -> list[str]:
    """The Pareto front in words, the fastest first.

    Args:
        found: What there is to choose of; not empty.
        limit: Bytes that must suffice.
        metric: What ``Choice.quality`` is, if it counts.
        lower: Whether less of it is better.
    """
    fitting = [c for c in found if limit is None or c.peak <= limit]
    lines = []
    if too_large := [f"{c.label} ({memory(c.peak)})" for c in found if c not in fitting]:
        lines.append(f"Do not fit into {memory(limit or 0)}: {', '.join(too_large)}.")
    if not fitting:
        least = min(found, key=lambda c: c.peak)
        return [
            *lines,
            f"Nothing fits. The smallest is {least.label} with {memory(least.peak)}: take a "
            f"lower resolution, a smaller batch or width, or gradient checkpointing.",
        ]
    judged = [c for c in fitting if c.quality is not None] if metric else []
    sign = 1 if lower else -1
    # What shows the same is the same, but for a quality that was measured.
    points = {
        c.label: (_shown(c.seconds), _shown(c.peak), sign * (c.quality or 0.0) if metric else 0.0)
        for c in judged or fitting
    }
    best = pareto(points)
    front = [c for c in sorted(fitting, key=lambda c: c.seconds) if c.label in best]
    softmax = next((c for c in found if c.label == "softmax"), None)
    has_memory = any(c.peak for c in fitting)
    praises: dict[str, list[str]] = {c.label: [] for c in front}
    contests: list[tuple[str, list[Choice], Callable[[Choice], float], Callable]] = [
        ("the fastest", front, lambda c: c.seconds, lambda c: amount(c.seconds, "s")),
        ("takes the least memory", front if has_memory else [], lambda c: c.peak,
         lambda c: memory(c.peak)),
        (f"the best {metric}", judged, lambda c: sign * (c.quality or 0),
         lambda c: f"{c.quality:.4g}"),
    ]  # fmt: skip
    for what, among, value, shown in contests:
        # A tie is where the figures shown are the same.
        least = shown(min(among, key=value)) if among else None
        winners = [c.label for c in among if shown(c) == least]
        for name in set(winners) & praises.keys():
            others = ", ".join(label for label in winners if label != name)
            praises[name].append(f"{what} (a tie with {others})" if others else what)
    for c in front:
        text = f"- {c.label}: {', '.join(praises[c.label]) or 'a compromise'}; "
        text += amount(c.seconds, "s") + (f", {memory(c.peak)}" if has_memory else "")
        if softmax and c is not softmax:
            factor = softmax.seconds / c.seconds
            than = f"{factor:.2f} x faster" if factor >= 1 else f"{1 / factor:.2f} x slower"
            text += ", as fast as softmax" if "1.00" in than[:4] else f", {than} than softmax"
        if c.quality is not None and metric:
            text += f", {metric} {c.quality:.4g}"
        lines.append(text + ("" if c.is_measured else f" ({c.how})") + ".")
    if beaten := sorted(c.label for c in judged or fitting if c not in front):
        lines.append(f"Beaten in everything that was compared: {', '.join(beaten)}.")
    if judged and (rest := sorted(c.label for c in fitting if c not in judged)):
        lines.append(f"Not compared, for want of {metric}: {', '.join(rest)}.")
    if softmax in fitting and len(fitting) > 1 and front[0] is softmax:
        lines.append("Softmax wins in time: nothing else that fits is faster.")
    return lines
