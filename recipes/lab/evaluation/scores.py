"""The metrics that are reported, one entry each, and all of them for one set of images.

A metric is a function under ``register_metric``, here or in a file of its own: what it is called,
what it needs, of how many images, and whether lower is better. Tables, reports and the cache of
what real images are to one another ask the entry; nothing else lists metrics.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from recipes.lab.evaluation import metrics
from recipes.lab.evaluation.features import Extractor, Features
from recipes.lab.evaluation.metrics import Moments, NotMeasured
from recipes.lab.evaluation.reference import Seen
from recipes.lab.training.held_out import NAMES as HELD_OUT_NAMES

FEWEST = 10  # images of which a run is measured at all
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
NEIGHBORS = {"precision": 3, "coverage": 5}
_KINDS = {"": "pool", "s": "spatial"}  # features of FID and KID, and of sFID and sKID
_BLOCK = 1000


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What a metric sees.

    Attributes:
        features: Of the generated images, in the order of their indices.
        labels: (n,) the classes that were asked for, where the extractor knows them, or None.
        reference: The real images as the extractor sees them, or None.
        moments: Stored moments of the reference, by kind of features; may be empty.
    """

    features: Features
    labels: Tensor | None
    reference: Seen | None
    moments: Mapping[str, Moments]

    def has(self, need: str) -> bool:
        """Whether there is what a metric needs: "images", "statistics", "labels"; no "model"."""
        if need == "labels":
            return self.labels is not None
        if need == "model":
            return False
        return self.reference is not None or (need == "statistics" and bool(self.moments))

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
        needs: "images" or "statistics" of real ones, "labels"; "model" is measured apart.
        fewest: Least number of images, also of real ones where it needs them.
        prepare: What works out the part that sees only real images and the number of generated
            ones, which is cached; None knows no such part.
    """

    names: tuple[str, ...]
    measure: Callable[[Comparison], Sequence[float]]
    lower_is_better: bool = False
    needs: Collection[str] = ()
    fewest: int = 1
    prepare: Callable[[Seen, int], Tensor] | None = None


METRICS: dict[str, Metric] = {}  # by first name, in the order of the report
Function = TypeVar("Function", bound=Callable[..., Sequence[float]])


def register_metric(*names: str, **options: Any) -> Callable[[Function], Function]:
    """Puts a function into the table; see ``Metric`` for names and options."""

    def register(measure: Function) -> Function:
        METRICS[names[0]] = Metric(names, measure, **options)
        return measure

    return register


# What a model scores without drawing an image: see ``recipes.lab.training.held_out``.
register_metric(*HELD_OUT_NAMES, lower_is_better=True, needs={"model"})(lambda seen: ())


def _frechet(kind: str, seen: Comparison) -> list[float]:
    stored = seen.moments.get(kind)
    ours = Moments.of_blocks(getattr(seen.features, kind).split(_BLOCK))
    real = stored or Moments.of_blocks(seen.pair(kind)[1].split(_BLOCK))
    return [metrics.frechet(ours, real)]


for _prefix, _kind in _KINDS.items():
    register_metric(
        f"{_prefix}FID", lower_is_better=True, needs={"statistics"}, fewest=2
    )(partial(_frechet, _kind))  # fmt: skip


def _kernels(kind: str, reference: Seen, count: int) -> Tensor:
    """The real images' own term of a kernel distance to a number of others."""
    options = {"subsets": KID_SUBSETS, "subset_size": KID_SUBSET_SIZE}
    real = getattr(reference.features, kind)
    name = f"kernels-{kind}-{count}-{KID_SUBSETS}-{KID_SUBSET_SIZE}"
    return reference.cached(name, lambda: metrics.kernel_within(real, count, **options))


def _kernel_distance(kind: str, seen: Comparison) -> Sequence[float]:
    """Mean over subsets, their spread, which is no error bar, and all samples at once."""
    x, y = seen.pair(kind)
    assert seen.reference is not None
    options = {"subsets": KID_SUBSETS, "subset_size": KID_SUBSET_SIZE}
    return metrics.kid(x, y, **options, within_reference=_kernels(kind, seen.reference, len(x)))


for _prefix, _kind in _KINDS.items():
    register_metric(
        *(f"{_prefix}{name}" for name in ("KID", "KID_std", "KID_full")),
        lower_is_better=True, needs={"images"}, fewest=2, prepare=partial(_kernels, _kind),
    )(partial(_kernel_distance, _kind))  # fmt: skip


def _radii(k: int, reference: Seen, count: int = 0) -> Tensor:
    """Distance (m,) of each real image to its k-th neighbor."""
    pool = reference.features.pool
    return reference.cached(f"neighbors-{k}", lambda: metrics.radii(pool, k))


@register_metric("precision", "recall", needs={"images"}, fewest=NEIGHBORS["precision"] + 1,
                 prepare=partial(_radii, NEIGHBORS["precision"]))  # fmt: skip
def _precision_recall(seen: Comparison) -> Sequence[float]:
    assert seen.reference is not None
    k = NEIGHBORS["precision"]
    return metrics.precision_recall(*seen.pair("pool"), k, _radii(k, seen.reference))


@register_metric("density", "coverage", needs={"images"}, fewest=NEIGHBORS["coverage"] + 1,
                 prepare=partial(_radii, NEIGHBORS["coverage"]))  # fmt: skip
def _density_coverage(seen: Comparison) -> Sequence[float]:
    assert seen.reference is not None
    k = NEIGHBORS["coverage"]
    return metrics.density_coverage(*seen.pair("pool"), k, _radii(k, seen.reference))


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


def spelled_today(label: str) -> str:
    """A label as it is written now, of a file that an earlier version may have written."""
    return label.replace("[judge]", "[classifier]")


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
    moments: Mapping[str, Moments] | None = None,
) -> tuple[dict[str, float], dict[str, str]]:
    """Every metric of one set of images.

    Args:
        features: Of the generated images, in the order of their indices.
        labels: (n,) the classes that were asked for, or None.
        reference: The real images as the extractor sees them, or None where only their moments
            are known.
        extractor: What made the features.
        moments: Stored ones of the reference, if they are not to be computed from ``reference``.

    Returns:
        Numbers by reported name, and by name the reason why one is not measured: too few images
        on a side, features that are not finite.
    """
    known = labels if extractor.knows_classes else None
    seen = Comparison(features, known, reference, moments or {})
    found: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for metric in METRICS.values():
        if not all(map(seen.has, metric.needs)):
            continue
        labeled = [label_of(name, extractor.name) for name in metric.names]
        count = len(features.pool)
        if reference is not None and {"images", "statistics"}.intersection(metric.needs):
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
    features: Features, reference_count: float, labels: Tensor | None, class_names: list[str]
) -> list[str]:
    """What a reader of the numbers has to know about their samples."""
    found = []
    fewest = min(len(features.pool), reference_count)
    for kind, dim in (("FID", features.pool.shape[1]), ("sFID", features.spatial.shape[1])):
        if fewest <= dim:
            bias = metrics.frechet_bias(dim, len(features.pool), reference_count)
            found.append(
                f"{kind}: {fewest} images are no more than the {dim} feature dimensions, so the "
                f"covariance is singular; the bias of two equal unit Gaussians would be about "
                f"{bias:.3g}: take more samples, or read KID"
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
