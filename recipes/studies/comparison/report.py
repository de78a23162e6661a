"""The report of a comparison: one HTML file that needs no other, and its numbers as CSV."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from recipes.lab.console import one_line
from recipes.lab.drawing.canvas import png
from recipes.lab.evaluation.scores import metric_of
from recipes.lab.files import write_text
from recipes.lab.pages import html_image, html_page, html_paragraph, html_table, html_text
from recipes.studies.comparison.pictures import figures, samples_of
from recipes.studies.comparison.planned import OK, PlannedRun
from recipes.studies.comparison.statistics import steps_saved
from recipes.studies.comparison.summary import (
    SETTING,
    Collected,
    by_time_table,
    chance_lines,
    collect,
    grouped_by,
    headlines,
    image_line,
    learning_curve,
    machine_line,
    means_table,
    metric_columns,
    scaled_mean,
    setting_name,
    summarize,
)
from recipes.studies.comparison.tables import write_table
from recipes.studies.comparison.verdicts import (
    ALL_PAIRS,
    Choice,
    Pair,
    Verdict,
    digits_apart,
    family,
    is_of_model,
    ordered_variants,
    summary_sentence,
    verdict_of,
)

COLUMNS = 9  # metrics side by side


def write_report(
    out: Path,
    planned: Sequence[PlannedRun],
    paper: pd.DataFrame,
    title: str,
    choice: Choice = ALL_PAIRS,
) -> dict[str, str]:
    """Writes report.html, runs.csv, summary.csv, curves.csv and command.txt into ``out``.

    Args:
        out: Folder of the comparison.
        planned: All its runs, done or not.
        paper: The paper's numbers of the same variants, to stand beside ours; may be empty.
        title: The command, as the reader can repeat it.
        choice: Which runs are compared with which.

    Returns:
        The state of every run, by its name.
    """
    command = f"python recipes/{one_line(title)}"
    found = collect(out, planned)
    runs, curves = found.runs, found.curves
    done = runs.loc[runs["state"] == OK]
    write_text(out / "command.txt", f"{command}\n")
    write_table(out / "runs.csv", runs)
    write_table(out / "curves.csv", curves)
    write_table(out / "summary.csv", summarize(done))
    parts = [f"<h1>Comparison</h1><p><code>{html_text(command)}</code></p>", _states(runs)]
    if len(done):
        parts += ["<h2>Verdict</h2>", *_verdicts(done, found, choice)]
        for name, figure in figures(done, curves):
            parts.append(f"<h2>{html_text(name)}</h2>{html_image(png(figure, dpi=90), name)}")
        parts += ["<h2>Numbers</h2>", *_numbers(done), *_by_time(done, curves)]
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


def _verdicts(done: pd.DataFrame, found: Collected, choice: Choice) -> Iterator[str]:
    metrics = headlines(done)
    families = {metric: family(done, metric, [*SETTING, "cfg"], choice) for metric in metrics}
    sizes = {metric: sum(map(len, of.values())) for metric, of in families.items()}
    with_what = "every two variants"
    if choice.against is not None:
        with_what = f"every variant with {choice.against}"
    yield html_paragraph(
        f"{done['seed'].nunique()} seed(s). Runs of one seed have seen the same images, noise and "
        f"times, so variants are compared within seeds (Student's t). The comparisons of one "
        f"metric ({with_what}, in every setting and guidance scale here) are one family, "
        f"corrected together by Holm: {max(sizes.values(), default=0)} in the largest. A "
        f"difference is named where its corrected p is below 0.05; else a bound is given that "
        f"the difference is below with 95 % confidence."
    )
    if line := machine_line(done, choice):
        yield html_paragraph(line, "bad")
    for setting, rows in grouped_by(done, SETTING):
        yield f"<h3>{html_text(setting_name(setting))}</h3>"
        present = [metric for metric in metrics if rows[metric].notna().any()]
        for cfg, of_scale in rows.groupby("cfg", sort=False):
            key = (*setting, cfg)
            shown = [metric for metric in present if key in families[metric]]
            if shown and shown[0] == present[0]:
                yield _ranking(of_scale, shown[0], families[shown[0]][key], found, key, choice)
                if line := image_line(rows, found.by_image):
                    yield html_paragraph(line)
                shown = shown[1:]
            lines = [
                f"<li>{html_text(summary_sentence(of_scale, m, families[m][key], choice))}</li>"
                for m in shown
            ]
            lines += [f"<li class=bad>{html_text(line)}</li>" for line in chance_lines(of_scale)]
            if lines:
                yield f"<p>Guidance {cfg:g}:</p><ul>{''.join(lines)}</ul>"


def _ranking(
    rows: pd.DataFrame,
    metric: str,
    verdicts: Mapping[Pair, Verdict],
    found: Collected,
    key: Sequence[Any],
    choice: Choice,
) -> str:
    """The variants of one setting by the metric that matters most, best first."""
    means = ordered_variants(rows, metric)
    if not means:
        return ""
    first = choice.against if choice.against in means else next(iter(means))
    digits = digits_apart(list(means.values())[:2])
    macs, milliseconds = scaled_mean(rows, "macs", 1e-6), scaled_mean(rows, "forward_seconds", 1e3)
    table = []
    for name, mean in means.items():
        one = verdict_of(verdicts, name, first)
        table.append(
            [
                name,
                f"{mean:.{digits}g}",
                *(["", "", ""] if one is None else _effects(one)),
                "" if one is None else _reached(rows, name, first, one, metric, found, key),
                macs[name],
                milliseconds[name],
            ]
        )
    scale = "" if is_of_model(metric) else f", guidance {key[-1]:g}"
    to = f"to {first}" if choice.against is None else f"to {first} (--against)"
    titles = [
        f"{metric}{scale}", "mean", f"difference {to}", "p (Holm)", "verdict",
        "the better one has the other's loss after", "MMACs", "ms per image",
    ]  # fmt: skip
    if not any(row[5] for row in table):
        del titles[5]
        table = [[*row[:5], *row[6:]] for row in table]
    return html_table(titles, table)


def _effects(verdict: Verdict) -> list[str]:
    """Difference, corrected p-value and verdict of a variant against another."""
    found = verdict.difference
    if found is None or not found.pairs:
        return ["", "", "no seed in common"]
    shown = f"{verdict.gain_and_margin(2, 2)} gained"
    if abs(found.percent) <= 1000:
        margin = 100 * found.margin / abs(found.scale)
        shown = f"{found.percent:+.2g} %" + (f" ± {margin:.2g}" if found.pairs > 1 else "")
    p = "" if verdict.corrected is None else f"{verdict.corrected:.2g}"
    words = {"unknown": "too few seeds" if found.pairs < 2 else "no spread to judge by",
             "same": verdict.bound_words}  # fmt: skip
    return [shown, p, words.get(verdict.kind, verdict.kind)]


def _reached(
    rows: pd.DataFrame,
    name: str,
    first: str,
    verdict: Verdict,
    metric: str,
    found: Collected,
    key: Sequence[Any],
) -> str:
    """After how many steps the better one of two has the loss at which the other ends."""
    if not is_of_model(metric) or verdict.kind not in ("better", "worse"):
        return ""
    seeds = set.intersection(*({*rows.loc[rows["variant"] == v, "seed"]} for v in (name, first)))
    better, other = (
        learning_curve(found.curves, key[:-1], variant, seeds)
        for variant in ((name, first) if verdict.kind == "better" else (first, name))
    )
    saved = steps_saved(better, other)
    if saved is None or saved < 0:
        return ""
    last = other[-1][0]
    return f"{last - saved:.0f} of {last:.0f} steps ({saved / last:.0%} saved)"


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
        best = [
            name for metric in headlines(group)[:1] for name in ordered_variants(group, metric)
        ]
        table = table.reindex(list(dict.fromkeys([*best, *table.index])))
        floor = group.filter(like="floor ").mean()
        table.loc["real images"] = [floor.get(f"floor {name}", "") for name in table.columns]
        yield heading
        # What is wider than the page would be cut off on paper.
        for start in range(0, len(table.columns), COLUMNS):
            part = table.iloc[:, start : start + COLUMNS]
            yield html_table(["", *part.columns], part.reset_index().values.tolist())


def _by_time(done: pd.DataFrame, curves: pd.DataFrame) -> Iterator[str]:
    tables = {setting: by_time_table(curves, setting) for setting, _ in grouped_by(done, SETTING)}
    if not any(map(len, tables.values())):
        return
    yield (
        "<h2>Held-out loss at the end of training, by time</h2><p>Of the images that are looked "
        "at during training. Quarters of the time axis go from clean images (1) to noise (4).</p>"
    )
    for setting, table in tables.items():
        if len(table):
            rows = table.map(lambda v: f"{v:.4g}").reset_index().values.tolist()
            yield f"<h3>{html_text(setting_name(setting))}</h3>"
            yield html_table(["", *table.columns], rows)


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
