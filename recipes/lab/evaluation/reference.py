"""What generated images are compared with, and what of it is worth keeping between evaluations.

The terms of KID, precision and coverage that see the real images alone take most of an
evaluation's time at thousands of them, and so does the exact classifier at high resolution. They
depend on the images, the evaluator and the number of samples, so they are cached beside the
evaluators.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recipes.lab.console import UserError
from recipes.lab.data.datasets import ImageDataset
from recipes.lab.diffusion import to_uint8
from recipes.lab.evaluation.archives import load_npz, read_npz
from recipes.lab.evaluation.cache import cached, key_digest
from recipes.lab.evaluation.features import Extractor, Features
from recipes.lab.evaluation.metrics import Moments, NotMeasured
from recipes.lab.evaluation.shape_classifier import Verdict, classify_shapes
from recipes.lab.files import sha256
from recipes.lab.provenance import code_digest

_STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")  # as ADM's reference batches call them
UNKNOWN = "unknown"  # digest of an extractor that nobody vouches for


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
        return cls(pixels, labels, None, None, source, _pixel_digest(pixels))

    @classmethod
    def of_file(cls, file: Path) -> Reference:
        """An ADM-style file with images, statistics or both.

        Raises:
            UserError: It holds neither, or what is no statistics.
        """
        pixels, labels = load_npz(file)
        stored = read_npz(file, _STATISTICS)
        pool = spatial = None
        if len(stored) == len(_STATISTICS):
            try:
                pool = _moments(stored["mu"], stored["sigma"])
                spatial = _moments(stored["mu_s"], stored["sigma_s"])
            except NotMeasured as error:
                raise UserError(f"the statistics in {file} cannot be used: {error}") from error
        elif pixels is None:
            there = f" all of: there is only {', '.join(stored)}" if stored else ""
            raise UserError(
                f"{file} holds neither images (arr_0) nor statistics "
                f"({', '.join(_STATISTICS)}){there}"
            )
        if pixels is not None and not len(pixels):
            raise UserError(f"{file} holds no images: arr_0 is empty")
        return cls(pixels, labels, pool, spatial, str(file), sha256(file))


def _moments(mean: NDArray[Any], covariance: NDArray[Any]) -> Moments:
    for name, array in (("mean", mean), ("covariance", covariance)):
        if array.dtype.kind not in "fiu":
            raise NotMeasured(f"the {name} is of type {array.dtype}")
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    return Moments.of_statistics(torch.from_numpy(mean), torch.from_numpy(covariance))


class Seen:
    """Features of the real images, and what these are to one another.

    Args:
        features: Of the real images.
        cache: Folder to keep the costly terms in; None computes them anew.
        digest: Of all that decides the features; None keeps nothing.
    """

    def __init__(
        self, features: Features, cache: Path | None = None, digest: str | None = None
    ) -> None:
        self.features = features
        self._cache = cache if digest else None
        self._digest = digest

    @classmethod
    def of(cls, reference: Reference, extractor: Extractor, cache: Path | None = None) -> Seen:
        """What an extractor sees in a reference that has images."""
        if reference.pixels is None:
            raise ValueError(f"{reference.source} holds statistics, but no images to look at")
        digest = None
        if extractor.digest != UNKNOWN:
            digest = key_digest(
                images=reference.digest, extractor=extractor.name, weights=extractor.digest
            )
        return cls(extractor(reference.pixels), cache, digest)

    def cached(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What ``make`` gives of these images alone, from the cache if it is there.

        Args:
            name: Tells it, and what it was made with, from anything else.
            make: What gives it.
        """
        if self._cache is None:
            return make()
        key = key_digest(seen=self._digest, code=code_digest("evaluation/metrics"), name=name)
        file = self._cache / f"{name}-{key}.safetensors"
        return cached(file, lambda: {"value": make()})["value"]


def classified_shapes(pixels: Tensor, level: str, cache: Path) -> Verdict:
    """The exact classifier's verdict on real images, cached."""
    key = key_digest(
        images=_pixel_digest(pixels),
        level=level,
        code=code_digest("evaluation/shape_classifier", "data/shapes"),
    )
    found = cached(
        cache / f"classified-{key}.safetensors",
        lambda: {
            name: torch.from_numpy(z)
            for name, z in vars(classify_shapes(pixels.numpy(), level)).items()
        },
    )
    return Verdict(**{name: z.numpy() for name, z in found.items()})


def _pixel_digest(pixels: Tensor) -> str:
    return hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
