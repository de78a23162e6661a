"""The metrics that are reported, one entry each, and all of them for one set of images.

A metric is a function under ``register_metric``, here or in a file of its own: what it is called,
what it needs, of how many images, and whether lower is better. Tables, reports and the cache of
what real images are to one another ask the entry; nothing else lists metrics.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence

import numpy as np
from torch import Tensor

from recipes.lab.evaluation import metrics
from recipes.lab.evaluation.features import Extractor, Features
from recipes.lab.evaluation.metrics import Moments, NotMeasured
from recipes.lab.evaluation.reference import Seen

FEWEST = 10  # images of which a run is measured at all
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
NEIGHBORS = {"precision": 3, "coverage": 5}
_BLOCK = 1000


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What a metric sees.

    Attributes:
        features: Of the generated images, in the order of their indices.
        labels: (n,) the classes that were asked for, where the extractor knows them, or None.
        reference: The real images as the extractor sees them, or None.
        moments: Stored moments of the reference's pool and spatial features, or None.
    """

    features: Features
    labels: Tensor | None
    reference: Seen | None
    moments: tuple[Moments, Moments] | None

    def has(self, need: str) -> bool:
        """Whether there is what a metric needs: "images", "statistics" or "labels"."""
        if need == "labels":
            return self.labels is not None
        return self.reference is not None or (need == "statistics" and self.moments is not None)

    def pair(self, kind: str) -> tuple[Tensor, Tensor]:
        """Features of a kind ("pool", "spatial") of the generated and of the real images."""
        assert self.reference is not None
        return getattr(self.features, kind), getattr(self.reference.features, kind)


@dataclasses.dataclass(frozen=True)
class Metric:
    """One entry of the table.

    Attributes:
        names: Of its numbers, as they are reported; the first one is the metric's.
        measure: What gives them.
        lower_is_better: Whether smaller numbers are.
        needs: "images" or "statistics" of real ones, "labels".
        fewest: Least number of images, also of real ones where it needs them.
        prepare: What works out the part that sees only real images and the number of generated
            ones, which is cached; None knows no such part.
    """

    names: tuple[str, ...]
    measure: Callable[[Comparison], Sequence[float]]
    lower_is_better: bool
    needs: frozenset[str]
    fewest: int
    prepare: Callable[[Seen, int], Tensor] | None


METRICS: dict[str, Metric] = {}  # by first name, in the order of the report


def register_metric(
    *names: str,
    lower_is_better: bool = False,
    needs: Collection[str] = (),
    fewest: int = 1,
    prepare: Callable[[Seen, int], Tensor] | None = None,
) -> Callable[[Callable[[Comparison], Sequence[float]]], Callable[[Comparison], Sequence[float]]]:
    """Puts a function into the table; see ``Metric`` for the arguments."""

    def register(
        measure: Callable[[Comparison], Sequence[float]],
    ) -> Callable[[Comparison], Sequence[float]]:
        METRICS[names[0]] = Metric(
            names, measure, lower_is_better, frozenset(needs), fewest, prepare
        )
        return measure

    return register


@register_metric("FID", lower_is_better=True, needs={"statistics"}, fewest=2)
def _fid(seen: Comparison) -> list[float]:
    return _frechet(seen, "pool", 0)


@register_metric("sFID", lower_is_better=True, needs={"statistics"}, fewest=2)
def _spatial_fid(seen: Comparison) -> list[float]:
    return _frechet(seen, "spatial", 1)


def _frechet(seen: Comparison, kind: str, index: int) -> list[float]:
    of = seen.moments[index] if seen.moments else _moments(seen.pair(kind)[1])
    return [metrics.frechet(_moments(getattr(seen.features, kind)), of)]


def _moments(features: Tensor) -> Moments:
    return Moments.of_blocks(features.split(_BLOCK))


def _kernels(kind: str) -> Callable[[Seen, int], Tensor]:
    """The real images' own term of a kernel distance to a number of others."""

    def prepare(reference: Seen, count: int) -> Tensor:
        options = {"subsets": KID_SUBSETS, "subset_size": KID_SUBSET_SIZE}
        real = getattr(reference.features, kind)
        name = f"kernels-{kind}-{count}-{KID_SUBSETS}-{KID_SUBSET_SIZE}"
        return reference.cached(name, lambda: metrics.kernel_within(real, count, **options))

    return prepare


def _kernel_distance(seen: Comparison, kind: str) -> list[float]:
    x, y = seen.pair(kind)
    assert seen.reference is not None
    options = {"subsets": KID_SUBSETS, "subset_size": KID_SUBSET_SIZE}
    within = _kernels(kind)(seen.reference, len(x))
    distance = metrics.kid(x, y, **options, within_reference=within)
    return [distance.mean, distance.std, distance.full]


@register_metric("KID", "KID_std", "KID_full", lower_is_better=True, needs={"images"}, fewest=2,
                 prepare=_kernels("pool"))  # fmt: skip
def _kid(seen: Comparison) -> list[float]:
    """Mean over subsets, their spread, which is no error bar, and all samples at once."""
    return _kernel_distance(seen, "pool")


@register_metric("sKID", "sKID_std", "sKID_full", lower_is_better=True, needs={"images"}, fewest=2,
                 prepare=_kernels("spatial"))  # fmt: skip
def _spatial_kid(seen: Comparison) -> list[float]:
    return _kernel_distance(seen, "spatial")


def _radii(k: int) -> Callable[[Seen, int], Tensor]:
    """Distance (m,) of each real image to its k-th neighbor."""
    return lambda reference, count: reference.cached(
        f"neighbors-{k}", lambda: metrics.radii(reference.features.pool, k)
    )


@register_metric("precision", "recall", needs={"images"}, fewest=NEIGHBORS["precision"] + 1,
                 prepare=_radii(NEIGHBORS["precision"]))  # fmt: skip
def _precision_recall(seen: Comparison) -> Sequence[float]:
    return _of_neighbors(seen, metrics.precision_recall, NEIGHBORS["precision"])


@register_metric("density", "coverage", needs={"images"}, fewest=NEIGHBORS["coverage"] + 1,
                 prepare=_radii(NEIGHBORS["coverage"]))  # fmt: skip
def _density_coverage(seen: Comparison) -> Sequence[float]:
    return _of_neighbors(seen, metrics.density_coverage, NEIGHBORS["coverage"])


def _of_neighbors(
    seen: Comparison, function: Callable[..., tuple[float, float]], k: int
) -> Sequence[float]:
    assert seen.reference is not None
    return function(*seen.pair("pool"), k, _radii(k)(seen.reference, 0))


@register_metric("IS", "IS_std")
def _inception_score(seen: Comparison) -> Sequence[float]:
    return metrics.inception_score(seen.features.logits)


@register_metric("class_accuracy", needs={"labels"})
def _class_accuracy(seen: Comparison) -> list[float]:
    assert seen.labels is not None
    return [metrics.class_accuracy(seen.features.logits, seen.labels)]


def label_of(metric: str, extractor: str) -> str:
    """The reported name of a metric: bare for Inception, else with the extractor's name."""
    return metric if extractor == "inception" else f"{metric}[{extractor}]"


def metric_of(label: str) -> str:
    """ "FID[smallcnn]" -> "FID"."""
    return label.partition("[")[0]


def is_lower_better(label: str) -> bool:
    """Whether smaller numbers of a reported metric are better."""
    name = metric_of(label)
    return any(metric.lower_is_better for metric in METRICS.values() if name in metric.names)


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
        on a side, features that are not finite.
    """
    if moments is None and reference is None:
        raise ValueError("give the reference's images or its moments")
    known = labels if extractor.knows_classes else None
    seen = Comparison(features, known, reference, moments)
    found: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for metric in METRICS.values():
        if not all(map(seen.has, metric.needs)):
            continue
        labeled = [label_of(name, extractor.name) for name in metric.names]
        count = len(features.pool)
        if reference is not None and metric.needs & {"images", "statistics"}:
            count = min(count, len(reference.features.pool))
        try:
            if count < metric.fewest:
                raise NotMeasured(f"it needs more than {metric.fewest - 1} samples, got {count}")
            values = metric.measure(seen)
        except NotMeasured as error:
            reasons.update(dict.fromkeys(labeled, str(error)))
            continue
        for name, value in zip(labeled, values, strict=True):
            if math.isfinite(value):
                found[name] = value
            else:
                reasons[name] = f"it comes out as {value}"
    return found, reasons


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
