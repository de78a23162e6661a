"""What ``bench.scaling`` trains: cases, their settings, and the latents that they read."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from recipes.lab.data.latents import MANIFEST, PLAN
from recipes.lab.files import sha256, write_json
from recipes.lab.training.settings import PRESETS, Settings

MECHANISMS = ("softmax", "sana", "dydila", "sana*3+softmax")
# Images of a step for each GPU, steps, and images that there are, by tokens of one.
IMAGES = {256: 32, 4096: 8}
STEPS = {256: 90, 4096: 24}
STORED = {256: 1024, 4096: 256}
# Gradients added up in buckets beside the backward; likewise in bfloat16; FSDP2; or, to compare
# the first with, in buckets of DDP's size, and by one reduction after the backward. What is not
# train.py's default, by name of the setting:
WAYS: dict[str, dict[str, Any]] = {
    "overlapped": {}, "bf16": {"gradient_sums": "bf16"}, "fsdp2": {"sharded": True},
    "25MB": {"bucket_mb": 25}, "ddp": {"bucket_mb": 0},
}  # fmt: skip
_CHANNELS, _FACTOR, _CLASSES = 4, 8, 1000
_LONG = 100_000  # steps of a run that pays for its compiler and saves, draws and looks at nothing


@dataclasses.dataclass(frozen=True)
class Case:
    """A training that is timed.

    Attributes:
        mechanism: Its attention, or a pattern of several.
        tokens: Of one image.
        gpus: Processes, each on a GPU of its own, or on a CPU.
        way: Of ``WAYS``. One process has nothing to shard: "fsdp2" on one is a step launched by
            the host, as sharded ones are, for them to be compared with; the others on one are
            the step of "overlapped".
        size: Of the backbone, in the controlled protocol.
        saves: Whether a checkpoint is written and timed afterwards.
        recorded: Whether a step is one CUDA graph where that is possible.
    """

    mechanism: str
    tokens: int
    gpus: int
    way: str = "overlapped"
    size: str = "L"
    saves: bool = False
    recorded: bool = True

    @property
    def name(self) -> str:
        return f"{self.mechanism} {self.size} {self.tokens} tokens {self.way} on {self.gpus}"

    @property
    def images(self) -> int:
        """Of a step, for each GPU."""
        return IMAGES.get(self.tokens, 2)

    @property
    def steps(self) -> int:
        """That are taken; the first third does not count."""
        return STEPS.get(self.tokens, 6)

    def settings(self, latents: Path) -> Settings:
        """Those of ``train.py --preset dit`` in the controlled protocol, on these latents."""
        is_base = self.way == "fsdp2" and self.gpus == 1
        every = dict.fromkeys(("checkpoint_every", "sample_every", "diagnose_every"), _LONG)
        own = {
            "data": str(latents), "attn": self.mechanism, "size": self.size,
            "protocol": "controlled", "batch_size": self.images * self.gpus, "steps": _LONG,
            "keep_every": None, **({} if is_base else WAYS[self.way]),
            "cuda_graph": "auto" if self.recorded and not is_base else "off",
        }  # fmt: skip
        return Settings(**{**PRESETS["dit"], **own, **every})


def side_of(tokens: int) -> int:
    """Of a square latent that is so many tokens, in patches of two."""
    return 2 * round(tokens**0.5)


def write_latents(folder: Path, tokens: int) -> None:
    """Writes noise as ``recipes/encode.py`` writes latents; training reads it like any other."""
    side, count = side_of(tokens), STORED.get(tokens, 64)
    generator = torch.Generator().manual_seed(tokens)
    shape = (count, 2, _CHANNELS, side, side)
    tensors = {
        "mean": torch.randn(shape, generator=generator).half(),
        "logvar": torch.full(shape, -6.0).half(),
        "label": torch.arange(count) % _CLASSES,
    }
    folder.mkdir(parents=True)
    shard = folder / "latents-000000.safetensors"
    save_file(tensors, shard)
    facts = {"file": shard.name, "count": count, "bytes": shard.stat().st_size,
             "sha256": sha256(shard)}  # fmt: skip
    vae = {"sha256": hashlib.sha256(b"none: noise").hexdigest(), "scaling_factor": 1.0,
           "shift_factor": 0.0, "channels": _CHANNELS, "factor": _FACTOR}  # fmt: skip
    manifest = {
        "name": f"noise-{tokens}", "vae": vae, "resolution": side * _FACTOR, "shards": [facts],
        "class_names": [f"class {number}" for number in range(_CLASSES)],
    }  # fmt: skip
    write_json(folder / PLAN, {})
    write_json(folder / MANIFEST, manifest)


# Cases that one start of some processes measures, one after the other; and starts that run side
# by side, on GPUs of their own.
Group = list[Case]
Wave = list[Group]


def planned(
    mechanisms: Sequence[str],
    counts: Sequence[int],
    tokens: Sequence[int],
    ways: Sequence[str],
    size: str,
    there: int,
) -> list[Wave]:
    """Every case, the most important first, in waves.

    One GPU first, whose steps all others are compared with and which fills the compiler's cache;
    then the ways in their order, each on most GPUs first.

    Args:
        mechanisms: Names.
        counts: Of GPUs.
        tokens: Of one image.
        ways: Of ``WAYS``.
        size: Of the backbone.
        there: GPUs that there are; groups of fewer run side by side.
    """
    ordered = sorted(counts, reverse=True)
    # One GPU has nothing to reduce.
    reduced = [way for way in ways if way != "fsdp2"]
    alone = tuple(way for way in ways if way not in reduced[1:])
    stages = [(1, alone)] if 1 in counts else []
    stages += [(count, (way,)) for way in ways for count in ordered if count > 1]
    waves: list[Wave] = []
    for count, now in stages:
        groups: Wave = [[] for _ in range(min(len(mechanisms), max(1, there // count)))]
        for place, mechanism in enumerate(mechanisms):
            for way, each in itertools.product(now, tokens):
                saves = count == ordered[0] and mechanism == mechanisms[0] and each == tokens[0]
                case = Case(mechanism, each, count, way, size, saves)
                groups[place % len(groups)].append(case)
        for group in groups:
            group.sort(key=lambda case: tokens.index(case.tokens))
        waves.append(groups)
    return waves


def read_plan(folder: Path) -> list[Case]:
    """The cases of one start, as ``write_plan`` wrote them."""
    return [Case(**entry) for entry in json.loads((folder / "cases.json").read_text("utf-8"))]


def write_plan(folder: Path, cases: Sequence[Case]) -> None:
    """Writes the cases of one start where its processes find them."""
    write_json(folder / "cases.json", [dataclasses.asdict(case) for case in cases])
