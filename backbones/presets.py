"""Sizes, and what every model of the paper is built from: one table."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field
from typing import Any

from attnzoo import get_attention, list_attention
from attnzoo.contract import nearest
from backbones.dit import DiT


@dataclass(frozen=True)
class Size:
    """A width with what goes with it.

    Attributes:
        dim: Width of the tokens.
        depth: Blocks of the softmax model of this size.
        head_dim: Width of a head in the controlled protocol.
        options: Options that the paper scales with the size, by mechanism.
    """

    dim: int
    depth: int
    head_dim: int
    options: dict[str, dict[str, Any]] = field(default_factory=dict)


def _dydila(projectors: int) -> dict[str, dict[str, Any]]:
    scaled = {
        "n_projectors": projectors,
        "n_kernel_factors": 3 * projectors,
        "n_differential_factors": 3 * projectors,
    }
    return {"dydila": scaled, "dydila-map": scaled}


# S, B and L are the paper's (section 4.1); "tiny" is for a CPU.
SIZES = {
    "tiny": Size(dim=96, depth=4, head_dim=32, options=_dydila(3)),
    "S": Size(dim=384, depth=12, head_dim=64, options=_dydila(3)),
    "B": Size(dim=512, depth=12, head_dim=64, options=_dydila(5)),
    "L": Size(dim=768, depth=12, head_dim=64, options=_dydila(7)),
}


@dataclass(frozen=True)
class PaperModel:
    """One model of the paper, at every size.

    Attributes:
        attn: Its mechanism.
        feedforward: Its feed-forward.
        depth: Blocks, one number or one per size; what is not listed takes the size's own.
        num_heads: Heads; None is the mechanism's default.
        options: Options of the mechanism.
        source: Why these numbers.
    """

    attn: str
    feedforward: str
    depth: dict[str, int] = field(default_factory=dict)
    num_heads: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    source: str = ""


def _blocks(small: int, base: int, large: int) -> dict[str, int]:
    return {"S": small, "B": base, "L": large}


PAPER_MODELS = {
    "DiT": PaperModel("softmax", "mlp", source="section 4.1: 12 blocks"),
    "Sana": PaperModel(
        "sana", "mix-ffn", _blocks(9, 9, 9), num_heads=1, source="GFLOPs of Tables 1 and 2"
    ),
    "DyDi-LiT": PaperModel(
        "dydila", "mix-ffn", _blocks(9, 9, 9), num_heads=1, source="section 4.1: 9 blocks"
    ),
    "DyDi-LiT-map": PaperModel(
        "dydila-map", "mix-ffn", _blocks(9, 9, 9), num_heads=1, source="Table 5"
    ),
}

PROTOCOLS = ("paper", "controlled")


def build_backbone(
    attn: str = "dydila",
    size: str = "S",
    protocol: str = "paper",
    resolution: int = 256,
    latent_factor: int = 8,
    **overrides: Any,
) -> DiT:
    """Builds the shared backbone with one mechanism of the zoo.

    Args:
        attn: A registered mechanism ("sana"), or a model of the paper with its size and patch
            ("DyDi-LiT-S/2"), see ``list_presets``.
        size: "tiny", "S", "B" or "L".
        protocol: "paper" gives each mechanism the depth, feed-forward and heads of its model in
            the paper; a mechanism that the paper does not measure gets DiT's. "controlled" gives
            every mechanism the same depth, MLP, heads and positions.
        resolution: In image pixels.
        latent_factor: Image pixels per latent pixel; 1 for a model of pixels.
        **overrides: Any argument of ``DiT``; ``attn_options`` are merged into the preset's.

    Returns:
        A freshly initialised model. Its config records where the numbers came from.

    Raises:
        ValueError: A name is unknown, or the resolution does not fit factor and patch.
        TypeError: An override or option that does not exist.
    """
    row, size, patch = _find_row(attn, size)
    _one_of("size", size, SIZES)
    _one_of("protocol", protocol, PROTOCOLS)
    known = [name for name in inspect.signature(DiT.__init__).parameters if name != "self"]
    for name in overrides:
        if name not in known:
            raise TypeError(
                f"build_backbone has no option {name!r}{nearest(name, known)} Options of the "
                f"mechanism go into attn_options={{...}}"
            )
    patch = overrides.get("patch_size", patch)
    if resolution < 1 or resolution % (latent_factor * patch):
        unit = latent_factor * patch
        raise ValueError(
            f"resolution={resolution} does not divide into patches of {unit} pixels "
            f"(patch {patch} x latent factor {latent_factor}); the nearest that does is "
            f"{max(1, round(resolution / unit)) * unit}"
        )
    scale = SIZES[size]
    is_controlled = protocol == "controlled"
    fields: dict[str, Any] = {
        "attn": row.attn,
        "dim": scale.dim,
        "depth": scale.depth if is_controlled else row.depth.get(size, scale.depth),
        "num_heads": scale.dim // scale.head_dim if is_controlled else row.num_heads,
        "feedforward": "mlp" if is_controlled else row.feedforward,
        "patch_size": patch,
        "in_channels": 4,
        "learn_sigma": True,
        "sample_size": resolution // latent_factor,
        "provenance": {
            "size": size,
            "protocol": protocol,
            "resolution": resolution,
            "latent_factor": latent_factor,
            "source": "the same for every mechanism" if is_controlled else row.source,
            "overridden": sorted(overrides),
        },
    }
    options = scale.options.get(row.attn, {}) | ({} if is_controlled else row.options)
    options |= overrides.pop("attn_options", None) or {}
    return DiT(**(fields | overrides | {"attn_options": options}))


def _find_row(attn: str, size: str) -> tuple[PaperModel, str, int]:
    match = re.fullmatch(r"(?P<model>.+)-(?P<size>[A-Za-z]+)/(?P<patch>\d+)", attn)
    if match:
        _one_of("model", match["model"], PAPER_MODELS)
        return PAPER_MODELS[match["model"]], match["size"], int(match["patch"])
    if attn in PAPER_MODELS:
        return PAPER_MODELS[attn], size, 2
    for row in PAPER_MODELS.values():
        if row.attn == attn:
            return row, size, 2
    if attn not in list_attention():
        get_attention(attn)  # raises, naming the nearest
    return PaperModel(attn, "mlp", source="not a model of the paper: DiT's depth and MLP"), size, 2


def _one_of(kind: str, value: str, choices: Any) -> None:
    if value not in choices:
        raise ValueError(
            f"unknown {kind} {value!r}{nearest(value, choices)} Choose one of {', '.join(choices)}"
        )


def list_presets() -> list[str]:
    """Names of the paper's models that ``build_backbone`` takes, such as "DyDi-LiT-S/2"."""
    return [f"{model}-{size}/2" for model in PAPER_MODELS for size in SIZES if size != "tiny"]
