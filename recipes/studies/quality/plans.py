"""The studies as data: variants, resolutions, protocols, claims, and what runs first.

All runs of a study share model, data, images per step and noise; a protocol says what else is
equal to softmax's run:

- "depth": the number of blocks and of steps;
- "MACs": the multiply-accumulates of a forward, by the nearest number of blocks;
- "time": the seconds of training, by the number of steps. Seconds of a step are measured alone on
  the machine (``study.py --measure``), so that runs which share a GPU do not blur them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from attnzoo.counting import count_macs
from attnzoo.mechanisms.dydila import ABLATION_STEPS
from recipes.lab.console import UserError
from recipes.lab.training.build import build_model
from recipes.lab.training.settings import Settings
from recipes.studies.comparison.plan import Variant, facts_of
from recipes.studies.comparison.planned import PlannedRun

PROTOCOLS = ("depth", "MACs", "time")
REFERENCE = "softmax"  # what the others are equal to
PATCH = 4  # pixels
MODELS = {
    "192x6": {"dim": 192, "depth": 6, "num_heads": 6},
    "96x4": {"dim": 96, "depth": 4, "num_heads": 3},  # for a CPU
    "384x12": {"dim": 384, "depth": 12, "num_heads": 6},  # size S
}


class Claim(NamedTuple):
    """A statement that the runs of a study decide: the first has the lower held-out loss.

    Attributes:
        topic: What it speaks to; see the headings in page.py.
        first: Label of the variant that is said to be better.
        second: Of the other.
        is_main: Whether it stands in the page's table; the others are folded.
    """

    topic: str
    first: str
    second: str
    is_main: bool = False


@dataclasses.dataclass(frozen=True)
class Study:
    """What a study compares.

    Attributes:
        name: In tables and on the command line.
        tiers: Variants, in groups of falling importance.
        resolutions: In pixels.
        protocols: Of ``PROTOCOLS``.
        level: Of the emoji.
        claims: What it is to decide.
    """

    name: str
    tiers: Sequence[Sequence[Variant]]
    resolutions: Sequence[int]
    protocols: Sequence[str]
    level: str
    claims: Sequence[Claim]

    @property
    def variants(self) -> list[Variant]:
        """All of them, most important first."""
        return [variant for tier in self.tiers for variant in tier]


class StudyRun(NamedTuple):
    """A run with what it stands for; runs of two protocols may be the same one."""

    planned: PlannedRun
    study: str
    protocol: str


def _named(attn: str, note: str = "", **options: Any) -> Variant:
    return Variant(f"{attn}, {note}" if note else attn, attn, options)


# What each mechanism's convolution of the values is, beside the default; ``None`` where it has
# none by default.
CONVOLVED = ("dydila", "focused", "lit", "mhla", "dydila-map", "mala", "rala", "agent", "ttt")
_WITHOUT: dict[str, Any] = {"agent": False, "ttt": False}
_SOFTMAX_CONV = _named("softmax", "conv", conv="acnet")
_PLAIN = ABLATION_STEPS["sana"]
_PLAIN_LABEL = "DyDiLA's plain start"
_CUMULATIVE = {
    _PLAIN_LABEL: _PLAIN,
    "+ focused kernel": ABLATION_STEPS["+focused kernel"],
    "+ dynamic kernel": ABLATION_STEPS["+dynamic measure kernel"],
    "+ dynamic projection": ABLATION_STEPS["+dynamic projection module"],
    "dydila, no conv": ABLATION_STEPS["+token differential operator"],
}
_ALONE = {
    "dynamic projection alone": _PLAIN | {"projection": "replace"},
    "token difference alone": _PLAIN | {"projection": "redundancy", "differential": "token"},
    "convolution alone": _PLAIN | {"conv": "acnet"},
}


def _without(attn: str) -> Variant:
    return _named(attn, "no conv", conv=_WITHOUT.get(attn, "none"))


def _steps(steps: Mapping[str, Mapping[str, Any]]) -> list[Variant]:
    return [Variant(label, "dydila", dict(options)) for label, options in steps.items()]


CONTROLS = Study(
    "controls",
    tiers=(
        [_named("softmax"), _SOFTMAX_CONV, _named("conv"), _named("dydila"), _without("dydila"),
         _named("sana"), _named("focused"), _without("focused")],
        [*_steps({k: v for k, v in _CUMULATIVE.items() if k != "dydila, no conv"}),
         *_steps(_ALONE), _named("dydila-map"), _without("dydila-map")],
        [_named("softmax", "conv 5x5", conv="5x5"),
         *(one for name in ("lit", "mhla", "mala", "rala", "agent", "ttt")
           for one in (_named(name), _without(name)))],
    ),
    resolutions=(64,),
    protocols=PROTOCOLS,
    level="easy",
    claims=(
        *(Claim("convolution", name, f"{name}, no conv", name in ("dydila", "focused"))
          for name in CONVOLVED),
        Claim("convolution", "softmax, conv", "softmax", True),
        Claim("type", "softmax, conv", "conv", True),
        Claim("type", "dydila", "conv", True),
        Claim("type", "dydila", "softmax", True),
        Claim("type", "dydila", "softmax, conv", True),
        Claim("type", "dydila, no conv", "softmax", True),
        Claim("type", "softmax", "sana", True),
        Claim("type", "focused", "softmax, conv"),
        Claim("type", "dydila", "focused", True),
        *(Claim("parts", after, before, True)
          for before, after in itertools.pairwise(_CUMULATIVE)),
        *(Claim("parts", label, _PLAIN_LABEL) for label in ("+ dynamic kernel", *_ALONE)),
        Claim("difference", "dydila", "dydila-map", True),
        Claim("difference", "dydila, no conv", "dydila-map, no conv"),
    ),
)  # fmt: skip
_MIXTURE = "sana*3+softmax"
RESOLUTION = Study(
    "resolution",
    tiers=(
        [_named("softmax"), _SOFTMAX_CONV, _named("sana"), _named("dydila"), _named("lit"),
         _named(_MIXTURE)],
        [_named("focused"), _named("dydila-map"), _named("local"), _named("mhla")],
        [_named("gated"), _named("compressed")],
    ),
    resolutions=(32, 64, 128, 256),
    protocols=("depth", "time"),
    level="fluent",
    claims=(
        Claim("linear", "softmax", "sana", True),
        Claim("linear", "softmax, conv", "lit", True),
        Claim("linear", _MIXTURE, "softmax", True),
        Claim("linear", _MIXTURE, "sana"),
        Claim("linear", "softmax", "local"),
        Claim("linear", "softmax", "compressed"),
        Claim("linear", "softmax", "gated"),
        Claim("linear", "softmax", "mhla"),
        Claim("type", "dydila", "softmax", True),
        Claim("type", "dydila", "softmax, conv", True),
        Claim("type", "dydila", "focused"),
        Claim("convolution", "softmax, conv", "softmax", True),
        Claim("difference", "dydila", "dydila-map", True),
    ),
)  # fmt: skip
STUDIES = {study.name: study for study in (CONTROLS, RESOLUTION)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """What a call makes of a study: how large, how long, how often.

    Attributes:
        model: A name of ``MODELS``.
        data: Of the emoji, or another set's name.
        steps: Of softmax and of all at equal depth and MACs.
        batch_size: Images per step.
        accumulate: Micro-steps that share a step's images, where all take too much memory.
        learning_rate: Of all variants, at the first step.
        seeds: Number of them, from 0.
        samples: Images per run for FID and KID; 0 measures the held-out loss alone.
        points: Held-out losses along a run; a multiple of 5 has one before the last fifth.
        precision: Of the matrix products.
        compile: Whether blocks are compiled.
        extractors: What looks at the samples.
        extractor_weights: File of the one that needs weights; None looks where they belong.
        held_out_images: Of each held-out loss along a run.
        hold_out: Share of a folder's images to leave out of training for it.
    """

    model: str = "192x6"
    data: str = "emoji"
    steps: int = 3000
    batch_size: int = 64
    accumulate: int = 1
    learning_rate: float = Settings.learning_rate
    seeds: int = 5
    samples: int = 500
    points: int = 10
    precision: str = "bf16"
    compile: str = "off"
    extractors: tuple[str, ...] = ("efficientnet-lite0",)
    extractor_weights: str | None = None
    held_out_images: int = 1024
    hold_out: float = 0.0


Seconds = Mapping[tuple[str, int], float]  # of a step, by label and resolution


def study_runs(
    study: Study,
    scale: Scale,
    seconds: Seconds,
    *,
    resolutions: Sequence[int] = (),
    protocols: Sequence[str] = (),
    only: Sequence[str] = (),
) -> list[StudyRun]:
    """Every run, most important first.

    Tiers come in turn, within each the protocols, and within these the first three seeds at all
    resolutions before further ones: whatever a stop leaves has both seeds and resolutions.

    Args:
        study: Of ``STUDIES``.
        scale: Of this call.
        seconds: Measured ones; needed at equal time.
        resolutions: Instead of the study's.
        protocols: Instead of the study's.
        only: Labels of variants to leave the others out.

    Raises:
        UserError: A name is unknown, seconds are missing, or the data does not fit.
    """
    resolutions = list(dict.fromkeys(resolutions or study.resolutions))
    protocols = list(dict.fromkeys(protocols or study.protocols))
    known = [variant.label for variant in study.variants]
    for name, choices in ((only, known), (protocols, PROTOCOLS)):
        if unknown := [one for one in name if one not in choices]:
            raise UserError(f"{unknown[0]!r} is none of {'; '.join(choices)}")
    found = []
    few = min(scale.seeds, 3)
    for tier in study.tiers:
        chosen = [variant for variant in tier if not only or variant.label in only]
        for block in (range(few), range(few, scale.seeds)):
            for protocol in protocols:
                found += [
                    StudyRun(
                        _planned(study, scale, variant, side, protocol, seed, seconds),
                        study.name,
                        protocol,
                    )
                    for side in resolutions
                    for seed in block
                    for variant in chosen
                ]
    return found


def _planned(
    study: Study,
    scale: Scale,
    variant: Variant,
    side: int,
    protocol: str,
    seed: int,
    seconds: Seconds,
) -> PlannedRun:
    backbone, steps = dict(MODELS[scale.model]), scale.steps
    if protocol == "time":
        steps = steps_of_equal_time(variant.label, side, steps, seconds)
    settings = Settings(
        attn=variant.attn, attn_options=dict(variant.options), backbone=backbone,
        data=scale.data, level=study.level if scale.data.partition(":")[0] == "emoji" else "easy",
        resolution=side, patch_size=PATCH, steps=steps, batch_size=scale.batch_size,
        accumulate=scale.accumulate, seed=seed, learning_rate=scale.learning_rate,
        precision=scale.precision, compile=scale.compile,
        sample_every=steps,
        checkpoint_every=max(1, min(1000, steps)), diagnose_every=steps,
        held_out_every=max(1, -(-steps // scale.points)), held_out_images=scale.held_out_images,
        hold_out=scale.hold_out,
    )  # fmt: skip
    if protocol == "MACs" and variant.label != REFERENCE:
        depth = depth_of_equal_macs(settings)
        settings = dataclasses.replace(settings, backbone={**backbone, "depth": depth})
    return PlannedRun(label=variant.label, settings=settings, cfgs=(1.0,), samples=scale.samples,
                      sampling_steps=20,
                      extractors=scale.extractors if scale.samples else (),
                      extractor_weights=scale.extractor_weights, held_out=0)  # fmt: skip


def steps_of_equal_time(label: str, side: int, steps: int, seconds: Seconds) -> int:
    """How many steps of a variant take as long as so many of softmax.

    Raises:
        UserError: Either has not been measured.
    """
    for name in (label, REFERENCE):
        if (name, side) not in seconds:
            raise UserError(
                f"the seconds of a step of {name!r} at {side} px are not known: measure them with "
                f"--measure, or name --protocols without time"
            )
    return max(1, round(steps * seconds[REFERENCE, side] / seconds[label, side]))


_macs: dict[str, int] = {}


def macs_of(settings: Settings, depth: int) -> int:
    """Multiply-accumulates of one image's forward in a model of so many blocks."""
    chosen = dataclasses.replace(settings, backbone={**(settings.backbone or {}), "depth": depth})
    key = repr([chosen.attn, chosen.attn_options, chosen.backbone, chosen.resolution, chosen.data])
    if key not in _macs:
        facts = facts_of(chosen)
        with torch.device("meta"):
            model = build_model(chosen, facts)  # pyright: ignore[reportArgumentType]
        _macs[key] = count_macs(model, resolution=facts.image_resolution).total
    return _macs[key]


def depth_of_equal_macs(settings: Settings) -> int:
    """The number of blocks with which a model comes nearest to softmax's multiply-accumulates."""
    depth = (settings.backbone or {})["depth"]
    target = macs_of(dataclasses.replace(settings, attn=REFERENCE, attn_options={}), depth)
    one, more = macs_of(settings, depth), macs_of(settings, 2 * depth)
    if more <= one:
        return depth
    guess = depth + (target - one) * depth / (more - one)
    near = {max(1, math.floor(guess)), max(1, math.ceil(guess))}
    return min(near, key=lambda d: abs(one + (d - depth) * (more - one) / depth - target))
