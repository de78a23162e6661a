"""Reports of ``bench.whole_models`` and ``bench.scaling``: begun, read, gone on with; flags."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import attnzoo
from attnzoo.contract import nearest
from backbones.pattern import names_in
from bench import machine
from recipes.lab.console import UserError
from recipes.lab.files import read_json


def begun(device: str) -> dict[str, Any]:
    """A report that says when, where and of what code it is, and nothing more yet."""
    return {
        "datetime": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        **machine.describe(device, torch.get_num_threads()),
        "device": device,
    }


def read(path: Path, keys: Sequence[str], command: str) -> dict[str, Any]:
    """A report from its file.

    Args:
        path: The file.
        keys: Which it has to have.
        command: Which module writes such files.

    Raises:
        UserError: It is no such file.
    """
    report = read_json(path, f"JSON of {command}")
    if not isinstance(report, dict) or not all(key in report for key in keys):
        raise UserError(f"{path} is no file of python -m {command} --out")
    return report


def require_same(
    earlier: dict[str, Any], now: dict[str, Any], path: Path, also: Sequence[str] = ()
) -> None:
    """Refuses to go on with a report that was measured elsewhere or of other code.

    Args:
        earlier: The report that ``path`` holds.
        now: The one that begins here.
        path: For the message.
        also: What else has to be the same, besides device, versions and commit.

    Raises:
        UserError: It was.
    """
    for what in ("device_name", "versions", "commit", *also):
        if earlier[what] != now[what]:
            raise UserError(
                f"{path} has {what} {earlier[what]!r}, and this run {now[what]!r}; write into "
                f"another --out, or run without --resume"
            )


def listed(text: str) -> list[str]:
    """The parts of a flag, between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def require_mechanisms(patterns: Sequence[str]) -> None:
    """Refuses names, or patterns of names, that are not registered.

    Raises:
        UserError: One is not.
    """
    known = attnzoo.list_attention()
    for name in (part for pattern in patterns for part in names_in(pattern)):
        if name not in known:
            raise UserError(f"unknown mechanism {name!r}{nearest(name, known)} Choose of "
                            f"{', '.join(known)}")  # fmt: skip
