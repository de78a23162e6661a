"""Everything that decides what a run computes, and how a saved answer meets a new question."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from attnzoo.contract import nearest
from backbones.feedforward import FEEDFORWARDS
from backbones.presets import PROTOCOLS, SIZES
from recipes.lab.console import COMPILE_FLAG, COMPILE_HELP, COMPILE_MODES, UserError, whole
from recipes.lab.data.datasets import DATASETS, known_levels
from recipes.lab.data.latents import canonical_settings


class Rule(NamedTuple):
    """What a setting may be.

    Attributes:
        text: The rule in words.
        fits: Whether a value obeys it.
        flag: How argparse reads it.
    """

    text: str
    fits: Callable[[Any], bool]
    flag: Mapping[str, Any] = {}


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_integer(value) or isinstance(value, float)) and math.isfinite(value)


def _whole(least: int = 1, below: int = 2**63) -> Rule:
    return Rule(
        f"an integer from {least} up",
        lambda value: _is_integer(value) and least <= value < below,
        {"type": whole(least)},
    )


def _real(text: str, fits: Callable[[float], bool]) -> Rule:
    return Rule(text, lambda value: _is_number(value) and fits(value), {"type": float})


def _choice(choices: Collection[str], **flag: Any) -> Rule:
    text = f"one of {', '.join(choices)}"
    return Rule(text, lambda value: isinstance(value, str) and value in choices, flag)


def _optional(rule: Rule) -> Rule:
    return Rule(f"{rule.text}, or None", lambda v: v is None or rule.fits(v), rule.flag)


def _is_options(value: Any) -> bool:
    if not (isinstance(value, dict) and all(isinstance(name, str) for name in value)):
        return False
    try:
        return bool(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        return False


_TEXT = Rule("a name", lambda v: isinstance(v, str) and v != "" and "\0" not in v)
_SWITCH = Rule("True or False", lambda v: isinstance(v, bool), {"action": "store_true"})
_DECAY = _real("at least 0 and less than 1", lambda value: 0 <= value < 1)
_POSITIVE = _real("a finite number above 0", lambda value: value > 0)
_LEVEL = Rule("a level of a data set, such as easy", lambda v: v in known_levels())
_OPTIONS = Rule("options by name that JSON can hold", _is_options)
_MAYBE_OPTIONS = {"rule": _optional(_OPTIONS), "help": None}


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


def _setting(default: Any, rule: Rule, help: str | None = None) -> Any:
    """A field with its rule; with a ``help`` it is a flag of train.py."""
    return dataclasses.field(default=default, metadata={"rule": rule, "help": help})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides what a run computes; saved as the run's config.json.

    The number of processes is not among them: they share one global batch, whose images, times,
    noise and label drops do not depend on it.

    Raises:
        UserError: A value is of the wrong type, out of range, or no choice of its setting.
    """

    attn: str = _setting(
        "dydila",
        _TEXT,
        "one of the mechanisms above, a pattern over the blocks such as 'sana*3+softmax', or a "
        "model of the paper",
    )
    attn_options: dict[str, Any] = dataclasses.field(
        default_factory=dict, metadata={"rule": _OPTIONS, "help": None}
    )
    size: str = _setting("tiny", _choice(SIZES), "tiny, S, B or L")
    protocol: str = _setting(
        "controlled",
        _choice(PROTOCOLS),
        "controlled (same depth and feed-forward for all) or paper",
    )
    feedforward: str | None = _setting(
        None,
        _optional(_choice(FEEDFORWARDS)),
        f"instead of the protocol's: {', '.join(FEEDFORWARDS)}",
    )
    data: str = _setting(
        "digits",
        _TEXT,
        f"{', '.join(DATASETS)}, a folder with one sub-folder per class, or latents from "
        "recipes/encode.py",
    )
    level: str = _setting("easy", _LEVEL, "of shapes: easy, medium, hard or long-range")
    class_count: int | None = _setting(
        None, _optional(_whole()), "draw that many classes of a folder"
    )
    class_seed: int = _setting(0, _whole(0, 2**64), "of that draw")
    # None trains on pixels, or on cached latents.
    vae: str | None = _setting(
        None,
        _optional(_TEXT),
        "folder or hub id of an AutoencoderKL: train on latents, encoded each time",
    )
    # None takes the data's own.
    resolution: int | None = _setting(None, _optional(_whole()), "side of the images in pixels")
    # None takes 2 for latents and up to 16 px, 4 above.
    patch_size: int | None = _setting(
        None, _optional(_whole()), "side of a patch in pixels, or in latent pixels"
    )
    preset: str = _setting("tiny", _choice(PRESETS), f"training recipe: {', '.join(PRESETS)}")
    steps: int = _setting(1500, _whole(), "optimizer steps")
    # Of all processes and micro-steps together.
    batch_size: int = _setting(64, _whole(), "images per step, of all processes together")
    accumulate: int = _setting(1, _whole(), "micro-steps that share a step's images")
    seed: int = _setting(0, _whole(0, 2**64), "of everything that is random")
    strict: bool = _setting(False, _SWITCH, "stop at the first unreadable image")
    precision: str = _setting(
        "fp32",
        _choice(("fp32", "bf16")),
        "of the matrix products, fp32 or bf16; the paper trains DiG in fp32",
    )
    gradient_checkpointing: bool = _setting(False, _SWITCH, "less memory, more time")
    # A run from before this setting, or the next, goes on as it began: "off".
    compile: str = _setting("auto", _choice(COMPILE_MODES, **COMPILE_FLAG), COMPILE_HELP)
    cuda_graph: str = _setting(
        "auto",
        _choice(("auto", "on", "off")),
        "record each step as one CUDA graph: auto (where possible, or says why not), on or off",
    )
    sharded: bool = _setting(
        False, _SWITCH, "FSDP2: each process holds a part of the weights, to the same results"
    )
    learning_rate: float = _setting(3e-3, _POSITIVE, "at the start")
    adam_beta2: float = _setting(0.95, _DECAY)
    # Of the learning rate: "linear" to 0 at the last step.
    decay: str = _setting("linear", _choice(("linear", "constant")))
    gradient_clip: float | None = _setting(1.0, _optional(_POSITIVE))  # None logs the norm only
    skip_limit: int = _setting(10, _whole(), "non-finite steps in a row before the run stops")
    ema_decay: float = _setting(0.999, _DECAY)
    ema_ramp: bool = _setting(True, _SWITCH)  # averages over fewer steps at the start
    # Share of the labels that batches.py replaces by the null class, for guidance.
    label_dropout: float = _setting(0.1, _real("from 0 to 1", lambda value: 0 <= value <= 1))
    checkpoint_every: int = _setting(500, _whole(), "steps between checkpoints")
    keep_every: int | None = _setting(
        None, _optional(_whole()), "never delete checkpoints at multiples of this"
    )
    sample_every: int = _setting(500, _whole(), "steps between sample grids")
    # Of data without a test split: a folder, or latents of one.
    hold_out: float = _setting(
        0.0,
        _real("from 0 to less than 1", lambda value: 0 <= value < 1),
        "share of a folder's images to leave out of training, for the held-out loss",
    )
    held_out_every: int | None = _setting(
        None, _optional(_whole()), "steps between held-out losses, which go into the log"
    )
    held_out_images: int = _setting(1024, _whole(10), "images of each of them")
    diagnose_every: int = _setting(100, _whole(), "steps between looks into the mechanisms")
    # Of a run that recipes/convert.py began: the trained model that it began with, the arguments
    # of the backbone that it has from it, and how much of a teacher that model is.
    start: dict[str, Any] | None = dataclasses.field(default=None, metadata=_MAYBE_OPTIONS)
    backbone: dict[str, Any] | None = dataclasses.field(default=None, metadata=_MAYBE_OPTIONS)
    distil: dict[str, Any] | None = dataclasses.field(default=None, metadata=_MAYBE_OPTIONS)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            rule, value = field.metadata["rule"], getattr(self, field.name)
            if not rule.fits(value):
                raise UserError(f"{_flag_of(field.name)} must be {rule.text}, got {value!r}")
        if self.steps * self.batch_size >= 2**63:
            raise UserError(
                f"--steps {self.steps} of --batch-size {self.batch_size} are more images than can "
                f"be counted"
            )


def _flag_of(name: str) -> str:
    return "--set" if name == "attn_options" else f"--{name.replace('_', '-')}"


def add_setting_flags(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for every setting that has a help text."""
    for field in dataclasses.fields(Settings):
        if field.metadata["help"] is not None:
            flag = field.metadata["rule"].flag
            parser.add_argument(_flag_of(field.name), help=field.metadata["help"], **flag)


_NAMES = [field.name for field in dataclasses.fields(Settings)]


def resumed_settings(
    saved: Mapping[str, Any],
    given: Mapping[str, Any],
    allowed: Collection[str] = (),
    where: str = "config.json",
) -> tuple[Settings, list[str]]:
    """The settings of a run that is continued.

    Args:
        saved: The settings it was started with; those it lacks take their defaults.
        given: What the caller asks for now, by name.
        allowed: Names that may differ.
        where: The file that held ``saved``, for messages.

    Returns:
        The settings to go on with, and a line for each change.

    Raises:
        UserError: A setting differs that is not allowed to, a name does not exist, or a value
            saved cannot be; then the message names the file.
    """
    saved = {"cuda_graph": "off", "compile": "off", **canonical_settings(saved)}
    given = canonical_settings(given)
    for name in allowed:
        if name not in _NAMES:
            raise UserError(f"--allow-change {name!r} is not a setting{nearest(name, _NAMES)}")
    for name in saved:
        if name not in _NAMES:
            raise UserError(
                f"{where} has a setting {name!r} that this version does not know"
                f"{nearest(name, _NAMES)} It decides what is computed, so the run is not "
                f"continued without it"
            )
    try:
        before = Settings(**saved)
    except UserError as error:
        raise UserError(f"{where} is damaged: {error}") from error
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
