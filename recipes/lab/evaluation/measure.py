"""All numbers of a set of images: by an extractor, by the exact judge of shapes, or by both."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from recipes.lab.console import UserError
from recipes.lab.evaluation.features import Extractor, Features
from recipes.lab.evaluation.reference import Reference, Seen, judge_real
from recipes.lab.evaluation.scores import FEWEST, score, warnings_of
from recipes.lab.evaluation.shape_judge import Verdict, judge_shapes, shape_scores
from recipes.lab.evaluation.shards import Images


class Measure:
    """Measures images against one reference.

    Args:
        extractor: What looks at them, or None.
        reference: What their features are compared with.
        class_names: Of the data.
        cache: Folder for what the real images are to one another.
        judged: Real shapes and their level, where the exact judge is to look too.
    """

    def __init__(
        self,
        extractor: Extractor | None,
        reference: Reference,
        class_names: list[str],
        cache: Path,
        judged: tuple[Tensor, str] | None = None,
    ) -> None:
        self.extractor, self.reference, self.class_names = extractor, reference, class_names
        self.cache, self.judged = cache, judged
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
        return None if self.judged is None else judge_real(*self.judged, self.cache)

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
        if self.judged is not None and self._real_shapes is not None:
            level = self.judged[1]
            verdict = (
                judge_real(pixels, level, self.cache)
                if are_real
                else judge_shapes(pixels.numpy(), level)
            )
            scores = shape_scores(verdict, labels.numpy(), self._real_shapes, level)
            found |= {f"{name}[judge]": value for name, value in scores.items()}
        return found, warnings, reasons
