"""A user's own mechanisms beside the weights that need them: carried as files, run when asked.

FOLDER/mechanisms.json      {"mine": "mine.py"}, for each mechanism that is not the zoo's
FOLDER/mine.py              what registers it
"""

from __future__ import annotations

import ast
import inspect
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from attnzoo import InvalidValue, import_mechanisms, list_attention, source_of

INDEX = "mechanisms.json"
_OURS = ("attnzoo", "backbones")  # beside a file in the checkout, and installed wherever it runs
# What is handed on of the arguments of ``from_pretrained``.
_OF_THE_HUB = (
    "cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token",
)  # fmt: skip


def carry(names: Iterable[str], folder: Path) -> list[str]:
    """Copies the files of the mechanisms that are not the zoo's into ``folder``.

    Returns:
        Installed packages that other mechanisms came from, which whoever loads needs too.

    Raises:
        InvalidValue: A mechanism came from a module or a file that would not run on its own.
    """
    index: dict[str, str] = {}
    packages = set()
    for name in names:
        source = source_of(name)
        if source is None:
            continue
        if not source.endswith(".py"):
            if _is_installed(source):
                packages.add(source.partition(".")[0])
                continue
            raise InvalidValue(
                f"attention {name!r} came from the module {source}, which is not installed and "
                f"cannot be carried along: put it into one file, for --import FILE or "
                f"attnzoo.import_mechanisms"
            )
        file = Path(source)
        if not file.is_file():
            raise InvalidValue(f"attention {name!r} came from {source}, which is missing")
        if beside := _siblings(file):
            raise InvalidValue(
                f"attention {name!r} came from {source}, which imports {beside[0]!r} from its own "
                f"folder and would not run elsewhere: put both into one file"
            )
        if index.get(name, file.name) != file.name or file.name in {
            other for known, other in index.items() if source_of(known) != source
        }:
            raise InvalidValue(f"two files of the name {file.name} cannot be carried: rename one")
        index[name] = file.name
        shutil.copyfile(file, folder / file.name)
    if index:
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return sorted(packages)


def import_carried(
    names: Iterable[str], folder: Any, options: Mapping[str, Any], *, is_trusted: bool
) -> None:
    """Imports mechanisms that are not registered from the files beside the weights.

    Args:
        names: Of the model.
        folder: A folder, or a repository of the hub.
        options: Arguments of ``from_pretrained``, of which those for the hub hold here too.
        is_trusted: Whether the code may run.

    Raises:
        InvalidValue: It may not, or a file is missing or damaged.
    """
    missing = sorted(set(names) - set(list_attention()))
    if not missing or (file := _fetch(folder, INDEX, options)) is None:
        return
    try:
        index = json.loads(file.read_bytes())
    except ValueError as error:
        raise InvalidValue(f"{INDEX} in {folder} is damaged: {error}") from error
    for name in missing:
        carried = index.get(name) if isinstance(index, dict) else None
        if name in list_attention() or carried is None:
            continue
        if not isinstance(carried, str) or Path(carried).name != carried or carried[-3:] != ".py":
            raise InvalidValue(
                f"{INDEX} in {folder} names {carried!r}, which is no file beside it"
            )
        if not is_trusted:
            raise InvalidValue(
                f"attention {name!r} is not the zoo's; its code lies in {folder} as {carried}: "
                f"read it, then pass trust_remote_code=True, or attnzoo.import_mechanisms its file"
            )
        code = _fetch(folder, carried, options)
        if code is None:
            raise InvalidValue(f"{folder} lacks {carried}, which {INDEX} names")
        import_mechanisms(code)


def _fetch(folder: Any, name: str, options: Mapping[str, Any]) -> Path | None:
    """A file beside the weights, from the disk or the hub; None where there is none."""
    if Path(folder).is_dir():
        file = Path(folder, options.get("subfolder") or "", name)
        return file if file.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    known = inspect.signature(hf_hub_download).parameters  # some versions take no proxies
    given = {
        key: options[key] for key in _OF_THE_HUB if key in known and options.get(key) is not None
    }
    try:
        return Path(hf_hub_download(str(folder), name, **given))
    except EntryNotFoundError:  # also where the cache lacks it and nothing else may be asked
        return None


def _is_installed(module: str) -> bool:
    from importlib.metadata import packages_distributions

    return module.partition(".")[0] in packages_distributions()


def _siblings(file: Path) -> list[str]:
    """Modules that a file imports from its own folder."""
    found = []
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.ImportFrom):
            found += ["." * node.level + (node.module or "")]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    tops = {name: name.partition(".")[0] for name in found}
    return [
        name
        for name, top in tops.items()
        if top not in _OURS
        and (not top or (file.parent / f"{top}.py").is_file() or (file.parent / top).is_dir())
    ]
