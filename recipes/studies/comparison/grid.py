"""What a comparison consists of: variants of attention, data, resolutions, seeds; the presets."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from attnzoo.contract import nearest
from attnzoo.mechanisms.dydila import ABLATION_STEPS
from backbones.presets import PROTOCOLS
from recipes.lab.console import UserError, parse_options
from recipes.lab.data.datasets import load_dataset
from recipes.lab.data.shapes import LEVELS
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


def parse_variant(text: str) -> Variant:
    """ "dydila" or "dydila:lambda_init=increasing:conv=none" -> a variant of that name.

    Raises:
        UserError: An option has no ``=``.
    """
    attn, *pairs = text.split(":")
    try:
        return Variant(text, attn, parse_options(pairs))
    except UserError as error:
        raise UserError(f"--attn takes NAME:OPTION=VALUE, got {text!r}") from error


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


def parse_data(text: str) -> tuple[str, str]:
    """ "shapes/long-range" -> ("shapes", "long-range"); the level is "easy" if not given."""
    data, slash, level = text.rpartition("/")
    if slash and level in LEVELS and data == "shapes":
        return data, level
    return text, "easy"


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
) -> list[Cell]:
    """Every run of a comparison, seed by seed, so that a stopped one is a smaller comparison.

    Within a seed small images come first: they are done soonest.

    Args:
        variants: What to compare.
        places: (data, resolution); data as ``parse_data`` reads it.
        seeds: Number of seeds, from 0. Runs of one seed see the same images, noise and times.
        protocols: Of the backbone.
        size: Of the backbone.
        patch_size: In pixels; one for all resolutions, so that tokens grow with them.
        steps: Of training.
        batch_size: Of training.
        cfgs: Guidance scales to measure.
        samples: Images per scale.
        sampling_steps: Model evaluations per image.
        imports: Modules that register mechanisms of the user's own.

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
    small_first = sorted(places, key=_pixels)
    for seed, (place, resolution), protocol, variant in itertools.product(
        range(seeds), small_first, dict.fromkeys(protocols), variants
    ):
        data, level = parse_data(place)
        settings = Settings(
            attn=variant.attn,
            attn_options=dict(variant.options),
            size=size,
            protocol=protocol,
            data=data,
            level=level,
            resolution=resolution,
            patch_size=patch_size,
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
            )
        )
    return cells


def _pixels(place: tuple[str, int | None]) -> int:
    text, resolution = place
    data, level = parse_data(text)
    return resolution or load_dataset(data, level=level).resolution
