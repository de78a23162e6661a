"""What a comparison consists of: variants of attention, data, resolutions, seeds; the presets."""

from __future__ import annotations

import csv
import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from attnzoo.contract import nearest
from attnzoo.errors import UsageError
from attnzoo.mechanisms.dydila import ABLATION_STEPS
from backbones.presets import PROTOCOLS
from recipes.lab.console import UserError, parse_options
from recipes.lab.data.datasets import DATASETS
from recipes.lab.data.latents import (
    LatentDataset,
    canonical_settings,
    is_latent_folder,
    load_vae,
    open_vae,
)
from recipes.lab.data.shapes import LEVELS
from recipes.lab.evaluation.real import RealImages, real_images
from recipes.lab.training.build import build_model, load_training_data
from recipes.lab.training.checkpoint import Run
from recipes.studies.comparison.cells import Cell
from recipes.train import Settings

PAPER_RESULTS = Path(__file__).absolute().parents[3] / "docs" / "paper_results.csv"


@dataclasses.dataclass(frozen=True)
class Variant:
    """An attention with options, under the name that tables and pictures give it.

    Attributes:
        label: Its name.
        attn: A registered mechanism, or a model of the paper.
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

    Values are Python's, such as ``(1,2)`` or ``'a:b'``, or else plain words.

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
    return Variant(text.strip(), attn, options)


def _split(text: str, separator: str) -> Iterator[str]:
    """The parts between separators that stand in no bracket and no quotes."""
    closing = {"(": ")", "[": "]", "{": "}"}
    waiting: list[str] = []
    part, quote = "", ""
    characters = iter(text)
    for c in characters:
        if quote:
            if c == "\\":
                c += next(characters, "")
            elif c == quote:
                quote = ""
        elif c in "'\"":
            quote = c
        elif c in closing:
            waiting.append(closing[c])
        elif c in closing.values():
            if not waiting or waiting.pop() != c:
                raise UserError(f"--attn {text!r} closes a bracket that is not open")
        elif c == separator and not waiting:
            yield part
            part = ""
            continue
        part += c
    if quote or waiting:
        raise UserError(f"--attn {text!r} does not close {quote or waiting[-1]}")
    yield part


_NO_CONV = {"conv": "none"}
_RUNGS = [
    Variant("sana", "sana", {}, (4, "Sana-S")),
    *(
        Variant(label, "dydila", options, (4, label))
        for label, options in ABLATION_STEPS.items()
        if label not in ("sana", "+reparameterization")
    ),
    Variant("dydila", "dydila", {}, (4, "+reparameterization")),
]
_TOKEN_WISE = "+token differential operator"
_MAP_WISE = Variant("map-wise, no convolution", "dydila-map", _NO_CONV, (5, "DyDi-LiT map-wise"))
_INCREASING = Variant(
    "increasing factors",
    "dydila",
    _NO_CONV | {"lambda_init": "increasing"},
    (6, "DyDi-LiT increasing lambda init 0.2-0.8"),
)


def _token_wise(paper: tuple[int, str]) -> Variant:
    return Variant(_TOKEN_WISE, "dydila", _NO_CONV, paper)


@dataclasses.dataclass(frozen=True)
class Preset:
    """A table of the paper at a scale that fits the machine.

    Attributes:
        variants: Its rows.
        protocols: Of the backbone.
    """

    variants: Sequence[Variant]
    protocols: Sequence[str] = ("controlled",)


PRESETS = {
    "table1-S": Preset(
        [
            Variant(model, model, {}, (1, model))
            for model in ("DiT", "DiG", "PixArt-Sigma", "EDiT", "Sana", "DyDi-LiT")
        ],
        # The paper's models of one size cost about the same; here only this protocol does.
        protocols=("matched",),
    ),
    "table4": Preset(_RUNGS),
    "table5": Preset([_token_wise((5, "DyDi-LiT token-wise")), _MAP_WISE]),
    "table6": Preset([_token_wise((6, "DyDi-LiT lambda init 0.01")), _INCREASING]),
    "results": Preset(
        [
            *(Variant(name, name) for name in ("softmax", "focused", "gated", "compressed")),
            Variant("dydila-map", "dydila-map"),
            *_RUNGS,
            _MAP_WISE,
            _INCREASING,
        ]
    ),
    # The mechanisms between which the paper's main claims lie, at one depth and at one cost.
    "main": Preset(
        [Variant(name, name) for name in ("softmax", "sana", "focused", "dydila", "dydila-map")],
        protocols=("controlled", "matched"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Claim:
    """An ordering that the paper states, or one that its tables leave open.

    Attributes:
        better: Label of the variant that comes first, or of either where they are equal.
        worse: Label of the other.
        equal: Whether the claim is that there is no difference.
        source: Where it stands.
    """

    better: str
    worse: str
    source: str
    equal: bool = False


CLAIMS = (
    Claim("dydila", "sana", "Table 1"),
    Claim("sana", "softmax", "Table 1"),
    Claim("dydila", "softmax", "Table 1"),
    Claim("dydila", "focused", "ours: both convolve the values"),
    Claim(_TOKEN_WISE, "map-wise, no convolution", "Table 5", equal=True),
    Claim(_TOKEN_WISE, "increasing factors", "Table 6"),
    *(Claim(after.label, before.label, "Table 4") for before, after in itertools.pairwise(_RUNGS)),
)


def paper_rows(variants: Sequence[Variant]) -> pd.DataFrame:
    """The paper's numbers of these variants, at size S and guidance 4.0; may be empty."""
    stored = pd.read_csv(PAPER_RESULTS)
    rows = []
    for variant in variants:
        if variant.paper is None:
            continue
        table, model = variant.paper
        found = stored[
            (stored.table == table)
            & (stored.model == model)
            & (stored["size"] == "S")
            & (stored.cfg == 4.0)
        ]
        if len(found):
            rows.append({"variant": variant.label, **found.iloc[0].to_dict()})
    wanted = ["variant", "table", "dataset", "resolution", "fid", "sfid", "kid", "skid", "is"]
    return pd.DataFrame(rows, columns=[*wanted, "precision", "recall"])


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What is known of data before anything is trained, as ``build_model`` wants it.

    Attributes:
        resolution: Side of what the model sees, in pixels or latent pixels.
        channels: Of what the model sees.
        class_names: In the order of the labels.
        latent_factor: Image pixels per pixel that the model sees.
        latent: What a VAE's latents have to be read with, or None.
        source: What was encoded, of a folder of latents; or None.
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
    is_latent = isinstance(dataset, LatentDataset)
    return DataFacts(
        resolution=dataset.resolution,
        channels=dataset.channels,
        class_names=tuple(dataset.class_names),
        latent_factor=dataset.latent_factor,
        latent=dataset.facts if is_latent else None,
        source=getattr(dataset, "source", None),
    )


def facts_of(settings: Settings) -> DataFacts:
    """What is known of the data of a run."""
    return data_facts(settings.data, settings.level, settings.resolution, settings.vae)


def check_plan(cells: Sequence[Cell]) -> None:
    """Refuses, before anything runs, what could not end well.

    Raises:
        UserError: A model cannot be built for its data, or there are fewer images to measure than
            classes.
    """
    seen = set()
    for cell in distinct_data(cells):
        facts = facts_of(cell.settings)
        real_of(cell)
        if facts.latent is not None and cell.settings.vae is None:
            open_vae(facts.latent, cell.vae)
    for cell in cells:
        settings = cell.settings
        facts = facts_of(settings)
        key = cell.label, settings.data, settings.level, settings.resolution, settings.protocol
        if key in seen:  # a seed makes no difference
            continue
        seen.add(key)
        where = f"{cell.label} on {settings.data} at {facts.image_resolution} px"
        if cell.samples < facts.num_classes:
            raise UserError(
                f"--samples {cell.samples} are fewer than the {facts.num_classes} classes of "
                f"{settings.data}, and no class may be missing: give at least as many"
            )
        try:
            with torch.device("meta"):
                build_model(settings, facts)  # type: ignore[arg-type]
        except (UsageError, UserError) as error:
            raise UserError(f"{where}: {error}") from error
        except Exception:  # a bug of the mechanism: its own run shows it, and stops no other
            continue


def distinct_data(cells: Sequence[Cell]) -> list[Cell]:
    """A cell for each data and resolution."""
    found = {}
    for cell in cells:
        settings = cell.settings
        found.setdefault((settings.data, settings.level, settings.resolution), cell)
    return list(found.values())


def real_of(cell: Cell) -> RealImages:
    """The real images that a run of this cell will be measured with.

    Raises:
        UserError: There are none.
    """
    facts = facts_of(cell.settings)
    data = {
        "resolution": facts.resolution,
        "class_names": list(facts.class_names),
        "latent": facts.latent,
        "source": facts.source,
    }
    config = {"settings": canonical_settings(dataclasses.asdict(cell.settings)), "data": data}
    found, reason = real_images(Run(cell.settings.data), config, cell.real)
    if found is None:
        raise UserError(f"{reason}: pass --real FOLDER with real images by class")
    return found


def plan_cells(
    variants: Sequence[Variant],
    places: Sequence[tuple[str, int | None]],
    *,
    seeds: int,
    protocols: Sequence[str],
    size: str,
    patch_size: int | None,
    steps: int,
    batch_size: int,
    cfgs: Sequence[float],
    samples: int,
    sampling_steps: int,
    imports: Sequence[str] = (),
    vae: str | None = None,
    real: str | None = None,
) -> list[Cell]:
    """Every run of a comparison, seed by seed, so that a stopped one is a smaller comparison.

    Within a seed small images come first: they are done soonest.

    Args:
        variants: What to compare.
        places: (data, resolution); data as ``parse_data`` reads it.
        seeds: Number of seeds, from 0. Runs of one seed see the same images, noise and times.
        protocols: Of the backbone.
        size: Of the backbone.
        patch_size: In pixels, or in latent pixels; one for all resolutions, so that tokens grow
            with them. None takes 4, and 2 for latents.
        steps: Of training.
        batch_size: Of training.
        cfgs: Guidance scales to measure.
        samples: Images per scale.
        sampling_steps: Model evaluations per image.
        imports: Files (absolute) or modules that register mechanisms of the user's own.
        vae: Folder or hub id; it encodes images, and decodes what is latents already.
        real: Folder of real images to measure with; None takes the data's own.

    Raises:
        UserError: Two variants have one label, or a name is not valid.
    """
    labels = [variant.label for variant in variants]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise UserError(f"{', '.join(sorted(twice))} is given twice; name every variant once")
    if wrong := [protocol for protocol in protocols if protocol not in PROTOCOLS]:
        choices = f"{nearest(wrong[0], PROTOCOLS)} Choose of {', '.join(PROTOCOLS)}"
        raise UserError(f"unknown protocol {wrong[0]!r}{choices}")
    cells = []
    facts = {
        place: data_facts(*parse_data(place[0]), place[1], vae_of(place[0], vae))
        for place in places
    }
    small_first = sorted(places, key=lambda place: facts[place].image_resolution)
    for seed, (place, resolution), protocol, variant in itertools.product(
        range(seeds), small_first, dict.fromkeys(protocols), variants
    ):
        data, level = parse_data(place)
        is_latent = facts[place, resolution].latent is not None
        settings = Settings(
            attn=variant.attn,
            attn_options=dict(variant.options),
            size=size,
            protocol=protocol,
            data=data,
            level=level,
            resolution=resolution,
            patch_size=patch_size or (2 if is_latent else 4),
            vae=vae_of(place, vae),
            steps=steps,
            batch_size=batch_size,
            seed=seed,
            checkpoint_every=max(1, min(500, steps)),
            sample_every=steps,
        )
        cells.append(
            Cell(
                label=variant.label,
                settings=settings,
                cfgs=tuple(cfgs),
                samples=samples,
                sampling_steps=sampling_steps,
                imports=tuple(imports),
                vae=None if settings.vae else vae,
                real=real,
            )
        )
    return cells


def vae_of(data: str, vae: str | None) -> str | None:
    """The VAE that encodes data while training; none where it is latents already."""
    return None if is_latent_folder(canonical(data)) else vae
