"""Settings from a file: YAML, JSON, or the config.json of a run."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

from attnzoo.contract import nearest
from recipes.lab.console import UserError, argument, one_line
from recipes.lab.training.rules import Rule
from recipes.lab.training.settings import FIELDS, resumed_settings

# Flags of train.py that are of one call, not of what a run computes.
_FLAGS_ONLY = ("out", "resume", "overwrite", "allow_change", "import", "tracker", "set")


def read_settings(file: str | Path) -> dict[str, Any]:
    """Settings by name from a YAML or JSON file, or from the config.json of a run.

    Args:
        file: Its path, or a run's folder.

    Raises:
        UserError: It cannot be read, has a name that is no setting, or a value that cannot be; the
            message is one line with file, name, value and remedy.
    """
    path = Path(file).expanduser()
    path = path / "config.json" if path.is_dir() else path
    content = _parsed(path)
    if isinstance(content.get("settings"), dict):
        return _of_run(content["settings"], path)
    found = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in FIELDS:
            raise UserError(f"{path} has {one_line(str(key))!r}, {_no_setting(name, content)}")
        found[name] = _fitting(name, value, path)
    return found


def _of_run(saved: Mapping[str, Any], path: Path) -> dict[str, Any]:
    settings = dataclasses.asdict(resumed_settings(saved, {}, where=str(path))[0])
    for name in ("start", "backbone", "distil"):
        if settings.pop(name) is not None:
            raise UserError(
                f"{path} is of a run that recipes/convert.py began from another: convert again, "
                f"or go on with it by --resume --out {argument(path.parent)}"
            )
    return settings


def _fitting(name: str, value: Any, path: Path) -> Any:
    """The value as the setting has it."""
    rule: Rule = FIELDS[name].metadata["rule"]
    if isinstance(value, str) and value.lower() == "none" and rule.fits(None):
        return None
    if rule.is_real and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not rule.fits(value):
        default = FIELDS[name].default
        such = f", such as {name}: {default}" if isinstance(default, str | int | float) else ""
        raise UserError(
            f"{path}: {name} is {one_line(repr(value))[:80]} and must be {rule.text}{such}"
        )
    return value


def _no_setting(name: str, content: Mapping[str, Any]) -> str:
    if "_class_name" in content or "model_type" in content:
        return "so it is the configuration of a model: give a run's config.json, or settings"
    if name in _FLAGS_ONLY:
        return f"which a file does not say: pass --{name.replace('_', '-')}"
    return f"which is not a setting{nearest(name, FIELDS)} docs/training.md lists them"


def _parsed(path: Path) -> dict[str, Any]:
    """The mapping that a file holds."""
    try:
        text = path.read_text(encoding="utf-8")
        is_json = path.suffix == ".json"
        content = json.loads(text, object_pairs_hook=_once) if is_json else _yaml(text)
    except OSError as error:
        raise UserError(f"--config {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()) or "it is nested too deeply"
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise UserError(f"--config {path} is not {kind}: {one_line(reason)}") from error
    if not isinstance(content, dict) or not content:
        what = "a list" if isinstance(content, list) else "no names" if content else "nothing"
        raise UserError(f"{path} holds {what}: give settings by name, such as steps: 500")
    return content


def _once(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    found = {}
    for name, value in pairs:
        if not isinstance(name, str):
            raise ValueError(f"{name!r} is no name")
        if name in found:
            raise ValueError(f"{name!r} is given twice")
        found[name] = value
    return found


class _Loader(yaml.SafeLoader):
    """Plain values of YAML 1.2: 1e-4 is a number, on and no are words; no tags, no aliases."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):  # a few can stand for billions of values
            raise ValueError("it has an alias (*), which is not read here: write it out")
        return super().compose_node(parent, index)

    def named(self, node: yaml.MappingNode) -> dict[str, Any]:
        return _once([tuple(self.construct_object(z, deep=True) for z in p) for p in node.value])


_DIGITS = "-+.0123456789"
for _kind, _pattern, _starts in (
    ("bool", "true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("null", "~|null|Null|NULL|", [*"~nN", ""]),
    ("int", "[-+]?(0|[1-9][0-9_]*)", [*_DIGITS]),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", [*_DIGITS]),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}", re.compile(f"({_pattern})$"), _starts
    )
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.named)


def _yaml(text: str) -> Any:
    try:
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = "" if mark is None else f"line {mark.line + 1}: "
        remedy = ", indent with spaces" if "\\t" in str(error.problem) else ""
        raise ValueError(f"{where}{error.problem}{remedy}") from error
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
