"""What a setting may be, and how its flag is read; imports nothing that --help would wait for."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from recipes.lab.console import whole


class Rule(NamedTuple):
    """What a setting may be.

    Attributes:
        fits: Whether a value obeys it.
        words: The rule in words; ``text`` has its choices put in.
        choices: What there is to choose from, asked for when a value is looked at.
        flag: How argparse reads it.
    """

    fits: Callable[[Any], bool]
    words: str
    choices: Callable[[], Collection[str]] = tuple
    flag: Mapping[str, Any] = {}

    @property
    def text(self) -> str:
        """The rule in words."""
        return self.words.format(", ".join(self.choices()))

    @property
    def is_real(self) -> bool:
        """Whether an integer stands for a number with a fraction."""
        return self.flag.get("type") is _number


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that a float can hold."""
    return (_is_integer(value) or isinstance(value, float)) and abs(value) <= sys.float_info.max


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def integer(least: int = 1, below: int = 2**63) -> Rule:
    """An integer."""
    return Rule(
        lambda value: _is_integer(value) and least <= value < below,
        f"an integer from {least} up",
        flag={"type": whole(least), "metavar": "N"},
    )


def real(words: str, fits: Callable[[float], bool]) -> Rule:
    """A finite number for which ``fits`` holds."""
    return Rule(
        lambda value: is_number(value) and fits(value),
        words,
        flag={"type": _number, "metavar": "X"},
    )


def choice(choices: Callable[[], Collection[str]], **flag: Any) -> Rule:
    """One of some words; ``choices`` may import what gives them."""
    return Rule(
        lambda value: isinstance(value, str) and value in choices(),
        "one of {}",
        choices,
        {"metavar": "NAME", **flag},
    )


def one_of(*choices: str, **flag: Any) -> Rule:
    """One of these words."""
    return choice(lambda: choices, metavar="|".join(choices), **flag)


def optional(rule: Rule) -> Rule:
    """What ``rule`` allows, or None, which a flag says as none."""
    read = rule.flag.get("type", str)

    def parse(text: str) -> Any:
        return None if text.lower() == "none" else read(text)

    return rule._replace(
        fits=lambda value: value is None or rule.fits(value),
        words=f"{rule.words}, or none",
        flag={**rule.flag, "type": parse},
    )


TEXT = Rule(
    lambda value: isinstance(value, str) and value != "" and "\0" not in value,
    "a name",
    flag={"metavar": "NAME"},
)
SWITCH = Rule(
    lambda value: isinstance(value, bool),
    "true or false",
    flag={"action": argparse.BooleanOptionalAction},
)
# Products of two such numbers are far from where float32 ends, which some of PyTorch refuses.
LARGEST = 1e9
POSITIVE = real("a number above 0 and at most 1e9", lambda value: 0 < value <= LARGEST)
SHARE = real("from 0 to 1", lambda value: 0 <= value <= 1)
BELOW_ONE = real("at least 0 and less than 1", lambda value: 0 <= value < 1)


def _is_options(value: Any) -> bool:
    if not (isinstance(value, dict) and all(isinstance(name, str) for name in value)):
        return False
    try:
        return bool(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        return False


OPTIONS = Rule(_is_options, "options by name that JSON can hold")
