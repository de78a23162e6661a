"""The closed forms, checked against the measurement: ``count_macs``."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from torch import nn

from attnzoo.contract import Attention, check_option, stated_parts
from attnzoo.counting.measure import measure
from attnzoo.counting.paper import as_in_the_paper
from attnzoo.counting.result import ATTENTION_PARTS, Grid, Macs, Parts, sums
from attnzoo.counting.subject import grid_of, layers_of, names_of, repeated_blocks, shadow_of
from attnzoo.errors import InvalidValue

Convention = Literal["full", "paper"]


def count_macs(
    model: nn.Module,
    *unnamed: Any,
    resolution: int | tuple[int, int] | None = None,
    grid: Grid | None = None,
    convention: Convention = "full",
) -> Macs:
    """Counts one sample's multiply-accumulates without running the model.

    Args:
        model: An ``Attention`` layer, or a model with ``macs_parts`` and ``token_grid`` (the
            shared backbone); on any device, the meta device too. It is not changed.
        *unnamed: Nothing: a size must say whether it is in pixels or in tokens.
        resolution: Of a model, in image pixels, one side or (height, width).
        grid: (height, width) in tokens, instead of ``resolution``; the only way for a layer.
        convention: "full" counts every multiply-accumulate; "paper" counts what the tool of
            arXiv 2601.13683 saw, see ``PAPER_RULES`` and docs/gflops.md.

    Returns:
        The closed form, checked against the measurement.

    Raises:
        InvalidType: ``model`` is nothing that can be counted, a size comes without its name, or
            a layer was given a resolution.
        InvalidValue: The closed form is wrong; an argument does not fit; or the paper prints no
            figure for the mechanism and ``convention`` is "paper".
    """
    check_option("convention", convention, Convention)
    grid = grid_of(model, resolution, grid, *unnamed)
    shadow = shadow_of(model, "meta")
    layers = layers_of(shadow)
    formless = {block: layer for block, layer in layers.items() if not _has_form(layer)}
    # What no closed form vouches for is measured block by block, however alike the blocks look.
    seen = measure(model, grid, same={} if formless else repeated_blocks(shadow, layers))
    blocks = _closed_form(shadow, grid)
    of_backbone = {*getattr(shadow, "PARTS", {}).values()}
    for block, parts in blocks.items():
        measured = seen.blocks.get(block, {})
        if block in formless:
            parts |= {part: measured[part] for part in ATTENTION_PARTS if part in measured}
        _refuse_difference(block, layers.get(block), parts, measured, grid, of_backbone)
    if missing := [name for name in seen.blocks if name not in blocks]:
        raise InvalidValue(
            f"the closed form of {type(model).__name__} leaves out {missing[0]!r}, measured as "
            f"{seen.blocks[missing[0]]} at grid={grid[0]}x{grid[1]}; add it to macs_parts"
        )
    backward = seen.backward
    if convention == "paper":
        blocks, backward = as_in_the_paper(shadow, blocks, grid), None
    return dataclasses.replace(
        seen,
        **sums(blocks),
        backward=backward,
        convention=convention,
        measured=names_of(formless.values()),
    )


def _has_form(layer: Attention) -> bool:
    return type(layer).macs_parts is not Attention.macs_parts


def _closed_form(model: Any, grid: Grid) -> Parts:
    """Parts by block; an attention layer without closed form gives none."""

    def parts_of(layer: Attention, grid: Grid) -> dict[str, int]:
        return stated_parts(layer, grid) if _has_form(layer) else {}

    if isinstance(model, Attention):
        return {"attention": parts_of(model, grid)}
    return model.macs_parts(grid, parts_of)


def _refuse_difference(
    block: str,
    layer: Attention | None,
    stated: dict[str, int],
    seen: dict[str, int],
    grid: Grid,
    of_backbone: set[str],
) -> None:
    for part in sorted({*stated, *seen}):
        if stated.get(part, 0) == seen.get(part, 0):
            continue
        owner = "the backbone"
        if layer is not None and part not in of_backbone:
            owner = f"{layer.name or type(layer).__name__!r}"
        raise InvalidValue(
            f"the closed form of {owner} is wrong in {block}: its part {part!r} states "
            f"{stated.get(part, 0)} multiply-accumulates at grid={grid[0]}x{grid[1]}, measured "
            f"are {seen.get(part, 0)} (all parts together: {sum(stated.values())} stated, "
            f"{sum(seen.values())} measured). Correct macs_parts; it must count "
            f"convolutions as conv, products with a parameter as projections (as routing if the "
            f"parameter's name has 'router' in it), other products as core"
        )
