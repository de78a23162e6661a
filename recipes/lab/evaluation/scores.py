"""All metrics of one set of images under their reported names."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from recipes.lab.evaluation import metrics
from recipes.lab.evaluation.features import Extractor, Features
from recipes.lab.evaluation.metrics import Moments, NotMeasured
from recipes.lab.evaluation.reference import KID_SUBSET_SIZE, KID_SUBSETS, NEIGHBOURS, Seen

LOWER_IS_BETTER = frozenset({"FID", "sFID", "KID", "sKID"})
FEWEST = 10  # images; the metrics of neighbours need more than 5
_BLOCK = 1000


def label_of(metric: str, extractor: str) -> str:
    """The reported name of a metric: bare for Inception, else with the extractor's name."""
    return metric if extractor == "inception" else f"{metric}[{extractor}]"


def metric_of(label: str) -> str:
    """ "FID[smallcnn]" -> "FID"."""
    return label.partition("[")[0]


def score(
    features: Features,
    labels: Tensor | None,
    reference: Seen | None,
    extractor: Extractor,
    moments: tuple[Moments, Moments] | None = None,
) -> tuple[dict[str, float], dict[str, str]]:
    """Every metric of one set of images.

    Args:
        features: Of the generated images, in the order of their indices.
        labels: (n,) the classes that were asked for, or None.
        reference: The real images as the extractor sees them, or None where only their moments
            are known.
        extractor: What made the features.
        moments: Moments of the reference's pool and spatial features, if they are not to be
            computed from ``reference``.

    Returns:
        Numbers by reported name, and by name the reason why one is not measured: too few images
        on a side, features that are not finite. "KID" is the mean over subsets, "KID_std" their
        spread, which is no error bar, and "KID_full" uses all samples at once.
    """
    if moments is None and reference is None:
        raise ValueError("give the reference's images or its moments")
    found: dict[str, float] = {}
    reasons: dict[str, str] = {}

    def measure(names: Sequence[str], metric: Callable[[], Sequence[float]]) -> None:
        try:
            values = metric()
        except NotMeasured as error:
            reasons.update(dict.fromkeys(names, str(error)))
            return
        for name, value in zip(names, values, strict=True):
            if math.isfinite(value):
                found[name] = value
            else:
                reasons[name] = f"it comes out as {value}"

    def frechet(kind: str, index: int) -> list[float]:
        of = moments[index] if moments else _moments(getattr(reference.features, kind))
        return [metrics.frechet(_moments(getattr(features, kind)), of)]

    def kid(kind: str) -> list[float]:
        x, y = getattr(features, kind), getattr(reference.features, kind)
        options = {"subsets": KID_SUBSETS, "subset_size": KID_SUBSET_SIZE}
        within = reference.kernels(kind, len(x))
        distance = metrics.kid(x, y, **options, within_reference=within)
        return [distance.mean, distance.std, distance.full]

    def neighbors(metric: str, function: Callable[..., tuple[float, float]]) -> Sequence[float]:
        pools = features.pool, reference.features.pool
        return function(*pools, NEIGHBOURS[metric], reference.radii(metric))

    measure(["FID"], lambda: frechet("pool", 0))
    measure(["sFID"], lambda: frechet("spatial", 1))
    if reference is not None:
        for name, of in (("KID", "pool"), ("sKID", "spatial")):
            measure([name, f"{name}_std", f"{name}_full"], functools.partial(kid, of))
        measure(["precision", "recall"], lambda: neighbors("precision", metrics.precision_recall))
        measure(["density", "coverage"], lambda: neighbors("coverage", metrics.density_coverage))
    measure(["IS", "IS_std"], lambda: metrics.inception_score(features.logits))
    if labels is not None and extractor.knows_classes:
        measure(["class_accuracy"], lambda: [metrics.class_accuracy(features.logits, labels)])
    return tuple(  # type: ignore[return-value]
        {label_of(name, extractor.name): value for name, value in part.items()}
        for part in (found, reasons)
    )


def warnings_of(
    features: Features, reference_count: int, labels: Tensor | None, class_names: list[str]
) -> list[str]:
    """What a reader of the numbers has to know about their samples."""
    found = []
    count = len(features.pool)
    for kind, dim in (("FID", features.pool.shape[1]), ("sFID", features.spatial.shape[1])):
        if min(count, reference_count) <= dim:
            bias = metrics.frechet_bias(dim, count, reference_count)
            found.append(
                f"{kind}: {min(count, reference_count)} images are no more than the {dim} feature "
                f"dimensions, so the covariance is singular; the bias of two equal unit Gaussians "
                f"would be about {bias:.3g}: take more samples, or read KID"
            )
    if labels is not None:
        missing = sorted(set(range(len(class_names))) - set(np.unique(labels.numpy()).tolist()))
        if missing:
            names = ", ".join(class_names[label] for label in missing[:5])
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            found.append(
                f"{len(missing)} of {len(class_names)} classes are missing from the samples "
                f"({names}{more}); every distance counts that as an error of the model"
            )
    return found


def _moments(features: Tensor) -> Moments:
    return Moments.of_blocks(features.split(_BLOCK))
