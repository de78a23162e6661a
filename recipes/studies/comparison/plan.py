"""What a comparison consists of: variants of attention, settings (data, resolution), seeds."""

from __future__ import annotations

import csv
import dataclasses
import functools
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from attnzoo.contract import nearest
from attnzoo.errors import UsageError
from backbones.pattern import nested
from backbones.presets import PROTOCOLS
from recipes.lab.console import UserError, parse_options
from recipes.lab.data.datasets import DATASETS, entry_of, kind_of
from recipes.lab.data.latents import (
    LatentDataset,
    canonical_settings,
    is_latent_folder,
    load_vae,
    open_vae,
)
from recipes.lab.data.shapes import LEVELS
from recipes.lab.evaluation.evaluate import WEIGHTED, load_extractor
from recipes.lab.evaluation.real import RealImages, real_images
from recipes.lab.training.build import build_model, load_training_data
from recipes.lab.training.checkpoint import Run
from recipes.lab.training.held_out import (
    can_hold_out,
    check_enough,
    missing_line,
    open_held_out,
)
from recipes.lab.training.settings import Settings
from recipes.studies.comparison.planned import SMALLCNN, PlannedRun

_TOKEN = re.compile(
    r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|.""", re.DOTALL
)  # quoted, or one character
Setting = tuple[str, "int | None"]  # data as ``parse_data`` reads it, resolution


@dataclasses.dataclass(frozen=True)
class Variant:
    """An attention with options, under the name that tables and pictures give it.

    Attributes:
        label: Its name.
        attn: A registered mechanism, a pattern of several, or a model of the paper.
        options: Of the mechanism.
        paper: (table, model) of docs/paper_results.csv that it corresponds to, or None.
    """

    label: str
    attn: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    paper: tuple[int, str] | None = None


def parse_variants(text: str) -> list[Variant]:
    """ "softmax,dydila:conv=none" -> a variant for each.

    Raises:
        UserError: There is none, a bracket or quote is not closed, or see ``parse_variant``.
    """
    variants = [parse_variant(part) for part in _split(text, ",") if part.strip()]
    if not variants:
        raise UserError(f"--attn names no mechanism: {text!r}")
    return variants


def parse_variant(text: str) -> Variant:
    """ "dydila" or "dydila:lambda_init=increasing:conv=none" -> a variant of that name.

    Options of a pattern name their mechanism: "sana*3+softmax:sana.qk_norm=true". Values are
    Python's, such as ``(1,2)`` or ``'a:b'``, or else plain words.

    Raises:
        UserError: An option has no ``=``, is given twice, or its value is nothing that a file of
            settings can hold.
    """
    attn, *pairs = _split(text.strip(), ":")
    try:
        options = parse_options(pairs)
        json.dumps(options, allow_nan=False)
    except UserError as error:
        raise UserError(f"--attn takes NAME:OPTION=VALUE, got {text!r}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"--attn {text!r} has a value that cannot be saved: {error}") from error
    if len(options) < len(pairs):
        raise UserError(f"--attn {text!r} gives an option twice")
    return Variant(text.strip(), attn, nested(options))


def _split(text: str, separator: str) -> Iterator[str]:
    """The parts between separators that stand in no bracket and no quotes."""
    closing = {"(": ")", "[": "]", "{": "}"}
    waiting: list[str] = []
    part = ""
    for token in _TOKEN.findall(text):
        if token in ("'", '"'):
            raise UserError(f"--attn {text!r} does not close {token}")
        if token in closing:
            waiting.append(closing[token])
        elif token in closing.values() and (not waiting or waiting.pop() != token):
            raise UserError(f"--attn {text!r} closes a bracket that is not open")
        elif token == separator and not waiting:
            yield part
            part = ""
            continue
        part += token
    if waiting:
        raise UserError(f"--attn {text!r} does not close {waiting[-1]}")
    yield part


def split_data(text: str) -> list[str]:
    """ "shapes,digits@8" -> its items; one that holds a comma stands in double quotes.

    Raises:
        UserError: There is none.
    """
    items = [item.strip() for item in next(csv.reader([text]), [])]
    if not any(items):
        raise UserError(f"--data names no data: {text!r}")
    return [item for item in items if item]


def parse_data(text: str) -> tuple[str, str]:
    """ "shapes/long-range" -> ("shapes", "long-range"); the level is "easy" if not given."""
    data, slash, level = text.rpartition("/")
    if slash and level in LEVELS and data == "shapes":
        return data, level
    return canonical(text), "easy"


def canonical(data: str) -> str:
    """One spelling for a folder: "d5/", "./d5" and "d5" are one setting."""
    if data in DATASETS or data.startswith("fashion-mnist:") or not data:
        return data
    folder = os.path.normpath(data)
    # The name alone would be the data set of that name.
    is_name = folder in DATASETS or folder.startswith("fashion-mnist:")
    return os.path.join(os.curdir, folder) if is_name else folder


class DataFacts(NamedTuple):
    """What is known of data before anything is trained, as ``build_model`` wants it.

    The names are those of ``ImageDataset``; ``latent`` and ``source`` are what a run's
    config.json holds.
    """

    resolution: int
    channels: int
    class_names: tuple[str, ...]
    latent_factor: int
    latent: Mapping[str, Any] | None
    source: Mapping[str, Any] | None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def image_resolution(self) -> int:
        """Side of the images in pixels."""
        return self.resolution * self.latent_factor


@functools.cache
def data_facts(data: str, level: str, resolution: int | None, vae: str | None) -> DataFacts:
    """Opens data once, and lets it go again.

    Raises:
        UserError: It does not exist, is damaged or does not fit.
    """
    settings = Settings(data=data, level=level, resolution=resolution, vae=vae)
    dataset = load_training_data(settings, load_vae(vae) if vae else None)
    return DataFacts(
        dataset.resolution,
        dataset.channels,
        tuple(dataset.class_names),
        dataset.latent_factor,
        dataset.facts if isinstance(dataset, LatentDataset) else None,
        getattr(dataset, "source", None),
    )


def facts_of(settings: Settings) -> DataFacts:
    """What is known of the data of a run."""
    return data_facts(settings.data, settings.level, settings.resolution, settings.vae)


def settings_of(
    text: str, resolutions: Sequence[int], vae: str | None, warn: Callable[[str], None]
) -> list[Setting]:
    """The settings of ``--data``: its resolutions, or the data's own where it has but one.

    Args:
        text: Items as ``split_data`` reads them, each NAME or NAME@PIXELS.
        resolutions: Of the items that name none; empty takes the data's own.
        vae: Folder or hub id of what encodes images.
        warn: Gets a line for each resolution that is left out.

    Raises:
        UserError: An item does not exist, or not at a resolution that it names.
    """
    if any(side < 1 for side in resolutions):
        raise UserError(f"--resolutions takes pixels from 1 up, got {list(resolutions)}")
    found: list[Setting] = []
    for item in split_data(text):
        name, at, pixels = item.rpartition("@")
        if at and not pixels.isdecimal():
            if not Path(item).expanduser().is_dir():
                raise UserError(f"--data takes NAME or NAME@PIXELS, got {item!r}")
            at = ""
        name = name if at else item
        data, level = parse_data(name)
        for resolution in [int(pixels)] if at else resolutions or [None]:
            try:
                data_facts(data, level, resolution, vae_of(data, vae))
            except UserError as error:
                # Some data has one resolution; those of a list need not all suit it.
                is_fixed = data in ("digits", "fashion-mnist") or is_latent_folder(data)
                if at or len(resolutions) < 2 or not is_fixed:
                    raise
                warn(f"{name} at {resolution} px is left out: {error}")
                resolution = None
            if (name, resolution) not in found:
                found.append((name, resolution))
    return found


def plan_runs(
    variants: Sequence[Variant],
    settings: Sequence[Setting],
    *,
    seeds: int,
    protocols: Sequence[str],
    like: PlannedRun,
) -> list[PlannedRun]:
    """Every run of a comparison, seed by seed, so that a stopped one is a smaller comparison.

    Within a seed small images come first: they are done soonest.

    Args:
        variants: What to compare.
        settings: Data and resolutions.
        seeds: Number of seeds, from 0. Runs of one seed see the same images, noise and times.
        protocols: Of the backbone.
        like: What all runs share. Its patch size None takes 4 pixels, or 2 of latents, at all
            resolutions, so that tokens grow with them; its ``vae`` encodes images, and decodes
            what is latents already.

    Raises:
        UserError: Two variants have one label, or a name or a scale is not valid.
    """
    shown = [repr(cfg) for cfg in like.cfgs]
    if not shown or not all(map(math.isfinite, like.cfgs)):
        raise UserError(f"--cfg takes finite guidance scales, such as 1.0,4.0; got {shown}")
    if len(set(shown)) < len(shown):
        raise UserError(f"--cfg names a guidance scale twice: {', '.join(shown)}")
    labels = [variant.label for variant in variants]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise UserError(f"{', '.join(sorted(twice))} is given twice; name every variant once")
    if wrong := [protocol for protocol in protocols if protocol not in PROTOCOLS]:
        choices = f"{nearest(wrong[0], PROTOCOLS)} Choose of {', '.join(PROTOCOLS)}"
        raise UserError(f"unknown protocol {wrong[0]!r}{choices}")
    facts = {
        setting: data_facts(*parse_data(setting[0]), setting[1], vae_of(setting[0], like.vae))
        for setting in settings
    }
    small_first = sorted(settings, key=lambda setting: facts[setting].image_resolution)
    steps, found = like.settings.steps, []
    for seed, (text, resolution), protocol, variant in itertools.product(
        range(seeds), small_first, dict.fromkeys(protocols), variants
    ):
        data, level = parse_data(text)
        is_latent = facts[text, resolution].latent is not None
        own = dataclasses.replace(
            like.settings,
            attn=variant.attn,
            attn_options=dict(variant.options),
            protocol=protocol,
            data=data,
            level=level,
            resolution=resolution,
            patch_size=like.settings.patch_size or (2 if is_latent else 4),
            vae=vae_of(text, like.vae),
            seed=seed,
            hold_out=like.settings.hold_out if needs_hold_out(data) else 0.0,
            checkpoint_every=max(1, min(500, steps)),
            sample_every=steps,
        )
        if not can_hold_out(own):
            own = dataclasses.replace(own, held_out_every=None)
        vae = None if own.vae else like.vae
        found.append(dataclasses.replace(like, label=variant.label, settings=own, vae=vae))
    return found


def needs_hold_out(data: str) -> bool:
    """Whether data has no split of its own for what a run must not see."""
    return "test" not in entry_of(kind_of(data)).splits


def vae_of(data: str, vae: str | None) -> str | None:
    """The VAE that encodes data while training; none where it is latents already."""
    return None if is_latent_folder(canonical(data)) else vae


def check_plan(planned: Sequence[PlannedRun], warn: Callable[[str], None]) -> None:
    """Refuses, before anything runs, what could not end well.

    Args:
        planned: The runs.
        warn: Gets a line for what ends well and says less than it could.

    Raises:
        UserError: A model cannot be built for its data, there are fewer images to measure than
            classes, too few are held out, or an extractor's weights are missing.
    """
    check_extractors(planned[0].extractors, planned[0].extractor_weights)
    for one in distinct_data(planned):
        facts = facts_of(one.settings)
        real_of(one)
        _check_held_out(one, warn)
        if facts.latent is not None and one.settings.vae is None:
            open_vae(facts.latent, one.vae)
    # A seed changes nothing here.
    distinct = {(p.label, p.settings.protocol, *_data(p)): p for p in reversed(planned)}
    for one in distinct.values():
        settings, facts = one.settings, facts_of(one.settings)
        if one.samples < facts.num_classes:
            raise UserError(
                f"--samples {one.samples} are fewer than the {facts.num_classes} classes of "
                f"{settings.data}, and no class may be missing: give at least as many"
            )
        try:
            with torch.device("meta"):
                build_model(settings, facts)  # pyright: ignore[reportArgumentType]
        except (UsageError, UserError) as error:
            where = f"{one.label} on {settings.data} at {facts.image_resolution} px"
            raise UserError(f"{where}: {error}") from error
        except Exception:  # a bug of the mechanism: its own run shows it, and stops no other
            continue


def _check_held_out(one: PlannedRun, warn: Callable[[str], None]) -> None:
    settings = one.settings
    if not can_hold_out(settings):
        warn(
            f"{settings.data}: no held-out loss, for its runs see every image; --hold-out 0.1 "
            f"leaves a tenth out"
        )
        return
    if settings.held_out_every is None and not settings.hold_out:
        return
    encoder = None if is_latent_folder(settings.data) or not settings.vae else settings.vae
    held_out = open_held_out(settings, load_vae(encoder) if encoder else None)
    check_enough(held_out)
    if line := missing_line(held_out):
        warn(f"{settings.data}: {line}")


def check_extractors(names: Sequence[str], weights: str | None) -> None:
    """Raises UserError where an extractor is unknown, or its weights are missing or altered."""
    heavy = [name for name in names if name != SMALLCNN[0]]
    if wrong := [name for name in heavy if name not in WEIGHTED]:
        choices = ", ".join([*SMALLCNN, *WEIGHTED])
        raise UserError(f"extractor {wrong[0]!r} is unknown; --extractor takes some of {choices}")
    if len(set(names)) < len(names) or not names:
        raise UserError(f"--extractor takes each extractor once, got {','.join(names)!r}")
    if weights is not None and len(heavy) != 1:
        raise UserError(
            f"--extractor-weights is the file of one extractor: name one of {', '.join(WEIGHTED)}"
        )
    for name in heavy:
        load_extractor(name, None if weights is None else Path(weights))


def distinct_data(planned: Sequence[PlannedRun]) -> list[PlannedRun]:
    """The first run of each data and resolution."""
    return list({_data(one): one for one in reversed(planned)}.values())[::-1]


def _data(one: PlannedRun) -> tuple[Any, ...]:
    return one.settings.data, one.settings.level, one.settings.resolution


def real_of(one: PlannedRun) -> RealImages:
    """The real images that this run will be measured with.

    Raises:
        UserError: There are none.
    """
    facts = facts_of(one.settings)
    data = {**facts._asdict(), "class_names": list(facts.class_names)}
    config = {"settings": canonical_settings(dataclasses.asdict(one.settings)), "data": data}
    found, reason = real_images(Run(one.settings.data), config, one.real)
    if found is None:
        raise UserError(f"{reason}: pass --real FOLDER with real images by class")
    return found
