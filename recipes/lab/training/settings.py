"""Everything that decides what a run computes, and how a saved answer meets a new question."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from attnzoo.contract import nearest
from recipes.lab.console import UserError
from recipes.lab.data.latents import canonical_settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides what a run computes; saved as the run's config.json.

    The number of processes is not among them: they share one global batch, whose images, times,
    noise and label drops do not depend on it.
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


# What a preset changes: "tiny" is for a CPU, "flow" is the same with rectified flow, as SiT and
# Sana train, "dit" is the recipe of DiT and of the paper.
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


def resumed_settings(
    saved: Mapping[str, Any], given: Mapping[str, Any], allowed: Collection[str] = ()
) -> tuple[Settings, list[str]]:
    """The settings of a run that is continued.

    Args:
        saved: The settings it was started with.
        given: What the caller asks for now, by name.
        allowed: Names that may differ.

    Returns:
        The settings to go on with, and a line for each change.

    Raises:
        UserError: A setting differs that is not allowed to, or a name does not exist.
    """
    saved, given = canonical_settings(saved), canonical_settings(given)
    names = [field.name for field in dataclasses.fields(Settings)]
    for name in allowed:
        if name not in names:
            raise UserError(f"--allow-change {name!r} is not a setting{nearest(name, names)}")
    before = Settings(**{name: value for name, value in saved.items() if name in names})
    changes = {
        name: (getattr(before, name), value)
        for name, value in given.items()
        if getattr(before, name) != value
    }
    refused = [name for name in changes if name not in allowed]
    if refused:
        difference = "; ".join(
            f"{name}: {old!r} -> {new!r}" for name, (old, new) in changes.items()
        )
        remedy = " ".join(f"--allow-change {name}" for name in refused)
        raise UserError(
            f"the run differs from what it was started with ({difference}): drop the flags to "
            f"continue it, allow the change with {remedy}, replace it with --overwrite, or choose "
            f"another --out"
        )
    lines = [f"{name}: {old!r} -> {new!r}" for name, (old, new) in changes.items()]
    return dataclasses.replace(before, **{name: new for name, (_, new) in changes.items()}), lines
