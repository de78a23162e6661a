"""Everything that decides what a run computes, and how a saved answer meets a new question."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from recipes.lab.console import COMPILE_FLAG, COMPILE_HELP, COMPILE_MODES, UserError
from recipes.lab.training.rules import (
    BELOW_ONE,
    LARGEST,
    OPTIONS,
    POSITIVE,
    SHARE,
    SWITCH,
    TEXT,
    Rule,
    choice,
    integer,
    one_of,
    optional,
    real,
)

# --help names what there is to choose from without these imports; a test holds it to them.


def _sizes() -> Collection[str]:
    from backbones.presets import SIZES

    return SIZES


def _protocols() -> Collection[str]:
    from backbones.presets import PROTOCOLS

    return PROTOCOLS


def _feedforwards() -> Collection[str]:
    from backbones.feedforward import FEEDFORWARDS

    return FEEDFORWARDS


def _levels() -> Collection[str]:
    from recipes.lab.data.datasets import known_levels

    return known_levels()


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


RESTORE = "restore it, or choose another folder"  # of a run's configuration

GROUPS = {
    "data": "what the model learns from",
    "model": "what is trained",
    "optimization": "how it is trained",
    "run": "how often it is saved and looked at, and what it is computed with",
}


def _setting(group: str, default: Any, rule: Rule, help: str) -> Any:
    """A field with its rule, its group in --help and what --help says of it."""
    metadata = {"group": group, "rule": rule, "help": help}
    return dataclasses.field(default=default, metadata=metadata)


# Settings without a flag of their own.
_OPTIONS = {"group": None, "rule": OPTIONS, "help": ""}
_MAYBE_OPTIONS = {"group": None, "rule": optional(OPTIONS), "help": ""}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides what a run computes; saved as the run's config.json.

    The number of processes is not among them: they share one global batch, whose images, times,
    noise and label drops do not depend on it. A run that was saved before a setting existed has
    the default, or what ``resumed_settings`` says.

    Raises:
        UserError: A value is of the wrong type, out of range, or no choice of its setting.
    """

    data: str = _setting(
        "data",
        "digits",
        TEXT,
        "digits, fashion-mnist, shapes, emoji, a folder with one sub-folder per class, latents "
        "from recipes/encode.py, or hf:NAME of the hub's data sets",
    )
    level: str = _setting("data", "easy", choice(_levels), "of shapes: easy, medium, hard or "
                          "long-range; of emoji: easy or fluent")  # fmt: skip
    class_count: int | None = _setting(
        "data", None, optional(integer()), "draw that many classes of a folder"
    )
    class_seed: int = _setting("data", 0, integer(0, 2**64), "of that draw")
    vae: str | None = _setting(
        "data",
        None,
        optional(TEXT),
        "folder or hub id of an AutoencoderKL: train on latents, encoded each time; without it on "
        "pixels, or on latents that are encoded already",
    )
    resolution: int | None = _setting(
        "data",
        None,
        optional(integer()),
        "side of the images in pixels; without it the data's own",
    )
    # Of data without a test split: a folder, or latents of one.
    hold_out: float = _setting(
        "data",
        0.0,
        real("from 0 to less than 1", lambda value: 0 <= value < 1),
        "share of a folder's images to leave out of training, for the held-out loss",
    )
    strict: bool = _setting("data", False, SWITCH, "stop at the first unreadable image")
    attn: str = _setting(
        "model",
        "dydila",
        TEXT,
        "mechanism (python -m attnzoo lists them), pattern over the blocks such as "
        "'sana*3+softmax', or a model of the paper",
    )
    attn_options: dict[str, Any] = dataclasses.field(default_factory=dict, metadata=_OPTIONS)
    size: str = _setting("model", "tiny", choice(_sizes), "tiny, S, B or L")
    protocol: str = _setting(
        "model",
        "controlled",
        choice(_protocols),
        "controlled (same depth and feed-forward for all), matched (same parameters) or paper",
    )
    feedforward: str | None = _setting(
        "model",
        None,
        optional(choice(_feedforwards)),
        "mlp, mix-ffn, swiglu, diffmoe or time-experts, instead of the protocol's",
    )
    patch_size: int | None = _setting(
        "model",
        None,
        optional(integer()),
        "side of a patch in pixels, or in latent pixels; without it 2 for latents and up to 16 "
        "px, 4 above",
    )
    preset: str = _setting(
        "optimization",
        "tiny",
        one_of(*PRESETS),
        "training recipe: tiny (for a CPU), flow (rectified flow) or dit (of DiT, for latents)",
    )
    steps: int = _setting("optimization", 1500, integer(), "optimizer steps")
    batch_size: int = _setting(
        "optimization", 64, integer(), "images per step, of all processes and micro-steps together"
    )
    accumulate: int = _setting(
        "optimization", 1, integer(), "micro-steps that share a step's images"
    )
    learning_rate: float = _setting("optimization", 3e-3, POSITIVE, "after the warm-up")
    warmup_steps: int = _setting(
        "optimization", 0, integer(0), "first steps, over which the rate rises in a line"
    )
    decay: str = _setting(
        "optimization",
        "linear",
        one_of("linear", "cosine", "constant"),
        "how the rate falls, to 0 after the last step",
    )
    decay_steps: int | None = _setting(
        "optimization",
        None,
        optional(integer()),
        "last steps, over which it falls; without it all after the warm-up",
    )
    weight_decay: float = _setting(
        "optimization",
        0.0,
        real("a number from 0 to 1e9", lambda value: 0 <= value <= LARGEST),
        "AdamW's, of weights that are matrices or kernels: not of biases and scales",
    )
    adam_beta2: float = _setting(
        "optimization", 0.95, BELOW_ONE, "AdamW's average of squares; the first is 0.9"
    )
    gradient_clip: float | None = _setting(
        "optimization", 1.0, optional(POSITIVE), "largest norm of the gradient; none only logs it"
    )
    ema_decay: float = _setting(
        "optimization", 0.999, BELOW_ONE, "of the average of the weights, at each step"
    )
    ema_ramp: bool = _setting(
        "optimization", True, SWITCH, "average over fewer steps at the start"
    )
    label_dropout: float = _setting(
        "optimization", 0.1, SHARE, "of the labels left out, to learn guidance"
    )
    seed: int = _setting("run", 0, integer(0, 2**64), "of everything that is random")
    precision: str = _setting(
        "run",
        "fp32",
        one_of("fp32", "bf16"),
        "of the matrix products; the paper trains DiG in fp32",
    )
    gradient_checkpointing: bool = _setting("run", False, SWITCH, "less memory, more time")
    compile: str = _setting("run", "auto", one_of(*COMPILE_MODES, **COMPILE_FLAG), COMPILE_HELP)
    cuda_graph: str = _setting(
        "run",
        "auto",
        one_of("auto", "on", "off"),
        "record each step as one CUDA graph: auto (where possible, or says why not), on or off",
    )
    sharded: bool = _setting(
        "run",
        False,
        SWITCH,
        "FSDP2: each process holds a part of the weights; slower, for models that do not fit",
    )
    bucket_mb: int = _setting(
        "run",
        100,
        integer(0),
        "MB of gradients that several processes add up at once, beside the backward; 0: all of "
        "them, after it",
    )
    gradient_sums: str = _setting(
        "run",
        "fp32",
        one_of("fp32", "bf16"),
        "what several processes send of gradients: bf16 is half as much, and rounds the sums",
    )
    skip_limit: int = _setting(
        "run", 10, integer(), "non-finite steps in a row before the run stops"
    )
    checkpoint_every: int = _setting("run", 500, integer(), "steps between checkpoints")
    keep_every: int | None = _setting(
        "run", None, optional(integer()), "never delete checkpoints at multiples of this"
    )
    sample_every: int = _setting("run", 500, integer(), "steps between sample grids")
    held_out_every: int | None = _setting(
        "run", None, optional(integer()), "steps between held-out losses, which go into the log"
    )
    held_out_images: int = _setting("run", 1024, integer(10), "images of each of them")
    diagnose_every: int = _setting("run", 100, integer(), "steps between looks into mechanisms")
    # Of a run that recipes/convert.py began: the trained model that it began with, the arguments
    # of the backbone that it has from it, and how much of a teacher that model is.
    start: dict[str, Any] | None = dataclasses.field(default=None, metadata=_MAYBE_OPTIONS)
    backbone: dict[str, Any] | None = dataclasses.field(default=None, metadata=_MAYBE_OPTIONS)
    distil: dict[str, Any] | None = dataclasses.field(default=None, metadata=_MAYBE_OPTIONS)

    def __post_init__(self) -> None:
        for name, field in FIELDS.items():
            rule, value = field.metadata["rule"], getattr(self, name)
            if not rule.fits(value):
                raise UserError(f"{flag_of(name)} must be {rule.text}, got {value!r}")
        if self.steps * self.batch_size >= 2**63:
            raise UserError(
                f"--steps {self.steps} of --batch-size {self.batch_size} are more images than can "
                f"be counted"
            )
        if self.sharded and self.accumulate > 1 and self.gradient_sums != "fp32":
            raise UserError(
                f"--sharded with --gradient-sums {self.gradient_sums} would round what each of "
                f"the --accumulate {self.accumulate} micro-steps adds as well: drop one"
            )
        if self.decay_steps is not None and self.decay == "constant":
            raise UserError(
                f"--decay-steps {self.decay_steps} is of a rate that falls, and --decay constant "
                f"does not: drop one"
            )
        if self.warmup_steps + (self.decay_steps or 0) > self.steps:
            falls = f" and --decay-steps {self.decay_steps}" if self.decay_steps else ""
            raise UserError(
                f"--warmup-steps {self.warmup_steps}{falls} are more than --steps {self.steps}: "
                f"choose fewer, or more steps"
            )

    def rate_at(self, step: int) -> float:
        """The rate of learning in a step, counted from 0."""
        rate = self.learning_rate
        if step < self.warmup_steps:
            return rate * (step + 1) / self.warmup_steps
        begin = self.steps - (self.decay_steps or self.steps - self.warmup_steps)
        if self.decay == "constant" or step < begin:
            return rate
        done = (step - begin) / (self.steps - begin)
        return rate * (1 - done if self.decay == "linear" else (1 + math.cos(math.pi * done)) / 2)


FIELDS = {field.name: field for field in dataclasses.fields(Settings)}


def flag_of(name: str) -> str:
    """The flag that gives a setting."""
    return "--set" if name == "attn_options" else f"--{name.replace('_', '-')}"


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
    from attnzoo.contract import nearest  # torch, which --help does not wait for
    from recipes.lab.data.latents import canonical_settings

    # A run from before these settings goes on as it began.
    saved = {"cuda_graph": "off", "compile": "off", **canonical_settings(saved)}
    given = canonical_settings(given)
    for name in allowed:
        if name not in FIELDS:
            raise UserError(f"--allow-change {name!r} is not a setting{nearest(name, FIELDS)}")
    for name in saved:
        if name not in FIELDS:
            raise UserError(
                f"{where} has a setting {name!r} that this version does not know"
                f"{nearest(name, FIELDS)} It decides what is computed, so the run is not "
                f"continued without it"
            )
    try:
        before = Settings(**saved)
    except UserError as error:
        raise UserError(f"{where} is damaged: {error}; {RESTORE}") from error
    changes = {
        name: (getattr(before, name), value)
        for name, value in given.items()
        if not _are_same(getattr(before, name), value)
    }
    # A value that cannot be is said as such: to allow the change would lead nowhere.
    after = dataclasses.replace(before, **{name: new for name, (_, new) in changes.items()})
    refused = [name for name in changes if name not in allowed]
    lines = [f"{name}: {old!r} -> {new!r}" for name, (old, new) in changes.items()]
    if refused:
        remedy = " ".join(f"--allow-change {name}" for name in refused)
        raise UserError(
            f"the run differs from what it was started with ({'; '.join(lines)}): drop the flags "
            f"to continue it, allow the change with {remedy}, replace it with --overwrite, or "
            f"choose another --out"
        )
    return after, lines


def _are_same(one: Any, other: Any) -> bool:
    """Whether two values are saved alike: JSON makes lists of tuples."""
    return one == other or json.dumps(one, default=str) == json.dumps(other, default=str)
