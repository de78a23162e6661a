"""What is measured, as data: one frozen ``Cell`` per measurement, one table per profile."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import attnzoo
from attnzoo.contract import nearest
from recipes.lab.console import UserError

Kind = Literal["layer", "backbone", "peers", "count", "quality", "goal"]
KINDS = ("layer", "backbone", "peers", "count", "quality", "goal")
PROFILES = ("quick", "full")
# Width -> size of the shared backbone.
SIZES = {96: "tiny", 384: "S", 512: "B", 768: "L"}
# Image pixels per token of a latent model: latent factor 8, patch 2.
PIXELS_PER_TOKEN = 16
# The quadratic mechanisms, which a CPU cannot carry to 16,384 tokens in a quick run.
QUADRATIC = ("softmax", "compressed", "differential", "moh")
WITH_PEERS = ("softmax", "sana", "gated")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement.

    Attributes:
        kind: What is run: one attention layer, the whole backbone, a layer against its peers,
            a count of multiply-accumulates, a short training, or a goal of ``bench.goals``.
        mechanism: A registered name; the goal's name if ``kind`` is "goal".
        options: The mechanism's options, as sorted (name, value) pairs.
        resolution: Side of the image of a latent model, in pixels.
        width: Width of the tokens.
        dtype: "float32", "bfloat16" or "float16".
        mode: "forward" under no_grad in eval mode, or "train": forward and backward.
        device: "cpu" or "cuda".
        batch: Images.
        compiled: Whether torch.compile(fullgraph=True) comes first.
        against: Mechanisms timed in turn with this one, round by round.
        rounds: Most rounds; fewer if they take longer than ``seconds``, but at least 3.
        seconds: Time for the rounds; 0 is one round, for cells made for their memory.
    """

    kind: Kind = "layer"
    mechanism: str = "softmax"
    options: tuple[tuple[str, Any], ...] = ()
    resolution: int = 256
    width: int = 384
    dtype: str = "float32"
    mode: str = "forward"
    device: str = "cpu"
    batch: int = 1
    compiled: bool = False
    against: tuple[str, ...] = ()
    rounds: int = 7
    seconds: float = 2.0

    @property
    def side(self) -> int:
        """Tokens along one side."""
        return self.resolution // PIXELS_PER_TOKEN

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) in tokens."""
        return self.side, self.side

    @property
    def tokens(self) -> int:
        """Tokens of one image."""
        return self.side**2

    @property
    def id(self) -> str:
        """A name that tells the cell from every other of its table."""
        if self.kind == "goal":
            return self.mechanism
        parts = [self.kind, self.label, f"{self.resolution}px", f"d{self.width}"]
        parts += [self.dtype, self.mode]
        if self.device != "cpu":
            parts.append(self.device)
        if self.batch > 1:
            parts.append(f"b{self.batch}")
        return "-".join(parts)

    @property
    def label(self) -> str:
        """The mechanism with its options."""
        text = self.mechanism
        if self.options:
            text += "[" + ",".join(f"{name}={value}" for name, value in self.options) + "]"
        return text + ("+compile" if self.compiled else "")

    def params(self) -> dict[str, Any]:
        """The fields that users group by, as plain JSON values."""
        return {
            "kind": self.kind,
            "mechanism": self.label,
            "resolution": self.resolution,
            "width": self.width,
            "dtype": self.dtype,
            "mode": self.mode,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What a user asked for; empty tuples take the profile's own.

    Attributes:
        profile: "quick" or "full".
        device: "cpu" or "cuda".
        mechanisms: (name, options) pairs.
        resolutions: In pixels.
        widths: Widths of the tokens.
        dtypes: Names of dtypes.
        goals: Names of the goals, for the full profile.
        quality: Whether there are results of a comparison to read.
    """

    profile: str = "quick"
    device: str = "cpu"
    mechanisms: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = ()
    resolutions: tuple[int, ...] = ()
    widths: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ()
    goals: tuple[str, ...] = ()
    quality: bool = False

    def __post_init__(self) -> None:
        for name, options in self.mechanisms:
            try:
                attnzoo.get_attention(name).Config.from_options(name, dict(options))
            except (ValueError, TypeError) as error:
                raise UserError(" ".join(str(error).split())) from error
        for resolution in self.resolutions:
            if resolution < PIXELS_PER_TOKEN or resolution % PIXELS_PER_TOKEN:
                raise UserError(
                    f"resolution={resolution} is no multiple of {PIXELS_PER_TOKEN} pixels, the "
                    f"side of a token; the nearest is "
                    f"{max(1, round(resolution / PIXELS_PER_TOKEN)) * PIXELS_PER_TOKEN}"
                )
        for dtype in self.dtypes:
            known = ("float32", "bfloat16", "float16")
            if dtype not in known:
                raise UserError(f"dtype {dtype!r} is unknown{nearest(dtype, known)} Choose one "
                                f"of {', '.join(known)}")  # fmt: skip


def table(request: Request) -> list[Cell]:
    """Every cell of a request; ids are unique."""
    rows = _cuda(request) if request.device == "cuda" else _cpu(request)
    cells = list(dict.fromkeys(rows))
    # One compiled twin and the like may fall together with a row that was asked for.
    return list({cell.id: cell for cell in cells}.values())


def _cpu(request: Request) -> Iterator[Cell]:
    is_full = request.profile == "full"
    names = _mechanisms(request)
    widths = request.widths or ((384, 768) if is_full else (384,))
    dtypes = request.dtypes or (("float32", "bfloat16") if is_full else ("float32",))
    for width in widths:
        for dtype in dtypes:
            base = {"width": width, "dtype": dtype}
            yield from _layers(
                names, request.resolutions or (256, 512, 1024), "forward", seconds=1.0, **base
            )
            yield from _layers(
                names, request.resolutions or ((256, 512, 1024) if is_full else (512,)),
                "train", seconds=1.0, **base,
            )  # fmt: skip
            yield from _peers(names, request.resolutions or (512, 1024), "forward", **base)
            if is_full:
                yield from _peers(names, request.resolutions or (512,), "train", **base)
            if width in SIZES:
                sizes = request.resolutions or ((256, 512, 1024) if is_full else (256,))
                yield from _backbones(names, sizes, ("forward",), seconds=1.0, **base)
                if is_full:
                    sizes = request.resolutions or (256,)
                    yield from _backbones(names, sizes, ("train",), seconds=1.0, **base)
            if not request.resolutions:
                large = (1536, 2048, 4096) if is_full else (2048,)
                yield from _large(names, large, is_full, **base)
        yield from _counts(names, request.resolutions, width)
    yield from _goals_and_quality(request, names)


def _cuda(request: Request) -> Iterator[Cell]:
    """What matters most comes first, for a run that ends early.

    A cell is taken to cost two seconds and a compiled one 15 to 30, so that width 768 is measured
    in full and width 384 where it shows the trend.
    """
    names, asked = _mechanisms(request), request.resolutions
    few = [
        pair for pair in names if request.mechanisms or pair[0] in ("softmax", "sana", "dydila")
    ]
    linear = [pair for pair in few if pair[0] != "softmax"]
    # flash-linear-attention tries blocks for a minute and a half before it computes.
    tuned = [pair for pair in names if pair[0] == "gated"]
    quick = [pair for pair in names if pair not in tuned]
    is_full = request.profile == "full"
    widths = request.widths or ((768, 384) if is_full else (768,))
    for width in widths:
        yield from _counts(names, asked, width)
    yield from _goals_and_quality(request, names)
    pace: dict[str, Any] = {"seconds": 0.25, "rounds": 25, "device": "cuda"}
    for width in widths:
        is_main = width == widths[0] or bool(request.widths)
        for dtype in request.dtypes or ("bfloat16",):
            base = pace | {"width": width, "dtype": dtype}
            sizes = (256, 1024, 2048, 4096) if is_main else (1024, 4096)
            yield from _layers(names, asked or sizes, "forward", **base)
            yield from _layers(names, asked or ((1024, 2048) if is_main else (1024,)), "train",
                               **base)  # fmt: skip
            yield from _layers(few, asked or (4096,), "train", **base)
            for mode in ("forward", "train"):
                yield from _peers(quick, asked or (1024,), mode, **base)
            if width in SIZES:
                sizes = (256, 1024, 2048) if is_main else (1024, 2048)
                yield from _backbones(few, asked or sizes, ("forward",), **base)
                yield from _backbones(few, asked or sizes[1:], ("train",), **base)
            if is_main:
                for mode in ("forward", "train"):
                    yield from _layers(linear, asked or (1024,), mode, compiled=True, **base)
            else:
                yield from _layers(few, asked or (256, 2048), "forward", **base)
    for width, dtype, mode in itertools.product(
        request.widths or widths[:1], request.dtypes or ("bfloat16",), ("forward", "train")
    ):
        yield from _peers(tuned, asked or (1024,), mode, width=width, dtype=dtype, **pace)


Named = Sequence[tuple[str, tuple[tuple[str, Any], ...]]]


def _mechanisms(request: Request) -> Named:
    return request.mechanisms or [(name, ()) for name in attnzoo.list_attention()]


def _layers(names: Named, resolutions: Iterable[int], mode: str, **common: Any) -> Iterator[Cell]:
    for resolution in resolutions:
        for name, options in names:
            is_reference = name == "softmax" and not options and not common.get("compiled")
            yield Cell(
                kind="layer", mechanism=name, options=options, resolution=resolution, mode=mode,
                against=() if is_reference else ("softmax",), **common,
            )  # fmt: skip


def _large(names: Named, resolutions: Iterable[int], is_full: bool, **common: Any):
    """Where softmax is too slow to run beside each mechanism: memory, and few rounds of time."""
    for resolution in resolutions:
        for name, options in names:
            is_quadratic = name in QUADRATIC and not (name == "softmax" and not options)
            if is_quadratic and (not is_full or resolution > 2048):
                continue
            yield Cell(
                kind="layer", mechanism=name, options=options, resolution=resolution,
                seconds=0.0 if name in QUADRATIC or resolution > 2048 else 0.6, **common,
            )  # fmt: skip


def _backbones(
    names: Named, resolutions: Iterable[int], modes: Iterable[str], **common: Any
) -> Iterator[Cell]:
    for mode in modes:
        for resolution in resolutions:
            for name, options in names:
                yield Cell(
                    kind="backbone", mechanism=name, options=options, resolution=resolution,
                    mode=mode, **common,
                )  # fmt: skip


def _peers(names: Named, resolutions: Iterable[int], mode: str, **common: Any) -> Iterator[Cell]:
    for resolution in resolutions:
        for name, options in names:
            if name in WITH_PEERS:
                yield Cell(
                    kind="peers", mechanism=name, options=options, resolution=resolution,
                    mode=mode, **common,
                )  # fmt: skip


def _counts(names: Named, resolutions: Iterable[int], width: int) -> Iterator[Cell]:
    for resolution in resolutions or (256, 512, 1024, 2048, 4096):
        for name, options in names:
            yield Cell(
                kind="count", mechanism=name, options=options, resolution=resolution, width=width
            )


def _goals_and_quality(request: Request, names: Named) -> Iterator[Cell]:
    if request.profile == "full" and not request.mechanisms:
        for goal in request.goals:
            yield Cell(kind="goal", mechanism=goal, resolution=1024, device=request.device)
    # A short training is a CPU's: it ranks nothing and would take the time of many cells.
    if request.quality or (request.profile == "full" and request.device == "cpu"):
        for name, options in names:
            for resolution in (16, 32):
                yield Cell(
                    kind="quality", mechanism=name, options=options, resolution=resolution,
                    width=96, mode="train", device=request.device,
                )  # fmt: skip
