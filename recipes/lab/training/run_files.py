"""What the files of a run's folder may hold, which may have come from elsewhere or be cut off."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from recipes.lab.console import UserError
from recipes.lab.diffusion import DIFFUSION_PRESETS
from recipes.lab.training.guard import WATCHED
from recipes.lab.training.rules import is_number


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        OSError: It is missing or cannot be read.
        ValueError: It is damaged, or of another step than the folder's name says.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
    except RecursionError:
        raise ValueError("manifest.json is nested too deeply") from None
    fits = (
        isinstance(manifest, dict)
        and manifest.get("step") == step_of(folder)
        and all(_is_whole(manifest.get(name, 0)) for name in ("skipped", "skipped_in_a_row"))
        and isinstance(listed := manifest.get("files"), dict)
        and len(listed) > 0
        and all(
            isinstance(entry, list)
            and len(entry) == 2
            and _is_whole(entry[0])
            and isinstance(entry[1], str)
            for entry in listed.values()
        )
    )
    if not fits:
        raise ValueError("manifest.json is damaged")
    return manifest


def is_configuration(config: Any) -> bool:
    """Whether a config.json is a run's and not, say, that of a model of Hugging Face."""
    settings = config.get("settings") if isinstance(config, dict) else None
    return isinstance(settings, dict) and isinstance(settings.get("attn"), str)


def damage_of(config: dict[str, Any]) -> str | None:
    """What a run's configuration has that training does not write, or None."""
    data, settings = config.get("data"), config["settings"]
    if not isinstance(data, dict):
        return "'data' is no object"
    if settings.get("preset", "tiny") not in DIFFUSION_PRESETS:
        return f"'preset' is none of {', '.join(DIFFUSION_PRESETS)}"
    for name, default in (("data", "digits"), ("level", "easy")):
        if not isinstance(settings.get(name, default), str):
            return f"{name!r} is no text"
    for name in ("resolution", "channels"):
        if not _is_whole(data.get(name), 1) or data[name] >= 2**20:
            return f"{name!r} is {data.get(name)!r}"
    names = data.get("class_names")
    if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        return "'class_names' is no list of names"
    for name in ("latent", "source", "identity"):
        if not isinstance(data.get(name), dict | None):
            return f"{name!r} is no object"
    if data.get("latent") is not None and not _is_whole(data["latent"].get("factor"), 1):
        return f"the VAE's 'factor' is {data['latent'].get('factor')!r}"
    imports = config.setdefault("imports", {})
    if not (isinstance(imports, dict) and all(isinstance(z, dict) for z in imports.values())):
        return "'imports' is no object of objects"
    if not isinstance(config.get("environment", {}), dict):
        return "'environment' is no object"
    return None if isinstance(config.get("changes", []), list) else "'changes' is no list"


def _is_loss(value: Any) -> bool:
    return value is None or is_number(value)


def _is_whole(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def listed_in(folder: Path) -> Collection[Path]:
    """What a folder holds; nothing if it is missing.

    Raises:
        UserError: It is there and cannot be read: a file, a link to nowhere, no permission.
    """
    try:
        return list(folder.iterdir())
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not folder.is_symlink():
            return []
        raise UserError(
            f"{str(folder)!r} cannot be read ({error.strerror}); make it a readable folder, or "
            f"move it away"
        ) from error


def read_lines(file: Path) -> list[dict[str, Any]]:
    try:
        lines = file.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{str(file)!r} cannot be read: {error.strerror}") from error
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not (
            isinstance(entry, dict)
            and _is_whole(entry.get("step"))
            and all(_is_loss(entry.get(name)) for name in WATCHED)
        ):
            raise UserError(
                f"line {number} of {str(file)!r} is damaged; repair it or move the file away"
            )
        entries.append(entry)
    return entries


def step_of(folder: Path) -> int:
    digits = folder.name.removeprefix("step-")
    is_checkpoint = folder.name.startswith("step-") and digits.isdecimal() and digits.isascii()
    return int(digits) if is_checkpoint else -1
