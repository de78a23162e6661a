"""All numbers of a set of images: by an extractor, the classifier of shapes, or both."""

from __future__ import annotations

import contextlib
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from recipes.lab.console import UserError
from recipes.lab.evaluation.features import Extractor, Features, smallcnn_of
from recipes.lab.evaluation.metrics import NotMeasured
from recipes.lab.evaluation.real import RealImages, fresh_images
from recipes.lab.evaluation.reference import Reference, Seen, classified_shapes
from recipes.lab.evaluation.scores import FEWEST, METRICS, score, warnings_of
from recipes.lab.evaluation.shape_classifier import Verdict, classify_shapes, shape_scores
from recipes.lab.evaluation.shards import Images


class Measure:
    """Measures images against one reference.

    Args:
        extractor: What looks at them, or None.
        reference: What their features are compared with.
        class_names: Of the data.
        cache: Folder for what the real images are to one another.
        shapes: Real shapes and their level, where the exact classifier is to look too.
    """

    def __init__(
        self,
        extractor: Extractor | None,
        reference: Reference,
        class_names: list[str],
        cache: Path,
        shapes: tuple[Tensor, str] | None = None,
    ) -> None:
        self.extractor, self.reference, self.class_names = extractor, reference, class_names
        self.cache, self.shapes = cache, shapes
        self.moments = None
        if reference.pool is not None and reference.spatial is not None:
            self.moments = (reference.pool, reference.spatial)
        self.count = 10**9 if reference.pixels is None else len(reference.pixels)

    # Not before they are asked for: of several processes only the first one measures.
    @cached_property
    def _seen(self) -> Seen | None:
        if self.extractor is None or self.reference.pixels is None:
            return None
        return Seen.of(self.reference, self.extractor, self.cache)

    @cached_property
    def _real_shapes(self) -> Verdict | None:
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
        bad = (~images.finite).nonzero().flatten().tolist()
        warnings = []
        found: dict[str, Any] = {
            "count": len(images.labels) - len(bad),
            "not_finite": len(bad),
            "not_finite_images": bad[:100],
        }
        if bad:
            shown = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
            warnings.append(
                f"{len(bad)} of {len(images.labels)} images are not finite and were left out: "
                f"{shown}"
            )
        if found["count"] < FEWEST and not are_real:
            cause = "take more samples"
            if 2 * len(bad) >= len(images.labels):
                cause = "the model has diverged: train it again with a lower rate"
            raise UserError(
                f"only {found['count']} of {len(images.labels)} images are finite, and fewer than "
                f"{FEWEST} are not measured; {cause}"
            )
        reasons: dict[str, str] = {}
        labels, pixels = images.labels[images.finite], images.pixels[images.finite]
        if self.extractor is not None and features is not None:
            kept = features.select(images.finite)
            numbers, reasons = score(kept, labels, self._seen, self.extractor, self.moments)
            found |= numbers
            warnings += warnings_of(kept, self.count, labels, self.class_names)
        if self.shapes is not None and self._real_shapes is not None:
            level = self.shapes[1]
            verdict = (
                classified_shapes(pixels, level, self.cache)
                if are_real
                else classify_shapes(pixels.numpy(), level)
            )
            scores = shape_scores(verdict, labels.numpy(), self._real_shapes, level)
            # The label of earlier versions, which saved tables hold.
            found |= {f"{name}[judge]": value for name, value in scores.items()}
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
    for metric in METRICS.values():
        for count in {samples, len(fresh)}:
            with contextlib.suppress(NotMeasured):  # the evaluation says so
                if metric.prepare is not None:
                    metric.prepare(seen, count)
    if real.kind == "shapes" and reference.pixels is not None:
        for pixels in (reference.pixels, fresh):
            classified_shapes(pixels, real.level, cache)
