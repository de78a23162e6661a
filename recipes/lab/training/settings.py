"""Everything that decides what a run computes, and how a saved answer meets a new question."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from attnzoo.contract import nearest
from backbones.presets import PROTOCOLS, SIZES
from recipes.lab.console import UserError
from recipes.lab.data.latents import canonical_settings
from recipes.lab.data.shapes import LEVELS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides what a run computes; saved as the run's config.json.

    The number of processes is not among them: they share one global batch, whose images, times,
    noise and label drops do not depend on it.

    Raises:
        UserError: A value is of the wrong type, out of range, or no choice of its setting.
    """

    attn: str = "dydila"
    attn_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    size: str = "tiny"
    protocol: str = "controlled"
    data: str = "digits"
    level: str = "easy"
    class_count: int | None = None  # of a folder; None takes all
    class_seed: int = 0
    vae: str | None = None  # folder or hub id; None trains on pixels, or on cached latents
    resolution: int | None = None  # None takes the data's own
    patch_size: int | None = None  # None takes 2 for latents and up to 16 px, 4 above
    preset: str = "tiny"
    steps: int = 1500
    batch_size: int = 64  # global: of all processes and micro-steps together
    accumulate: int = 1  # micro-steps per step
    seed: int = 0
    strict: bool = False
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    compile: bool = False
    sharded: bool = False  # FSDP2
    learning_rate: float = 3e-3
    adam_beta2: float = 0.95
    decay: str = "linear"  # of the learning rate, to 0 at the last step; or "constant"
    gradient_clip: float | None = 1.0  # None logs the norm without clipping
    skip_limit: int = 10  # non-finite steps in a row before the run stops
    ema_decay: float = 0.999
    ema_ramp: bool = True  # averages over fewer steps at the start
    label_dropout: float = 0.1
    checkpoint_every: int = 500
    keep_every: int | None = None  # checkpoints at its multiples are never deleted
    sample_every: int = 500
    diagnose_every: int = 100  # steps between looks into the mechanisms

    def __post_init__(self) -> None:
        for name, (rule, fits) in _RULES.items():
            value = getattr(self, name)
            if not fits(value):
                flag = "--set" if name == "attn_options" else f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} must be {rule}, got {value!r}")
        if self.steps * self.batch_size >= 2**63:
            raise UserError(
                f"--steps {self.steps} of --batch-size {self.batch_size} are more images than can "
                f"be counted"
            )


Rule = tuple[str, Callable[[Any], bool]]


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_integer(value) or isinstance(value, float)) and math.isfinite(value)


def _whole(least: int = 1, below: int = 2**63, *, optional: bool = False) -> Rule:
    rule = f"an integer from {least} up" + (", or None" if optional else "")
    return (
        rule,
        lambda value: (
            (optional and value is None) or (_is_integer(value) and least <= value < below)
        ),
    )


def _real(rule: str, fits: Callable[[float], bool], *, optional: bool = False) -> Rule:
    return rule + (
        ", or None" if optional else ""
    ), lambda value: (optional and value is None) or (_is_number(value) and fits(value))


def _choice(choices: Collection[str]) -> Rule:
    return (
        f"one of {', '.join(choices)}",
        lambda value: isinstance(value, str) and value in choices,
    )


def _text(*, optional: bool = False) -> Rule:
    return (
        "a name" + (", or None" if optional else ""),
        lambda value: (
            (optional and value is None)
            or (isinstance(value, str) and value != "" and "\0" not in value)
        ),
    )


def _is_options(value: Any) -> bool:
    if not (isinstance(value, dict) and all(isinstance(name, str) for name in value)):
        return False
    try:
        return bool(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        return False


_SWITCH: Rule = ("True or False", lambda value: isinstance(value, bool))
_DECAY = _real("at least 0 and less than 1", lambda value: 0 <= value < 1)

# What a preset changes: "tiny" is for a CPU. "flow" is the same with rectified flow and times
# drawn uniformly, as SiT draws them; SiT shows the model t in [0, 1], here it sees 1000 t, and
# Sana draws logit-normal times with a shift. "dit" is the recipe of DiT and of the paper, with
# matrix products in bf16 where the paper trains DiG in fp32.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "flow": {},
    "dit": {
        "size": "S",
        "protocol": "paper",
        "steps": 400_000,
        "batch_size": 256,
        "learning_rate": 1e-4,
        "adam_beta2": 0.999,
        "decay": "constant",
        "gradient_clip": None,
        "ema_decay": 0.9999,
        "ema_ramp": False,
        "precision": "bf16",
        "checkpoint_every": 5000,
        "keep_every": 50_000,
        "sample_every": 5000,
    },
}

_RULES: dict[str, Rule] = {
    "attn": _text(),
    "attn_options": ("options by name that JSON can hold", _is_options),
    "size": _choice(SIZES),
    "protocol": _choice(PROTOCOLS),
    "data": _text(),
    "level": _choice(LEVELS),
    "class_count": _whole(optional=True),
    "class_seed": _whole(0, 2**64),
    "vae": _text(optional=True),
    "resolution": _whole(optional=True),
    "patch_size": _whole(optional=True),
    "preset": _choice(PRESETS),
    "steps": _whole(),
    "batch_size": _whole(),
    "accumulate": _whole(),
    "seed": _whole(0, 2**64),
    "strict": _SWITCH,
    "precision": _choice(("fp32", "bf16")),
    "gradient_checkpointing": _SWITCH,
    "compile": _SWITCH,
    "sharded": _SWITCH,
    "learning_rate": _real("a finite number above 0", lambda value: value > 0),
    "adam_beta2": _DECAY,
    "decay": _choice(("linear", "constant")),
    "gradient_clip": _real("a finite number above 0", lambda value: value > 0, optional=True),
    "skip_limit": _whole(),
    "ema_decay": _DECAY,
    "ema_ramp": _SWITCH,
    "label_dropout": _real("from 0 to 1", lambda value: 0 <= value <= 1),
    "checkpoint_every": _whole(),
    "keep_every": _whole(optional=True),
    "sample_every": _whole(),
    "diagnose_every": _whole(),
}
_NAMES = [field.name for field in dataclasses.fields(Settings)]


def saved_settings(saved: Mapping[str, Any], where: str) -> Settings:
    """The settings that a run's config.json holds; those it lacks take their defaults.

    Args:
        saved: Its "settings".
        where: The file, for messages.

    Raises:
        UserError: A setting is unknown, or its value cannot be; the message names the file.
    """
    for name in saved:
        if name not in _NAMES:
            raise UserError(
                f"{where} has a setting {name!r} that this version does not know"
                f"{nearest(name, _NAMES)} It decides what is computed, so the run is not "
                f"continued without it"
            )
    try:
        return Settings(**saved)
    except UserError as error:
        raise UserError(f"{where} is damaged: {error}") from error


def resumed_settings(
    saved: Mapping[str, Any],
    given: Mapping[str, Any],
    allowed: Collection[str] = (),
    where: str = "config.json",
) -> tuple[Settings, list[str]]:
    """The settings of a run that is continued.

    Args:
        saved: The settings it was started with.
        given: What the caller asks for now, by name.
        allowed: Names that may differ.
        where: The file that held ``saved``, for messages.

    Returns:
        The settings to go on with, and a line for each change.

    Raises:
        UserError: A setting differs that is not allowed to, or a name does not exist.
    """
    saved, given = canonical_settings(saved), canonical_settings(given)
    for name in allowed:
        if name not in _NAMES:
            raise UserError(f"--allow-change {name!r} is not a setting{nearest(name, _NAMES)}")
    before = saved_settings(saved, where)
    changes = {
        name: (getattr(before, name), value)
        for name, value in given.items()
        if not _are_same(getattr(before, name), value)
    }
    refused = [name for name in changes if name not in allowed]
    lines = [f"{name}: {old!r} -> {new!r}" for name, (old, new) in changes.items()]
    if refused:
        remedy = " ".join(f"--allow-change {name}" for name in refused)
        raise UserError(
            f"the run differs from what it was started with ({'; '.join(lines)}): drop the flags "
            f"to continue it, allow the change with {remedy}, replace it with --overwrite, or "
            f"choose another --out"
        )
    return dataclasses.replace(before, **{name: new for name, (_, new) in changes.items()}), lines


def _are_same(one: Any, other: Any) -> bool:
    """Whether two values are saved alike: JSON makes lists of tuples."""
    return one == other or json.dumps(one, default=str) == json.dumps(other, default=str)
