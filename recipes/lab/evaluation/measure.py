"""All numbers of a set of images: by an extractor, the classifier of shapes, or both."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from recipes.lab.console import UserError
from recipes.lab.evaluation.features import Extractor, Features, smallcnn_of
from recipes.lab.evaluation.metrics import NotMeasured
from recipes.lab.evaluation.real import RealImages, fresh_images
from recipes.lab.evaluation.reference import Reference, Seen, classified_shapes
from recipes.lab.evaluation.scores import FEWEST, METRICS, label_of, score, warnings_of
from recipes.lab.evaluation.shape_classifier import Judgement, classify_shapes, shape_scores
from recipes.lab.evaluation.shards import Images


@dataclasses.dataclass
class Measure:
    """Measures images against one reference.

    Attributes:
        extractor: What looks at them, or None.
        reference: What their features are compared with.
        class_names: Of the data.
        cache: Folder for what the real images are to one another.
        shapes: Real shapes and their level, where the exact classifier is to look too.
    """

    extractor: Extractor | None
    reference: Reference
    class_names: list[str]
    cache: Path
    shapes: tuple[Tensor, str] | None = None

    # Not before they are asked for: of several processes only the first one measures.
    @cached_property
    def _seen(self) -> Seen | None:
        if self.extractor is None or self.reference.pixels is None:
            return None
        return Seen.of(self.reference, self.extractor, self.cache)

    @cached_property
    def _real_shapes(self) -> Judgement | None:
        return None if self.shapes is None else classified_shapes(*self.shapes, self.cache)

    def __call__(
        self, images: Images, features: Features | None, are_real: bool = False
    ) -> tuple[dict[str, Any], list[str], dict[str, str]]:
        """Numbers, warnings, and reasons why a number is missing.

        Images that are not finite are counted and left out.

        Args:
            images: What to measure.
            features: Of all of them, or None without an extractor.
            are_real: Whether they are real ones, which evaluations share.

        Raises:
            UserError: Too few of them are finite.
        """
        bad, total = (~images.finite).nonzero().flatten().tolist(), len(images.labels)
        count, warnings = total - len(bad), []
        if bad:
            shown = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
            warnings = [f"{len(bad)} of {total} images are not finite and were left out: {shown}"]
        if count < FEWEST and not are_real:
            cause = "take more samples"
            if 2 * len(bad) >= total:
                cause = (
                    "the model has diverged, or guidance is too strong: train it again with a "
                    "lower rate, or lower --cfg"
                )
            raise UserError(
                f"only {count} of {total} images are finite, and fewer than {FEWEST} are not "
                f"measured; {cause}"
            )
        found = {"count": count, "not_finite": len(bad), "not_finite_images": bad[:100]}
        reasons: dict[str, str] = {}
        labels, pixels = images.labels[images.finite], images.pixels[images.finite]
        if self.extractor is not None and features is not None:
            kept, reference = features.select(images.finite), self.reference
            numbers, reasons = score(kept, labels, self._seen, self.extractor, reference.moments)
            found |= numbers
            known = math.inf if reference.pixels is None else len(reference.pixels)
            warnings += warnings_of(kept, known, labels, self.class_names)
        if self.shapes is not None and self._real_shapes is not None:
            level = self.shapes[1]
            if are_real:
                judgement = classified_shapes(pixels, level, self.cache)
            else:
                judgement = classify_shapes(pixels.numpy(), level)
            scores = shape_scores(judgement, labels.numpy(), self._real_shapes, level)
            found |= {label_of(name, "classifier"): value for name, value in scores.items()}
        return found, warnings, reasons


def prepare_real(real: RealImages, samples: int, cache: Path) -> None:
    """Makes all that evaluations of this data share: classifier and terms of the real images.

    Args:
        real: Which images.
        samples: Images per evaluation.
        cache: Folder of trained classifiers.
    """
    train, test = real.open()
    extractor = smallcnn_of(train, test, real.kind, cache=cache, progress=True)
    reference = Reference.of_dataset(test, "test")
    fresh, _ = fresh_images(train, samples)
    seen = Seen.of(reference, extractor, cache)
    for prepare in (metric.prepare for metric in METRICS.values() if metric.prepare):
        for count in {samples, len(fresh)}:
            with contextlib.suppress(NotMeasured):  # the evaluation says so
                prepare(seen, count)
    if real.kind == "shapes" and reference.pixels is not None:
        for pixels in (reference.pixels, fresh):
            classified_shapes(pixels, real.level, cache)
