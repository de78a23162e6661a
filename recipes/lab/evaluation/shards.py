"""Many images of a run, generated shard by shard: resumable, the same on any number of processes.

Image i of a sample has its own noise and a label that depends on i alone, and a shard always holds
the same images, so that neither an interruption nor the number of processes changes a pixel.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from recipes.lab.console import UserError
from recipes.lab.diffusion import to_uint8
from recipes.lab.training.checkpoint import Run
from recipes.sample import RunSampler


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What decides the images of a sample.

    Attributes:
        samples: Number of images.
        cfg: Guidance scale.
        cfg_channels: Leading channels that are guided; None guides all.
        steps: Model evaluations per image.
        sampler: None takes the one that suits the run.
        seed: Of noise and labels.
        weights: "ema" or "model".
        labels: "balanced" (equal numbers of each class, shuffled) or "random" (drawn).
        shard_size: Images per file.
        batch_size: Images per model call.
    """

    samples: int = 1000
    cfg: float = 1.0
    cfg_channels: int | None = None
    steps: int = 20
    sampler: str | None = None
    seed: int = 0
    weights: str = "ema"
    labels: str = "balanced"
    shard_size: int = 250
    batch_size: int = 64

    def shards(self) -> list[range]:
        """The indices of each shard's images; no images are one empty shard."""
        starts = range(0, max(1, self.samples), self.shard_size)
        return [range(start, min(start + self.shard_size, self.samples)) for start in starts]


class Images(NamedTuple):
    """Images with the classes that were asked for.

    Attributes:
        pixels: (n, h, w, c) uint8.
        labels: (n,) int64.
        finite: (n,) bool; False marks an image with a NaN or infinity, whose pixels are black.
    """

    pixels: Tensor
    labels: Tensor
    finite: Tensor


def sample_labels(plan: Plan, num_classes: int) -> Tensor:
    """The class of each image, (samples,) int64; shuffled, as the Inception Score needs it."""
    generator = torch.Generator().manual_seed(plan.seed)
    if plan.labels == "random":
        return torch.randint(num_classes, (plan.samples,), generator=generator)
    order = torch.randperm(plan.samples, generator=generator)
    return (torch.arange(plan.samples) % num_classes)[order]


def shard_folder(run: Run, plan: Plan) -> Path:
    """Where the shards of a plan lie; another checkpoint or plan has another folder.

    Raises:
        UserError: The run has no whole checkpoint.
    """
    step, digest = checkpoint_digest(run, plan.weights)
    key = {**dataclasses.asdict(plan), "checkpoint": digest}
    tail = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:10]
    return run.folder / "evaluation" / f"step-{step:08d}-cfg-{plan.cfg:g}-{tail}"


def checkpoint_digest(run: Run, weights: str) -> tuple[int, str]:
    """(step, SHA-256 of the weights) of a run's newest whole checkpoint."""
    found = run.newest_checkpoint(warn=print)
    if found is None:
        raise UserError(f"{run.folder} holds no whole checkpoint yet; train it further")
    digest = hashlib.sha256()
    for file in sorted((found[1] / weights).glob("*.safetensors")):
        digest.update(file.read_bytes())
    return found[0], digest.hexdigest()


def generate(
    run: Run,
    plan: Plan,
    *,
    rank: int = 0,
    world: int = 1,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> Path:
    """Generates this process's share of the shards that are still missing.

    Args:
        run: A trained run.
        plan: What to generate.
        rank: Number of this process; it takes every ``world``-th shard.
        world: Number of processes.
        device: See ``RunSampler``.
        progress: Whether to show a bar.

    Returns:
        The folder of the shards; complete once every process is done.
    """
    folder = shard_folder(run, plan)
    folder.mkdir(parents=True, exist_ok=True)
    mine = list(enumerate(plan.shards()))[rank::world]
    missing = [(number, shard) for number, shard in mine if not _is_whole(folder, number, shard)]
    if not missing:
        return folder
    draw = RunSampler(run, plan.weights, device)
    labels = sample_labels(plan, len(draw.data["class_names"]))
    for number, shard in tqdm(missing, desc=f"cfg {plan.cfg:g}", disable=not progress):
        indices = torch.arange(shard.start, shard.stop)
        images = draw(
            labels[indices],
            indices,
            cfg=plan.cfg,
            cfg_channels=plan.cfg_channels,
            steps=plan.steps,
            seed=plan.seed,
            batch_size=plan.batch_size,
            sampler=plan.sampler,
        )
        finite = images.isfinite().flatten(1).all(1)
        pixels = to_uint8(torch.where(finite[:, None, None, None], images, -1.0))
        save_npz(_shard_file(folder, number), pixels, labels=labels[indices], finite=finite)
    return folder


def read_shards(folder: Path, plan: Plan, numbers: Sequence[int] | None = None) -> Images:
    """Reads shards, all or some, in order.

    Raises:
        UserError: One is missing or damaged.
    """
    parts = []
    for number, shard in enumerate(plan.shards()):
        if numbers is not None and number not in numbers:
            continue
        if not _is_whole(folder, number, shard):
            raise UserError(
                f"{_shard_file(folder, number)} is missing or damaged; evaluate the run again"
            )
        with np.load(_shard_file(folder, number)) as stored:
            parts.append([torch.from_numpy(stored[k]) for k in ("arr_0", "labels", "finite")])
    return Images(*map(torch.cat, zip(*parts, strict=True)))


def save_npz(file: Path, pixels: Tensor, **arrays: Any) -> None:
    """Writes images under ADM's key ``arr_0``, (n, h, w, c) uint8; the file appears whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".tmp-{os.getpid()}-{file.name}")
    others = {name: np.asarray(value) for name, value in arrays.items()}
    with temporary.open("wb") as handle:
        np.savez_compressed(handle, arr_0=pixels.numpy(), **others)
    os.replace(temporary, file)


def load_npz(file: Path) -> tuple[Tensor | None, Tensor | None]:
    """Images (n, h, w, c) uint8 and labels of an ADM-style file, None for what it lacks.

    Raises:
        UserError: The file cannot be read, or its images are not of that kind.
    """
    try:
        with np.load(file) as stored:
            pixels = stored.get("arr_0")
            labels = stored.get("labels", stored.get("arr_1"))  # where ADM's sampler puts them
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} cannot be read as an .npz of images: {error}") from error
    if pixels is not None and (pixels.ndim != 4 or pixels.dtype != np.uint8):
        raise UserError(
            f"{file} holds arr_0 of shape {pixels.shape} and type {pixels.dtype}; "
            f"it must be (n, height, width, channels) uint8"
        )
    return (
        None if pixels is None else torch.from_numpy(pixels),
        None if labels is None else torch.from_numpy(labels.astype(np.int64)),
    )


def _shard_file(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.npz"


def _is_whole(folder: Path, number: int, shard: range) -> bool:
    try:
        with np.load(_shard_file(folder, number)) as stored:
            return all(len(stored[name]) == len(shard) for name in ("arr_0", "labels", "finite"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return False
