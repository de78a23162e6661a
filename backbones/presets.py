"""Sizes, and what every model of the paper is built from: one table."""

from __future__ import annotations

import dataclasses
import inspect
import re
from dataclasses import dataclass, field
from typing import Any

import torch

from attnzoo import InvalidType, InvalidValue, list_attention
from attnzoo.console import aligned
from attnzoo.contract import Attention, check_option, nearest
from attnzoo.counting import count_macs
from backbones.dit import DiT
from backbones.pattern import Pattern, parse_pattern


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


# docs/gflops.md says which of these numbers are the paper's and which follow from its figures.
PAPER_MODELS = {
    "DiT": PaperModel("softmax", "mlp", source="section 4.1: 12 blocks"),
    "DiG": PaperModel(
        "dig", "swiglu", _blocks(15, 14, 15), source="GFLOPs of Tables 1 and 2; DiG's code"
    ),
    "PixArt-Sigma": PaperModel(
        "compressed",
        "mlp",
        options={"ratio": 4, "layers": "second-half"},
        source="GFLOPs of Tables 1 and 2: R = 4 in 6 of 12 blocks; which 6 is not known",
    ),
    "EDiT": PaperModel(
        "edit", "mlp", _blocks(9, 9, 9), num_heads=1, source="GFLOPs of Tables 1 and 2"
    ),
    "Sana": PaperModel(
        "sana", "mix-ffn", _blocks(9, 9, 9), num_heads=1, source="GFLOPs of Tables 1 and 2"
    ),
    "DyDi-LiT": PaperModel(
        "dydila", "mix-ffn", _blocks(9, 9, 9), num_heads=1, source="section 4.1: 9 blocks"
    ),
    "DyDi-LiT-map": PaperModel(
        "dydila-map", "mix-ffn", _blocks(9, 9, 9), num_heads=1, source="Table 5"
    ),
    "MoH-DiT": PaperModel("moh", "mlp", source="Table 3, without GFLOPs: DiT's depth and MLP"),
    "LiT": PaperModel("lit", "mlp", source="Table 3, without GFLOPs: DiT's depth and MLP"),
}

PROTOCOLS = ("paper", "controlled", "matched")


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
        attn: A registered mechanism ("sana"), a pattern of several over the blocks
            ("sana*3+softmax"), or a model of the paper with its size and patch
            ("DyDi-LiT-S/2"), see ``list_presets``; a mechanism comes before a model of its name.
        size: "tiny", "S", "B" or "L"; a name with a size of its own ("DyDi-LiT-S/2") ignores it.
        protocol: "paper" gives each mechanism the depth, feed-forward and heads of its model in
            the paper; a mechanism that the paper does not measure gets DiT's. A pattern gets
            depth and feed-forward of the mechanism with the most blocks, the first of equals,
            and each of its mechanisms has its own heads and options. "controlled" gives
            every mechanism the same depth, MLP, heads and positions. "matched" is "paper" with
            the depth whose true multiply-accumulates come nearest to those of DiT at this size
            and resolution; the residual is in the provenance.
        resolution: In image pixels.
        latent_factor: Image pixels per latent pixel; 1 for a model of pixels.
        **overrides: Any argument of ``DiT``; ``attn_options``, of a pattern by mechanism, are
            merged into the preset's.

    Returns:
        A freshly initialized model. Its config records where the numbers came from.

    Raises:
        InvalidValue: A name is unknown, or the resolution does not fit factor and patch.
        InvalidType: An override or option that does not exist, or a value of a wrong type.
    """
    for name, value, hint in (
        ("attn", attn, str), ("size", size, str), ("protocol", protocol, str),
        ("resolution", resolution, int), ("latent_factor", latent_factor, int),
        ("patch_size", overrides.get("patch_size", 2), int),
    ):  # fmt: skip
        check_option(name, value, hint)
    pattern, row, size, patch = _find_row(attn, size)
    _one_of("size", size, SIZES)
    _one_of("protocol", protocol, PROTOCOLS)
    known = [name for name in inspect.signature(DiT.__init__).parameters if name != "self"]
    for name in overrides:
        if name not in known:
            raise InvalidType(
                f"build_backbone has no option {name!r}{nearest(name, known)} Options of the "
                f"mechanism go into attn_options={{...}}"
            )
    patch = overrides.get("patch_size", patch)
    unit = latent_factor * patch
    if latent_factor < 1 or patch < 1:
        raise InvalidValue(
            f"latent_factor={latent_factor} and patch_size={patch} must be at least 1"
        )
    if resolution < 1 or resolution % unit:
        raise InvalidValue(
            f"resolution={resolution} does not divide into patches of {unit} pixels "
            f"(patch {patch} x latent factor {latent_factor}); choose a multiple, such as "
            f"{max(1, resolution // unit) * unit} or {(max(1, resolution // unit) + 1) * unit}"
        )
    scale = SIZES[size]
    is_controlled = protocol == "controlled"
    fields: dict[str, Any] = {
        "attn": pattern.text,
        "dim": scale.dim,
        "depth": scale.depth if is_controlled else row.depth.get(size, scale.depth),
        "num_heads": scale.dim // scale.head_dim if is_controlled else _heads(pattern, row),
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
    given = overrides.pop("attn_options", None)
    check_option("attn_options", given, dict | None)
    options = {
        name: scale.options.get(name, {}) | ({} if is_controlled else _options(row, name)) | own
        for name, own in pattern.options_of(given).items()
    }
    merged = {name: own for name, own in options.items() if own}
    fields |= overrides
    fields["attn_options"] = merged if pattern.is_mixture else options[row.attn]
    if protocol == "matched" and "depth" not in overrides:
        depth, match = _matched_depth(fields, scale, resolution, pattern.least_depth)
        fields |= {"depth": depth, "provenance": fields["provenance"] | {"match": match}}
    return DiT(**fields)


def _heads(pattern: Pattern, row: PaperModel) -> int | dict[str, int | None] | None:
    if not pattern.is_mixture:
        return row.num_heads
    return {name: _row_of(name).num_heads for name in pattern.names}


def _options(row: PaperModel, name: str) -> dict[str, Any]:
    return row.options if name == row.attn else _row_of(name).options


def _matched_depth(
    fields: dict[str, Any], scale: Size, resolution: int, least: int
) -> tuple[int, dict[str, Any]]:
    """The depth nearest to DiT's multiply-accumulates, and how near it is."""

    latent = resolution // fields["provenance"]["latent_factor"]
    checked: set[str] = set()

    def of_layer(layer: Attention, grid: tuple[int, int]) -> dict[str, int]:
        has_form = type(layer).macs_parts is not Attention.macs_parts
        if has_form and layer.name in checked:
            return layer.macs_parts(grid)
        checked.add(layer.name)
        # One with weights, as a mechanism may look at numbers; the model's own stay as seeded.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            return count_macs(type(layer)(layer.context, layer.config), grid=grid).parts

    def macs(**changed: Any) -> int:
        with torch.device("meta"):
            model = DiT(**(fields | changed))
        grid = model.token_grid(latent, latent)
        return sum(sum(parts.values()) for parts in model.macs_parts(grid, of_layer).values())

    dit = PAPER_MODELS["DiT"]
    target = macs(
        attn=dit.attn, attn_options=dit.options, num_heads=dit.num_heads,
        feedforward=dit.feedforward, feedforward_ratio=4.0, depth=scale.depth,
    )  # fmt: skip
    found: dict[int, int] = {}

    def misses_by(depth: int) -> int:
        if depth not in found:
            found[depth] = macs(depth=depth)
        return abs(found[depth] - target)

    # Blocks cost about the same, so that the first guess is one or two off.
    first = max(least, scale.depth)
    depth = max(least, round(first * target / macs(depth=first)))
    while depth > least and misses_by(depth - 1) < misses_by(depth):
        depth -= 1
    while misses_by(depth + 1) < misses_by(depth):
        depth += 1
    return depth, {
        "resolution": resolution,
        "macs": found[depth],
        "dit_macs": target,
        "residual": found[depth] / target - 1,
    }


def _find_row(attn: str, size: str) -> tuple[Pattern, PaperModel, str, int]:
    match = re.fullmatch(r"(?P<model>.+)-(?P<size>[A-Za-z]+)/(?P<patch>\d+)", attn)
    if match:
        _one_of("model", match["model"], PAPER_MODELS)
        row, size, patch = PAPER_MODELS[match["model"]], match["size"], int(match["patch"])
    elif attn in PAPER_MODELS and attn not in list_attention():
        row, patch = PAPER_MODELS[attn], 2
    else:
        pattern = parse_pattern(attn)
        pattern.check()
        leading = max(pattern.names, key=pattern.share_of)
        row = _row_of(leading)
        if pattern.is_mixture:
            row = dataclasses.replace(row, source=f"depth and feed-forward of {leading}'s model")
        return pattern, row, size, 2
    return parse_pattern(row.attn), row, size, patch


def _row_of(name: str) -> PaperModel:
    """The first model of the paper that has a mechanism."""
    of_none = PaperModel(name, "mlp", source="not a model of the paper: DiT's depth and MLP")
    return next((row for row in PAPER_MODELS.values() if row.attn == name), of_none)


def _one_of(kind: str, value: str, choices: Any) -> None:
    if value not in choices:
        raise InvalidValue(
            f"unknown {kind} {value!r}{nearest(value, choices)} Choose one of {', '.join(choices)}"
        )


def list_presets() -> list[str]:
    """Names of the paper's models that ``build_backbone`` takes, such as "DyDi-LiT-S/2"."""
    return [f"{model}-{size}/2" for model in PAPER_MODELS for size in SIZES if size != "tiny"]


def preset_table(matched: bool = False) -> str:
    """The rows of ``PAPER_MODELS`` as a table to read.

    Args:
        matched: Whether to add the depths of the "matched" protocol at 256 pixels, and how far
            their multiply-accumulates are from DiT's.
    """
    sizes = [size for size in SIZES if size != "tiny"]
    rows = [["model", "attn", "feedforward", "heads", "blocks " + "/".join(sizes), "options"]]
    if matched:
        rows[0].append("matched " + "/".join(sizes))
    rows[0].append("source")
    for model, row in PAPER_MODELS.items():
        shared = row.options.items()
        depths = [str(row.depth.get(size, SIZES[size].depth)) for size in sizes]
        scaled = {
            name: "/".join(str(SIZES[size].options[row.attn][name]) for size in sizes)
            for name in SIZES["S"].options.get(row.attn, {})
        }
        cells = [
            model,
            row.attn,
            row.feedforward,
            "default" if row.num_heads is None else str(row.num_heads),
            "/".join(depths),
            ", ".join(f"{name}={value}" for name, value in (*shared, *scaled.items())) or "-",
        ]
        if matched:
            cells.append("/".join(_matched_cell(model, size) for size in sizes))
        rows.append([*cells, row.source])
    return aligned(rows, left=len(rows[0]))


def _matched_cell(model: str, size: str) -> str:
    with torch.device("meta"):
        config: Any = build_backbone(model, size, "matched").config
    return f"{config.depth} ({100 * config.provenance['match']['residual']:+.1f} %)"
