"""What generated images are compared with, and what of it is worth keeping between evaluations.

The terms of KID, precision and coverage that see the real images alone take most of an
evaluation's time at thousands of them, and so does the exact classifier at high resolution. They
depend on the images, the evaluator and the number of samples, so they are cached beside the
evaluators.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
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
from recipes.lab.evaluation.features import UNKNOWN, Extractor, Features
from recipes.lab.evaluation.metrics import Moments, NotMeasured
from recipes.lab.evaluation.shape_classifier import Judgement, classify_shapes
from recipes.lab.files import sha256
from recipes.lab.provenance import code_digest

# Mean and covariance of either kind of features, as ADM's reference batches call them.
_STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


@dataclasses.dataclass(frozen=True)
class Reference:
    """Real images to compare with, or statistics of them.

    Attributes:
        pixels: (m, h, w, c) uint8, or None where only statistics are known.
        moments: Stored ones of "pool" and "spatial" features (an ADM reference batch), or none.
        source: Where they come from.
        digest: SHA-256 of images or file.
    """

    pixels: Tensor | None
    moments: Mapping[str, Moments]
    source: str
    digest: str

    @classmethod
    def of_dataset(cls, dataset: ImageDataset, source: str) -> Reference:
        """All images of a finite data set."""
        pixels = to_uint8(dataset.batch(torch.arange(len(dataset)))[0])
        return cls(pixels, {}, source, _pixel_digest(pixels))

    @classmethod
    def of_file(cls, file: Path) -> Reference:
        """An ADM-style file with images, statistics or both.

        Raises:
            UserError: It holds neither, or what is no statistics.
        """
        pixels, _ = load_npz(file)
        names = [name for pair in _STATISTICS.values() for name in pair]
        stored = read_npz(file, names)
        if pixels is None and len(stored) < len(names):
            there = f" all of: there is only {', '.join(stored)}" if stored else ""
            raise UserError(
                f"{file} holds neither images (arr_0) nor statistics ({', '.join(names)}){there}"
            )
        if pixels is not None and not len(pixels):
            raise UserError(f"{file} holds no images: arr_0 is empty")
        moments = {}
        try:
            for kind, pair in _STATISTICS.items() if len(stored) == len(names) else ():
                moments[kind] = Moments.of_statistics(
                    *(_float64(name, stored[name]) for name in pair)
                )
        except NotMeasured as error:
            raise UserError(f"the statistics in {file} cannot be used: {error}") from error
        return cls(pixels, moments, str(file), sha256(file))


def _float64(name: str, array: NDArray[Any]) -> Tensor:
    if array.dtype.kind not in "fiu":
        raise NotMeasured(f"{name} is of type {array.dtype}")
    return torch.from_numpy(array.astype(np.float64))


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
        self.features, self._cache, self._digest = features, cache, digest

    @classmethod
    def of(cls, reference: Reference, extractor: Extractor, cache: Path) -> Seen:
        """What an extractor sees in a reference that has images."""
        assert reference.pixels is not None
        features = extractor(reference.pixels)
        if extractor.digest == UNKNOWN:
            return cls(features)
        facts = {"extractor": extractor.name, "weights": extractor.digest}
        return cls(features, cache, key_digest(images=reference.digest, **facts))

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


def classified_shapes(pixels: Tensor, level: str, cache: Path) -> Judgement:
    """The exact classifier's judgement of real images, cached."""

    def make() -> dict[str, Tensor]:
        found = classify_shapes(pixels.numpy(), level)._asdict()
        return {name: torch.from_numpy(values) for name, values in found.items()}

    code = code_digest("evaluation/shape_classifier", "data/shapes")
    key = key_digest(images=_pixel_digest(pixels), level=level, code=code)
    found = cached(cache / f"classified-{key}.safetensors", make)
    return Judgement(**{name: values.numpy() for name, values in found.items()})


def _pixel_digest(pixels: Tensor) -> str:
    return hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
