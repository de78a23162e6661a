"""``python -m bench.first_screen``: which attention at which resolution, as a table and a picture.

Both are made of the figures that ship (``python -m bench.shipped``). The table is printed, or put
between ``<!-- first screen -->`` and ``<!-- /first screen -->`` of every page of ``--into``.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from attnzoo.command.advice import Choice, of_whole_models
from attnzoo.command.figures import (
    PIXELS_PER_TOKEN,
    SEEDS,
    Figures,
    Quality,
    Row,
    as_measured,
    faster_from,
    loads,
)
from attnzoo.command.fits import pareto
from attnzoo.command.recommend import BYTES_PER_PARAMETER, chosen_rows
from attnzoo.command.units import memory
from bench.shipped import ROOT, TARGET
from bench.tables import parts_around, put_into
from bench.whole_models.figures import faster_words
from recipes.lab.console import DONE, UserError, printable, run_script
from recipes.lab.files import require_writable, whole_file
from recipes.lab.pages import markdown_table

MARK, PICTURE = "first screen", "first-screen.png"
MODE = "forward"
PANELS = 3
FRONT, REST, REFERENCE = "#0b63b0", "#8a8a8a", "#000000"
NEAR = 4  # quality speaks for a resolution where it was measured on as many tokens, within this
TIE = 0.05  # of the time; two runs of one case differ by as much


class Screen(NamedTuple):
    """What is known at one resolution.

    Attributes:
        tokens: Of one image.
        size: Of the backbone.
        rows: All that was measured of that size.
        found: Every mechanism that was measured at this very resolution.
        batch: Images, of the memory.
        quality: Of the comparison that is nearest.
    """

    tokens: int
    size: str
    rows: list[Row]
    found: list[Choice]
    batch: int
    quality: list[Quality]

    @property
    def resolution(self) -> int:
        """Pixels of a latent model."""
        return math.isqrt(self.tokens) * PIXELS_PER_TOKEN

    def over_softmax(self, choice: Choice) -> float:
        """A time over softmax's."""
        return choice.seconds / self.softmax.seconds

    @property
    def softmax(self) -> Choice:
        """The reference."""
        return next(choice for choice in self.found if choice.label == "softmax")


def screens(figures: Figures, device: str) -> list[Screen]:
    """Every resolution at which softmax was measured, the smallest first.

    Raises:
        UserError: There is none.
    """
    rows = [row for row in figures.rows if figures.sources[row.source].device == device]
    sizes = {row.tokens for row in rows if (row.mechanism, row.mode) == ("softmax", MODE)}
    if not sizes:
        raise UserError(f"there are no whole models of softmax on {device} to compare with")
    found = []
    for tokens in sorted(sizes):
        size, mine = chosen_rows(figures, device, MODE, None, tokens)
        batch = next(row.batch for row in mine if row.tokens == tokens)
        quality = figures.quality_near(tokens)
        measured = as_measured(mine, BYTES_PER_PARAMETER[MODE])
        choices = of_whole_models(measured, tokens, batch, {q.mechanism: q.mean for q in quality})
        known = [choice for choice in choices[0] if choice.is_measured]
        found.append(Screen(tokens, size, mine, known, batch, quality))
    return found


def table(figures: Figures, device: str) -> str:
    """The answers as Markdown: by resolution, and from which one on each is faster."""
    name = "CPU" if device == "cpu" else device.upper()
    rows = [
        [f"{s.resolution} px ({s.tokens:,} tokens, {s.size})", *_answers(s, f"measured on {name}")]
        for s in screens(figures, device)
    ]
    heading = ["latent model", "fastest", "least memory", "best quality measured", "safe choice"]
    return f"{markdown_table(heading, rows)}\n\n{_since(figures, device)}"


def _answers(screen: Screen, how: str) -> list[str]:
    fastest = min(screen.found, key=lambda c: c.seconds)
    over = screen.over_softmax(fastest)
    parts = [f"{fastest.label}, {over:.2f} x time, {how}"]
    if fastest.label == "softmax":
        parts = [f"softmax: nothing measured is faster, {how}"]
    elif over > 1 - TIE:
        parts = [f"softmax and {fastest.label} alike ({over:.2f} x time), {how}"]
    # Those whose memory shows the same are alike; the fastest of them stands for all.
    least = min(c.peak for c in screen.found)
    alike = [c for c in screen.found if memory(c.peak) == memory(least)]
    first = min(alike, key=lambda c: c.seconds)
    tie = " (as softmax)" if screen.softmax in alike and first.label != "softmax" else ""
    if least:
        over = first.peak / screen.softmax.peak
        parts.append(f"{first.label}, {over:.2f} x memory{tie}, {how}")
    else:
        parts.append("not measured")
    parts.append(_best_quality(screen))
    safe, why = safe_choice(screen)
    shown = "" if safe.label == "softmax" else f", {screen.over_softmax(safe):.2f} x time"
    return [*parts, f"{safe.label}{shown}; {why}"]


def _best_quality(screen: Screen) -> str:
    most = max((q.seeds for q in screen.quality), default=0)
    judged = [q for q in screen.quality if q.seeds == most]
    if not judged:
        return "not measured"
    best = (min if judged[0].lower else max)(judged, key=lambda q: q.mean)
    choice = next((c for c in screen.found if c.label == best.mechanism), None)
    time = "time not measured" if choice is None else f"{screen.over_softmax(choice):.2f} x time"
    return f"{best.mechanism.replace(', ', ' with ')}, {time}, small scale"


def safe_choice(screen: Screen) -> tuple[Choice, str]:
    """The fastest of those clearly faster than softmax, and no worse where quality was measured.

    That is softmax, where quality was measured on far fewer tokens, or of few seeds.
    """
    known = {
        q.mechanism: q for q in screen.quality
        if q.seeds >= SEEDS and 1 / NEAR <= q.tokens / screen.tokens <= NEAR
    }  # fmt: skip
    softmax = known.get("softmax")
    if softmax is None:
        return screen.softmax, "quality not measured here"
    sign = 1 if softmax.lower else -1

    def is_no_worse(q: Quality) -> bool:
        return sign * (q.mean - softmax.mean) <= max(q.spread, softmax.spread)

    good = [
        c for c in screen.found
        if screen.over_softmax(c) <= 1 - TIE and c.label in known and is_no_worse(known[c.label])
    ]  # fmt: skip
    if not good:
        return screen.softmax, "nothing faster is as good"
    return min(good, key=lambda c: c.seconds), "no worse at small scale"


def _since(figures: Figures, device: str) -> str:
    """From which resolution on each samples faster than softmax, in a sentence a size."""
    lines = []
    of_device = [r for r in figures.rows if figures.sources[r.source].device == device]
    sizes = {row.size for row in of_device if row.mode == MODE}
    for size in sorted(sizes, key=["tiny", "S", "B", "L"].index):
        rows = figures.of(device, size, MODE)
        since = faster_from(rows)
        last = max(row.resolution for row in rows)
        at_last = {row.mechanism: row.over_softmax for row in rows if row.resolution == last}
        first = min(row.resolution for row in rows if row.mechanism == "softmax")
        said = faster_words(since, first, last, at_last)
        lines.append(f"- A sampling step of size {size} is faster than softmax's with {said}.")
    return "\n".join(lines)


def caption(figures: Figures, device: str) -> str:
    """What the figures are of, and when and where they were measured."""
    timed = {row.source for row in figures.rows if row.mode == MODE}
    used = [z for i, z in enumerate(figures.sources) if z.device == device and i in timed]
    of: dict[str, Quality] = {}
    for q in (q for screen in screens(figures, device) for q in screen.quality):
        if q.setting not in of or q.seeds > of[q.setting].seeds:
            of[q.setting] = q
    alike: dict[tuple[str, int], list[str]] = {}
    for q in of.values():
        alike.setdefault((q.metric, q.seeds), []).append(q.setting)
    quality = "; ".join(
        f"{metric} of small models on {' and '.join(settings)}, {seeds} seeds"
        for (metric, seeds), settings in alike.items()
    )
    commits = ", ".join(dict.fromkeys(source.commit for source in used))
    dates = ", ".join(sorted({source.date for source in used}))
    return (
        f"Time: a sampling step of a latent DiT, an image, recorded and compiled where faster, on "
        f"{used[0].device_name} (commits {commits}; {dates}). Quality: "
        f"{quality or 'not measured'}; bars span seeds. Cross: softmax; "
        f"line: what nothing beats in both."
    )


def draw(figures: Figures, device: str, path: Path) -> None:
    """Draws time against quality, a panel a resolution."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [s for s in screens(figures, device) if len(_points(s)) > 1][-PANELS:]
    if not shown:
        raise UserError("no mechanism has both a time and a quality: there is nothing to draw")
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(
            1, len(shown), figsize=(3.7 * len(shown), 3.6), layout="constrained", squeeze=False
        )
        for index, (ax, screen) in enumerate(zip(axes[0], shown, strict=True)):
            _panel(ax, screen)
            if index == 0:
                ax.set_ylabel("ms a sampling step, an image")
        with whole_file(path) as target:
            figure.savefig(target, dpi=160, facecolor="white", format="png")
        plt.close(figure)


def _points(screen: Screen) -> list[tuple[Choice, Quality]]:
    known = {q.mechanism: q for q in screen.quality}
    return [(c, known[c.label]) for c in screen.found if c.label in known]


def _panel(ax: Any, screen: Screen) -> None:
    from matplotlib.ticker import MaxNLocator, NullLocator

    points = _points(screen)
    sign = 1 if points[0][1].lower else -1
    front = pareto({c.label: (c.seconds, sign * q.mean) for c, q in points})
    line = sorted((q.mean, c.seconds * 1e3) for c, q in points if c.label in front)
    ax.plot(*zip(*line, strict=True), color=FRONT, linewidth=1.2, zorder=1)
    for choice, quality in points:
        x, y, name = quality.mean, choice.seconds * 1e3, choice.label
        color = FRONT if name in front else REST
        if name == "softmax":
            color = REFERENCE
            ax.axhline(y, color=REST, linewidth=0.6, linestyle=":", zorder=0)
        marker, size = ("X", 8) if name == "softmax" else ("o", 5)
        ax.errorbar(x, y, xerr=quality.spread, color=color, marker=marker, markersize=size,
                    elinewidth=0.8, capsize=2, zorder=3)  # fmt: skip
    ax.set_yscale("log")
    ax.margins(x=0.16, y=0.12)
    _label(ax, points, front)
    # A range of less than a decade may hold no power of ten, and few round numbers.
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(NullLocator())
    quality = points[0][1]
    ax.set_title(f"{screen.resolution} px ({screen.tokens:,} tokens), size {screen.size}")
    better = "lower" if quality.lower else "higher"
    ax.set_xlabel(f"{quality.metric}, {better} is better\n(small scale: {quality.setting})")


_PLACES = (  # of a name beside its point: points to the right, points up, what of it stands there
    (6, 3, "left"), (6, -9, "left"), (-6, 3, "right"), (-6, -9, "right"), (0, 8, "center"),
    (0, -14, "center"), (10, 12, "left"), (-10, 12, "right"), (10, -18, "left"),
    (-10, -18, "right"),
)  # fmt: skip


def _label(ax: Any, points: Sequence[tuple[Choice, Quality]], front: Sequence[str]) -> None:
    """Writes names beside the points, each where it hides no other, most important first."""
    figure = ax.figure
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    taken: list[Any] = []
    spots = [ax.transData.transform((q.mean, c.seconds * 1e3)) for c, q in points]
    order = sorted(points, key=lambda p: (p[0].label != "softmax", p[0].label not in front))
    for choice, quality in order:
        name = choice.label
        color = FRONT if name in front else REFERENCE if name == "softmax" else "#666666"
        for dx, dy, side in _PLACES:
            text = ax.annotate(
                name, (quality.mean, choice.seconds * 1e3), (dx, dy), ha=side, fontsize=7.5,
                textcoords="offset points", color=color,
                fontweight="bold" if name in front or name == "softmax" else "normal",
            )  # fmt: skip
            box = text.get_window_extent(renderer).padded(1)
            hides = any(box.overlaps(other) for other in taken)
            hides |= any(box.contains(*spot) for spot in spots)
            if not hides:
                taken.append(box)
                break
            text.remove()


def main(arguments: list[str]) -> int:
    """Draws, and prints the table or puts it into pages."""
    parser = argparse.ArgumentParser(prog="python -m bench.first_screen", description=__doc__)
    parser.add_argument("--figures", type=Path, default=TARGET, help="JSON of bench.shipped")
    parser.add_argument("--device", default="h100", help="whose figures (default: h100)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "plots", help="of the picture")
    parser.add_argument("--into", type=Path, action="append", default=[], metavar="PAGE",
                        help="such as README.md; repeat")  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        figures = loads(options.figures.read_text("utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{options.figures} is no JSON of python -m bench.shipped") from error
    for page in options.into:
        parts_around(page, MARK)
    picture = options.out / PICTURE
    require_writable(picture)
    said = table(figures, options.device)
    draw(figures, options.device, picture)
    for page in options.into or [Path("README.md")]:
        link = Path(os.path.relpath(picture.resolve(), page.resolve().parent)).as_posix()
        alt = "Time of a sampling step against quality, by resolution"
        text = f"![{alt}]({link})\n\n{caption(figures, options.device)}\n\n{said}"
        if options.into:
            put_into(page, MARK, text)
        else:
            print(printable(text))
    return DONE


if __name__ == "__main__":
    run_script(main)
