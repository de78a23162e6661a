"""A user's own mechanisms in the recipes: one flag, and a run that remembers where they came from.

A run keeps, for each mechanism that is not the zoo's, the file or module and the SHA-256 of its
code. Who opens the run later gets it imported again, so long as the code is the same and does not
lie in the run's own folder: a folder that came from elsewhere must not choose what is executed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attnzoo
from recipes.lab.console import UserError, warn
from recipes.lab.files import sha256


def import_all(sources: Iterable[str]) -> None:
    """Imports what ``--import`` names.

    Raises:
        attnzoo.InvalidValue: There is no such file or module.
    """
    for source in sources:
        attnzoo.import_mechanisms(source)


def origins(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Where the mechanisms of these names came from, for a run's config.json.

    Returns:
        By name: "source", a file's path or a module's name, and "sha256" of its code. The zoo's
        own are left out.
    """
    found = {}
    for name in names:
        source = attnzoo.source_of(name) if name in attnzoo.list_attention() else None
        if source is not None:
            file = _code(source)
            found[name] = {"source": source, "sha256": sha256(file) if file else ""}
    return found


def import_remembered(
    run: Path, remembered: Mapping[str, Mapping[str, Any]], given: Sequence[str] = ()
) -> None:
    """Imports what a run was trained with, unless the caller has named it himself.

    Args:
        run: The run's folder.
        remembered: What ``origins`` gave when the run began.
        given: Values of ``--import``, imported already.

    Raises:
        UserError: A mechanism is missing, has changed, or lies in the run's own folder; the
            message says what to pass.
    """
    for name, origin in remembered.items():
        if name in attnzoo.list_attention():
            continue
        source = str(origin.get("source", ""))
        wanted = f"{run} was trained with attention {name!r} of {source}"
        if given:
            raise UserError(f"{wanted}, and --import {' '.join(given)} does not register it")
        file = _code(source)
        if file is None or not file.is_file():
            raise UserError(f"{wanted}, which is missing: pass its file with --import FILE")
        if file.resolve().is_relative_to(run.resolve()):
            raise UserError(
                f"{wanted}, which lies in the run's folder and is not executed unasked: look at "
                f"it and pass --import {file}"
            )
        if sha256(file) != origin.get("sha256"):
            raise UserError(
                f"{wanted}, which has changed since: pass --import {source} to use it as it is"
            )
        warn(f"attention {name!r} is imported from {source}, as in training")
        attnzoo.import_mechanisms(source)


def _code(source: str) -> Path | None:
    if source.endswith(".py"):
        return Path(source)
    if source == "__main__":  # of another process, or a notebook
        return None
    try:
        # The parent package of a dotted name is imported by this.
        spec = importlib.util.find_spec(source)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec is not None and spec.origin else None
