"""What the figures of arXiv 2601.13683 contain, as one table.

Inferred from the printed digits; docs/gflops.md gives the evidence, line by line.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from attnzoo.contract import Attention
from attnzoo.counting.result import Grid, Parts
from attnzoo.counting.subject import block_of, layers_of
from attnzoo.errors import InvalidValue
from attnzoo.ops.linear_core import linear_attention_macs


@dataclass(frozen=True)
class PaperRule:
    """One part that the paper's tool saw differently.

    Attributes:
        part: The part whose count it replaces.
        why: What is left out or added.
        macs: (attention layer or module of the backbone, grid) -> what the tool saw.
    """

    part: str
    why: str
    macs: Callable[[Any, Grid], int]


def _product(layer: Attention, grid: Grid, keys: int | None = None) -> int:
    """Q K^T V in the cheaper order, all heads, without a normalizer."""
    n, width = math.prod(grid), layer.dim // layer.num_heads
    return layer.num_heads * linear_attention_macs(n, keys or n, width, width, normalized=False)


def _per_element(layer: Attention, grid: Grid, macs: int) -> int:
    return macs * layer.dim * math.prod(grid)


def _coarse_tokens(layer: Any, grid: Grid) -> int:
    return 0 if layer.compress is None else math.prod(layer.compress.coarse_grid(grid))


_NO_NORMALIZER = PaperRule("core", "the normalizer's product is not counted", _product)
_DYDILA = (
    PaperRule(
        "projections",
        "the routed projections Q', K' are not counted",
        lambda layer, grid: _per_element(
            layer, grid, layer.dim * (2 if layer.config.projection == "replace" else 4)
        ),
    ),
    PaperRule("routing", "no router is counted", lambda layer, grid: 0),
    PaperRule(
        "conv",
        "one 3x3 depthwise convolution (9) and one batch norm (4) per element",
        lambda layer, grid: 0 if layer.conv is None else _per_element(layer, grid, 9 + 4),
    ),
)

# By mechanism, where the paper's figures differ from the full count.
PAPER_RULES: dict[str, tuple[PaperRule, ...]] = {
    "softmax": (),
    "sana": (_NO_NORMALIZER,),
    "dydila": (_NO_NORMALIZER, *_DYDILA),
    "dydila-map": (
        PaperRule(
            "core",
            "two products, without normalizers",
            lambda layer, grid: 2 * _product(layer, grid),
        ),
        *_DYDILA,
    ),
    "edit": (
        PaperRule(
            "core",
            "the normalizer's product is not counted",
            lambda layer, grid: _product(layer, grid, _coarse_tokens(layer, grid)),
        ),
    ),
    "compressed": (
        PaperRule(
            "norm",
            "the affine LayerNorm of compressed keys and values counts 4 per element",
            lambda layer, grid: 2 * 4 * layer.dim * _coarse_tokens(layer, grid),
        ),
    ),
    "dig": (
        PaperRule(
            "core",
            "a state of one head, whatever the heads: k^T v and q S with d / 2 keys, d values",
            lambda layer, grid: _per_element(layer, grid, layer.dim),
        ),
    ),
}

# By class of a backbone's module, the same for every mechanism.
FRAME_RULES: dict[str, PaperRule] = {
    "LayerNorm": PaperRule(
        "norm",
        "LayerNorm counts 2 per element, 4 if it is affine",
        lambda norm, grid: math.prod(
            (4 if norm.elementwise_affine else 2, *norm.normalized_shape, *grid)
        ),
    ),
    "SwiGLU": PaperRule(
        "feed-forward",
        "the last matrix of a SwiGLU is not counted: its kernel bypasses the module",
        lambda feedforward, grid: feedforward.macs(grid) * 2 // 3,
    ),
}


def as_in_the_paper(model: nn.Module, blocks: Parts, grid: Grid) -> Parts:
    """The full count with what the rules replace; one without a figure is an InvalidValue."""
    seen: dict[str, Counter[str]] = {block: Counter() for block in blocks}
    layers = layers_of(model)
    for block, layer in layers.items():
        if layer.name not in PAPER_RULES:
            raise InvalidValue(
                f"the paper prints no figure for {layer.name!r}, so its convention is unknown; "
                f"it has one for {', '.join(PAPER_RULES)}. Use convention='full'"
            )
        for rule in PAPER_RULES[layer.name]:
            seen[block][rule.part] += rule.macs(layer, grid)
    inside = {module for layer in layers.values() for module in layer.modules()}
    for name, module in model.named_modules():
        if module not in inside and (rule := FRAME_RULES.get(type(module).__name__)):
            seen[block_of(model, name)][rule.part] += rule.macs(module, grid)
    return {block: {**parts, **seen[block]} for block, parts in blocks.items()}
