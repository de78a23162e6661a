"""``python -m bench.whole_models --out whole.json``: what a user runs, timed whole.

Training steps and sampling steps of whole models, each mechanism in turn with softmax under the
same treatment; what launching one layer costs the host; and how far one layer is from its floor.
``--table whole.json`` prints what a file holds, with the figures of ``thresholds.toml``.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import math
import multiprocessing
import os
import re
import time
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import attnzoo
from attnzoo import InvalidValue
from backbones.pattern import names_in
from bench import machine, reports
from bench.isolate import one_line
from bench.machine import quiet
from bench.options import from_zero, split
from bench.reports import SPENT, TOO_SLOW
from bench.results import rounded
from bench.whole_models.by_recipe import EXPECTED, RECIPES
from bench.whole_models.cases import LAYER_TOKENS, LAYER_WIDTH, Case, Layer, Setup
from bench.whole_models.figures import LAYER_TREATMENTS, MODES, TREATMENTS, read_whole, tables
from bench.whole_models.older import BEFORE
from bench.whole_models.process import Bench, Elsewhere, Job, compile_job
from recipes.lab.console import DONE, UserError, run_script, whole

# Those that goals name come first.
FIRST = ("softmax", "sana", "dydila", "focused")
LARGE = FIRST[:3]
DEFAULT_TOKENS = {"S": (256, 1024, 4096), "B": (256, 1024, 4096), "L": (1024, 4096, 16384)}
# Softmax's crossovers lie between the first three of each size.
_ORDER = [("S", 4096), ("S", 256), ("S", 1024), ("L", 4096), ("L", 16384), ("L", 1024)]
_AHEAD = 0.4  # of the time, at most, goes to compiling in other processes
DEFAULT_PARTS = ("cases", "layers", "launches", "recipes", "scans", "before")
PROFILES = ("profile", "layer-profile")
PARTS = (*DEFAULT_PARTS, *PROFILES)


class Run(reports.Writer):
    """Measures in the order of importance, and writes what it has after every case.

    Args:
        options: Of the command line.
        report: Of an earlier run, which this one continues.
    """

    def __init__(self, options: argparse.Namespace, report: dict[str, Any] | None = None) -> None:
        super().__init__(options, PARTS)
        before, commit = options.before or (None, "")
        self.setup = Setup(options.device, options.backend, options.round_seconds, before, commit,
                           tuple(options.imports))  # fmt: skip
        self._taken: dict[str, float] = {}  # most seconds, by kind of EXPECTED
        self._wrong: dict[str, str | None] = {}  # by mechanism, why its results cannot be right
        if report is not None:
            self.go_on(report, (*PARTS, "peaks"))
        # On a CPU nothing that fails breaks what follows.
        self._bench: Bench | Elsewhere = Bench(self.setup)
        if options.device == "cuda":
            self._bench = Elsewhere(self.setup, 1 if options.processes > 1 else None)

    def measure(self) -> dict[str, Any]:
        """Measures until the time is spent."""
        if not (planned := self._planned()):
            raise UserError(f"--parts {','.join(self.options.parts)} has nothing to measure of "
                            f"--mechanisms {','.join(self.options.mechanisms)}")  # fmt: skip
        rows = [row for part in PARTS for row in self.report[part]]
        begun = {_name_of(row) for row in rows}
        complete = {
            _name_of(row) for row in rows
            if "treatments" not in row or set(row["treatments"]) <= row["seconds"].keys()
        }  # fmt: skip
        jobs = [job for job in planned if job.name not in complete]
        # What an earlier run could not do in full comes after what it has not begun. A profiler
        # that has been on may slow whatever the same process launches later.
        jobs.sort(key=lambda job: (job.part in PROFILES, job.name in begun))
        late = self._compile_ahead(jobs)
        try:
            if "peaks" not in self.report and any(job.part == "layers" for job in jobs):
                peaks, reason = self._answer(Job("peaks"), 60.0)
                if peaks is None:
                    raise UserError(f"the peaks of this device could not be measured: {reason}")
                self.report["peaks"] = peaks
            for job in jobs:
                self._do(job, late)
        finally:
            self._bench.close()
        self.write()
        return self.report

    def _do(self, job: Job, late: dict[str, str]) -> None:
        def without(case: Any) -> Any:
            kept = tuple(name for name in case.treatments if name != "compiled")
            return dataclasses.replace(case, treatments=kept)

        case = job.case
        if job.part == "layers":
            job = dataclasses.replace(job, peaks=self.report["peaks"])
        if job.softmax is not None and job.softmax.name in late:
            job = dataclasses.replace(job, softmax=without(job.softmax))
        if case is not None and job.name in late:
            job = dataclasses.replace(job, case=without(case))
        row, reason = self._measured(job)
        if case is not None and reason.startswith(TOO_SLOW) and job.name not in late:
            late[job.name] = reason
            row, reason = self._measured(dataclasses.replace(job, case=without(case)))
        if row is None:
            self.miss(job.name, reason)
            return
        if case is not None:
            row["treatments"] = case.treatments
            if job.name in late:
                row["missing"]["compiled"] = late[job.name]
        self._keep(job.part, row)

    def _planned(self) -> list[Job]:
        """Everything, the most important first: what goals name."""
        options, jobs = self.options, self._others()
        for case in planned(options.mechanisms, options.models, options.device, options.large):
            softmax = dataclasses.replace(case, mechanism="softmax")
            jobs.append(Job("cases", case.mechanism, case, softmax if case != softmax else None))
            treatments = LAYER_TREATMENTS if options.device == "cuda" else ("eager",)
            case = dataclasses.replace(case, treatments=treatments)
            jobs.append(Job("profile", case.mechanism, case))
        wanted = {"", *options.modes}
        asked = [job for job in jobs if job.part in options.parts and _mode_of(job) in wanted]
        return sorted(asked, key=self._place)

    def _place(self, job: Job) -> int:
        case, is_first, older = job.case, job.mechanism in FIRST, self.options.before
        if job.part == "before":
            return 1
        if isinstance(case, Case):
            is_small = case.size == next(iter(self.options.models))
            return (0 if is_small else 2) if is_first else 6
        if job.part in ("recipes", "scans"):
            is_spare = job.recipe[1] == "recorded" or (older and job.recipe[1] == "eager")
            return 7 if is_spare else 3
        if case is not None and case.impl:
            return 5
        return 1 if is_first else 4

    def _others(self) -> list[Job]:
        """Launches, layers, recipes, scans, and softmax held to an older checkout."""
        names, jobs = self.options.mechanisms, []
        for name in dict.fromkeys(part for pattern in names for part in names_in(pattern)):
            jobs.append(Job("launches", name))
            for step in itertools.product(self.options.layer_tokens, MODES):
                jobs.append(Job("layers", name, Layer(name, *step)))
                jobs.append(Job("layer-profile", name, Layer(name, *step, ("recorded",))))
            if importlib.util.find_spec("fla") is not None:
                jobs += _by_fla(name)
        for (recipe, compared), ways in RECIPES.items():
            older = (BEFORE,) if self.options.before and "eager" in ways else ()
            for name, way in itertools.product(compared, (*older, *ways)):
                jobs += [Job("recipes", name, recipe=(recipe, way))] * (name in names)
        for mode in MODES:
            jobs += [Job("scans", "gated", mode=mode)] * ("gated" in names)
            if self.options.before and "softmax" in names:
                case = Case("softmax", "S", 4096, mode, LAYER_TREATMENTS)
                jobs.append(Job("before", "softmax", case))
        return jobs

    def _keep(self, part: str, row: dict[str, Any]) -> None:
        kept = [old for old in self.report[part] if _name_of(old) != _name_of(row)]
        self.report[part] = [*kept, row]
        self.write()

    def _measured(self, job: Job) -> tuple[dict[str, Any] | None, str]:
        if time.monotonic() >= self.end:
            return None, SPENT
        if reason := self._why_wrong(job.mechanism):
            return None, reason
        kind, left = job.recipe[0] or job.part, self.end - time.monotonic()
        expected = self._taken.get(kind, EXPECTED.get(kind, 0.0))
        if isinstance(self._bench, Elsewhere) and left < expected:
            return None, (f"takes about {expected:.0f} s, and {left:.0f} were left; "
                          f"raise --seconds, or go on with --resume")  # fmt: skip
        # A recipe starts, compiles and trains; fla tries its block sizes for a minute.
        by_fla = job.part == "scans" or (isinstance(job.case, Layer) and job.case.impl)
        is_long = by_fla or job.part in ("recipes", "before")
        patience = self.options.patience * (3 if is_long else 1)
        start = time.monotonic()
        row, reason = self._answer(job, patience)
        if row is not None:
            lacking = f" without {', '.join(row['missing'])}" if row.get("missing") else ""
            taken = time.monotonic() - start
            if kind in EXPECTED:
                self._taken[kind] = max(taken, self._taken.get(kind, 0.0))
            print(f"{job.name}: {taken:.1f} s{lacking}", flush=True)
        return row, reason

    def _answer(self, job: Job, seconds: float) -> tuple[dict[str, Any] | None, str]:
        if isinstance(self._bench, Bench):
            return self._bench.answer(job)
        return self._bench.answer(job, max(1.0, min(seconds, self.end - time.monotonic())))

    def _why_wrong(self, mechanism: str) -> str | None:
        if mechanism not in self._wrong:
            row, reason = self._answer(Job("check", mechanism), self.options.patience)
            self._wrong[mechanism] = None if row is not None else reason
        return self._wrong[mechanism]

    def _compile_ahead(self, jobs: Sequence[Job]) -> dict[str, str]:
        """Compiles in other processes; by name of a case, why it is measured without."""
        jobs = [job for job in jobs if job.is_compiled]
        skipped = {job.name: "left out by --skip-compiled" for job in jobs
                   if job.case and job.mechanism in self.options.skip_compiled}  # fmt: skip
        jobs = [job for job in jobs if job.name not in skipped]
        processes = min(self.options.processes, len(jobs))
        if processes < 2:
            return skipped
        # Those that are compared with softmax need softmax's from the compiler's cache, too.
        start, late = time.monotonic(), dict(skipped)
        context = multiprocessing.get_context("spawn")
        pool = context.Pool(processes, quiet)
        finished = False
        try:
            found = [pool.apply_async(compile_job, (job, self.setup)) for job in jobs]
            for job, result in zip(jobs, found, strict=True):
                left = start + _AHEAD * self.options.seconds - time.monotonic()
                try:
                    result.get(max(0.0, left))
                except multiprocessing.TimeoutError:
                    late[job.name] = "was not compiled in time; go on with --resume"
                except Exception as error:  # of a compiler, anything
                    late[job.name] = one_line(error)
            finished = all(result.ready() for result in found)
        finally:
            pool.close() if finished else pool.terminate()
            pool.join()
        done = len(jobs) + len(skipped) - len(late)
        taken = time.monotonic() - start
        print(f"{done} of {len(jobs)} compiled ahead, {taken:.0f} s", flush=True)
        return late


def _mode_of(job: Job) -> str:
    return job.mode if job.case is None else job.case.mode


def planned(
    mechanisms: Sequence[str],
    models: Mapping[str, Sequence[int]],
    device: str,
    large: Sequence[str] | None = None,
) -> list[Case]:
    """Every case, the most important first: those of the goals, then the other mechanisms.

    Args:
        mechanisms: Names.
        models: Tokens of one image, by size of the backbone.
        device: "cuda" or "cpu".
        large: Mechanisms that have more than the first size; None is all.
    """
    treatments = TREATMENTS if device == "cuda" else ("eager", "compiled")
    first = [name for name in FIRST if name in mechanisms]
    others = [name for name in mechanisms if name not in first]
    wanted = [(size, count) for size, counts in models.items() for count in counts]
    wanted.sort(key=lambda pair: _ORDER.index(pair) if pair in _ORDER else len(_ORDER))
    return [
        Case(name, size, count, mode, treatments)
        for names in (first, others)
        for size, count in wanted
        for mode in MODES
        for name in names
        if large is None or name in large or size == next(iter(models))
    ]


def _by_fla(mechanism: str) -> list[Job]:
    """The shorter layer by flash-linear-attention, of a mechanism that can be asked for it."""
    known = typing.get_type_hints(attnzoo.get_attention(mechanism).Config).get("impl")
    try:
        if "fla" not in typing.get_args(known):
            return []
        attnzoo.build_attention(mechanism, LAYER_WIDTH, impl="fla")
    except InvalidValue:  # with other options only
        return []
    layers = [Layer(mechanism, LAYER_TOKENS[0], mode, ("recorded",), "fla") for mode in MODES]
    return [Job("layers", mechanism, layer) for layer in layers]


def _older(folder: Path) -> tuple[Path, str]:
    """An older checkout and its commit, by git or, of an archive, by the folder's name."""
    if not (folder / "recipes" / "train.py").is_file():
        raise UserError(f"--before {folder} has no recipes/train.py; make it by git worktree add")
    named = re.search(r"[0-9a-f]{7,40}$", folder.resolve().name)
    if (folder / ".git").exists():
        return folder.resolve(), machine.commit(folder)
    if named is None:
        raise UserError(f"--before {folder} is no git checkout; let its name end with its commit")
    return folder.resolve(), named.group()[:7]


def _name_of(row: dict[str, Any]) -> str:
    if "over_before" in row:
        case = Case(row["mechanism"], row["size"], row["tokens"], row["mode"])
        return Job("before", case=case).name
    if "profiles" in row and "size" not in row:
        layer = Layer(row["mechanism"], row["tokens"], row["mode"])
        return Job("layer-profile", case=layer).name
    if "profiles" in row:
        case = Case(row["mechanism"], row["size"], row["tokens"], row["mode"])
        return Job("profile", case=case).name
    if "recipe" in row:
        return Job("recipes", row["mechanism"], recipe=(row["recipe"], row["way"])).name
    if "over_fla" in row:
        return Job("scans", mode=row["mode"]).name
    if "size" in row:
        return Case(row["mechanism"], row["size"], row["tokens"], row["mode"]).name
    if "mode" in row:
        return Layer(row["mechanism"], row["tokens"], row["mode"], impl=row.get("impl", "")).name
    return Job("launches", row["mechanism"]).name


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = reports.parser_of("bench.whole_models", __doc__)
    parser.add_argument("--mechanisms", default="", help="names, by default all of the zoo")
    parser.add_argument(
        "--tokens", default=None, help="of one image (default: those that the goals need)"
    )
    parser.add_argument(
        "--sizes", default="S,L", help="of the backbone: tiny, S, B, L; without --mechanisms "
        f"only {', '.join(LARGE)} have more than the first",
    )  # fmt: skip
    parser.add_argument(
        "--modes", default=",".join(MODES), help=f"of {', '.join(MODES)} (default: both)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None)
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument(
        "--processes", type=whole(1), default=None,
        help="that compile ahead, before anything is timed (default: all cores but two)",
    )  # fmt: skip
    parser.add_argument(
        "--before", type=Path, default=None, metavar="FOLDER",
        help="an older checkout (git worktree add FOLDER COMMIT), which recipes and steps of "
        "softmax are held to",
    )  # fmt: skip
    parser.add_argument(
        "--skip-compiled", default="", help="mechanisms measured without compiled blocks"
    )
    parser.add_argument(
        "--patience", type=from_zero, default=60.0, help="seconds of one case, on a GPU"
    )
    parser.add_argument(
        "--round-seconds", type=from_zero, default=0.6, help="of the rounds of one case"
    )
    parser.add_argument(
        "--parts", default=None,
        help=f"what to measure, of {', '.join(PARTS)} (default: all but profiles; on a CPU only "
        f"cases)",
    )  # fmt: skip
    parser.add_argument("--no-layers", action="store_true", help="short for --parts cases")
    options = reports.parsed(parser, arguments)
    if options.no_layers and options.parts is not None:
        raise UserError("give --parts or --no-layers, which is short for --parts cases")
    is_short = options.no_layers or options.device == "cpu"
    is_named = options.parts is not None
    for name in ("mechanisms", "sizes", "parts", "tokens", "modes"):
        if (text := getattr(options, name)) and not split(text):
            raise UserError(f"--{name} {text} names none")
    options.parts = split(options.parts or ("cases" if is_short else ",".join(DEFAULT_PARTS)))
    for part in options.parts:
        if part not in PARTS:
            raise UserError(f"unknown part {part!r}; choose of {', '.join(PARTS)}")
    options.modes = split(options.modes)
    for mode in options.modes:
        if mode not in MODES:
            raise UserError(f"unknown mode {mode!r}; choose of {', '.join(MODES)}")
    if options.before is not None:
        if not {"recipes", "before"} & set(options.parts):
            raise UserError("--before is of recipes and before; give --parts recipes,before, too")
        options.before = _older(options.before)
    elif is_named and "before" in options.parts:
        raise UserError("--parts before times an older checkout; name it by --before FOLDER")
    if options.processes is None:
        options.processes = max(1, (os.cpu_count() or 2) - 2) if options.device == "cuda" else 1
    options.sizes, known = split(options.sizes or "S,L"), attnzoo.list_attention()
    options.large = None if options.mechanisms else LARGE
    options.mechanisms = list(dict.fromkeys(split(options.mechanisms))) or known
    options.skip_compiled = split(options.skip_compiled)
    reports.require_mechanisms([*options.mechanisms, *options.skip_compiled])
    for size in options.sizes:
        if size not in ("tiny", "S", "B", "L"):
            raise UserError(f"unknown size {size!r}; choose of tiny, S, B, L")
    options.layer_tokens = LAYER_TOKENS
    if not options.tokens:
        options.models = {size: DEFAULT_TOKENS.get(size, (256,)) for size in options.sizes}
        return options
    counts = dict.fromkeys(split(options.tokens))
    if not all(
        count.isdecimal() and 0 < math.isqrt(int(count)) ** 2 == int(count) for count in counts
    ):
        raise UserError(f"--tokens {options.tokens} must be squares, such as 256,1024,4096,16384")
    options.layer_tokens = [int(count) for count in counts]
    options.models = dict.fromkeys(options.sizes, options.layer_tokens)
    return options


def main(arguments: list[str]) -> int:
    """Measures, or prints what was measured."""
    options = _options(arguments)
    if options.table:
        print(tables(read_whole(options.table)))
        return DONE
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here; leave it out for the CPU")
    earlier = reports.earlier(options, read_whole)
    quiet()
    print(tables(rounded(Run(options, earlier).measure())))
    return DONE


if __name__ == "__main__":
    run_script(main)
