"""Trains, samples and measures a grid of mechanisms, data, resolutions and seeds; one report.

    python recipes/compare.py --attn softmax,sana,focused,dydila --data shapes \\
        --resolutions 16,32,64 --seeds 3 --protocol controlled

Every cell is a run of its own in its own process: one that fails stops no other, and the same
command goes on where it was stopped. Runs of one seed see the same images, noise and times. The
folder then holds report.html, which needs no other file, and its numbers as CSV.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import math
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import pandas as pd
import torch

from attnzoo import get_attention
from backbones.presets import PAPER_MODELS, PROTOCOLS
from recipes.lab.console import (
    UserError,
    numbers,
    one_line,
    printable,
    progress_bar,
    run_script,
    whole,
)
from recipes.lab.data.latents import is_latent_folder
from recipes.lab.evaluation.measure import prepare_real
from recipes.lab.evaluation.scores import FEWEST
from recipes.lab.files import locked, refuse_links, require_writable
from recipes.lab.imports import add_import_flag, import_all
from recipes.studies.comparison.cells import (
    EVALUATORS,
    OK,
    Cell,
    is_file,
    read_result,
    run_by_submitit,
    run_locally,
)
from recipes.studies.comparison.costs import cost_of
from recipes.studies.comparison.grid import (
    PRESETS,
    Variant,
    check_plan,
    data_facts,
    distinct_data,
    facts_of,
    parse_data,
    parse_variants,
    plan_cells,
    real_of,
    split_data,
    vae_of,
)
from recipes.studies.comparison.report import write_report


def main(arguments: list[str]) -> int:
    """Runs the command line; 0 when every cell is done, 1 when some failed or wait."""
    given = _parser().parse_args(arguments)
    _check_numbers(given)
    import_all(given.imports)
    variants, protocols = _variants(given)
    places = _places(given)
    cells = plan_cells(
        variants,
        places,
        seeds=given.seeds,
        protocols=protocols,
        size=given.size,
        patch_size=given.patch_size,
        steps=given.steps,
        batch_size=given.batch_size,
        cfgs=given.cfg,
        samples=given.samples,
        sampling_steps=given.sampling_steps,
        imports=[str(Path(s).expanduser().resolve()) if is_file(s) else s for s in given.imports],
        vae=given.vae,
        real=given.real,
    )
    out = Path(given.out)
    if not given.report_only:
        check_plan(cells)
    if given.dry_run:
        print(dry_run(cells, given.jobs))
        return 0
    require_writable(out / "report.html")
    for name in (EVALUATORS, "submitit"):
        refuse_links(out, out / name)
    if given.prepare:
        _prepare(cells, out / EVALUATORS)
        return 0
    folders = {cell.folder(out): cell for cell in cells}
    # A report may be written while another process runs the comparison.
    with contextlib.nullcontext() if given.report_only else locked(out / ".lock", warn=_say):
        waiting = [f for f in folders if (read_result(f) or {}).get("state") != OK]
        done = len(cells) - len(waiting)
        counts = f"{done} done, {len(waiting)} to run"
        _say(f"{len(cells)} cells in {out}: {counts}", sys.stdout)
        if not given.report_only and waiting:
            _run(given, folders, waiting, out)
        command = shlex.join(["compare.py", *(a for a in arguments if a != "--report-only")])
        states = write_report(out, cells, variants, title=command)
    written = [str(out / name) for name in ("report.html", "cells.csv", "summary.csv")]
    _say("report: {}   numbers: {}, {}".format(*written), sys.stdout)
    return 0 if all(state == OK for state in states.values()) else 1


def _say(line: str, file: TextIO | None = None) -> None:
    # A reader that has gone away, as in "2>&1 | head", is no reason to stop the runs.
    with contextlib.suppress(OSError):
        print(printable(line), file=file or sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python recipes/compare.py",
        description="Compare mechanisms: train, sample and measure a grid of runs, and report.",
    )
    flag = parser.add_argument
    flag("--attn", help="mechanisms, such as softmax,dydila:lambda_init=0.1:conv=none")
    flag("--preset", choices=list(PRESETS), help="the rows of one of the paper's tables")
    flag("--data", default="shapes",
         help="such as shapes,shapes/long-range,fashion-mnist@28, folders of images, or latents "
         "from recipes/encode.py")  # fmt: skip
    flag("--vae", help="folder or hub id of an AutoencoderKL: encodes images, decodes latents")
    flag("--real", help="folder of real images by class to measure with (default: the data's own)")
    flag("--resolutions", type=numbers(int), default=[], help="in pixels; default: the data's")
    flag("--seeds", type=whole(1), default=3, help="number of seeds")
    flag(
        "--protocol", help=f"some of {','.join(PROTOCOLS)} (default: controlled, or the preset's)"
    )
    flag("--size", default="tiny", help="tiny, S, B or L")
    flag("--patch-size", type=whole(1),
         help="at every resolution; default: 4 pixels, or 2 of latents")  # fmt: skip
    flag("--steps", type=whole(1), default=1000, help="of training, for every cell")
    flag("--batch-size", type=whole(1), default=64, help="images per step")
    flag("--cfg", type=numbers(float), default=[1.0, 4.0], help="guidance scales to measure")
    flag("--samples", type=whole(FEWEST), default=500, help="images per scale")
    flag("--sampling-steps", type=whole(1), default=20, help="model evaluations per image")
    flag("--jobs", type=whole(1), default=1, help="cells at the same time")
    flag("--time-budget", type=float, help="minutes after which no new cell starts")
    flag("--engine", choices=["process", "submitit"], default="process")
    flag("--cluster", default="local", help="of submitit: local or slurm")
    flag("--run-minutes", "--cell-minutes", type=float, default=120.0,
         help="limit of one run; it is saved, and goes on when compared again")  # fmt: skip
    add_import_flag(parser)
    flag("--dry-run", action="store_true", help="print the plan and what it would cost")
    flag("--prepare", action="store_true",
         help="only make what measures the images, OUT/.evaluators, to be carried")  # fmt: skip
    flag("--report-only", action="store_true", help="write the report of what there is")
    flag("--out", default="runs/compare", help="folder of the runs and the report")
    return parser


def _variants(given: argparse.Namespace) -> tuple[list[Variant], Sequence[str]]:
    if (given.attn is None) == (given.preset is None):
        raise UserError("say what to compare: either --attn softmax,dydila or --preset table4")
    protocols = given.protocol.split(",") if given.protocol else None
    if given.preset:
        preset = PRESETS[given.preset]
        return list(preset.variants), protocols or preset.protocols
    variants = parse_variants(given.attn)
    for variant in variants:
        if variant.attn not in PAPER_MODELS:
            get_attention(variant.attn)
    return variants, protocols or ["controlled"]


def _check_numbers(given: argparse.Namespace) -> None:
    """Refuses what argparse lets through."""
    shown = [repr(cfg) for cfg in given.cfg]
    if not shown or not all(map(math.isfinite, given.cfg)):
        raise UserError(f"--cfg takes finite guidance scales, such as 1.0,4.0; got {shown}")
    if len(set(shown)) < len(shown):
        raise UserError(f"--cfg names a guidance scale twice: {', '.join(shown)}")
    if any(side < 1 for side in given.resolutions):
        raise UserError(f"--resolutions takes pixels from 1 up, got {given.resolutions}")
    if not given.run_minutes > 0:
        raise UserError(f"--run-minutes must be above 0, got {given.run_minutes:g}")
    if given.time_budget is not None and not given.time_budget >= 0:
        raise UserError(f"--time-budget must be at least 0, got {given.time_budget:g}")
    if given.engine == "submitit" and importlib.util.find_spec("submitit") is None:
        raise UserError("--engine submitit needs submitit: pip install submitit")


def _places(given: argparse.Namespace) -> list[tuple[str, int | None]]:
    """Data with resolutions: those that are asked for, or the data's own where it cannot."""
    places: list[tuple[str, int | None]] = []
    for item in split_data(given.data):
        text, at, pixels = item.rpartition("@")
        if at and not pixels.isdecimal():
            if not Path(item).expanduser().is_dir():
                raise UserError(f"--data takes NAME or NAME@PIXELS, got {item!r}")
            at = ""
        text = text if at else item
        data, level = parse_data(text)
        vae = vae_of(data, given.vae)
        for resolution in [int(pixels)] if at else given.resolutions or [None]:
            try:
                data_facts(data, level, resolution, vae)
            except UserError as error:
                # Some data has one resolution; those of a list need not all suit it.
                is_fixed = data in ("digits", "fashion-mnist") or is_latent_folder(data)
                if at or len(given.resolutions) < 2 or not is_fixed:
                    raise
                _say(f"{text} at {resolution} px is left out: {error}")
                resolution = None
            if (text, resolution) not in places:
                places.append((text, resolution))
    return places


def _run(
    given: argparse.Namespace, folders: dict[Path, Cell], waiting: list[Path], out: Path
) -> None:
    for folder in waiting:
        folders[folder].prepare(out)
    with contextlib.suppress(BrokenPipeError):  # it reports; what it leaves, the runs make
        _prepare([folders[folder] for folder in waiting], out / EVALUATORS)
    limit = math.inf if given.time_budget is None else 60 * given.time_budget
    started, ended = time.monotonic(), 0

    def report(folder: Path, result: dict[str, Any] | None) -> None:
        nonlocal ended
        ended += 1
        said = "not started, time is up or a signal came"
        if result is not None:
            said = result["state"]
            said += f": {one_line(result['error'])}" if result["state"] != OK else ""
        minutes = (time.monotonic() - started) / 60
        _say(f"{ended} of {len(waiting)}, {minutes:.0f} min: {folders[folder].name}: {said}")

    def may_start() -> bool:
        return time.monotonic() - started < limit

    run = functools.partial(run_locally, minutes=given.run_minutes)
    if given.engine == "submitit":
        parameters = {
            "timeout_min": math.ceil(given.run_minutes),
            "cpus_per_task": max(1, (os.cpu_count() or 1) // given.jobs),
            "gpus_per_node": 1 if torch.cuda.is_available() else 0,
        }
        run = functools.partial(
            run_by_submitit, cluster=given.cluster, log=out / "submitit", parameters=parameters
        )
    run(waiting, given.jobs, may_start, report)


def _prepare(cells: list[Cell], cache: Path) -> None:
    """Makes what measures the images, once, before cells want it at the same time."""
    for cell in distinct_data(cells):
        prepare_real(real_of(cell), cell.samples, cache)


def dry_run(cells: list[Cell], jobs: int) -> str:
    """The plan as a table, with multiply-accumulates and seconds measured just now.

    The seconds count training and sampling of one cell, not the evaluator, which is trained once
    per data set and resolution.
    """
    costs: dict[tuple[Any, ...], dict[str, Any]] = {}
    rows = []
    for cell in progress_bar(cells, desc="measuring", unit="cell", leave=False):
        settings = cell.settings
        key = (cell.label, settings.data, settings.resolution)  # seed and level cost nothing
        if key not in costs:
            costs[key] = cost_of(settings, facts_of(settings), repeats=1)
        cost = costs[key]
        trained = settings.steps * settings.batch_size
        forwards = cell.samples * cell.sampling_steps * sum(1 if c == 1 else 2 for c in cell.cfgs)
        rows.append(
            {
                "data": one_line(f"{settings.data}/{settings.level}"),
                "px": facts_of(settings).image_resolution,
                "variant": one_line(cell.label),
                "depth": cost["depth"],
                "parameters": cost["parameters"],
                "MMACs": cost["macs"] / 1e6,
                "TMACs of the cell": (cost["training_macs"] * trained + cost["macs"] * forwards)
                / 1e12,
                "minutes": (
                    cost["training_seconds"] * trained + cost["forward_seconds"] * forwards
                )
                / 60,
            }
        )
    frame = pd.DataFrame(rows)
    keys = ["data", "px", "variant"]
    grouped = frame.groupby(keys, sort=False, dropna=False).agg(
        seeds=("MMACs", "size"),
        **{name: (name, "first") for name in frame.columns if name not in keys},
    )
    total = frame.minutes.sum()
    return (
        f"{grouped.reset_index().to_string(index=False, float_format=lambda v: f'{v:.3g}')}\n"
        f"{len(cells)} cells, {frame['TMACs of the cell'].sum():.3g} TMACs, about "
        f"{total:.0f} minutes one after the other as this machine is loaded now"
        + (f", {total / jobs:.0f} with --jobs {jobs} if nothing is shared" if jobs > 1 else "")
    )


if __name__ == "__main__":
    run_script(main)
