"""What is measured, as data: one frozen ``Case`` per measurement, one table per profile."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import attnzoo
from attnzoo.contract import nearest
from recipes.lab.console import UserError

Kind = Literal["layer", "backbone", "peers", "count", "quality", "goal"]
PROFILES = ("quick", "full")
DTYPES = ("float32", "bfloat16", "float16")
# Width -> size of the shared backbone.
SIZES = {96: "tiny", 384: "S", 512: "B", 768: "L"}
# Image pixels per token of a latent model: latent factor 8, patch 2.
PIXELS_PER_TOKEN = 16
# The quadratic mechanisms, which a CPU cannot carry to 16,384 tokens in a quick run.
QUADRATIC = ("softmax", "compressed", "differential", "moh")
WITH_PEERS = ("softmax", "sana", "gated")

Options = tuple[tuple[str, Any], ...]
Named = Sequence[tuple[str, Options]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement.

    Attributes:
        kind: What is run: one attention layer, the whole backbone, a layer against its peers,
            a count of multiply-accumulates, a short training, or a goal of ``bench.goals``.
        mechanism: A registered name; the goal's name if ``kind`` is "goal".
        options: The mechanism's options, as sorted (name, value) pairs.
        resolution: Side of the image of a latent model, in pixels.
        width: Width of the tokens.
        dtype: One of ``DTYPES``.
        mode: "forward" under no_grad in eval mode, or "train": forward and backward.
        device: "cpu" or "cuda".
        batch: Images.
        compiled: Whether torch.compile(fullgraph=True) comes first.
        against: Mechanisms timed in turn with this one, round by round.
        rounds: Most rounds; fewer if they take longer than ``seconds``, but at least 3.
        seconds: Time for the rounds; 0 is one round, for cases made for their memory.
    """

    kind: Kind = "layer"
    mechanism: str = "softmax"
    options: Options = ()
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
    def test(self) -> str:
        """The function of ``test_cases.py`` that measures it."""
        if self.kind in ("layer", "backbone"):
            return "test_latency" if self.seconds > 0 else "test_memory"
        return "test_flops" if self.kind == "count" else f"test_{self.kind}"

    @property
    def id(self) -> str:
        """A name that tells the case from every other of its table."""
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
        names = ("kind", "resolution", "width", "dtype", "mode")
        return {"mechanism": self.label} | {name: getattr(self, name) for name in names}


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
    mechanisms: tuple[tuple[str, Options], ...] = ()
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
                near = max(1, round(resolution / PIXELS_PER_TOKEN)) * PIXELS_PER_TOKEN
                raise UserError(
                    f"resolution={resolution} is no multiple of {PIXELS_PER_TOKEN} pixels, the "
                    f"side of a token; the nearest is {near}"
                )
        for dtype in self.dtypes:
            if dtype not in DTYPES:
                raise UserError(f"dtype {dtype!r} is unknown{nearest(dtype, DTYPES)} Choose one "
                                f"of {', '.join(DTYPES)}")  # fmt: skip

    @property
    def named(self) -> Named:
        """The mechanisms: those asked for, or all."""
        return self.mechanisms or [(name, ()) for name in attnzoo.list_attention()]


def table(request: Request) -> list[Case]:
    """Every case of a request; ids are unique."""
    rows = _cuda(request) if request.device == "cuda" else _cpu(request)
    # Equal cases keep the first place; a compiled one may fall together with one asked for.
    return list({case.id: case for case in dict.fromkeys(rows)}.values())


def _cases(
    kind: Kind, names: Named, resolutions: Iterable[int], mode: str = "forward", **common: Any
) -> Iterator[Case]:
    for resolution in resolutions:
        for name, options in names:
            if kind == "peers" and name not in WITH_PEERS:
                continue
            is_softmax = name == "softmax" and not options and not common.get("compiled")
            yield Case(
                kind=kind, mechanism=name, options=options, resolution=resolution, mode=mode,
                against=("softmax",) if kind == "layer" and not is_softmax else (), **common,
            )  # fmt: skip


def _cpu(request: Request) -> Iterator[Case]:
    is_full, names, asked = request.profile == "full", request.named, request.resolutions
    modes = ("forward", "train") if is_full else ("forward",)
    small = (256, 512, 1024)
    for width in request.widths or ((384, 768) if is_full else (384,)):
        for dtype in request.dtypes or (("float32", "bfloat16") if is_full else ("float32",)):
            base = {"width": width, "dtype": dtype}
            yield from _cases("layer", names, asked or small, seconds=1.0, **base)
            yield from _cases("layer", names, asked or (small if is_full else (512,)), "train",
                              seconds=1.0, **base)  # fmt: skip
            for mode, sizes in zip(modes, ((512, 1024), (512,)), strict=False):
                yield from _cases("peers", names, asked or sizes, mode, **base)
            if width in SIZES:
                for mode, sizes in zip(modes, (small if is_full else (256,), (256,)),
                                       strict=False):  # fmt: skip
                    yield from _cases("backbone", names, asked or sizes, mode, seconds=1.0, **base)
            if not asked:
                large = (1536, 2048, 4096) if is_full else (2048,)
                yield from _large(names, large, is_full, **base)
        yield from _counts(request, width)
    yield from _goals_and_quality(request)


def _large(
    names: Named, resolutions: Iterable[int], is_full: bool, **common: Any
) -> Iterator[Case]:
    """Where softmax is too slow to run beside each mechanism: memory, and few rounds of time."""
    for resolution in resolutions:
        for name, options in names:
            is_quadratic = name in QUADRATIC and not (name == "softmax" and not options)
            if is_quadratic and (not is_full or resolution > 2048):
                continue
            yield Case(
                mechanism=name, options=options, resolution=resolution,
                seconds=0.0 if name in QUADRATIC or resolution > 2048 else 0.6, **common,
            )  # fmt: skip


def _cuda(request: Request) -> Iterator[Case]:
    """What matters most comes first, for a run that ends early.

    A case is taken to cost two seconds and a compiled one 15 to 30, so that width 768 is measured
    in full and width 384 where it shows the trend.
    """
    names, asked = request.named, request.resolutions
    few = [n for n in names if request.mechanisms or n[0] in ("softmax", "sana", "dydila")]
    linear = [n for n in few if n[0] != "softmax"]
    # flash-linear-attention tries blocks for a minute and a half before it computes.
    tuned = [n for n in names if n[0] == "gated"]
    quick = [n for n in names if n not in tuned]
    widths = request.widths or ((768, 384) if request.profile == "full" else (768,))
    dtypes, modes = request.dtypes or ("bfloat16",), ("forward", "train")
    for width in widths:
        yield from _counts(request, width)
    yield from _goals_and_quality(request)
    pace: dict[str, Any] = {"seconds": 0.25, "rounds": 25, "device": "cuda"}
    for width in widths:
        is_main = width == widths[0] or bool(request.widths)
        for dtype in dtypes:
            base = pace | {"width": width, "dtype": dtype}
            sizes = (256, 1024, 2048, 4096) if is_main else (1024, 4096)
            yield from _cases("layer", names, asked or sizes, **base)
            sizes = (1024, 2048) if is_main else (1024,)
            yield from _cases("layer", names, asked or sizes, "train", **base)
            yield from _cases("layer", few, asked or (4096,), "train", **base)
            for mode in modes:
                yield from _cases("peers", quick, asked or (1024,), mode, **base)
            if width in SIZES:
                sizes = (256, 1024, 2048) if is_main else (1024, 2048)
                yield from _cases("backbone", few, asked or sizes, **base)
                yield from _cases("backbone", few, asked or sizes[1:], "train", **base)
            if is_main:
                for mode in modes:
                    yield from _cases("layer", linear, asked or (1024,), mode, compiled=True,
                                      **base)  # fmt: skip
            else:
                yield from _cases("layer", few, asked or (256, 2048), **base)
    for width in request.widths or widths[:1]:
        for dtype in dtypes:
            for mode in modes:
                yield from _cases("peers", tuned, asked or (1024,), mode, width=width,
                                  dtype=dtype, **pace)  # fmt: skip


def _counts(request: Request, width: int) -> Iterator[Case]:
    sizes = request.resolutions or (256, 512, 1024, 2048, 4096)
    return _cases("count", request.named, sizes, width=width)


def _goals_and_quality(request: Request) -> Iterator[Case]:
    if request.profile == "full" and not request.mechanisms:
        for goal in request.goals:
            yield Case(kind="goal", mechanism=goal, resolution=1024, device=request.device)
    # A short training is a CPU's: it ranks nothing and would take the time of many cases.
    if request.quality or (request.profile == "full" and request.device == "cpu"):
        for named in request.named:
            yield from _cases("quality", [named], (16, 32), "train", width=96,
                              device=request.device)  # fmt: skip
