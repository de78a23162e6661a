"""What a count gives."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

Grid = tuple[int, int]
# Parts by block: {"blocks.0": {"core": 1, ...}, ...}.
Parts = dict[str, dict[str, int]]
# Those that belong to a mechanism; the others belong to the backbone.
ATTENTION_PARTS = ("projections", "core", "routing", "conv")


@dataclasses.dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one sample.

    Attributes:
        total: One forward.
        parts: ``total`` by part: projections, core, routing, conv, feed-forward, modulation,
            embedding, final; under the paper's convention also norm.
        blocks: ``parts`` by block ("blocks.0", ...) and by the modules around the blocks.
        backward: One backward, or None under the paper's convention, which has none. Products
            that fused kernels compute a second time are not in it.
        parameters: All parameters.
        active_parameters: Those that act on one token: all but the projectors it did not choose.
        convention: "full" or "paper".
        grid: (height, width) in tokens.
        measured: Mechanisms that state no closed form, whose numbers were measured.
    """

    total: int
    parts: dict[str, int]
    blocks: Parts
    backward: int | None
    parameters: int
    active_parameters: int
    convention: str
    grid: Grid
    measured: tuple[str, ...] = ()

    @property
    def training_step(self) -> int | None:
        """Forward and backward."""
        return None if self.backward is None else self.total + self.backward


def sums(blocks: Parts) -> dict[str, Any]:
    """The fields of ``Macs`` that follow from ``blocks``."""
    parts: Counter[str] = Counter()
    for of_block in blocks.values():
        parts.update(of_block)
    return {"total": sum(parts.values()), "parts": dict(parts), "blocks": blocks}
