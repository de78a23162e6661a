"""Flags for all settings and a table of them, both made from their class.

Nothing here imports torch before flags are read, so that ``--help`` need not wait.
"""

from __future__ import annotations

import argparse
from typing import Any

from recipes.lab.console import log, parse_options
from recipes.lab.training.settings import FIELDS, GROUPS, flag_of


def add_setting_flags(parser: argparse.ArgumentParser, defaults: bool = True) -> None:
    """Adds --config, --set and a flag for every other setting, in groups.

    A flag that is not given does not appear among the parsed ones if the parser suppresses
    defaults, so that a resumed run can tell what was asked for.

    Args:
        parser: To add to.
        defaults: Whether --help says the class' defaults.
    """
    for group, about in GROUPS.items():
        flag = parser.add_argument_group(group, about).add_argument
        for name, field in FIELDS.items():
            if field.metadata["group"] != group:
                continue
            text, shown = field.metadata["help"], _shown(field.default)
            if defaults and shown:
                text += f" (default: {shown})"
            flag(flag_of(name), help=text, **field.metadata["rule"].flag)
        if group == "model":
            flag("--set", action="append", metavar="OPTION=VALUE",
                 help="an option of the mechanism, of a pattern MECHANISM.OPTION; "
                 "repeat")  # fmt: skip
    parser.add_argument("--config", metavar="FILE", default=None,
                        help="settings by name in YAML or JSON, or a run's config.json; flags "
                        "come before them")  # fmt: skip


def _shown(default: Any) -> str:
    return "" if default is None or default is False else str(default).replace("True", "yes")


def given_settings(flags: dict[str, Any]) -> dict[str, Any]:
    """What a command line asks for, by name of the setting.

    Args:
        flags: As parsed; --config and --set are taken out.

    Raises:
        UserError: The file is none of settings, or a value cannot be.
    """
    from backbones.pattern import dotted, nested
    from recipes.lab.data.latents import canonical_settings
    from recipes.lab.training.settings_file import read_settings

    file, pairs = flags.pop("config"), flags.pop("set", None)
    found = {} if file is None else read_settings(file)
    is_other = "attn" in found and flags.get("attn", found["attn"]) != found["attn"]
    if is_other and found.pop("attn_options", None):
        log.info(f"attn_options of {file} are {found['attn']}'s and left out")
    if pairs is not None:
        options = dotted(found.get("attn_options", {})) | parse_options(pairs)
        found["attn_options"] = nested(options)
    return canonical_settings(found | flags)


def settings_table() -> str:
    """Every setting in Markdown, by group: docs/training.md holds it."""
    lines = []
    for group, about in GROUPS.items():
        lines += [f"### {group.capitalize()}: {about}", ""]
        lines += ["| setting | default | what | must be |", "|---|---|---|---|"]
        for name, field in FIELDS.items():
            if field.metadata["group"] == group:
                default = "none" if field.default is None else str(field.default).lower()
                cells = (f"`{name}`", default, field.metadata["help"], field.metadata["rule"].text)
                lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(settings_table())
