"""All metrics of one set of images under their reported names."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from recipes.lab.evaluation import metrics
from recipes.lab.evaluation.features import Extractor, Features
from recipes.lab.evaluation.metrics import Moments
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
) -> dict[str, float]:
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
        Numbers by reported name. "KID" is the mean over subsets, "KID_std" their spread, which is
        no error bar, and "KID_full" uses all samples at once.
    """
    if moments is None:
        if reference is None:
            raise ValueError("give the reference's images or its moments")
        moments = (_moments(reference.features.pool), _moments(reference.features.spatial))
    found = {
        "FID": metrics.frechet(_moments(features.pool), moments[0]),
        "sFID": metrics.frechet(_moments(features.spatial), moments[1]),
    }
    if reference is not None:
        for name, of in (("KID", "pool"), ("sKID", "spatial")):
            distance = metrics.kid(
                getattr(features, of),
                getattr(reference.features, of),
                subsets=KID_SUBSETS,
                subset_size=KID_SUBSET_SIZE,
                within_reference=reference.kernels(of, len(features.pool)),
            )
            found |= {
                name: distance.mean,
                f"{name}_std": distance.std,
                f"{name}_full": distance.full,
            }
        pools = features.pool, reference.features.pool
        found["precision"], found["recall"] = metrics.precision_recall(
            *pools, NEIGHBOURS["precision"], reference.radii("precision")
        )
        found["density"], found["coverage"] = metrics.density_coverage(
            *pools, NEIGHBOURS["coverage"], reference.radii("coverage")
        )
    found["IS"], found["IS_std"] = metrics.inception_score(features.logits)
    if labels is not None and extractor.knows_classes:
        found["class_accuracy"] = metrics.class_accuracy(features.logits, labels)
    return {label_of(name, extractor.name): value for name, value in found.items()}


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
