"""The paper's ablation steps and tables at a small scale, its claims, and its numbers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from attnzoo.mechanisms.dydila import ABLATION_STEPS
from backbones.pattern import parse_pattern
from backbones.presets import PAPER_MODELS
from recipes.lab.console import UserError
from recipes.studies.comparison.plan import Variant, parse_variants

PAPER_RESULTS = Path(__file__).absolute().parents[3] / "docs" / "paper_results.csv"

_NO_CONV = {"conv": "none"}
ABLATION_STEPS = [
    Variant("sana", "sana", {}, (4, "Sana-S")),
    *(
        Variant(label, "dydila", options, (4, label))
        for label, options in ABLATION_STEPS.items()
        if label not in ("sana", "+reparameterization")
    ),
    Variant("dydila", "dydila", {}, (4, "+reparameterization")),
]
_MAP_WISE = Variant("map-wise, no convolution", "dydila-map", _NO_CONV, (5, "DyDi-LiT map-wise"))
_INCREASING = Variant(
    "increasing factors",
    "dydila",
    _NO_CONV | {"lambda_init": "increasing"},
    (6, "DyDi-LiT increasing lambda init 0.2-0.8"),
)


def _token_wise(paper: tuple[int, str]) -> Variant:
    return Variant("+token differential operator", "dydila", _NO_CONV, paper)


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
    "table4": Preset(ABLATION_STEPS),
    "table5": Preset([_token_wise((5, "DyDi-LiT token-wise")), _MAP_WISE]),
    "table6": Preset([_token_wise((6, "DyDi-LiT lambda init 0.01")), _INCREASING]),
    "results": Preset(
        [
            *(Variant(name, name) for name in ("softmax", "focused", "gated", "compressed")),
            Variant("dydila-map", "dydila-map"),
            *ABLATION_STEPS,
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


def chosen_variants(
    attn: str | None, preset: str | None, protocol: str | None
) -> tuple[Sequence[Variant], Sequence[str]]:
    """The variants and protocols of ``--attn`` or ``--preset``, and of ``--protocol``.

    Raises:
        UserError: Both or neither are given, or ``--attn`` cannot be read.
        UsageError: A mechanism is unknown.
    """
    if (attn is None) == (preset is None):
        raise UserError("say what to compare: either --attn softmax,dydila or --preset table4")
    protocols = protocol.split(",") if protocol else None
    if preset:
        return PRESETS[preset].variants, protocols or PRESETS[preset].protocols
    variants = parse_variants(attn or "")
    for variant in variants:
        if variant.attn not in PAPER_MODELS:
            parse_pattern(variant.attn).check()
    return variants, protocols or ["controlled"]


@dataclasses.dataclass(frozen=True)
class Claim:
    """An ordering that the paper states, or one that its tables leave open.

    Attributes:
        better: Label of the variant that comes first, or of either where they are equal.
        worse: Label of the other.
        source: Where it stands.
        equal: Whether the claim is that there is no difference.
    """

    better: str
    worse: str
    source: str
    equal: bool = False

    @property
    def title(self) -> str:
        """The claim in words."""
        relation = "about equal to" if self.equal else "before"
        return f"{self.better} {relation} {self.worse} ({self.source})"


CLAIMS = (
    *itertools.starmap(Claim, pd.read_csv(Path(__file__).with_name("claims.csv")).values.tolist()),
    *(
        Claim(after.label, before.label, "Table 4")
        for before, after in itertools.pairwise(ABLATION_STEPS)
    ),
)


def paper_rows(variants: Sequence[Variant]) -> pd.DataFrame:
    """The paper's numbers of these variants, at size S and guidance 4.0; may be empty."""
    stored = pd.read_csv(PAPER_RESULTS)
    stored = stored.loc[(stored["size"] == "S") & (stored["cfg"] == 4.0)]
    by_paper = {(row["table"], row["model"]): row for row in stored.to_dict("records")[::-1]}
    rows = [
        {"variant": variant.label, **by_paper[variant.paper]}
        for variant in variants
        if variant.paper in by_paper
    ]
    wanted = ["variant", "table", "dataset", "resolution", "fid", "sfid", "kid", "skid", "is"]
    return pd.DataFrame(rows, columns=[*wanted, "precision", "recall"])
