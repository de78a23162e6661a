"""All metrics of one set of images under their reported names, and what they are compared with."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from recipes import metrics
from recipes.console import UserError
from recipes.data import ImageDataset
from recipes.diffusion import to_uint8
from recipes.features import Extractor, Features
from recipes.metrics import Moments
from recipes.shards import load_npz

LOWER_IS_BETTER = frozenset({"FID", "sFID", "KID", "sKID"})
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
FEWEST = 10  # images; the metrics of neighbours need more than 5
_BLOCK = 1000


@dataclasses.dataclass(frozen=True)
class Reference:
    """Real images to compare with, or statistics of them.

    Attributes:
        pixels: (m, h, w, c) uint8, or None where only statistics are known.
        labels: (m,) int64 or None.
        pool: Stored moments of pool features (an ADM reference batch), or None.
        spatial: The same of spatial features.
        source: Where they come from.
        digest: SHA-256 of images or file.
    """

    pixels: Tensor | None
    labels: Tensor | None
    pool: Moments | None
    spatial: Moments | None
    source: str
    digest: str

    @classmethod
    def of_dataset(cls, dataset: ImageDataset, source: str) -> Reference:
        """All images of a finite data set."""
        images, labels = dataset.batch(torch.arange(len(dataset)))
        pixels = to_uint8(images)
        digest = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
        return cls(pixels, labels, None, None, source, digest)

    @classmethod
    def of_file(cls, file: Path) -> Reference:
        """An ADM-style file with images, statistics or both.

        Raises:
            UserError: It holds neither.
        """
        pixels, labels = load_npz(file)
        pool = spatial = None
        try:
            pool, spatial = Moments.load_adm(file), Moments.load_adm(file, spatial=True)
        except KeyError:
            if pixels is None:
                raise UserError(
                    f"{file} holds neither images (arr_0) nor statistics (mu, sigma, mu_s, "
                    f"sigma_s)"
                ) from None
        return cls(
            pixels, labels, pool, spatial, str(file), hashlib.sha256(file.read_bytes()).hexdigest()
        )


def label_of(metric: str, extractor: str) -> str:
    """The reported name of a metric: bare for Inception, else with the extractor's name."""
    return metric if extractor == "inception" else f"{metric}[{extractor}]"


def metric_of(label: str) -> str:
    """ "FID[smallcnn]" -> "FID"."""
    return label.partition("[")[0]


def score(
    features: Features,
    labels: Tensor | None,
    reference: Features | None,
    extractor: Extractor,
    moments: tuple[Moments, Moments] | None = None,
) -> dict[str, float]:
    """Every metric of one set of images.

    Args:
        features: Of the generated images, in the order of their indices.
        labels: (n,) the classes that were asked for, or None.
        reference: Features of the real images, or None where only their moments are known.
        extractor: What made the features.
        moments: Moments of the reference's pool and spatial features, if they are not to be
            computed from ``reference``.

    Returns:
        Numbers by reported name. "KID" is the mean over subsets, "KID_std" their spread, which is
        no error bar, and "KID_full" uses all samples at once.
    """
    if moments is None:
        if reference is None:
            raise ValueError("give the reference's features or its moments")
        moments = (_moments(reference.pool), _moments(reference.spatial))
    found = {
        "FID": metrics.frechet(_moments(features.pool), moments[0]),
        "sFID": metrics.frechet(_moments(features.spatial), moments[1]),
    }
    if reference is not None:
        for name, of in (("KID", "pool"), ("sKID", "spatial")):
            distance = metrics.kid(
                getattr(features, of),
                getattr(reference, of),
                subsets=KID_SUBSETS,
                subset_size=KID_SUBSET_SIZE,
            )
            found |= {
                name: distance.mean,
                f"{name}_std": distance.std,
                f"{name}_full": distance.full,
            }
        pools = features.pool, reference.pool
        found["precision"], found["recall"] = metrics.precision_recall(*pools)
        found["density"], found["coverage"] = metrics.density_coverage(*pools)
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
