"""Reports of ``bench.whole_models`` and ``bench.scaling``: begun, read, gone on with; flags."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import attnzoo
from attnzoo.contract import nearest
from backbones.pattern import names_in
from bench import machine
from bench.options import from_zero
from bench.results import TEXT, Foreign, require_shape, rounded
from recipes.lab.console import UserError, add_import_flag
from recipes.lab.files import read_json, require_writable, write_json
from recipes.lab.imports import import_all, origins

# Why something was not measured.
SPENT = "the time was spent; raise --seconds, or go on with --resume"
TOO_SLOW = "took longer than"


class Writer:
    """Measures until its time is spent, and writes what it has after every case.

    Args:
        options: What ``parsed`` gives.
        lists: Parts of the report, besides "missed", that rows come to.
        **facts: Of this run, for the report.
    """

    def __init__(self, options: argparse.Namespace, lists: Sequence[str], **facts: Any) -> None:
        self.options = options
        self.end = time.monotonic() + options.seconds
        self.report: dict[str, Any] = {
            "datetime": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": machine.commit(),
            **machine.describe(options.device, torch.get_num_threads()),
            "device": options.device,
            "imports": origins(attnzoo.list_attention()),
            **facts,
            **{name: [] for name in (*lists, "missed")},
        }

    def go_on(
        self, report: dict[str, Any], names: Sequence[str], also: Sequence[str] = ()
    ) -> None:
        """Takes over parts of an earlier report, and its date.

        Args:
            report: The earlier one.
            names: Of the parts that are taken, where it has them.
            also: What else has to be the same, besides device, versions and commit.

        Raises:
            UserError: It was measured elsewhere, or of other code.
        """
        own, before = self.report["imports"], report.get("imports", {})
        for name in own.keys() & before.keys():
            if own[name]["sha256"] != before[name]["sha256"]:
                raise UserError(
                    f"{self.options.out} has {name!r} of {before[name]['source']}, whose code has "
                    f"changed; write into another --out, or run without --resume"
                )
        self.report["imports"] = before | own
        for what in ("device_name", "versions", "commit", *also):
            if report[what] != self.report[what]:
                raise UserError(
                    f"{self.options.out} has {what} {report[what]!r}, and this run "
                    f"{self.report[what]!r}; write into another --out, or run without --resume"
                )
        kept = ("datetime", *names)
        self.report |= {name: report[name] for name in kept if name in report}

    def miss(self, what: str, reason: str) -> None:
        """Says and writes what was not measured."""
        print(f"{what}: {reason}", flush=True)
        self.report["missed"].append({"what": what, "reason": reason})
        self.write()

    def write(self) -> None:
        """Writes what there is."""
        write_json(self.options.out, rounded(self.report), indent=None)


def parser_of(command: str, words: str | None) -> argparse.ArgumentParser:
    """A parser with the flags that ``parsed`` and ``earlier`` read."""
    parser = argparse.ArgumentParser(prog=f"python -m {command}", description=words)
    flag = parser.add_argument
    flag("--out", type=Path, help="JSON to write, after every case")
    flag("--table", type=Path, help="JSON to print instead of measuring")
    flag("--resume", action="store_true", help="go on with what the JSON of --out lacks")
    flag("--seconds", type=from_zero, default=480.0, help="for everything")
    add_import_flag(parser)
    return parser


def parsed(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """The options, of which "device" is by default the GPU where there is one; imports own ones.

    Raises:
        UserError: There is nothing to write and nothing to print, or both.
    """
    options = parser.parse_args(arguments)
    if (options.out is None) == (options.table is None):
        raise UserError("name either --out, a JSON to write, or --table, a JSON to print")
    import_all(options.imports)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return options


def earlier(
    options: argparse.Namespace, read: Callable[[Path], dict[str, Any]]
) -> dict[str, Any] | None:
    """What ``--out`` holds, if ``--resume`` goes on with it.

    Raises:
        UserError: The file cannot be written or gone on with.
    """
    require_writable(options.out)
    return read(options.out) if options.resume and options.out.exists() else None


_ANY = {
    "versions": {"*": TEXT}, **dict.fromkeys(("device_name", "commit", "datetime"), TEXT),
    "missed": [{"what": TEXT, "reason": TEXT}],
    "imports?": {"*": {"source": TEXT, "sha256": TEXT}},
}  # fmt: skip


def read(path: Path, shape: dict[str, Any], command: str) -> dict[str, Any]:
    """A report from its file.

    Args:
        path: The file.
        shape: Of what it has to have, besides where it was measured, by ``require_shape``.
        command: Which module writes such files.

    Raises:
        UserError: It is no such file.
    """
    report = read_json(path, f"JSON of {command}")
    try:
        require_shape(report, _ANY | shape)
    except Foreign as error:
        raise UserError(f"{path} is no file of python -m {command} --out: {error}") from error
    return report


def where(report: dict[str, Any]) -> str:
    """Device, versions, commit and day of a report, in words."""
    versions = ", ".join(f"{name} {value}" for name, value in report["versions"].items())
    return (
        f"{report['device_name']}, {versions}, commit {report['commit']}, "
        f"{report['datetime'][:10]}"
    )


def require_mechanisms(patterns: Sequence[str]) -> None:
    """Refuses names, or patterns of names, that are not registered.

    Raises:
        UserError: One is not.
    """
    known = attnzoo.list_attention()
    for name in (part for pattern in patterns for part in names_in(pattern)):
        if name not in known:
            raise UserError(f"unknown mechanism {name!r}{nearest(name, known)} Choose of "
                            f"{', '.join(known)}; one of your own needs "
                            f"--import FILE|MODULE")  # fmt: skip
