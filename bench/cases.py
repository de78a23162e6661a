"""What is measured, as data: one frozen ``Case`` per measurement, one table per profile."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import attnzoo
from attnzoo.contract import nearest
from backbones.pattern import nested, parse_pattern
from bench.checks import SIBLING_SIDE
from bench.peers import PEERS
from recipes.lab.console import UserError

Kind = Literal["layer", "backbone", "peers", "count", "quality", "goal"]
PROFILES = ("quick", "full")
DTYPES = ("float32", "bfloat16", "float16")
# Width -> size of the shared backbone.
SIZES = {96: "tiny", 384: "S", 512: "B", 768: "L"}
# Image pixels per token of a latent model: latent factor 8, patch 2.
PIXELS_PER_TOKEN = 16

Options = tuple[tuple[str, Any], ...]
Named = Sequence[tuple[str, Options]]

# Rows of a plan: kind, mode, a group of mechanisms (see ``_groups``), and resolutions: on a CPU
# of the quick and of the full profile, on a GPU of the main width and of the other.
_Plan = tuple[tuple[Kind, str, str, tuple[int, ...], tuple[int, ...]], ...]
_CPU: _Plan = (
    ("layer", "forward", "all", (256, 512, 1024), (256, 512, 1024)),
    ("layer", "train", "all", (512,), (256, 512, 1024)),
    ("peers", "forward", "all", (512, 1024), (512, 1024)),
    ("peers", "train", "all", (), (512,)),
    ("backbone", "forward", "all", (256,), (256, 512, 1024)),
    ("backbone", "train", "all", (), (256,)),
)
# A case is taken to cost two seconds and a compiled one 15 to 30, so that the main width is
# measured in full and the other where it shows the trend.
_CUDA: _Plan = (
    ("layer", "forward", "all", (256, 1024, 2048, 4096), (1024, 4096)),
    ("layer", "train", "all", (1024, 2048), (1024,)),
    ("layer", "train", "few", (4096,), (4096,)),
    ("peers", "forward", "all", (1024,), (1024,)),
    ("peers", "train", "all", (1024,), (1024,)),
    ("backbone", "forward", "few", (256, 1024, 2048), (1024, 2048)),
    ("backbone", "train", "few", (1024, 2048), (2048,)),
    ("layer", "forward", "compiled", (1024,), ()),
    ("layer", "train", "compiled", (1024,), ()),
    ("layer", "forward", "few", (), (256, 2048)),
)
_COUNTED = (256, 512, 1024, 2048, 4096)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement."""

    # One attention layer, the whole backbone, a layer against its peers, a count of
    # multiply-accumulates, a short training, or a goal of ``bench.goals``.
    kind: Kind = "layer"
    # Of a whole backbone also a pattern over its blocks; the goal's name if ``kind`` is "goal".
    mechanism: str = "softmax"
    options: Options = ()  # of the mechanism, as sorted (name, value) pairs
    resolution: int = 256  # side of the image of a latent model, in pixels
    width: int = 384  # of the tokens
    dtype: str = "float32"
    mode: str = "forward"  # under no_grad in eval mode; or "train": forward and backward
    device: str = "cpu"  # or "cuda"
    compiled: bool = False  # whether torch.compile(fullgraph=True) comes first
    against: tuple[str, ...] = ()  # mechanisms timed in turn with this one, round by round
    rounds: int = 7  # most rounds; fewer if they take longer than ``seconds``, but at least 3
    seconds: float = 2.0  # 0 is one round, for cases made for their memory

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
        size = f"{self.resolution}px-d{self.width}-{self.dtype}-{self.mode}"
        end = "" if self.device == "cpu" else f"-{self.device}"
        return f"{self.kind}-{self.label}-{size}{end}"

    @property
    def label(self) -> str:
        """The mechanism with its options."""
        options = ",".join(f"{name}={value}" for name, value in self.options)
        end = "+compile" if self.compiled else ""
        return self.mechanism + (f"[{options}]" if options else "") + end

    @property
    def check_key(self) -> str:
        """What ``check_layer`` depends on: cases that agree in it need one check between them."""
        kind = "backbone" if self.kind == "backbone" else "layer"  # whose heads, options differ
        what = f"{kind} {self.mechanism}{self.options} d{self.width} {self.dtype} {self.device}"
        return f"{what} {min(self.side, SIBLING_SIDE)}"

    def params(self) -> dict[str, Any]:
        """The fields that users group by, as plain JSON values."""
        names = ("kind", "resolution", "width", "dtype", "mode")
        return {"mechanism": self.label} | {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What a user asked for; empty tuples take the profile's own."""

    profile: str = "quick"
    device: str = "cpu"
    mechanisms: tuple[tuple[str, Options], ...] = ()
    resolutions: tuple[int, ...] = ()
    widths: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ()
    goals: tuple[str, ...] = ()  # for the full profile
    quality: bool = False  # whether there are results of a comparison to read

    def __post_init__(self) -> None:
        for name, options in self.mechanisms:
            try:
                parse_pattern(name).check()
                for part, own in parts_of(name, options):
                    attnzoo.get_attention(part).Config.from_options(part, dict(own))
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

    @property
    def layers(self) -> Named:
        """The same, with the mechanisms of a mixture in its place: a layer is of one only."""
        found = (part for name, options in self.named for part in parts_of(name, options))
        return list(dict.fromkeys(found))


@dataclasses.dataclass(frozen=True)
class Conditions:
    """What all cases of a run share."""

    threads: int = 1  # of torch, on the CPU
    imports: tuple[str, ...] = ()  # files or modules that register a user's own mechanisms
    quality: str | None = None  # results of ``recipes/compare.py``
    min_rounds: int = 0  # of a timed case, whatever time they take
    # What ``machine.measure_peaks`` found, and what earlier cases of the run found equal to their
    # references, by ``Case.check_key``.
    peaks: dict[str, float] = dataclasses.field(default_factory=dict)
    checked: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


def parts_of(mechanism: str, options: Options) -> list[tuple[str, Options]]:
    """The mechanisms of a pattern, each with its options; a single mechanism is its only part.

    Raises:
        attnzoo.UsageError: The pattern cannot be read, or an option is of no part.
    """
    by_name = parse_pattern(mechanism).options_of(nested(dict(options)))
    return [(name, tuple(sorted(own.items()))) for name, own in by_name.items()]


def is_quadratic(mechanism: str) -> bool:
    """Whether a mechanism's class says that it grows with the square of the tokens."""
    return "n²" in attnzoo.get_attention(mechanism).complexity


def table(request: Request) -> list[Case]:
    """Every case of a request; ids are unique."""
    is_gpu, is_full = request.device == "cuda", request.profile == "full"
    usual = (768, 384) if is_gpu else (384, 768)
    widths = request.widths or (usual if is_full else usual[:1])
    main = request.widths or usual[:1]
    halves = ("bfloat16",) if is_gpu else ("float32", "bfloat16")
    timed: list[Case] = []
    for width in widths:
        for dtype in request.dtypes or (halves if is_full else halves[:1]):
            common = {"width": width, "dtype": dtype, "device": request.device}
            is_first = width in main if is_gpu else not is_full
            timed += _planned(request, is_first, common)
            if not is_gpu and not request.resolutions:
                timed += _large(request.layers, is_full, common)
    counts = [
        case
        for width in widths
        for case in _cases("count", request.layers, request.resolutions or _COUNTED, width=width)
    ]
    others = _goals_and_quality(request)
    if is_gpu:  # what matters most comes first, for a run that ends early
        # flash-linear-attention tries blocks for a minute and a half before it computes.
        tuned = [case for case in timed if case.kind == "peers" and case.mechanism == "gated"]
        timed = [case for case in timed if case not in tuned]
        timed += [case for case in tuned if case.width in main]
    rows = [*counts, *others, *timed] if is_gpu else [*timed, *counts, *others]
    # Equal cases keep the first place; a compiled one may fall together with one asked for.
    return list({case.id: case for case in dict.fromkeys(rows)}.values())


def _cases(kind: Kind, names: Named, resolutions: Sequence[int], **common: Any) -> Iterator[Case]:
    for resolution in resolutions:
        for name, options in names:
            if kind == "peers" and name not in PEERS:
                continue
            is_softmax = name == "softmax" and not options and not common.get("compiled")
            against = ("softmax",) if kind == "layer" and not is_softmax else ()
            yield Case(kind=kind, mechanism=name, options=options, resolution=resolution,
                       against=against, **common)  # fmt: skip


def _planned(request: Request, is_first: bool, common: dict[str, Any]) -> Iterator[Case]:
    """The cases of a device's plan, with the first or the second of its resolutions."""
    is_gpu = request.device == "cuda"

    def members(names: Named, group: str) -> Named:
        few = [n for n in names if request.mechanisms or n[0] in ("softmax", "sana", "dydila")]
        compiled = [n for n in few if n[0] != "softmax"]
        return {"all": names, "few": few, "compiled": compiled}[group]

    for kind, mode, group, *sizes in _CUDA if is_gpu else _CPU:
        names = members(request.named if kind == "backbone" else request.layers, group)
        resolutions = sizes[0] if is_first else sizes[1]
        if resolutions and (kind != "backbone" or common["width"] in SIZES):
            pace: dict[str, Any] = {"seconds": 2.0 if kind == "peers" else 1.0}
            pace = {"seconds": 0.25, "rounds": 25} if is_gpu else pace
            yield from _cases(kind, names, request.resolutions or resolutions, mode=mode,
                              compiled=group == "compiled", **pace, **common)  # fmt: skip


def _large(names: Named, is_full: bool, common: dict[str, Any]) -> Iterator[Case]:
    """Where softmax is too slow to run beside each mechanism: memory, and few rounds of time."""
    for resolution in (1536, 2048, 4096) if is_full else (2048,):
        for name, options in names:
            is_plain_softmax = name == "softmax" and not options
            # A CPU does not carry the others to 16,384 tokens in a quick run.
            if is_quadratic(name) and not is_plain_softmax and (not is_full or resolution > 2048):
                continue
            seconds = 0.0 if is_quadratic(name) or resolution > 2048 else 0.6
            yield Case(mechanism=name, options=options, resolution=resolution, seconds=seconds,
                       **common)  # fmt: skip


def _goals_and_quality(request: Request) -> Iterator[Case]:
    if request.profile == "full" and not request.mechanisms:
        for goal in request.goals:
            yield Case(kind="goal", mechanism=goal, resolution=1024, device=request.device)
    # A short training is a CPU's: it ranks nothing and would take the time of many cases.
    if request.quality or (request.profile == "full" and request.device == "cpu"):
        for named in request.named:
            yield from _cases("quality", [named], (16, 32), mode="train", width=96,
                              device=request.device)  # fmt: skip
