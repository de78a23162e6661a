"""``python -m bench.scaling --out scaling.json``: training on several GPUs, and what it must keep.

Images per second of training steps on 1, 2, 4, ... GPUs, with gradients that are added up beside
the backward, and with FSDP2; a checkpoint's time; and whether a killed process, encode.py and
evaluate.py leave the results as they are. ``--table scaling.json`` prints what a file holds, with
``--also more.json`` what others hold behind it, and with ``--into PAGE`` puts it into the page's
part ``<!-- scaling -->``.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.cuda import nccl

from attnzoo import list_attention
from attnzoo.contract import nearest
from bench import reports
from bench.options import from_zero, split, whole_numbers
from bench.reports import SPENT, TOO_SLOW
from bench.results import rounded
from bench.scaling.cases import MECHANISMS, WAYS, Case, Wave, planned, write_latents
from bench.scaling.checks import CHECKS, Checks
from bench.scaling.figures import read_scaling, tables
from bench.scaling.launch import Launch
from bench.tables import parts_around, put_into
from recipes.lab.console import DONE, UserError, run_script

PARTS = ("training", *CHECKS)
_PROCESSES = 8  # of a CPU, at most


class Run(reports.Writer):
    """Measures in the order of importance, and writes what it has after every case.

    Args:
        options: Of the command line.
        report: Of an earlier run, which this one continues.
    """

    def __init__(self, options: argparse.Namespace, report: dict[str, Any] | None = None) -> None:
        super().__init__(options, ("training", "checks"), gpus=options.there, cores=os.cpu_count())
        if options.device == "cuda":
            version: Any = nccl.version()
            self.report["versions"]["nccl"] = ".".join(map(str, version))
        if report is not None:
            self.go_on(report, ("training", "checks"), ("gpus",))
        self._starts = 0
        self._failed: dict[str, str] = {}  # by name of a case, why it is not recorded

    def measure(self) -> dict[str, Any]:
        """Measures until the time is spent."""
        options = self.options
        done = {_case_of(row).name for row in self.report["training"]}
        waves = planned(options.mechanisms, options.gpus, options.tokens, options.ways,
                        options.size, options.there)  # fmt: skip
        lacking = [[[case for case in group if case.name not in done] for group in wave]
                   for wave in waves]  # fmt: skip
        waves = [[group for group in wave if group] for wave in lacking]
        checked = {row["check"] for row in self.report["checks"]}
        checks = [name for name in CHECKS if name in options.parts and name not in checked]
        with tempfile.TemporaryDirectory(prefix="attnzoo-scaling-") as folder:
            # The checks come after the first trainings on most GPUs, and before the other ways.
            if "training" in options.parts:
                for tokens in options.tokens:
                    write_latents(Path(folder, f"latents-{tokens}"), tokens)
                for wave in waves[:2]:
                    self._wave(wave, Path(folder))
            if checks:
                self._check(checks, Path(folder))
            if "training" in options.parts:
                for wave in waves[2:]:
                    self._wave(wave, Path(folder))
        self.write()
        return self.report

    def _wave(self, wave: Wave, folder: Path) -> None:
        """Starts groups side by side, and again where one has failed."""
        places = self._places(wave)
        running: dict[int, Launch] = {}
        try:
            for number, group in enumerate(wave):
                running[number] = self._launch(group, places[number], folder)
            while running:
                time.sleep(0.1)
                for number, launch in list(running.items()):
                    for row in launch.rows():
                        self._keep({**row, "beside": len(wave) - 1})
                    if not launch.cases:
                        launch.close()
                        del running[number]
                        continue
                    is_late = time.monotonic() > self.end
                    reason = SPENT if is_late else launch.failure(self.options.patience)
                    if reason is None:
                        continue
                    launch.close()
                    del running[number]
                    if is_late:
                        left = []
                        for case in launch.cases:
                            self.miss(case.name, reason)
                    else:
                        left = self._left(launch.cases, reason)
                    if left:
                        running[number] = self._launch(left, places[number], folder)
        finally:
            for launch in running.values():
                launch.close()

    def _left(self, cases: list[Case], reason: str) -> list[Case]:
        """What to start again after the first of these cases has failed.

        It is tried once more without a recording, and so are the others where it hung.
        """
        first, *others = cases
        if not first.recorded or first.way == "fsdp2" or self.options.device == "cpu":
            self.miss(first.name, reason)
            return others
        print(f"{first.name}: {reason}; tried again without a recording", flush=True)
        self._failed[first.name] = f"its recorded step failed: {reason}"
        if reason.startswith(TOO_SLOW):
            for case in others:
                self._failed[case.name] = (
                    f"its step was not recorded, as that of {first.name} hung"
                )
            others = [dataclasses.replace(case, recorded=False) for case in others]
        return [dataclasses.replace(first, recorded=False), *others]

    def _places(self, wave: Wave) -> list[Sequence[int] | None]:
        """The GPUs of each group."""
        if self.options.device == "cpu":
            return [None] * len(wave)
        size = wave[0][0].gpus if wave else 0
        return [range(place * size, (place + 1) * size) for place in range(len(wave))]

    def _launch(self, cases: list[Case], devices: Sequence[int] | None, folder: Path) -> Launch:
        self._starts += 1
        start = folder / f"start-{self._starts}"
        return Launch(cases, devices, start, self.options.imports)

    def _check(self, names: list[str], folder: Path) -> None:
        options, processes = self.options, max(self.options.gpus)
        if time.monotonic() > self.end:
            for name in names:
                self.miss(f"{name} on {processes}", SPENT)
            return
        devices = None if options.device == "cpu" else range(processes)
        begun = time.monotonic()
        rows = self.report["checks"]
        checks = Checks(processes, devices, folder / "checks", self.end)
        for name, row, reason in checks.run(names):
            if row is None:
                self.miss(f"{name} on {processes}", reason)
                continue
            rows.append(row)
            rows.sort(key=lambda row: CHECKS.index(row["check"]))
            print(f"{name}: {time.monotonic() - begun:.0f} s", flush=True)
            self.write()

    def _keep(self, row: dict[str, Any]) -> None:
        if reason := self._failed.get(_case_of(row).name):
            row["notes"].append(reason)
        self.report["training"].append(row)
        speed, begun = row["images_per_second"], row["until_the_second_step"]
        print(f"{_case_of(row).name}: {speed:.0f} images/s, {row['treatment']} "
              f"({begun:.0f} s until the second step)", flush=True)  # fmt: skip
        self.write()


def _case_of(row: dict[str, Any]) -> Case:
    names = ("mechanism", "tokens", "gpus", "way", "size")
    return Case(**{name: row[name] for name in names})


def _numbers(flag: str, text: str) -> list[int]:
    if not split(text):
        raise UserError(f"{flag} {text!r} must be numbers such as 1,2,4")
    return list(dict.fromkeys(whole_numbers(flag, text)))


def _chosen(flag: str, text: str, known: Sequence[str]) -> Sequence[str]:
    parts = split(text)
    for part in parts or [text]:
        if part not in known:
            raise UserError(f"{flag}: unknown {part!r}{nearest(part, known)} Choose of "
                            f"{', '.join(known)}")  # fmt: skip
    return list(dict.fromkeys(parts))


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = reports.parser_of("bench.scaling", __doc__)
    flag = parser.add_argument
    flag("--also", type=Path, nargs="+", default=[], help="JSONs to print behind --table's")
    flag("--into", type=Path, help="page whose part <!-- scaling --> --table replaces")
    flag("--gpus", help="numbers of GPUs (default: 1, 2, 4, 8 where there are so many)")
    flag("--mechanisms", default=",".join(MECHANISMS), help="names or patterns")
    flag("--tokens", default="256,4096", help="of one image")
    flag("--ways", default="overlapped,fsdp2", help="overlapped (as train.py reduces gradients), "
         "bf16 (likewise, --gradient-sums bf16), fsdp2 (--sharded), 25MB (--bucket-mb 25), ddp "
         "(one reduction after the backward)")  # fmt: skip
    flag("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    flag("--size", default="L", choices=("tiny", "S", "B", "L"), help="of the backbone")
    flag("--patience", type=from_zero, default=150.0, help="seconds of one case")
    flag("--device", choices=("cpu", "cuda"), help="a CPU has processes in place of GPUs")
    options = reports.parsed(parser, arguments)
    for name in ("into", "also"):
        if getattr(options, name) and not options.table:
            raise UserError(f"--{name} is for --table, a JSON that has been measured")
    if options.table:
        return options
    options.there = torch.cuda.device_count() if options.device == "cuda" else _PROCESSES
    if options.device == "cuda" and not options.there:
        raise UserError(
            "--device cuda: there is no GPU here; --device cpu tries it with processes"
        )
    counts = [count for count in (1, 2, 4, 8) if count <= options.there]
    options.gpus = _numbers("--gpus", options.gpus) if options.gpus else counts
    if (most := max(options.gpus)) > options.there:
        what = "GPUs" if options.device == "cuda" else "processes of a CPU"
        raise UserError(f"--gpus {most}: take at most the {options.there} {what} that are here")
    options.tokens = _numbers("--tokens", options.tokens)
    for tokens in options.tokens:
        if round(tokens**0.5) ** 2 != tokens:
            raise UserError(f"--tokens {tokens} must be a square, such as 256 or 4096")
    options.ways = _chosen("--ways", options.ways, list(WAYS))
    options.parts = _chosen("--parts", options.parts, PARTS)
    options.mechanisms = split(options.mechanisms)
    reports.require_mechanisms(options.mechanisms)
    if not options.mechanisms:
        raise UserError(f"--mechanisms names none; choose of {', '.join(list_attention())}")
    return options


def main(arguments: list[str]) -> int:
    """Measures, or prints what was measured."""
    options = _options(arguments)
    if options.table:
        files = [options.table, *options.also]
        text = "\n\n".join(tables(read_scaling(file)) for file in files)
        if options.into:
            parts_around(options.into, "scaling")
        print(text)
        if options.into:
            put_into(options.into, "scaling", text)
        return DONE
    print(tables(rounded(Run(options, reports.earlier(options, read_scaling)).measure())))
    return DONE


if __name__ == "__main__":
    run_script(main)
