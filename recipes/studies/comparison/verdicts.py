"""What a few seeds can say about two variants, and what they cannot."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import pandas as pd
from scipy import stats

from recipes.lab.evaluation.scores import LOWER_IS_BETTER, metric_of

CONFIDENCE = 0.95
NO_DIFFERENCE = "no difference beyond the spread"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A paired comparison: both variants have seen the same data and noise in each seed.

    Attributes:
        gain: Mean over the seeds of how much better the first one is, in the metric's unit.
        margin: Half the width of the 95 % interval of that mean (Student's t); infinite where
            there are fewer than two seeds in common.
        seeds: Number of seeds in common.
    """

    gain: float
    margin: float
    seeds: int

    @property
    def kind(self) -> Literal["better", "worse", "same", "unknown"]:
        """ "same" means only that the spread hides any difference there may be."""
        if self.seeds < 2 or not math.isfinite(self.gain):
            return "unknown"
        # Gains that agree to the last digit are a coincidence of rounded shares, not certainty.
        if self.margin == 0 and self.gain != 0:
            return "unknown"
        if abs(self.gain) <= self.margin:
            return "same"
        return "better" if self.gain > 0 else "worse"

    @property
    def words(self) -> str:
        """The verdict in words."""
        if self.kind == "unknown":
            return f"no spread to judge by ({self.seeds} seeds), so nothing can be said"
        plain = {"better": "better", "worse": "worse", "same": NO_DIFFERENCE}[self.kind]
        return f"{plain} ({self.gain:+.3g} ± {self.margin:.2g}, {self.seeds} seeds)"


def is_lower_better(metric: str) -> bool:
    """Whether smaller numbers of a reported metric are better."""
    return metric_of(metric) in LOWER_IS_BETTER


def compare_variants(cells: pd.DataFrame, first: str, second: str, metric: str) -> Verdict:
    """Compares two variants by their differences within each seed.

    Args:
        cells: Rows of one data set, resolution and guidance scale: variant, seed, metrics.
        first: Label of the variant in question.
        second: Label of the one it is compared with.
        metric: Reported name.

    Returns:
        The verdict, whose gain is positive where the first is better.
    """
    wide = cells.pivot_table(index="seed", columns="variant", values=metric)
    if first not in wide or second not in wide:
        return Verdict(math.nan, math.inf, 0)
    gains = (wide[first] - wide[second]).dropna()
    if is_lower_better(metric):
        gains = -gains
    if len(gains) < 2:
        return Verdict(float(gains.mean()) if len(gains) else math.nan, math.inf, len(gains))
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, len(gains) - 1)
    return Verdict(float(gains.mean()), float(quantile * gains.sem()), len(gains))


def summary_sentence(cells: pd.DataFrame, metric: str) -> str:
    """One sentence on which variant leads in a metric, and over which ones that is certain."""
    means = cells.groupby("variant", sort=False)[metric].mean().dropna()
    if len(means) < 2:
        return f"{metric}: fewer than two variants have a number."
    if means.nunique() == 1:
        return f"{metric}: all variants have {means.iloc[0]:.4g}."
    means = means.sort_values(ascending=is_lower_better(metric))
    best = str(means.index[0])
    by_kind: dict[str, list[str]] = {}
    for other in means.index[1:]:
        kind = compare_variants(cells, best, str(other), metric).kind
        by_kind.setdefault(kind, []).append(str(other))
    parts = [f"{metric}: {best} has the best mean ({means.iloc[0]:.4g})"]
    if beaten := by_kind.get("better"):
        parts.append(f"better than {', '.join(beaten)} beyond the spread over seeds")
    if tied := by_kind.get("same"):
        parts.append(f"{NO_DIFFERENCE} from {', '.join(tied)}")
    if unknown := by_kind.get("unknown"):
        parts.append(f"too few seeds, or no spread between them, to judge {', '.join(unknown)}")
    return "; ".join(parts) + "."
