"""The report of a comparison: one HTML file that needs no other, and its numbers as CSV."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from recipes.lab.console import one_line
from recipes.lab.drawing.canvas import png
from recipes.lab.evaluation.scores import metric_of
from recipes.lab.files import write_text
from recipes.lab.pages import html_image, html_page, html_table, html_text
from recipes.studies.comparison.pictures import figures, samples_of
from recipes.studies.comparison.planned import OK, PlannedRun
from recipes.studies.comparison.summary import (
    SETTING,
    chance_lines,
    collect,
    grouped_by,
    headlines,
    means_table,
    metric_columns,
    scaled_mean,
    setting_name,
    summarize,
)
from recipes.studies.comparison.tables import write_table
from recipes.studies.comparison.verdicts import summary_sentence


def write_report(
    out: Path, planned: Sequence[PlannedRun], paper: pd.DataFrame, title: str
) -> dict[str, str]:
    """Writes report.html, runs.csv, summary.csv, curves.csv and command.txt into ``out``.

    Args:
        out: Folder of the comparison.
        planned: All its runs, done or not.
        paper: The paper's numbers of the same variants, to stand beside ours; may be empty.
        title: The command, as the reader can repeat it.

    Returns:
        The state of every run, by its name.
    """
    command = f"python recipes/{one_line(title)}"
    runs, curves = collect(out, planned)
    done = runs.loc[runs["state"] == OK]
    write_text(out / "command.txt", f"{command}\n")
    write_table(out / "runs.csv", runs)
    write_table(out / "curves.csv", curves)
    write_table(out / "summary.csv", summarize(done))
    parts = [f"<h1>Comparison</h1><p><code>{html_text(command)}</code></p>", _states(runs)]
    if len(done):
        parts += ["<h2>In plain words</h2>", *_sentences(done)]
        parts += ["<h2>Numbers</h2>", *_numbers(done)]
        for name, figure in figures(done, curves):
            parts.append(f"<h2>{html_text(name)}</h2>{html_image(png(figure, dpi=90), name)}")
        parts += ["<h2>Samples</h2>", *_samples(out, planned, done)]
    if len(paper):
        parts.append(
            "<h2>The paper's numbers</h2><p>ImageNet subsets at 256 px, models of size S, "
            "guidance 4.0, Inception features: <b>another experiment</b>, to compare orders with, "
            f"never values.</p>{html_table(paper.columns, paper.astype(object).values.tolist())}"
        )
    write_text(out / "report.html", html_page("attnzoo comparison", "\n".join(parts)))
    return dict(zip(runs["run"], runs["state"], strict=True))


def _states(runs: pd.DataFrame) -> str:
    first = runs.drop_duplicates("run")
    bad = first.loc[first["state"] != OK].to_dict("records")
    text = f"<p>{len(first) - len(bad)} of {len(first)} runs are done.</p>"
    lines = "".join(
        f"<li class=bad>{html_text(row['run'])}: <b>{html_text(row['state'])}</b>"
        f"{': ' + html_text(row['error']) if isinstance(row['error'], str) else ''}</li>"
        for row in bad
    )
    return f"{text}<p>Without a number:</p><ul>{lines}</ul>" if bad else text


def _sentences(done: pd.DataFrame) -> Iterator[str]:
    yield (
        f"<p>{done['seed'].nunique()} seed(s). Variants are compared within each seed (same "
        f"images, noise and times); a difference counts if its 95 % interval (Student's t) leaves "
        f"out 0. No correction for the number of comparisons: of twenty true ties one will look "
        f"like a difference.</p>"
    )
    for heading, group, _ in _by_scale(done):
        lines = [f"<li>{html_text(summary_sentence(group, m))}</li>" for m in headlines(group)]
        lines += [f"<li class=bad>{html_text(line)}</li>" for line in chance_lines(group)]
        yield f"{heading}<ul>{''.join(lines)}</ul>"


def _by_scale(done: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame, float]]:
    """(heading, rows, guidance scale) of every setting and scale."""
    for (*setting, cfg), group in grouped_by(done, [*SETTING, "cfg"]):
        yield f"<h3>{html_text(setting_name(setting))}, guidance {cfg:g}</h3>", group, cfg


def _numbers(done: pd.DataFrame) -> Iterator[str]:
    yield (
        "<p>Mean ± standard deviation over seeds; lower is better for losses, FID, sFID, KID, "
        "sKID, higher for the rest. [classifier] is the exact classifier of the shapes. The "
        "last row is what as many real images score.</p>"
    )
    # Spreads over subsets and second estimates are in the CSV.
    more = ("_std", "_full", *(f"_quarter_{number}" for number in range(1, 5)))
    metrics = [m for m in metric_columns(done) if not metric_of(m).endswith(more)]
    for heading, group, _ in _by_scale(done):
        table = means_table(group, metrics, 4).astype(object)
        table.insert(0, "MMACs", scaled_mean(group, "macs", 1e-6))
        table.insert(1, "ms per image", scaled_mean(group, "forward_seconds", 1e3))
        floor = group.filter(like="floor ").mean()
        table.loc["real images"] = [floor.get(f"floor {name}", "") for name in table.columns]
        rows = table.reset_index().astype(object).values.tolist()
        yield heading + html_table(["", *table.columns], rows)


def _samples(out: Path, planned: Sequence[PlannedRun], done: pd.DataFrame) -> Iterator[str]:
    """For every setting and scale one image of each class per variant, from the same noise."""
    by_name = {one.name: one for one in planned}
    for heading, group, cfg in _by_scale(done):
        rows = ""
        for row in group.loc[group["seed"] == group["seed"].min()].to_dict("records"):
            if content := samples_of(by_name[row["run"]], out, cfg):
                picture = html_image(content, f"samples of {row['variant']}")
                rows += f"<tr><td>{html_text(row['variant'])}</td><td>{picture}</td></tr>"
        yield f"{heading}<table>{rows}</table>"
