"""``python -m bench.shipped``: the figures that come with attnzoo, from what is committed.

Times and memory are those of ``docs/plots/whole-models*.json``. Of a case that several files have,
the newest counts in which both it and softmax ran as a user runs them, in every treatment of
before. Quality is that of the studies' tables under ``docs``, and of digits in ``docs/zoo.csv``.
Writes ``attnzoo/command/figures.json``, which ``attnzoo recommend`` and ``bench.first_screen``
read; run it after any of these files has changed.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from attnzoo.command.figures import Figures, Quality, Row, Source, dumps
from backbones import build_backbone
from bench import zoo
from bench.whole_models.figures import fastest, over_fastest, read_whole, replaces
from recipes.lab.console import DONE, UserError, run_script
from recipes.lab.files import require_writable, write_text
from recipes.studies.quality import table
from recipes.studies.quality.decide import far_loss
from recipes.studies.quality.plans import Scale

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "attnzoo" / "command" / "figures.json"
_STUDIED = {"study", "protocol", "variant", "data", "px", "tokens", "state", "loss"}


def collected(paths: Iterable[Path], quality: list[Quality]) -> Figures:
    """What files of ``bench.whole_models`` say, joined, of devices of which softmax is known.

    Raises:
        UserError: One of them is no such file, or there is none.
    """
    reports = sorted(
        ((path, read_whole(path)) for path in paths), key=lambda pair: str(pair[1]["datetime"])
    )
    if not reports:
        raise UserError("there is no JSON of python -m bench.whole_models --out to ship")
    sources, cases = [], {}
    for index, (path, report) in enumerate(reports):
        sources.append(Source(
            device_of(report), report["device_name"], report["datetime"][:10], report["commit"],
            report["versions"], path.name,
        ))  # fmt: skip
        for case in report["cases"]:
            device = sources[-1].device
            key = device, *(case[name] for name in ("size", "mode", "tokens", "mechanism"))
            older = cases[key][0] if key in cases else case
            if replaces(case, older, device):
                cases[key] = case, index
    compared = {key[:3] for key in cases if key[4] == "softmax"}
    kept = [_row(*found) for key, found in sorted(cases.items()) if key[:3] in compared]
    used = sorted({row.source for row in kept})
    return Figures(
        [sources[index] for index in used],
        [dataclasses.replace(row, source=used.index(row.source)) for row in kept],
        quality,
    )


def device_of(report: dict[str, Any]) -> str:
    """The short name of what a report was measured on: "cpu", "h100"."""
    if report.get("device") == "cpu":
        return "cpu"
    model = re.search(r"\b[A-Z]+\d+\b", report["device_name"])
    return (model[0] if model else report["device_name"]).lower()


def _row(case: dict[str, Any], source: int) -> Row:
    """A case that ran as users run it, as a row."""
    is_softmax = case["mechanism"] == "softmax"
    best, over = fastest(case), (1.0, "") if is_softmax else over_fastest(case)
    assert best is not None and over is not None
    eager = case["seconds"].get("eager")
    return Row(
        source, case["mechanism"], case["size"], case["mode"], case["tokens"], case["batch"],
        _parameters(case), best[0], best[1], eager and eager["median"], over[0],
        case["peak_memory"],
    )  # fmt: skip


def _parameters(case: dict[str, Any]) -> int:
    with torch.device("meta"):
        model = build_backbone(case["mechanism"], case["size"], "controlled", case["resolution"])
    return sum(parameter.numel() for parameter in model.parameters())


def studied_quality(paths: Iterable[Path]) -> list[Quality]:
    """Held-out losses of the studies' tables (``recipes/study.py``), at equal depth.

    Models of another size are another comparison. Of a variant of which a run did not train there
    is none: a mean with it says nothing.

    Raises:
        UserError: Two tables have a setting at two scales, whose losses have no mean.
    """
    losses: dict[tuple[str, str, int, str, int], list[float]] = {}
    of_setting: dict[tuple[str, int, str], list[float]] = {}
    scales: dict[tuple[str, int, str], tuple[Any, ...]] = {}
    for path in sorted(paths):
        with path.open(encoding="utf-8", newline="") as file:
            if not set(next(csv.reader(file), ())) >= _STUDIED:
                continue
        runs = table.read(path)
        runs = runs.loc[(runs["state"] == "ok") & (runs["protocol"] == "depth")]
        for row in table.one_each(runs.loc[runs["loss"].notna()]).to_dict("records"):
            setting = row["data"], row["px"], row["model"]
            scale = row["steps"], row["batch"], row["learning_rate"]
            if scales.setdefault(setting, scale) != scale:
                raise UserError(f"{path} has {row['data']} at {row['px']} px at another scale")
            losses.setdefault((row["variant"], *setting, row["tokens"]), []).append(row["loss"])
            of_setting.setdefault(setting, []).append(row["loss"])
    far = {setting: far_loss(pd.Series(found)) for setting, found in of_setting.items()}
    return [
        _quality(variant, tokens, found, f"{data}, {px} px{f', {model}' * (model != Scale.model)}")
        for (variant, data, px, model, tokens), found in sorted(losses.items())
        if max(found) <= far[data, px, model]
    ]


def digits_quality(path: Path = zoo.TABLE) -> list[Quality]:
    """The held-out losses of the whole zoo on digits.

    Its other data set is not finished: softmax has one seed there.

    Raises:
        UserError: The file is no such table.
    """
    runs = zoo.read(path)
    runs = runs.loc[(runs["data"] == "digits") & (runs["state"] == "ok")]
    return [
        _quality(str(name), int(own["tokens"].iloc[0]), own["loss"].tolist(), "digits, 8 px")
        for name, own in runs.groupby("variant")
    ]


def _quality(name: str, tokens: int, losses: list[float], setting: str) -> Quality:
    return Quality(
        name, tokens, "held-out loss", True, round(statistics.fmean(losses), 5),
        round((max(losses) - min(losses)) / 2, 5), len(losses), setting,
    )  # fmt: skip


def committed() -> Figures:
    """What the repository's files say now."""
    quality = studied_quality((ROOT / "docs").rglob("*.csv")) + digits_quality()
    return collected((ROOT / "docs" / "plots").glob("whole-models*.json"), quality)


def main(arguments: list[str]) -> int:
    """Writes the file."""
    parser = argparse.ArgumentParser(prog="python -m bench.shipped", description=__doc__)
    parser.add_argument("--out", type=Path, default=TARGET, help="(default: the package's)")
    options = parser.parse_args(arguments)
    require_writable(options.out)
    figures = committed()
    write_text(options.out, dumps(figures))
    print(f"{options.out}: {len(figures.rows)} steps, {len(figures.quality)} results of quality")
    return DONE


if __name__ == "__main__":
    run_script(main)
